//! The rule of istio-iptables that each reason names is one that istio-iptables installs.

use std::collections::BTreeSet;

use intercept_common::Reason;
use tests::iptables::{
    Groups, IpFamily, IptablesCidrs, IptablesDns, IptablesOptions, IptablesPorts, Tproxy, chains::rules,
    restore::line,
};

/// What stands for a value of the options in a reason's rule.
const PLACEHOLDERS: [&str; 9] =
    ["INTERFACE", "PORT", "LOCALHOST", "TUNNEL", "UID", "GID", "GROUP", "RANGE", "SERVER"];

/// Configurations that have every rule between them.
fn configurations() -> [IptablesOptions; 3] {
    let lists = IptablesOptions {
        inbound_ports: IptablesPorts::List(vec![8080]),
        exclude_interfaces: vec!["net1".into()],
        include_cidrs: IptablesCidrs::List(vec!["10.0.0.0/8".parse().expect("range")]),
        exclude_cidrs: vec!["10.1.0.0/16".parse().expect("range")],
        include_outbound_ports: vec![443],
        exclude_outbound_ports: vec![25],
        virtual_interfaces: vec!["tap0".into()],
        owner_groups: Groups::Only(vec![7]),
        ..IptablesOptions::default()
    };
    let all = IptablesOptions {
        dns: Some(IptablesDns { all: false, servers: vec!["10.96.0.10".parse().expect("address")] }),
        owner_groups: Groups::Except(vec![7]),
        ..IptablesOptions::injected()
    };
    let tproxy =
        IptablesOptions { tproxy: Some(Tproxy { mark: 1337, table: 133 }), ..IptablesOptions::injected() };
    [lists, all, tproxy]
}

/// `table CHAIN`, and the rule's words.
fn installed() -> BTreeSet<(String, Vec<String>)> {
    let of = |options: &IptablesOptions| {
        let rules = rules(options, IpFamily::V4).into_iter();
        let rules = rules.map(|rule| {
            let place = format!("{} {}", rule.table.name(), rule.chain.name());
            // Behind `-A CHAIN` or `-I CHAIN 1`.
            let before = if rule.position.is_some() { 3 } else { 2 };
            (place, line(&rule).split(' ').skip(before).map(str::to_owned).collect())
        });
        rules.collect::<Vec<_>>()
    };
    configurations().iter().flat_map(of).collect()
}

fn is_as(pattern: &str, rule: &[String]) -> bool {
    let words: Vec<&str> = pattern.split(' ').collect();
    words.len() == rule.len()
        && words.iter().zip(rule).all(|(word, found)| PLACEHOLDERS.contains(word) || word == found)
}

#[test]
fn the_rule_of_every_reason_is_installed() {
    let installed = installed();
    for reason in Reason::ALL {
        let place = reason.chain();
        if reason.rule().starts_with('(') {
            continue;
        }
        for pattern in reason.rule().split("; ") {
            let found = installed.iter().any(|(chain, rule)| chain == place && is_as(pattern, rule));
            assert!(found, "{}: {place} has no {pattern}", reason.as_str());
        }
    }
    let without = Reason::ALL.iter().filter(|reason| reason.rule().starts_with('(')).count();
    assert_eq!(
        without, 9,
        "the kernel's own, IPv6 left alone, containers, ends of chains, and two of other meshes"
    );
}
