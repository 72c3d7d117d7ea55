//! The lookups of a decision, in the maps.

use intercept_common::{Addr, PolicyLookup, layout::Destination};

use super::Maps;
use crate::ids::PolicyId;

/// Answers from the maps, as the programs do.
pub struct FromMaps<'a>(pub &'a Maps);

impl PolicyLookup for FromMaps<'_> {
    fn destination(&self, policy: PolicyId, addr: Addr) -> Destination {
        self.0.destination(policy, addr).unwrap_or(Destination { flags: 0, source: Addr::UNSPECIFIED })
    }
    fn port(&self, policy: PolicyId, port: u16) -> u32 {
        self.0.port(policy, port)
    }
    fn group(&self, policy: PolicyId, gid: u32) -> bool {
        self.0.group(policy, gid)
    }
    fn interface(&self, policy: PolicyId, ifindex: u32) -> u32 {
        self.0.interface(policy, ifindex)
    }
    fn is_marked(&self) -> bool {
        false
    }
    fn is_bypass(&self) -> bool {
        false
    }
}
