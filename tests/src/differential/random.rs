//! Cases drawn from a seed.

use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};

use super::case::{Case, DatagramMethod, End, Flow, FlowKind};
use crate::iptables::{Groups, IptablesCidrs, IptablesDns, IptablesOptions, IptablesPorts, Tproxy};
use crate::testbed::Ids;

const USERS: [Ids; 8] = [
    Ids::APP,
    Ids::APP,
    Ids::PROXY,
    Ids::ROOT,
    Ids { uid: 0, gid: 1337 },
    Ids { uid: 1337, gid: 1000 },
    Ids { uid: 1338, gid: 2000 },
    Ids { uid: 1000, gid: 2000 },
];
const OUTSIDE_V4: [&str; 8] = [
    "198.51.100.7",
    "198.51.100.200",
    "203.0.113.9",
    "10.96.0.10",
    "10.96.0.11",
    "10.66.0.1",
    "172.20.1.2",
    "10.67.0.1",
];
const OUTSIDE_V6: [&str; 7] =
    ["2001:db8::7", "2001:db8:1::7", "fd96::10", "fd96::11", "fd66::1", "fd20::7", "fd67::1"];
const OWN_V4: [&str; 8] =
    ["127.0.0.1", "127.0.0.1", "127.0.0.2", "127.0.0.6", "127.0.0.53", "10.66.0.2", "10.66.0.3", "10.67.0.2"];
const OWN_V6: [&str; 6] = ["::1", "::1", "::6", "fd66::2", "fd66::3", "fd67::2"];
const SOURCES_V4: [&str; 5] = ["127.0.0.1", "127.0.0.6", "10.66.0.2", "10.66.0.3", "10.67.0.2"];
const SOURCES_V6: [&str; 4] = ["::1", "::6", "fd66::2", "fd67::2"];
/// 81 has no listener anywhere.
const PORTS: [u16; 16] =
    [22, 53, 53, 80, 80, 81, 443, 3306, 8080, 15000, 15001, 15002, 15006, 15008, 15020, 15090];
const INTERFACES: [&str; 3] = ["eth0", "eth1", "eth9"];
const NETS: [&str; 14] = [
    "198.51.100.0/24",
    "198.51.100.128/25",
    "198.51.100.7/32",
    "10.0.0.0/8",
    "10.66.0.3/24",
    "10.96.0.0/16",
    "172.20.0.0/16",
    "0.0.0.0/0",
    "2001:db8::/32",
    "2001:db8:1::/48",
    "fd00::/8",
    "fd66::2/64",
    "::/0",
    "fd20::7/128",
];
const LOOPBACK_NETS: [&str; 4] = ["127.0.0.0/8", "127.0.0.2/32", "::1/128", "127.0.0.1/32"];

/// Draws a case with `flows` flows from a seed.
pub fn case(seed: u64, flows: usize) -> Case {
    let mut rng = StdRng::seed_from_u64(seed);
    let options = options(&mut rng);
    Case {
        origin: format!("of seed {seed}"),
        dual_stack_proxy: rng.random_bool(0.3),
        listening_first: rng.random_bool(0.5),
        flows: (0..flows).map(|_| flow(&mut rng, &options)).collect(),
        options,
    }
}

/// Draws flows from a seed for a given configuration.
pub fn case_of(name: &str, options: IptablesOptions, seed: u64, flows: usize) -> Case {
    let mut rng = StdRng::seed_from_u64(seed);
    Case {
        origin: format!("{name:?}, flows of seed {seed}"),
        dual_stack_proxy: rng.random_bool(0.3),
        listening_first: rng.random_bool(0.5),
        flows: (0..flows).map(|_| flow(&mut rng, &options)).collect(),
        options,
    }
}

fn options(rng: &mut StdRng) -> IptablesOptions {
    let mut options = IptablesOptions::injected();
    if rng.random_bool(0.15) {
        options.envoy_port = 16001;
        options.inbound_port = 16006;
    }
    if rng.random_bool(0.15) {
        options.tunnel_port = *[80, 15020, 16008].choose(rng).expect("not empty");
    }
    options.proxy_uids = some(rng, 0.75, &[vec![1337]], &[vec![1338, 1337], vec![1337, 0], vec![1338]]);
    options.proxy_gids = some(rng, 0.75, &[vec![1337]], &[vec![2000, 1337], vec![1337, 0], vec![2000]]);
    if rng.random_bool(0.3) {
        let (mark, table) = *[(1337, 133), (77, 99)].choose(rng).expect("not empty");
        options.tproxy = Some(Tproxy { mark, table });
    }
    options.inbound_ports =
        if rng.random_bool(0.6) { IptablesPorts::All } else { IptablesPorts::List(subset(rng, &PORTS, 4)) };
    options.exclude_inbound_ports = match options.inbound_ports {
        IptablesPorts::All => subset(rng, &PORTS, 3),
        IptablesPorts::List(_) => Vec::new(),
    };
    options.exclude_interfaces = names(rng, 0.25);
    options.virtual_interfaces = names(rng, 0.25);
    options.include_cidrs = match rng.random_range(0..10) {
        0..6 => IptablesCidrs::All,
        6 => IptablesCidrs::List(nets(rng, &[&NETS[..], &LOOPBACK_NETS].concat(), 5)),
        _ => IptablesCidrs::List(nets(rng, &NETS, 4)),
    };
    options.exclude_cidrs = nets(rng, &NETS, 2);
    options.include_outbound_ports = subset(rng, &PORTS, 2);
    options.exclude_outbound_ports = subset(rng, &PORTS, 2);
    if rng.random_bool(0.4) {
        let all = rng.random_bool(0.4);
        let servers = ["10.96.0.10", "fd96::10", "127.0.0.53", "10.66.0.2", "::1", "127.0.0.1"];
        let servers = subset(rng, &servers, 3).iter().map(|text| addr(text)).collect();
        options.dns = Some(IptablesDns { all, servers });
    }
    options.owner_groups = match rng.random_range(0..6) {
        0 => Groups::Only(vec![*[2000, 1000].choose(rng).expect("not empty"), 0]),
        1 => Groups::Except(vec![*[2000, 1000].choose(rng).expect("not empty"), 5]),
        _ => Groups::Except(Vec::new()),
    };
    if rng.random_bool(0.2) {
        let cidr = ["127.0.0.0/8", "127.0.0.0/30", "127.0.0.6/32"].choose(rng).expect("not empty");
        options.loopback_cidr = cidr.parse().expect("a network");
    }
    options.drop_invalid = rng.random_bool(0.1);
    options
}

fn flow(rng: &mut StdRng, options: &IptablesOptions) -> Flow {
    let v6 = rng.random_bool(0.45);
    let end = if rng.random_bool(0.25) { End::World } else { End::Pod };
    let kind = match rng.random_range(0..12) {
        0 => FlowKind::Udp(DatagramMethod::To),
        1 => FlowKind::Udp(DatagramMethod::Connected),
        2 => FlowKind::Udp(DatagramMethod::Many),
        _ => FlowKind::Tcp,
    };
    let special = [options.envoy_port, options.inbound_port, options.tunnel_port, 15053];
    let port = match kind {
        FlowKind::Udp(_) => *[53, 53, 53, 5353, 15053].choose(rng).expect("not empty"),
        FlowKind::Tcp if rng.random_bool(0.15) => *special.choose(rng).expect("not empty"),
        FlowKind::Tcp => *PORTS.choose(rng).expect("not empty"),
    };
    let pick = |rng: &mut StdRng, v4: &[&str], v6_list: &[&str]| {
        addr(if v6 { v6_list } else { v4 }.choose(rng).expect("not empty"))
    };
    let (to, from) = match end {
        End::Pod => {
            let to = if rng.random_bool(0.5) {
                pick(rng, &OUTSIDE_V4, &OUTSIDE_V6)
            } else {
                pick(rng, &OWN_V4, &OWN_V6)
            };
            let from = rng.random_bool(0.35).then(|| pick(rng, &SOURCES_V4, &SOURCES_V6));
            (to, from)
        }
        End::World => {
            let to = pick(rng, &["10.66.0.2", "10.66.0.3", "10.67.0.2"], &["fd66::2", "fd66::3", "fd67::2"]);
            let from = rng.random_bool(0.5).then(|| pick(rng, &["198.51.100.9"], &["2001:db8::9"]));
            (to, from)
        }
    };
    let ids = match end {
        End::Pod => *USERS.choose(rng).expect("not empty"),
        End::World => Ids::ROOT,
    };
    let mapped = !v6 && end == End::Pod && rng.random_bool(0.3);
    Flow { end, ids, kind, to: SocketAddr::new(to, port), from, mapped }
}

/// One of the usual values with the given probability, else one of the others.
fn some<T: Clone>(rng: &mut StdRng, probability: f64, usual: &[T], others: &[T]) -> T {
    let from = if rng.random_bool(probability) { usual } else { others };
    from.choose(rng).expect("not empty").clone()
}

/// Up to `most` of the items, none half of the time.
fn subset<T: Copy + PartialEq>(rng: &mut StdRng, items: &[T], most: usize) -> Vec<T> {
    if rng.random_bool(0.5) {
        return Vec::new();
    }
    let mut chosen = Vec::new();
    for _ in 0..rng.random_range(1..=most) {
        let item = *items.choose(rng).expect("not empty");
        if !chosen.contains(&item) {
            chosen.push(item);
        }
    }
    chosen
}

fn names(rng: &mut StdRng, probability: f64) -> Vec<String> {
    if !rng.random_bool(probability) {
        return Vec::new();
    }
    let count = rng.random_range(1..=2);
    INTERFACES.choose_multiple(rng, count).map(ToString::to_string).collect()
}

fn nets(rng: &mut StdRng, texts: &[&str], most: usize) -> Vec<IpNet> {
    subset(rng, texts, most).iter().map(|text| text.parse().expect("a network")).collect()
}

fn addr(text: &str) -> IpAddr {
    text.parse().expect("an address")
}
