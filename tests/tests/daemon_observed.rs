//! What the daemon shows to the outside: metrics, probes, trace.

use std::{
    fs,
    io::Read as _,
    net::SocketAddr,
    process::Stdio,
    time::{Duration, Instant},
};

use intercept_agent::facade::daemon::PodState;
use serde_json::{Value, json};
use tests::{
    agent::Agent,
    daemon::{Daemon, OUTBOUND, answers, free_address, get, proxy, service},
    testbed::{Pod, PodSpec},
};

#[test]
fn metrics_show_decisions_states_and_errors() {
    let agent = Agent::new("d-metrics").expect("the agent");
    let free = free_address();
    let daemon = Daemon::start(&agent, &["--metrics-address", &free.to_string()]).expect("a daemon");
    let pod = Pod::new(PodSpec::new("metrics")).expect("a pod");
    let actor = proxy(&pod);
    daemon.put("a", &pod, &OUTBOUND).expect("put");
    daemon.put_text("b", "{").expect("put");
    daemon.wait_for("a", PodState::Captured).expect("captured");
    for _ in 0..3 {
        assert_eq!(answers(&actor, service()).as_deref(), Some("proxy"));
    }
    let wanted = [
        r#"intercept_decisions_total{pod="a.json",reason="included_cidr"} 3"#,
        r#"intercept_pods{state="captured"} 1"#,
        r#"intercept_pods{state="failed"} 1"#,
        r#"intercept_errors_total{cause="options"} 1"#,
        r#"intercept_attaches_total{result="attached"} 1"#,
        "intercept_attach_seconds_count 1",
        r#"intercept_map_entries{map="POLICIES"} 1"#,
        r#"intercept_pod_map_entries{pod="a.json",map="GROUPS"} 0"#,
        r#"intercept_pod_map_max_entries{map="GROUPS"} 64"#,
        "# EOF",
    ];
    daemon
        .wait("all metrics", |_| {
            let (status, text) = get(free, "/metrics");
            status == 200 && wanted.iter().all(|line| text.contains(line))
        })
        .unwrap_or_else(|error| panic!("{error}: {}", get(free, "/metrics").1));
    assert_eq!(get(free, "/healthz").0, 200);
    assert_eq!(get(free, "/readyz").0, 200);
    assert_eq!(get(free, "/").0, 404);
}

#[test]
fn without_an_address_nothing_listens() {
    let agent = Agent::new("d-silent").expect("the agent");
    let daemon = Daemon::start(&agent, &[]).expect("a daemon");
    let pid = daemon.pid().expect("it runs");
    let sockets: Vec<String> = fs::read_dir(format!("/proc/{pid}/fd"))
        .expect("listed")
        .flatten()
        .filter_map(|fd| {
            fs::read_link(fd.path())
                .ok()?
                .to_str()?
                .strip_prefix("socket:[")?
                .strip_suffix(']')
                .map(str::to_owned)
        })
        .collect();
    assert!(!sockets.is_empty(), "the unix socket at least");
    for table in ["tcp", "tcp6", "udp", "udp6"] {
        let text = fs::read_to_string(format!("/proc/{pid}/net/{table}")).expect("read");
        for line in text.lines().skip(1) {
            let inode = line.split_whitespace().nth(9).expect("an inode");
            assert!(!sockets.iter().any(|own| own == inode), "{table}: {line}");
        }
    }
}

#[test]
fn trace_shows_decisions_while_it_runs_only() {
    let agent = Agent::new("d-trace").expect("the agent");
    let daemon = Daemon::start(&agent, &[]).expect("a daemon");
    let pod = Pod::new(PodSpec::new("trace")).expect("a pod");
    let actor = proxy(&pod);
    daemon.put("a", &pod, &OUTBOUND).expect("put");
    daemon.wait_for("a", PodState::Captured).expect("captured");
    // No reader was connected.
    assert_eq!(answers(&actor, SocketAddr::from(([10, 96, 0, 99], 80))).as_deref(), Some("proxy"));
    let mut trace = agent.command("trace");
    trace.arg("--json").arg("--cgroup-path").arg(pod.cgroup.path());
    let mut trace = trace.stdout(Stdio::piped()).spawn().expect("started");
    let output = trace.stdout.take().expect("piped");
    let (lines, seen) = std::sync::mpsc::channel();
    let reader = std::thread::spawn(move || {
        use std::io::BufRead as _;
        for line in std::io::BufReader::new(output).lines() {
            drop(lines.send(line.expect("text")));
        }
    });
    let deadline = Instant::now() + Duration::from_secs(10);
    let line = loop {
        assert_eq!(answers(&actor, service()).as_deref(), Some("proxy"));
        if let Ok(line) = seen.recv_timeout(Duration::from_millis(50)) {
            break line;
        }
        assert!(Instant::now() < deadline, "no event came");
    };
    let line: Value = serde_json::from_str(&line).expect("JSON");
    assert_eq!(line["destination"], "10.96.0.10");
    assert_eq!(
        (&line["pod"], &line["process"], &line["uid"], &line["reason"]),
        (&json!("a.json"), &json!("actor"), &json!(1000), &json!("included_cidr"))
    );
    // Only one reader at a time.
    let second = agent.command("trace").output().expect("started");
    assert!(!second.status.success());
    assert!(String::from_utf8_lossy(&second.stderr).contains("only one reader"));
    let pid = rustix::process::Pid::from_child(&trace);
    rustix::process::kill_process(pid, rustix::process::Signal::INT).expect("signalled");
    assert!(trace.wait().expect("ended").success());
    assert!(!agent.tracing().expect("the switch"), "left on by SIGINT");
    reader.join().expect("read to the end");
    let mut killed = agent.command("trace");
    let mut killed = killed.arg("--json").stdout(Stdio::piped()).spawn().expect("started");
    daemon
        .wait("switched on", |_| {
            answers(&actor, service());
            agent.tracing().expect("the switch")
        })
        .expect("switched on");
    let pid = rustix::process::Pid::from_child(&killed);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).expect("signalled");
    assert!(killed.wait().expect("ended").success());
    assert!(!agent.tracing().expect("the switch"), "left on by SIGTERM");
    // Tracing is off again. The next reader sees only later events.
    assert_eq!(answers(&actor, service()).as_deref(), Some("proxy"));
    let mut next = agent.command("trace");
    let mut next = next.args(["--count", "1"]).stdout(Stdio::piped()).spawn().expect("started");
    daemon
        .wait("one event", |_| {
            answers(&actor, SocketAddr::from(([10, 96, 0, 11], 80)));
            next_ended(&next)
        })
        .expect("an event");
    let mut text = String::new();
    next.stdout.take().expect("piped").read_to_string(&mut text).expect("text");
    assert!(next.wait().expect("ended").success());
    assert!(text.contains("10.96.0.11:80 outbound_port (included_cidr)"), "{text}");
}

fn next_ended(child: &std::process::Child) -> bool {
    let state = fs::read_to_string(format!("/proc/{}/stat", child.id())).unwrap_or_default();
    state.rsplit(')').next().is_some_and(|rest| rest.trim_start().starts_with('Z'))
}

#[test]
fn status_says_when_the_daemon_last_saw_a_pod_in_place() {
    let agent = Agent::new("d-status").expect("the agent");
    let daemon = Daemon::start(&agent, &[]).expect("a daemon");
    let pod = Pod::new(PodSpec::new("status")).expect("a pod");
    daemon.put("a", &pod, &OUTBOUND).expect("put");
    daemon.put_text("b", "{").expect("put");
    daemon.wait_for("a", PodState::Captured).expect("captured");
    daemon.wait_for("b", PodState::Failed).expect("failed");
    let status = |more: &[&str]| {
        let mut command = agent.command("status");
        command.arg("--socket").arg(daemon.socket()).args(more);
        tests::agent::succeed(command).expect("a status")
    };
    let pods: Value = serde_json::from_str(&status(&["--json"])).expect("JSON");
    assert_eq!(pods[0]["daemon"]["state"], "captured", "{pods}");
    assert!(pods[0]["daemon"]["links_verified_seconds_ago"].as_u64().is_some_and(|ago| ago < 60), "{pods}");
    let text = status(&[]);
    assert!(text.contains("a.json is captured, links verified"), "{text}");
    assert!(text.contains("b.json is failed, links never verified"), "{text}");
    // Without a daemon, status shows what the kernel knows.
    let pods = agent.pods().expect("a status");
    assert!(pods[0].daemon.is_none() && pods[0].state == "attached", "{pods:#?}");
}
