//! The rules of istio-iptables in the syntax of nftables.
//!
//! Each rule is translated on its own, except that neighbouring rules which return for one network or port each
//! become one rule with a set, as an author for nftables would write them. That makes it the strongest competitor.

use std::fmt::Write;

use crate::iptables::{
    Chain, IpFamily, IptablesOptions, IptablesTable, Match, Protocol, Rule, RuleTarget, chains::rules,
};

/// The input of `nft -f -` for both families. Only what REDIRECT mode needs.
pub fn ruleset(options: &IptablesOptions) -> String {
    let mut text = String::new();
    for (family, name) in [(IpFamily::V4, "ip"), (IpFamily::V6, "ip6")] {
        let rules = rules(options, family);
        debug_assert!(rules.iter().all(|rule| rule.table == IptablesTable::Nat));
        writeln!(text, "table {name} istio {{").expect("a String takes any text");
        // A chain must be there before a rule jumps to it.
        for chain in [
            Chain::IstioRedirect,
            Chain::IstioInRedirect,
            Chain::IstioInbound,
            Chain::IstioOutput,
            Chain::Prerouting,
            Chain::Output,
        ] {
            writeln!(text, " chain {} {{", chain.name()).expect("a String takes any text");
            match chain {
                Chain::Prerouting => text.push_str("  type nat hook prerouting priority -100;\n"),
                Chain::Output => text.push_str("  type nat hook output priority -100;\n"),
                _ => {}
            }
            let of_chain: Vec<&Rule> = rules.iter().filter(|rule| rule.chain == chain).collect();
            for line in lines(&of_chain, name) {
                writeln!(text, "  {line}").expect("a String takes any text");
            }
            text.push_str(" }\n");
        }
        text.push_str("}\n");
    }
    text
}

/// Removes the rules.
pub const REMOVAL: &str = "delete table ip istio\ndelete table ip6 istio\n";

/// What neighbouring rules that only return may match on to become a set.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord, Clone, Copy)]
enum Shape {
    Destination,
    TcpPort,
    UdpPort,
}

fn lines(rules: &[&Rule], family: &str) -> Vec<String> {
    let mut lines = Vec::new();
    let mut rest = rules;
    while let Some(first) = rest.first() {
        // All of these rules return, so their order makes no difference.
        let run = rest.iter().take_while(|rule| shape(rule).is_some()).count();
        let (now, later) = rest.split_at(run.max(1));
        rest = later;
        if run == 0 {
            lines.push(line(first, family));
            continue;
        }
        for wanted in [Shape::Destination, Shape::TcpPort, Shape::UdpPort] {
            let elements: Vec<String> = now
                .iter()
                .filter_map(|rule| shape(rule))
                .filter(|(found, _)| *found == wanted)
                .map(|(_, e)| e)
                .collect();
            let elements = elements.join(", ");
            match wanted {
                _ if elements.is_empty() => {}
                Shape::Destination => lines.push(format!("{family} daddr {{ {elements} }} return")),
                Shape::TcpPort => lines.push(format!("tcp dport {{ {elements} }} return")),
                Shape::UdpPort => lines.push(format!("udp dport {{ {elements} }} return")),
            }
        }
    }
    lines
}

fn shape(rule: &Rule) -> Option<(Shape, String)> {
    if rule.target != RuleTarget::Return {
        return None;
    }
    match &rule.matches[..] {
        [Match::Destination(net)] => Some((Shape::Destination, net.to_string())),
        [Match::Protocol(Protocol::Tcp), Match::Port(port)] => Some((Shape::TcpPort, port.to_string())),
        [Match::Protocol(Protocol::Udp), Match::Port(port)] => Some((Shape::UdpPort, port.to_string())),
        _ => None,
    }
}

fn line(rule: &Rule, family: &str) -> String {
    let mut words: Vec<String> = rule.matches.iter().map(|condition| expression(condition, family)).collect();
    words.push(match rule.target {
        RuleTarget::Return => "return".into(),
        RuleTarget::Jump(chain) => format!("jump {}", chain.name()),
        RuleTarget::Redirect(port) => format!("meta l4proto tcp redirect to :{port}"),
        other => unreachable!("{other:?} is not used in REDIRECT mode"),
    });
    words.join(" ")
}

fn expression(condition: &Match, family: &str) -> String {
    match condition {
        Match::In(interface) => format!("iifname \"{interface}\""),
        Match::Out(interface) => format!("oifname \"{interface}\""),
        Match::Source(net) => format!("{family} saddr {net}"),
        Match::Destination(net) => format!("{family} daddr {net}"),
        Match::NotDestination(net) => format!("{family} daddr != {net}"),
        Match::Protocol(Protocol::Tcp) => "meta l4proto tcp".into(),
        Match::Protocol(Protocol::Udp) => "meta l4proto udp".into(),
        Match::Port(port) => format!("th dport {port}"),
        Match::NotPort(port) => format!("th dport != {port}"),
        Match::User(user) => format!("meta skuid {user}"),
        Match::NotUser(user) => format!("meta skuid != {user}"),
        Match::Group(group) => format!("meta skgid {group}"),
        Match::NotGroup(group) => format!("meta skgid != {group}"),
        other => unreachable!("{other:?} is not used in REDIRECT mode"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::mode::Lists;

    #[test]
    fn long_lists_become_sets_and_nothing_is_lost() {
        let text = ruleset(&Lists::Ports(1000).options());
        let tcp = text.lines().filter(|line| line.trim_start().starts_with("tcp dport {")).count();
        // -o in ISTIO_OUTPUT, -d in ISTIO_INBOUND, for both families.
        assert_eq!(tcp, 4, "{text}");
        assert_eq!(text.matches("20999").count(), 2 * 3, "tcp and udp outbound, tcp inbound, both families");
        let text = ruleset(&Lists::Cidrs(10).options());
        assert!(text.contains("ip daddr { 127.0.0.1/32, 1.0.0.0/24, 1.0.2.0/24"), "{text}");
        assert!(text.contains("ip6 daddr { ::1/128 } return"), "{text}");
    }
}
