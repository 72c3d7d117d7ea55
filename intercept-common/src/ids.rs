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

impl Slot {
    /// The index.
    #[inline(always)]
    pub const fn index(self) -> usize {
        self.0 as usize
    }
}
