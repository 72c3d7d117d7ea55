//! The switches of istio-iptables that are not part of the policy: each has an effect, or a note says why not.

use std::process::Output;

use serde_json::Value;
use tests::agent::{Agent, finish, succeed};
use tests::testbed::{Pod, PodSpec};

const FLAGS: [&str; 4] = ["-u", "1337", "-i", "*"];

fn fixture(label: &str) -> (Agent, Pod) {
    (Agent::new("switches").expect("the agent"), Pod::new(PodSpec::new(label)).expect("a pod"))
}

/// Attaches with additional flags. Returns the output and the log.
fn attach(agent: &Agent, pod: &Pod, more: &[&str]) -> (String, String) {
    let mut command = agent.for_pod("attach", pod, &FLAGS);
    let Output { status, stdout, stderr } = finish(command.args(more)).expect("started");
    let log = String::from_utf8_lossy(&stderr).into_owned();
    assert!(status.success(), "{more:?}: {status}: {log}");
    (String::from_utf8_lossy(&stdout).into_owned(), log)
}

fn attached(agent: &Agent) -> usize {
    agent.pods().expect("the status").len()
}

#[test]
fn a_dry_run_prints_the_policy_and_changes_nothing() {
    let (agent, pod) = fixture("dry-run");
    for flag in ["-n", "--dry-run"] {
        let (said, _) = attach(&agent, &pod, &[flag, "-q", "3306"]);
        assert!(said.contains("outbound TCP goes to      15001"), "{said}");
        let json: Value = serde_json::from_str(&said[said.find('{').expect("JSON")..]).expect("JSON");
        assert_eq!(json["proxy_port"], 15001, "{json}");
        assert_eq!(json["outbound_ports"], "3306", "{json}");
    }
    assert!(!agent.store().exists(), "something was loaded");
}

#[test]
fn cleanup_only_removes_the_capture() {
    let (agent, pod) = fixture("cleanup");
    attach(&agent, &pod, &["--cleanup-only"]);
    attach(&agent, &pod, &[]);
    assert_eq!(attached(&agent), 1);
    attach(&agent, &pod, &["--cleanup-only"]);
    assert!(!agent.store().exists(), "something is left");
}

#[test]
fn skip_rule_apply_changes_nothing() {
    let (agent, pod) = fixture("skip");
    attach(&agent, &pod, &["--skip-rule-apply"]);
    assert!(!agent.store().exists(), "something was loaded");
    attach(&agent, &pod, &[]);
    attach(&agent, &pod, &["--skip-rule-apply", "-q", "3306"]);
    let pods = agent.pods().expect("the status");
    assert!(!pods[0].arguments.concat().contains("3306"), "{pods:#?}");
}

#[test]
fn force_apply_writes_everything_anew() {
    let (agent, pod) = fixture("force");
    let policy = || agent.pods().expect("the status")[0].policy;
    assert!(attach(&agent, &pod, &[]).0.starts_with("attached"));
    let first = policy();
    assert!(attach(&agent, &pod, &[]).0.starts_with("unchanged"));
    assert_eq!(policy(), first);
    assert!(attach(&agent, &pod, &["--force-apply"]).0.starts_with("replaced"));
    assert_ne!(policy(), first);
}

#[test]
fn the_network_namespace_may_be_named_the_istio_way() {
    let (agent, pod) = fixture("netns");
    // The cgroup has no process whose namespace could be used.
    let mut attach = agent.command("attach");
    attach.arg("--cgroup-path").arg(pod.cgroup.path()).args(FLAGS);
    attach.arg("--network-namespace").arg(pod.netns.path());
    assert!(succeed(attach).expect("attached").starts_with("attached"));
}

/// A switch without effect is named in a note. Without the switch there is no note.
#[test]
fn the_others_give_a_note() {
    let (agent, pod) = fixture("notes");
    let (_, quiet) = attach(&agent, &pod, &[]);
    for switch in [
        "--reconcile",
        "--cni-mode",
        "--dual-stack",
        "--drop-invalid",
        "--native-nftables",
        "--force-iptables-binary=nft",
        "--log_as_json",
        "--log_output_level=default:info",
        "--capture-all-dns",
        "-d=8080",
        "-k=eth9",
    ] {
        let name = switch.split('=').next().expect("a name");
        let (_, log) = attach(&agent, &pod, &[switch]);
        let note = log.lines().find(|line| line.contains(name));
        assert!(note.is_some_and(|note| note.contains("not") && note.contains("INFO")), "{switch}: {log}");
        assert!(!quiet.contains(name), "{quiet}");
    }
}
