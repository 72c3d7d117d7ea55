//! The lookups of a decision, in the maps.

use aya::maps::lpm_trie::Key;
use intercept_common::{
    Addr, PolicyLookup,
    layout::{ConnKey, Destination, DestinationKey, MemberKey, OrigDst, PortKey},
};

use super::{Hash, Maps, MapsError};
use crate::{ids::PolicyId, sys::Plain};

/// Answers from the maps, as the programs do. What cannot be read is answered as if it were absent, so the maps are opened
/// before the first question.
pub struct FromMaps<'a> {
    maps: &'a Maps,
    groups: &'a Hash<MemberKey, u32>,
    interfaces: &'a Hash<MemberKey, u32>,
    originals: &'a Hash<ConnKey, OrigDst>,
}

impl<'a> FromMaps<'a> {
    /// Opens the maps that a decision needs.
    pub fn of(maps: &'a Maps) -> Result<Self, MapsError> {
        let (groups, interfaces) = (maps.groups.get()?, maps.interfaces.get()?);
        Ok(Self { maps, groups, interfaces, originals: maps.orig_dst.get()? })
    }

    /// The record of a connection that the programs redirected, handed to a listener, or let pass by its mark.
    pub fn original(&self, key: &ConnKey) -> Option<OrigDst> {
        self.originals.get(&Plain(*key), 0).ok().map(|original| original.0)
    }
}

impl PolicyLookup for FromMaps<'_> {
    fn destination(&self, policy: PolicyId, addr: Addr) -> Destination {
        let key = Key::new(160, Plain(DestinationKey { policy, addr }));
        let none = Destination { flags: 0, source: Addr::UNSPECIFIED };
        self.maps.destinations.get(&key, 0).map_or(none, |found| found.0)
    }
    fn port(&self, policy: PolicyId, port: u16) -> u32 {
        let key = Key::new(PortKey::BITS, Plain(PortKey::new(policy, port)));
        self.maps.ports.get(&key, 0).map_or(0, |bits| bits.0)
    }
    fn group(&self, policy: PolicyId, gid: u32) -> bool {
        self.groups.get(&Plain(MemberKey { policy, member: gid }), 0).is_ok()
    }
    fn interface(&self, policy: PolicyId, ifindex: u32) -> u32 {
        self.interfaces.get(&Plain(MemberKey { policy, member: ifindex }), 0).map_or(0, |bits| bits.0)
    }
    fn is_marked(&self) -> bool {
        false
    }
    fn is_bypass(&self) -> bool {
        false
    }
}
