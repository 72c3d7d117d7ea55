//! Requests and responses, on a new connection each, or on connections that are kept.

use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use super::clients::{PATIENCE, RequestProgress, RequestState, Window, connect, index};
use super::protocol::{Measured, Timing};
use super::socket::{Poller, SocketReadiness};
use crate::bench::cpu::Meter;

/// What happens to a connection after a response.
#[derive(Debug, Clone, Copy)]
pub(super) enum ExchangeKind {
    /// It is reset and replaced. Requests and responses have one byte.
    Fresh,
    /// It sends the next request.
    Kept {
        /// Bytes of a request, and of a response.
        size: u32,
    },
}

struct Slot {
    socket: OwnedFd,
    progress: RequestProgress,
    /// The head has to be sent, with the first request.
    first: bool,
}

/// Keeps `slots` requests in flight.
pub(super) fn run(
    to: SocketAddr,
    slots: usize,
    kind: ExchangeKind,
    timing: Timing,
    meter: &Meter,
) -> Result<Measured> {
    let size = match kind {
        ExchangeKind::Fresh => 1,
        ExchangeKind::Kept { size } => size,
    };
    let mut head = [size.to_be_bytes(), size.to_be_bytes()].concat();
    head.resize(8 + size as usize, b'.');
    let asking = Asking { to, kind, request: head, size: size as usize };
    let mut poller = Poller::new()?;
    let mut buffer = vec![0; 64 * 1024];
    let mut open = Vec::with_capacity(slots);
    for token in 0..slots {
        open.push(asking.fresh(&poller, token)?);
    }
    let mut window = Window::new(timing, meter);
    let give_up = Instant::now() + timing.warm_up + timing.measure + PATIENCE;
    let mut happened: Vec<SocketReadiness> = Vec::new();
    while window.is_open(Instant::now())? {
        happened.clear();
        happened.extend(poller.wait(Some(window.deadline()))?);
        for &event in &happened {
            let token = index(event);
            if !asking.advance(&mut open[token], &mut window, &mut buffer) {
                open[token] = replace(&asking, &poller, token, &mut window)?;
            }
        }
        if Instant::now() > give_up {
            bail!("the measurement did not end in time");
        }
    }
    window.close()
}

/// Replaces a connection that is done or failed.
fn replace(asking: &Asking, poller: &Poller, token: usize, window: &mut Window<'_>) -> Result<Slot> {
    let give_up = Instant::now() + Duration::from_secs(2);
    loop {
        match asking.fresh(poller, token) {
            Ok(slot) => return Ok(slot),
            // No port is free at the moment. This counts as a failure.
            Err(error) if Instant::now() > give_up => return Err(error),
            Err(_) => window.failures += 1,
        }
    }
}

struct Asking {
    to: SocketAddr,
    kind: ExchangeKind,
    /// The head, followed by a request.
    request: Vec<u8>,
    size: usize,
}

impl Asking {
    fn fresh(&self, poller: &Poller, token: usize) -> Result<Slot> {
        let progress = RequestProgress::begin();
        Ok(Slot { socket: connect(self.to, poller, token)?, progress, first: true })
    }

    /// Continues with a connection. False if it has to be replaced.
    fn advance(&self, slot: &mut Slot, window: &mut Window<'_>, buffer: &mut [u8]) -> bool {
        loop {
            let request = if slot.first { &self.request[..] } else { &self.request[8..] };
            match slot.progress.go_on(&slot.socket, request, self.size, buffer) {
                RequestState::Waiting => return true,
                RequestState::Broken(_) => {
                    window.failures += 1;
                    return false;
                }
                RequestState::Answered => {
                    window.done(slot.progress.begun, Instant::now());
                    if matches!(self.kind, ExchangeKind::Fresh) {
                        return false;
                    }
                    slot.first = false;
                    slot.progress = RequestProgress::begin();
                }
            }
        }
    }
}
