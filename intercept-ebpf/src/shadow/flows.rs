//! The maps of shadow mode, behind accessors.

use core::ffi::c_void;

use aya_ebpf::{
    bindings::{BPF_F_NO_PREALLOC, BPF_SK_STORAGE_GET_F_CREATE},
    btf_maps::SkStorage,
    helpers::generated::{bpf_sk_storage_delete, bpf_sk_storage_get},
    macros::{btf_map, map},
    maps::{Array, HashMap, LruHashMap},
};
use intercept_common::{
    NetnsCookie,
    layout::{
        ComparedFlow, DifferenceKey, MAX_PODS, RememberedFlow, SHADOW_FLOWS as FLOWS, SHADOW_KINDS as KINDS,
        ShadowCounters, ShadowKey, ShadowSocket,
    },
};

use crate::context::Sock;

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

/// A copy of what is remembered. `None` if it made room for others.
#[inline(always)]
pub(super) fn get(key: &ShadowKey) -> Option<RememberedFlow> {
    // SAFETY: an element that is reused meanwhile gives a wrong comparison, nothing more.
    unsafe { SHADOW_FLOWS.get(key) }.copied()
}

/// Remembers a flow. What cannot be remembered is not compared.
#[inline(always)]
pub(super) fn insert(key: &ShadowKey, flow: &RememberedFlow) {
    let _uncompared = SHADOW_FLOWS.insert(key, flow, 0);
}

/// Forgets a flow.
#[inline(always)]
pub(super) fn remove(key: &ShadowKey) {
    let _forgotten = SHADOW_FLOWS.remove(key);
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

/// Forgets the decision on a socket.
#[inline(always)]
pub(super) fn delete_socket(sk: Sock) {
    // SAFETY: the map is a socket storage. No entry is no error.
    unsafe { bpf_sk_storage_delete(storage(), sk.as_ptr().cast()) };
}
