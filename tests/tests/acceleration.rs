//! The self-test of joined connections: it runs every check, reports the results, and `--accelerate` depends on the
//! results for proxies.

use std::{
    collections::BTreeSet,
    fs,
    process::{Command, Output},
    thread,
    time::{Duration, Instant},
};

use intercept_agent::facade::daemon::PodState;
use serde_json::Value;
use tests::{
    agent::{Agent, finish},
    daemon::{Daemon, OUTBOUND},
    deadline::scaled,
    joined::PodPair,
    snapshot::Snapshot,
    testbed::Sandbox,
};

/// The names of the checks, which are stable: those for proxies, which must pass, and those for applications.
const PROXY: [&str; 13] = [
    "epoll-edge",
    "order",
    "checksums",
    "half-close",
    "end-of-stream",
    "reset",
    "close-unread",
    "sendfile",
    "peek",
    "by-tcp-and-back",
    "edge-by-tcp",
    "memory",
    "pending-bytes",
];
const APPLICATION: [&str; 8] = [
    "blocking-receive",
    "blocking-half-close",
    "blocking-shutdown-elsewhere",
    "blocking-reset",
    "splice",
    "slow-reader",
    "low-water",
    "pending-bytes-by-tcp",
];

/// The findings of `check --accelerate --json`, its exit code and its standard error.
struct SelfTestOutput {
    findings: Vec<Value>,
    code: Option<i32>,
    complaint: String,
}

impl SelfTestOutput {
    fn by(agent: &Agent) -> Self {
        let Output { status, stdout, stderr } =
            finish(agent.command("check").args(["--accelerate", "--json"])).expect("the agent starts");
        let complaint = String::from_utf8_lossy(&stderr).into_owned();
        let findings = serde_json::from_slice(&stdout).unwrap_or_else(|error| panic!("{error}: {complaint}"));
        Self { findings, code: status.code(), complaint }
    }

    fn failed(&self, user: &str) -> Vec<&str> {
        let failed = self.findings.iter().filter(|finding| finding["ok"] == false && finding["user"] == user);
        failed.map(|finding| finding["what"].as_str().expect("a name")).collect()
    }
}

#[test]
fn every_check_runs_and_passes_on_plain_connections() {
    let agent = Agent::new("self-test").expect("the agent");
    let found = SelfTestOutput::by(&agent);
    let names: Vec<_> = found.findings.iter().map(|finding| finding["what"].as_str()).collect();
    assert_eq!(names, PROXY.into_iter().chain(APPLICATION).map(Some).collect::<Vec<_>>());
    for finding in &found.findings {
        assert_eq!(finding["plain_ok"], true, "{finding}");
        let is_proxys = PROXY.contains(&finding["what"].as_str().expect("a name"));
        assert_eq!(finding["user"], if is_proxys { "proxy" } else { "application" });
        for side in ["plain", "joined"] {
            assert!(finding[side].as_str().is_some_and(|seen| !seen.is_empty()), "{finding}");
        }
    }
    // On this kernel proxies can be joined, and applications cannot.
    assert_eq!(found.failed("proxy"), [""; 0], "{}", found.complaint);
    assert_eq!(found.code, Some(0), "{}", found.complaint);
    let failed = found.failed("application");
    for name in ["blocking-shutdown-elsewhere", "splice", "slow-reader", "low-water"] {
        assert!(failed.contains(&name), "{name} passed: {failed:?}");
    }
    assert!(!agent.bpffs().join("intercept").exists());
}

#[test]
fn it_says_a_line_for_each_and_needs_nothing_of_the_namespace_it_is_started_in() {
    let (agent, sandbox) =
        (Agent::new("inside").expect("the agent"), Sandbox::new("inside").expect("a namespace"));
    // Connections in this namespace would fail.
    sandbox.netns.link_down("lo").expect("set down");
    let inner = agent.command("check");
    let mut command = sandbox.command(inner.get_program()).expect("a command");
    command.args(inner.get_args()).arg("--accelerate");
    let before = Snapshot::of(&sandbox).expect("looked at");
    let output = finish(&mut command).expect("the agent starts");
    let said = String::from_utf8(output.stdout).expect("text");
    let lines: Vec<_> =
        said.lines().filter(|line| line.starts_with("ok ") || line.starts_with("FAILED ")).collect();
    let names = PROXY.iter().chain(&APPLICATION);
    assert_eq!(
        lines.len(),
        PROXY.len() + APPLICATION.len(),
        "{said}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    for (line, name) in lines.iter().zip(names) {
        let (_, rest) = line.split_once(' ').expect("words");
        assert!(rest.trim_start().starts_with(&format!("{name}: ")), "{line}");
    }
    assert_eq!(output.status.code(), Some(0), "{said}");
    assert!(Snapshot::of(&sandbox).expect("looked at") == before);
}

/// The inodes of the sockets in a file such as /proc/net/unix.
fn inodes(file: &str) -> BTreeSet<u64> {
    let text = fs::read_to_string(file).unwrap_or_else(|error| panic!("reading {file}: {error}"));
    let mut lines = text.lines().map(|line| line.split_ascii_whitespace());
    let column = lines.next().expect("names").position(|name| name == "Inode").expect("a column of inodes");
    lines.map(|mut words| words.nth(column).expect("an inode").parse().expect("a number")).collect()
}

/// The namespace of the self-test goes with it: each socket that `run` keeps is of its own namespace or of the pod's.
#[test]
fn run_keeps_no_socket_of_its_namespace() {
    let (agent, pod) = (Agent::new("kept").expect("the agent"), Sandbox::new("kept").expect("a pod"));
    let (running, _) = agent.run(&pod, &["-i", "*", "--accelerate"]).expect("captured");
    let process = format!("/proc/{}", running.pid());
    let sockets = || -> BTreeSet<u64> {
        let entries = fs::read_dir(format!("{process}/fd")).expect("its descriptors").flatten();
        let links = entries.filter_map(|entry| fs::read_link(entry.path()).ok());
        let inode = |link: &str| link.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok();
        links.filter_map(|link| inode(&link.to_string_lossy())).collect()
    };
    let known = || -> BTreeSet<u64> {
        let of_pod = || ["unix", "netlink"].map(|kind| inodes(&format!("/proc/thread-self/net/{kind}")));
        let of_pod = pod.netns.run(of_pod).expect("entered");
        let own = ["unix", "netlink"].map(|kind| inodes(&format!("{process}/net/{kind}")));
        own.into_iter().chain(of_pod).flatten().collect()
    };
    let deadline = Instant::now() + scaled(Duration::from_secs(10));
    loop {
        let (kept, known) = (sockets(), known());
        assert!(kept.len() >= 3, "two for signals, and the pod's: {kept:?}");
        let others: Vec<_> = kept.difference(&known).collect();
        if others.is_empty() {
            break;
        }
        assert!(Instant::now() < deadline, "sockets of another namespace: {others:?}");
        // It may have closed one in between.
        thread::sleep(Duration::from_millis(10));
    }
    let (status, log) = running.terminate().expect("ended");
    assert!(status.success(), "{log}");
}

#[test]
fn where_it_cannot_be_tried_out_it_is_refused_and_nothing_is_left() {
    let (mut agent, pod) =
        (Agent::new("refused").expect("the agent"), Sandbox::new("refused").expect("a pod"));
    let before = Snapshot::of(&pod).expect("looked at");
    // Wrong usage is reported first.
    for wrong in
        [&["-p", "0", "--accelerate"][..], &["--accelerate", "--accelerate-proxies", "/usr/bin/envoy"]]
    {
        let (code, text) = code_and_text(&mut agent.for_pod("attach", &pod, wrong));
        assert_eq!(code, Some(2), "{text}");
    }
    // This process can make no more namespaces, so the self-test cannot run.
    agent.start_by(["unshare", "--user", "--map-root-user", "--"].map(str::to_owned).to_vec());
    let (code, text) = code_and_text(&mut agent.for_pod("attach", &pod, &["-i", "*", "--accelerate"]));
    assert_eq!(code, Some(1), "{text}");
    assert!(Snapshot::of(&pod).expect("looked at") == before, "{text}");
    assert!(!agent.bpffs().join("intercept").exists());
}

/// Nothing can be switched without an accelerated pod.
#[test]
fn the_switch_of_a_node_needs_an_accelerated_pod() {
    let agent = Agent::new("no-switch").expect("the agent");
    let (code, text) = code_and_text(agent.command("accelerate").arg("off"));
    assert!(code == Some(1) && text.contains("--accelerate"), "{text}");
}

fn code_and_text(command: &mut Command) -> (Option<i32>, String) {
    let output = finish(command).expect("the agent starts");
    (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
}

/// Whether a pod may have joined connections, as `status` says.
fn is_accelerated(agent: &Agent, pod: &Sandbox) -> bool {
    agent.acceleration_of(pod).is_ok_and(|acceleration| acceleration.state == "on")
}

#[test]
fn a_daemon_captures_before_the_self_test_has_ended() {
    let agent = Agent::new("join-daemon").expect("the agent");
    let daemon = Daemon::start(&agent, &[]).expect("a daemon");
    let pods = PodPair::new("join-daemon").expect("pods");
    let options = [&OUTBOUND[..], &["--accelerate"]].concat();
    let begun = Instant::now();
    daemon.put("dialler", &pods.dialler, &options).expect("put");
    daemon.wait_for("dialler", PodState::Captured).expect("captured");
    let captured = begun.elapsed();
    assert!(!is_accelerated(&agent, &pods.dialler), "the self-test had ended after {captured:?}");
    daemon.wait("accelerated", |_| is_accelerated(&agent, &pods.dialler)).expect("accelerated");
    // The result is known now.
    daemon.put("acceptor", &pods.acceptor, &options).expect("put");
    daemon.wait_for("acceptor", PodState::Captured).expect("captured");
    assert!(is_accelerated(&agent, &pods.acceptor));
}
