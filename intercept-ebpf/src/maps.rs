//! The maps, behind the accessors that the programs need. `intercept_common::{names, layout}` documents their contents.

use aya_ebpf::{
    EbpfContext,
    bindings::{BPF_F_MMAPABLE, BPF_F_NO_PREALLOC, bpf_sock_ops},
    helpers::generated::{bpf_get_socket_cookie, bpf_map_lookup_elem, bpf_sk_release},
    macros::map,
    maps::{Array, HashMap, LpmTrie, PerCpuArray, ProgramArray, RingBuf, SockHash, lpm_trie::Key},
    programs::SkLookupContext,
};
use intercept_common::{
    Addr, Family, NetnsCookie, PolicyId, Slot,
    layout::{
        ConnKey, Destination, DestinationKey, EVENTS_SIZE, HANDSHAKES as HANDSHAKE_COUNT, Handshake,
        ListenerKey, LookupScratch, MAX_PODS, MemberKey, OrigDst, PodPolicy, PortKey, Proxy, ReasonCounters,
        budget,
    },
};

use crate::{context, workload};

/// Entries are allocated on demand; until then the limit costs 16 bytes for each.
const MANY: u32 = 1 << 20;

#[map]
static POLICIES: HashMap<NetnsCookie, PodPolicy> = HashMap::with_max_entries(MAX_PODS, BPF_F_NO_PREALLOC);
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
static LISTENERS: SockHash<ListenerKey> = SockHash::with_max_entries(1 << 17, 0);
#[map]
static ORIG_DST: HashMap<ConnKey, OrigDst> = HashMap::with_max_entries(MANY, BPF_F_NO_PREALLOC);
#[map]
static JUMP_TABLE: ProgramArray = ProgramArray::with_max_entries(1, 0);
#[map]
static LOOKUP_SCRATCH: PerCpuArray<LookupScratch> = PerCpuArray::with_max_entries(1, 0);
#[map]
static HANDSHAKES: Array<Handshake> = Array::with_max_entries(HANDSHAKE_COUNT, 0);
// Mapped into the agent's memory, so that it can change single fields while the programs change others.
#[map]
static PROXY_STATE: Array<Proxy> = Array::with_max_entries(MAX_PODS, BPF_F_MMAPABLE);
#[map]
static COUNTERS: PerCpuArray<ReasonCounters> = PerCpuArray::with_max_entries(MAX_PODS, 0);
#[map]
static EVENTS: RingBuf = RingBuf::with_byte_size(EVENTS_SIZE, 0);
#[map]
static TRACING: Array<u32> = Array::with_max_entries(1, 0);

/// The cookie of the socket's network namespace, or the id of a machine's workload.
#[inline(always)]
pub(crate) fn netns_cookie(ctx: &impl EbpfContext) -> NetnsCookie {
    workload::policy_key(ctx)
}

/// The cookie of the context's socket.
#[inline(always)]
pub(crate) fn socket_cookie(ctx: &impl EbpfContext) -> u64 {
    // SAFETY: the context is that of the running program.
    unsafe { bpf_get_socket_cookie(ctx.as_ptr()) }
}

/// The policy of a namespace, expired or not. `None` if it is not captured.
#[inline(always)]
pub(crate) fn policy(netns: NetnsCookie) -> Option<&'static PodPolicy> {
    // SAFETY: the agent replaces values as a whole; a removed element is freed after a grace period.
    unsafe { POLICIES.get(netns) }
}

/// The policy of a namespace. `None` if it is not captured.
#[inline(always)]
pub(crate) fn pod(netns: NetnsCookie) -> Option<&'static PodPolicy> {
    let policy = policy(netns);
    if workload::is_set() && policy.is_some_and(workload::is_expired) { None } else { policy }
}

/// The entry of the longest prefix that covers an address.
#[inline(always)]
pub(crate) fn destination(policy: PolicyId, addr: Addr) -> Option<&'static Destination> {
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

/// Whether there is a listening socket with this key that is bound to this address, if it is an IPv6 socket: keys have a
/// hash of such an address.
#[inline(always)]
pub(crate) fn has_listener(key: &ListenerKey, bound: Addr) -> bool {
    // SAFETY: the map is what the helper expects, and the socket that it returns is released once.
    unsafe {
        let socket = bpf_map_lookup_elem((&raw const LISTENERS).cast_mut().cast(), (&raw const *key).cast());
        if socket.is_null() {
            return false;
        }
        let is_it = matches!(key.family(), Family::V4) || context::is_bound_v6(socket.cast(), bound);
        let _always_zero = bpf_sk_release(socket);
        is_it
    }
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

/// The state of a pod's proxy.
#[inline(always)]
pub(crate) fn proxy(slot: Slot) -> Option<*mut Proxy> {
    PROXY_STATE.get_ptr_mut(slot.0)
}

/// This CPU's counters of a pod.
#[inline(always)]
pub(crate) fn counters(slot: Slot) -> Option<*mut ReasonCounters> {
    COUNTERS.get_ptr_mut(slot.0)
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
