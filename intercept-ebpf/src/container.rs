//! The container that a process runs in, by its cgroup. Nothing here runs for a pod whose policy names no container.

use aya_ebpf::{bindings::bpf_sock, helpers::generated::bpf_get_current_ancestor_cgroup_id};
use intercept_common::layout::{PodPolicy, container, policy};

use crate::owner::{address, follow};

/// Levels of cgroups below the container's in which a listening socket still counts as the container's.
const NESTED: usize = 8;

macro_rules! offsets {
    ($($name:ident,)*) => {
        $(/// Offset in bytes on the running kernel. The agent fills it in from BTF.
        #[unsafe(no_mangle)]
        static $name: u32 = 0;)*
    };
}
offsets! { SOCK_CGROUP_OFF, CGROUP_LEVEL_OFF, CGROUP_KN_OFF, KERNFS_ID_OFF, CGROUP_PARENT_OFF, CSS_CGROUP_OFF, }

macro_rules! offset {
    ($global:ident) => {
        // SAFETY: reads a static; volatile because the loader replaces its value.
        unsafe { core::ptr::read_volatile(&raw const $global) as usize }
    };
}

/// Bits of [`container`] for the running task, whatever cgroup below the container's it is in.
#[inline(always)]
pub(crate) fn of_current(pod: &PodPolicy) -> u32 {
    if pod.flags & policy::CONTAINERS == 0 {
        return pod.zero;
    }
    // SAFETY: takes a number; returns 0 for a level below the task's own.
    let cgroup = unsafe { bpf_get_current_ancestor_cgroup_id(pod.cgroup_level as i32) };
    pod.container_of(cgroup)
}

/// Whether the container in which a socket was created may be the proxy's. Unlike the running task, the socket is known in
/// TCP callbacks of all kernels.
#[inline(always)]
pub(crate) fn made_socket(pod: &PodPolicy, sk: *mut bpf_sock) -> bool {
    if pod.flags & policy::PROXY_CONTAINER == 0 || offset!(SOCK_CGROUP_OFF) == 0 {
        return true;
    }
    let mut cgroup = follow(address(sk), offset!(SOCK_CGROUP_OFF));
    for _ in 0..NESTED {
        if follow(cgroup, offset!(CGROUP_LEVEL_OFF)) as u32 <= pod.cgroup_level {
            break;
        }
        let parent = follow(cgroup, offset!(CGROUP_PARENT_OFF));
        cgroup = follow(parent, offset!(CSS_CGROUP_OFF));
    }
    let id = follow(follow(cgroup, offset!(CGROUP_KN_OFF)), offset!(KERNFS_ID_OFF));
    pod.container_of(id) & container::PROXY != 0
}
