//! One question to netlink and its whole answer, on a socket inside a namespace.

use std::{io, time::Duration};

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
            Ok(Self { socket, sequence: 0 })
        })
    }

    /// Sends `question` and receives the whole answer; true when a list changed while it was read.
    pub(crate) fn ask<M>(&mut self, question: M, flags: u16) -> io::Result<(Vec<M>, bool)>
    where
        M: NetlinkSerializable + NetlinkDeserializable,
        NetlinkPayload<M>: From<M>,
    {
        self.sequence = self.sequence.wrapping_add(1);
        let mut header = NetlinkHeader::default();
        (header.flags, header.sequence_number) = (flags, self.sequence);
        let mut message = NetlinkMessage::new(header, NetlinkPayload::from(question));
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        self.socket.send(&bytes, 0)?;

        let (mut found, mut interrupted) = (Vec::new(), false);
        loop {
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
                    NetlinkPayload::InnerMessage(inner) => found.push(inner),
                    NetlinkPayload::Done(done) if done.code < 0 => {
                        return Err(io::Error::from_raw_os_error(-done.code));
                    }
                    NetlinkPayload::Done(_) => return Ok((found, interrupted)),
                    NetlinkPayload::Error(error) => return Err(error.to_io()),
                    _ => {}
                }
            }
            if flags & NLM_F_DUMP != NLM_F_DUMP && !found.is_empty() {
                return Ok((found, interrupted));
            }
        }
    }
}
