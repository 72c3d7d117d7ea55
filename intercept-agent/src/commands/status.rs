//! `status`: what is attached, and its counters.

use anyhow::Result;
use intercept_agent::{
    cgroup::CgroupDir,
    daemon::{
        protocol::{Request, Response},
        reconcile::Report,
        socket,
    },
    node::Node,
    store::Record,
};
use intercept_common::{Reason, failure::Failure, layout::PodPolicy};
use serde::Serialize;

use super::say;
use crate::cli::StatusArgs;

/// One pod, as `--json` prints it. The names are stable.
#[derive(Serialize)]
struct Pod {
    cgroup: std::path::PathBuf,
    netns_inode: u64,
    netns_cookie: u64,
    state: &'static str,
    since: u64,
    arguments: Vec<String>,
    environment: Vec<(&'static str, String)>,
    policy: u32,
    connections: u64,
    max_connections: u32,
    listeners: Vec<Listener>,
    mptcp_listeners: Vec<Listener>,
    decisions: Vec<Count>,
    failures: Vec<Count>,
    /// Where the options ask for it, or it is still on.
    acceleration: Option<Acceleration>,
    /// What the daemon says of it, where one runs.
    daemon: Option<Report>,
}

/// What became of connections between this pod's proxy and others of the node.
#[derive(Serialize)]
struct Acceleration {
    state: &'static str,
    connections: Vec<Count>,
    back_to_tcp: Vec<Count>,
}

#[derive(Serialize)]
struct Listener {
    port: u16,
    family: u8,
}

#[derive(Serialize)]
struct Count {
    reason: &'static str,
    count: u64,
}

pub(super) fn status(args: &StatusArgs) -> Result<()> {
    let only = args.cgroup_path.as_ref().map(CgroupDir::open).transpose()?.map(|cgroup| cgroup.id());
    let mut reports = match socket::request(&args.socket.socket, &Request::Report) {
        Ok(Response::Pods(reports)) => reports,
        // Without a daemon, or without the right to ask it, there is what the kernel knows.
        Ok(_) | Err(_) => Vec::new(),
    };
    let mut pods = Vec::new();
    if let Some(node) = Node::find(&args.bpffs.bpffs)? {
        for (record, policy) in node.pods()? {
            if only.is_none_or(|id| id == record.cgroup_id) {
                let its = reports.iter().position(|report| report.netns_cookie == Some(record.cookie));
                let daemon = its.map(|at| reports.swap_remove(at));
                pods.push(Pod { daemon, ..pod(&node, &record, &policy)? });
            }
        }
    }
    if args.json {
        say!("{}", serde_json::to_string_pretty(&pods)?);
    } else if pods.is_empty() {
        say!("nothing is attached");
    } else {
        pods.iter().for_each(print);
    }
    if !args.json && only.is_none() {
        for report in reports.iter().filter(|report| report.problem.is_some()) {
            print_daemon(report);
        }
    }
    Ok(())
}

fn pod(node: &Node, record: &Record, policy: &PodPolicy) -> Result<Pod> {
    let counters = node.tables().counters(policy.slot)?;
    let count =
        |(reason, count): (&'static str, &u64)| (*count > 0).then_some(Count { reason, count: *count });
    let (decisions, failures) = counters.counts.split_at(Reason::ALL.len());
    Ok(Pod {
        cgroup: record.cgroup.clone(),
        netns_inode: record.netns_inode,
        netns_cookie: record.cookie,
        state: if node.cgroup_of(record.cookie).is_some() { "attached" } else { "gone" },
        since: record.since,
        arguments: record.config.to_args(),
        environment: record.config.to_env(),
        policy: policy.id,
        connections: node.tables().connections(policy.slot),
        listeners: node
            .tables()
            .listeners(record.cookie)
            .into_iter()
            .map(|key| Listener { port: key.port, family: key.family })
            .collect(),
        mptcp_listeners: node
            .tables()
            .mptcp_listeners(policy)
            .into_iter()
            .map(|(port, family)| Listener { port, family })
            .collect(),
        max_connections: policy.max_connections,
        decisions: Reason::ALL.iter().map(|r| r.word()).zip(decisions).filter_map(count).collect(),
        failures: Failure::ALL.iter().map(|f| f.word()).zip(failures).filter_map(count).collect(),
        acceleration: acceleration(node, record, policy)?,
        daemon: None,
    })
}

fn acceleration(node: &Node, record: &Record, policy: &PodPolicy) -> Result<Option<Acceleration>> {
    let asked_for = !record.config.accelerate.is_empty();
    let none = Acceleration { state: "refused", connections: Vec::new(), back_to_tcp: Vec::new() };
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
        words.into_iter().map(|(reason, count)| Count { reason, count }).collect()
    };
    let counted = acceleration.counted(pod)?;
    let (connections, back_to_tcp) = (counts(counted.connections), counts(counted.back_to_tcp));
    Ok(Some(Acceleration { state, connections, back_to_tcp }))
}

fn print(pod: &Pod) {
    say!("{} ({}, cookie {})", pod.cgroup.display(), pod.state, pod.netns_cookie);
    say!("  options      {}", pod.arguments.join(" "));
    for (name, value) in &pod.environment {
        say!("               {name}={value}");
    }
    pod.daemon.iter().for_each(print_daemon);
    say!("  connections  {} redirected, of {} at most", pod.connections, pod.max_connections);
    let mut ports: Vec<String> =
        pod.listeners.iter().map(|l| format!("{} (IPv{})", l.port, l.family)).collect();
    ports.sort();
    ports.dedup();
    let none = "none: inbound connections are refused".to_owned();
    say!("  listeners    {}", if ports.is_empty() { none } else { ports.join(", ") });
    for listener in &pod.mptcp_listeners {
        say!(
            "               {} (IPv{}) is of MPTCP, which gets no inbound connections: restart the proxy, and it is given \
             TCP (or set GODEBUG=multipathtcp=0 for it)",
            listener.port,
            listener.family
        );
    }
    if let Some(Acceleration { state, connections, back_to_tcp }) = &pod.acceleration {
        say!("  acceleration {state}");
        for Count { reason, count } in connections {
            say!("  {count:>12}  {reason}");
        }
        for Count { reason, count } in back_to_tcp {
            say!("  {count:>12}  back to TCP: {reason}");
        }
    }
    for Count { reason, count } in &pod.decisions {
        say!("  {count:>12}  {reason}");
    }
    for Count { reason, count } in &pod.failures {
        say!("  {count:>12}  FAILED {reason}");
    }
}

fn print_daemon(report: &Report) {
    let proven = match report.proven_seconds_ago {
        Some(seconds) => format!("links seen in place {seconds} s ago"),
        None => "never seen in place".to_owned(),
    };
    say!("  daemon       {} is {}, {proven}", report.name, report.state.word());
    if let Some(problem) = &report.problem {
        say!("               {} ({} attempts failed)", problem.text, report.failures);
    }
}
