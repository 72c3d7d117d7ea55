//! Changes of the mirrored state, as they happen.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use netlink_sys::{Socket, protocols::NETLINK_ROUTE};
use rustix::io::Errno;
use rustix::net::RecvFlags;
use tokio::io::unix::AsyncFd;
use tokio::time::{Instant, sleep_until, timeout, timeout_at};

use super::requests::Requests;
use super::{RouteSnapshot, RoutesError};
use crate::listeners::{ListenersError, PortWatch};
use crate::netns::Netns;

/// `RTNLGRP_*` of linux/rtnetlink.h: links; addresses, routes and rules of both families; next hop objects.
const GROUPS: [u32; 8] = [1, 5, 7, 8, 9, 11, 19, 32];
/// A change rarely comes alone: how long after one the next is waited for, and for how long at most.
const QUIET: Duration = Duration::from_millis(10);
const LATEST: Duration = Duration::from_millis(50);
/// How often listeners are looked for: one that is new is to be known within a second.
const LISTENERS_INTERVAL: Duration = Duration::from_millis(400);
/// Events read at a time, so that a flood of them does not keep us from reading the state.
const BATCH: usize = 1024;

/// How many times the processor time of a reading passes until the next: what a pod changes without end takes no more
/// than a fiftieth of a processor.
const REST: u32 = 50;
/// After a reading that failed, and twice as long after each other in a row.
const FIRST_RETRY: Duration = Duration::from_millis(100);
const LAST_RETRY: Duration = Duration::from_secs(60);

/// A namespace's [`RouteSnapshot`], kept up to date. Holds the namespace: drop it when the pod is gone.
pub struct Follower {
    events: AsyncFd<Socket>,
    requests: Arc<Mutex<Requests>>,
    current: RouteSnapshot,
    netns: String,
    /// Not to be read before.
    rest_until: Instant,
    /// Readings that failed in a row.
    failures: u32,
    /// Something happened since `current` was read.
    stale: bool,
    /// Listeners that the agent must know of, although no program registers them.
    listeners: Option<Arc<Mutex<PortWatch>>>,
    /// What reading has used of a processor.
    #[cfg(test)]
    used: Duration,
}

impl Follower {
    /// Subscribes: every change from here on is noticed. What there is now is not read yet; [`Follower::look`] does.
    /// To be called within a tokio runtime with io and time enabled.
    pub fn subscribe(netns: &Netns) -> Result<Self, RoutesError> {
        let subscribe = || {
            let mut socket = Socket::new(NETLINK_ROUTE)?;
            socket.set_non_blocking(true)?;
            socket.bind_auto()?;
            for group in GROUPS {
                socket.add_membership(group)?;
            }
            Ok(socket)
        };
        let netlink = |source| RoutesError::Netlink {
            attempt: "subscribing to changes",
            netns: netns.name().to_owned(),
            source,
        };
        let events = netns.run(subscribe)?.map_err(netlink)?;
        // SAFETY: a Socket gives the one descriptor that it owns, and closes it only when it is dropped.
        let events = unsafe { AsyncFd::register(events) }.map_err(|error| netlink(error.into()))?;
        let requests = Arc::new(Mutex::new(Requests::open(netns)?));
        Ok(Self {
            events,
            requests,
            current: RouteSnapshot::default(),
            netns: netns.name().to_owned(),
            rest_until: Instant::now(),
            failures: 0,
            stale: false,
            listeners: None,
            #[cfg(test)]
            used: Duration::ZERO,
        })
    }

    /// Reads what there is, from which changes are told from here on.
    pub fn look(&mut self) -> Result<&RouteSnapshot, RoutesError> {
        // What has happened until now is in what is read.
        for _ in 0..BATCH {
            if take_event(self.events.get_ref()) == Err(Errno::AGAIN) {
                break;
            }
        }
        self.current = RouteSnapshot::read(&mut lock(&self.requests))?;
        self.stale = false;
        Ok(&self.current)
    }

    /// From here on changes are told from this state, which the agent is about to bring about or has.
    pub fn expect(&mut self, state: RouteSnapshot) {
        self.current = state;
    }

    /// A listener of this port is a change as well, from here on.
    pub fn watch_listeners(&mut self, netns: &Netns, port: u16) -> Result<(), ListenersError> {
        self.listeners = Some(Arc::new(Mutex::new(PortWatch::open(netns, port)?)));
        Ok(())
    }

    /// The last state read.
    #[cfg(test)]
    pub fn current(&self) -> &RouteSnapshot {
        &self.current
    }

    /// Waits for a state that differs from [`Follower::current`], and makes it that. After an error it may be
    /// called again: the state is then read anew. Nothing is lost when it is dropped while waiting.
    pub async fn changed(&mut self) -> Result<&RouteSnapshot, RoutesError> {
        loop {
            if !self.stale {
                match self.listeners.clone() {
                    None => self.event().await?,
                    Some(listeners) => match timeout(LISTENERS_INTERVAL, self.event()).await {
                        Ok(event) => event?,
                        Err(_) if has_new(Arc::clone(&listeners)).await => {
                            listeners.lock().unwrap_or_else(PoisonError::into_inner).reported();
                            return Ok(&self.current);
                        }
                        Err(_) => continue,
                    },
                }
            }
            sleep_until(self.rest_until).await;
            let latest = Instant::now() + LATEST;
            while let Ok(event) = timeout_at(latest.min(Instant::now() + QUIET), self.event()).await {
                event?;
            }
            let read = self.read().await?;
            self.stale = false;
            if read != self.current {
                self.current = read;
                return Ok(&self.current);
            }
        }
    }

    /// Reads what there is, on a thread where nothing else waits for it.
    async fn read(&mut self) -> Result<RouteSnapshot, RoutesError> {
        let requests = Arc::clone(&self.requests);
        let reading = tokio::task::spawn_blocking(move || {
            let before = processor_time();
            let read = RouteSnapshot::read(&mut lock(&requests));
            (read, processor_time().saturating_sub(before))
        });
        let (read, took) = match reading.await {
            Ok(done) => done,
            Err(panicked) => std::panic::resume_unwind(panicked.into_panic()),
        };
        #[cfg(test)]
        {
            self.used += took;
        }
        let mut rest = took * REST;
        self.failures = if read.is_ok() { 0 } else { self.failures + 1 };
        if self.failures > 0 {
            rest = rest.max((FIRST_RETRY * (1 << self.failures.min(16))).min(LAST_RETRY));
        }
        self.rest_until = Instant::now() + rest;
        read
    }

    /// Waits for events and takes them. What they say does not matter, not even when some were lost (ENOBUFS):
    /// the state is read as a whole.
    async fn event(&mut self) -> Result<(), RoutesError> {
        let netlink = |source: io::Error| RoutesError::Netlink {
            attempt: "waiting for changes",
            netns: self.netns.clone(),
            source,
        };
        loop {
            let mut ready = self.events.readable().await.map_err(netlink)?;
            for _ in 0..BATCH {
                match take_event(ready.get_inner()) {
                    Ok(()) | Err(Errno::NOBUFS) => self.stale = true,
                    Err(Errno::INTR) => {}
                    Err(Errno::AGAIN) => {
                        ready.clear_ready();
                        break;
                    }
                    Err(error) => return Err(netlink(error.into())),
                }
            }
            if self.stale {
                return Ok(());
            }
        }
    }
}

/// On a thread where nothing else waits for it: a pod may have any number of listeners.
async fn has_new(listeners: Arc<Mutex<PortWatch>>) -> bool {
    let look = move || listeners.lock().unwrap_or_else(PoisonError::into_inner).has_new();
    match tokio::task::spawn_blocking(look).await {
        Ok(Ok(is_new)) => is_new,
        Ok(Err(error)) => {
            tracing::debug!(%error, "looking for new listeners of the proxy");
            false
        }
        Err(panicked) => std::panic::resume_unwind(panicked.into_panic()),
    }
}

/// A reading that panicked left no half answer that would be taken for another's.
fn lock(requests: &Mutex<Requests>) -> MutexGuard<'_, Requests> {
    requests.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What the calling thread has used of a processor.
fn processor_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::try_from(time).unwrap_or_default()
}

/// One, of which nothing but that it came is of interest.
fn take_event(socket: &Socket) -> Result<(), Errno> {
    let mut bytes = [0_u8; 16];
    rustix::net::recv(socket, &mut bytes, RecvFlags::DONTWAIT).map(drop)
}

#[cfg(test)]
impl Follower {
    /// Subscribes and looks.
    pub(super) fn start(netns: &Netns) -> Result<Self, RoutesError> {
        let mut follower = Self::subscribe(netns)?;
        follower.look()?;
        Ok(follower)
    }

    /// What reading has used of a processor since it was started.
    pub(super) fn processor_time(&self) -> Duration {
        self.used
    }

    /// Leaves the socket room for a few events only.
    pub(super) fn shrink_buffer(&self) {
        rustix::net::sockopt::set_socket_recv_buffer_size(self.events.get_ref(), 4096)
            .expect("a buffer size");
    }
}
