//! `explain`: decides for a flow with the same function and the same map entries as the kernel.

use anyhow::{Result, bail};
use intercept_common::{
    Addr, Decision, InboundFlow, OutboundFlow, PolicyLookup, ProxyListener, Reason, Verdict,
    decide::Owner,
    decide::TproxyMark,
    decide_inbound, decide_outbound,
    layout::{PodPolicy, container, policy},
};
use serde::Serialize;

use super::print_line;
use crate::{
    cli::{Direction, ExplainArgs, FlowContainer},
    node::Node,
};

/// The output of `--json`. Its names are stable.
#[derive(Serialize)]
struct Explanation {
    verdict: &'static str,
    port: Option<u16>,
    reason: &'static str,
    row: &'static str,
    because: &'static str,
    /// Shadow mode: it is decided, and nothing is done.
    shadow: bool,
}

pub(super) fn explain(args: &ExplainArgs) -> Result<()> {
    let cgroup = args.attachment.open()?;
    let node = Node::find(&args.bpffs.bpffs)?;
    let found = match &node {
        Some(node) => node.pod_of_cgroup(cgroup.id())?.map(|(_, policy)| (node, policy)),
        None => None,
    };
    let Some((node, policy)) = found else {
        bail!(
            "cgroup {} is not attached: attach it first with `intercept-agent attach`",
            cgroup.path().display()
        );
    };
    let decision = node.maps().look_up(|lookup| decide(args, &policy, lookup))?;
    let answer = answer(decision, &policy);
    if args.json {
        print_line!("{}", serde_json::to_string_pretty(&answer)?);
    } else {
        if answer.shadow {
            print_line!("shadow mode: nothing is done; what would be done is");
        }
        match answer.port {
            Some(port) => {
                print_line!(
                    "to the proxy on {port}: {} ({}, row {})",
                    answer.because,
                    answer.reason,
                    answer.row
                )
            }
            None => print_line!("not captured: {} ({}, row {})", answer.because, answer.reason, answer.row),
        }
    }
    Ok(())
}

impl FlowContainer {
    fn bits(self) -> u32 {
        match self {
            Self::Proxy => container::PROXY,
            Self::Exempt => container::EXEMPT,
        }
    }
}

fn decide(args: &ExplainArgs, policy: &PodPolicy, lookup: &impl PolicyLookup) -> Decision {
    let src = args.src.map_or(Addr::UNSPECIFIED, Addr::from);
    let dst = Addr::from(args.dst);
    match args.direction {
        Direction::Outbound => {
            let flow = OutboundFlow {
                protocol: if args.udp { 17 } else { 6 },
                dst: dst.effective(src),
                dst_port: args.dport,
                src,
                owner: Owner { uid: args.uid, gid: args.gid },
                mark: args.mark,
                container: args.container.map_or(0, FlowContainer::bits),
            };
            let decided = decide_outbound(policy, &flow, lookup);
            // The connect hook passes it, and sk_lookup steers it when it arrives on loopback.
            match decided.mark {
                TproxyMark::Steered => Reason::MarkedLoopback.into(),
                _ => decided.decision,
            }
        }
        Direction::Inbound => decide_inbound(
            policy,
            &InboundFlow { dst, dst_port: args.dport, src, ifindex: args.ifindex },
            lookup,
        ),
    }
}

fn answer(decision: Decision, policy: &PodPolicy) -> Explanation {
    let (verdict, port) = match decision.verdict {
        Verdict::Pass => ("leave", None),
        Verdict::Redirect(ProxyListener::Outbound) => ("outbound", Some(policy.outbound_port)),
        Verdict::Redirect(ProxyListener::Inbound) => ("inbound", Some(policy.inbound_port)),
        Verdict::Redirect(ProxyListener::Dns) => ("dns", Some(policy.dns_port)),
    };
    Explanation {
        verdict,
        port,
        reason: decision.reason.as_str(),
        row: decision.reason.row(),
        because: decision.reason.describe(),
        shadow: policy.flags & policy::SHADOW != 0,
    }
}
