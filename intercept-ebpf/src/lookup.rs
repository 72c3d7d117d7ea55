//! The lookups of a decision, implemented with the maps.

use intercept_common::{
    Addr, PolicyId, PolicyLookup,
    decide::Owner,
    layout::{ConnKey, Destination, MemberKey, PodPolicy, PortKey, end},
};

use crate::maps;

/// The maps, and what is known of the flow: for an arriving connection the key under which the connect hook may have marked
/// it, for one of the pod its owner.
pub(crate) struct PolicyMaps<'a> {
    /// [`PodPolicy::match_owner`] of the flow. Known before the decision, because Linux before 6.8 counts at least 32 bytes
    /// of stack for each nested function, and 512 are for all.
    pub(crate) owner: u32,
    /// TPROXY: the key of the arriving connection.
    pub(crate) conn: Option<&'a ConnKey>,
}

impl PolicyLookup for PolicyMaps<'_> {
    #[inline(always)]
    fn destination(&self, policy: PolicyId, addr: Addr) -> Destination {
        match maps::destination(policy, addr) {
            Some(destination) => *destination,
            None => Destination { flags: 0, source: Addr::UNSPECIFIED },
        }
    }

    #[inline(always)]
    fn port(&self, policy: PolicyId, port: u16) -> u32 {
        maps::port(PortKey::new(policy, port))
    }

    #[inline(always)]
    fn group(&self, policy: PolicyId, gid: u32) -> bool {
        maps::group(MemberKey { policy, member: gid })
    }

    #[inline(always)]
    fn interface(&self, policy: PolicyId, ifindex: u32) -> u32 {
        maps::interface(MemberKey { policy, member: ifindex })
    }

    #[inline(always)]
    fn owner(&self, _: &PodPolicy, _: Owner) -> u32 {
        self.owner
    }

    #[inline(always)]
    fn is_marked(&self) -> bool {
        self.has(end::STEERED)
    }

    #[inline(always)]
    fn is_bypass(&self) -> bool {
        self.has(end::BYPASS)
    }
}

impl PolicyMaps<'_> {
    /// Whether the client's connect hook set this bit.
    #[inline(always)]
    fn has(&self, bit: u64) -> bool {
        // A copy, because Linux 6.1 takes no argument of a global function as the key of a map.
        let Some(&conn) = self.conn else { return false };
        match maps::orig_dst(&conn) {
            // SAFETY: the map holds OrigDst; a removed element is freed after a grace period.
            Some(entry) => unsafe { (*entry).port_and_ends & bit != 0 },
            None => false,
        }
    }
}
