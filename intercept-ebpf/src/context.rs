//! Reads and writes of the contexts that the kernel hands to the programs.
//!
//! The verifier wants every access as one load or store of the field's own size at a constant offset from the
//! context pointer. LLVM merges neighbouring loads and hoists address arithmetic even of volatile ones
//! ("invalid bpf_context access off=48 size=8", "dereference of modified ctx ptr R7 off=28 disallowed"), so loads
//! are one instruction of assembly each.

use aya_ebpf::{
    bindings::{bpf_sk_lookup, bpf_sock, bpf_sock_addr, bpf_sock_ops},
    helpers::generated::bpf_bind,
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
/// `IPPROTO_MPTCP`.
pub(crate) const MPTCP: u32 = 262;

/// `load!(load_u32, bpf_sock_addr, pointer, user_port)`: a field; with a number behind it, that word of an array field.
macro_rules! load {
    ($size:ident, $struct:ty, $pointer:expr, $field:ident $(. $inner:ident)* $(, $index:literal)?) => {{
        const OFFSET: usize = core::mem::offset_of!($struct, $field $(. $inner)*) $(+ 4 * $index)?;
        let pointer: *mut $struct = $pointer;
        // SAFETY: the pointer is the context, or a socket that the verifier knows as one; the field is inside it.
        unsafe { $crate::context::$size::<OFFSET>(pointer.cast()) }
    }};
}
pub(crate) use load;

macro_rules! loader {
    ($name:ident, $type:ty, $asm:literal) => {
        /// One load at a constant offset.
        ///
        /// # Safety
        /// As `load!` says.
        #[inline(always)]
        pub(crate) unsafe fn $name<const OFFSET: usize>(pointer: *const u8) -> $type {
            #[cfg(target_arch = "bpf")]
            {
                let value: $type;
                // SAFETY: as the caller vouches.
                unsafe {
                    core::arch::asm!($asm, out(reg) value, in(reg) pointer, const OFFSET, options(readonly, nostack));
                }
                value
            }
            #[cfg(not(target_arch = "bpf"))]
            // SAFETY: as the caller vouches.
            unsafe {
                pointer.add(OFFSET).cast::<$type>().read_unaligned()
            }
        }
    };
}
loader!(load_u16, u16, "{0} = *(u16 *)({1} + {2})");
loader!(load_u32, u32, "{0} = *(u32 *)({1} + {2})");
loader!(load_u64, u64, "{0} = *(u64 *)({1} + {2})");

macro_rules! load_v6 {
    ($struct:ty, $pointer:expr, $field:ident) => {
        Addr::from_v6([
            load!(load_u32, $struct, $pointer, $field, 0),
            load!(load_u32, $struct, $pointer, $field, 1),
            load!(load_u32, $struct, $pointer, $field, 2),
            load!(load_u32, $struct, $pointer, $field, 3),
        ])
    };
}

/// `store!(bpf_sock_addr, pointer, value, user_port)`: a 32-bit field, or with a number behind it that word of an
/// array field.
macro_rules! store {
    ($struct:ty, $pointer:expr, $value:expr, $field:ident $(, $index:literal)?) => {{
        const OFFSET: usize = core::mem::offset_of!($struct, $field) $(+ 4 * $index)?;
        let pointer: *mut $struct = $pointer;
        // SAFETY: the pointer is the context, the field inside it and one that the verifier lets this hook write.
        unsafe { $crate::context::store_u32::<OFFSET>(pointer.cast(), $value) }
    }};
}
pub(crate) use store;

/// One store at a constant offset.
///
/// # Safety
/// As `store!` says.
#[inline(always)]
pub(crate) unsafe fn store_u32<const OFFSET: usize>(pointer: *mut u8, value: u32) {
    #[cfg(target_arch = "bpf")]
    // SAFETY: as the caller vouches.
    unsafe {
        core::arch::asm!("*(u32 *)({0} + {1}) = {2}", in(reg) pointer, const OFFSET, in(reg) value, options(nostack));
    }
    #[cfg(not(target_arch = "bpf"))]
    // SAFETY: as the caller vouches.
    unsafe {
        pointer.add(OFFSET).cast::<u32>().write_unaligned(value);
    }
}

macro_rules! store_v6 {
    ($pointer:expr, $addr:expr, $field:ident) => {{
        let words = $addr.words();
        store!(bpf_sock_addr, $pointer, words[0], $field, 0);
        store!(bpf_sock_addr, $pointer, words[1], $field, 1);
        store!(bpf_sock_addr, $pointer, words[2], $field, 2);
        store!(bpf_sock_addr, $pointer, words[3], $field, 3);
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
    /// Bind the socket to an address, the port still open; to the unspecified one, to none. False if it is connected or
    /// bound to a port.
    fn bind(ctx: &SockAddrContext, addr: Addr) -> bool;
    /// Whether the family is IPv6.
    const V6: bool;
}

#[repr(C)]
struct SockaddrIn {
    family: u16,
    port: u16,
    addr: u32,
    zero: [u32; 2],
}

#[repr(C)]
struct SockaddrIn6 {
    family: u16,
    port: u16,
    flowinfo: u32,
    addr: [u32; 4],
    scope: u32,
}

/// Hooks of `AF_INET` addresses.
pub(crate) struct V4;
/// Hooks of `AF_INET6` addresses.
pub(crate) struct V6;

impl Family for V4 {
    const V6: bool = false;

    #[inline(always)]
    fn named(ctx: &SockAddrContext) -> Addr {
        Addr::from_v4(load!(load_u32, bpf_sock_addr, ctx.sock_addr, user_ip4))
    }

    #[inline(always)]
    fn rename(ctx: &SockAddrContext, addr: Addr) {
        store!(bpf_sock_addr, ctx.sock_addr, addr.v4(), user_ip4);
    }

    #[inline(always)]
    fn bound(sk: *mut bpf_sock) -> Addr {
        Addr::from_v4(load!(load_u32, bpf_sock, sk, src_ip4))
    }

    #[inline(always)]
    fn bind(ctx: &SockAddrContext, addr: Addr) -> bool {
        let mut sockaddr = SockaddrIn { family: AF_INET as u16, port: 0, addr: addr.v4(), zero: [0; 2] };
        // SAFETY: the address is of the size that is given; the hook is one that may bind.
        unsafe { bpf_bind(ctx.sock_addr, (&raw mut sockaddr).cast(), size_of::<SockaddrIn>() as i32) == 0 }
    }

    #[inline(always)]
    fn datagram_source(ctx: &SockAddrContext) -> Addr {
        Addr::from_v4(load!(load_u32, bpf_sock_addr, ctx.sock_addr, msg_src_ip4))
    }

    #[inline(always)]
    fn set_datagram_source(ctx: &SockAddrContext, addr: Addr) {
        store!(bpf_sock_addr, ctx.sock_addr, addr.v4(), msg_src_ip4);
    }
}

impl Family for V6 {
    const V6: bool = true;

    #[inline(always)]
    fn named(ctx: &SockAddrContext) -> Addr {
        load_v6!(bpf_sock_addr, ctx.sock_addr, user_ip6)
    }

    #[inline(always)]
    fn rename(ctx: &SockAddrContext, addr: Addr) {
        store_v6!(ctx.sock_addr, addr, user_ip6);
    }

    #[inline(always)]
    fn bound(sk: *mut bpf_sock) -> Addr {
        load_v6!(bpf_sock, sk, src_ip6)
    }

    #[inline(always)]
    fn bind(ctx: &SockAddrContext, addr: Addr) -> bool {
        let mut sockaddr =
            SockaddrIn6 { family: AF_INET6 as u16, port: 0, flowinfo: 0, addr: addr.words(), scope: 0 };
        // SAFETY: as for IPv4.
        unsafe { bpf_bind(ctx.sock_addr, (&raw mut sockaddr).cast(), size_of::<SockaddrIn6>() as i32) == 0 }
    }

    #[inline(always)]
    fn datagram_source(ctx: &SockAddrContext) -> Addr {
        load_v6!(bpf_sock_addr, ctx.sock_addr, msg_src_ip6)
    }

    #[inline(always)]
    fn set_datagram_source(ctx: &SockAddrContext, addr: Addr) {
        store_v6!(ctx.sock_addr, addr, msg_src_ip6);
    }
}

/// Name the address that the kernel is going to use in place of an unspecified one ([`Addr::effective`]). By way of the
/// context, of which the verifier knows nothing: in a variable it would walk all of the decision for each case.
#[inline(always)]
pub(crate) fn name_own_host<F: Family>(ctx: &SockAddrContext, src: Addr) {
    let named = F::named(ctx);
    if named.is_unspecified() {
        F::rename(ctx, named.effective(src));
    }
}

/// The port that the system call names, host order.
#[inline(always)]
pub(crate) fn named_port(ctx: &SockAddrContext) -> u16 {
    port_from_be(load!(load_u32, bpf_sock_addr, ctx.sock_addr, user_port))
}

/// Replace it.
#[inline(always)]
pub(crate) fn rename_port(ctx: &SockAddrContext, port: u16) {
    store!(bpf_sock_addr, ctx.sock_addr, u32::from(port.to_be()), user_port);
}

/// `IPPROTO_*` of the socket.
#[inline(always)]
pub(crate) fn protocol(ctx: &SockAddrContext) -> u32 {
    load!(load_u32, bpf_sock_addr, ctx.sock_addr, protocol)
}

/// The socket of a system call on addresses. Never null in these hooks.
#[inline(always)]
pub(crate) fn sock(ctx: &SockAddrContext) -> *mut bpf_sock {
    load!(load_u64, bpf_sock_addr, ctx.sock_addr, __bindgen_anon_1) as *mut bpf_sock
}

/// The port that a socket is bound to, host order.
#[inline(always)]
pub(crate) fn bound_port(sk: *mut bpf_sock) -> u16 {
    load!(load_u32, bpf_sock, sk, src_port) as u16
}

/// SO_MARK of a socket.
#[inline(always)]
pub(crate) fn mark(sk: *mut bpf_sock) -> u32 {
    load!(load_u32, bpf_sock, sk, mark)
}

/// `TCP_CLOSE`, `TCP_SYN_SENT` and the like.
#[inline(always)]
pub(crate) fn tcp_state(sk: *mut bpf_sock) -> u32 {
    load!(load_u32, bpf_sock, sk, state)
}

/// The interface that a socket is bound to; 0 for none.
#[inline(always)]
pub(crate) fn device(sk: *mut bpf_sock) -> u32 {
    load!(load_u32, bpf_sock, sk, bound_dev_if)
}

/// Whether a socket has a peer.
#[inline(always)]
pub(crate) fn is_connected(sk: *mut bpf_sock) -> bool {
    load!(load_u16, bpf_sock, sk, dst_port) != 0
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

impl Ends {
    /// Whether a socket with these ends may be the proxy's end of a connection in ORIG_DST. The proxy is dialled on
    /// loopback or a stand-in address; what TPROXY steers is dialled from and to one address of the pod. What arrives
    /// from outside needs no look-up.
    #[inline(always)]
    pub(crate) fn may_be_redirected(&self) -> bool {
        self.local.is_loopback() || self.local.is_stand_in() || self.local == self.remote
    }
}

/// Both ends of a connected socket. Of an `AF_INET6` socket that speaks IPv4, the IPv4 fields are read: the mapped
/// ones are filled later by some kernels.
#[inline(always)]
pub(crate) fn sock_ends(sk: *mut bpf_sock) -> Ends {
    let remote6 = load_v6!(bpf_sock, sk, dst_ip6);
    let v6 = load!(load_u32, bpf_sock, sk, family) == AF_INET6 && !remote6.is_v4();
    let (local, remote) = if v6 {
        (load_v6!(bpf_sock, sk, src_ip6), remote6)
    } else {
        (
            Addr::from_v4(load!(load_u32, bpf_sock, sk, src_ip4)),
            Addr::from_v4(load!(load_u32, bpf_sock, sk, dst_ip4)),
        )
    };
    Ends {
        local,
        local_port: load!(load_u32, bpf_sock, sk, src_port) as u16,
        remote,
        remote_port: u16::from_be(load!(load_u16, bpf_sock, sk, dst_port)),
    }
}

/// Both ends of the socket of a callback.
#[inline(always)]
pub(crate) fn callback_ends(ops: *mut bpf_sock_ops) -> Ends {
    let mut v6 = load!(load_u32, bpf_sock_ops, ops, family) == AF_INET6;
    let mut remote = Addr::UNSPECIFIED;
    if v6 {
        remote = load_v6!(bpf_sock_ops, ops, remote_ip6);
        v6 = !remote.is_v4();
    }
    let local;
    if v6 {
        local = load_v6!(bpf_sock_ops, ops, local_ip6);
    } else {
        remote = Addr::from_v4(load!(load_u32, bpf_sock_ops, ops, remote_ip4));
        local = Addr::from_v4(load!(load_u32, bpf_sock_ops, ops, local_ip4));
    }
    Ends {
        local,
        local_port: load!(load_u32, bpf_sock_ops, ops, local_port) as u16,
        remote,
        // The port is the upper half of the word on little endian: the kernel shifts it there.
        remote_port: u32::from_be(load!(load_u32, bpf_sock_ops, ops, remote_port)) as u16,
    }
}

/// The local address of the socket of a callback.
#[inline(always)]
pub(crate) fn callback_local(ops: *mut bpf_sock_ops) -> Addr {
    if load!(load_u32, bpf_sock_ops, ops, family) == AF_INET6 {
        let local = load_v6!(bpf_sock_ops, ops, local_ip6);
        if !local.is_v4() {
            return local;
        }
    }
    Addr::from_v4(load!(load_u32, bpf_sock_ops, ops, local_ip4))
}

/// The address that a connection arrives for.
#[inline(always)]
pub(crate) fn lookup_local(lookup: *mut bpf_sk_lookup) -> Addr {
    if load!(load_u32, bpf_sk_lookup, lookup, family) == AF_INET6 {
        load_v6!(bpf_sk_lookup, lookup, local_ip6)
    } else {
        Addr::from_v4(load!(load_u32, bpf_sk_lookup, lookup, local_ip4))
    }
}

/// Both ends of a connection that arrives: "local" is what was dialled.
#[inline(always)]
pub(crate) fn lookup_ends(lookup: *mut bpf_sk_lookup) -> Ends {
    let remote = if load!(load_u32, bpf_sk_lookup, lookup, family) == AF_INET6 {
        load_v6!(bpf_sk_lookup, lookup, remote_ip6)
    } else {
        Addr::from_v4(load!(load_u32, bpf_sk_lookup, lookup, remote_ip4))
    };
    Ends {
        local: lookup_local(lookup),
        local_port: load!(load_u32, bpf_sk_lookup, lookup, local_port) as u16,
        remote,
        remote_port: u16::from_be(load!(load_u16, bpf_sk_lookup, lookup, remote_port)),
    }
}
