//! Draws configurations, namespaces and flows from a seed, with more variety than real interfaces allow. Networks, routes
//! and flows share a small pool of addresses and ports, so that they match often. Flows prefer the edges of networks.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use intercept_common::Family;
use ipnet::{IpNet, Ipv4Net};
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};

use super::{ModelLink, ModelNetns};
use crate::iptables::chains::{DNS_PORT, PASSTHROUGH_V6};
use crate::iptables::{Groups, IptablesCidrs, IptablesDns, IptablesOptions, IptablesPorts, Tproxy};
use crate::testbed::Ids;

/// A configuration in a namespace.
#[derive(Debug, Clone)]
pub struct Situation<R = StdRng> {
    /// The namespace.
    pub netns: ModelNetns,
    /// The configuration.
    pub options: IptablesOptions,
    addresses: Vec<IpAddr>,
    nets: Vec<IpNet>,
    ports: Vec<u16>,
    ids: Vec<u32>,
    rng: R,
}

/// A flow in a namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ModelFlow {
    /// A flow from a socket in the namespace.
    Made {
        /// Whether it is a datagram.
        udp: bool,
        /// The address that the socket is bound to.
        from: Option<IpAddr>,
        /// The destination.
        to: SocketAddr,
        /// The owner of the socket.
        owner: Ids,
        /// Its SO_MARK. The mark of TPROXY is only drawn for flows over lo, because it routes all flows there.
        mark: u32,
    },
    /// A connection from outside.
    Arriving {
        /// The ingress interface, as a position in [`ModelNetns::links`].
        link: usize,
        /// The source, which is not local.
        from: IpAddr,
        /// The destination, which is not a loopback address. It need not be local.
        to: SocketAddr,
    },
}

impl Situation {
    /// Draws a situation from a seed.
    pub fn new(seed: u64) -> Self {
        Self::drawn(StdRng::seed_from_u64(seed))
    }
}

impl<R: Rng> Situation<R> {
    /// Draws a situation with this generator, which later draws its flows.
    pub fn drawn(mut rng: R) -> Self {
        let addresses = addresses(&mut rng);
        let ports: Vec<u16> = std::iter::repeat_with(|| rng.random_range(1..=u16::MAX)).take(8).collect();
        let ports = [&ports[..], &[22, 53, 53, 53, 80, 443, 15001, 15006, 15008, DNS_PORT]].concat();
        let ids: Vec<u32> = std::iter::repeat_with(|| rng.random_range(1..u32::MAX - 1)).take(4).collect();
        let ids = [&ids[..], &[0, 1000, 1337, 1337]].concat();
        let netns = netns(&mut rng, &addresses);
        let options = options(&mut rng, &netns, &addresses, &ports, &ids);
        let mut nets: Vec<IpNet> = netns.routes.iter().map(|(net, _)| *net).collect();
        if let IptablesCidrs::List(list) = &options.include_cidrs {
            nets.extend(list);
        }
        nets.extend(&options.exclude_cidrs);
        nets.push(options.loopback_cidr.into());
        Self { netns, options, addresses, nets, ports, ids, rng }
    }

    /// Draws the next flow.
    pub fn flow(&mut self) -> ModelFlow {
        loop {
            let to = SocketAddr::new(self.address(), self.port());
            if self.rng.random_bool(0.25) {
                let link = self.rng.random_range(1..self.netns.links.len());
                let from = self.address();
                if !self.is_outside(from) || from.is_ipv6() != to.is_ipv6() || to.ip().is_loopback() {
                    continue;
                }
                return ModelFlow::Arriving { link, from, to };
            }
            let udp = self.rng.random_bool(0.25);
            let owner = Ids { uid: self.id(), gid: self.id() };
            let from = if self.rng.random_bool(0.3) {
                let from = self.source(Family::of(&to.ip()));
                let Some(from) = from else { continue };
                Some(from)
            } else {
                None
            };
            let over_lo = self.netns.egress(to.ip()).is_some_and(|(out, _)| out == "lo");
            let marks: &[u32] = if over_lo { &[0, 0, 5, 1337] } else { &[0, 5] };
            let mark = *marks.choose(&mut self.rng).expect("not empty");
            return ModelFlow::Made { udp, from, to, owner, mark };
        }
    }

    fn address(&mut self) -> IpAddr {
        match self.rng.random_range(0..10) {
            0..4 => *self.addresses.choose(&mut self.rng).expect("not empty"),
            4..8 => {
                let net = *self.nets.choose(&mut self.rng).expect("not empty");
                let (first, last) = (net.network(), net.broadcast());
                *[first, last, step(first, -1), step(last, 1)].choose(&mut self.rng).expect("four")
            }
            8 => {
                let own = ["127.0.0.1", "127.0.0.2", "127.0.0.6", "::1", "::6"];
                own.choose(&mut self.rng).expect("five").parse().expect("an address")
            }
            _ => random_address(&mut self.rng),
        }
    }

    /// Draws a local address to bind. `None` if its family does not match.
    fn source(&mut self, family: Family) -> Option<IpAddr> {
        let routes = self.netns.routes.iter();
        let own = routes.filter(|(_, way)| matches!(way, ModelLink::Own { .. })).map(|(net, _)| net.addr());
        let passthrough = [IpAddr::V4(Ipv4Addr::new(127, 0, 0, 6)), PASSTHROUGH_V6.into()];
        let is_own = |addr: IpAddr| matches!(self.netns.way(addr), Some(ModelLink::Own { .. }));
        let own = own.chain(passthrough).filter(|addr| Family::of(addr) == family && !addr.is_unspecified());
        let own: Vec<_> = own.filter(|addr| is_own(*addr)).collect();
        own.choose(&mut self.rng).copied()
    }

    fn is_outside(&self, addr: IpAddr) -> bool {
        let special = match addr {
            IpAddr::V4(addr) => addr.is_unspecified() || addr.is_loopback(),
            IpAddr::V6(addr) => addr.is_unspecified() || addr.is_loopback(),
        };
        // What would leave by lo comes from there, too.
        !special && self.netns.egress(addr).is_none_or(|(out, _)| out != "lo")
    }

    fn port(&mut self) -> u16 {
        if self.rng.random_bool(0.1) {
            return self.rng.random_range(1..=u16::MAX);
        }
        let options = &self.options;
        let special = [options.envoy_port, options.inbound_port, options.tunnel_port];
        **self.ports.iter().chain(&special).collect::<Vec<_>>().choose(&mut self.rng).expect("not empty")
    }

    fn id(&mut self) -> u32 {
        *self.ids.choose(&mut self.rng).expect("not empty")
    }
}

/// A prefix outside 127/8, which the kernel handles without routes.
fn random_address(rng: &mut impl Rng) -> IpAddr {
    if rng.random_bool(0.5) {
        let first = [rng.random_range(1..127), rng.random_range(128..224)];
        let first: u32 = *first.choose(rng).expect("two");
        Ipv4Addr::from_bits(first << 24 | rng.random::<u32>() >> 8).into()
    } else {
        Ipv6Addr::from_bits(rng.random::<u128>() >> 3 | 1 << 125).into()
    }
}

/// Draws addresses, several of them close to each other.
fn addresses(rng: &mut impl Rng) -> Vec<IpAddr> {
    let mut addresses = Vec::new();
    for _ in 0..5 {
        let base = random_address(rng);
        for _ in 0..4 {
            addresses.push(match base {
                IpAddr::V4(base) => {
                    Ipv4Addr::from_bits(base.to_bits() ^ (rng.random::<u32>() >> rng.random_range(8..32)))
                        .into()
                }
                IpAddr::V6(base) => {
                    Ipv6Addr::from_bits(base.to_bits() ^ (rng.random::<u128>() >> rng.random_range(8..128)))
                        .into()
                }
            });
        }
    }
    addresses
}

fn net(rng: &mut impl Rng, addresses: &[IpAddr]) -> IpNet {
    let addr = *addresses.choose(rng).expect("not empty");
    let most = if addr.is_ipv6() { 128 } else { 32 };
    let len = match rng.random_range(0..8) {
        0 => 0,
        1 | 2 => most,
        _ => rng.random_range(0..=most),
    };
    IpNet::new(addr, len).expect("a prefix that fits")
}

fn netns(rng: &mut impl Rng, addresses: &[IpAddr]) -> ModelNetns {
    let links: Vec<String> = ["lo", "eth0", "eth1", "net1"].map(String::from).into();
    let localhost = |text: &str| Some(text.parse::<IpAddr>().expect("an address"));
    let mut routes: Vec<(IpNet, ModelLink)> = vec![
        ("127.0.0.0/8".parse().expect("a net"), ModelLink::Own { source: localhost("127.0.0.1") }),
        ("::1/128".parse().expect("a net"), ModelLink::Own { source: localhost("::1") }),
        (IpNet::from(IpAddr::V6(PASSTHROUGH_V6)), ModelLink::Own { source: Some(PASSTHROUGH_V6.into()) }),
    ];
    let mut add = |net: IpNet, way: ModelLink| {
        if !routes.iter().any(|(other, _)| *other == net.trunc()) {
            routes.push((net.trunc(), way));
        }
    };
    let own: Vec<IpAddr> =
        (0..rng.random_range(1..5)).filter_map(|_| addresses.choose(rng).copied()).collect();
    for &addr in &own {
        add(addr.into(), ModelLink::Own { source: Some(addr) });
    }
    for _ in 0..rng.random_range(0..8) {
        let net = net(rng, addresses);
        let of_family: Vec<_> = own.iter().copied().filter(|a| a.is_ipv6() == net.addr().is_ipv6()).collect();
        let way = match rng.random_range(0..12) {
            0 => ModelLink::Nowhere,
            1 => ModelLink::Own { source: None },
            link => ModelLink::Out { link: link % 4, source: of_family.choose(rng).copied() },
        };
        add(net, way);
    }
    for everything in ["0.0.0.0/0", "::/0"] {
        if rng.random_bool(0.8) {
            add(everything.parse().expect("a net"), ModelLink::Out { link: 1, source: None });
        }
    }
    ModelNetns { links, routes }
}

fn options(
    rng: &mut impl Rng,
    netns: &ModelNetns,
    addresses: &[IpAddr],
    ports: &[u16],
    ids: &[u32],
) -> IptablesOptions {
    let mut options = IptablesOptions::injected();
    if rng.random_bool(0.3) {
        options.envoy_port = *ports.choose(rng).expect("not empty");
        options.inbound_port = *ports.choose(rng).expect("not empty");
    }
    if rng.random_bool(0.3) {
        options.tunnel_port = *ports.choose(rng).expect("not empty");
    }
    let least = usize::from(rng.random_bool(0.95));
    options.proxy_uids = some(rng, ids, least, 4);
    options.proxy_gids = some(rng, ids, 1, 4);
    if rng.random_bool(0.35) {
        options.tproxy = Some(Tproxy { mark: 1337, table: 133 });
    }
    options.inbound_ports =
        if rng.random_bool(0.6) { IptablesPorts::All } else { IptablesPorts::List(some(rng, ports, 0, 5)) };
    options.exclude_inbound_ports = some(rng, ports, 0, 4);
    let names: Vec<String> =
        netns.links[1..].iter().map(String::as_str).chain(["eth+", "n+", "eth9"]).map(String::from).collect();
    if rng.random_bool(0.4) {
        options.exclude_interfaces = some(rng, &names, 0, 2);
    }
    if rng.random_bool(0.4) {
        options.virtual_interfaces = some(rng, &names, 0, 2);
    }
    let loopback = ["127.0.0.0/8", "127.0.0.2/32", "::1/128", "127.0.0.1/1"];
    options.include_cidrs = match rng.random_range(0..10) {
        0..4 => IptablesCidrs::All,
        4 => {
            let mut list = nets(rng, addresses, 4);
            list.push(loopback.choose(rng).expect("four").parse().expect("a net"));
            IptablesCidrs::List(list)
        }
        _ => IptablesCidrs::List(nets(rng, addresses, 6)),
    };
    options.exclude_cidrs = nets(rng, addresses, 5);
    options.include_outbound_ports = some(rng, ports, 0, 3);
    options.exclude_outbound_ports = some(rng, ports, 0, 3);
    if rng.random_bool(0.5) {
        let servers = [addresses, &[Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()]].concat();
        options.dns = Some(IptablesDns { all: rng.random_bool(0.4), servers: some(rng, &servers, 0, 3) });
    }
    options.owner_groups = match rng.random_range(0..6) {
        0 => Groups::Only(some(rng, ids, 1, 3)),
        1 => Groups::Except(some(rng, ids, 1, 3)),
        _ => Groups::Except(Vec::new()),
    };
    if rng.random_bool(0.3) {
        let len = rng.random_range(8..=32);
        let addr = Ipv4Addr::from_bits(0x7f00_0000 | rng.random_range(0..8));
        options.loopback_cidr = Ipv4Net::new_assert(addr, len);
    }
    options.ipv6 = rng.random_bool(0.85);
    options
}

fn some<T: Clone>(rng: &mut impl Rng, items: &[T], least: usize, most: usize) -> Vec<T> {
    (0..rng.random_range(least..=most)).filter_map(|_| items.choose(rng).cloned()).collect()
}

fn nets(rng: &mut impl Rng, addresses: &[IpAddr], most: usize) -> Vec<IpNet> {
    (0..rng.random_range(0..=most)).map(|_| net(rng, addresses)).collect()
}

/// The previous or next address, saturating at both ends.
fn step(addr: IpAddr, by: i8) -> IpAddr {
    match addr {
        IpAddr::V4(addr) => Ipv4Addr::from_bits(addr.to_bits().saturating_add_signed(by.into())).into(),
        IpAddr::V6(addr) => Ipv6Addr::from_bits(addr.to_bits().saturating_add_signed(by.into())).into(),
    }
}
