//! The maps, each behind the few accessors that the programs need. What they hold and how it is laid out is in
//! `intercept_common::{names, layout}`.

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

/// Entries are allocated one by one, so that this limit costs 16 bytes each until it is used.
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
// Shared with the agent's memory, so that it changes single fields while the programs change others.
#[map]
static PROXY_STATE: Array<Proxy> = Array::with_max_entries(MAX_PODS, BPF_F_MMAPABLE);
#[map]
static COUNTERS: PerCpuArray<ReasonCounters> = PerCpuArray::with_max_entries(MAX_PODS, 0);
#[map]
static EVENTS: RingBuf = RingBuf::with_byte_size(1 << 20, 0);
#[map]
static TRACING: Array<u32> = Array::with_max_entries(1, 0);

/// The cookie of the namespace of the socket under a hook.
#[inline(always)]
pub(crate) fn netns_cookie(ctx: &impl EbpfContext) -> u64 {
    // SAFETY: the context is that of the running program.
    unsafe { bpf_get_netns_cookie(ctx.as_ptr()) }
}

/// The policy of a namespace; none where it is not captured.
#[inline(always)]
pub(crate) fn pod(netns: u64) -> Option<&'static PodPolicy> {
    // SAFETY: values are only replaced whole, by the agent; an element taken out is freed after a grace period.
    unsafe { POLICIES.get(netns) }
}

/// The longest prefix that covers an address.
#[inline(always)]
pub(crate) fn destination(policy: u32, addr: Addr) -> Option<&'static Destination> {
    DESTINATIONS.get(Key::new(160, DestinationKey { policy, addr }))
}

/// The lists that name a port.
#[inline(always)]
pub(crate) fn port(key: PortKey) -> u32 {
    PORTS.get(Key::new(PortKey::BITS, key)).copied().unwrap_or(0)
}

/// Whether a gid is listed.
#[inline(always)]
pub(crate) fn group(key: MemberKey) -> bool {
    // SAFETY: as for `pod`.
    unsafe { GROUPS.get(key) }.is_some()
}

/// The lists that name an interface.
#[inline(always)]
pub(crate) fn interface(key: MemberKey) -> u32 {
    // SAFETY: as for `pod`.
    unsafe { INTERFACES.get(key) }.copied().unwrap_or(0)
}

/// Hold a socket that listens. `BPF_NOEXIST` finds the slot taken as `-EEXIST`.
#[inline(always)]
pub(crate) fn add_listener(ops: *mut bpf_sock_ops, key: ListenerKey) -> Result<(), i32> {
    const BPF_NOEXIST: u64 = 1;
    // SAFETY: `ops` is the context of the running program.
    LISTENERS.update(key, unsafe { &mut *ops }, BPF_NOEXIST)
}

/// Hand an arriving connection to a held listener. `-ENOENT` where the slot is empty.
#[inline(always)]
pub(crate) fn assign_listener(ctx: &SkLookupContext, key: &ListenerKey) -> Result<(), i32> {
    LISTENERS.redirect_sk_lookup(ctx, key, 0)
}

/// Go on with the program that all pods share. Comes back only if it is not there.
#[inline(always)]
pub(crate) fn tail_call(ctx: &SkLookupContext) {
    // SAFETY: the agent puts a program of this hook there, or none.
    unsafe { JUMP_TABLE.tail_call(ctx, 0) };
}

/// This CPU's note of the look-up that is under way.
#[inline(always)]
pub(crate) fn scratch() -> Option<*mut LookupScratch> {
    LOOKUP_SCRATCH.get_ptr_mut(0)
}

/// The original destination of a redirected connection.
#[inline(always)]
pub(crate) fn orig_dst(key: &ConnKey) -> Option<*mut OrigDst> {
    ORIG_DST.get_ptr_mut(key)
}

/// Remember one. True if there was none under this key, false if it was replaced.
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

/// Forget one. False if the other end was first.
#[inline(always)]
pub(crate) fn remove_orig_dst(key: &ConnKey) -> bool {
    ORIG_DST.remove(key).is_ok()
}

/// Where the client of a connection that is being set up is noted, by its initial sequence number.
#[inline(always)]
pub(crate) fn handshake(isn: u32) -> Option<*mut Handshake> {
    HANDSHAKES.get_ptr_mut(isn & (HANDSHAKE_COUNT - 1))
}

/// The entry to release when a socket is closed.
#[inline(always)]
pub(crate) fn release_of(sk: *mut c_void) -> Option<ConnKey> {
    let storage = core::ptr::addr_of!(RELEASES).cast_mut().cast();
    // SAFETY: the map is a socket storage of ConnKey, the socket one that the verifier knows.
    unsafe { bpf_sk_storage_get(storage, sk, core::ptr::null_mut(), 0).cast::<ConnKey>().as_ref().copied() }
}

/// Have an entry released when the socket is closed. None if there is no memory.
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

/// The further servers that a socket has asked.
#[inline(always)]
pub(crate) fn servers(sk: *mut bpf_sock) -> Option<&'static mut DnsServers> {
    // SAFETY: the map is a socket storage of DnsServers, the socket one that the verifier knows.
    unsafe {
        bpf_sk_storage_get(all_servers(), sk.cast(), core::ptr::null_mut(), 0).cast::<DnsServers>().as_mut()
    }
}

/// The same; none yet if there was no such entry. None if there is no memory.
#[inline(always)]
pub(crate) fn servers_to_fill(sk: *mut bpf_sock) -> Option<&'static mut DnsServers> {
    // SAFETY: as above; the kernel fills a new value with zeroes.
    unsafe {
        let create = BPF_SK_STORAGE_GET_F_CREATE.into();
        bpf_sk_storage_get(all_servers(), sk.cast(), core::ptr::null_mut(), create)
            .cast::<DnsServers>()
            .as_mut()
    }
}

/// What is remembered of a socket.
#[inline(always)]
pub(crate) fn socket(sk: *mut bpf_sock) -> Option<&'static mut SocketState> {
    // SAFETY: the map is a socket storage of SocketState, the socket one that the verifier knows.
    unsafe {
        bpf_sk_storage_get(sockets(), sk.cast(), core::ptr::null_mut(), 0).cast::<SocketState>().as_mut()
    }
}

/// Remember something of a socket, in place of what was. None if there is no memory.
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

/// What was just kept, read from where it is.
#[inline(always)]
pub(crate) fn reread(kept: *mut SocketState) -> SocketState {
    // SAFETY: of `set_socket`, whose socket is locked by the system call. Volatile, so that it is read.
    unsafe { kept.read_volatile() }
}

/// Forget a socket.
#[inline(always)]
pub(crate) fn forget_socket(sk: *mut bpf_sock) {
    // SAFETY: as for `socket`. That there is nothing to forget is no error.
    unsafe { bpf_sk_storage_delete(sockets(), sk.cast()) };
}

/// Forget the further servers of a socket.
#[inline(always)]
pub(crate) fn forget_servers(sk: *mut bpf_sock) {
    // SAFETY: as for `servers`.
    unsafe { bpf_sk_storage_delete(all_servers(), sk.cast()) };
}

/// What is known of a pod's proxy.
#[inline(always)]
pub(crate) fn proxy(slot: u32) -> Option<*mut Proxy> {
    PROXY_STATE.get_ptr_mut(slot)
}

/// This CPU's counters of a pod.
#[inline(always)]
pub(crate) fn counters(slot: u32) -> Option<*mut ReasonCounters> {
    COUNTERS.get_ptr_mut(slot)
}

/// Whether anybody reads events.
#[inline(always)]
pub(crate) fn tracing() -> bool {
    TRACING.get(0).is_some_and(|&on| on != 0)
}

/// The events.
#[inline(always)]
pub(crate) fn events() -> &'static RingBuf {
    &EVENTS
}
