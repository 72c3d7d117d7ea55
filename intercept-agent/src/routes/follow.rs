//! Follows changes of a namespace's routes and interfaces.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};
use rustix::io::Errno;
use rustix::net::RecvFlags;
use tokio::io::unix::AsyncFd;
use tokio::time::{Instant, sleep_until, timeout, timeout_at};

use super::requests::Requests;
use super::{RouteReading, RouteSnapshot, RouteSocket, RoutesError};
use crate::listeners::{ListenersError, PortWatch};
use crate::netns::Netns;

/// `RTNLGRP_*` of linux/rtnetlink.h, as bits: links; addresses, routes and rules of both families; next hop objects.
const GROUPS: u32 = group(1) | group(5) | group(7) | group(8) | group(9) | group(11) | group(19) | group(32);

const fn group(number: u32) -> u32 {
    1 << (number - 1)
}

/// Changes come in bursts. The state is read after this long without a further event, and at the latest after `LATEST`.
const QUIET: Duration = Duration::from_millis(10);
const LATEST: Duration = Duration::from_millis(50);
/// Polling interval for new listeners, which must be known within a second.
const LISTENERS_INTERVAL: Duration = Duration::from_millis(400);
/// Most events per pass, so that a flood of them does not starve the reading of the state.
const BATCH: usize = 1024;

/// After a reading, the follower rests for this many times the processor time that it took. A pod that changes its
/// routes endlessly costs at most a fiftieth of a processor.
const REST: u32 = 50;
/// Delay after a failed reading; it doubles with each further failure, up to `LAST_RETRY`.
const FIRST_RETRY: Duration = Duration::from_millis(100);
const LAST_RETRY: Duration = Duration::from_secs(60);

const SUBSCRIBING: &str = "subscribing to changes";

/// Collects the changes of a namespace from the time at which it is opened, for a [`Follower`] that starts later. It holds the
/// namespace open.
pub struct Subscription {
    events: Socket,
    socket: RouteSocket,
    current: RouteSnapshot,
    netns: String,
    /// Listeners that no program registers, and that the agent must therefore poll for.
    listeners: Option<Arc<Mutex<PortWatch>>>,
}

/// A [`RouteSnapshot`] that is kept up to date. It holds the namespace open: drop it when the pod is gone.
pub struct Follower {
    events: AsyncFd<Socket>,
    socket: RouteSocket,
    current: RouteSnapshot,
    netns: String,
    /// The state is not read before this time.
    rest_until: Instant,
    /// Consecutive failed readings.
    failures: u32,
    /// An event came since `current` was read.
    stale: bool,
    listeners: Option<Arc<Mutex<PortWatch>>>,
    /// All readings so far.
    #[cfg(test)]
    readings: Vec<Reading>,
}

/// A reading by [`Follower::changed`].
#[cfg(test)]
#[derive(Clone, Copy, Debug)]
pub(super) struct Reading {
    /// When it was asked for.
    pub(super) began: Instant,
    /// When it was done.
    pub(super) ended: Instant,
    /// Processor time that it took.
    pub(super) took: Duration,
}

impl Subscription {
    /// Subscribes to changes. The current state is not read yet; [`Subscription::look`] does that.
    pub fn open(netns: &Netns) -> Result<Self, RoutesError> {
        let subscribe = || {
            let mut socket = Socket::new(NETLINK_ROUTE)?;
            socket.set_non_blocking(true)?;
            socket.bind(&SocketAddr::new(0, GROUPS))?;
            Ok(socket)
        };
        let events = netns.run(subscribe)?.map_err(|source| failed(SUBSCRIBING, netns.name(), source))?;
        let socket = RouteSocket::new(Requests::open(netns)?);
        let (current, netns) = (RouteSnapshot::default(), netns.name().to_owned());
        Ok(Self { events, socket, current, netns, listeners: None })
    }

    /// Reads the current state, from which later changes are reported.
    pub fn look(&mut self) -> Result<RouteReading, RoutesError> {
        // Events before this point are part of the state read below.
        for _ in 0..BATCH {
            if take_event(&self.events) == Err(Errno::AGAIN) {
                break;
            }
        }
        let (snapshot, listed) = RouteSnapshot::read(&mut self.socket.requests())?;
        self.current = snapshot.clone();
        Ok(RouteReading { snapshot, listed, socket: self.socket.clone() })
    }

    /// Sets the state from which changes are reported, for a change that the agent makes itself.
    pub fn expect(&mut self, state: RouteSnapshot) {
        self.current = state;
    }

    /// Also reports new listeners on `port`.
    pub fn watch_listeners(&mut self, netns: &Netns, port: u16) -> Result<(), ListenersError> {
        self.listeners = Some(Arc::new(Mutex::new(PortWatch::open(netns, port)?)));
        Ok(())
    }

    /// Starts to report changes, and those that came before.
    ///
    /// Must be called in a tokio runtime with io and time enabled.
    pub fn follow(self) -> Result<Follower, RoutesError> {
        let Self { events, socket, current, netns, listeners } = self;
        // SAFETY: a Socket returns the one descriptor that it owns, and closes it only in its drop.
        let events = unsafe { AsyncFd::register(events) };
        let events = events.map_err(|error| failed(SUBSCRIBING, &netns, error.into()))?;
        Ok(Follower {
            events,
            socket,
            current,
            netns,
            rest_until: Instant::now(),
            failures: 0,
            stale: false,
            listeners,
            #[cfg(test)]
            readings: Vec::new(),
        })
    }
}

impl Follower {
    /// The last state read.
    #[cfg(test)]
    pub fn current(&self) -> &RouteSnapshot {
        &self.current
    }

    /// Waits for a state that differs from the current one, and makes it current.
    ///
    /// After an error it may be called again, and reads the state again. It is cancel safe.
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

    /// Reads the state on a blocking thread.
    async fn read(&mut self) -> Result<RouteSnapshot, RoutesError> {
        #[cfg(test)]
        let began = Instant::now();
        let socket = self.socket.clone();
        let reading = tokio::task::spawn_blocking(move || {
            let before = processor_time();
            let read = RouteSnapshot::read(&mut socket.requests()).map(|(snapshot, _)| snapshot);
            (read, processor_time().saturating_sub(before))
        });
        let (read, took) = match reading.await {
            Ok(done) => done,
            Err(panicked) => std::panic::resume_unwind(panicked.into_panic()),
        };
        #[cfg(test)]
        self.readings.push(Reading { began, ended: Instant::now(), took });
        let mut rest = took * REST;
        self.failures = if read.is_ok() { 0 } else { self.failures + 1 };
        if self.failures > 0 {
            rest = rest.max((FIRST_RETRY * (1 << self.failures.min(16))).min(LAST_RETRY));
        }
        self.rest_until = Instant::now() + rest;
        read
    }

    /// Waits for events and discards them. Their content does not matter, nor does the loss of some (ENOBUFS), because
    /// the whole state is read.
    async fn event(&mut self) -> Result<(), RoutesError> {
        let netlink = |source| failed("waiting for changes", &self.netns, source);
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

/// Polls on a blocking thread, because a pod may have any number of listeners.
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

/// Returns the processor time of the calling thread.
fn processor_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::try_from(time).unwrap_or_default()
}

fn failed(attempt: &'static str, netns: &str, source: io::Error) -> RoutesError {
    RoutesError::Netlink { attempt, netns: netns.to_owned(), source }
}

/// Receives one event and discards it.
fn take_event(socket: &Socket) -> Result<(), Errno> {
    let mut bytes = [0_u8; 16];
    rustix::net::recv(socket, &mut bytes, RecvFlags::DONTWAIT).map(drop)
}

#[cfg(test)]
impl Follower {
    /// Subscribes and reads the state.
    pub(super) fn start(netns: &Netns) -> Result<Self, RoutesError> {
        let mut subscription = Subscription::open(netns)?;
        subscription.look()?;
        subscription.follow()
    }

    /// Returns all readings so far.
    pub(super) fn readings(&self) -> &[Reading] {
        &self.readings
    }

    /// Shrinks the receive buffer to a few events.
    pub(super) fn shrink_buffer(&self) {
        rustix::net::sockopt::set_socket_recv_buffer_size(self.events.get_ref(), 4096)
            .expect("a buffer size");
    }
}
