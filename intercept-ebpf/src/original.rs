//! The original destination: to the proxy that asks for it with `SO_ORIGINAL_DST`, and to the client that asks who
//! its peer is.

use aya_ebpf::{
    bindings::{BPF_TCP_CLOSE, bpf_sockopt},
    programs::{SockAddrContext, SockoptContext},
};
use intercept_common::{
    Addr, NetnsCookie,
    layout::{ConnKey, OrigDst, PodPolicy, socket},
};

use crate::{
    context::{self, AF_INET, AF_INET6, AddressFamily, Ends, Sock, TCP, UDP, load, store},
    handshake, maps,
    proxy::ProxyState,
    shadow,
    storage::StoredSocket,
};

const SOL_IP: i32 = 0;
const SOL_IPV6: i32 = 41;
/// `SO_ORIGINAL_DST` and `IP6T_SO_ORIGINAL_DST`.
const ORIGINAL_DST: i32 = 80;

/// The connection as its client sees it, `ends` being the client's.
#[inline(always)]
pub(crate) fn client_key(netns: NetnsCookie, ends: &Ends) -> ConnKey {
    ConnKey {
        netns,
        client: ends.local,
        proxy: ends.remote,
        client_port: ends.local_port,
        proxy_port: ends.remote_port,
        reserved: 0,
    }
}

/// The same connection, `ends` being the proxy's.
#[inline(always)]
pub(crate) fn proxy_key(netns: NetnsCookie, ends: &Ends) -> ConnKey {
    ConnKey {
        netns,
        client: ends.remote,
        proxy: ends.local,
        client_port: ends.remote_port,
        proxy_port: ends.local_port,
        reserved: 0,
    }
}

/// An option was read from a socket; what the kernel answered stands in the context.
#[inline(always)]
pub(crate) fn getsockopt(ctx: &SockoptContext) {
    if !answered(ctx) {
        // Zero tells the kernel to let its own answer stand, and saves it copying the hook's buffer back. That
        // buffer ends at a page, so that for a larger option (iptables' own, for one) all else would be EFAULT.
        store!(bpf_sockopt, ctx.sockopt, 0, optlen);
    }
}

#[inline(always)]
fn answered(ctx: &SockoptContext) -> bool {
    let level = load!(load_u32, bpf_sockopt, ctx.sockopt, level).cast_signed();
    if load!(load_u32, bpf_sockopt, ctx.sockopt, optname).cast_signed() != ORIGINAL_DST
        || (level != SOL_IP && level != SOL_IPV6)
    {
        return false;
    }
    let Some(sk) = Sock::of_option(ctx).filter(|sk| sk.protocol() == TCP) else { return false };
    let netns = maps::netns_cookie(ctx);
    let ends = sk.ends();
    let shadowed = if shadow::is_on() { shadow::pod(netns) } else { None };
    let may_be_redirected = ends.may_be_redirected() && shadowed.is_none_or(has_connections);
    let redirected = if may_be_redirected { by_proxy(sk, netns, &ends) } else { None };
    let (addr, port) = match redirected {
        // SAFETY: the map holds OrigDst; an element taken out meanwhile is freed after a grace period.
        Some(entry) => unsafe { ((*entry).addr, (*entry).port()) },
        // conntrack, where it is there, has answered for a connection that nobody rewrote.
        None if load!(load_u32, bpf_sockopt, ctx.sockopt, retval) == 0 => {
            if let Some(pod) = shadowed {
                shadow::asked(ctx, sk, netns, pod, &ends);
            }
            return false;
        }
        None if maps::pod(netns).is_none_or(shadow::is_of) => return false,
        // What it would say of such a connection: arriving ones are steered without a rewrite.
        None => (ends.local, ends.local_port),
    };
    // An IPv4 connection is asked for at SOL_IP, whatever the socket's family, and IPv6 at SOL_IPV6.
    addr.is_v4() == (level == SOL_IP) && answer(ctx.sockopt, addr, port)
}

/// Whether a connection of the pod was redirected that is not over: of a pod in shadow mode one from before.
#[inline(always)]
fn has_connections(pod: &PodPolicy) -> bool {
    ProxyState::of(pod.slot).is_some_and(|proxy| proxy.connections() != 0)
}

#[inline(always)]
fn answer(sockopt: *mut bpf_sockopt, addr: Addr, port: u16) -> bool {
    let start: *mut u8 = load!(load_u64, bpf_sockopt, sockopt, __bindgen_anon_2) as *mut u8;
    let end: *mut u8 = load!(load_u64, bpf_sockopt, sockopt, __bindgen_anon_3) as *mut u8;
    let port_be = u32::from(port.to_be()) << 16;
    let len: u32 = if addr.is_v4() { 16 } else { 28 };
    // SAFETY: the bound is checked against the end of the buffer, as the verifier demands; fields are the hook's.
    unsafe {
        if addr.is_v4() {
            if start.add(16) > end {
                return false;
            }
            let out: *mut u32 = start.cast();
            out.write_unaligned(AF_INET | port_be);
            out.add(1).write_unaligned(addr.v4());
            out.add(2).write_unaligned(0);
            out.add(3).write_unaligned(0);
        } else {
            if start.add(28) > end {
                return false;
            }
            let words = addr.words();
            let out: *mut u32 = start.cast();
            out.write_unaligned(AF_INET6 | port_be);
            out.add(1).write_unaligned(0);
            out.add(2).write_unaligned(words[0]);
            out.add(3).write_unaligned(words[1]);
            out.add(4).write_unaligned(words[2]);
            out.add(5).write_unaligned(words[3]);
            out.add(6).write_unaligned(0);
        }
    }
    store!(bpf_sockopt, sockopt, len, optlen);
    store!(bpf_sockopt, sockopt, 0, retval);
    true
}

/// The original destination that conntrack has answered with, which stands in the buffer.
#[inline(always)]
pub(crate) fn conntrack_answer(sockopt: *mut bpf_sockopt) -> Option<(Addr, u16)> {
    let start: *const u8 = load!(load_u64, bpf_sockopt, sockopt, __bindgen_anon_2) as *const u8;
    let end: *const u8 = load!(load_u64, bpf_sockopt, sockopt, __bindgen_anon_3) as *const u8;
    // SAFETY: the bounds are checked against the end of the buffer, as the verifier demands.
    unsafe {
        if start.add(16) > end {
            return None;
        }
        let words: *const u32 = start.cast();
        let head = words.read_unaligned();
        let port = u16::from_be((head >> 16) as u16);
        if head & 0xffff == AF_INET {
            return Some((Addr::from_v4(words.add(1).read_unaligned()), port));
        }
        if start.add(28) > end {
            return None;
        }
        let word = |at: usize| words.add(at).read_unaligned();
        Some((Addr::from_v6([word(2), word(3), word(4), word(5)]), port))
    }
}

/// The entry of a connection by the proxy's socket.
#[inline(always)]
fn by_proxy(sk: Sock, netns: NetnsCookie, ends: &Ends) -> Option<*mut OrigDst> {
    match maps::orig_dst(&proxy_key(netns, ends)) {
        None => maps::orig_dst(&handshake::key(sk, netns, ends)?),
        found => found,
    }
}

/// The peer of a socket is about to be reported, by getpeername() or accept(): to a client what it dialled, to the proxy
/// the address that its client has without us.
#[inline(always)]
pub(crate) fn getpeername<F: AddressFamily>(ctx: &SockAddrContext) {
    let peer = F::named(ctx);
    // Others pay for this comparison only.
    if !peer.is_loopback() && !peer.is_stand_in() {
        return;
    }
    let sk = Sock::of_call(ctx);
    if context::protocol(ctx) == UDP {
        if let Some(state) = StoredSocket::of(sk)
            && state.kind() == socket::DATAGRAM
        {
            F::rename(ctx, state.addr());
            context::rename_port(ctx, state.port());
        }
        return;
    }
    // By tuple, not by socket: the peer of an MPTCP socket is asked for on another socket than dialled.
    let netns = maps::netns_cookie(ctx);
    let ends = sk.ends();
    // Nobody but a client has a stand-in as its peer.
    if !peer.is_stand_in()
        && let Some(entry) = maps::orig_dst(&proxy_key(netns, &ends))
    {
        // SAFETY: as in `getsockopt`.
        let source = unsafe { (*entry).source };
        if !source.is_unspecified() {
            F::rename(ctx, source);
        }
        return;
    }
    if let Some(entry) = maps::orig_dst(&client_key(netns, &ends)) {
        // SAFETY: as in `getsockopt`.
        let (addr, port) = unsafe { ((*entry).addr, (*entry).port()) };
        F::rename(ctx, addr);
        context::rename_port(ctx, port);
    }
}

/// A socket's own name is about to be reported.
#[inline(always)]
pub(crate) fn getsockname<F: AddressFamily>(ctx: &SockAddrContext) {
    let name = F::named(ctx);
    let is_datagram = context::protocol(ctx) == UDP;
    if !is_datagram && !name.is_loopback() && !name.is_stand_in() {
        return;
    }
    let sk = Sock::of_call(ctx);
    if let Some(state) = StoredSocket::of(sk) {
        if is_datagram {
            return datagram_name::<F>(ctx, sk, name, state);
        }
        if state.kind() == socket::FAILED {
            return F::rename(ctx, state.source());
        }
    }
    if is_datagram {
        return;
    }
    let netns = maps::netns_cookie(ctx);
    let ends = sk.ends();
    if name.is_stand_in() {
        // The proxy's end: as if it had been dialled by REDIRECT.
        if by_proxy(sk, netns, &ends).is_some() {
            F::rename(ctx, name.localhost());
        }
        return;
    }
    let source = match maps::orig_dst(&client_key(netns, &ends)) {
        // SAFETY: as in `getsockopt`.
        Some(entry) => unsafe { (*entry).source },
        None => source_of_closed(sk, netns, &ends),
    };
    if !source.is_unspecified() {
        F::rename(ctx, source);
    }
}

/// The source of a socket whose connection is over, and the entry with it: that of the default route.
#[inline(always)]
fn source_of_closed(sk: Sock, netns: NetnsCookie, ends: &Ends) -> Addr {
    if !ends.remote.is_stand_in() || sk.tcp_state() != BPF_TCP_CLOSE {
        return Addr::UNSPECIFIED;
    }
    let Some(pod) = maps::pod(netns) else { return Addr::UNSPECIFIED };
    let any = if ends.remote.is_v4() { Addr::UNSPECIFIED_V4 } else { Addr::UNSPECIFIED };
    maps::destination(pod.id, any).map_or(Addr::UNSPECIFIED, |destination| destination.source)
}

/// A datagram socket's own name: its source where it could not be bound to it; and none where it was, and is connected
/// no more.
#[inline(always)]
fn datagram_name<F: AddressFamily>(ctx: &SockAddrContext, sk: Sock, name: Addr, state: StoredSocket) {
    if state.bound() != 0 && !sk.is_connected() {
        F::rename(ctx, Addr::UNSPECIFIED);
    } else if !state.source().is_unspecified() && name.is_loopback() {
        F::rename(ctx, state.source());
    }
}
