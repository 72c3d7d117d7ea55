//! A policy, written as options, reads back as the same policy.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::ops::RangeInclusive;

use clap::Parser;
use intercept_agent::facade::options::{
    Cidrs, Config, Dns, InboundMode, InboundPorts, InterfacePattern, NameSource, OwnerGroups, Ports,
};
use ipnet::{IpNet, Ipv4Net};
use proptest::collection::{btree_set, vec};
use proptest::option;
use proptest::prelude::*;

use crate::pod::CaptureCli;

/// A pod without names, but with the servers of a policy.
struct Servers(Dns);

impl NameSource for Servers {
    fn user(&self, _: &str) -> io::Result<Option<u32>> {
        Ok(None)
    }

    fn group(&self, _: &str) -> io::Result<Option<u32>> {
        Ok(None)
    }

    fn resolv_conf(&self) -> io::Result<String> {
        match &self.0 {
            Dns::Resolvers(servers) => {
                Ok(servers.iter().map(|server| format!("nameserver {server}\n")).collect())
            }
            Dns::Off | Dns::All => panic!("resolv.conf is not to be read"),
        }
    }
}

fn port() -> impl Strategy<Value = u16> {
    1..=u16::MAX
}

fn ports() -> impl Strategy<Value = Ports> {
    let range = (port(), 0..2000_u16).prop_map(|(low, more)| low..=low.saturating_add(more));
    vec(prop_oneof![port().prop_map(|port| port..=port), range], 0..6)
        .prop_map(|ranges: Vec<RangeInclusive<u16>>| ranges.into_iter().collect())
}

/// Ids in any order, each once.
fn ids() -> impl Strategy<Value = Vec<u32>> {
    btree_set(0..u32::MAX, 0..=16).prop_map(|ids| ids.into_iter().collect::<Vec<_>>()).prop_shuffle()
}

fn interfaces() -> impl Strategy<Value = Vec<InterfacePattern>> {
    let interface = ("[a-z-][a-z0-9.-]{0,13}", any::<bool>()).prop_map(|(name, prefix)| {
        if prefix { InterfacePattern::Prefix(name) } else { InterfacePattern::Exact(name) }
    });
    btree_set(interface, 0..4).prop_map(|interfaces| interfaces.into_iter().collect())
}

/// An address, often a loopback one, with a prefix.
fn network() -> impl Strategy<Value = IpNet> {
    let address = prop_oneof![
        any::<IpAddr>(),
        any::<[u8; 3]>().prop_map(|[b, c, d]| IpAddr::V4(Ipv4Addr::new(127, b, c, d))),
        Just(IpAddr::V6(std::net::Ipv6Addr::LOCALHOST)),
    ];
    (address, 0..=128_u8).prop_map(|(address, bits)| {
        IpNet::new_assert(address, if address.is_ipv4() { bits % 33 } else { bits })
    })
}

fn sorted(written: &[IpNet]) -> Vec<IpNet> {
    let mut list: Vec<IpNet> = written.iter().map(IpNet::trunc).collect();
    list.sort_unstable();
    list.dedup();
    list
}

fn include() -> impl Strategy<Value = Cidrs> {
    prop_oneof![
        1 => Just(Cidrs { all: true, ..Cidrs::default() }),
        4 => vec(network(), 0..5).prop_map(|written| {
            let loopback = written.iter().any(|network| network.addr().is_loopback());
            Cidrs { all: false, list: sorted(&written), loopback }
        }),
    ]
}

fn owner_groups() -> impl Strategy<Value = OwnerGroups> {
    let groups = |least| btree_set(0..u32::MAX, least..=64).prop_map(|ids| ids.into_iter().collect());
    prop_oneof![
        Just(OwnerGroups::All),
        groups(0).prop_map(OwnerGroups::Only),
        groups(1).prop_map(OwnerGroups::Except)
    ]
}

fn dns() -> impl Strategy<Value = Dns> {
    let servers = btree_set(any::<IpAddr>(), 1..4).prop_map(|servers| servers.into_iter().collect());
    prop_oneof![Just(Dns::Off), Just(Dns::All), servers.prop_map(Dns::Resolvers)]
}

prop_compose! {
    fn proxy()(proxy_port in port(), inbound_port in port(), tunnel_port in port(), proxy_uids in ids(),
        proxy_gids in ids(), tproxy in any::<bool>(), tproxy_mark in 1..=u32::MAX,
        tproxy_table in (1..=u32::MAX).prop_filter("the kernel's own", |table| !(253..=255).contains(table)))
        -> Config
    {
        let nobody = proxy_uids.is_empty() && proxy_gids.is_empty();
        Config {
            proxy_port, inbound_port, tunnel_port, tproxy_mark, tproxy_table, proxy_gids,
            proxy_uids: if nobody { vec![1337] } else { proxy_uids },
            mode: if tproxy { InboundMode::Tproxy } else { InboundMode::Redirect },
            ..Config::default()
        }
    }
}

prop_compose! {
    fn config()(proxy in proxy(), only in option::of(ports()), inbound_exclude in ports(),
        exclude_interfaces in interfaces(), virt_interfaces in interfaces(), include in include(),
        exclude in vec(network(), 0..5), outbound_ports in ports(), outbound_exclude_ports in ports(),
        owner_groups in owner_groups(), loopback in (8..=32_u8, any::<[u8; 3]>()), dns in dns(),
        (dns_port, dns_over_udp_only, without_self_capture) in (port(), any::<bool>(), any::<bool>()),
        sources in vec(network(), 0..5))
        -> Config
    {
        let captured = dns != Dns::Off;
        let (bits, [b, c, d]) = loopback;
        let inbound_exclude = if only.is_none() { inbound_exclude } else { Ports::default() };
        Config {
            inbound_ports: only.map_or(InboundPorts::All, InboundPorts::Only),
            inbound_exclude, exclude_interfaces, virt_interfaces, include, outbound_ports,
            outbound_exclude_ports, owner_groups, dns, without_self_capture,
            dns_port: if captured { dns_port } else { Config::default().dns_port },
            dns_over_udp_only: captured && dns_over_udp_only,
            exclude_sources: sorted(&sources),
            exclude: sorted(&exclude),
            loopback_v4: Ipv4Net::new_assert(Ipv4Addr::new(127, b, c, d), bits).trunc(),
            ..proxy
        }
    }
}

fn parse_back(config: &Config) -> Config {
    let env: HashMap<_, _> = config.to_env().into_iter().collect();
    let args = config.to_args();
    let cli = CaptureCli::try_parse_from(std::iter::once("x".to_owned()).chain(args.clone())).expect("flags");
    let raw = cli.raw.read_env(|name| env.get(name).cloned());
    let (parsed, _, notes) = raw
        .validate(&Servers(config.dns.clone()))
        .unwrap_or_else(|error| panic!("{args:?} {env:?}: {error}"));
    // -k has one always.
    assert_eq!(notes.len(), usize::from(!config.virt_interfaces.is_empty()), "{args:?} {env:?}: {notes:?}");
    parsed
}

proptest! {
    #[test]
    fn through_options(config in config()) {
        prop_assert_eq!(parse_back(&config), config);
    }

    #[test]
    fn through_json(config in config()) {
        let json = serde_json::to_string(&config).expect("serialises");
        prop_assert_eq!(serde_json::from_str::<Config>(&json).expect("parses"), config);
    }
}

#[test]
fn options_are_short_where_the_policy_is_the_default() {
    let config = Config::default();
    assert_eq!(config.to_args(), ["-u", "1337", "-g", "1337"]);
    assert_eq!(config.to_env(), []);
    assert_eq!(parse_back(&config), config);
}

/// The names in JSON and the text for people are read by others: a change here is a change for them.
#[test]
fn json_and_text_of_a_policy() {
    let config = Config {
        proxy_uids: vec![1337, 7],
        mode: InboundMode::Tproxy,
        inbound_ports: InboundPorts::All,
        inbound_exclude: [15020..=15021, 15090..=15090].into_iter().collect(),
        exclude_interfaces: vec![InterfacePattern::Prefix("net".to_owned())],
        include: Cidrs { all: false, list: vec!["127.0.0.0/8".parse().expect("range")], loopback: true },
        exclude: vec!["10.0.0.0/8".parse().expect("range")],
        outbound_ports: [443].into_iter().collect(),
        owner_groups: OwnerGroups::Except(vec![202]),
        dns: Dns::Resolvers(vec!["10.96.0.10".parse().expect("address")]),
        dns_port: 8600,
        dns_over_udp_only: true,
        exclude_sources: vec!["10.1.0.0/16".parse().expect("range")],
        without_self_capture: true,
        open_without_proxy: true,
        without_ipv6: true,
        accelerate: vec!["envoy".to_owned(), "other".to_owned()],
        proxy_cgroups: vec!["/cg/proxy".into()],
        exempt_cgroups: vec!["/cg/init".into(), "/cg/other".into()],
        proxy_containers: vec!["istio-proxy".to_owned()],
        exempt_containers: vec!["a".to_owned(), "b".to_owned()],
        shadow: true,
        ..Config::default()
    };
    let json = serde_json::json!({
        "proxy_port": 15001, "inbound_port": 15006, "tunnel_port": 15008,
        "proxy_uids": [1337, 7], "proxy_gids": [1337],
        "mode": "tproxy", "tproxy_mark": 1337, "tproxy_table": 133,
        "inbound_ports": "all", "inbound_exclude": "15020:15021,15090",
        "exclude_interfaces": ["net+"], "virt_interfaces": [],
        "include": {"all": false, "list": ["127.0.0.0/8"], "loopback": true},
        "exclude": ["10.0.0.0/8"],
        "outbound_ports": "443", "outbound_exclude_ports": "",
        "owner_groups": {"except": [202]}, "loopback_v4": "127.0.0.1/32",
        "dns": {"resolvers": ["10.96.0.10"]}, "dns_port": 8600, "dns_over_udp_only": true,
        "exclude_sources": ["10.1.0.0/16"], "without_self_capture": true, "open_without_proxy": true, "without_ipv6": true,
        "accelerate": ["envoy", "other"],
        "proxy_cgroups": ["/cg/proxy"], "exempt_cgroups": ["/cg/init", "/cg/other"],
        "proxy_containers": ["istio-proxy"], "exempt_containers": ["a", "b"], "shadow": true,
    });
    assert_eq!(serde_json::to_value(&config).expect("serialises"), json);
    let text = "\
outbound TCP goes to      15001
inbound TCP goes to       15006
tunnel port               15008
proxy users               1337, 7
proxy groups              1337
proxy only in             /cg/proxy
containers left alone     /cg/init,/cg/other
proxy container           istio-proxy
exempt containers         a, b
inbound mode              TPROXY, mark 1337, table 133
inbound ports             all but 15020:15021,15090
sources left alone        10.1.0.0/16
interfaces left alone     net+
interfaces of guests      none
outbound destinations     127.0.0.0/8
destinations left alone   10.0.0.0/8
outbound ports besides    443
outbound ports left alone none
owner groups              all but 202
localhost                 127.0.0.1/32, ::1/128
accelerated               envoy, other
without the proxy         open
mode                      shadow: nothing is changed
the proxy to its own pod  left alone
IPv6                      left alone
DNS                       10.96.0.10 over UDP to 8600
";
    assert_eq!(config.to_string(), text);
    assert_eq!(parse_back(&config), config);
}
