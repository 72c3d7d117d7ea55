//! The sockets of a namespace, from socket diagnostics: those that are open, and the one that a packet would reach.

use std::{
    fs, io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
};

use intercept_common::Family;
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
pub(crate) enum SocketClass {
    Tcp,
    Raw,
    Packet,
}

impl SocketClass {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Raw => "raw",
            Self::Packet => "packet",
        }
    }
}

/// A socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct OpenSocket {
    pub(crate) protocol: SocketClass,
    pub(crate) is_listening: bool,
    pub(crate) local: SocketAddr,
    pub(crate) remote: SocketAddr,
    pub(crate) uid: u32,
    /// Names it among the open files; 0 before it is accepted.
    pub(crate) inode: u64,
    /// SO_MARK.
    pub(crate) mark: u32,
    /// Id of the cgroup that it was created in; unknown before Linux 5.8.
    pub(crate) cgroup: Option<u64>,
}

/// All of a namespace: TCP connections and listeners, raw and packet sockets. The outer error is that of entering it.
pub(crate) fn open(netns: &Netns) -> Result<io::Result<Vec<OpenSocket>>, NetnsError> {
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
    let states = StateFlags::ESTABLISHED | StateFlags::SYN_SENT | StateFlags::CLOSE_WAIT | StateFlags::LISTEN;
    let mut found = Vec::new();
    for socket_id in [SocketId::new_v4(), SocketId::new_v6()] {
        let request = tcp_request(socket_id, states.clone());
        let (answers, _) = questions.ask(request, NLM_F_REQUEST | NLM_F_DUMP)?;
        found.extend(answers.into_iter().filter_map(tcp_socket));
    }
    Ok(found)
}

/// The listeners of a family.
pub(crate) fn listeners(questions: &mut Questions, family: Family) -> io::Result<Vec<OpenSocket>> {
    let request = tcp_request(any_socket(family), StateFlags::LISTEN);
    let (answers, _) = questions.ask(request, NLM_F_REQUEST | NLM_F_DUMP)?;
    Ok(answers.into_iter().filter_map(tcp_socket).collect())
}

/// The connection with this local port and this inode, in any state but closed.
pub(crate) fn connection(
    questions: &mut Questions,
    family: Family,
    local_port: u16,
    inode: u64,
) -> io::Result<Option<OpenSocket>> {
    let socket_id = SocketId { source_port: local_port, ..any_socket(family) };
    let request = tcp_request(socket_id, !StateFlags::LISTEN);
    let (answers, _) = questions.ask(request, NLM_F_REQUEST | NLM_F_DUMP)?;
    Ok(answers.into_iter().filter_map(tcp_socket).find(|socket| socket.inode == inode))
}

/// The socket that a packet from `remote` to `local` reaches. The kernel answers by the lookup that it makes for the packet:
/// among connections, by the attached programs, among listeners. Nothing is sent.
pub(crate) fn receiver(
    questions: &mut Questions,
    local: SocketAddr,
    remote: SocketAddr,
    ifindex: u32,
) -> io::Result<Option<OpenSocket>> {
    let socket_id = SocketId {
        source_address: local.ip(),
        source_port: local.port(),
        destination_address: remote.ip(),
        destination_port: remote.port(),
        interface_id: ifindex,
        // INET_DIAG_NOCOOKIE: any socket.
        cookie: [0xff; 8],
    };
    match questions.ask(tcp_request(socket_id, StateFlags::all()), NLM_F_REQUEST) {
        Ok((answers, _)) => Ok(answers.into_iter().find_map(tcp_socket)),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
        Err(error) => Err(error),
    }
}

fn any_socket(family: Family) -> SocketId {
    match family {
        Family::V4 => SocketId::new_v4(),
        Family::V6 => SocketId::new_v6(),
    }
}

fn tcp_request(socket_id: SocketId, states: StateFlags) -> SockDiagMessage {
    let family = if socket_id.source_address.is_ipv4() { AF_INET } else { AF_INET6 };
    let extensions = ExtensionFlags::empty();
    SockDiagMessage::InetRequest(InetRequest { family, protocol: IPPROTO_TCP, extensions, states, socket_id })
}

fn tcp_socket(answer: SockDiagMessage) -> Option<OpenSocket> {
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
