//! An IP address of either family, as it stands in every map.

use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use bytemuck::{Pod, Zeroable};

/// 16 bytes in network order; IPv4 is held as `::ffff:a.b.c.d`, so that IPv4 through an `AF_INET6` socket is the
/// same address as IPv4 through an `AF_INET` one.
///
/// Four words rather than sixteen bytes, because that is how the kernel hands addresses to BPF programs and
/// because it keeps the alignment of every struct that holds one at four.
#[derive(Clone, Copy, Eq, Pod, Zeroable)]
#[repr(transparent)]
pub struct Addr([u32; 4]);

/// All ones, or zero for zero.
#[inline(always)]
const fn ones_unless_zero(word: u32) -> u32 {
    // The top bit is set unless the word is zero; the shift fills in copies of it.
    ((word | word.wrapping_neg()).cast_signed() >> 31).cast_unsigned()
}

const V4_MARK: u32 = u32::from_be_bytes([0, 0, 0xff, 0xff]).to_be();

impl Addr {
    /// `::`, and what an unbound source reads as.
    pub const UNSPECIFIED: Self = Self([0; 4]);
    /// `::ffff:0.0.0.0`, what an unbound IPv4 source reads as.
    pub const UNSPECIFIED_V4: Self = Self::from_v4(0);
    /// `::1`.
    pub const LOCALHOST_V6: Self = Self::from_v6([0, 0, 0, 1u32.to_be()]);
    /// `127.0.0.1`.
    pub const LOCALHOST_V4: Self = Self::from_v4(u32::from_be_bytes([127, 0, 0, 1]).to_be());
    /// `127.0.0.6`: the source that Istio's proxy binds for traffic that it hands to the application.
    pub const PASSTHROUGH_V4: Self = Self::from_v4(u32::from_be_bytes([127, 0, 0, 6]).to_be());
    /// `::6`, the same for IPv6.
    pub const PASSTHROUGH_V6: Self = Self::from_v6([0, 0, 0, 6u32.to_be()]);

    /// From the word that the kernel uses for an IPv4 address (network byte order in memory).
    #[inline(always)]
    pub const fn from_v4(be: u32) -> Self {
        Self([0, 0, V4_MARK, be])
    }

    /// From the four words that the kernel uses for an IPv6 address (network byte order in memory).
    #[inline(always)]
    pub const fn from_v6(be: [u32; 4]) -> Self {
        Self(be)
    }

    /// The four words, network byte order in memory.
    #[inline(always)]
    pub const fn words(&self) -> [u32; 4] {
        self.0
    }

    /// The IPv4 word (network byte order in memory); only meaningful if [`Addr::is_v4`].
    #[inline(always)]
    pub const fn v4(&self) -> u32 {
        self.0[3]
    }

    /// Whether this is IPv4, native or mapped.
    #[inline(always)]
    pub const fn is_v4(&self) -> bool {
        self.0[0] | self.0[1] | (self.0[2] ^ V4_MARK) == 0
    }

    /// IPv4 if it is mapped.
    #[inline(always)]
    pub const fn family(&self) -> Family {
        if self.is_v4() { Family::V4 } else { Family::V6 }
    }

    /// `0.0.0.0` or `::`.
    #[inline(always)]
    pub const fn is_unspecified(&self) -> bool {
        (self.0[0] | self.0[1] | self.0[3]) == 0 && (self.0[2] == 0 || self.0[2] == V4_MARK)
    }

    /// `127.0.0.0/8` or `::1`.
    #[inline(always)]
    pub const fn is_loopback(&self) -> bool {
        let upper = self.0[0] | self.0[1];
        // The first byte in memory is the lowest of a little-endian word and the highest of a big-endian one.
        let first = u32::from_be(self.0[3]) >> 24;
        (upper | (self.0[2] ^ V4_MARK) | (first ^ 127)) == 0
            || (upper | self.0[2] | (self.0[3] ^ 1u32.to_be())) == 0
    }

    /// `127.0.0.6` or `::6`.
    #[inline(always)]
    pub fn is_passthrough(&self) -> bool {
        *self == Self::PASSTHROUGH_V4 || *self == Self::PASSTHROUGH_V6
    }
}

/// Which of the two ranges of stand-in addresses a redirected connection dials.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum StandIn {
    /// For a listener on the wildcard address, which takes them as they are.
    Direct,
    /// For a listener on 127.0.0.1 or ::1: sk_lookup hands the connection to it.
    Steered,
}

/// Stand-in addresses: what a redirected connection dials instead of the proxy's 127.0.0.1 or ::1. They depend on the
/// destination, so that each destination has the whole range of local ports to itself instead of sharing 28,232 of
/// them with all others.
///
/// IPv4 is local on all of 127/8 as a rule. The IPv6 prefix is a unique local one (RFC 4193) that the agent makes local
/// in the pod's namespace.
impl Addr {
    const STAND_IN_V6: u32 = u32::from_be_bytes([0xfd, 0x69, 0x6e, 0x74]).to_be();
    const STEERED_V6: u32 = (1u32 << 31).to_be();

    /// All of both IPv6 ranges, with the length of their prefix.
    pub const STAND_IN_PREFIX_V6: (Ipv6Addr, u8) = (Ipv6Addr::new(0xfd69, 0x6e74, 0, 0, 0, 0, 0, 0), 64);
    /// The IPv4 ranges, with the lengths of their prefixes.
    pub const STAND_IN_PREFIXES_V4: [(Ipv4Addr, u8); 2] =
        [(Ipv4Addr::new(127, 128, 0, 0), 9), (Ipv4Addr::new(127, 64, 0, 0), 10)];
    /// Of the sources that carry a number ([`Addr::numbered`]), the IPv4 ones.
    pub const NUMBERED_PREFIX_V4: (Ipv4Addr, u8) = (Ipv4Addr::new(127, 53, 0, 0), 16);

    /// The stand-in for a destination.
    #[inline(always)]
    pub const fn stand_in(range: StandIn, dst: Self, dst_port: u16) -> Self {
        let [a, b, c, d] = dst.0;
        let v4 = dst.is_v4();
        let folded = if v4 { d } else { a ^ b.rotate_left(7) ^ c.rotate_left(13) ^ d.rotate_left(19) };
        // Fibonacci hashing: the upper bits of the product are well mixed.
        let mixed = (folded ^ (dst_port as u32).rotate_left(16)).wrapping_mul(0x9e37_79b1);
        match (v4, range) {
            (true, StandIn::Direct) => Self::from_v4((0x7f80_0000 | (mixed >> 9)).to_be()),
            (true, StandIn::Steered) => Self::from_v4((0x7f40_0000 | (mixed >> 10)).to_be()),
            (false, StandIn::Direct) => Self([Self::STAND_IN_V6, 0, 0, mixed]),
            (false, StandIn::Steered) => Self([Self::STAND_IN_V6, 0, Self::STEERED_V6, mixed]),
        }
    }

    /// The range that an address is in.
    #[inline(always)]
    pub const fn stand_in_range(&self) -> Option<StandIn> {
        let last = u32::from_be(self.0[3]);
        if self.is_v4() {
            return match last >> 22 {
                // 127.64/10, then the two halves of 127.128/9.
                0x1fd => Some(StandIn::Steered),
                0x1fe | 0x1ff => Some(StandIn::Direct),
                _ => None,
            };
        }
        if (self.0[0] ^ Self::STAND_IN_V6) | self.0[1] | (self.0[2] & !Self::STEERED_V6) != 0 {
            return None;
        }
        Some(if self.0[2] == 0 { StandIn::Direct } else { StandIn::Steered })
    }

    /// Whether this is a stand-in address.
    #[inline(always)]
    pub const fn is_stand_in(&self) -> bool {
        self.stand_in_range().is_some()
    }

    /// All ones if this is an address of IPv4, else zero.
    const fn v4_mask(&self) -> u32 {
        !ones_unless_zero(self.0[0] | self.0[1] | (self.0[2] ^ V4_MARK))
    }

    /// `a` where a mask has ones, else `b`.
    #[inline(always)]
    const fn select(mask: u32, a: Self, b: Self) -> Self {
        let (a, b) = (a.0, b.0);
        Self([
            (a[0] & mask) | (b[0] & !mask),
            (a[1] & mask) | (b[1] & !mask),
            (a[2] & mask) | (b[2] & !mask),
            (a[3] & mask) | (b[3] & !mask),
        ])
    }

    /// The address that the kernel uses in place of this destination for a socket that is bound to `src`. It takes an
    /// unspecified one for its own host, after the hooks: 0.0.0.0 is the source that the socket is bound to, else
    /// 127.0.0.1; `::` is `::1` whatever the source, or 127.0.0.1 for a socket that is bound to an IPv4 address
    /// (ip_route_output_key, tcp_v6_connect and udpv6_sendmsg; seen on Linux 6.18).
    #[inline(always)]
    pub fn effective(self, src: Self) -> Self {
        if !self.is_unspecified() {
            return self;
        }
        match (self.is_v4(), src.is_unspecified(), src.is_v4()) {
            (true, true, _) | (false, _, true) => Self::LOCALHOST_V4,
            (true, false, _) => src,
            (false, _, false) => Self::LOCALHOST_V6,
        }
    }

    /// 127.0.0.1 or ::1, of the same family.
    #[inline(always)]
    pub const fn localhost(&self) -> Self {
        Self::select(self.v4_mask(), Self::LOCALHOST_V4, Self::LOCALHOST_V6)
    }

    /// 127.0.0.1 or ::1 itself, rather than any address that is loopback's.
    #[inline(always)]
    pub fn is_localhost(&self) -> bool {
        *self == Self::LOCALHOST_V4 || *self == Self::LOCALHOST_V6
    }
}

/// The version of IP of an address, socket or route.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Family {
    /// `AF_INET`.
    V4 = 4,
    /// `AF_INET6`.
    V6 = 6,
}

impl Family {
    /// Both, IPv4 first.
    pub const ALL: [Self; 2] = [Self::V4, Self::V6];

    /// That of an address.
    pub const fn of(addr: &IpAddr) -> Self {
        match addr {
            IpAddr::V4(_) => Self::V4,
            IpAddr::V6(_) => Self::V6,
        }
    }

    /// 4 or 6.
    #[inline(always)]
    pub const fn version(self) -> u8 {
        self as u8
    }
}

/// Sources that carry a number: `127.53.x.y`, and `100::35:xxyy` of the prefix that is for discarding (RFC 6666).
impl Addr {
    const NUMBERED_V6: u32 = u32::from_be_bytes([1, 0, 0, 0]).to_be();

    /// The source of this number.
    #[inline(always)]
    pub const fn numbered(family: Family, number: u16) -> Self {
        match family {
            Family::V4 => Self::from_v4((0x7f35_0000 | number as u32).to_be()),
            Family::V6 => Self([Self::NUMBERED_V6, 0, 0, (0x35_0000 | number as u32).to_be()]),
        }
    }

    /// The number of such a source.
    #[inline(always)]
    #[expect(clippy::cast_possible_truncation, reason = "the low half is the number")]
    pub const fn number(&self) -> Option<u16> {
        let last = u32::from_be(self.0[3]);
        let v4 = self.0[0] | (self.0[2] ^ V4_MARK) | ((last >> 16) ^ 0x7f35);
        let v6 = (self.0[0] ^ Self::NUMBERED_V6) | self.0[2] | ((last >> 16) ^ 0x35);
        if self.0[1] == 0 && (v4 == 0 || v6 == 0) { Some(last as u16) } else { None }
    }
}

/// In one comparison: a branch a word would be four ways for the verifier to follow.
impl PartialEq for Addr {
    #[inline(always)]
    fn eq(&self, other: &Self) -> bool {
        (self.0[0] ^ other.0[0])
            | (self.0[1] ^ other.0[1])
            | (self.0[2] ^ other.0[2])
            | (self.0[3] ^ other.0[3])
            == 0
    }
}

impl core::hash::Hash for Addr {
    fn hash<H: core::hash::Hasher>(&self, state: &mut H) {
        self.0.hash(state);
    }
}

impl From<Ipv4Addr> for Addr {
    fn from(addr: Ipv4Addr) -> Self {
        Self::from_v4(u32::from_ne_bytes(addr.octets()))
    }
}

impl From<Ipv6Addr> for Addr {
    fn from(addr: Ipv6Addr) -> Self {
        Self(bytemuck::cast(addr.octets()))
    }
}

impl From<IpAddr> for Addr {
    fn from(addr: IpAddr) -> Self {
        match addr {
            IpAddr::V4(addr) => addr.into(),
            IpAddr::V6(addr) => addr.into(),
        }
    }
}

impl From<Addr> for IpAddr {
    fn from(addr: Addr) -> Self {
        let v6 = Ipv6Addr::from(bytemuck::cast::<_, [u8; 16]>(addr.0));
        if addr.is_v4() { Self::V4(Ipv4Addr::from(addr.v4().to_ne_bytes())) } else { Self::V6(v6) }
    }
}

impl core::fmt::Debug for Addr {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        IpAddr::from(*self).fmt(f)
    }
}

impl core::fmt::Display for Addr {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        IpAddr::from(*self).fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn addr(text: &str) -> Addr {
        text.parse::<IpAddr>().expect("an address").into()
    }

    #[test]
    fn mapped_and_native_ipv4_are_one_address() {
        assert_eq!(addr("::ffff:10.1.2.3"), addr("10.1.2.3"));
        assert_eq!(IpAddr::from(addr("::ffff:10.1.2.3")), "10.1.2.3".parse::<IpAddr>().unwrap());
        assert!(addr("10.1.2.3").is_v4());
        assert!(!addr("::10.1.2.3").is_v4());
    }

    #[test]
    fn loopback_is_127_slash_8_and_one() {
        for yes in ["127.0.0.1", "127.255.3.4", "::1", "::ffff:127.0.0.9"] {
            assert!(addr(yes).is_loopback(), "{yes}");
        }
        for no in ["126.0.0.1", "128.0.0.1", "::2", "::", "0.0.0.0", "1::1", "::127.0.0.1", "10.0.0.127"] {
            assert!(!addr(no).is_loopback(), "{no}");
        }
    }

    #[test]
    fn numbers_are_read_back() {
        for number in [0, 1, 255, 256, u16::MAX] {
            for family in Family::ALL {
                let source = Addr::numbered(family, number);
                assert_eq!((source.family(), source.number()), (family, Some(number)));
            }
        }
        assert_eq!(Addr::numbered(Family::V4, 258), addr("127.53.1.2"));
        assert_eq!(Addr::numbered(Family::V6, 258), addr("100::35:102"));
        for none in ["127.0.0.53", "127.128.1.2", "100::", "100::36:1", "100:0:1::35:1", "::1", "::35:1"] {
            assert_eq!(addr(none).number(), None, "{none}");
        }
    }

    #[test]
    fn an_unspecified_destination_is_the_own_host() {
        for (dst, src, effective) in [
            ("10.1.2.3", "0.0.0.0", "10.1.2.3"),
            ("fd00::1", "::", "fd00::1"),
            ("0.0.0.0", "0.0.0.0", "127.0.0.1"),
            ("0.0.0.0", "10.0.0.2", "10.0.0.2"),
            ("::ffff:0.0.0.0", "::", "127.0.0.1"),
            ("::ffff:0.0.0.0", "::ffff:10.0.0.2", "10.0.0.2"),
            ("::", "::", "::1"),
            ("::", "fd00::2", "::1"),
            ("::", "::ffff:10.0.0.2", "127.0.0.1"),
            ("::", "::ffff:0.0.0.0", "127.0.0.1"),
        ] {
            assert_eq!(addr(dst).effective(addr(src)), addr(effective), "{dst} from {src}");
        }
        assert_eq!(addr("10.1.1.1").localhost(), Addr::LOCALHOST_V4);
        assert_eq!(addr("fd00::1").localhost(), Addr::LOCALHOST_V6);
    }

    #[test]
    fn stand_ins_are_in_their_range_and_differ() {
        let mut seen = [Addr::UNSPECIFIED; 36];
        let mut free = seen.iter_mut();
        for range in [StandIn::Direct, StandIn::Steered] {
            for dst in ["10.96.0.1", "10.96.0.2", "198.51.100.3", "fd96::1", "fd96::2", "fd96:0:0:1::2"] {
                for port in [53, 80, 443] {
                    let spread = Addr::stand_in(range, addr(dst), port);
                    assert_eq!(spread.stand_in_range(), Some(range), "{dst}: {spread}");
                    assert_eq!(spread.is_v4(), addr(dst).is_v4());
                    *free.next().expect("room") = spread;
                    assert_eq!(spread.number(), None);
                    let (prefix, len) = Addr::STAND_IN_PREFIX_V6;
                    let covered = match IpAddr::from(spread) {
                        IpAddr::V6(v6) => v6.to_bits() >> (128 - len) == prefix.to_bits() >> (128 - len),
                        IpAddr::V4(v4) => Addr::STAND_IN_PREFIXES_V4
                            .iter()
                            .any(|(net, len)| v4.to_bits() >> (32 - len) == net.to_bits() >> (32 - len)),
                    };
                    assert!(covered, "{spread}");
                }
            }
        }
        for (i, spread) in seen.iter().enumerate() {
            assert!(!seen[..i].contains(spread), "{spread} twice");
        }
        for other in [
            "127.0.0.1",
            "127.53.1.1",
            "127.63.255.255",
            "128.0.0.1",
            "fd69:6e74:1::1",
            "fd69:6e74::1:0:0:1",
            "::1",
        ] {
            assert_eq!(addr(other).stand_in_range(), None, "{other}");
        }
    }

    #[test]
    fn constants_are_what_they_are_called() {
        assert_eq!(Addr::LOCALHOST_V4, addr("127.0.0.1"));
        assert_eq!(Addr::LOCALHOST_V6, addr("::1"));
        assert!(addr("127.0.0.6").is_passthrough() && addr("::6").is_passthrough());
        assert!(!addr("127.0.0.1").is_passthrough());
        assert!(addr("0.0.0.0").is_unspecified() && addr("::").is_unspecified());
        assert!(!addr("::1").is_unspecified() && !addr("1.0.0.0").is_unspecified());
    }
}
