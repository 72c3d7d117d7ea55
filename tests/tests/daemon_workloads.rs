//! The daemon cuts over the pods of a percentage of workloads, and of workloads in a list, and back when there are fewer.

use intercept_agent::facade::daemon::{CutoverState, ModeDecision, ModeRule, PodMode, Response};
use serde_json::json;
use tests::{
    agent::{Agent, finish},
    api::namespace,
    cutover::{CutoverNode, LoadProxy, MODE, RulesFixture, RulesPod},
    iptables::{Backend, IptablesOptions},
};

const UIDS: [&str; 2] = ["5f0c8a52-52f6-4c0e-9d0e-2f4f7f2a1f10", "5f0c8a52-52f6-4c0e-9d0e-2f4f7f2a1f11"];

fn fixture(label: &str) -> RulesFixture {
    RulesFixture::new(label, Backend::Nft, &IptablesOptions::injected(), LoadProxy::Relays)
}

/// A node with a pod of each of the Deployments `cart` (percentile 24) and `web` (82), in shadow mode.
fn node<'a>(cart: &'a RulesFixture, web: Option<&'a RulesFixture>, arguments: &[&str]) -> CutoverNode<'a> {
    let mut pods = vec![RulesPod::of_deployment(cart, "cart-5d4f8c7b9-x", UIDS[0], "cart")];
    pods.extend(web.map(|web| RulesPod::of_deployment(web, "web-5d4f8c7b9-x", UIDS[1], "web")));
    let node = CutoverNode::of(pods, &[arguments, &["--", "--shadow"]].concat());
    for pod in &node.pods {
        assert!(matches!(node.add_pod(pod, &json!({})), Response::Done(_)));
        node.wait("shadow", |node| pod.is_applied(node, "shadow", None));
    }
    node
}

fn decision(node: &CutoverNode<'_>, pod: &RulesPod<'_>) -> Option<ModeDecision> {
    node.report_of(pod)?.mode
}

fn is_cut_over(node: &CutoverNode<'_>, pod: &RulesPod<'_>) -> bool {
    let state = node.report_of(pod).and_then(|report| report.cutover).map(|cutover| cutover.state);
    state == Some(CutoverState::CutOver) && pod.is_applied(node, "enforce", Some("out"))
}

#[test]
fn a_higher_percentage_adds_workloads_and_a_lower_one_takes_them_back() {
    let fixtures = [fixture("d-work-cart"), fixture("d-work-web")];
    let before = fixtures.each_ref().map(RulesFixture::rules);
    let mut node = node(&fixtures[0], Some(&fixtures[1]), &[]);
    for (percent, expected) in [
        (24, [false, false]),
        (25, [true, false]),
        (100, [true, true]),
        (50, [true, false]),
        (0, [false, false]),
    ] {
        let text = percent.to_string();
        node.watched.restart_with(&["--enforce-percent", &text, "--", "--shadow"]).expect("started");
        node.pods.iter().for_each(RulesPod::captured_once);
        for (at, (pod, expected)) in node.pods.iter().zip(expected).enumerate() {
            let case = format!("{} with {percent} percent", pod.name);
            if expected {
                node.wait(&case, |node| is_cut_over(node, pod));
            } else {
                node.wait(&case, |node| pod.is_applied(node, "shadow", None));
                assert_eq!(pod.fixture.rules(), before[at], "{case}");
            }
            let (mode, rule) = match expected {
                true => (PodMode::Enforce, ModeRule::EnforcePercent),
                false => (PodMode::Shadow, ModeRule::Default),
            };
            let (workload, percentile) = [("shop/Deployment/cart", 24), ("shop/Deployment/web", 82)][at];
            let decided = ModeDecision {
                mode,
                rule,
                workload: Some(workload.to_owned()),
                percentile: Some(percentile),
                enforce_percent: percent,
            };
            assert_eq!(decision(&node, pod), Some(decided), "{case}");
        }
        node.pods.iter().for_each(RulesPod::captured_once);
    }
    let mut status = fixtures[0].agent.command("status");
    let output = finish(status.arg("--socket").arg(node.daemon().socket())).expect("started");
    let text = String::from_utf8(output.stdout).expect("text");
    let line = "  mode         shadow, by default (workload shop/Deployment/cart, percentile 24)\n";
    assert!(text.contains(line), "{text}");
}

#[test]
fn a_listed_workload_is_cut_over_unless_label_or_annotation_say_otherwise() {
    let cart = fixture("d-work-list");
    let before = cart.rules();
    let flags = ["--enforce-workloads", "bank/CronJob/bill,shop/deployment/cart"];
    // Not before so much is compared.
    let mut node = node(&cart, None, &[]);
    let many = [&flags[..], &["--cutover-min-flows", "100000", "--", "--shadow"]].concat();
    node.watched.restart_with(&many).expect("started");
    node.captured_once();
    node.wait("too few flows", |node| {
        let failure = node.progress().and_then(|progress| progress.failure);
        failure
            .is_some_and(|failure| failure.text.contains("flows have been compared, and 100000 are needed"))
    });
    assert!(node.is_applied("shadow", None));

    let few = [&flags[..], &["--cutover-min-flows", "12", "--", "--shadow"]].concat();
    node.watched.restart_with(&few).expect("started");
    let has_rule = |node: &CutoverNode<'_>, mode: PodMode, rule: ModeRule| {
        decision(node, node.cart()).is_some_and(|found| (found.mode, found.rule) == (mode, rule))
    };
    node.wait("cut over", |node| is_cut_over(node, node.cart()));
    assert!(has_rule(&node, PodMode::Enforce, ModeRule::EnforceWorkloads));
    node.captured_once();

    // The label takes precedence over the list, and the annotation over both.
    node.watched.api.event("ADDED", namespace("shop", "shadow"));
    node.wait("back", |node| node.is_applied("shadow", None));
    assert!(has_rule(&node, PodMode::Shadow, ModeRule::NamespaceLabel));
    assert_eq!(cart.rules(), before);
    node.annotate(&json!({ MODE: "enforce" }));
    node.captured_once();
    node.wait("cut over", |node| is_cut_over(node, node.cart()));
    assert!(has_rule(&node, PodMode::Enforce, ModeRule::Annotation));
    node.watched.api.event("DELETED", namespace("shop", "shadow"));
    node.annotate(&json!({ MODE: "shadow" }));
    node.wait("back", |node| node.is_applied("shadow", None));
    assert!(has_rule(&node, PodMode::Shadow, ModeRule::Annotation));
    node.annotate(&json!({}));
    node.captured_once();
    node.wait("cut over", |node| is_cut_over(node, node.cart()));

    // It is taken off the list.
    let other = ["--enforce-workloads", "shop/StatefulSet/cart", "--", "--shadow"];
    node.watched.restart_with(&other).expect("started");
    node.wait("back", |node| node.is_applied("shadow", None));
    assert!(has_rule(&node, PodMode::Shadow, ModeRule::Default));
    assert_eq!(cart.rules(), before);
    node.captured_once();
}

#[test]
fn what_cannot_be_is_refused_before_anything_changes() {
    let agent = Agent::new("d-work-flags").expect("the agent");
    let folder = tempfile::tempdir().expect("a folder");
    for (arguments, problem) in [
        (&["--node-name", "n", "--enforce-percent", "101", "--", "--shadow"][..], "101 is not in 0..=100"),
        (
            &["--node-name", "n", "--enforce-percent", "half", "--", "--shadow"],
            "'half' for '--enforce-percent <N>'",
        ),
        (&["--cni-keep", "--enforce-percent", "5", "--", "--shadow"], "--node-name <NAME>"),
        (&["--node-name", "n", "--enforce-percent", "5"], "give --shadow among the options"),
        (&["--node-name", "n", "--enforce-workloads", "shop/Pod/cart"], "give --shadow among the options"),
        (
            &["--node-name", "n", "--enforce-workloads", "shop/Pod/cart,cart", "--", "--shadow"],
            "invalid value 'cart' for '--enforce-workloads <WORKLOADS>': give NAMESPACE/KIND/NAME, such as shop/Deployment/cart",
        ),
        (&["--node-name", "n", "--cutover-min-flows", "0"], "0 is not in 1.."),
    ] {
        let mut command = agent.command("daemon");
        command.arg("--socket").arg(folder.path().join("agent.sock")).args(arguments);
        let output = finish(&mut command).expect("started");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && said.contains(problem), "{arguments:?}: {said}");
        assert!(!agent.bpffs().join("intercept").exists(), "{arguments:?}");
        assert!(!folder.path().join("agent.sock").exists(), "{arguments:?}");
    }
}
