//! The daemon's pods in shadow mode: by annotation, by the label of a namespace, and what is said of differences.

use std::{fs, net::SocketAddr};

use intercept_agent::facade::daemon::{PodReport, PodState};
use serde_json::{Value, json};
use tests::{
    actor::{Actor, Bind, Listen, Transport},
    agent::Agent,
    api::{WatchedApi, namespace, pod},
    daemon::{answers, free_address, get, listen_as_proxy, service},
    testbed::{Ids, Pod, PodSpec},
};

const UID: &str = "5f0c8a52-52f6-4c0e-9d0e-2f4f7f2a1f10";
const MODE: &str = "intercept/mode";

/// A pod of the API on a node with a daemon.
struct ShadowNode<'a> {
    agent: &'a Agent,
    watched: WatchedApi<'a>,
    sandbox: Pod,
    actor: Actor,
}

impl<'a> ShadowNode<'a> {
    fn new(agent: &'a Agent, object: Value, more: &[&str]) -> Self {
        let sandbox = Pod::new(PodSpec::new("shadowed")).expect("a pod");
        let actor = Actor::start(&sandbox).expect("an actor");
        let cgroup = sandbox.cgroup.path().join(format!("kubepods/burstable/pod{UID}"));
        fs::create_dir_all(&cgroup).expect("made");
        for pid in sandbox.cgroup.processes().expect("listed") {
            fs::write(cgroup.join("cgroup.procs"), pid.to_string()).expect("moved");
        }
        // In the pod's cgroup: shadow mode sees no other listeners.
        listen_as_proxy(&actor);
        let root = sandbox.cgroup.path().to_str().expect("text").to_owned();
        let arguments = [&["--cgroup-root", &root], more].concat();
        let watched = WatchedApi::start(agent, vec![object], &arguments, &[]).expect("a daemon");
        Self { agent, watched, sandbox, actor }
    }

    fn wait(&self, what: &str, so: impl Fn(&Self) -> bool) {
        self.watched.daemon.wait(what, |_| so(self)).unwrap_or_else(|error| panic!("{error:#}"));
    }

    fn report(&self) -> Option<PodReport> {
        self.watched.daemon.reports().expect("reports").into_iter().find(|report| report.name == "shop/cart")
    }

    fn mode(&self) -> Option<String> {
        self.agent.pods().expect("status").pop().map(|pod| pod.mode)
    }

    fn has_mode(&self, mode: &str) {
        self.wait(mode, |node| node.mode().as_deref() == Some(mode));
    }

    fn annotate(&self, annotations: &Value) {
        self.watched.api.event("MODIFIED", pod("cart", UID, &spec(), annotations));
    }

    /// Has iptables redirect connections to an address.
    fn redirect(&self, to: SocketAddr, port: &str) {
        let to = to.ip().to_string();
        let rule =
            ["-t", "nat", "-A", "OUTPUT", "-p", "tcp", "-d", &to, "-j", "REDIRECT", "--to-ports", port];
        assert!(
            self.sandbox
                .command("iptables-nft")
                .expect("a command")
                .args(rule)
                .status()
                .expect("run")
                .success()
        );
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
    node.wait("an event", |node| node.watched.api.shared().posted.iter().any(|event| event["note"] == text));
    assert_eq!(node.mode().as_deref(), Some("shadow"));
    node.annotate(&json!({}));
    node.has_mode("enforce");
    assert!(node.reaches_proxy());

    node.watched.api.event("ADDED", namespace("shop", "shadow"));
    node.has_mode("shadow");
    node.watched.api.event("ADDED", namespace("other", "enforce"));
    node.annotate(&json!({ MODE: "enforce" }));
    node.has_mode("enforce");
    node.annotate(&json!({}));
    node.has_mode("shadow");
    node.watched.api.event("MODIFIED", namespace("shop", "yes"));
    node.wait("refused", |node| node.report().is_some_and(|report| report.failure.is_some()));
    assert_eq!(node.mode().as_deref(), Some("shadow"));
    // The API says so of a label that is removed, and the watch selects by it.
    node.watched.api.event("DELETED", namespace("shop", "yes"));
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
    node.watched.api.shared().namespaces = vec![namespace("shop", "enforce")];
    node.watched.api.event("ADDED", namespace("shop", "enforce"));
    node.has_mode("enforce");
    node.watched.daemon.kill().expect("killed");
    node.watched.daemon.restart().expect("started");
    node.wait("captured", |node| node.report().is_some_and(|report| report.state == PodState::Captured));
    assert_eq!(node.mode().as_deref(), Some("enforce"), "never in shadow in between");
    assert!(node.reaches_proxy());
}

#[test]
fn each_kind_of_difference_is_said_once() {
    let agent = Agent::new("d-differs").expect("the agent");
    let address = free_address();
    let object = pod("cart", UID, &spec(), &json!({ MODE: "shadow" }));
    let node = ShadowNode::new(&agent, object, &["--metrics-address", &address.to_string()]);
    node.has_mode("shadow");
    // The rules of istio-init, and one of a person.
    let changed = SocketAddr::from(([10, 96, 0, 12], 80));
    node.redirect(service(), "15001");
    node.redirect(changed, "8081");
    let bind = Bind::new(Ids::APP, SocketAddr::from(([0, 0, 0, 0], 8081)));
    node.actor
        .listen(Listen { name: "other".into(), transport: Transport::Tcp, bind })
        .expect("another server");
    assert!(node.reaches_proxy());
    let metrics = || get(address, "/metrics").1;
    node.wait("agreement", |_| metrics().contains("intercept_shadow_flows_total{result=\"agreed\"} 1\n"));
    assert!(metrics().contains("intercept_pod_shadow_differences{pod=\"shop/cart\"} 0\n"), "{}", metrics());
    let said = |node: &ShadowNode<'_>| -> Vec<String> {
        let events = &node.watched.api.shared().posted;
        let differs = events.iter().filter(|event| event["reason"] == "ShadowDiffers");
        differs.map(|event| event["note"].as_str().expect("a text").to_owned()).collect()
    };
    for number in 1..=2 {
        assert_eq!(answers(&node.actor, changed).as_deref(), Some("other"));
        let differed = format!("intercept_shadow_flows_total{{result=\"differed\"}} {number}\n");
        node.wait("differed", |_| metrics().contains(&differed));
        assert!(
            metrics().contains("intercept_pod_shadow_differences{pod=\"shop/cart\"} 1\n"),
            "{}",
            metrics()
        );
    }
    node.wait("an event", |node| !said(node).is_empty());
    let notes = said(&node);
    assert_eq!(notes.len(), 1, "{notes:?}");
    for part in
        ["to 10.96.0.12:80 by ", " would be redirected to outbound (included_cidr, ", ", and was passed"]
    {
        assert!(notes[0].contains(part), "{notes:?} has no `{part}`");
    }
}
