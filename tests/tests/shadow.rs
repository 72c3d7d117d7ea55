//! Shadow mode beside real iptables: it agrees where the agent does, finds a rule that differs, and changes nothing.

use std::{
    net::SocketAddr,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use intercept_common::Family;
use tests::actor::{Actor, Bind, Listen, Transport};
use tests::agent::Agent;
use tests::daemon::{OUTBOUND, answers, proxy};
use tests::differential::{
    Capture, Case, End, Flow, FlowKind, Observed, compare, configurations, observe, observe_prepared, random,
};
use tests::iptables::{Backend, IptablesOptions};
use tests::status::ShadowEntry;
use tests::steps::{self, SocketKind, Step};
use tests::testbed::{Ids, Pod, PodSpec};

fn agent_path() -> std::path::PathBuf {
    let Capture::Agent(agent) = Capture::agent().expect("the agent") else { unreachable!("it is an agent") };
    agent
}

fn shadow_of(pod: &Pod) -> Result<ShadowEntry> {
    let output = Command::new(agent_path())
        .args(["status", "--shadow", "--json", "--cgroup-path"])
        .arg(pod.cgroup.path())
        .output()?;
    ensure!(output.status.success(), "status: {}", String::from_utf8_lossy(&output.stderr));
    let mut pods: Vec<ShadowEntry> = serde_json::from_slice(&output.stdout)?;
    pods.pop().context("a pod in shadow mode")
}

fn cases(flows: usize) -> Vec<Case> {
    let all = configurations::fixed().into_iter().zip(1..);
    let only = std::env::var("INTERCEPT_CASE").ok();
    all.filter(|((name, _), _)| only.as_ref().is_none_or(|only| only == name))
        .map(|((name, options), seed)| random::case_of(name, options, seed, flows))
        .collect()
}

fn agrees_and_changes_nothing(backend: Backend, flows: usize) {
    let shadowed = Capture::Shadowed(backend, agent_path());
    let mut reports = Vec::new();
    for case in cases(flows) {
        let alone = observe(&case, &Capture::Iptables(backend)).expect("observed");
        let (beside, shadow) = observe_prepared(&case, &shadowed, |_| Ok(()), shadow_of).expect("observed");
        println!("{}: {} compared, {} not", case.origin, shadow.compared, shadow.uncompared);
        reports.extend(compare::with_iptables(&case, &alone, &beside));
        for found in &shadow.differences {
            reports.push(format!("{}: {found:?}", case.origin));
        }
        let answered = beside.iter().filter(|seen| matches!(seen, Observed::Connection(_))).count();
        if shadow.uncompared > 0 || shadow.compared < answered as u64 {
            reports.push(format!("{}: of {answered} answered flows only {shadow:?}", case.origin));
        }
    }
    assert!(reports.is_empty(), "{}", reports.join("\n"));
}

#[test]
fn fixed_configurations_agree_with_iptables_nft() {
    agrees_and_changes_nothing(Backend::Nft, 400);
}

#[test]
fn fixed_configurations_agree_with_iptables_legacy() {
    agrees_and_changes_nothing(Backend::Legacy, 100);
}

/// Without iptables a flow that the programs changed would reach the proxy. Beside iptables it would reach it anyway.
#[test]
fn alone_it_leaves_every_flow_as_it_is() {
    let alone = Capture::ShadowAlone(agent_path());
    let mut reports = Vec::new();
    for case in cases(200) {
        let uncaptured = observe(&case, &Capture::Nothing).expect("observed");
        let (shadowed, shadow) = observe_prepared(&case, &alone, |_| Ok(()), shadow_of).expect("observed");
        reports.extend(compare::with_iptables(&case, &uncaptured, &shadowed));
        if case.origin.contains("injected") {
            let differing = |reason: &str| {
                shadow.differences.iter().any(|found| found.reason == reason && found.actual == "passed")
            };
            assert!(differing("included_cidr") && differing("inbound_all"), "{shadow:?}");
        }
    }
    assert!(reports.is_empty(), "{}", reports.join("\n"));
}

/// A rule that a person has added to the pod is found by the first connection that it concerns, and by that alone.
#[test]
fn a_rule_changed_by_hand_is_found_by_the_first_connection() {
    let options = IptablesOptions::injected();
    let drawn = random::case_of("changed", options.clone(), 7, 400);
    let concerned = |flow: &Flow| flow.kind == FlowKind::Tcp && flow.end == End::Pod && flow.to.port() == 443;
    let outside: SocketAddr = "198.51.100.7:443".parse().expect("an address");
    let flow = |to| Flow { end: End::Pod, ids: Ids::APP, kind: FlowKind::Tcp, to, from: None, mapped: false };
    let mut flows: Vec<Flow> = drawn.flows.into_iter().filter(|flow| !concerned(flow)).collect();
    let shadowed = Capture::Shadowed(Backend::Nft, agent_path());
    let exclude = |pod: &Pod| -> Result<()> {
        let rule = ["-t", "nat", "-I", "ISTIO_OUTPUT", "1", "-p", "tcp", "--dport", "443", "-j", "RETURN"];
        ensure!(pod.command("iptables-nft")?.args(rule).status()?.success(), "iptables refused the rule");
        Ok(())
    };
    let case = |flows: Vec<Flow>| Case { flows, ..random::case_of("changed", options.clone(), 7, 0) };
    let (_, shadow) = observe_changed(&case(flows.clone()), &shadowed, exclude).expect("observed");
    assert_eq!(shadow.differed, 0, "{shadow:?}");
    flows.push(flow(outside));
    let (_, shadow) = observe_changed(&case(flows), &shadowed, exclude).expect("observed");
    let [found] = &shadow.differences[..] else { panic!("one difference: {shadow:?}") };
    assert_eq!((shadow.differed, found.count), (1, 1), "{shadow:?}");
    assert_eq!(found.reason, "included_cidr");
    assert_eq!((found.expected.as_str(), found.actual.as_str()), ("redirected to outbound", "passed"));
    assert_eq!(found.first.destination, outside);
    assert_eq!((found.first.uid, found.first.gid), (Some(Ids::APP.uid), Some(Ids::APP.gid)));
}

/// Both connections have one source and end at the proxy, which asks for their destinations when both are established.
#[test]
fn connections_from_one_port_are_told_apart() {
    let options = IptablesOptions::injected();
    let pod = Pod::new(PodSpec::new("one-port")).expect("a pod");
    let actor = Actor::start(&pod).expect("an actor");
    for port in [15001, 15006] {
        let bind = Bind::new(Ids::PROXY, SocketAddr::from(([0, 0, 0, 0], port)));
        actor.listen(Listen { name: "proxy".into(), transport: Transport::Tcp, bind }).expect("a proxy");
    }
    let shadowed = Capture::Shadowed(Backend::Nft, agent_path());
    let captured = shadowed.start(&options, &pod).expect("captured");
    let own = pod.address(Family::V4);
    let steps = |to| {
        let source = SocketAddr::new(own, 4242);
        [Step::Open(SocketKind::Tcp4), Step::ReuseAddress, Step::Bind(source), Step::Connect(to), Step::Read]
    };
    let outbound = steps(SocketAddr::from(([10, 96, 0, 10], 80)));
    let to_itself = steps(SocketAddr::new(own, 8080));
    let signal = |name: &str| {
        let sent = Command::new("kill").args([name, &actor.pid().to_string()]).status().expect("kill");
        assert!(sent.success());
    };
    signal("-STOP");
    thread::scope(|scope| {
        for (ids, steps) in [(Ids::APP, &outbound), (Ids::PROXY, &to_itself)] {
            let pod = &pod;
            scope.spawn(move || {
                let outcomes = steps::run(pod, ids, steps).expect("run");
                assert!(outcomes[4].contains("proxy"), "{outcomes:?}");
            });
        }
        let since = Instant::now();
        while shadow_of(&pod).expect("status").compared < 2 {
            assert!(since.elapsed() < Duration::from_secs(10), "not established");
            thread::sleep(Duration::from_millis(50));
        }
        signal("-CONT");
    });
    let shadow = shadow_of(&pod).expect("status");
    assert_eq!((shadow.compared, shadow.differed, shadow.uncompared), (2, 0, 0), "{shadow:?}");
    captured.stop().expect("stopped");
}

fn observe_changed(
    case: &Case,
    capture: &Capture,
    change: impl FnOnce(&Pod) -> Result<()>,
) -> Result<(Vec<Observed>, ShadowEntry)> {
    observe_prepared(case, capture, change, shadow_of)
}

#[test]
fn run_logs_each_kind_of_difference_once() {
    // Longer than the time between two looks.
    const LOOK: Duration = Duration::from_secs(6);
    let agent = Agent::new("shadow-run").expect("the agent");
    let pod = Pod::new(PodSpec::new("run")).expect("a pod");
    let actor = proxy(&pod);
    let bind = Bind::new(Ids::APP, SocketAddr::from(([0, 0, 0, 0], 8081)));
    actor.listen(Listen { name: "other".into(), transport: Transport::Tcp, bind }).expect("a server");
    let changed = SocketAddr::from(([10, 96, 0, 12], 80));
    let rule = [
        "-t",
        "nat",
        "-A",
        "OUTPUT",
        "-p",
        "tcp",
        "-d",
        "10.96.0.12",
        "-j",
        "REDIRECT",
        "--to-ports",
        "8081",
    ];
    assert!(pod.command("iptables-nft").expect("a command").args(rule).status().expect("run").success());
    let flags = [&OUTBOUND[..], &["--shadow"]].concat();
    let (running, _) = agent.run(&pod, &flags).expect("running");
    for _ in 0..2 {
        assert_eq!(answers(&actor, changed).as_deref(), Some("other"));
        thread::sleep(LOOK);
    }
    let (status, log) = running.terminate().expect("ended");
    assert!(status.success(), "{log}");
    let said: Vec<_> = log.lines().filter(|line| line.contains("shadow mode differs")).collect();
    assert!(said.len() == 1 && said[0].contains("to 10.96.0.12:80 by "), "{log}");
}
