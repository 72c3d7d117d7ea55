//! Netlink requests and their complete answers, on a socket in a network namespace.

use std::{
    convert::Infallible,
    io,
    time::{Duration, Instant},
};

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NetlinkBuffer, NetlinkDeserializable,
    NetlinkHeader, NetlinkMessage, NetlinkPayload, NetlinkSerializable,
};
use netlink_sys::{Socket, SocketAddr};

use crate::netns::{Netns, NetnsError};

/// The kernel answers at once. A socket that does not is broken.
const PATIENCE: Duration = Duration::from_secs(5);

/// The most that the kernel sends at once, except of interfaces: it allocates as much as the longest buffer that was used
/// to receive, or 8 KiB (`NLMSG_GOODSIZE`).
const LONGEST: usize = 16 << 10;
/// Of these, which are `RTM_GETLINK`, the kernel allocates as much as the longest description of one needs.
const LIST_INTERFACES: u16 = 18;

/// A netlink socket for requests.
pub(crate) struct Questions {
    socket: Socket,
    sequence: u32,
    /// Sequence number of a request whose answer was not read to its end. The kernel accepts no other dump before that.
    unfinished: Option<u32>,
    deadline: Option<Instant>,
    /// Whether the answers may be longer than [`LONGEST`].
    is_long: bool,
    /// Memory of the last answer.
    buffer: Vec<u8>,
}

impl Questions {
    /// Opens a socket for a netlink protocol in `netns`. The outer error is that of entering the namespace.
    pub(crate) fn open(netns: &Netns, protocol: isize) -> Result<io::Result<Self>, NetnsError> {
        netns.run(|| {
            let mut socket = Socket::new(protocol)?;
            socket.bind_auto()?;
            socket.connect(&SocketAddr::new(0, 0))?;
            rustix::net::sockopt::set_socket_timeout(
                &socket,
                rustix::net::sockopt::Timeout::Recv,
                Some(PATIENCE),
            )?;
            Ok(Self {
                socket,
                sequence: 0,
                unfinished: None,
                deadline: None,
                is_long: false,
                buffer: Vec::new(),
            })
        })
    }

    /// Sets the time at which answers are given up.
    pub(crate) fn until(&mut self, deadline: Instant) {
        self.deadline = Some(deadline);
    }

    /// Sends `question` and receives the complete answer. The flag is true if the list changed while it was read.
    pub(crate) fn ask<M>(&mut self, question: M, flags: u16) -> io::Result<(Vec<M>, bool)>
    where
        M: NetlinkSerializable + NetlinkDeserializable,
        NetlinkPayload<M>: From<M>,
    {
        let mut found = Vec::new();
        let interrupted = self.ask_each(question, flags, |message| found.push(message))?;
        Ok((found, interrupted))
    }

    /// Requests a change and waits for its acknowledgement. A message that the kernel did not receive is an error.
    pub(crate) fn change<M>(&mut self, message: M, flags: u16) -> io::Result<()>
    where
        M: NetlinkSerializable + NetlinkDeserializable,
        NetlinkPayload<M>: From<M>,
    {
        self.ask_each(message, NLM_F_REQUEST | NLM_F_ACK | flags, |_: M| {}).map(drop)
    }

    /// As [`Questions::ask`], but passes on each message as it arrives: a list may be larger than memory.
    pub(crate) fn ask_each<Q, M>(&mut self, question: Q, flags: u16, each: impl FnMut(M)) -> io::Result<bool>
    where
        Q: NetlinkSerializable,
        M: NetlinkDeserializable,
        NetlinkPayload<Q>: From<Q>,
    {
        if self.unfinished.is_some() {
            // An error at its end belongs to the earlier request.
            match self.receive(NLM_F_DUMP, |_: Discarded| {}) {
                Err(error) if self.unfinished.is_some() => return Err(error),
                _ => {}
            }
        }
        self.sequence = self.sequence.wrapping_add(1);
        let mut header = NetlinkHeader::default();
        (header.flags, header.sequence_number) = (flags, self.sequence);
        let mut message = NetlinkMessage::new(header, NetlinkPayload::from(question));
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        self.socket.send(&bytes, 0)?;
        self.is_long = message.header.message_type == LIST_INTERFACES;
        self.unfinished = (flags & NLM_F_DUMP == NLM_F_DUMP).then_some(self.sequence);
        self.receive(flags, each)
    }

    /// Receives what the kernel has sent at once into the buffer.
    fn next_answer(&mut self) -> io::Result<()> {
        if self.is_long {
            self.buffer = self.socket.recv_from_full()?.0;
            return Ok(());
        }
        self.buffer.clear();
        self.buffer.reserve(LONGEST);
        let length = self.socket.recv(&mut self.buffer, libc::MSG_TRUNC)?;
        if length > self.buffer.len() {
            return Err(io::Error::other(format!("the answer has {length} bytes")));
        }
        Ok(())
    }

    fn receive<M: NetlinkDeserializable>(&mut self, flags: u16, mut each: impl FnMut(M)) -> io::Result<bool> {
        let (mut interrupted, mut any) = (false, false);
        loop {
            if self.deadline.is_some_and(|deadline| deadline <= Instant::now()) {
                return Err(io::ErrorKind::TimedOut.into());
            }
            self.next_answer()?;
            make_names_text(&mut self.buffer);
            let mut rest = self.buffer.as_slice();
            while !rest.is_empty() {
                let bytes = rest;
                let header = NetlinkBuffer::new_checked(bytes).map_err(io::Error::other)?;
                // Padded to four bytes, except perhaps the last.
                let length = usize::try_from(header.length()).unwrap_or(usize::MAX);
                rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
                if header.sequence_number() != self.sequence {
                    // Left over from a request whose answer was given up, which may have been another kind of question.
                    continue;
                }
                let message = NetlinkMessage::<M>::deserialize(bytes).map_err(io::Error::other)?;
                interrupted |= message.header.flags & NLM_F_DUMP_INTR != 0;
                match message.payload {
                    NetlinkPayload::InnerMessage(inner) => {
                        any = true;
                        each(inner);
                    }
                    NetlinkPayload::Done(done) => {
                        self.unfinished = None;
                        return match done.code {
                            code if code < 0 => Err(io::Error::from_raw_os_error(-code)),
                            _ => Ok(interrupted),
                        };
                    }
                    NetlinkPayload::Error(error) => {
                        self.unfinished = None;
                        // An error message without a code is an acknowledgement.
                        return if error.code.is_none() { Ok(interrupted) } else { Err(error.to_io()) };
                    }
                    _ => {}
                }
            }
            if flags & NLM_F_DUMP != NLM_F_DUMP && any {
                return Ok(interrupted);
            }
        }
    }
}

/// Any answer, which is not looked at.
struct Discarded;

impl NetlinkDeserializable for Discarded {
    type Error = Infallible;

    fn deserialize(_: &NetlinkHeader, _: &[u8]) -> Result<Self, Infallible> {
        Ok(Self)
    }
}

/// Replaces bytes of the interface names of rules that are not UTF-8 by `?`. The kernel accepts any bytes and a pod chooses its own
/// names, but one such name makes the parser fail for the complete answer.
fn make_names_text(messages: &mut [u8]) {
    const RTM_NEWRULE: u16 = 32;
    /// FRA_IIFNAME, FRA_OIFNAME.
    const RULE_NAMES: [u16; 2] = [3, 17];

    for_each_part(messages, 4, |kind, message| {
        if kind == RTM_NEWRULE {
            // The netlink header is followed by the header of the rule.
            for_each_part(message.get_mut(10 + 12..).unwrap_or_default(), 2, |kind, attribute| {
                if RULE_NAMES.contains(&kind) {
                    make_text(attribute);
                }
            });
        }
    });
}

/// Passes each message or attribute to `take`. Both consist of a length in `width` bytes, which includes itself, a
/// type, the content, and padding to four bytes.
fn for_each_part(mut parts: &mut [u8], width: usize, mut take: impl FnMut(u16, &mut [u8])) {
    /// The top bits of an attribute's type are flags.
    const TYPE: u16 = 0x3fff;
    while parts.len() >= width + 2 {
        let length = match width {
            2 => usize::from(u16::from_ne_bytes([parts[0], parts[1]])),
            _ => u32::from_ne_bytes([parts[0], parts[1], parts[2], parts[3]]) as usize,
        };
        if length < width + 2 || length > parts.len() {
            return;
        }
        let kind = u16::from_ne_bytes([parts[width], parts[width + 1]]) & TYPE;
        take(kind, &mut parts[width + 2..length]);
        let next = length.next_multiple_of(4).min(parts.len());
        parts = &mut parts[next..];
    }
}

/// The text of a name that the kernel gives. Bytes that are not UTF-8 become `?`, as in the names of rules.
pub(crate) fn name(bytes: &[u8]) -> String {
    let mut text = bytes.strip_suffix(&[0]).unwrap_or(bytes).to_vec();
    make_text(&mut text);
    String::from_utf8(text).unwrap_or_default()
}

fn make_text(bytes: &mut [u8]) {
    while let Err(error) = std::str::from_utf8(bytes) {
        bytes[error.valid_up_to()] = b'?';
    }
}
