//! Reads and writes of the contexts that the kernel hands to the programs.
//!
//! The verifier wants every access as one load or store of the field's own size at a constant offset from the
//! context pointer; LLVM likes to merge neighbouring loads and to hoist address arithmetic ("invalid bpf_context
//! access off=48 size=8", "dereference of modified ctx ptr"). Volatile accesses keep them apart.

use aya_ebpf::{
    bindings::{bpf_sk_lookup, bpf_sock, bpf_sock_ops},
    programs::SockAddrContext,
};
use intercept_common::Addr;

/// `AF_INET`.
pub(crate) const AF_INET: u32 = 2;
/// `AF_INET6`.
pub(crate) const AF_INET6: u32 = 10;
/// `IPPROTO_TCP`.
pub(crate) const TCP: u32 = 6;
/// `IPPROTO_UDP`.
pub(crate) const UDP: u32 = 17;

macro_rules! load {
    ($pointer:expr, $($field:tt)+) => {
        // SAFETY: the pointer is the context, or a socket that the verifier knows as one; the field is inside it.
        unsafe { core::ptr::read_volatile(&raw const (*$pointer).$($field)+) }
    };
}
pub(crate) use load;

macro_rules! load_v6 {
    ($pointer:expr, $field:ident) => {
        Addr::from_v6([
            load!($pointer, $field[0]),
            load!($pointer, $field[1]),
            load!($pointer, $field[2]),
            load!($pointer, $field[3]),
        ])
    };
}

macro_rules! store {
    ($pointer:expr, $value:expr, $($field:tt)+) => {
        // SAFETY: the pointer is the context; the verifier lets this hook write the field.
        unsafe { core::ptr::write_volatile(&raw mut (*$pointer).$($field)+, $value) }
    };
}

macro_rules! store_v6 {
    ($pointer:expr, $addr:expr, $field:ident) => {{
        let words = $addr.words();
        store!($pointer, words[0], $field[0]);
        store!($pointer, words[1], $field[1]);
        store!($pointer, words[2], $field[2]);
        store!($pointer, words[3], $field[3]);
    }};
}

/// The low 16 bits of a word that holds a port in network order, as host order.
#[inline(always)]
pub(crate) const fn port_from_be(word: u32) -> u16 {
    u16::from_be((word & 0xffff) as u16)
}

/// What differs between the hooks of the two families. The hooks of IPv6 also see IPv4 that is spoken through an
/// `AF_INET6` socket, as mapped addresses.
pub(crate) trait Family {
    /// The address that the system call names: dialled, or about to be reported.
    fn named(ctx: &SockAddrContext) -> Addr;
    /// Replace it.
    fn rename(ctx: &SockAddrContext, addr: Addr);
    /// What the socket is bound to.
    fn bound(sk: *mut bpf_sock) -> Addr;
    /// sendmsg: the source that the datagram asks for; unspecified if none.
    fn datagram_source(ctx: &SockAddrContext) -> Addr;
    /// sendmsg: give the datagram a source.
    fn set_datagram_source(ctx: &SockAddrContext, addr: Addr);
    /// Whether `bpf_bind` wants a `sockaddr_in6`.
    const V6: bool;
}

/// Hooks of `AF_INET` addresses.
pub(crate) struct V4;
/// Hooks of `AF_INET6` addresses.
pub(crate) struct V6;

impl Family for V4 {
    const V6: bool = false;

    #[inline(always)]
    fn named(ctx: &SockAddrContext) -> Addr {
        Addr::from_v4(load!(ctx.sock_addr, user_ip4))
    }

    #[inline(always)]
    fn rename(ctx: &SockAddrContext, addr: Addr) {
        store!(ctx.sock_addr, addr.v4(), user_ip4);
    }

    #[inline(always)]
    fn bound(sk: *mut bpf_sock) -> Addr {
        Addr::from_v4(load!(sk, src_ip4))
    }

    #[inline(always)]
    fn datagram_source(ctx: &SockAddrContext) -> Addr {
        Addr::from_v4(load!(ctx.sock_addr, msg_src_ip4))
    }

    #[inline(always)]
    fn set_datagram_source(ctx: &SockAddrContext, addr: Addr) {
        store!(ctx.sock_addr, addr.v4(), msg_src_ip4);
    }
}

impl Family for V6 {
    const V6: bool = true;

    #[inline(always)]
    fn named(ctx: &SockAddrContext) -> Addr {
        load_v6!(ctx.sock_addr, user_ip6)
    }

    #[inline(always)]
    fn rename(ctx: &SockAddrContext, addr: Addr) {
        store_v6!(ctx.sock_addr, addr, user_ip6);
    }

    #[inline(always)]
    fn bound(sk: *mut bpf_sock) -> Addr {
        load_v6!(sk, src_ip6)
    }

    #[inline(always)]
    fn datagram_source(ctx: &SockAddrContext) -> Addr {
        load_v6!(ctx.sock_addr, msg_src_ip6)
    }

    #[inline(always)]
    fn set_datagram_source(ctx: &SockAddrContext, addr: Addr) {
        store_v6!(ctx.sock_addr, addr, msg_src_ip6);
    }
}

/// The port that the system call names, host order.
#[inline(always)]
pub(crate) fn named_port(ctx: &SockAddrContext) -> u16 {
    port_from_be(load!(ctx.sock_addr, user_port))
}

/// Replace it.
#[inline(always)]
pub(crate) fn rename_port(ctx: &SockAddrContext, port: u16) {
    store!(ctx.sock_addr, u32::from(port.to_be()), user_port);
}

/// `IPPROTO_*` of the socket.
#[inline(always)]
pub(crate) fn protocol(ctx: &SockAddrContext) -> u32 {
    load!(ctx.sock_addr, protocol)
}

/// The socket of a system call on addresses. Never null in these hooks.
#[inline(always)]
pub(crate) fn sock(ctx: &SockAddrContext) -> *mut bpf_sock {
    load!(ctx.sock_addr, __bindgen_anon_1.sk)
}

/// Both ends of a socket.
#[derive(Clone, Copy)]
pub(crate) struct Ends {
    /// Its own.
    pub(crate) local: Addr,
    /// Host order.
    pub(crate) local_port: u16,
    /// The peer's.
    pub(crate) remote: Addr,
    /// Host order.
    pub(crate) remote_port: u16,
}

/// Both ends of a connected socket. Of an `AF_INET6` socket that speaks IPv4, the IPv4 fields are read: the mapped
/// ones are filled later by some kernels.
#[inline(always)]
pub(crate) fn sock_ends(sk: *mut bpf_sock) -> Ends {
    let remote6 = load_v6!(sk, dst_ip6);
    let v6 = load!(sk, family) == AF_INET6 && !remote6.is_v4();
    let (local, remote) = if v6 {
        (load_v6!(sk, src_ip6), remote6)
    } else {
        (Addr::from_v4(load!(sk, src_ip4)), Addr::from_v4(load!(sk, dst_ip4)))
    };
    Ends {
        local,
        local_port: load!(sk, src_port) as u16,
        remote,
        remote_port: u16::from_be(load!(sk, dst_port)),
    }
}

/// Both ends of the socket of a callback.
#[inline(always)]
pub(crate) fn callback_ends(ops: *mut bpf_sock_ops) -> Ends {
    let mut v6 = load!(ops, family) == AF_INET6;
    let mut remote = Addr::UNSPECIFIED;
    if v6 {
        remote = load_v6!(ops, remote_ip6);
        v6 = !remote.is_v4();
    }
    let local;
    if v6 {
        local = load_v6!(ops, local_ip6);
    } else {
        remote = Addr::from_v4(load!(ops, remote_ip4));
        local = Addr::from_v4(load!(ops, local_ip4));
    }
    Ends {
        local,
        local_port: load!(ops, local_port) as u16,
        remote,
        // The port is the upper half of the word on little endian: the kernel shifts it there.
        remote_port: u32::from_be(load!(ops, remote_port)) as u16,
    }
}

/// The local address of the socket of a callback.
#[inline(always)]
pub(crate) fn callback_local(ops: *mut bpf_sock_ops) -> Addr {
    if load!(ops, family) == AF_INET6 {
        let local = load_v6!(ops, local_ip6);
        if !local.is_v4() {
            return local;
        }
    }
    Addr::from_v4(load!(ops, local_ip4))
}

/// Both ends of a connection that arrives: "local" is what was dialled.
#[inline(always)]
pub(crate) fn lookup_ends(lookup: *mut bpf_sk_lookup) -> Ends {
    let (local, remote) = if load!(lookup, family) == AF_INET6 {
        (load_v6!(lookup, local_ip6), load_v6!(lookup, remote_ip6))
    } else {
        (Addr::from_v4(load!(lookup, local_ip4)), Addr::from_v4(load!(lookup, remote_ip4)))
    };
    Ends {
        local,
        local_port: load!(lookup, local_port) as u16,
        remote,
        remote_port: u16::from_be(load!(lookup, remote_port)),
    }
}
