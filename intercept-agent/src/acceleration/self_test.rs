//! Whether this kernel can join the two ends of a connection (`sk_msg` over a SOCKHASH) without anybody noticing but by
//! speed: tried out on connections of the self-test's own, in a namespace of its own.
//!
//! Every check runs on a plain connection first, where it must pass: it is plain TCP that a joined connection has to be
//! like.

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
        mpsc::{RecvTimeoutError, sync_channel},
    },
    thread,
    time::Duration,
};

use rtnetlink::LinkUnspec;
use serde::Serialize;

use self::{
    ends::{Descriptors, Ends, Seen},
    trial::Joiner,
};
use crate::netns::{Netns, NetnsError};

pub use trial::JoinError;

/// For everything. Each wait inside has a bound of its own; this one is for a kernel that keeps none of them.
const PATIENCE: Duration = Duration::from_secs(120);

/// Whose habits a check has.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum User {
    /// A proxy that sleeps in epoll alone and reads until there is no more: nothing is joined unless these pass.
    Proxy,
    /// Anything else. These say why applications' connections are never joined.
    Application,
}

/// What one check found.
#[derive(Clone, Debug, Serialize)]
pub struct Finding {
    /// The check's name; names do not change.
    pub what: &'static str,
    /// Whose habits it has.
    pub user: User,
    /// The joined connection behaved like TCP.
    pub ok: bool,
    /// The plain connection did. If not, the check says nothing about joined ones.
    pub plain_ok: bool,
    /// What was seen on the joined connection.
    pub joined: String,
    /// What was seen on the plain one.
    pub plain: String,
}

/// Nothing is joined on this kernel.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Refused {
    /// Proxies would notice.
    #[error(
        "connections cannot be joined on this kernel, because joined ones failed {}; `intercept-agent check \
         --accelerate` says what was seen", .0.join(", ")
    )]
    Failed(Vec<&'static str>),
    /// It could not be found out.
    #[error("connections cannot be joined on this kernel, because it could not be tried out: {0}")]
    Untried(String),
}

/// Why nothing was found out.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SelfTestError {
    /// No place to try it.
    #[error(transparent)]
    Netns(#[from] NetnsError),
    /// The place cannot be used.
    #[error("bringing up the loopback interface of the self-test's namespace")]
    Loopback(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// Connections cannot be joined.
    #[error(transparent)]
    Join(#[from] JoinError),
    /// Not even a connection.
    #[error("making a connection for check {check}")]
    Connect {
        /// The check.
        check: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// A connection went past the program.
    #[error("check {0}: the connection was not joined, although the kernel took it: nothing was found out")]
    NotJoined(&'static str),
    /// No thread.
    #[error("starting the self-test")]
    Start(#[source] io::Error),
    /// It hangs, or has panicked.
    #[error("the self-test did not end within {} s", PATIENCE.as_secs())]
    Stuck,
}

/// A check takes a connection and says what it saw.
struct Check {
    name: &'static str,
    user: User,
    run: fn(Ends) -> Seen,
    /// On so many connections, one after the other: where threads race, once says little.
    times: usize,
}

const fn proxy(name: &'static str, times: usize, run: fn(Ends) -> Seen) -> Check {
    Check { name, user: User::Proxy, run, times }
}

const fn application(name: &'static str, times: usize, run: fn(Ends) -> Seen) -> Check {
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

/// Whether connections may be joined on this kernel; found out once in a process.
pub fn admit() -> Result<(), Refused> {
    static FOUND: OnceLock<Result<(), Refused>> = OnceLock::new();
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

/// Runs the checks of these users on this kernel. Takes CAP_SYS_ADMIN and CAP_NET_ADMIN; leaves nothing behind.
pub fn find_out(users: &[User]) -> Result<Vec<Finding>, SelfTestError> {
    let (answer, answered) = sync_channel(1);
    let users = users.to_vec();
    // Not waited for if it hangs: it ends with this process then, and the namespace with it.
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

    /// What the last connection showed, or the first that was not as it should be.
    fn repeat(
        &self,
        mut prepare: impl FnMut(&mut Ends) -> Result<(), JoinError>,
    ) -> Result<Seen, SelfTestError> {
        let descriptors = match self.user {
            User::Proxy => Descriptors::NonBlocking,
            User::Application => Descriptors::Blocking,
        };
        let mut turn = 0;
        loop {
            let mut ends = Ends::connect(descriptors)
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

/// Of the namespace that the calling thread is in.
fn loopback_up() -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    /// It is the first of every namespace.
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
