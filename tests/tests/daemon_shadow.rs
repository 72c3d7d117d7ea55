//! The daemon's pods in shadow mode: by annotation, by the label of a namespace, and what is said of differences.

use std::fs;

use intercept_agent::facade::daemon::{PodReport, PodState};
use serde_json::{Value, json};
use tests::{
    actor::Actor,
    agent::Agent,
    api::{Api, namespace, pod},
    daemon::{Daemon, answers, proxy, service},
    testbed::{Pod, PodSpec},
};

const UID: &str = "5f0c8a52-52f6-4c0e-9d0e-2f4f7f2a1f10";
const MODE: &str = "intercept/mode";

/// A pod of the API on a node with a daemon.
struct ShadowNode<'a> {
    agent: &'a Agent,
    api: Api,
    daemon: Daemon<'a>,
    _sandbox: Pod,
    actor: Actor,
    _kubeconfig: tempfile::TempDir,
}

impl<'a> ShadowNode<'a> {
    fn new(agent: &'a Agent, object: Value, more: &[&str]) -> Self {
        let sandbox = Pod::new(PodSpec::new("shadowed")).expect("a pod");
        let actor = proxy(&sandbox);
        let cgroup = sandbox.cgroup.path().join(format!("kubepods/burstable/pod{UID}"));
        fs::create_dir_all(&cgroup).expect("made");
        for pid in sandbox.cgroup.processes().expect("listed") {
            fs::write(cgroup.join("cgroup.procs"), pid.to_string()).expect("moved");
        }
        let api = Api::start(vec![object]);
        let folder = tempfile::tempdir().expect("a folder");
        let kubeconfig = folder.path().join("kubeconfig");
        api.write_kubeconfig(&kubeconfig).expect("written");
        let root = sandbox.cgroup.path().to_str().expect("text").to_owned();
        let arguments = [&["--node-name", "node-1", "--cgroup-root", &root], more].concat();
        let variables = [("KUBECONFIG", kubeconfig.to_str().expect("text"))];
        let daemon = Daemon::start_with(agent, &arguments, &variables).expect("a daemon");
        let node = Self { agent, api, daemon, _sandbox: sandbox, actor, _kubeconfig: folder };
        node.wait("it watches", |node| {
            let shared = node.api.shared();
            !shared.watchers.is_empty() && !shared.namespace_watchers.is_empty()
        });
        node
    }

    fn wait(&self, what: &str, so: impl Fn(&Self) -> bool) {
        self.daemon.wait(what, |_| so(self)).unwrap_or_else(|error| panic!("{error:#}"));
    }

    fn report(&self) -> Option<PodReport> {
        self.daemon.reports().expect("reports").into_iter().find(|report| report.name == "shop/cart")
    }

    fn mode(&self) -> Option<String> {
        self.agent.pods().expect("status").pop().map(|pod| pod.mode)
    }

    fn has_mode(&self, mode: &str) {
        self.wait(mode, |node| node.mode().as_deref() == Some(mode));
    }

    fn annotate(&self, annotations: &Value) {
        self.api.event("MODIFIED", pod("cart", UID, &spec(), annotations));
    }

    fn reaches_proxy(&self) -> bool {
        answers(&self.actor, service()).as_deref() == Some("proxy")
    }
}

fn spec() -> Value {
    json!({ "containers": [{ "name": "app" }, { "name": "istio-proxy", "args": ["proxy", "sidecar"] }] })
}

#[test]
fn annotation_label_and_options_switch_a_running_pod() {
    let agent = Agent::new("d-mode").expect("the agent");
    let node = ShadowNode::new(&agent, pod("cart", UID, &spec(), &json!({})), &[]);
    node.has_mode("enforce");
    assert!(node.reaches_proxy());

    node.annotate(&json!({ MODE: "shadow" }));
    node.has_mode("shadow");
    assert!(!node.reaches_proxy(), "nothing else captures it");
    // A wrong value changes nothing, and is said to be wrong.
    node.annotate(&json!({ MODE: "on" }));
    node.wait("refused", |node| node.report().is_some_and(|report| report.state == PodState::Failed));
    let text = node.report().and_then(|report| report.failure).expect("a problem").text;
    assert_eq!(text, "annotation intercept/mode: `on` is no mode; give shadow or enforce");
    node.wait("an event", |node| node.api.shared().posted.iter().any(|event| event["note"] == text));
    assert_eq!(node.mode().as_deref(), Some("shadow"));
    node.annotate(&json!({}));
    node.has_mode("enforce");
    assert!(node.reaches_proxy());

    node.api.event("ADDED", namespace("shop", "shadow"));
    node.has_mode("shadow");
    node.api.event("ADDED", namespace("other", "enforce"));
    node.annotate(&json!({ MODE: "enforce" }));
    node.has_mode("enforce");
    node.annotate(&json!({}));
    node.has_mode("shadow");
    node.api.event("MODIFIED", namespace("shop", "yes"));
    node.wait("refused", |node| node.report().is_some_and(|report| report.failure.is_some()));
    assert_eq!(node.mode().as_deref(), Some("shadow"));
    // The API says so of a label that is removed, and the watch selects by it.
    node.api.event("DELETED", namespace("shop", "yes"));
    node.has_mode("enforce");
    assert!(node.reaches_proxy());
}

/// What a namespace says is known before its pods are.
#[test]
fn the_options_are_the_default_and_a_restart_keeps_what_the_label_says() {
    let agent = Agent::new("d-mode2").expect("the agent");
    let object = pod("cart", UID, &spec(), &json!({}));
    let mut node = ShadowNode::new(&agent, object, &["--", "--shadow"]);
    node.has_mode("shadow");
    assert!(!node.reaches_proxy());
    node.api.shared().namespaces = vec![namespace("shop", "enforce")];
    node.api.event("ADDED", namespace("shop", "enforce"));
    node.has_mode("enforce");
    node.daemon.kill().expect("killed");
    node.daemon.restart().expect("started");
    node.wait("captured", |node| node.report().is_some_and(|report| report.state == PodState::Captured));
    assert_eq!(node.mode().as_deref(), Some("enforce"), "never in shadow in between");
    assert!(node.reaches_proxy());
}
