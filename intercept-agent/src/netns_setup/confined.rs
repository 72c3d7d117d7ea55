//! Rules that keep connections to stand-in addresses in the pod. Their local route is removed when the loopback
//! interface goes down, and does not apply to sockets that are bound to another interface. The default route would then
//! lead such a connection out of the pod.

use ipnet::IpNet;
use netlink_packet_route::{
    RouteNetlinkMessage,
    rule::{RuleAction, RuleAttribute, RuleHeader, RuleMessage},
};

use intercept_common::Family;

use crate::netlink::Questions;

use super::{
    NetnsSetupError,
    change::{add, address_family},
    localhost::TABLE_LOCAL,
};

/// The priority right after that of the rule of the local table, if there is one.
pub(super) fn after_local(rules: &[RuleMessage]) -> Option<u32> {
    let local = rules.iter().find(|rule| table(rule) == TABLE_LOCAL)?;
    Some(priority(local).saturating_add(1))
}

/// Adds the rule, which was not there when the rules were listed, with the priority of its family. False if it exists, or if
/// there is no such priority.
pub(super) fn confine(
    questions: &mut Questions,
    net: IpNet,
    after_local: [Option<u32>; 2],
) -> Result<bool, NetnsSetupError> {
    let family = usize::from(Family::of(&net.addr()) == Family::V6);
    let Some(priority) = after_local[family] else { return Ok(false) };
    let mut rule = confining(net);
    rule.attributes.push(RuleAttribute::Priority(priority));
    add(questions, RouteNetlinkMessage::NewRule(rule), "adding a rule that keeps stand-in addresses inside")
}

/// Whether a rule is one of [`confine`].
pub(super) fn is_confining(rule: &RuleMessage, net: IpNet) -> bool {
    rule.header.action == RuleAction::Unreachable
        && rule.header.dst_len == net.prefix_len()
        && rule.attributes.contains(&RuleAttribute::Destination(net.network()))
}

/// Returns the rule without a priority.
pub(super) fn confining(net: IpNet) -> RuleMessage {
    let mut rule = RuleMessage::default();
    rule.header = RuleHeader {
        family: address_family(Family::of(&net.addr())),
        dst_len: net.prefix_len(),
        action: RuleAction::Unreachable,
        ..RuleHeader::default()
    };
    rule.attributes.push(RuleAttribute::Destination(net.network()));
    rule
}

fn table(rule: &RuleMessage) -> u32 {
    let number = |attribute: &RuleAttribute| match attribute {
        RuleAttribute::Table(number) => Some(*number),
        _ => None,
    };
    rule.attributes.iter().find_map(number).unwrap_or(rule.header.table.into())
}

/// Returns the priority. The kernel omits the attribute for 0.
fn priority(rule: &RuleMessage) -> u32 {
    let number = |attribute: &RuleAttribute| match attribute {
        RuleAttribute::Priority(number) => Some(*number),
        _ => None,
    };
    rule.attributes.iter().find_map(number).unwrap_or_default()
}
