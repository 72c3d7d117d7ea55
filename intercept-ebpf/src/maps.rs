//! The maps, behind the accessors that the programs need. `intercept_common::{names, layout}` documents their contents.

use core::ffi::c_void;

use aya_ebpf::{
    EbpfContext,
    bindings::{BPF_F_MMAPABLE, BPF_F_NO_PREALLOC, BPF_SK_STORAGE_GET_F_CREATE, bpf_sock, bpf_sock_ops},
    btf_maps::SkStorage,
    helpers::{
        bpf_get_netns_cookie,
        generated::{bpf_sk_storage_delete, bpf_sk_storage_get},
    },
    macros::{btf_map, map},
    maps::{Array, HashMap, LpmTrie, PerCpuArray, ProgramArray, RingBuf, SockHash, lpm_trie::Key},
    programs::SkLookupContext,
};
use intercept_common::{
    Addr,
    layout::{
        ConnKey, Destination, DestinationKey, DnsServers, HANDSHAKES as HANDSHAKE_COUNT, Handshake,
        ListenerKey, LookupScratch, MAX_PODS, MemberKey, OrigDst, PodPolicy, PortKey, Proxy, ReasonCounters,
        SocketState, budget,
    },
};

/// Entries are allocated on demand; until then the limit costs 16 bytes for each.
const MANY: u32 = 1 << 20;

#[map]
static POLICIES: HashMap<u64, PodPolicy> = HashMap::with_max_entries(MAX_PODS, BPF_F_NO_PREALLOC);
#[map]
static DESTINATIONS: LpmTrie<DestinationKey, Destination> =
    LpmTrie::with_max_entries(budget::for_all_pods(budget::DESTINATIONS), 0);
#[map]
static PORTS: LpmTrie<PortKey, u32> = LpmTrie::with_max_entries(budget::for_all_pods(budget::PORTS), 0);
#[map]
static GROUPS: HashMap<MemberKey, u32> =
    HashMap::with_max_entries(budget::for_all_pods(budget::GROUPS), BPF_F_NO_PREALLOC);
#[map]
static INTERFACES: HashMap<MemberKey, u32> =
    HashMap::with_max_entries(budget::for_all_pods(budget::INTERFACES), BPF_F_NO_PREALLOC);
#[map]
static LISTENERS: SockHash<ListenerKey> = SockHash::with_max_entries(1 << 15, 0);
#[map]
static ORIG_DST: HashMap<ConnKey, OrigDst> = HashMap::with_max_entries(MANY, BPF_F_NO_PREALLOC);
#[btf_map]
static SOCKETS: SkStorage<SocketState> = SkStorage::new();
#[btf_map]
static DNS_SERVERS: SkStorage<DnsServers> = SkStorage::new();
#[map]
static JUMP_TABLE: ProgramArray = ProgramArray::with_max_entries(1, 0);
#[map]
static LOOKUP_SCRATCH: PerCpuArray<LookupScratch> = PerCpuArray::with_max_entries(1, 0);
#[btf_map]
static RELEASES: SkStorage<ConnKey> = SkStorage::new();
#[map]
static HANDSHAKES: Array<Handshake> = Array::with_max_entries(HANDSHAKE_COUNT, 0);
// Mapped into the agent's memory, so that it can change single fields while the programs change others.
#[map]
static PROXY_STATE: Array<Proxy> = Array::with_max_entries(MAX_PODS, BPF_F_MMAPABLE);
#[map]
static COUNTERS: PerCpuArray<ReasonCounters> = PerCpuArray::with_max_entries(MAX_PODS, 0);
#[map]
static EVENTS: RingBuf = RingBuf::with_byte_size(1 << 20, 0);
#[map]
static TRACING: Array<u32> = Array::with_max_entries(1, 0);

/// The cookie of the socket's network namespace.
#[inline(always)]
pub(crate) fn netns_cookie(ctx: &impl EbpfContext) -> u64 {
    // SAFETY: the context is that of the running program.
    unsafe { bpf_get_netns_cookie(ctx.as_ptr()) }
}

/// The policy of a namespace. `None` if it is not captured.
#[inline(always)]
pub(crate) fn pod(netns: u64) -> Option<&'static PodPolicy> {
    // SAFETY: the agent replaces values as a whole; a removed element is freed after a grace period.
    unsafe { POLICIES.get(netns) }
}

/// The entry of the longest prefix that covers an address.
#[inline(always)]
pub(crate) fn destination(policy: u32, addr: Addr) -> Option<&'static Destination> {
    DESTINATIONS.get(Key::new(160, DestinationKey { policy, addr }))
}

/// The lists that contain a port.
#[inline(always)]
pub(crate) fn port(key: PortKey) -> u32 {
    PORTS.get(Key::new(PortKey::BITS, key)).copied().unwrap_or(0)
}

/// Whether a gid is in the list of owner groups.
#[inline(always)]
pub(crate) fn group(key: MemberKey) -> bool {
    // SAFETY: as for `pod`.
    unsafe { GROUPS.get(key) }.is_some()
}

/// The lists that contain an interface.
#[inline(always)]
pub(crate) fn interface(key: MemberKey) -> u32 {
    // SAFETY: as for `pod`.
    unsafe { INTERFACES.get(key) }.copied().unwrap_or(0)
}

/// Adds a listening socket. `-EEXIST` if the slot is taken.
#[inline(always)]
pub(crate) fn add_listener(ops: *mut bpf_sock_ops, key: ListenerKey) -> Result<(), i32> {
    const BPF_NOEXIST: u64 = 1;
    // SAFETY: `ops` is the context of the running program.
    LISTENERS.update(key, unsafe { &mut *ops }, BPF_NOEXIST)
}

/// Assigns an arriving connection to a listener. `-ENOENT` if the slot is empty.
#[inline(always)]
pub(crate) fn assign_listener(ctx: &SkLookupContext, key: &ListenerKey) -> Result<(), i32> {
    LISTENERS.redirect_sk_lookup(ctx, key, 0)
}

/// Tail-calls the shared program. Returns only if it is missing.
#[inline(always)]
pub(crate) fn tail_call(ctx: &SkLookupContext) {
    // SAFETY: the agent stores only programs of this hook.
    unsafe { JUMP_TABLE.tail_call(ctx, 0) };
}

/// This CPU's lookup in progress.
#[inline(always)]
pub(crate) fn scratch() -> Option<*mut LookupScratch> {
    LOOKUP_SCRATCH.get_ptr_mut(0)
}

/// The original destination of a redirected connection.
#[inline(always)]
pub(crate) fn orig_dst(key: &ConnKey) -> Option<*mut OrigDst> {
    ORIG_DST.get_ptr_mut(key)
}

/// Stores an original destination. True if the key is new, false if it replaced an entry.
#[inline(always)]
pub(crate) fn add_orig_dst(key: &ConnKey, value: &OrigDst) -> Result<bool, i32> {
    const BPF_NOEXIST: u64 = 1;
    const EEXIST: i32 = 17;
    match ORIG_DST.insert(key, value, BPF_NOEXIST) {
        Ok(()) => Ok(true),
        Err(error) if error == -EEXIST => ORIG_DST.insert(key, value, 0).map(|()| false),
        Err(error) => Err(error),
    }
}

/// Deletes an original destination. False if the other end did.
#[inline(always)]
pub(crate) fn remove_orig_dst(key: &ConnKey) -> bool {
    ORIG_DST.remove(key).is_ok()
}

/// The cell of a handshake, by its initial sequence number.
#[inline(always)]
pub(crate) fn handshake(isn: u32) -> Option<*mut Handshake> {
    HANDSHAKES.get_ptr_mut(isn & (HANDSHAKE_COUNT - 1))
}

/// The entry of ORIG_DST to delete when a socket is closed.
#[inline(always)]
pub(crate) fn release_of(sk: *mut c_void) -> Option<ConnKey> {
    let storage = core::ptr::addr_of!(RELEASES).cast_mut().cast();
    // SAFETY: the map is socket storage of ConnKey, and the verifier knows the socket.
    unsafe { bpf_sk_storage_get(storage, sk, core::ptr::null_mut(), 0).cast::<ConnKey>().as_ref().copied() }
}

/// Has an entry of ORIG_DST deleted when the socket is closed. `None` if out of memory.
#[inline(always)]
pub(crate) fn release_with(sk: *mut bpf_sock, mut key: ConnKey) -> Option<()> {
    let storage = core::ptr::addr_of!(RELEASES).cast_mut().cast();
    let (create, value) = (BPF_SK_STORAGE_GET_F_CREATE.into(), core::ptr::from_mut(&mut key).cast());
    // SAFETY: as in `release_of`.
    let slot = unsafe { bpf_sk_storage_get(storage, sk.cast(), value, create).cast::<ConnKey>().as_mut() }?;
    *slot = key;
    Some(())
}

#[inline(always)]
fn sockets() -> *mut c_void {
    core::ptr::addr_of!(SOCKETS).cast_mut().cast()
}

#[inline(always)]
fn all_servers() -> *mut c_void {
    core::ptr::addr_of!(DNS_SERVERS).cast_mut().cast()
}

/// The DNS servers that a socket has asked besides its first.
#[inline(always)]
pub(crate) fn servers(sk: *mut bpf_sock) -> Option<&'static mut DnsServers> {
    // SAFETY: the map is socket storage of DnsServers, and the verifier knows the socket.
    unsafe {
        bpf_sk_storage_get(all_servers(), sk.cast(), core::ptr::null_mut(), 0).cast::<DnsServers>().as_mut()
    }
}

/// As `servers`, creating an empty entry. `None` if out of memory.
#[inline(always)]
pub(crate) fn servers_to_fill(sk: *mut bpf_sock) -> Option<&'static mut DnsServers> {
    // SAFETY: as above; the kernel zeroes a new value.
    unsafe {
        let create = BPF_SK_STORAGE_GET_F_CREATE.into();
        bpf_sk_storage_get(all_servers(), sk.cast(), core::ptr::null_mut(), create)
            .cast::<DnsServers>()
            .as_mut()
    }
}

/// The state of a socket.
#[inline(always)]
pub(crate) fn socket(sk: *mut bpf_sock) -> Option<&'static mut SocketState> {
    // SAFETY: the map is socket storage of SocketState, and the verifier knows the socket.
    unsafe {
        bpf_sk_storage_get(sockets(), sk.cast(), core::ptr::null_mut(), 0).cast::<SocketState>().as_mut()
    }
}

/// Sets the state of a socket. `None` if out of memory.
#[inline(always)]
pub(crate) fn set_socket(sk: *mut bpf_sock, mut state: SocketState) -> Option<*mut SocketState> {
    // SAFETY: as for `socket`.
    let slot = unsafe {
        bpf_sk_storage_get(
            sockets(),
            sk.cast(),
            core::ptr::from_mut(&mut state).cast(),
            BPF_SK_STORAGE_GET_F_CREATE.into(),
        )
        .cast::<SocketState>()
        .as_mut()
    }?;
    *slot = state;
    Some(slot)
}

/// Reads back what `set_socket` stored.
#[inline(always)]
pub(crate) fn reread(kept: *mut SocketState) -> SocketState {
    // SAFETY: the pointer is that of `set_socket`, and the system call holds the socket's lock. Volatile, so that the value
    // comes from the map.
    unsafe { kept.read_volatile() }
}

/// Deletes the state of a socket.
#[inline(always)]
pub(crate) fn forget_socket(sk: *mut bpf_sock) {
    // SAFETY: as for `socket`. No state is no error.
    unsafe { bpf_sk_storage_delete(sockets(), sk.cast()) };
}

/// Deletes the further servers of a socket.
#[inline(always)]
pub(crate) fn forget_servers(sk: *mut bpf_sock) {
    // SAFETY: as for `servers`.
    unsafe { bpf_sk_storage_delete(all_servers(), sk.cast()) };
}

/// The state of a pod's proxy.
#[inline(always)]
pub(crate) fn proxy(slot: u32) -> Option<*mut Proxy> {
    PROXY_STATE.get_ptr_mut(slot)
}

/// This CPU's counters of a pod.
#[inline(always)]
pub(crate) fn counters(slot: u32) -> Option<*mut ReasonCounters> {
    COUNTERS.get_ptr_mut(slot)
}

/// Whether `trace` runs.
#[inline(always)]
pub(crate) fn tracing() -> bool {
    TRACING.get(0).is_some_and(|&on| on != 0)
}

/// The events.
#[inline(always)]
pub(crate) fn events() -> &'static RingBuf {
    &EVENTS
}
