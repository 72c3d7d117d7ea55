//! Many connections at the same time.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use anyhow::Result;
use rustix::io::Errno;

use super::clients::{RequestProgress, RequestState, index};
use super::protocol::HeldConnections;
use super::socket::{Poller, SocketReadiness, dial};

/// Number of connections that are opened at the same time.
const UNDER_WAY: usize = 64;

/// Number of failures in a row after which it gives up.
const HOPELESS: u64 = 2000;

/// The connections that are kept.
#[derive(Default)]
pub(super) struct Holding {
    open: Vec<OwnedFd>,
}

impl Holding {
    /// Adds a connection.
    pub(super) fn keep(&mut self, socket: OwnedFd) {
        self.open.push(socket);
    }

    /// Opens connections, each with a response of one byte, until the number is reached, the time is over, or every
    /// attempt fails.
    pub(super) fn open(
        &mut self,
        to: &[SocketAddr],
        from: &[IpAddr],
        connections: usize,
        limit: Duration,
    ) -> Result<HeldConnections> {
        let mut poller = Poller::new()?;
        let request = [1_u32.to_be_bytes(), 1_u32.to_be_bytes()].concat();
        let request = [&request[..], b"."].concat();
        let begun = Instant::now();
        let deadline = begun + limit;
        let mut buffer = [0; 64];
        let mut slots: Vec<Option<(OwnedFd, RequestProgress)>> = (0..UNDER_WAY).map(|_| None).collect();
        let mut held = HeldConnections { open: 0, failures: 0, errno: None, seconds: 0.0 };
        let (mut dialled, mut in_a_row) = (0_usize, 0);
        let mut happened: Vec<SocketReadiness> = Vec::new();
        let failed = |error: Option<Errno>, held: &mut HeldConnections| {
            held.failures += 1;
            held.errno = error.map(Errno::raw_os_error).or(held.errno);
        };
        while held.open < connections && in_a_row < HOPELESS && Instant::now() < deadline {
            let under_way = slots.iter().flatten().count();
            let mut wanted = connections - held.open - under_way.min(connections - held.open);
            for (token, slot) in slots.iter_mut().enumerate() {
                if wanted == 0 || slot.is_some() {
                    continue;
                }
                wanted -= 1;
                let source = (!from.is_empty()).then(|| from[dialled % from.len()]);
                // Distributed evenly over all pairs of source and destination.
                let server = to[dialled / from.len().max(1) % to.len()];
                dialled += 1;
                match dial(server, source) {
                    Ok(socket) => {
                        poller.add(&socket, token as u64)?;
                        *slot = Some((socket, RequestProgress::begin()));
                    }
                    Err(error) => {
                        in_a_row += 1;
                        failed(Some(error), &mut held);
                    }
                }
            }
            happened.clear();
            if slots.iter().any(Option::is_some) {
                happened.extend(poller.wait(Some(deadline))?);
            }
            for &event in &happened {
                let slot = &mut slots[index(event)];
                let Some((socket, progress)) = slot else { continue };
                match progress.go_on(socket, &request, 1, &mut buffer) {
                    RequestState::Waiting => {}
                    RequestState::Answered => {
                        in_a_row = 0;
                        held.open += 1;
                        self.open.extend(slot.take().map(|(socket, _)| socket));
                    }
                    RequestState::Broken(error) => {
                        in_a_row += 1;
                        failed(error, &mut held);
                        *slot = None;
                    }
                }
            }
        }
        held.seconds = begun.elapsed().as_secs_f64();
        Ok(held)
    }
}
