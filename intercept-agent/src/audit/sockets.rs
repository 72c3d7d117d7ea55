//! The open sockets of a namespace, from socket diagnostics.

use std::{
    fs, io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
};

use netlink_packet_core::{NLM_F_DUMP, NLM_F_REQUEST, Nla as _};
use netlink_packet_sock_diag::{
    AF_INET, AF_INET6, IPPROTO_TCP, SockDiagMessage,
    inet::{ExtensionFlags, InetRequest, SocketId, StateFlags, nlas::Nla},
};
use netlink_sys::protocols::NETLINK_SOCK_DIAG;

use crate::{
    netlink::Questions,
    netns::{Netns, NetnsError},
};

/// `INET_DIAG_CGROUP_ID`, since Linux 5.8.
const CGROUP_ID: u16 = 21;
/// `TCP_LISTEN`.
const LISTEN: u8 = 10;

/// What kind of socket it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SocketClass {
    Tcp,
    Raw,
    Packet,
}

impl SocketClass {
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Raw => "raw",
            Self::Packet => "packet",
        }
    }
}

/// A socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct OpenSocket {
    pub(super) protocol: SocketClass,
    pub(super) is_listening: bool,
    pub(super) local: SocketAddr,
    pub(super) remote: SocketAddr,
    pub(super) uid: u32,
    /// Names it among the open files; 0 before it is accepted.
    pub(super) inode: u64,
    /// SO_MARK.
    pub(super) mark: u32,
    /// Id of the cgroup that it was created in; unknown before Linux 5.8.
    pub(super) cgroup: Option<u64>,
}

/// All of a namespace: TCP connections and listeners, raw and packet sockets. The outer error is that of entering it.
pub(super) fn open(netns: &Netns) -> Result<io::Result<Vec<OpenSocket>>, NetnsError> {
    let streams =
        Questions::open(netns, NETLINK_SOCK_DIAG)?.and_then(|mut questions| streams(&mut questions));
    let others = netns.run(|| {
        let mut found = Vec::new();
        for (file, protocol) in
            [("raw", SocketClass::Raw), ("raw6", SocketClass::Raw), ("packet", SocketClass::Packet)]
        {
            found.extend(listed(file, protocol));
        }
        found
    })?;
    Ok(streams.map(|mut found| {
        found.extend(others);
        found
    }))
}

fn streams(questions: &mut Questions) -> io::Result<Vec<OpenSocket>> {
    let mut found = Vec::new();
    for (family, socket_id) in [(AF_INET, SocketId::new_v4()), (AF_INET6, SocketId::new_v6())] {
        let request = InetRequest {
            family,
            protocol: IPPROTO_TCP,
            extensions: ExtensionFlags::empty(),
            states: StateFlags::ESTABLISHED
                | StateFlags::SYN_SENT
                | StateFlags::CLOSE_WAIT
                | StateFlags::LISTEN,
            socket_id,
        };
        let request = SockDiagMessage::InetRequest(request);
        let (answers, _) = questions.ask(request, NLM_F_REQUEST | NLM_F_DUMP)?;
        found.extend(answers.into_iter().filter_map(|answer| {
            let SockDiagMessage::InetResponse(response) = answer else { return None };
            let (header, id) = (&response.header, &response.header.socket_id);
            let mark = response.nlas.iter().find_map(|nla| match nla {
                Nla::Mark(mark) => Some(*mark),
                _ => None,
            });
            Some(OpenSocket {
                protocol: SocketClass::Tcp,
                is_listening: header.state == LISTEN,
                local: SocketAddr::new(id.source_address, id.source_port),
                remote: SocketAddr::new(id.destination_address, id.destination_port),
                uid: header.uid,
                inode: header.inode.into(),
                mark: mark.unwrap_or_default(),
                cgroup: response.nlas.iter().find_map(cgroup_of),
            })
        }));
    }
    Ok(found)
}

fn cgroup_of(nla: &Nla) -> Option<u64> {
    let Nla::Other(other) = nla else { return None };
    let mut bytes = [0; 8];
    if other.kind() != CGROUP_ID || other.value_len() != bytes.len() {
        return None;
    }
    other.emit_value(&mut bytes);
    Some(u64::from_ne_bytes(bytes))
}

/// The sockets in a file of /proc/net, which has a line of titles. A kernel without the protocol has no file.
fn listed(file: &str, protocol: SocketClass) -> Vec<OpenSocket> {
    let text = fs::read_to_string(format!("/proc/thread-self/net/{file}")).unwrap_or_default();
    let nowhere = SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0);
    let socket = |line: &str| {
        let words: Vec<_> = line.split_whitespace().collect();
        let (uid, inode) = match protocol {
            SocketClass::Packet => (words.get(7)?, words.get(8)?),
            SocketClass::Raw | SocketClass::Tcp => (words.get(7)?, words.get(9)?),
        };
        Some(OpenSocket {
            protocol,
            is_listening: false,
            local: nowhere,
            remote: nowhere,
            uid: uid.parse().ok()?,
            inode: inode.parse().ok()?,
            mark: 0,
            cgroup: None,
        })
    };
    text.lines().skip(1).filter_map(socket).collect()
}
