//! Reads and writes of the programs' contexts.
//!
//! The verifier requires every access to be one load or store of the field's own size at a constant offset from the context
//! pointer. LLVM merges neighbouring loads and hoists address arithmetic, even of volatile ones ("invalid bpf_context access
//! off=48 size=8", "dereference of modified ctx ptr R7 off=28 disallowed"). So each access is one instruction of assembly.

use aya_ebpf::{
    bindings::{bpf_sk_lookup, bpf_sock, bpf_sock_addr, bpf_sock_ops, bpf_sockopt, bpf_tcp_sock},
    helpers::generated::{bpf_bind, bpf_tcp_sock as as_tcp_sock},
    programs::{SockAddrContext, SockOpsContext, SockoptContext},
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

/// `load!(load_u32, bpf_sock_addr, pointer, user_port)` loads a field; a number at the end selects a word of an array field.
macro_rules! load {
    ($size:ident, $struct:ty, $pointer:expr, $field:ident $(. $inner:ident)* $(, $index:literal)?) => {{
        const OFFSET: usize = core::mem::offset_of!($struct, $field $(. $inner)*) $(+ 4 * $index)?;
        let pointer: *mut $struct = $pointer;
        // SAFETY: the pointer is the context, or a socket that the verifier knows; the field is inside it.
        unsafe { $crate::context::$size::<OFFSET>(pointer.cast()) }
    }};
}
pub(crate) use load;

macro_rules! loader {
    ($name:ident, $type:ty, $asm:literal) => {
        /// One load at a constant offset.
        ///
        /// # Safety
        /// `pointer` is the context or a socket, and has a field of this size at the offset.
        #[inline(always)]
        pub(crate) unsafe fn $name<const OFFSET: usize>(pointer: *const u8) -> $type {
            #[cfg(target_arch = "bpf")]
            {
                let value: $type;
                // SAFETY: guaranteed by the caller.
                unsafe {
                    core::arch::asm!($asm, out(reg) value, in(reg) pointer, const OFFSET, options(readonly, nostack));
                }
                value
            }
            #[cfg(not(target_arch = "bpf"))]
            // SAFETY: guaranteed by the caller.
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

/// `store!(bpf_sock_addr, pointer, value, user_port)` stores to a 32-bit field; a number at the end selects a word of an
/// array field.
macro_rules! store {
    ($struct:ty, $pointer:expr, $value:expr, $field:ident $(, $index:literal)?) => {{
        const OFFSET: usize = core::mem::offset_of!($struct, $field) $(+ 4 * $index)?;
        let pointer: *mut $struct = $pointer;
        // SAFETY: the pointer is the context, the field is inside it, and this hook may write it.
        unsafe { $crate::context::store_u32::<OFFSET>(pointer.cast(), $value) }
    }};
}
pub(crate) use store;

/// One store at a constant offset.
///
/// # Safety
/// `pointer` is the context, and the hook may write the 32-bit field at the offset.
#[inline(always)]
pub(crate) unsafe fn store_u32<const OFFSET: usize>(pointer: *mut u8, value: u32) {
    #[cfg(target_arch = "bpf")]
    // SAFETY: guaranteed by the caller.
    unsafe {
        core::arch::asm!("*(u32 *)({0} + {1}) = {2}", in(reg) pointer, const OFFSET, in(reg) value, options(nostack));
    }
    #[cfg(not(target_arch = "bpf"))]
    // SAFETY: guaranteed by the caller.
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

/// The port in the low 16 bits of a word in network order, as host order.
#[inline(always)]
pub(crate) const fn port_from_be(word: u32) -> u16 {
    u16::from_be((word & 0xffff) as u16)
}

/// The differences between the hooks of the two families. The hooks of IPv6 also see IPv4 through an `AF_INET6` socket, as
/// mapped addresses.
pub(crate) trait AddressFamily {
    /// The address of the system call: the destination, or the address to be returned.
    fn named(ctx: &SockAddrContext) -> Addr;
    /// Replaces that address.
    fn rename(ctx: &SockAddrContext, addr: Addr);
    /// The address that the socket is bound to.
    fn bound(sk: Sock) -> Addr;
    /// sendmsg: the source from a control message, or unspecified.
    fn datagram_source(ctx: &SockAddrContext) -> Addr;
    /// sendmsg: sets the source.
    fn set_datagram_source(ctx: &SockAddrContext, addr: Addr);
    /// Binds the socket to an address without a port; the unspecified address releases it. False if the socket is connected
    /// or bound to a port.
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

impl AddressFamily for V4 {
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
    fn bound(sk: Sock) -> Addr {
        Addr::from_v4(load!(load_u32, bpf_sock, sk.0, src_ip4))
    }

    #[inline(always)]
    fn bind(ctx: &SockAddrContext, addr: Addr) -> bool {
        let mut sockaddr = SockaddrIn { family: AF_INET as u16, port: 0, addr: addr.v4(), zero: [0; 2] };
        // SAFETY: the length is that of the address, and this hook may call the helper.
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

impl AddressFamily for V6 {
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
    fn bound(sk: Sock) -> Addr {
        load_v6!(bpf_sock, sk.0, src_ip6)
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

/// Replaces an unspecified destination with the address that the kernel will use instead ([`Addr::effective`]). It goes
/// through the context, because the verifier knows nothing about values there; with a variable it would walk the decision
/// once for each case.
#[inline(always)]
pub(crate) fn name_own_host<F: AddressFamily>(ctx: &SockAddrContext, src: Addr) {
    let named = F::named(ctx);
    if named.is_unspecified() {
        F::rename(ctx, named.effective(src));
    }
}

/// The port of the system call, in host order.
#[inline(always)]
pub(crate) fn named_port(ctx: &SockAddrContext) -> u16 {
    port_from_be(load!(load_u32, bpf_sock_addr, ctx.sock_addr, user_port))
}

/// Replaces that port.
#[inline(always)]
pub(crate) fn rename_port(ctx: &SockAddrContext, port: u16) {
    store!(bpf_sock_addr, ctx.sock_addr, u32::from(port.to_be()), user_port);
}

/// `IPPROTO_*` of the socket.
#[inline(always)]
pub(crate) fn protocol(ctx: &SockAddrContext) -> u32 {
    load!(load_u32, bpf_sock_addr, ctx.sock_addr, protocol)
}

/// A socket that the verifier knows: never null.
#[derive(Clone, Copy)]
pub(crate) struct Sock(*mut bpf_sock);

/// Whether an IPv6 socket is bound to this address.
#[inline(always)]
pub(crate) fn is_bound_v6(socket: *mut bpf_sock, addr: Addr) -> bool {
    let (bound, addr) = (load_v6!(bpf_sock, socket, src_ip6).words(), addr.words());
    (bound[0] ^ addr[0]) | (bound[1] ^ addr[1]) | (bound[2] ^ addr[2]) | (bound[3] ^ addr[3]) == 0
}

impl Sock {
    /// The socket of a system call on addresses. It is never null in these hooks.
    #[inline(always)]
    pub(crate) fn of_call(ctx: &SockAddrContext) -> Self {
        Self(load!(load_u64, bpf_sock_addr, ctx.sock_addr, __bindgen_anon_1) as *mut bpf_sock)
    }

    /// The socket of a TCP callback. `None` if it is a request socket, which has no full one yet.
    #[inline(always)]
    pub(crate) fn of_callback(ctx: &SockOpsContext) -> Option<Self> {
        Self::checked(load!(load_u64, bpf_sock_ops, ctx.ops, __bindgen_anon_2))
    }

    /// The socket of `getsockopt()`.
    #[inline(always)]
    pub(crate) fn of_option(ctx: &SockoptContext) -> Option<Self> {
        Self::checked(load!(load_u64, bpf_sockopt, ctx.sockopt, __bindgen_anon_1))
    }

    #[inline(always)]
    fn checked(address: u64) -> Option<Self> {
        if address == 0 { None } else { Some(Self(address as *mut bpf_sock)) }
    }

    /// For helpers that take a socket.
    #[inline(always)]
    pub(crate) fn as_ptr(self) -> *mut bpf_sock {
        self.0
    }

    /// `IPPROTO_*`.
    #[inline(always)]
    pub(crate) fn protocol(self) -> u32 {
        load!(load_u32, bpf_sock, self.0, protocol)
    }

    /// The port that it is bound to, in host order.
    #[inline(always)]
    pub(crate) fn bound_port(self) -> u16 {
        load!(load_u32, bpf_sock, self.0, src_port) as u16
    }

    /// The sequence number of the SYN that the peer has sent. `None` if it is not a TCP socket.
    #[inline(always)]
    pub(crate) fn peer_isn(self) -> Option<u32> {
        // SAFETY: the helper takes any socket, and returns null for one that is not TCP.
        let tcp = unsafe { as_tcp_sock(self.0) };
        if tcp.is_null() {
            return None;
        }
        let next = load!(load_u32, bpf_tcp_sock, tcp, rcv_nxt);
        let received = load!(load_u64, bpf_tcp_sock, tcp, bytes_received) as u32;
        Some(next.wrapping_sub(received).wrapping_sub(1))
    }

    /// SO_MARK.
    #[inline(always)]
    pub(crate) fn mark(self) -> u32 {
        load!(load_u32, bpf_sock, self.0, mark)
    }

    /// The TCP state, such as `TCP_CLOSE`.
    #[inline(always)]
    pub(crate) fn tcp_state(self) -> u32 {
        load!(load_u32, bpf_sock, self.0, state)
    }

    /// The index of the interface that it is bound to, or 0.
    #[inline(always)]
    pub(crate) fn device(self) -> u32 {
        load!(load_u32, bpf_sock, self.0, bound_dev_if)
    }

    /// Whether it has a peer.
    #[inline(always)]
    pub(crate) fn is_connected(self) -> bool {
        load!(load_u16, bpf_sock, self.0, dst_port) != 0
    }

    /// Both ends of a connected socket. For IPv4 through an `AF_INET6` socket the IPv4 fields are read, because some kernels
    /// fill in the mapped addresses later.
    #[inline(always)]
    pub(crate) fn ends(self) -> Ends {
        let sk = self.0;
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
}

/// Both ends of a socket.
#[derive(Clone, Copy)]
pub(crate) struct Ends {
    /// Local address.
    pub(crate) local: Addr,
    /// Host order.
    pub(crate) local_port: u16,
    /// Remote address.
    pub(crate) remote: Addr,
    /// Host order.
    pub(crate) remote_port: u16,
}

impl Ends {
    /// Whether a socket with these ends may be the proxy's end of a connection in ORIG_DST: its local address is on loopback
    /// or a stand-in address, or (TPROXY) both ends have one address of the pod. Connections from outside need no lookup.
    #[inline(always)]
    pub(crate) fn may_be_redirected(&self) -> bool {
        self.local.is_loopback() || self.local.is_stand_in() || self.local == self.remote
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
        // On little endian the kernel shifts the port to the upper half of the word.
        remote_port: u32::from_be(load!(load_u32, bpf_sock_ops, ops, remote_port)) as u16,
    }
}

/// The sequence number of the SYN of a client whose connection is established. The SYN counts as a byte, also if it had data.
#[inline(always)]
pub(crate) fn callback_isn(ops: *mut bpf_sock_ops) -> u32 {
    let acknowledged = load!(load_u64, bpf_sock_ops, ops, bytes_acked) as u32;
    load!(load_u32, bpf_sock_ops, ops, snd_una).wrapping_sub(acknowledged)
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

/// The destination address of an arriving connection.
#[inline(always)]
pub(crate) fn lookup_local(lookup: *mut bpf_sk_lookup) -> Addr {
    if load!(load_u32, bpf_sk_lookup, lookup, family) == AF_INET6 {
        load_v6!(bpf_sk_lookup, lookup, local_ip6)
    } else {
        Addr::from_v4(load!(load_u32, bpf_sk_lookup, lookup, local_ip4))
    }
}

/// Both ends of an arriving connection; the local end is the destination.
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
