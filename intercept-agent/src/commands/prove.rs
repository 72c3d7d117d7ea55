//! `prove`: whether connections of a captured pod reach its proxy.

use anyhow::{Context as _, Result, bail};

use super::{Failed, print_line};
use crate::{
    cli::InspectArgs,
    escape,
    netns::Netns,
    node::Node,
    proof::{Probed, Proof, ProofState},
};

pub(super) fn prove(args: &InspectArgs) -> Result<()> {
    let proof = of_cgroup(args)?;
    if args.json {
        print_line!("{}", escape::pretty_json(&proof)?);
    } else {
        for leg in &proof.legs {
            let to = leg.destination.map(|to| format!(" to {to}")).unwrap_or_default();
            let state = match leg.state {
                ProofState::NothingToProve => "nothing to prove",
                ProofState::Proven => "proven",
                ProofState::Failed => "FAILED",
            };
            let cause = leg.cause.map(|cause| format!(" ({})", cause.as_str())).unwrap_or_default();
            print_line!("{} IPv{}{to}: {state}: {}{cause}", leg.direction, leg.family, leg.text);
        }
    }
    match proof.failure() {
        Some((_, text)) => Err(Failed::Unproven(text).into()),
        None => Ok(()),
    }
}

fn of_cgroup(args: &InspectArgs) -> Result<Proof> {
    let cgroup = args.attachment.open()?;
    let absent = || {
        let path = cgroup.path().display();
        format!("cgroup {path} is not attached: attach it first with `intercept-agent attach`")
    };
    let node = Node::find(&args.bpffs.bpffs)?.with_context(absent)?;
    let (cookie, policy) = node.pod_of_cgroup(cgroup.id())?.with_context(absent)?;
    let record =
        node.record_of(cookie)?.with_context(|| format!("the record of netns {cookie} is missing"))?;
    if record.config.shadow {
        bail!(
            "{} is in shadow mode, which changes nothing: see `intercept-agent status --shadow`",
            cgroup.path().display()
        );
    }
    let maps = node.open_maps()?;
    let cgroups = node.open_cgroups(&record)?;
    // A probe may take seconds, and the node's lock is not held meanwhile.
    drop(node);
    let netns = match record.netns()? {
        Some(netns) => netns,
        None => Netns::of_cgroup(&cgroup)?,
    };
    // The probe runs in the first, which is the one that was named.
    let others = cgroups.iter().filter(|other| other.id() != cgroup.id());
    let cgroups: Vec<_> = std::iter::once(&cgroup).chain(others).collect();
    let probed =
        Probed { cgroups: &cgroups, netns: &netns, policy: &policy, config: &record.config, maps: &maps };
    Ok(probed.prove()?)
}
