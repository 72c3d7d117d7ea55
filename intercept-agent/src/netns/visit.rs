//! Enters a network namespace with the calling thread, and returns.

use std::{
    cell::Cell,
    fs,
    os::{
        fd::{AsFd as _, BorrowedFd, OwnedFd},
        unix::fs::MetadataExt as _,
    },
    sync::OnceLock,
    thread,
    time::Duration,
};

use rustix::{
    fs::{Mode, OFlags, open},
    io::Errno,
    thread::{LinkNameSpaceType, move_into_link_name_space},
};

use crate::ids::NetnsCookie;

/// The kernel may be short of memory for a moment.
const ATTEMPTS: u32 = 50;
const PAUSE: Duration = Duration::from_millis(20);

thread_local! {
    /// Netns cookie of the namespace that this thread visits.
    static INSIDE: Cell<Option<NetnsCookie>> = const { Cell::new(None) };
}

/// Returns the netns cookie of the namespace that the calling thread visits.
pub(super) fn current() -> Option<NetnsCookie> {
    INSIDE.get()
}

/// Returns device and inode of the namespace in which this process started. `/proc/self` tells that of its first thread,
/// which may be on a visit.
pub(super) fn own_of_process() -> Option<(u64, u64)> {
    static OWN: OnceLock<Option<(u64, u64)>> = OnceLock::new();
    *OWN.get_or_init(|| fs::metadata("/proc/self/ns/net").ok().map(|own| (own.dev(), own.ino())))
}

/// The namespace in which this process started, held open. Every thread that is not on a visit is in it.
fn home_of_process() -> Result<BorrowedFd<'static>, Errno> {
    static HOME: OnceLock<OwnedFd> = OnceLock::new();
    if let Some(home) = HOME.get() {
        return Ok(home.as_fd());
    }
    let home = open_current()?;
    Ok(HOME.get_or_init(|| home).as_fd())
}

/// Opens the namespace that the calling thread is in.
fn open_current() -> Result<OwnedFd, Errno> {
    open("/proc/thread-self/ns/net", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
}

/// Where a visit returns to.
enum Home {
    Process(BorrowedFd<'static>),
    /// Another visit.
    Visited(OwnedFd),
}

/// A visit of the calling thread to a namespace. It ends with the return to where the thread was before.
pub(super) struct Visit {
    home: Home,
    before: Option<NetnsCookie>,
}

impl Visit {
    /// Enters the namespace, whose cookie is not known the first time.
    pub(super) fn begin(netns: BorrowedFd<'_>, cookie: NetnsCookie) -> Result<Self, Errno> {
        own_of_process();
        let home = match current() {
            None => Home::Process(home_of_process()?),
            Some(_) => Home::Visited(open_current()?),
        };
        enter(netns)?;
        Ok(Self { home, before: INSIDE.replace(Some(cookie)) })
    }
}

impl Drop for Visit {
    fn drop(&mut self) {
        INSIDE.set(self.before);
        let home = match &self.home {
            Home::Process(home) => *home,
            Home::Visited(home) => home.as_fd(),
        };
        for _ in 0..ATTEMPTS {
            match enter(home) {
                Ok(()) => return,
                Err(error) => tracing::error!(%error, "leaving the network namespace of a pod"),
            }
            thread::sleep(PAUSE);
        }
        // What this thread does next would happen in the pod. Captures survive the end of the agent.
        std::process::abort();
    }
}

fn enter(netns: BorrowedFd<'_>) -> Result<(), Errno> {
    move_into_link_name_space(netns, Some(LinkNameSpaceType::Network))
}
