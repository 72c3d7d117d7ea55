//! The maps of shadow mode, behind accessors.

use core::ffi::c_void;

use aya_ebpf::{
    bindings::{BPF_F_MMAPABLE, BPF_F_NO_PREALLOC, BPF_SK_STORAGE_GET_F_CREATE},
    btf_maps::SkStorage,
    helpers::generated::bpf_sk_storage_get,
    macros::{btf_map, map},
    maps::{Array, HashMap, LruHashMap},
};
use intercept_common::{
    NetnsCookie,
    layout::{
        ComparedFlow, DifferenceKey, MAX_PODS, RememberedFlow, SHADOW_CONNS as CONNS, SHADOW_DIALS as DIALS,
        SHADOW_FLOWS as FLOWS, SHADOW_KINDS as KINDS, ShadowCounters, ShadowKey, ShadowSet, ShadowSocket,
    },
};

use crate::context::Sock;

// The arrays are mapped into the agent's memory, so that it can clear them.
#[map]
static SHADOW_CONNS: Array<ShadowSet> = Array::with_max_entries(CONNS, BPF_F_MMAPABLE);
#[map]
static SHADOW_DIALS: Array<ShadowSocket> = Array::with_max_entries(DIALS, BPF_F_MMAPABLE);
#[map]
static SHADOW_FLOWS: LruHashMap<ShadowKey, RememberedFlow> = LruHashMap::with_max_entries(FLOWS, 0);
#[btf_map]
static SHADOW_SOCKETS: SkStorage<ShadowSocket> = SkStorage::new();
#[map]
static SHADOW_COUNTERS: HashMap<NetnsCookie, ShadowCounters> =
    HashMap::with_max_entries(MAX_PODS, BPF_F_NO_PREALLOC);
#[map]
static SHADOW_KINDS: HashMap<DifferenceKey, ComparedFlow> =
    HashMap::with_max_entries(KINDS, BPF_F_NO_PREALLOC);
#[map]
static SHADOWING: Array<u32> = Array::with_max_entries(1, 0);

/// Whether a pod of this node is in shadow mode.
#[inline(always)]
pub(super) fn is_on() -> bool {
    SHADOWING.get(0).is_some_and(|&on| on != 0)
}

/// The connections that may have this id.
#[inline(always)]
pub(super) fn set(index: u32) -> Option<*mut ShadowSet> {
    SHADOW_CONNS.get_ptr_mut(index)
}

/// What is remembered of a query or an arrival. `None` if it made room for others.
#[inline(always)]
pub(super) fn get(key: &ShadowKey) -> Option<RememberedFlow> {
    // SAFETY: an element that is reused meanwhile gives a wrong comparison, nothing more.
    unsafe { SHADOW_FLOWS.get(key) }.copied()
}

/// Remembers a query or an arrival. What cannot be remembered is not compared.
#[inline(always)]
pub(super) fn insert(key: &ShadowKey, flow: &RememberedFlow) {
    let _uncompared = SHADOW_FLOWS.insert(key, flow, 0);
}

/// The counters of a pod.
#[inline(always)]
pub(super) fn counters(netns: NetnsCookie) -> Option<*mut ShadowCounters> {
    SHADOW_COUNTERS.get_ptr_mut(netns)
}

/// The example of a difference.
#[inline(always)]
pub(super) fn example(key: &DifferenceKey) -> Option<*mut ComparedFlow> {
    SHADOW_KINDS.get_ptr_mut(key)
}

/// Keeps the example of a difference.
#[inline(always)]
pub(super) fn set_example(key: &DifferenceKey, flow: &ComparedFlow) {
    let _counted_only = SHADOW_KINDS.insert(key, flow, 0);
}

fn storage() -> *mut c_void {
    core::ptr::addr_of!(SHADOW_SOCKETS).cast_mut().cast()
}

#[inline(always)]
fn dial(cookie: u64) -> Option<*mut ShadowSocket> {
    SHADOW_DIALS.get_ptr_mut(ShadowSocket::dial_of(cookie))
}

/// Keeps a decision until the SYN leaves.
#[inline(always)]
pub(super) fn set_dial(socket: ShadowSocket) {
    if let Some(cell) = dial(socket.cookie) {
        // SAFETY: an element of an array map. Two that are written at once may mix; neither is then compared, or wrongly.
        unsafe { cell.write(socket) };
    }
}

/// The decision on the socket whose SYN leaves.
#[inline(always)]
pub(super) fn dialled(cookie: u64) -> Option<ShadowSocket> {
    // SAFETY: as in `set_dial`.
    dial(cookie).map(|cell| unsafe { cell.read() }).filter(|socket| socket.cookie == cookie)
}

/// A copy of the decision on a socket.
#[inline(always)]
pub(super) fn socket(sk: Sock) -> Option<ShadowSocket> {
    // SAFETY: the map is socket storage of ShadowSocket, and the verifier knows the socket.
    let stored = unsafe { bpf_sk_storage_get(storage(), sk.as_ptr().cast(), core::ptr::null_mut(), 0) };
    // SAFETY: the storage lives as long as the socket.
    unsafe { stored.cast::<ShadowSocket>().as_ref() }.copied()
}

/// Remembers the decision on a socket. False if out of memory.
#[inline(always)]
pub(super) fn set_socket(sk: Sock, mut socket: ShadowSocket) -> bool {
    let create = BPF_SK_STORAGE_GET_F_CREATE.into();
    // SAFETY: as in `socket`; the helper copies the value of a new entry.
    unsafe {
        let stored = bpf_sk_storage_get(storage(), sk.as_ptr().cast(), (&raw mut socket).cast(), create);
        let stored = stored.cast::<ShadowSocket>();
        if stored.is_null() {
            return false;
        }
        stored.write(socket);
    }
    true
}
