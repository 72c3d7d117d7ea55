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
type Check = (&'static str, fn(Ends) -> Seen);

const CHECKS: [Check; 13] = [
    ("blocking-receive", wakeups::blocking_receive),
    ("epoll-edge", wakeups::epoll_edge),
    ("order", streams::order),
    ("checksums", streams::checksums),
    ("half-close", wakeups::half_close),
    ("shutdown-elsewhere", wakeups::shutdown_elsewhere),
    ("reset", wakeups::reset),
    ("splice", streams::splice_out),
    ("sendfile", streams::sendfile_in),
    ("peek", streams::peek),
    ("slow-reader", queue::slow_reader),
    ("low-water", queue::low_water),
    ("pending-bytes", queue::pending_bytes),
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

fn find_out(&(what, check): &Check, joiner: &mut Joiner) -> Result<Finding, AccelerationError> {
    let connect = || Ends::connect().map_err(|source| AccelerationError::Connect { check: what, source });
    let plain = check(connect()?);
    let before = joiner.messages()?;
    let ends = connect()?;
    joiner.join(&ends)?;
    let joined = check(ends);
    if joiner.messages()? == before {
        return Err(AccelerationError::NotJoined(what));
    }
    let text = |seen: &Seen| match seen {
        Ok(seen) => seen.clone(),
        Err(fault) => fault.to_string(),
    };
    Ok(Finding {
        what,
        ok: plain.is_ok() && joined.is_ok(),
        plain_ok: plain.is_ok(),
        joined: text(&joined),
        plain: text(&plain),
    })
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
