//! The daemon cuts pods over from iptables to the agent and back: by the mode of a pod, only when its comparison agrees, and
//! so that each connection is captured once, whatever happens meanwhile.

use std::time::{Duration, Instant};

use intercept_agent::facade::daemon::{CutoverState, DaemonRequest, PodState, Response};
use serde_json::json;
use tests::{
    agent::deployed_capabilities,
    api::namespace,
    cutover::{CUTOVER, CutoverNode, LoadProxy, MODE, RulesFixture},
    daemon::{free_address, get},
    iptables::{Backend, IptablesOptions},
};

fn fixture(label: &str, backend: Backend) -> RulesFixture {
    RulesFixture::new(label, backend, &IptablesOptions::injected(), LoadProxy::Relays)
}

const JUMP: &str = "-A OUTPUT -j ISTIO_OUTPUT";

fn there_and_back(label: &str, backend: Backend) {
    let mut fixture = fixture(label, backend);
    let mut capabilities = deployed_capabilities("intercept.yaml").expect("a list");
    if backend == Backend::Legacy {
        // The programs of the older tables open a raw socket.
        capabilities.push("NET_RAW".to_owned());
    }
    fixture.agent.confine(&capabilities);
    let before = fixture.rules();
    let node = CutoverNode::new(&fixture, &json!({ MODE: "shadow" }), None, &[]);
    assert!(matches!(node.add(&json!({ MODE: "shadow" })), Response::Done(_)));
    node.wait("shadow", |node| node.is_applied("shadow", None));
    assert_eq!(node.progress(), None);

    // Nothing was compared, so the rules stay.
    node.annotate(&json!({ MODE: "enforce" }));
    node.has_progress(CutoverState::Comparing);
    node.wait("an event", |node| !node.notes("NotCutOver").is_empty());
    let notes = node.notes("NotCutOver");
    for part in [
        "cutting the pod over from its rules of iptables to the agent: in cgroup ",
        "no flow has been compared yet, and 10 are needed",
        "the annotation `intercept/cutover: force` on the pod cuts over regardless",
    ] {
        assert!(notes[0].contains(part), "{notes:?} has no `{part}`");
    }
    assert!(node.is_applied("shadow", None));
    assert_eq!(fixture.rules(), before);
    assert_eq!(node.report().map(|report| report.state), Some(PodState::Captured));

    for _ in 0..2 {
        let account = fixture.under_load(8, || {
            node.has_progress(CutoverState::CutOver);
            assert!(node.is_applied("enforce", Some("out")));
            assert!(!fixture.rules().contains(JUMP), "{}", fixture.rules());
            node.annotate(&json!({ MODE: "shadow" }));
            node.wait("back", |node| node.is_applied("shadow", None));
            assert_eq!(fixture.rules(), before);
            assert_eq!(node.progress(), None);
            node.annotate(&json!({ MODE: "enforce" }));
        });
        println!("{} connections, {} a second", account.count(), account.rate());
        account.assert_each_captured_once(fixture.relayed(account.count()));
    }
    node.wait("events", |node| !node.notes("CutOver").is_empty() && !node.notes("CutBack").is_empty());
    assert!(notes_of_one(&node.notes("CutOver")[0]), "{:?}", node.notes("CutOver"));
}

fn notes_of_one(note: &str) -> bool {
    note.starts_with("the agent captures the pod, and 4 rules of iptables are out")
}

#[test]
fn there_and_back_under_load_with_nft() {
    there_and_back("d-cut-nft", Backend::Nft);
}

#[test]
fn there_and_back_under_load_with_legacy_tables() {
    there_and_back("d-cut-legacy", Backend::Legacy);
}

#[test]
fn a_difference_refuses_unless_forced_and_a_restart_keeps_what_is_out() {
    let fixture = fixture("d-cut-differs", Backend::Nft);
    let address = free_address();
    let metrics = ["--metrics-address", &address.to_string()];
    let mut node = CutoverNode::new(&fixture, &json!({ MODE: "enforce" }), None, &metrics);
    let counted = |node: &CutoverNode<'_>, state: &str| {
        let line = format!("intercept_pods_cutover{{state=\"{state}\"}} 1\n");
        node.wait(&line, |_| get(address, "/metrics").1.contains(&line));
    };
    assert!(matches!(node.add(&json!({ MODE: "enforce" })), Response::Done(_)));
    node.wait("shadow", |node| node.is_applied("shadow", None));
    // A person adds a rule that the options do not have.
    let rule = "-t nat -I ISTIO_OUTPUT 1 -p tcp --dport 80 -j RETURN".split(' ');
    let mut iptables = fixture.pod.command("iptables-nft").expect("a command");
    assert!(iptables.args(rule).status().expect("iptables").success());
    let before = fixture.rules();
    fixture.round(2).expect("connections");
    node.has_progress(CutoverState::Refused);
    let failure = node.progress().and_then(|progress| progress.failure).expect("a problem");
    assert_eq!(failure.cause, "differs");
    counted(&node, "refused");
    assert!(failure.text.contains("compared flows differ from what happened"), "{}", failure.text);
    node.wait("an event", |node| node.notes("NotCutOver").iter().any(|note| note.contains("flows differ")));
    assert!(node.is_applied("shadow", None));
    assert_eq!(fixture.rules(), before);

    node.annotate(&json!({ MODE: "enforce", CUTOVER: "yes" }));
    node.wait("refused", |node| node.report().is_some_and(|report| report.state == PodState::Failed));
    let said = node.report().and_then(|report| report.failure).expect("a problem").text;
    assert_eq!(said, "annotation intercept/cutover: `yes` is not known; give force, or remove it");
    node.annotate(&json!({ MODE: "enforce", CUTOVER: "force" }));
    node.has_progress(CutoverState::CutOver);
    counted(&node, "cut_over");
    node.captured_once();

    // What is out stays out, while no daemon keeps the pod, and goes in again with the next daemon.
    node.watched.daemon.kill().expect("killed");
    node.captured_once();
    node.watched.daemon.restart().expect("started");
    node.has_progress(CutoverState::CutOver);
    assert!(node.is_applied("enforce", Some("out")));
    node.captured_once();
    node.watched.daemon.kill().expect("killed");
    node.watched.api.shared().pods = vec![node.cart().object(&json!({ MODE: "shadow" }))];
    node.watched.daemon.restart().expect("started");
    node.wait("back", |node| node.is_applied("shadow", None));
    assert_eq!(fixture.rules(), before);
}

/// Without a request a pod with istio-init is left alone, but one that is kept stays with the agent.
#[test]
fn the_label_and_the_default_decide_as_for_the_mode() {
    let fixture = fixture("d-cut-label", Backend::Nft);
    let before = fixture.rules();
    let mut node = CutoverNode::new(&fixture, &json!({}), None, &[]);
    node.add(&json!({}));
    let left_alone = |node: &CutoverNode<'_>| {
        let why = node.report().and_then(|report| report.left_alone);
        why.as_deref() == Some("captures_itself") && node.applied().is_none()
    };
    node.wait("left alone", left_alone);
    node.watched.api.event("ADDED", namespace("shop", "enforce"));
    node.wait("shadow", |node| node.is_applied("shadow", None));
    node.captured_once();
    node.has_progress(CutoverState::CutOver);
    // The daemon's default enforces it as well.
    node.watched.api.event("DELETED", namespace("shop", "enforce"));
    std::thread::sleep(Duration::from_secs(2));
    assert!(node.is_applied("enforce", Some("out")), "{:?}", node.applied());
    node.captured_once();
    node.watched.daemon.kill().expect("killed");
    node.watched.daemon.restart().expect("started");
    node.has_progress(CutoverState::CutOver);
    assert!(node.is_applied("enforce", Some("out")), "{:?}", node.applied());
    // No sidecar any more: what remains must capture.
    node.annotate(&json!({ "sidecar.istio.io/inject": "false" }));
    node.wait("released", |node| node.applied().is_none());
    assert_eq!(fixture.rules(), before);
    node.captured_once();
}

#[test]
fn a_pod_that_ends_waits_for_no_rules() {
    let fixture = fixture("d-cut-end", Backend::Nft);
    let forced = json!({ MODE: "enforce", CUTOVER: "force" });
    let node = CutoverNode::new(&fixture, &forced, None, &[]);
    node.add(&forced);
    node.has_progress(CutoverState::CutOver);
    let started = Instant::now();
    assert!(matches!(
        node.watched.daemon.ask(&DaemonRequest::Delete(node.cart().sandbox())),
        Ok(Response::Done(_))
    ));
    assert!(started.elapsed() < Duration::from_millis(900), "{:?}", started.elapsed());
    assert!(node.applied().is_none());
}

#[test]
fn who_removes_the_agent_gets_the_rules_again() {
    let mut fixture = fixture("d-cut-leave", Backend::Nft);
    fixture.agent.confine(&deployed_capabilities("intercept.yaml").expect("a list"));
    let before = fixture.rules();
    let forced = json!({ MODE: "enforce", CUTOVER: "force" });
    let node = CutoverNode::new(&fixture, &forced, None, &[]);
    node.add(&forced);
    node.has_progress(CutoverState::CutOver);
    assert!(matches!(node.watched.daemon.ask(&DaemonRequest::Leave), Ok(Response::Done(_))));
    assert_eq!(fixture.rules(), before);
    node.captured_once();
}
