//! `audit`: which sockets of a captured pod go around the proxy, and why.

use anyhow::{Context as _, Result, bail};

use super::print_line;
use crate::{
    audit::{Audit, Audited, Bypass, ObservedSockets},
    cli::InspectArgs,
    netns::Netns,
    node::Node,
    record::netns_of,
};

pub(super) fn audit(args: &InspectArgs) -> Result<()> {
    let audit = of_cgroup(args)?;
    if args.json {
        print_line!("{}", serde_json::to_string_pretty(&audit)?);
        return Ok(());
    }
    print_line!("{} connections captured, {} sockets of the proxy", audit.captured, audit.proxy);
    for (reason, count) in &audit.passed {
        print_line!("{count} left alone by the rules ({reason})");
    }
    if audit.bypasses.is_empty() {
        print_line!("nothing goes around the proxy");
    }
    for bypass in &audit.bypasses {
        print_line!("around the proxy: {}", line(bypass));
    }
    Ok(())
}

fn of_cgroup(args: &InspectArgs) -> Result<Audit> {
    let cgroup = args.attachment.open()?;
    let absent = || {
        let path = cgroup.path().display();
        format!("cgroup {path} is not attached: attach it first with `intercept-agent attach`")
    };
    let (record, cgroups) = {
        let node = Node::find(&args.bpffs.bpffs)?.with_context(absent)?;
        let (cookie, _) = node.pod_of_cgroup(cgroup.id())?.with_context(absent)?;
        let record = node.record_of(cookie)?;
        let cgroups =
            record.as_ref().map(|record| node.open_cgroups(record)).transpose()?.unwrap_or_default();
        (record, cgroups)
    };
    let netns = match netns_of(record.as_ref())? {
        Some(netns) => netns,
        None => Netns::of_cgroup(&cgroup)?,
    };
    let cgroups = if cgroups.is_empty() { vec![&cgroup] } else { cgroups.iter().collect() };
    // Reading the sockets may take long, and the node's lock is not held meanwhile.
    let observed = ObservedSockets::of(&cgroups, &netns)?;
    let node = Node::find(&args.bpffs.bpffs)?.with_context(absent)?;
    let Some(policy) = node.maps().policy(netns.cookie())? else { bail!(absent()) };
    let audit = node.maps().look_up(|lookup| {
        let audited = Audited {
            observed: &observed,
            cookie: netns.cookie(),
            policy: &policy,
            since: record.map_or(0, |record| record.since),
            lookup,
            original: &|key| lookup.original(key),
        };
        audited.audit()
    });
    Ok(audit?)
}

fn line(bypass: &Bypass) -> String {
    let mut line = bypass.cause.as_str().to_owned();
    for word in [bypass.direction, bypass.protocol].into_iter().flatten() {
        line.push_str(&format!(" {word}"));
    }
    if let (Some(local), Some(remote)) = (bypass.local, bypass.remote) {
        line.push_str(&format!(" {local} -> {remote}"));
    }
    if let (Some(process), Some(pid)) = (&bypass.process, bypass.pid) {
        line.push_str(&format!(" {process}[{pid}]"));
    }
    if let Some(uid) = bypass.uid {
        line.push_str(&format!(" uid {uid}"));
    }
    if let Some(cgroup) = &bypass.cgroup {
        line.push_str(&format!(" cgroup {cgroup}"));
    }
    if let Some(reason) = bypass.reason {
        line.push_str(&format!(" ({reason})"));
    }
    line
}
