//! The two ends of a connection that NAT rewrites on its way. The proxy sees another client then than dialled, and no
//! entry of ORIG_DST by its own tuple. What NAT does not change is the sequence number of the SYN: the client notes it,
//! and the proxy's end looks the client up by it.

use aya_ebpf::{bindings::bpf_sock_ops, helpers::generated::bpf_skc_to_tcp_sock, programs::SockOpsContext};
use bytemuck::Zeroable as _;
use intercept_common::{
    Addr, NetnsCookie,
    layout::{ConnKey, Handshake, SocketState, socket},
};

use crate::{
    context::{Ends, Sock, load},
    maps,
    original::proxy_key,
    storage::StoredSocket,
};

/// Offset in bytes of `write_seq` in `struct tcp_sock` on the running kernel, from its BTF; the agent fills it in. Zero
/// where it is not known: then connections that NAT rewrites are not told apart.
#[unsafe(no_mangle)]
static TCP_WRITE_SEQ_OFF: u32 = 0;

/// A SYN is about to leave; its sequence number is chosen.
#[inline(always)]
pub(crate) fn note(sk: Sock, key: &ConnKey) {
    let Some(isn) = isn(sk) else { return };
    let Some(slot) = maps::handshake(isn) else { return };
    let note =
        Handshake { netns: key.netns, client: key.client, isn, client_port: key.client_port, reserved: 0 };
    // SAFETY: an array element, which is never freed. Two that are written at once may mix: what is read is believed
    // only if ORIG_DST has an entry for it.
    unsafe { slot.write(note) };
}

/// The initial sequence number of a client whose SYN is about to leave. `None` if the kernel has no BTF.
#[inline(always)]
pub(crate) fn isn(sk: Sock) -> Option<u32> {
    // SAFETY: reads a static; volatile because the loader replaces its value.
    let offset = unsafe { core::ptr::read_volatile(&raw const TCP_WRITE_SEQ_OFF) } as usize;
    if offset == 0 {
        return None;
    }
    // SAFETY: the helper takes any socket, and gives null for one that is not of TCP.
    let tcp = unsafe { bpf_skc_to_tcp_sock(sk.as_ptr().cast()) };
    if tcp.is_null() {
        return None;
    }
    // SAFETY: the verifier holds the load against the kernel's types.
    Some(unsafe { tcp.cast::<u8>().add(offset).cast::<u32>().read() })
}

/// The key of the connection that the proxy has just accepted, by the sequence number that it had.
#[inline(always)]
pub(crate) fn find(ctx: &SockOpsContext, netns: NetnsCookie, ends: &Ends) -> Option<ConnKey> {
    let isn = load!(load_u32, bpf_sock_ops, ctx.ops, rcv_nxt).wrapping_sub(1);
    // SAFETY: as in `note`.
    let note = unsafe { maps::handshake(isn)?.read() };
    if note.isn != isn || note.netns != netns {
        return None;
    }
    Some(ConnKey { client: note.client, client_port: note.client_port, ..proxy_key(netns, ends) })
}

/// Have the proxy's socket remember whose connection it has.
#[inline(always)]
pub(crate) fn remember(sk: Sock, key: &ConnKey) -> Option<()> {
    let state = SocketState {
        addr: key.client,
        source: Addr::UNSPECIFIED,
        port: key.client_port,
        kind: socket::TRANSLATED,
        ..SocketState::zeroed()
    };
    StoredSocket::set(sk, state).map(|_| ())
}

/// The key of a connection by the proxy's socket, `ends` being the proxy's.
#[inline(always)]
pub(crate) fn key(sk: Sock, netns: NetnsCookie, ends: &Ends) -> Option<ConnKey> {
    let state = StoredSocket::of(sk)?;
    if state.kind() != socket::TRANSLATED {
        return None;
    }
    Some(ConnKey { client: state.addr(), client_port: state.port(), ..proxy_key(netns, ends) })
}
