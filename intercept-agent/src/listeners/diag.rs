//! Which TCP sockets listen in a namespace: asked of the kernel by sock_diag, or read from /proc where it has none.

use std::{collections::BTreeMap, io, net::SocketAddr};

use netlink_packet_core::{NLM_F_DUMP, NLM_F_REQUEST};
use netlink_packet_sock_diag::{
    AF_INET, AF_INET6, IPPROTO_TCP, SockDiagMessage,
    inet::{ExtensionFlags, InetRequest, SocketId, StateFlags},
};
use netlink_sys::protocols::NETLINK_SOCK_DIAG;
use procfs::{ProcError, net::TcpState, process::Process};

use super::ListenersError;
use crate::{
    netlink::Questions,
    netns::{Netns, NetnsError},
};

/// Inode and address of what listens in `netns`, on ports that are wanted.
pub(super) fn listening(
    netns: &Netns,
    is_wanted: impl Fn(u16) -> bool,
) -> Result<BTreeMap<u64, SocketAddr>, ListenersError> {
    // A new pod has none. The kernel's table of listeners is that of the whole node, and the node's memory decides how long
    // it takes to go through it.
    if netns.has_no_tcp_sockets()? {
        return Ok(BTreeMap::new());
    }
    let list = |source| ListenersError::List { netns: netns.name().to_owned(), source };
    let listed = match listed(netns)? {
        // Kernels without it are rare, and may load its module only on request.
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::EPROTONOSUPPORT)) => {
            netns.run(read).map_err(ListenersError::from)?.map_err(|error| list(io::Error::other(error)))?
        }
        listed => listed.map_err(list)?,
    };
    Ok(listed.into_iter().filter(|(_, address)| is_wanted(address.port())).collect())
}

/// All that listens, from the kernel's table of listeners: /proc/net/tcp goes through the node's whole table of
/// connections, which takes a hundred times as long.
pub(super) fn listed(netns: &Netns) -> Result<io::Result<Vec<(u64, SocketAddr)>>, NetnsError> {
    let ask = |mut questions: Questions| ask_for(&mut questions, 0);
    Ok(Questions::open(netns, NETLINK_SOCK_DIAG)?.and_then(ask))
}

/// What listens on a port; on any if that is 0.
pub(super) fn ask_for(questions: &mut Questions, port: u16) -> io::Result<Vec<(u64, SocketAddr)>> {
    let mut found = Vec::new();
    for (family, mut socket_id) in [(AF_INET, SocketId::new_v4()), (AF_INET6, SocketId::new_v6())] {
        socket_id.source_port = port;
        let request = InetRequest {
            family,
            protocol: IPPROTO_TCP,
            extensions: ExtensionFlags::empty(),
            states: StateFlags::LISTEN,
            socket_id,
        };
        let request = SockDiagMessage::InetRequest(request);
        let (answers, _) = questions.ask(request, NLM_F_REQUEST | NLM_F_DUMP)?;
        found.extend(answers.into_iter().filter_map(|answer| {
            let SockDiagMessage::InetResponse(response) = answer else { return None };
            let (header, id) = (&response.header, &response.header.socket_id);
            Some((header.inode.into(), SocketAddr::new(id.source_address, id.source_port)))
        }));
    }
    Ok(found)
}

/// All that listens, from /proc and for the calling thread's namespace.
pub(super) fn read() -> Result<Vec<(u64, SocketAddr)>, ProcError> {
    // The thread's own entry: that of the process shows the namespace of its first thread.
    let thread = Process::new(rustix::thread::gettid().as_raw_nonzero().get())?;
    let tcp6 = match thread.tcp6() {
        // A kernel without IPv6.
        Err(ProcError::NotFound(_)) => Vec::new(),
        entries => entries?,
    };
    let entries = thread.tcp()?.into_iter().chain(tcp6).filter(|entry| entry.state == TcpState::Listen);
    Ok(entries.map(|entry| (entry.inode, entry.local_address)).collect())
}
