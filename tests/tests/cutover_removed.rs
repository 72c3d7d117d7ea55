//! The agent is removed while pods are cut over, and no daemon runs: they get their rules of iptables again first. Where that fails,
//! the programs go on to capture them.

use std::{fs, process::Command};

use intercept_agent::facade::daemon::{CutoverState, DaemonRequest, PodFailure, Response};
use intercept_common::layout;
use serde_json::json;
use tests::{
    agent::{finish, succeed},
    cutover::{CUTOVER, CutoverNode, LoadProxy, MODE, RulesFixture, RulesPod, WrappedTools},
    iptables::{Backend, IptablesOptions},
};

fn fixture(label: &str, backend: Backend) -> RulesFixture {
    RulesFixture::new(label, backend, &IptablesOptions::injected(), LoadProxy::Relays)
}

/// A pod that a command has cut over.
fn cut_over(label: &str, backend: Backend) -> (RulesFixture, String) {
    let fixture = fixture(label, backend);
    let before = fixture.rules();
    fixture.shadow(&[]);
    fixture.cut(&["--force"]);
    assert_ne!(fixture.rules(), before);
    (fixture, before)
}

/// Runs a command that must succeed.
#[track_caller]
fn run(command: Command) -> String {
    succeed(command).expect("it succeeds")
}

fn detach_all(fixture: &RulesFixture) -> Command {
    let mut command = fixture.agent.command("detach");
    command.arg("--all");
    command
}

/// Further commands find no programs of iptables.
fn hide_iptables(fixture: &mut RulesFixture) {
    let hidden = "mount -t tmpfs none /usr/sbin && exec \"$@\"";
    fixture.agent.start_by(["unshare", "-m", "sh", "-c", hidden, "--"].map(str::to_owned).to_vec());
}

#[test]
fn detach_all_and_cleanup_put_the_rules_in_again_without_a_daemon() {
    let fixture = fixture("cut-gone-daemon", Backend::Nft);
    let before = fixture.rules();
    let forced = json!({ MODE: "enforce", CUTOVER: "force" });
    for by_cleanup in [false, true] {
        let mut node = CutoverNode::new(&fixture, &forced, None, &[]);
        node.add(&forced);
        node.has_progress(CutoverState::CutOver);
        // A command changes nothing while the daemon keeps the pod.
        let output = fixture.cutover(&["--back"]);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && said.contains("the daemon keeps shop/cart"), "{said}");
        node.watched.daemon.kill().expect("killed");
        let command = if by_cleanup {
            let mut cleanup = fixture.agent.command("cleanup");
            cleanup.arg("--socket").arg(node.daemon().socket());
            for option in ["--cni-conf-dir", "--cni-bin-dir"] {
                cleanup.arg(option).arg(node.daemon().folder());
            }
            cleanup
        } else {
            detach_all(&fixture)
        };
        let account = fixture.under_load(2, || {
            let said = run(command);
            let cgroup = fixture.pod.cgroup.path().display();
            assert!(
                said.contains(&format!("4 rules of iptables of cgroup {cgroup} are in again\n")),
                "{said}"
            );
            assert!(said.contains(&format!("detached cgroup {cgroup} (cookie ")), "{said}");
        });
        account.assert_each_captured_once(fixture.relayed(account.count()));
        assert_eq!(fixture.rules(), before);
        assert!(!fixture.agent.bpffs().join("intercept").exists());
        node.captured_once();
    }
}

#[test]
fn without_the_daemon_a_command_goes_back() {
    let fixture = fixture("cut-gone-back", Backend::Nft);
    let before = fixture.rules();
    let forced = json!({ MODE: "enforce", CUTOVER: "force" });
    let mut node = CutoverNode::new(&fixture, &forced, None, &[]);
    node.add(&forced);
    node.has_progress(CutoverState::CutOver);
    node.watched.daemon.kill().expect("killed");
    fixture.cut(&["--back"]);
    assert_eq!(fixture.rules(), before);
    node.captured_once();
    // The next daemon goes on from there.
    node.watched.daemon.restart().expect("started");
    node.has_progress(CutoverState::CutOver);
    node.captured_once();
}

#[test]
fn what_a_command_cut_over_gets_its_rules_again() {
    let (fixture, before) = cut_over("cut-gone-legacy", Backend::Legacy);
    run(detach_all(&fixture));
    assert_eq!(fixture.rules(), before);
    RulesPod::cart(&fixture).captured_once();
}

#[test]
fn without_iptables_the_programs_stay() {
    let (mut fixture, before) = cut_over("cut-gone-tools", Backend::Nft);
    hide_iptables(&mut fixture);
    let output = finish(&mut detach_all(&fixture)).expect("started");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success(), "{said}");
    let cgroup = fixture.pod.cgroup.path().display().to_string();
    for part in [
        &format!(
            "putting the rules of iptables of cgroup {cgroup} in again: the programs go on to capture it"
        ),
        "restart the pod, which makes its rules again, or remove the cause and run this command again",
        "iptables-nft-save is not found",
        "the programs stay for the pods that are still attached",
    ] {
        assert!(said.contains(part), "no {part:?} in {said}");
    }
    fixture.agent.start_by(Vec::new());
    RulesPod::cart(&fixture).captured_once();
    let [pod] = &fixture.agent.pods().expect("a status")[..] else { panic!("one pod") };
    assert_eq!(pod.cutover.as_ref().map(|cutover| cutover.rules.as_str()), Some("changing"));
    run(detach_all(&fixture));
    assert_eq!(fixture.rules(), before);
    RulesPod::cart(&fixture).captured_once();
}

#[test]
fn a_pod_that_is_gone_needs_none() {
    let (fixture, _) = cut_over("cut-gone-pod", Backend::Nft);
    let cgroup = fixture.pod.cgroup.path().display().to_string();
    let RulesFixture { agent, inside, world, pod, .. } = fixture;
    drop((inside, world, pod));
    let said = agent.detach_all().expect("detached");
    assert!(
        said.contains(&format!("cgroup {cgroup} is gone, and its rules of iptables with it\n")),
        "{said}"
    );
    assert!(!agent.bpffs().join("intercept").exists());
}

/// The state of another version of the agent cannot be opened, but its saved rules can be read. Not under load: its policy cannot go
/// back into shadow mode first, so that connections of that moment may fail.
#[test]
fn state_of_another_version_is_removed_after_the_rules_are_in_again() {
    let (mut fixture, before) = cut_over("cut-gone-layout", Backend::Nft);
    let other = fixture.agent.bpffs().join("intercept").join(format!("v{}", layout::VERSION + 1));
    fs::rename(fixture.agent.store(), &other).expect("renamed");
    hide_iptables(&mut fixture);
    let output = finish(&mut detach_all(&fixture)).expect("started");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && said.contains("iptables-nft-save is not found"), "{said}");
    fixture.agent.start_by(Vec::new());
    assert!(other.exists());
    RulesPod::cart(&fixture).captured_once();
    let said = run(detach_all(&fixture));
    assert!(said.contains("removed state of another version"), "{said}");
    assert_eq!(fixture.rules(), before);
    RulesPod::cart(&fixture).captured_once();
}

/// The daemon is asked to leave, and cannot put the rules in again.
#[test]
fn a_daemon_that_cannot_put_the_rules_in_stays() {
    let fixture = fixture("cut-gone-leave", Backend::Nft);
    let before = fixture.rules();
    let tools = WrappedTools::new();
    let forced = json!({ MODE: "enforce", CUTOVER: "force" });
    let mut node = CutoverNode::new(&fixture, &forced, Some(&tools.path()), &[]);
    node.add(&forced);
    node.has_progress(CutoverState::CutOver);
    tools.set("restore", "exit 4");
    let leave = node.daemon().ask(&DaemonRequest::Leave).expect("an answer");
    let Response::Failed(PodFailure { text, .. }) = leave else { panic!("{leave:?}") };
    assert!(text.contains("are out, so nothing would capture it"), "{text}");
    node.captured_once();
    node.watched.daemon.kill().expect("killed");
    node.captured_once();
    run(detach_all(&fixture));
    assert_eq!(fixture.rules(), before);
}
