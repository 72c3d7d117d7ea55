//! `status`: attached pods and their counters.

use anyhow::Result;
use intercept_common::layout::{ListenerKey, PodPolicy};
use serde::Serialize;

use super::print_line;
use crate::{
    cgroup::CgroupDir,
    cli::StatusArgs,
    daemon::{
        protocol::{DaemonRequest, Response},
        report::PodReport,
        socket,
    },
    escape::{self, OneLine},
    ids::{CookieNumber, NetnsCookie, PolicyId, PolicyNumber},
    maps::PolicyUsage,
    node::{BrokenPod, Node, remaining},
    record::Record,
};

/// A pod in the output of `--json`. Its names are stable.
#[derive(Serialize)]
struct PodStatus {
    cgroup: std::path::PathBuf,
    /// Further cgroups of a machine's workload.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    more_cgroups: Vec<std::path::PathBuf>,
    /// Seconds until it is taken off, unless it is confirmed.
    #[serde(skip_serializing_if = "Option::is_none")]
    expires_in: Option<u64>,
    netns_inode: u64,
    #[serde(with = "CookieNumber")]
    netns_cookie: NetnsCookie,
    state: &'static str,
    /// `shadow` or `enforce`.
    mode: &'static str,
    since: u64,
    /// Present while rules of iptables are saved that `cutover` takes out or puts in.
    #[serde(skip_serializing_if = "Option::is_none")]
    cutover: Option<CutoverStatus>,
    arguments: Vec<String>,
    environment: Vec<(&'static str, String)>,
    #[serde(with = "PolicyNumber")]
    policy: PolicyId,
    connections: u64,
    max_connections: u32,
    /// Use of the pod's budget in each map.
    room: Vec<BudgetUsage>,
    listeners: Vec<ListenerStatus>,
    mptcp_listeners: Vec<ListenerStatus>,
    /// Listening sockets of a machine's applications, by which inbound connections are the workload's.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    applications: Vec<ListenerStatus>,
    decisions: Vec<ReasonCount>,
    failures: Vec<ReasonCount>,
    /// Present if the options ask for it or it is still switched on.
    acceleration: Option<AccelerationStatus>,
    /// The daemon's report on the pod, if a daemon runs.
    daemon: Option<PodReport>,
}

/// An attached pod whose record cannot be read.
#[derive(Serialize)]
struct BrokenStatus {
    #[serde(with = "CookieNumber")]
    netns_cookie: NetnsCookie,
    cgroup_id: Option<u64>,
    state: &'static str,
    #[serde(with = "PolicyNumber")]
    policy: PolicyId,
    problem: String,
}

#[derive(Serialize)]
#[serde(untagged)]
enum Listed {
    PodStatus(Box<PodStatus>),
    BrokenStatus(BrokenStatus),
}

impl BrokenStatus {
    fn of(node: &Node, pod: &BrokenPod) -> Result<Self> {
        let problem = pod.error.to_string();
        let cgroup_id = node.cgroup_of(pod.cookie)?;
        Ok(Self { netns_cookie: pod.cookie, cgroup_id, state: "broken", policy: pod.policy.id, problem })
    }
}

/// Joined connections between this pod's proxy and other proxies of the node.
#[derive(Serialize)]
struct AccelerationStatus {
    state: &'static str,
    connections: Vec<ReasonCount>,
    back_to_tcp: Vec<ReasonCount>,
}

/// Rules of iptables that capture the pod without the agent.
#[derive(Serialize)]
struct CutoverStatus {
    /// `out`, or `in` and `changing` if the last `cutover` was interrupted.
    rules: &'static str,
    since: u64,
}

#[derive(Serialize)]
struct ListenerStatus {
    port: u16,
    family: u8,
}

/// A pod's entries in a map, and its budget.
#[derive(Serialize)]
struct BudgetUsage {
    map: &'static str,
    used: usize,
    limit: u32,
}

impl BudgetUsage {
    fn of(usage: &PolicyUsage) -> Vec<Self> {
        usage.by_map().map(|(map, used, limit)| Self { map, used, limit }).into()
    }
}

#[derive(Serialize)]
struct ReasonCount {
    reason: &'static str,
    count: u64,
}

pub(super) fn status(args: &StatusArgs) -> Result<()> {
    let only = args.cgroup_path.as_ref().map(CgroupDir::open_any).transpose()?.map(|cgroup| cgroup.id());
    let mut reports = match socket::request(&args.socket.socket, &DaemonRequest::Report) {
        Ok(Response::Pods(reports)) => reports,
        // Without a running daemon or access to it, the output shows only the state of the kernel.
        Ok(_) | Err(_) => Vec::new(),
    };
    let mut pods = Vec::new();
    let mut broken = Vec::new();
    if let Some(node) = Node::find(&args.bpffs.bpffs)? {
        let found = node.pods()?;
        let usage = node.maps().usage()?;
        broken = found.broken.iter().map(|pod| BrokenStatus::of(&node, pod)).collect::<Result<_>>()?;
        broken.retain(|pod| only.is_none() || pod.cgroup_id == only);
        for (record, policy) in found.readable {
            if only.is_none_or(|id| id == record.cgroup_id)
                || node.cgroups_of(record.cookie)?.iter().any(|id| Some(*id) == only)
            {
                let its = reports.iter().position(|report| report.netns_cookie == Some(record.cookie.0));
                let daemon = its.map(|at| reports.swap_remove(at));
                let room = BudgetUsage::of(&usage.get(&policy.id).copied().unwrap_or_default());
                pods.push(PodStatus { daemon, room, ..pod(&node, &record, &policy)? });
            }
        }
    }
    if args.json {
        let all: Vec<Listed> = pods
            .into_iter()
            .map(|pod| Listed::PodStatus(Box::new(pod)))
            .chain(broken.into_iter().map(Listed::BrokenStatus))
            .collect();
        print_line!("{}", escape::pretty_json(&all)?);
        return Ok(());
    }
    if pods.is_empty() && broken.is_empty() {
        print_line!("nothing is attached");
    } else {
        pods.iter().for_each(print);
        for pod in &broken {
            print_line!("cookie {} (broken): {}", pod.netns_cookie, pod.problem);
        }
    }
    if only.is_none() {
        for report in reports.iter().filter(|report| report.failure.is_some()) {
            print_daemon(report);
        }
    }
    Ok(())
}

fn pod(node: &Node, record: &Record, policy: &PodPolicy) -> Result<PodStatus> {
    let counters = node.maps().counters(policy.slot)?;
    let count = |(reason, count): (&'static str, u64)| (count > 0).then_some(ReasonCount { reason, count });
    let decisions = counters.by_reason().map(|(reason, count)| (reason.as_str(), count));
    let listeners = node.maps().listeners(record.cookie)?;
    let failures = counters.by_failure().map(|(failure, count)| (failure.as_str(), count));
    Ok(PodStatus {
        cgroup: record.cgroup.clone(),
        more_cgroups: record.also.clone(),
        expires_in: remaining(policy).map(|time| time.as_secs()),
        netns_inode: record.netns_inode,
        netns_cookie: record.cookie,
        state: if node.cgroup_of(record.cookie)?.is_some() { "attached" } else { "gone" },
        mode: if record.config.shadow { "shadow" } else { "enforce" },
        since: record.since,
        cutover: node
            .store()
            .saved_rules(record.cookie)?
            .map(|saved| CutoverStatus { rules: saved.state.as_str(), since: saved.since }),
        arguments: record.config.to_args(),
        environment: record.config.to_env(),
        policy: policy.id,
        connections: node.maps().connections(policy.slot),
        room: Vec::new(),
        listeners: listed(&listeners, |key| !key.is_application()),
        applications: listed(&listeners, ListenerKey::is_application),
        mptcp_listeners: node
            .maps()
            .mptcp_listeners(policy)
            .into_iter()
            .map(|(port, family)| ListenerStatus { port, family })
            .collect(),
        max_connections: policy.max_connections,
        decisions: decisions.filter_map(count).collect(),
        failures: failures.filter_map(count).collect(),
        acceleration: acceleration(node, record, policy)?,
        daemon: None,
    })
}

fn listed(keys: &[ListenerKey], is_listed: impl Fn(&ListenerKey) -> bool) -> Vec<ListenerStatus> {
    let keys = keys.iter().filter(|key| is_listed(key));
    keys.map(|key| ListenerStatus { port: key.port, family: key.family }).collect()
}

fn acceleration(node: &Node, record: &Record, policy: &PodPolicy) -> Result<Option<AccelerationStatus>> {
    let asked_for = !record.config.accelerate.is_empty();
    let none = AccelerationStatus { state: "refused", connections: Vec::new(), back_to_tcp: Vec::new() };
    let Some((acceleration, pod)) = node.acceleration(record.cookie, policy.slot)? else {
        return Ok(asked_for.then_some(none));
    };
    let state = match (acceleration.is_on(pod), acceleration.node_is_on()?) {
        (true, true) => "on",
        (true, false) => "switched off on this node",
        (false, _) => "refused",
    };
    if state == "refused" {
        return Ok(asked_for.then_some(none));
    }
    let counts = |words: Vec<(&'static str, u64)>| {
        words.into_iter().map(|(reason, count)| ReasonCount { reason, count }).collect()
    };
    let counted = acceleration.counted(pod)?;
    let (connections, back_to_tcp) = (counts(counted.connections), counts(counted.back_to_tcp));
    Ok(Some(AccelerationStatus { state, connections, back_to_tcp }))
}

fn print(pod: &PodStatus) {
    let is_shadow = pod.mode == "shadow";
    let mode = if is_shadow { ", shadow mode: changes nothing (see status --shadow)" } else { "" };
    print_line!("{} ({}{mode}, cookie {})", OneLine(pod.cgroup.display()), pod.state, pod.netns_cookie);
    if pod.state == "gone" {
        print_line!(
            "  gone         with its cgroup or its namespace; the next attach or detach removes what is left"
        );
    }
    if let Some(CutoverStatus { rules, .. }) = &pod.cutover {
        let unfinished = "an interrupted cutover: run `intercept-agent cutover` again, or with --back";
        let state =
            if *rules == "out" { "out: cut over (cutover --back puts them in again)" } else { unfinished };
        print_line!("  rules        {state}");
    }
    for cgroup in &pod.more_cgroups {
        print_line!("  and          {}", OneLine(cgroup.display()));
    }
    if let Some(seconds) = pod.expires_in {
        print_line!("  unconfirmed  taken off in {seconds} s, unless `intercept-agent confirm` is run");
    }
    print_line!("  options      {}", OneLine(pod.arguments.join(" ")));
    for (name, value) in &pod.environment {
        print_line!("               {name}={}", OneLine(value));
    }
    pod.daemon.iter().for_each(print_daemon);
    print_line!("  connections  {} redirected, of {} at most", pod.connections, pod.max_connections);
    let room: Vec<String> = pod.room.iter().map(|r| format!("{} {} of {}", r.map, r.used, r.limit)).collect();
    print_line!("  room         {}", room.join(", "));
    let ports = named(&pod.listeners);
    let none =
        if is_shadow { "not registered in shadow mode" } else { "none: inbound connections are refused" };
    print_line!("  listeners    {}", if ports.is_empty() { none.to_owned() } else { ports.join(", ") });
    if !pod.applications.is_empty() {
        print_line!("  applications {}", named(&pod.applications).join(", "));
    }
    for listener in &pod.mptcp_listeners {
        print_line!(
            "               {} (IPv{}) listens with MPTCP and gets no inbound connections: restart the proxy, which then listens with \
             TCP (or set GODEBUG=multipathtcp=0 for it)",
            listener.port,
            listener.family
        );
    }
    if let Some(AccelerationStatus { state, connections, back_to_tcp }) = &pod.acceleration {
        print_line!("  acceleration {state}");
        for ReasonCount { reason, count } in connections {
            print_line!("  {count:>12}  {reason}");
        }
        for ReasonCount { reason, count } in back_to_tcp {
            print_line!("  {count:>12}  back to TCP: {reason}");
        }
    }
    for ReasonCount { reason, count } in &pod.decisions {
        print_line!("  {count:>12}  {reason}");
    }
    for ReasonCount { reason, count } in &pod.failures {
        print_line!("  {count:>12}  FAILED {reason}");
    }
}

fn named(listeners: &[ListenerStatus]) -> Vec<String> {
    let mut ports: Vec<String> = listeners.iter().map(|l| format!("{} (IPv{})", l.port, l.family)).collect();
    ports.sort();
    ports.dedup();
    ports
}

fn print_daemon(report: &PodReport) {
    let verified = match report.links_verified_seconds_ago {
        Some(seconds) => format!("links verified {seconds} s ago"),
        None => "links never verified".to_owned(),
    };
    print_line!("  daemon       {} is {}, {verified}", OneLine(&report.name), report.state.as_str());
    if let Some(mode) = &report.mode {
        print_line!("  mode         {}", OneLine(mode));
    }
    if let Some(proof) = &report.proof {
        let ago =
            proof.proven_seconds_ago.map(|ago| format!(", last proven {ago} s ago")).unwrap_or_default();
        print_line!("  proof        {}{ago}", proof.state);
        if let Some(problem) = &proof.failure {
            print_line!("               {} ({})", OneLine(&problem.text), problem.cause);
        }
        for (cause, count) in &proof.bypasses {
            print_line!("  {count:>12}  sockets around the proxy: {cause}");
        }
    }
    if let Some(cutover) = &report.cutover {
        print_line!("  cutover      {}", cutover.state.as_str());
        if let Some(problem) = &cutover.failure {
            print_line!("               {} ({})", OneLine(&problem.text), problem.cause);
        }
    }
    if let Some(problem) = &report.failure {
        print_line!("               {} ({} attempts failed)", OneLine(&problem.text), report.failures);
    }
}
