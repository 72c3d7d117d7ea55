//! The throughput of one connection.

use std::net::SocketAddr;
use std::time::Instant;

use anyhow::{Context, Result, bail};

use super::clients::{Window, connect};
use super::protocol::{ENDLESS, Measured, Timing};
use super::socket::{IoStep, Poller, write};
use crate::bench::cpu::Meter;

const BLOCK: usize = 64 * 1024;

/// Writes until the time is over. The buffers on the way are full before the measurement starts, so that the rate of
/// writes is that of the receiver.
pub(super) fn run(to: SocketAddr, timing: Timing, meter: &Meter) -> Result<Measured> {
    let mut poller = Poller::new()?;
    let socket = connect(to, &poller, 0)?;
    let mut block = [ENDLESS.to_be_bytes(), 0_u32.to_be_bytes()].concat();
    block.resize(BLOCK, b'.');
    let mut window = Window::new(timing, meter);
    let mut connected = false;
    while window.is_open(Instant::now())? {
        if connected {
            match write(&socket, &block) {
                IoStep::Bytes(n) => {
                    // Only the first block has a head, and the server reads only its beginning.
                    window.operations += n as u64;
                    continue;
                }
                IoStep::Later => {}
                IoStep::End => bail!("the connection to {to} was closed"),
                IoStep::Broken(error) => return Err(error).with_context(|| format!("writing to {to}")),
            }
        }
        let deadline = Some(window.deadline());
        connected |= poller.wait(deadline)?.any(|event| event.writable);
    }
    window.close()
}
