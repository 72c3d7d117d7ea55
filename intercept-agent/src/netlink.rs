//! One question to netlink and its whole answer, on a socket inside a namespace.

use std::{
    io,
    time::{Duration, Instant},
};

use netlink_packet_core::{
    NLM_F_DUMP, NLM_F_DUMP_INTR, NetlinkDeserializable, NetlinkHeader, NetlinkMessage, NetlinkPayload,
    NetlinkSerializable,
};
use netlink_sys::{Socket, SocketAddr};

use crate::netns::{Netns, NetnsError};

/// The kernel answers at once; a socket that does not is broken.
const PATIENCE: Duration = Duration::from_secs(5);

/// A netlink socket for questions.
pub(crate) struct Questions {
    socket: Socket,
    sequence: u32,
    /// The question whose answer was given up before its end: the kernel takes no other before that is read.
    unfinished: Option<u32>,
    deadline: Option<Instant>,
}

impl Questions {
    /// Opens a socket of a netlink protocol in `netns`; the outer error is that of entering the namespace.
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
            Ok(Self { socket, sequence: 0, unfinished: None, deadline: None })
        })
    }

    /// From now on answers are given up at this time.
    pub(crate) fn until(&mut self, deadline: Instant) {
        self.deadline = Some(deadline);
    }

    /// Sends `question` and receives the whole answer; true when a list changed while it was read.
    pub(crate) fn ask<M>(&mut self, question: M, flags: u16) -> io::Result<(Vec<M>, bool)>
    where
        M: NetlinkSerializable + NetlinkDeserializable,
        NetlinkPayload<M>: From<M>,
    {
        let mut found = Vec::new();
        let interrupted = self.ask_each(question, flags, |message| found.push(message))?;
        Ok((found, interrupted))
    }

    /// The same, each message as it comes: a list may be longer than there is memory for.
    pub(crate) fn ask_each<M>(&mut self, question: M, flags: u16, each: impl FnMut(M)) -> io::Result<bool>
    where
        M: NetlinkSerializable + NetlinkDeserializable,
        NetlinkPayload<M>: From<M>,
    {
        if self.unfinished.is_some() {
            // Its end may be an error, which was that question's.
            match self.receive::<M>(NLM_F_DUMP, |_| {}) {
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
        self.unfinished = (flags & NLM_F_DUMP == NLM_F_DUMP).then_some(self.sequence);
        self.receive(flags, each)
    }

    fn receive<M: NetlinkDeserializable>(&mut self, flags: u16, mut each: impl FnMut(M)) -> io::Result<bool> {
        let (mut interrupted, mut any) = (false, false);
        loop {
            if self.deadline.is_some_and(|deadline| deadline <= Instant::now()) {
                return Err(io::ErrorKind::TimedOut.into());
            }
            let (bytes, _) = self.socket.recv_from_full()?;
            let mut rest = bytes.as_slice();
            while !rest.is_empty() {
                let message = NetlinkMessage::<M>::deserialize(rest).map_err(io::Error::other)?;
                // Padded to four bytes, but maybe not the last.
                let length = usize::try_from(message.header.length).unwrap_or(usize::MAX);
                rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
                if message.header.sequence_number != self.sequence {
                    // Left over from a question whose answer was given up.
                    continue;
                }
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
                        return Err(error.to_io());
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
