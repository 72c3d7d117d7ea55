//! Watching a port for sockets that begin to listen.

use std::{collections::BTreeSet, io};

use netlink_sys::protocols::NETLINK_SOCK_DIAG;

use super::{ListenersError, diag::ask_for};
use crate::{netlink::Questions, netns::Netns};

/// The listening sockets of one port, asked for again and again.
pub struct PortWatch {
    questions: Questions,
    port: u16,
    seen: BTreeSet<u64>,
    is_new: bool,
}

impl PortWatch {
    /// Watches a port of a namespace, which it holds. What listens now is new.
    pub fn open(netns: &Netns, port: u16) -> Result<Self, ListenersError> {
        let list = |source| ListenersError::List { netns: netns.name().to_owned(), source };
        let questions = Questions::open(netns, NETLINK_SOCK_DIAG)?.map_err(list)?;
        Ok(Self { questions, port, seen: BTreeSet::new(), is_new: false })
    }

    /// Whether a socket listens that did not when [`PortWatch::reported`] was last called.
    pub fn has_new(&mut self) -> io::Result<bool> {
        let now: BTreeSet<u64> =
            ask_for(&mut self.questions, self.port)?.into_iter().map(|(inode, _)| inode).collect();
        self.is_new |= !now.is_subset(&self.seen);
        self.seen = now;
        Ok(self.is_new)
    }

    /// What was new is known.
    pub fn reported(&mut self) {
        self.is_new = false;
    }
}
