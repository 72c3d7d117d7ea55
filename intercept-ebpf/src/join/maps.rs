//! The maps of this object, behind the accessors that the programs need.

use core::ffi::c_void;

use aya_ebpf::{
    EbpfContext,
    bindings::{
        BPF_F_CLONE, BPF_F_NO_PREALLOC, BPF_NOEXIST, BPF_SK_STORAGE_GET_F_CREATE, bpf_map_type, bpf_sock,
    },
    helpers::{
        bpf_get_netns_cookie,
        generated::{bpf_get_socket_cookie, bpf_ktime_get_ns, bpf_sk_storage_delete, bpf_sk_storage_get},
    },
    macros::{btf_map, map},
    maps::{Array, HashMap, PerCpuArray, RingBuf, SockHash},
    programs::{SkMsgContext, SockOpsContext},
};
use intercept_common::{
    NetnsCookie,
    acceleration::{
        HINTS, JoinCounters, JoinOffer, JoinSocket, PodCell, ProxyName, SHORT_CELLS, SequenceKey,
    },
    layout::{EVENTS_SIZE, Event, MAX_PODS, PodPolicy},
};

/// Most concurrent connections between proxies on the node, and most pending offers.
const MANY: u32 = 1 << 16;
/// Most accepted executables of all pods together.
const FEW: u32 = 1 << 13;

#[map]
static POLICIES: HashMap<NetnsCookie, PodPolicy> = HashMap::with_max_entries(MAX_PODS, BPF_F_NO_PREALLOC);
#[btf_map]
static JOIN_SOCKETS: InheritedStorage<JoinSocket> = InheritedStorage::new();
#[map]
static JOIN_ENDS: SockHash<u64> = SockHash::with_max_entries(MANY, 0);
#[map]
static JOIN_OFFERS: HashMap<SequenceKey, JoinOffer> = HashMap::with_max_entries(MANY, BPF_F_NO_PREALLOC);
#[map]
static JOIN_HINTS: Array<u64> = Array::with_max_entries(HINTS, 0);
#[map]
static JOIN_SHORT: Array<u64> = Array::with_max_entries(SHORT_CELLS, 0);
#[map]
static JOIN_PODS: Array<NetnsCookie> = Array::with_max_entries(MAX_PODS, 0);
#[map]
static JOIN_PROXIES: HashMap<ProxyName, u32> = HashMap::with_max_entries(FEW, BPF_F_NO_PREALLOC);
#[map]
static JOIN_OFF: Array<u32> = Array::with_max_entries(1, 0);
#[map]
static EVENTS: RingBuf = RingBuf::with_byte_size(EVENTS_SIZE, 0);
#[map]
static TRACING: Array<u32> = Array::with_max_entries(1, 0);
#[map]
static JOIN_COUNTERS: PerCpuArray<JoinCounters> = PerCpuArray::with_max_entries(MAX_PODS, 0);

/// Socket storage that an accepted socket inherits from its listener (`BPF_F_CLONE`, which aya's type does not set).
#[repr(C)]
struct InheritedStorage<T> {
    r#type: *const [i32; bpf_map_type::BPF_MAP_TYPE_SK_STORAGE as usize],
    key: *const i32,
    value: *const T,
    max_entries: *const [i32; 0],
    map_flags: *const [i32; (BPF_F_NO_PREALLOC | BPF_F_CLONE) as usize],
}

// SAFETY: the pointers describe types to the loader and are never dereferenced.
unsafe impl<T> Sync for InheritedStorage<T> {}

impl<T> InheritedStorage<T> {
    const fn new() -> Self {
        use core::ptr::null;
        Self { r#type: null(), key: null(), value: null(), max_entries: null(), map_flags: null() }
    }
}

#[inline(always)]
fn sockets() -> *mut c_void {
    core::ptr::addr_of!(JOIN_SOCKETS).cast_mut().cast()
}

/// The policy of a namespace, if it is captured.
#[inline(always)]
pub(crate) fn policy(netns: NetnsCookie) -> Option<&'static PodPolicy> {
    // SAFETY: the agent replaces values as a whole; a removed element is freed after a grace period.
    unsafe { POLICIES.get(netns) }
}

/// The cookie of the socket's network namespace.
#[inline(always)]
pub(crate) fn netns_cookie(ctx: &impl EbpfContext) -> NetnsCookie {
    // SAFETY: the context is that of the running program.
    NetnsCookie(unsafe { bpf_get_netns_cookie(ctx.as_ptr()) })
}

/// The cookie of the socket of a callback.
#[inline(always)]
pub(crate) fn socket_cookie(ctx: &SockOpsContext) -> u64 {
    // SAFETY: as above.
    unsafe { bpf_get_socket_cookie(ctx.as_ptr()) }
}

/// The storage of a socket.
#[inline(always)]
pub(crate) fn socket(sk: *mut bpf_sock) -> Option<&'static mut JoinSocket> {
    // SAFETY: the map is socket storage of JoinSocket, and the verifier knows the socket. Callbacks and messages of one socket
    // run under its lock, so there is one reference at a time.
    unsafe {
        bpf_sk_storage_get(sockets(), sk.cast(), core::ptr::null_mut(), 0).cast::<JoinSocket>().as_mut()
    }
}

/// As `socket`, creating the storage with `value`. `None` if out of memory.
#[inline(always)]
pub(crate) fn new_socket(sk: *mut bpf_sock, value: &mut JoinSocket) -> Option<&'static mut JoinSocket> {
    let value = core::ptr::from_mut(value).cast();
    // SAFETY: as in `socket`; the helper copies the value.
    unsafe {
        bpf_sk_storage_get(sockets(), sk.cast(), value, BPF_SK_STORAGE_GET_F_CREATE.into())
            .cast::<JoinSocket>()
            .as_mut()
    }
}

/// Deletes the storage of a socket.
#[inline(always)]
pub(crate) fn forget_socket(sk: *mut bpf_sock) {
    // SAFETY: as in `socket`.
    let _there_was_none = unsafe { bpf_sk_storage_delete(sockets(), sk.cast()) };
}

/// Adds a socket to the map: `sk_msg` runs for its messages, and other ends may redirect to it.
#[inline(always)]
pub(crate) fn add_end(ctx: &SockOpsContext, cookie: u64) -> bool {
    // SAFETY: `ops` is the context of the running program.
    JOIN_ENDS.update(cookie, unsafe { &mut *ctx.ops }, BPF_NOEXIST.into()).is_ok()
}

/// Redirects the message to the receive queue of the end with this cookie. False if there is no such end.
#[inline(always)]
pub(crate) fn redirect(ctx: &SkMsgContext, cookie: u64) -> bool {
    /// `BPF_F_INGRESS`: to the receive queue.
    const INGRESS: u64 = 1;
    /// `SK_PASS`, as the helper returns it.
    const PASS: i64 = 1;
    JOIN_ENDS.redirect_msg(ctx, cookie, INGRESS) == PASS
}

/// Publishes an offer. False if the map is full or another connection has the same sequence numbers.
#[inline(always)]
pub(crate) fn add_offer(key: &SequenceKey, offer: &JoinOffer) -> bool {
    JOIN_OFFERS.insert(key, offer, BPF_NOEXIST.into()).is_ok()
}

/// The offer with these sequence numbers.
#[inline(always)]
pub(crate) fn offer(key: &SequenceKey) -> Option<JoinOffer> {
    // SAFETY: only the accepting end replaces entries, as a whole.
    unsafe { JOIN_OFFERS.get(key) }.copied()
}

/// Answers an offer. False if it was withdrawn.
#[inline(always)]
pub(crate) fn answer_offer(key: &SequenceKey, offer: &JoinOffer) -> bool {
    const BPF_EXIST: u64 = 2;
    JOIN_OFFERS.insert(key, offer, BPF_EXIST).is_ok()
}

/// Withdraws an offer.
#[inline(always)]
pub(crate) fn remove_offer(key: &SequenceKey) {
    let _withdrawn_before = JOIN_OFFERS.remove(key);
}

/// The cell for connections from sources with this hash.
#[inline(always)]
pub(crate) fn hint(hash: u64) -> Option<*mut u64> {
    JOIN_HINTS.get_ptr_mut(hash as u32 % HINTS)
}

/// The cell for connections to destinations with this hash.
#[inline(always)]
pub(crate) fn short(hash: u64) -> Option<*mut u64> {
    JOIN_SHORT.get_ptr_mut(hash as u32 % SHORT_CELLS)
}

/// Whether the pod is accelerated now.
#[inline(always)]
pub(crate) fn is_on(pod: &PodCell) -> bool {
    JOIN_PODS.get(pod.slot.0).is_some_and(|netns| *netns == pod.netns)
}

/// Whether joining is switched off on this node.
#[inline(always)]
pub(crate) fn node_is_off() -> bool {
    JOIN_OFF.get(0).is_none_or(|off| *off != 0)
}

/// Whether the executable is accepted as the pod's proxy.
#[inline(always)]
pub(crate) fn is_known(name: &ProxyName) -> bool {
    // SAFETY: the value is not read.
    unsafe { JOIN_PROXIES.get(name) }.is_some()
}

/// Whether `trace` runs.
#[inline(always)]
pub(crate) fn tracing() -> bool {
    TRACING.get(0).is_some_and(|&on| on != 0)
}

/// Nanoseconds of `CLOCK_MONOTONIC`.
#[inline(always)]
pub(crate) fn now() -> u64 {
    // SAFETY: takes no argument.
    unsafe { bpf_ktime_get_ns() }
}

/// Passes an event to `trace`. A slow reader loses events; connections do not wait for it.
#[inline(always)]
pub(crate) fn emit(event: &Event) {
    let _full = EVENTS.output::<Event>(event, 0);
}

/// Adds one to a counter of a pod.
#[inline(always)]
pub(crate) fn count(pod: &PodCell, index: usize) {
    if let Some(counters) = JOIN_COUNTERS.get_ptr_mut(pod.slot.0) {
        // SAFETY: this CPU's own value. A program that interrupts this one can lose a count, nothing more.
        unsafe {
            if let Some(cell) = (*counters).counts.get_mut(index) {
                *cell += 1;
            }
        }
    }
}
