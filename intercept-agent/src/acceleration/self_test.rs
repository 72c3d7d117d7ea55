//! Tests whether this kernel joins the two ends of a connection (`sk_msg` with a SOCKHASH) without a difference in
//! behaviour. It uses connections of its own in a new network namespace.
//!
//! Each check runs on a plain TCP connection first, where it must pass, because a joined connection must behave like
//! plain TCP.

mod ends;
mod latch;
mod queue;
mod streams;
mod trial;
mod wakeups;

use std::{
    io,
    sync::{
        OnceLock,
        atomic::{AtomicBool, Ordering},
        mpsc::{RecvTimeoutError, sync_channel},
    },
    thread,
    time::Duration,
};

use rtnetlink::LinkUnspec;
use serde::Serialize;

use self::{
    ends::{Descriptors, Seen, SocketPair},
    trial::Joiner,
};
use crate::netns::{Netns, NetnsError};

pub use trial::JoinError;

/// Time limit for all checks. Every wait has its own limit; this one catches kernels that do not keep them.
const PATIENCE: Duration = Duration::from_secs(120);

/// The programs whose use of sockets a check imitates.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum User {
    /// Proxies, which sleep only in epoll and read until EAGAIN. No connection is joined unless these checks pass.
    Proxy,
    /// Other programs. These checks show why connections of applications are never joined.
    Application,
}

/// The result of a check.
#[derive(Clone, Debug, Serialize)]
pub struct Finding {
    /// Name of the check. Names are stable.
    pub what: &'static str,
    /// The programs that it imitates.
    pub user: User,
    /// Whether the joined connection behaved like TCP.
    pub ok: bool,
    /// Whether the plain connection passed. If not, the check says nothing about joined ones.
    pub plain_ok: bool,
    /// Observation on the joined connection.
    pub joined: String,
    /// Observation on the plain connection.
    pub plain: String,
}

/// Why no connection is joined on this kernel.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Refused {
    /// A check for proxies failed.
    #[error(
        "connections cannot be joined on this kernel, because joined ones failed {}; `intercept-agent check \
         --accelerate` shows the details", .0.join(", ")
    )]
    Failed(Vec<&'static str>),
    /// The self-test could not run.
    #[error("connections cannot be joined on this kernel, because the self-test failed to run: {0}")]
    Untried(String),
}

/// Why the self-test could not run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SelfTestError {
    /// The namespace cannot be created or entered.
    #[error(transparent)]
    Netns(#[from] NetnsError),
    /// The namespace cannot be set up.
    #[error("bringing up the loopback interface of the self-test's namespace")]
    Loopback(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The kernel refuses to join connections.
    #[error(transparent)]
    Join(#[from] JoinError),
    /// A TCP connection cannot be opened.
    #[error("opening a connection for check {check}")]
    Connect {
        /// The check.
        check: &'static str,
        /// The error from the kernel.
        source: io::Error,
    },
    /// The kernel accepted a connection, but no message was joined.
    #[error(
        "check {0}: no message was joined, although the kernel accepted the connection; the check has no result"
    )]
    NotJoined(&'static str),
    /// The thread cannot be started.
    #[error("starting the self-test")]
    Start(#[source] io::Error),
    /// The self-test hangs or has panicked.
    #[error("the self-test did not end within {} s", PATIENCE.as_secs())]
    Stuck,
}

/// A check: a function that uses a connection and returns its observation.
struct Check {
    name: &'static str,
    user: User,
    run: fn(SocketPair) -> Seen,
    /// Number of connections, one after the other. A race may need several to show.
    times: usize,
}

const fn proxy(name: &'static str, times: usize, run: fn(SocketPair) -> Seen) -> Check {
    Check { name, user: User::Proxy, run, times }
}

const fn application(name: &'static str, times: usize, run: fn(SocketPair) -> Seen) -> Check {
    Check { name, user: User::Application, run, times }
}

const CHECKS: [Check; 21] = [
    proxy("epoll-edge", 1, wakeups::epoll_edge),
    proxy("order", 1, streams::order),
    proxy("checksums", 1, streams::checksums),
    proxy("half-close", 10, wakeups::half_close),
    proxy("end-of-stream", 10, wakeups::end_of_stream),
    proxy("reset", 10, wakeups::reset),
    proxy("close-unread", 10, wakeups::close_unread),
    proxy("sendfile", 1, streams::sendfile_in),
    proxy("peek", 1, streams::peek),
    proxy("by-tcp-and-back", 1, latch::there_and_back),
    proxy("edge-by-tcp", 1, latch::edges),
    proxy("memory", 1, queue::charged),
    proxy("pending-bytes", 1, queue::pending_bytes),
    application("blocking-receive", 1, wakeups::blocking_receive),
    application("blocking-half-close", 50, wakeups::half_close),
    application("blocking-shutdown-elsewhere", 1, wakeups::shutdown_elsewhere),
    application("blocking-reset", 20, wakeups::reset),
    application("splice", 1, streams::splice_out),
    application("slow-reader", 1, queue::slow_reader),
    application("low-water", 1, queue::low_water),
    application("pending-bytes-by-tcp", 1, latch::pending_bytes),
];

/// The self-test runs once per process.
static FOUND: OnceLock<Result<(), Refused>> = OnceLock::new();

/// Whether the self-test has ended. If it has not begun, starts it on a thread of its own.
pub fn has_ended() -> bool {
    static STARTED: AtomicBool = AtomicBool::new(false);
    if FOUND.get().is_none() && !STARTED.swap(true, Ordering::Relaxed) {
        let started = thread::Builder::new().name("self-test-result".to_owned()).spawn(|| drop(admit()));
        if let Err(error) = started {
            let _another_was_first = FOUND.set(Err(Refused::Untried(error.to_string())));
        }
    }
    FOUND.get().is_some()
}

/// Whether connections may be joined on this kernel. Waits for the self-test.
pub fn admit() -> Result<(), Refused> {
    FOUND
        .get_or_init(|| {
            let findings = find_out(&[User::Proxy]).map_err(|error| Refused::Untried(chain(&error)))?;
            let failed: Vec<_> =
                findings.iter().filter(|finding| !finding.ok).map(|finding| finding.what).collect();
            if failed.is_empty() { Ok(()) } else { Err(Refused::Failed(failed)) }
        })
        .clone()
}

fn chain(error: &dyn std::error::Error) -> String {
    let sources = std::iter::successors(Some(error), |error| error.source());
    sources.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

/// Runs the checks for `users`. Needs CAP_SYS_ADMIN and CAP_NET_ADMIN, and leaves nothing behind.
pub fn find_out(users: &[User]) -> Result<Vec<Finding>, SelfTestError> {
    let (answer, answered) = sync_channel(1);
    let users = users.to_vec();
    // The thread is not joined if it hangs. It then ends with the process, and so does its namespace.
    let test = move || drop(answer.send(inside(&users)));
    thread::Builder::new().name("self-test".to_owned()).spawn(test).map_err(SelfTestError::Start)?;
    match answered.recv_timeout(PATIENCE) {
        Ok(result) => result,
        Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => Err(SelfTestError::Stuck),
    }
}

fn inside(users: &[User]) -> Result<Vec<Finding>, SelfTestError> {
    let netns = Netns::fresh()?;
    netns.run(|| {
        loopback_up().map_err(SelfTestError::Loopback)?;
        let mut joiner = Joiner::load()?;
        CHECKS
            .iter()
            .filter(|check| users.contains(&check.user))
            .map(|check| check.find_out(&mut joiner))
            .collect()
    })?
}

impl Check {
    fn find_out(&self, joiner: &mut Joiner) -> Result<Finding, SelfTestError> {
        let plain = self.repeat(|_| Ok(()))?;
        let before = joiner.messages()?;
        let joined = self.repeat(|ends| joiner.join(ends))?;
        if joiner.messages()? == before {
            return Err(SelfTestError::NotJoined(self.name));
        }
        let (ok, plain_ok) = (plain.is_ok() && joined.is_ok(), plain.is_ok());
        let text = |seen: Seen| seen.unwrap_or_else(|fault| fault.to_string());
        let (joined, plain) = (text(joined), text(plain));
        Ok(Finding { what: self.name, user: self.user, ok, plain_ok, joined, plain })
    }

    /// Returns the observation on the last connection, or the first failure.
    fn repeat(
        &self,
        mut prepare: impl FnMut(&mut SocketPair) -> Result<(), JoinError>,
    ) -> Result<Seen, SelfTestError> {
        let descriptors = match self.user {
            User::Proxy => Descriptors::NonBlocking,
            User::Application => Descriptors::Blocking,
        };
        let mut turn = 0;
        loop {
            let mut ends = SocketPair::connect(descriptors)
                .map_err(|source| SelfTestError::Connect { check: self.name, source })?;
            prepare(&mut ends)?;
            let seen = (self.run)(ends);
            turn += 1;
            if seen.is_err() || turn >= self.times {
                return Ok(seen);
            }
        }
    }
}

/// Sets up the loopback interface of the calling thread's namespace.
fn loopback_up() -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    /// The loopback interface has index 1 in every namespace.
    const LOOPBACK: u32 = 1;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let (connection, handle, _) = rtnetlink::new_connection()?;
        let connection = tokio::spawn(connection);
        let up = handle.link().set(LinkUnspec::new_with_index(LOOPBACK).up().build()).execute().await;
        connection.abort();
        Ok(up?)
    })
}
