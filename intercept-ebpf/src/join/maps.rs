//! The maps of this object, each behind the accessors that the programs need.

use core::ffi::c_void;

use aya_ebpf::{
    EbpfContext,
    bindings::{
        BPF_F_CLONE, BPF_F_NO_PREALLOC, BPF_NOEXIST, BPF_SK_STORAGE_GET_F_CREATE, bpf_map_type, bpf_sock,
    },
    helpers::{
        bpf_get_netns_cookie,
        generated::{bpf_get_socket_cookie, bpf_sk_storage_delete, bpf_sk_storage_get},
    },
    macros::{btf_map, map},
    maps::{Array, HashMap, PerCpuArray, SockHash},
    programs::{SkMsgContext, SockOpsContext},
};
use intercept_common::{
    acceleration::{
        HINTS, JoinCount, JoinCounters, JoinOffer, JoinSocket, PodCell, ProxyName, SequenceKey, TcpReason,
    },
    layout::{MAX_PODS, PodPolicy},
};

/// Connections of proxies within the node at one time, and offers that wait.
const MANY: u32 = 1 << 16;
/// Executables that are vouched for, of all pods.
const FEW: u32 = 1 << 13;

#[map]
static POLICIES: HashMap<u64, PodPolicy> = HashMap::with_max_entries(MAX_PODS, BPF_F_NO_PREALLOC);
#[btf_map]
static JOIN_SOCKETS: InheritedStorage<JoinSocket> = InheritedStorage::new();
#[map]
static JOIN_ENDS: SockHash<u64> = SockHash::with_max_entries(MANY, 0);
#[map]
static JOIN_OFFERS: HashMap<SequenceKey, JoinOffer> = HashMap::with_max_entries(MANY, BPF_F_NO_PREALLOC);
#[map]
static JOIN_HINTS: Array<u64> = Array::with_max_entries(HINTS, 0);
#[map]
static JOIN_PODS: Array<u64> = Array::with_max_entries(MAX_PODS, 0);
#[map]
static JOIN_PROXIES: HashMap<ProxyName, u32> = HashMap::with_max_entries(FEW, BPF_F_NO_PREALLOC);
#[map]
static JOIN_OFF: Array<u32> = Array::with_max_entries(1, 0);
#[map]
static JOIN_COUNTERS: PerCpuArray<JoinCounters> = PerCpuArray::with_max_entries(MAX_PODS, 0);

/// Storage of sockets that what a listener accepts starts with a copy of (`BPF_F_CLONE`), which aya's has not.
#[repr(C)]
struct InheritedStorage<T> {
    r#type: *const [i32; bpf_map_type::BPF_MAP_TYPE_SK_STORAGE as usize],
    key: *const i32,
    value: *const T,
    max_entries: *const [i32; 0],
    map_flags: *const [i32; (BPF_F_NO_PREALLOC | BPF_F_CLONE) as usize],
}

// SAFETY: the pointers are a description for the loader, and never followed.
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

/// The pod of a namespace, if it is captured.
#[inline(always)]
pub(crate) fn policy(netns: u64) -> Option<&'static PodPolicy> {
    // SAFETY: values are only replaced whole, by the agent; an element taken out is freed after a grace period.
    unsafe { POLICIES.get(netns) }
}

/// The cookie of the namespace of the socket under a hook.
#[inline(always)]
pub(crate) fn netns_cookie(ctx: &impl EbpfContext) -> u64 {
    // SAFETY: the context is that of the running program.
    unsafe { bpf_get_netns_cookie(ctx.as_ptr()) }
}

/// The cookie of the socket of a callback.
#[inline(always)]
pub(crate) fn socket_cookie(ctx: &SockOpsContext) -> u64 {
    // SAFETY: as above.
    unsafe { bpf_get_socket_cookie(ctx.as_ptr()) }
}

/// What is known of a socket.
#[inline(always)]
pub(crate) fn socket(sk: *mut bpf_sock) -> Option<&'static mut JoinSocket> {
    // SAFETY: the map is a socket storage of JoinSocket, the socket one that the verifier knows. Callbacks and messages of
    // one socket run under its lock.
    unsafe {
        bpf_sk_storage_get(sockets(), sk.cast(), core::ptr::null_mut(), 0).cast::<JoinSocket>().as_mut()
    }
}

/// Start to know something; `None` if there is no memory.
#[inline(always)]
pub(crate) fn new_socket(sk: *mut bpf_sock, value: &mut JoinSocket) -> Option<&'static mut JoinSocket> {
    let value = core::ptr::from_mut(value).cast();
    // SAFETY: as in `socket`; the value is copied.
    unsafe {
        bpf_sk_storage_get(sockets(), sk.cast(), value, BPF_SK_STORAGE_GET_F_CREATE.into())
            .cast::<JoinSocket>()
            .as_mut()
    }
}

/// Know nothing of a socket any more.
#[inline(always)]
pub(crate) fn forget_socket(sk: *mut bpf_sock) {
    // SAFETY: as in `socket`.
    let _not_known_anyway = unsafe { bpf_sk_storage_delete(sockets(), sk.cast()) };
}

/// Let messages of this socket be decided on, and let it be the aim of others'.
#[inline(always)]
pub(crate) fn add_end(ctx: &SockOpsContext, cookie: u64) -> bool {
    // SAFETY: `ops` is the context of the running program.
    JOIN_ENDS.update(cookie, unsafe { &mut *ctx.ops }, BPF_NOEXIST.into()).is_ok()
}

/// Put the message on the queue of the end with this cookie. False if it is not there.
#[inline(always)]
pub(crate) fn redirect(ctx: &SkMsgContext, cookie: u64) -> bool {
    /// `BPF_F_INGRESS`: to the receive queue.
    const INGRESS: u64 = 1;
    /// `SK_PASS`, as the helper gives it.
    const PASS: i64 = 1;
    JOIN_ENDS.redirect_msg(ctx, cookie, INGRESS) == PASS
}

/// Wait for the other end. False if there is no room, or another connection has these numbers.
#[inline(always)]
pub(crate) fn add_offer(key: &SequenceKey, offer: &JoinOffer) -> bool {
    JOIN_OFFERS.insert(key, offer, BPF_NOEXIST.into()).is_ok()
}

/// Who waits, and maybe who came.
#[inline(always)]
pub(crate) fn offer(key: &SequenceKey) -> Option<JoinOffer> {
    // SAFETY: entries are replaced whole, by the accepting end alone.
    unsafe { JOIN_OFFERS.get(key) }.copied()
}

/// The other end is there. False if nobody waits any more.
#[inline(always)]
pub(crate) fn answer_offer(key: &SequenceKey, offer: &JoinOffer) -> bool {
    const BPF_EXIST: u64 = 2;
    JOIN_OFFERS.insert(key, offer, BPF_EXIST).is_ok()
}

/// Wait no longer.
#[inline(always)]
pub(crate) fn remove_offer(key: &SequenceKey) {
    let _taken_already = JOIN_OFFERS.remove(key);
}

/// The cell in which connections that come from this hash are noted.
#[inline(always)]
pub(crate) fn hint(hash: u64) -> Option<*mut u64> {
    JOIN_HINTS.get_ptr_mut(hash as u32 % HINTS)
}

/// Whether this pod is accelerated at this moment.
#[inline(always)]
pub(crate) fn is_on(pod: &PodCell) -> bool {
    JOIN_PODS.get(pod.slot).is_some_and(|netns| *netns == pod.netns)
}

/// Whether nothing is to be joined on this node.
#[inline(always)]
pub(crate) fn node_is_off() -> bool {
    JOIN_OFF.get(0).is_none_or(|off| *off != 0)
}

/// Whether this executable is one of the pod's known proxies.
#[inline(always)]
pub(crate) fn is_known(name: &ProxyName) -> bool {
    // SAFETY: only whether it is there counts.
    unsafe { JOIN_PROXIES.get(name) }.is_some()
}

/// JoinCount something of a pod.
#[inline(always)]
pub(crate) fn count(pod: &PodCell, what: JoinCount) {
    add(pod, what as usize);
}

/// JoinCount a connection that goes by TCP from now on.
#[inline(always)]
pub(crate) fn count_pass(pod: &PodCell, why: TcpReason) {
    add(pod, JoinCount::ALL.len() + why as usize);
}

#[inline(always)]
fn add(pod: &PodCell, index: usize) {
    if let Some(counters) = JOIN_COUNTERS.get_ptr_mut(pod.slot) {
        // SAFETY: this CPU's own value. A program that interrupts this one may lose a count, never more.
        unsafe {
            if let Some(cell) = (*counters).counts.get_mut(index) {
                *cell += 1;
            }
        }
    }
}
