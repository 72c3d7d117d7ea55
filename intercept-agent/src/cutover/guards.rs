//! Rules that keep the two captures apart.
//!
//! In nat, while both are active: a connection of the proxy to its own pod is rewritten to a stand-in address, which the rules
//! of iptables would redirect once more. In raw, from then on: the rules track the proxy's answers to DNS queries in a zone of
//! their own. Without its query in the same zone, an answer could match a translated query that was sent from the same port
//! shortly before, and would be translated with it.

use intercept_common::Addr;

use super::{
    iptables::Tool,
    rules::{BaseRule, SavedTable, zone_of_answers},
};

/// The guards for these tables, in the form in which iptables-save prints them.
pub(super) fn guards(tool: &Tool, tables: &[SavedTable], dns_port: u16) -> Vec<BaseRule> {
    let at_output = |table: &str, rule: String| BaseRule {
        table: table.to_owned(),
        chain: "OUTPUT".to_owned(),
        position: 1,
        rule,
    };
    let stand_ins: Vec<String> = if tool.is_v6() {
        let (net, len) = Addr::STAND_IN_PREFIX_V6;
        vec![format!("{net}/{len}")]
    } else {
        Addr::STAND_IN_PREFIXES_V4.iter().map(|(net, len)| format!("{net}/{len}")).collect()
    };
    let mut guards = Vec::new();
    if tables.iter().any(|table| table.name == "nat") {
        guards.extend(stand_ins.iter().map(|net| at_output("nat", format!("-d {net} -j ACCEPT"))));
    }
    let raw = tables.iter().find(|table| table.name == "raw");
    if let Some(zone) = raw.and_then(|raw| zone_of_answers(raw, dns_port)) {
        let localhost = if tool.is_v6() { "::1/128" } else { "127.0.0.1/32" };
        let query = format!("-d {localhost} -p udp -m udp --dport {dns_port} -j CT --zone {zone}");
        guards.push(at_output("raw", query));
    }
    guards
}
