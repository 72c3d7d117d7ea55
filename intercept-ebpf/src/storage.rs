//! State that the kernel keeps with a socket (`BPF_MAP_TYPE_SK_STORAGE`), behind accessors. Two threads may use one UDP socket
//! at the same time, so fields are read and written one by one, never through a reference.

use core::ffi::c_void;

use aya_ebpf::{
    bindings::BPF_SK_STORAGE_GET_F_CREATE,
    btf_maps::SkStorage,
    helpers::generated::{bpf_sk_storage_delete, bpf_sk_storage_get},
    macros::btf_map,
    programs::SockContext,
};
use intercept_common::{
    Addr,
    layout::{ConnKey, DnsServers, MAX_SERVERS, ServerNumbers, SocketState, socket},
};

use crate::context::Sock;

#[btf_map]
static SOCKETS: SkStorage<SocketState> = SkStorage::new();
#[btf_map]
static DNS_SERVERS: SkStorage<DnsServers> = SkStorage::new();
#[btf_map]
static RELEASES: SkStorage<ConnKey> = SkStorage::new();

/// A map of this file, as the helpers take it.
macro_rules! storage {
    ($map:ident) => {
        core::ptr::addr_of!($map).cast_mut().cast::<c_void>()
    };
}

/// The state of a socket.
#[derive(Clone, Copy)]
pub(crate) struct StoredSocket(*mut SocketState);

impl StoredSocket {
    /// `None` if the socket has no state.
    #[inline(always)]
    pub(crate) fn of(sk: Sock) -> Option<Self> {
        // SAFETY: the map is socket storage of SocketState, and the verifier knows the socket.
        let state =
            unsafe { bpf_sk_storage_get(storage!(SOCKETS), sk.as_ptr().cast(), core::ptr::null_mut(), 0) };
        if state.is_null() { None } else { Some(Self(state.cast())) }
    }

    /// Sets the state of a socket. `None` if out of memory.
    #[inline(always)]
    pub(crate) fn set(sk: Sock, mut state: SocketState) -> Option<Self> {
        let create = BPF_SK_STORAGE_GET_F_CREATE.into();
        // SAFETY: as in `of`; the helper copies the value of a new entry.
        unsafe {
            let stored =
                bpf_sk_storage_get(storage!(SOCKETS), sk.as_ptr().cast(), (&raw mut state).cast(), create);
            let stored = stored.cast::<SocketState>();
            if stored.is_null() {
                return None;
            }
            stored.write(state);
            Some(Self(stored))
        }
    }

    /// Deletes the state of a socket.
    #[inline(always)]
    pub(crate) fn delete(sk: Sock) {
        // SAFETY: the map is a socket storage. No entry is no error.
        unsafe { bpf_sk_storage_delete(storage!(SOCKETS), sk.as_ptr().cast()) };
    }

    /// All of it. Volatile, so that it comes from the map even after [`StoredSocket::set`].
    #[inline(always)]
    pub(crate) fn read(self) -> SocketState {
        // SAFETY: the storage lives as long as the socket. The same holds for the rest of this type.
        unsafe { self.0.read_volatile() }
    }

    /// [`SocketState::addr`].
    #[inline(always)]
    pub(crate) fn addr(self) -> Addr {
        // SAFETY: see `read`.
        unsafe { (&raw const (*self.0).addr).read() }
    }

    /// [`SocketState::source`].
    #[inline(always)]
    pub(crate) fn source(self) -> Addr {
        // SAFETY: see `read`.
        unsafe { (&raw const (*self.0).source).read() }
    }

    /// [`SocketState::port`].
    #[inline(always)]
    pub(crate) fn port(self) -> u16 {
        // SAFETY: see `read`.
        unsafe { (&raw const (*self.0).port).read() }
    }

    /// [`SocketState::kind`].
    #[inline(always)]
    pub(crate) fn kind(self) -> u16 {
        // SAFETY: see `read`.
        unsafe { (&raw const (*self.0).kind).read() }
    }

    /// [`SocketState::bound`].
    #[inline(always)]
    pub(crate) fn bound(self) -> u16 {
        // SAFETY: see `read`.
        unsafe { (&raw const (*self.0).bound).read() }
    }

    /// Keeps only [`SocketState::bound`].
    #[inline(always)]
    pub(crate) fn set_idle(self) {
        // SAFETY: see `read`.
        unsafe {
            (&raw mut (*self.0).kind).write(socket::IDLE);
            (&raw mut (*self.0).source).write(Addr::UNSPECIFIED);
        }
    }
}

/// The DNS servers that a socket has asked besides its first.
#[derive(Clone, Copy)]
pub(crate) struct StoredServers(*mut DnsServers);

impl StoredServers {
    /// `None` if the socket has asked no further server.
    #[inline(always)]
    pub(crate) fn of(sk: Sock) -> Option<Self> {
        Self::get(sk, 0)
    }

    /// As [`StoredServers::of`], creating an empty entry. `None` if out of memory.
    #[inline(always)]
    pub(crate) fn create(sk: Sock) -> Option<Self> {
        Self::get(sk, BPF_SK_STORAGE_GET_F_CREATE.into())
    }

    #[inline(always)]
    fn get(sk: Sock, flags: u64) -> Option<Self> {
        // SAFETY: the map is socket storage of DnsServers; the kernel zeroes a new value.
        let servers = unsafe {
            bpf_sk_storage_get(storage!(DNS_SERVERS), sk.as_ptr().cast(), core::ptr::null_mut(), flags)
        };
        if servers.is_null() { None } else { Some(Self(servers.cast())) }
    }

    /// Deletes the further servers of a socket.
    #[inline(always)]
    pub(crate) fn delete(sk: Sock) {
        // SAFETY: the map is a socket storage. No entry is no error.
        unsafe { bpf_sk_storage_delete(storage!(DNS_SERVERS), sk.as_ptr().cast()) };
    }
}

impl ServerNumbers for StoredServers {
    #[inline(always)]
    fn next(&self) -> u32 {
        // SAFETY: see `StoredSocket::read`.
        unsafe { (&raw const (*self.0).next).read_volatile() }
    }

    #[inline(always)]
    fn set_next(&mut self, next: u32) {
        // SAFETY: see `StoredSocket::read`.
        unsafe { (&raw mut (*self.0).next).write_volatile(next) };
    }

    #[inline(always)]
    fn addr(&self, slot: usize) -> Addr {
        // SAFETY: see `StoredSocket::read`; the array has this many elements.
        unsafe { (&raw const (*self.0).addrs).cast::<Addr>().add(slot % MAX_SERVERS).read() }
    }

    #[inline(always)]
    fn set_addr(&mut self, slot: usize, addr: Addr) {
        // SAFETY: see `StoredSocket::read`; the array has this many elements.
        unsafe { (&raw mut (*self.0).addrs).cast::<Addr>().add(slot % MAX_SERVERS).write(addr) };
    }
}

/// The entry of ORIG_DST to delete when a socket is closed.
#[inline(always)]
pub(crate) fn release_of(ctx: &SockContext) -> Option<ConnKey> {
    // SAFETY: the map is socket storage of ConnKey, and the context is the socket, which nothing else uses any more.
    unsafe {
        bpf_sk_storage_get(storage!(RELEASES), ctx.sock.cast(), core::ptr::null_mut(), 0)
            .cast::<ConnKey>()
            .as_ref()
            .copied()
    }
}

/// Has an entry of ORIG_DST deleted when the socket is closed. `None` if out of memory.
#[inline(always)]
pub(crate) fn release_with(sk: Sock, mut key: ConnKey) -> Option<()> {
    let create = BPF_SK_STORAGE_GET_F_CREATE.into();
    // SAFETY: as in `release_of`; callbacks of one socket run under its lock.
    unsafe {
        let stored =
            bpf_sk_storage_get(storage!(RELEASES), sk.as_ptr().cast(), (&raw mut key).cast(), create);
        let stored = stored.cast::<ConnKey>();
        if stored.is_null() {
            return None;
        }
        stored.write(key);
    }
    Some(())
}
