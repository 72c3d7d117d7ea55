//! Ids that are plain integers in maps and in JSON, each with a type of its own, so that no two can be swapped.

use core::fmt;

use bytemuck::{Pod, Zeroable};

macro_rules! ids {
    ($($(#[$doc:meta])* $name:ident($raw:ty);)*) => {
        $(
            $(#[$doc])*
            #[derive(Clone, Copy, Pod, Zeroable, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
            #[repr(transparent)]
            pub struct $name(pub $raw);

            impl fmt::Display for $name {
                fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                    self.0.fmt(f)
                }
            }
        )*
    };
}

ids! {
    /// Cookie of a network namespace (`SO_NETNS_COOKIE`, `bpf_get_netns_cookie()`). The kernel does not reuse it until it
    /// reboots.
    NetnsCookie(u64);
    /// Id of a policy: the prefix of its keys in DESTINATIONS, PORTS, GROUPS and INTERFACES. Never 0.
    PolicyId(u32);
    /// Index of a pod in the arrays: PROXY_STATE, COUNTERS, JOIN_PODS and JOIN_COUNTERS.
    Slot(u32);
}

impl NetnsCookie {
    /// Set in the ids of machines' workloads, which stand in the place of a cookie. The kernel counts cookies from 1, so none
    /// has it. Ids below 2^53 are exact in JSON.
    const WORKLOAD: u64 = 1 << 52;

    /// The id of the workload of a machine with this cgroup.
    pub const fn of_workload(cgroup_id: u64) -> Self {
        Self(Self::WORKLOAD | (cgroup_id & (Self::WORKLOAD - 1)))
    }

    /// Whether it is the id of a machine's workload.
    pub const fn is_workload(self) -> bool {
        self.0 & Self::WORKLOAD != 0
    }
}

impl Slot {
    /// The index.
    #[inline(always)]
    pub const fn index(self) -> usize {
        self.0 as usize
    }
}
