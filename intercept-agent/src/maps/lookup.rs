//! The lookups of a decision, in the maps.

use std::cell::OnceCell;

use aya::maps::{MapError, lpm_trie::Key};
use intercept_common::{
    Addr, PolicyLookup,
    layout::{ConnKey, Destination, DestinationKey, MemberKey, OrigDst, PortKey},
    names,
};

use super::{Hash, Maps, MapsError, failed};
use crate::{ids::PolicyId, sys::Plain};

/// Answers from the maps, as the programs do, for [`Maps::look_up`].
pub struct FromMaps<'a> {
    maps: &'a Maps,
    groups: &'a Hash<MemberKey, u32>,
    interfaces: &'a Hash<MemberKey, u32>,
    originals: &'a Hash<ConnKey, OrigDst>,
    /// The first lookup that failed. It was answered as if there were no entry.
    failure: OnceCell<MapsError>,
}

impl Maps {
    /// Answers a question from the maps. If a lookup fails, which says nothing about its entry, so does this.
    pub fn look_up<T>(&self, question: impl FnOnce(&FromMaps<'_>) -> T) -> Result<T, MapsError> {
        let lookup = FromMaps {
            maps: self,
            groups: self.groups.get()?,
            interfaces: self.interfaces.get()?,
            originals: self.orig_dst.get()?,
            failure: OnceCell::new(),
        };
        let answer = question(&lookup);
        lookup.failure.into_inner().map_or(Ok(answer), Err)
    }
}

impl FromMaps<'_> {
    /// The record of a connection that the programs redirected, handed to a listener, or let pass by its mark.
    pub fn original(&self, key: &ConnKey) -> Option<OrigDst> {
        self.entry(names::ORIG_DST, self.originals.get(&Plain(*key), 0))
    }

    fn entry<T>(&self, map: &str, found: Result<Plain<T>, MapError>) -> Option<T> {
        match found {
            Ok(entry) => Some(entry.0),
            Err(MapError::KeyNotFound) => None,
            Err(error) => {
                self.failure.get_or_init(|| failed("reading", map)(error));
                None
            }
        }
    }
}

impl PolicyLookup for FromMaps<'_> {
    fn destination(&self, policy: PolicyId, addr: Addr) -> Destination {
        let key = Key::new(160, Plain(DestinationKey { policy, addr }));
        let none = Destination { flags: 0, source: Addr::UNSPECIFIED };
        self.entry(names::DESTINATIONS, self.maps.destinations.get(&key, 0)).unwrap_or(none)
    }
    fn port(&self, policy: PolicyId, port: u16) -> u32 {
        let key = Key::new(PortKey::BITS, Plain(PortKey::new(policy, port)));
        self.entry(names::PORTS, self.maps.ports.get(&key, 0)).unwrap_or(0)
    }
    fn group(&self, policy: PolicyId, gid: u32) -> bool {
        let key = Plain(MemberKey { policy, member: gid });
        self.entry(names::GROUPS, self.groups.get(&key, 0)).is_some()
    }
    fn interface(&self, policy: PolicyId, ifindex: u32) -> u32 {
        let key = Plain(MemberKey { policy, member: ifindex });
        self.entry(names::INTERFACES, self.interfaces.get(&key, 0)).unwrap_or(0)
    }
    fn is_marked(&self) -> bool {
        false
    }
    fn is_bypass(&self) -> bool {
        false
    }
}
