//! Prefixes as a partition of the address space: an address belongs to the longest prefix that contains it.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv6Net};

/// Prefixes of one family. In the order of [`IpNet`] each comes right before the prefixes inside it.
pub(super) struct Prefixes(Vec<IpNet>);

/// Preferred representatives: documentation addresses without a special meaning or a route (RFC 5737, RFC 3849).
const ORDINARY_V4: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);
const ORDINARY_V6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1);

/// Prefixes with a label of their own in the kernel's table for source selection (RFC 6724) that occur in pods: unique
/// local addresses, 6to4 and Teredo. The source may change at their edges without a route.
pub(super) fn labelled() -> BTreeSet<IpNet> {
    [
        Ipv6Net::new_assert(Ipv6Addr::new(0xfc00, 0, 0, 0, 0, 0, 0, 0), 7),
        Ipv6Net::new_assert(Ipv6Addr::new(0x2002, 0, 0, 0, 0, 0, 0, 0), 16),
        Ipv6Net::new_assert(Ipv6Addr::new(0x2001, 0, 0, 0, 0, 0, 0, 0), 32),
    ]
    .map(IpNet::from)
    .into()
}

impl Prefixes {
    pub(super) fn new(prefixes: impl Iterator<Item = IpNet>) -> Self {
        Self(prefixes.collect::<BTreeSet<_>>().into_iter().collect())
    }

    /// Returns an address of `prefix` that is in no longer prefix. `None` if longer prefixes cover it.
    pub(super) fn representative(&self, prefix: &IpNet) -> Option<IpAddr> {
        let after = self.0.partition_point(|other| other <= prefix);
        let inside = self.0.get(after..).unwrap_or_default();
        let inside = inside.split(|other| !prefix.contains(other)).next().unwrap_or_default();
        let ordinary = match prefix {
            IpNet::V4(_) => IpAddr::V4(ORDINARY_V4),
            IpNet::V6(_) => IpAddr::V6(ORDINARY_V6),
        };
        // The first address of a prefix may be an anycast or the unspecified address.
        let second = next(prefix.network()).filter(|second| prefix.contains(second));
        let starts =
            [Some(ordinary).filter(|address| prefix.contains(address)), second, Some(prefix.network())];
        starts.into_iter().flatten().find_map(|start| uncovered(start, prefix, inside))
    }
}

/// Returns the first address of `prefix` at or after `address` that is in none of `inside`, which is sorted.
fn uncovered(mut address: IpAddr, prefix: &IpNet, inside: &[IpNet]) -> Option<IpAddr> {
    for covering in inside {
        if covering.contains(&address) {
            address = next(covering.broadcast())?;
        }
    }
    prefix.contains(&address).then_some(address)
}

fn next(address: IpAddr) -> Option<IpAddr> {
    match address {
        IpAddr::V4(address) => address.to_bits().checked_add(1).map(|bits| Ipv4Addr::from_bits(bits).into()),
        IpAddr::V6(address) => address.to_bits().checked_add(1).map(|bits| Ipv6Addr::from_bits(bits).into()),
    }
}

/// More addresses than pods have. An interface with more gets no refinement: its source is that of the route.
const MAX_OWN: usize = 16;

/// Returns the prefixes within which one of an interface's addresses shares more leading bits with a destination than
/// another does.
pub(super) fn closer_to_one_of(own: &BTreeSet<Ipv6Addr>) -> BTreeSet<IpNet> {
    let global: Vec<Ipv6Addr> = own.iter().copied().filter(|addr| !addr.is_unicast_link_local()).collect();
    let mut closer = BTreeSet::new();
    if global.len() > MAX_OWN {
        return closer;
    }
    for one in &global {
        for other in global.iter().filter(|other| *other != one) {
            let common = (one.to_bits() ^ other.to_bits()).leading_zeros();
            // The prefix is one bit longer than what the two have in common, so it contains only the one.
            let len = u8::try_from(common + 1).unwrap_or(128);
            closer.insert(Ipv6Net::new_assert(*one, len).trunc().into());
        }
    }
    closer
}

#[cfg(test)]
mod tests {
    use super::*;

    fn representative(prefix: &str, others: &[&str]) -> Option<String> {
        let net = |text: &str| text.parse::<IpNet>().unwrap();
        let prefix = net(prefix);
        let space = Prefixes::new(others.iter().map(|other| net(other)).chain([prefix]));
        let found = space.representative(&prefix)?;
        assert!(prefix.contains(&found), "{found} is outside");
        let longer =
            others.iter().map(|other| net(other)).filter(|other| prefix != *other && prefix.contains(other));
        for other in longer {
            assert!(!other.contains(&found), "{found} is in {other}");
        }
        Some(found.to_string())
    }

    #[test]
    fn an_address_that_no_longer_prefix_has_stands_for_the_rest() {
        for (prefix, others, expected) in [
            ("0.0.0.0/0", &[][..], Some("198.51.100.1")),
            ("::/0", &[], Some("2001:db8::1")),
            ("10.0.0.0/24", &[], Some("10.0.0.1")),
            ("10.0.0.1/32", &["10.0.0.0/24"], Some("10.0.0.1")),
            ("10.0.0.0/24", &["10.0.0.1/32", "10.0.0.2/31", "10.0.1.0/24"], Some("10.0.0.4")),
            ("10.0.0.0/31", &["10.0.0.1/32"], Some("10.0.0.0")),
            ("10.0.0.0/31", &["10.0.0.0/32", "10.0.0.1/32"], None),
            ("0.0.0.0/0", &["0.0.0.0/1", "128.0.0.0/1"], None),
            ("0.0.0.0/0", &["128.0.0.0/1"], Some("0.0.0.1")),
            ("0.0.0.0/0", &["198.51.0.0/16", "198.51.100.0/24"], Some("198.52.0.0")),
            ("10.0.0.0/8", &["10.0.0.0/9", "10.0.0.0/24", "10.128.0.0/10"], Some("10.192.0.0")),
            ("fd00::/64", &["fd00::1/128", "fd00::/128"], Some("fd00::2")),
            ("ffff::/16", &["ffff:8000::/17"], Some("ffff::1")),
        ] {
            assert_eq!(representative(prefix, others).as_deref(), expected, "{prefix} with {others:?}");
        }
    }
}
