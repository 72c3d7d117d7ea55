//! Whether this kernel can join the two ends of a connection (`sk_msg` over a SOCKHASH) without anybody noticing but by
//! speed: tried out on connections of the self-test's own, in a namespace of its own.
//!
//! Every check runs on a plain connection first, where it must pass: it is plain TCP that a joined connection has to be
//! like.

mod ends;
mod join;
mod queue;
mod streams;
mod wakeups;

use std::{
    io,
    sync::mpsc::{RecvTimeoutError, sync_channel},
    thread,
    time::Duration,
};

use rtnetlink::LinkUnspec;
use serde::Serialize;

use self::{
    ends::{Ends, Seen},
    join::Joiner,
};
use crate::netns::{Netns, NetnsError};

pub use join::JoinError;

/// For everything. Each wait inside has a bound of its own; this one is for a kernel that keeps none of them.
const PATIENCE: Duration = Duration::from_secs(120);

/// What one check found.
#[derive(Clone, Debug, Serialize)]
pub struct Finding {
    /// The check's name; names do not change.
    pub what: &'static str,
    /// The joined connection behaved like TCP.
    pub ok: bool,
    /// The plain connection did. If not, the check says nothing about joined ones.
    pub plain_ok: bool,
    /// What was seen on the joined connection.
    pub joined: String,
    /// What was seen on the plain one.
    pub plain: String,
}

/// Why nothing was found out.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AccelerationError {
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
    run: fn(Ends) -> Seen,
    /// On so many connections, one after the other: where threads race, once says little.
    times: usize,
}

const fn check(name: &'static str, times: usize, run: fn(Ends) -> Seen) -> Check {
    Check { name, run, times }
}

const CHECKS: [Check; 14] = [
    check("blocking-receive", 1, wakeups::blocking_receive),
    check("epoll-edge", 1, wakeups::epoll_edge),
    check("order", 1, streams::order),
    check("checksums", 1, streams::checksums),
    check("half-close", 50, wakeups::half_close),
    check("end-of-stream", 50, wakeups::end_of_stream),
    check("shutdown-elsewhere", 1, wakeups::shutdown_elsewhere),
    check("reset", 50, wakeups::reset),
    check("splice", 1, streams::splice_out),
    check("sendfile", 1, streams::sendfile_in),
    check("peek", 1, streams::peek),
    check("slow-reader", 1, queue::slow_reader),
    check("low-water", 1, queue::low_water),
    check("pending-bytes", 1, queue::pending_bytes),
];

/// Runs every check on this kernel. Takes CAP_SYS_ADMIN and CAP_NET_ADMIN; leaves nothing behind.
pub fn self_test() -> Result<Vec<Finding>, AccelerationError> {
    let (answer, answered) = sync_channel(1);
    // Not waited for if it hangs: it ends with this process then, and the namespace with it.
    let test = move || drop(answer.send(inside()));
    thread::Builder::new().name("self-test".to_owned()).spawn(test).map_err(AccelerationError::Start)?;
    match answered.recv_timeout(PATIENCE) {
        Ok(result) => result,
        Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => Err(AccelerationError::Stuck),
    }
}

fn inside() -> Result<Vec<Finding>, AccelerationError> {
    let netns = Netns::fresh()?;
    netns.run(|| {
        loopback_up().map_err(AccelerationError::Loopback)?;
        let mut joiner = Joiner::load()?;
        CHECKS.iter().map(|check| find_out(check, &mut joiner)).collect()
    })?
}

fn find_out(check: &Check, joiner: &mut Joiner) -> Result<Finding, AccelerationError> {
    let what = check.name;
    let plain = check.repeat(|_| Ok(()))?;
    let before = joiner.messages()?;
    let joined = check.repeat(|ends| joiner.join(ends))?;
    if joiner.messages()? == before {
        return Err(AccelerationError::NotJoined(what));
    }
    let ok = plain.is_ok() && joined.is_ok();
    let plain_ok = plain.is_ok();
    let text = |seen: Seen| seen.unwrap_or_else(|fault| fault.to_string());
    Ok(Finding { what, ok, plain_ok, joined: text(joined), plain: text(plain) })
}

impl Check {
    /// What the last connection showed, or the first that was not as it should be.
    fn repeat(
        &self,
        mut prepare: impl FnMut(&Ends) -> Result<(), JoinError>,
    ) -> Result<Seen, AccelerationError> {
        let mut turn = 0;
        loop {
            let ends =
                Ends::connect().map_err(|source| AccelerationError::Connect { check: self.name, source })?;
            prepare(&ends)?;
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
