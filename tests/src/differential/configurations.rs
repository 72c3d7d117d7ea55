//! Configurations that tests use by name.

use ipnet::IpNet;

use crate::iptables::{Groups, IptablesCidrs, IptablesDns, IptablesOptions, IptablesPorts, Tproxy};

/// The one of Istio's injector, and one for each group of options.
pub fn fixed() -> Vec<(&'static str, IptablesOptions)> {
    let injected = IptablesOptions::injected;
    let tproxy = Some(Tproxy { mark: 1337, table: 133 });
    let servers = vec![addr("10.96.0.10"), addr("fd96::10"), addr("127.0.0.53")];
    vec![
        ("injected", injected()),
        ("nothing captured", IptablesOptions::default()),
        (
            "other ports and two proxies",
            IptablesOptions {
                envoy_port: 16001,
                inbound_port: 16006,
                tunnel_port: 16008,
                proxy_uids: vec![1338, 1337],
                proxy_gids: vec![2000],
                ..injected()
            },
        ),
        (
            "inbound list",
            IptablesOptions { inbound_ports: IptablesPorts::List(vec![80, 15008, 15090]), ..injected() },
        ),
        (
            "outbound networks and ports",
            IptablesOptions {
                include_cidrs: nets(&["198.51.100.0/24", "172.20.0.0/16", "2001:db8::/32"]),
                exclude_cidrs: list(&["198.51.100.128/25", "2001:db8:1::/48"]),
                include_outbound_ports: vec![3306],
                exclude_outbound_ports: vec![443, 53],
                ..injected()
            },
        ),
        (
            "loopback among the captured networks",
            IptablesOptions {
                include_cidrs: nets(&["127.0.0.0/8", "198.51.100.0/24", "::1/128"]),
                ..injected()
            },
        ),
        (
            "excluded interface",
            IptablesOptions {
                exclude_interfaces: vec!["eth1".into()],
                loopback_cidr: "127.0.0.0/8".parse().expect("a network"),
                ..injected()
            },
        ),
        (
            "virtual interface",
            IptablesOptions {
                virtual_interfaces: vec!["eth1".into()],
                include_cidrs: nets(&["10.67.0.0/24", "198.51.100.0/24", "fd67::/64"]),
                exclude_cidrs: list(&["10.67.0.2/32"]),
                ..injected()
            },
        ),
        ("only some groups", IptablesOptions { owner_groups: Groups::Only(vec![2000, 0]), ..injected() }),
        (
            "all but some groups, DNS of resolv.conf",
            IptablesOptions {
                owner_groups: Groups::Except(vec![2000]),
                dns: Some(IptablesDns { all: false, servers: servers.clone() }),
                ..injected()
            },
        ),
        ("all DNS", IptablesOptions { dns: Some(IptablesDns { all: true, servers }), ..injected() }),
        ("tproxy", IptablesOptions { tproxy, drop_invalid: true, ..injected() }),
        (
            "tproxy list, excluded interface",
            IptablesOptions {
                tproxy: Some(Tproxy { mark: 77, table: 99 }),
                inbound_ports: IptablesPorts::List(vec![80, 8080]),
                exclude_inbound_ports: Vec::new(),
                exclude_interfaces: vec!["eth1".into()],
                ..injected()
            },
        ),
    ]
}

fn addr(text: &str) -> std::net::IpAddr {
    text.parse().expect("an address")
}

fn list(texts: &[&str]) -> Vec<IpNet> {
    texts.iter().map(|text| text.parse().expect("a network")).collect()
}

fn nets(texts: &[&str]) -> IptablesCidrs {
    IptablesCidrs::List(list(texts))
}
