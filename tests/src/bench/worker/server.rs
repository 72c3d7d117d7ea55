//! The server. Requests and responses have lengths that the client sets.

use std::os::fd::OwnedFd;

use anyhow::Result;

use super::protocol::ENDLESS;
use super::socket::{IoStep, Poller, accept, read, write};

const BUFFER: usize = 256 * 1024;

/// Tokens from here on are listeners.
const LISTENERS: u64 = 1 << 32;

/// A connection.
struct Conversation {
    socket: OwnedFd,
    /// The lengths, as far as they have arrived.
    head: Vec<u8>,
    /// Received bytes of the request.
    got: usize,
    /// Bytes of responses that are still to be written.
    owed: usize,
}

/// Answers on all listeners.
pub(super) fn serve(listeners: &[OwnedFd]) -> Result<()> {
    let mut poller = Poller::new()?;
    for (listener, token) in listeners.iter().zip(LISTENERS..) {
        poller.add_listener(listener, token)?;
    }
    let mut open: Vec<Option<Conversation>> = Vec::new();
    let mut free = Vec::new();
    let mut buffer = vec![0; BUFFER];
    let mut happened = Vec::new();
    loop {
        happened.clear();
        happened.extend(poller.wait(None)?);
        for event in &happened {
            if event.token >= LISTENERS {
                let listener = &listeners[usize::try_from(event.token - LISTENERS)?];
                while let Some(socket) = accept(listener)? {
                    let index = free.pop().unwrap_or_else(|| {
                        open.push(None);
                        open.len() - 1
                    });
                    poller.add(&socket, index as u64)?;
                    open[index] = Some(Conversation { socket, head: Vec::new(), got: 0, owed: 0 });
                }
                continue;
            }
            let index = usize::try_from(event.token)?;
            if let Some(conversation) = &mut open[index]
                && !conversation.answer(event.closing, &mut buffer)
            {
                open[index] = None;
                free.push(index);
            }
        }
    }
}

impl Conversation {
    /// Reads and answers as far as possible. False after the client has closed. With `drain`, it looks for that.
    fn answer(&mut self, drain: bool, buffer: &mut [u8]) -> bool {
        let mut more = true;
        loop {
            while self.owed > 0 {
                match write(&self.socket, &[0; 16 * 1024][..self.owed.min(16 * 1024)]) {
                    IoStep::Bytes(n) => self.owed -= n,
                    IoStep::Later => return true,
                    IoStep::End | IoStep::Broken(_) => return false,
                }
            }
            if !more && !drain {
                return true;
            }
            let n = match read(&self.socket, buffer) {
                IoStep::Bytes(n) => n,
                IoStep::Later => return true,
                IoStep::End | IoStep::Broken(_) => return false,
            };
            // A short read has emptied the socket.
            more = n == buffer.len();
            self.got += self.take_head(&buffer[..n]);
            let Some((request, response)) = self.lengths() else { continue };
            if request == ENDLESS {
                self.got = 0;
                continue;
            }
            let request = request as usize;
            self.owed += self.got / request * response as usize;
            self.got %= request;
        }
    }

    /// Completes the head. Returns the number of bytes after it.
    fn take_head(&mut self, bytes: &[u8]) -> usize {
        let missing = (8 - self.head.len()).min(bytes.len());
        self.head.extend_from_slice(&bytes[..missing]);
        bytes.len() - missing
    }

    fn lengths(&self) -> Option<(u32, u32)> {
        let (request, rest) = self.head.split_first_chunk()?;
        let (response, _) = rest.split_first_chunk()?;
        Some((u32::from_be_bytes(*request).max(1), u32::from_be_bytes(*response)))
    }
}
