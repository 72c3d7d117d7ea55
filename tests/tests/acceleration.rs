//! The self-test of joined connections: it runs everything, says what it found in one way, and `--accelerate` goes by
//! it. Whether a check passes on joined connections is the kernel's affair; on plain ones it must.

use std::process::{Command, Output};
use std::time::{Duration, Instant};

use aya::programs::loaded_programs;
use intercept_common::names;
use serde_json::Value;
use tests::{
    agent::{Agent, finish},
    snapshot::Snapshot,
    testbed::Place,
};

/// Those that scripts may look for.
const CHECKS: [&str; 14] = [
    "blocking-receive",
    "epoll-edge",
    "order",
    "checksums",
    "half-close",
    "end-of-stream",
    "shutdown-elsewhere",
    "reset",
    "splice",
    "sendfile",
    "peek",
    "slow-reader",
    "low-water",
    "pending-bytes",
];

/// What `check --accelerate --json` found, with its exit code and what it said of failures.
struct Found {
    findings: Vec<Value>,
    code: Option<i32>,
    complaint: String,
}

impl Found {
    fn by(agent: &Agent) -> Self {
        let Output { status, stdout, stderr } =
            finish(agent.command("check").args(["--accelerate", "--json"])).expect("the agent starts");
        let complaint = String::from_utf8_lossy(&stderr).into_owned();
        let findings = serde_json::from_slice(&stdout).unwrap_or_else(|error| panic!("{error}: {complaint}"));
        Self { findings, code: status.code(), complaint }
    }

    fn failed(&self) -> Vec<&str> {
        let failed = self.findings.iter().filter(|finding| finding["ok"] == false);
        failed.map(|finding| finding["what"].as_str().expect("a name")).collect()
    }
}

fn programs_of_the_self_test() -> usize {
    let programs = loaded_programs().filter_map(Result::ok);
    programs.filter(|program| program.name_as_str() == Some(names::SK_MSG)).count()
}

/// The kernel frees what the process held after it has ended.
fn is_back_to(programs: usize) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while programs_of_the_self_test() > programs {
        assert!(Instant::now() < deadline, "the self-test's program is still loaded");
        std::thread::yield_now();
    }
}

#[test]
fn every_check_runs_and_passes_on_plain_connections() {
    let agent = Agent::new("self-test").expect("the agent");
    let before = programs_of_the_self_test();
    let found = Found::by(&agent);
    let names: Vec<_> = found.findings.iter().map(|finding| finding["what"].as_str()).collect();
    assert_eq!(names, CHECKS.map(Some));
    for finding in &found.findings {
        assert_eq!(finding["plain_ok"], true, "{finding}");
        assert!(finding["ok"].is_boolean(), "{finding}");
        for side in ["plain", "joined"] {
            assert!(finding[side].as_str().is_some_and(|seen| !seen.is_empty()), "{finding}");
        }
    }

    let failed = found.failed();
    assert_eq!(found.code, Some(i32::from(!failed.is_empty())), "{}", found.complaint);
    for name in failed {
        assert!(found.complaint.contains(name), "{name}: {}", found.complaint);
    }
    is_back_to(before);
    assert!(!agent.bpffs().join("intercept").exists());
}

#[test]
fn it_says_a_line_for_each_and_needs_nothing_of_the_namespace_it_is_started_in() {
    let (agent, place) =
        (Agent::new("inside").expect("the agent"), Place::new("inside").expect("a namespace"));
    // Connections in this one would fail.
    place.netns.link_down("lo").expect("set down");
    let inner = agent.command("check");
    let mut command = place.command(inner.get_program()).expect("a command");
    command.args(inner.get_args()).arg("--accelerate");
    let before = Snapshot::of(&place).expect("looked at");
    let output = finish(&mut command).expect("the agent starts");
    let said = String::from_utf8(output.stdout).expect("text");
    let lines: Vec<_> = said.lines().collect();
    assert_eq!(lines.len(), CHECKS.len(), "{said}{}", String::from_utf8_lossy(&output.stderr));
    let mut failed = 0;
    for (line, name) in lines.iter().zip(CHECKS) {
        let (word, rest) = line.split_once(' ').expect("words");
        assert!(rest.trim_start().starts_with(&format!("{name}: ")), "{line}");
        assert!(["ok", "FAILED"].contains(&word), "{line}");
        failed += usize::from(word == "FAILED");
    }
    assert_eq!(output.status.code(), Some(i32::from(failed > 0)), "{said}");
    assert!(Snapshot::of(&place).expect("looked at") == before);
}

#[test]
fn what_fails_is_refused_and_nothing_is_left() {
    let (agent, pod) = (Agent::new("refused").expect("the agent"), Place::new("refused").expect("a pod"));
    let before = Snapshot::of(&pod).expect("looked at");
    let programs = programs_of_the_self_test();
    for subcommand in ["attach", "run"] {
        let (code, text) = code_and_text(&mut agent.for_pod(subcommand, &pod, &["-i", "*", "--accelerate"]));
        assert_eq!(code, Some(1), "{text}");
        assert!(text.contains("--accelerate") && text.contains("plain TCP"), "{text}");
        // Which checks fail may be a matter of luck, so not the same as before; that none did is the other reason.
        let named = CHECKS.iter().any(|name| text.contains(name));
        assert!(named != text.contains("no programs that join"), "{text}");
        assert!(!agent.bpffs().join("intercept").exists(), "{subcommand} left something in bpffs");
        is_back_to(programs);
        assert!(Snapshot::of(&pod).expect("looked at") == before, "{subcommand} changed the pod");
    }
    let (code, text) = code_and_text(agent.command("daemon").arg("--accelerate"));
    assert!(code == Some(1) && text.contains("refusing --accelerate"), "{text}");
    // Wrong usage is told first.
    let (code, text) = code_and_text(&mut agent.for_pod("attach", &pod, &["-p", "0", "--accelerate"]));
    assert_eq!(code, Some(2), "{text}");
}

fn code_and_text(command: &mut Command) -> (Option<i32>, String) {
    let output = finish(command).expect("the agent starts");
    (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
}
