//! The budget of a pod in each shared map. More is refused with the figure and the limit before anything is written.

use std::{
    fmt::Write as _,
    fs,
    io::Write as _,
    ops::Range,
    process::Stdio,
    time::{Duration, Instant},
};

use intercept_agent::facade::{maps::Maps, routes::MAX_ENTRIES};
use intercept_common::layout::budget;
use tests::{
    agent::{Agent, finish, succeed},
    snapshot::{Snapshot, tree},
    testbed::{Pod, PodSpec, Sandbox},
};

/// Feeds these lines to `ip -batch` in a pod.
fn ip(sandbox: &Sandbox, lines: &str) {
    let mut child = sandbox
        .command("ip")
        .expect("iproute2")
        .args(["-batch", "-"])
        .stdin(Stdio::piped())
        .spawn()
        .expect("ip starts");
    child.stdin.take().expect("a pipe").write_all(lines.as_bytes()).expect("written");
    assert!(child.wait().expect("ended").success());
}

fn routes(numbers: Range<usize>) -> String {
    let mut lines = String::new();
    for n in numbers {
        let (a, b, c) = (11 + n / 65536, n / 256 % 256, n % 256);
        writeln!(lines, "route add {a}.{b}.{c}.0/24 dev eth0").expect("a string");
    }
    lines
}

fn refused(agent: &Agent, pod: &Sandbox, flags: &[&str]) -> String {
    let output = finish(&mut agent.for_pod("attach", pod, flags)).expect("started");
    assert!(!output.status.success());
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn a_range_of_all_ports_costs_no_more_than_its_prefixes() {
    let agent = Agent::new("ports").expect("the agent");
    let pods = ["one", "two", "three"].map(|label| Sandbox::new(label).expect("a place"));
    for pod in &pods {
        let ranges = ["-o", "1:65535", "-b", "*", "-d", "2:65534"];
        agent.attach(pod, &[&["-i", "*"][..], &ranges].concat()).expect("attached");
    }
    let maps = agent.store().join("maps");
    let usage = Maps::open(&maps).and_then(|tables| tables.usage()).expect("read");
    assert_eq!(usage.len(), pods.len());
    assert!(usage.values().all(|usage| (16..64).contains(&usage.ports)), "{usage:?}");
    let pods = agent.pods().expect("a status");
    let room = &pods[0].room[1];
    assert_eq!((room.map.as_str(), room.limit), ("PORTS", budget::PORTS), "{room:?}");
    assert_eq!(room.used, usage.values().next().expect("one").ports, "{room:?}");
}

#[test]
fn more_ports_than_a_pod_may_have_are_refused() {
    let agent = Agent::new("too-many").expect("the agent");
    let (pod, other) = (Sandbox::new("too-many").expect("a place"), Sandbox::new("beside").expect("a place"));
    agent.attach(&other, &["-i", "*", "-o", "22"]).expect("attached");
    let (pins, before) = (tree(agent.bpffs()).expect("a tree"), Snapshot::of(&pod).expect("a snapshot"));
    // No two of them share a prefix. The agent uses one more itself.
    let list = |count: u32| (0..count).map(|n| (2 * n + 1).to_string()).collect::<Vec<_>>().join(",");
    let error = refused(&agent, &pod, &["-i", "*", "-o", &list(budget::PORTS)]);
    let figure = format!(
        "the pod needs {} prefixes of its lists of ports, and may have {}",
        budget::PORTS + 1,
        budget::PORTS
    );
    assert!(error.contains(&figure), "{error}");
    assert_eq!(tree(agent.bpffs()).expect("a tree"), pins);
    assert_eq!(before.difference(&Snapshot::of(&pod).expect("a snapshot")), [""; 0]);
    // Exactly the budget.
    agent.attach(&pod, &["-i", "*", "-o", &list(budget::PORTS - 1)]).expect("attached");
    agent.detach(&pod).expect("detached");
}

/// Routes to the same target as a wider route need no entries. Too many routes are refused, at little cost.
#[test]
fn a_quarter_of_a_million_routes_are_refused_with_the_figure() {
    let agent = Agent::new("routes").expect("the agent");
    let pod = Pod::new(PodSpec::new("routes")).expect("a pod");
    ip(&pod, &routes(0..MAX_ENTRIES - 64));
    agent.attach(&pod, &["-i", "*"]).expect("attached");
    agent.detach(&pod).expect("detached");
    ip(&pod, &routes(MAX_ENTRIES - 64..250_000));
    let attach = agent.for_pod("attach", &pod, &["-i", "*"]);
    // No more than half of what the chart gives the agent's container.
    let mut limited = std::process::Command::new("prlimit");
    limited.arg("--data=64000000").arg(attach.get_program()).args(attach.get_args());
    let started = Instant::now();
    let output = limited.output().expect("started");
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success());
    assert!(error.contains("there are 2") && error.contains(&format!("at most {MAX_ENTRIES}")), "{error}");
    assert!(started.elapsed() < Duration::from_secs(20), "{:?}", started.elapsed());
    assert!(!agent.store().exists(), "nothing was loaded");
}

#[test]
fn a_cgroup_inside_a_captured_one_is_refused_and_the_other_way_round() {
    let agent = Agent::new("nested").expect("the agent");
    let (outer, inner) = (Sandbox::new("outer").expect("a place"), Sandbox::new("inner").expect("a place"));
    let below = outer.cgroup.path().join("below/deeper");
    fs::create_dir_all(&below).expect("made");
    let attach = |cgroup: &std::path::Path, pod: &Sandbox| {
        let mut command = agent.command("attach");
        command.arg("--cgroup-path").arg(cgroup).arg("--netns").arg(pod.netns.path()).args(["-i", "*"]);
        command
    };
    for (first, then) in [
        ((outer.cgroup.path(), &outer), (&*below, &inner)),
        ((&*below, &inner), (outer.cgroup.path(), &outer)),
    ] {
        succeed(attach(first.0, first.1)).expect("attached");
        let output = finish(&mut attach(then.0, then.1)).expect("started");
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success());
        let says = format!("cgroup {} is inside cgroup {}", below.display(), outer.cgroup.path().display());
        assert!(error.contains(&says), "{error}");
        agent.detach_all().expect("detached");
    }
}
