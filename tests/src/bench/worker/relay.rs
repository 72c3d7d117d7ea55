//! The built-in proxy. It accepts connections, connects to their destinations, and copies in both directions with plain
//! reads and writes.

use std::net::SocketAddr;
use std::os::fd::OwnedFd;

use anyhow::{Result, bail};
use rustix::net::{Shutdown, shutdown, sockopt};

use super::protocol::{RelayRole, Upstream};
use super::socket::{IoStep, Poller, SocketReadiness, accept, dial, read, write};

const BUFFER: usize = 64 * 1024;
const LISTENER: u64 = u64::MAX;

/// One end of a relayed connection.
struct RelaySocket {
    socket: OwnedFd,
    /// Bytes that were read from the other end and not yet written to this one.
    pending: Vec<u8>,
    connected: bool,
    /// Whether this end has sent the end of its stream.
    finished: bool,
    /// Whether this end was shut down for writing.
    shut: bool,
}

/// The accepted connection, and the one to its destination.
type Pair = [RelaySocket; 2];

/// Relays the connections of the listener.
pub(super) fn relay(listener: &OwnedFd, relay: &RelayRole) -> Result<()> {
    let mut poller = Poller::new()?;
    poller.add_listener(listener, LISTENER)?;
    let mut pairs = Pairs::default();
    let mut buffer = vec![0; BUFFER];
    let mut turn = 0;
    let mut happened = Vec::new();
    loop {
        happened.clear();
        happened.extend(poller.wait(None)?);
        for &event in &happened {
            if event.token == LISTENER {
                while let Some(client) = accept(listener)? {
                    if let Some(pair) = onwards(client, relay, &mut turn)? {
                        pairs.insert(pair, &poller)?;
                    }
                }
                continue;
            }
            pairs.handle(event, &mut buffer);
        }
    }
}

fn onwards(client: OwnedFd, relay: &RelayRole, turn: &mut usize) -> Result<Option<Pair>> {
    let to = match &relay.upstream {
        // NAT sometimes forgets a connection when ports are scarce. The client then sees a reset.
        Upstream::OriginalDestination => match sockopt::ip_original_dst(&client) {
            Ok(to) => SocketAddr::V4(to),
            Err(_) => return Ok(None),
        },
        Upstream::Fixed(upstreams) => {
            *turn += 1;
            upstreams[*turn % upstreams.len()]
        }
    };
    if to.port() == relay.port {
        bail!(
            "the original destination {to} is the relay's own port: the connection was not captured rightly"
        );
    }
    // If no port is free, the client sees a reset.
    let Ok(server) = dial(to, relay.source) else { return Ok(None) };
    let end = |socket, connected| RelaySocket {
        socket,
        pending: Vec::new(),
        connected,
        finished: false,
        shut: false,
    };
    Ok(Some([end(client, true), end(server, false)]))
}

/// The open pairs. The token of an end is twice the index of its pair, plus 1 for the connection to the destination.
#[derive(Default)]
struct Pairs {
    pairs: Vec<Option<Pair>>,
    free: Vec<usize>,
}

impl Pairs {
    fn insert(&mut self, pair: Pair, poller: &Poller) -> Result<()> {
        let index = self.free.pop().unwrap_or_else(|| {
            self.pairs.push(None);
            self.pairs.len() - 1
        });
        for (side, end) in pair.iter().enumerate() {
            poller.add(&end.socket, (index * 2 + side) as u64)?;
        }
        self.pairs[index] = Some(pair);
        Ok(())
    }

    /// An event of a closed pair may arrive after a new pair has taken its index. The new pair then finds nothing to do.
    fn handle(&mut self, event: SocketReadiness, buffer: &mut [u8]) {
        let token = usize::try_from(event.token).expect("tokens are indices");
        let Some(Some(pair)) = self.pairs.get_mut(token / 2) else { return };
        let side = token % 2;
        let alive = happened(pair, side, event, buffer);
        if !alive || pair.iter().all(|end| end.finished && end.shut) {
            self.pairs[token / 2] = None;
            self.free.push(token / 2);
        }
    }
}

/// Copies what can be copied now. False if the connection is broken.
fn happened(pair: &mut Pair, side: usize, event: SocketReadiness, buffer: &mut [u8]) -> bool {
    if event.writable {
        let first = !pair[side].connected;
        pair[side].connected = true;
        if first || !pair[side].pending.is_empty() {
            // Bytes from the other end may have waited for this.
            if !copy(pair, 1 - side, true, buffer) {
                return false;
            }
        }
    }
    !event.readable || copy(pair, side, event.closing, buffer)
}

/// Copies from one end to the other until one of them would block. With `drain`, it also looks for the end of the
/// stream.
fn copy(pair: &mut Pair, from: usize, drain: bool, buffer: &mut [u8]) -> bool {
    let (left, right) = pair.split_at_mut(1);
    let (from, to) = if from == 0 { (&mut left[0], &mut right[0]) } else { (&mut right[0], &mut left[0]) };
    if !to.connected {
        return !(drain && from.finished);
    }
    loop {
        while !to.pending.is_empty() {
            match write(&to.socket, &to.pending) {
                IoStep::Bytes(n) => drop(to.pending.drain(..n)),
                IoStep::Later => return true,
                IoStep::End | IoStep::Broken(_) => return false,
            }
        }
        if from.finished {
            if !to.shut {
                to.shut = true;
                return shutdown(&to.socket, Shutdown::Write).is_ok();
            }
            return true;
        }
        match read(&from.socket, buffer) {
            IoStep::Bytes(n) => {
                let written = match write(&to.socket, &buffer[..n]) {
                    IoStep::Bytes(written) => written,
                    IoStep::Later => 0,
                    IoStep::End | IoStep::Broken(_) => return false,
                };
                if written < n {
                    to.pending.extend_from_slice(&buffer[written..n]);
                } else if n < buffer.len() && !drain {
                    return true;
                }
            }
            IoStep::Later => return true,
            // A reset is passed on as a reset.
            IoStep::Broken(_) => return false,
            IoStep::End => from.finished = true,
        }
    }
}
