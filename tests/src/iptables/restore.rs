//! Rules as the input of iptables-restore.

use std::collections::BTreeSet;
use std::fmt::Write;

use super::rule::{IptablesTable, Match, Protocol, Rule, RuleTarget};

/// The input of `iptables-restore --noflush`, or of ip6tables-restore for rules of IPv6.
pub fn restore_input(rules: &[Rule]) -> String {
    let mut text = String::new();
    for table in [IptablesTable::Raw, IptablesTable::Mangle, IptablesTable::Nat] {
        let of_table: Vec<&Rule> = rules.iter().filter(|rule| rule.table == table).collect();
        if of_table.is_empty() {
            continue;
        }
        writeln!(text, "*{}", table.name()).expect("strings take everything");
        let mut chains = BTreeSet::new();
        for rule in &of_table {
            chains.insert(rule.chain);
            if let RuleTarget::Jump(chain) = rule.target {
                chains.insert(chain);
            }
        }
        for chain in chains.into_iter().filter(|chain| !chain.is_built_in()) {
            writeln!(text, ":{} - [0:0]", chain.name()).expect("strings take everything");
        }
        for rule in of_table {
            text.push_str(&line(rule));
            text.push('\n');
        }
        text.push_str("COMMIT\n");
    }
    text
}

/// One rule as a line of iptables-restore.
pub fn line(rule: &Rule) -> String {
    let chain = rule.chain.name();
    let mut words = match rule.position {
        None => vec![format!("-A {chain}")],
        Some(position) => vec![format!("-I {chain} {position}")],
    };
    words.extend(rule.matches.iter().map(condition));
    words.push(format!("-j {}", action(rule.target)));
    words.join(" ")
}

fn condition(condition: &Match) -> String {
    match condition {
        Match::In(interface) => format!("-i {interface}"),
        Match::Out(interface) => format!("-o {interface}"),
        Match::Source(net) => format!("-s {net}"),
        Match::Destination(net) => format!("-d {net}"),
        Match::NotDestination(net) => format!("! -d {net}"),
        Match::Protocol(Protocol::Tcp) => "-p tcp".into(),
        Match::Protocol(Protocol::Udp) => "-p udp".into(),
        Match::Port(port) => format!("--dport {port}"),
        Match::NotPort(port) => format!("! --dport {port}"),
        Match::NotPorts(ports) => {
            let ports: Vec<String> = ports.iter().map(u16::to_string).collect();
            format!("-m multiport ! --dports {}", ports.join(","))
        }
        Match::SourcePort(port) => format!("--sport {port}"),
        Match::User(user) => format!("-m owner --uid-owner {user}"),
        Match::NotUser(user) => format!("-m owner ! --uid-owner {user}"),
        Match::Group(group) => format!("-m owner --gid-owner {group}"),
        Match::NotGroup(group) => format!("-m owner ! --gid-owner {group}"),
        Match::Mark(mark) => format!("-m mark --mark {mark}"),
        Match::NotMark(mark) => format!("-m mark ! --mark {mark}"),
        Match::Connmark(mark) => format!("-m connmark --mark {mark}"),
        Match::Established => "-m conntrack --ctstate RELATED,ESTABLISHED".into(),
        Match::Invalid => "-m conntrack --ctstate INVALID".into(),
    }
}

fn action(target: RuleTarget) -> String {
    match target {
        RuleTarget::Return => "RETURN".into(),
        RuleTarget::Accept => "ACCEPT".into(),
        RuleTarget::Drop => "DROP".into(),
        RuleTarget::Jump(chain) => chain.name().into(),
        RuleTarget::Redirect(port) => format!("REDIRECT --to-ports {port}"),
        RuleTarget::SetMark(mark) => format!("MARK --set-mark {mark}"),
        RuleTarget::SaveMark => "CONNMARK --save-mark".into(),
        RuleTarget::RestoreMark => "CONNMARK --restore-mark".into(),
        RuleTarget::Tproxy { mark, port } => {
            format!("TPROXY --tproxy-mark {mark}/0xffffffff --on-port {port}")
        }
        RuleTarget::Zone(zone) => format!("CT --zone {zone}"),
    }
}
