//! A node whose daemon cuts pods with rules of iptables over.

use intercept_agent::facade::daemon::{
    Add, CaptureArgs, CutoverProgress, CutoverState, DaemonRequest, PodReport, Response, SandboxInfo, Select,
};
use serde_json::{Value, json};

use super::RulesFixture;
use crate::{
    api::{WatchedApi, pod},
    daemon::Daemon,
    testbed::cgroup,
};

/// The annotation and label with a pod's mode.
pub const MODE: &str = "intercept/mode";
/// The annotation that forces the cut-over.
pub const CUTOVER: &str = "intercept/cutover";

/// A pod of the API in the namespace `shop` that has istio-init.
#[derive(Debug)]
pub struct RulesPod<'a> {
    /// Its name.
    pub name: &'a str,
    /// Its UID.
    pub uid: &'a str,
    /// Its owner and its labels, if it has some.
    pub metadata: Value,
    /// Its processes and rules.
    pub fixture: &'a RulesFixture,
}

/// A node with a daemon, whose API and runtime report pods with istio-init.
#[derive(Debug)]
pub struct CutoverNode<'a> {
    /// The API and the daemon.
    pub watched: WatchedApi<'a>,
    /// The pods.
    pub pods: Vec<RulesPod<'a>>,
}

impl<'a> RulesPod<'a> {
    /// The pod `cart` without an owner.
    pub fn cart(fixture: &'a RulesFixture) -> Self {
        const UID: &str = "5f0c8a52-52f6-4c0e-9d0e-2f4f7f2a1f10";
        Self { name: "cart", uid: UID, metadata: json!({}), fixture }
    }

    /// A pod of a Deployment.
    pub fn of_deployment(fixture: &'a RulesFixture, name: &'a str, uid: &'a str, deployment: &str) -> Self {
        let hash = "5d4f8c7b9";
        let owner = json!({
            "apiVersion": "apps/v1", "kind": "ReplicaSet", "name": format!("{deployment}-{hash}"), "uid": "o",
            "controller": true,
        });
        let metadata = json!({ "ownerReferences": [owner], "labels": { "pod-template-hash": hash } });
        Self { name, uid, metadata, fixture }
    }

    /// Its object of the API.
    ///
    /// # Panics
    /// If its metadata is no object.
    pub fn object(&self, annotations: &Value) -> Value {
        let spec = json!({
            "initContainers": [{ "name": "istio-init" }],
            "containers": [
                { "name": "app" },
                {
                    "name": "istio-proxy", "args": ["proxy", "sidecar"],
                    "env": [{ "name": "ISTIO_DUAL_STACK", "value": "true" }],
                },
            ],
        });
        let mut object = pod(self.name, self.uid, &spec, annotations);
        for (name, value) in self.metadata.as_object().expect("an object") {
            object["metadata"][name] = value.clone();
        }
        object
    }

    /// Its sandbox.
    pub fn sandbox(&self) -> SandboxInfo {
        SandboxInfo {
            sandbox: format!("sandbox-{}", self.name),
            uid: Some(self.uid.into()),
            namespace: "shop".into(),
            name: self.name.into(),
        }
    }

    /// Makes flows that are compared, each captured once.
    ///
    /// # Panics
    /// If one is not.
    #[track_caller]
    pub fn captured_once(&self) {
        drop(self.fixture.relayed(0));
        let round = self.fixture.round(2).expect("no connection is lost");
        round.assert_each_captured_once(self.fixture.relayed(round.count()));
    }

    /// Mode and rules of the pod, as `status` has them.
    ///
    /// # Panics
    /// If `status` fails.
    pub fn applied(&self, node: &CutoverNode<'_>) -> Option<(String, Option<String>)> {
        let pods = node.pods[0].fixture.agent.pods().expect("status");
        let pod = pods.into_iter().find(|pod| pod.cgroup == self.fixture.pod.cgroup.path())?;
        Some((pod.mode, pod.cutover.map(|cutover| cutover.rules)))
    }

    /// Whether [`Self::applied`] is so.
    pub fn is_applied(&self, node: &CutoverNode<'_>, mode: &str, rules: Option<&str>) -> bool {
        self.applied(node) == Some((mode.to_owned(), rules.map(str::to_owned)))
    }
}

impl<'a> CutoverNode<'a> {
    /// Starts a daemon for the pod `cart` with these annotations, with these arguments, and PATH if it is given.
    ///
    /// # Panics
    /// If that fails.
    pub fn new(
        fixture: &'a RulesFixture,
        annotations: &Value,
        path: Option<&str>,
        arguments: &[&str],
    ) -> Self {
        let pods = vec![RulesPod::cart(fixture)];
        let variables: Vec<_> = path.map(|path| ("PATH", path)).into_iter().collect();
        let objects = pods.iter().map(|pod| pod.object(annotations)).collect();
        let watched = WatchedApi::start(&fixture.agent, objects, arguments, &variables).expect("a daemon");
        Self { watched, pods }
    }

    /// Starts a daemon for these pods without annotations. The agent is that of the first.
    ///
    /// # Panics
    /// If that fails, or there are none.
    pub fn of(pods: Vec<RulesPod<'a>>, arguments: &[&str]) -> Self {
        let objects = pods.iter().map(|pod| pod.object(&json!({}))).collect();
        let watched = WatchedApi::start(&pods[0].fixture.agent, objects, arguments, &[]).expect("a daemon");
        Self { watched, pods }
    }

    /// The daemon.
    pub fn daemon(&self) -> &Daemon<'a> {
        &self.watched.daemon
    }

    /// The first pod.
    pub fn cart(&self) -> &RulesPod<'a> {
        &self.pods[0]
    }

    /// The runtime starts a pod.
    ///
    /// # Panics
    /// If the daemon does not answer.
    pub fn add_pod(&self, pod: &RulesPod<'_>, annotations: &Value) -> Response {
        let mut annotations = annotations.clone();
        annotations["sidecar.istio.io/status"] =
            json!(r#"{"initContainers":["istio-init"],"containers":["istio-proxy"]}"#);
        let sandbox = &pod.fixture.pod;
        let relative = sandbox.cgroup.path().strip_prefix(cgroup::mount_point().expect("mounted"));
        let request = DaemonRequest::Add(Box::new(Add {
            pod: pod.sandbox(),
            netns: sandbox.netns.path().to_owned(),
            cgroup: Some(relative.expect("below").display().to_string()),
            annotations: serde_json::from_value(annotations).expect("texts"),
            addresses: Vec::new(),
            select: Select::Sidecar,
            given: CaptureArgs::default(),
        }));
        self.daemon().ask(&request).expect("an answer")
    }

    /// The runtime starts the first pod.
    pub fn add(&self, annotations: &Value) -> Response {
        self.add_pod(self.cart(), annotations)
    }

    /// Waits until a condition holds.
    ///
    /// # Panics
    /// If it does not in time.
    #[track_caller]
    pub fn wait(&self, what: &str, so: impl Fn(&Self) -> bool) {
        self.daemon().wait(what, |_| so(self)).unwrap_or_else(|error| panic!("{error:#}"));
    }

    /// The daemon's report on a pod.
    pub fn report_of(&self, pod: &RulesPod<'_>) -> Option<PodReport> {
        let name = format!("shop/{}", pod.name);
        self.daemon().reports().ok()?.into_iter().find(|report| report.name == name)
    }

    /// That on the first pod.
    pub fn report(&self) -> Option<PodReport> {
        self.report_of(self.cart())
    }

    /// How far the cut-over of the first pod is.
    pub fn progress(&self) -> Option<CutoverProgress> {
        self.report()?.cutover
    }

    /// Waits until it is so far.
    ///
    /// # Panics
    /// If it is not in time.
    #[track_caller]
    pub fn has_progress(&self, state: CutoverState) {
        self.wait(&format!("{state:?}"), |node| node.progress().is_some_and(|now| now.state == state));
    }

    /// Mode and rules of the first pod.
    pub fn applied(&self) -> Option<(String, Option<String>)> {
        self.cart().applied(self)
    }

    /// Whether they are so.
    pub fn is_applied(&self, mode: &str, rules: Option<&str>) -> bool {
        self.cart().is_applied(self, mode, rules)
    }

    /// Gives the first pod these annotations.
    pub fn annotate(&self, annotations: &Value) {
        self.watched.api.shared().pods[0] = self.cart().object(annotations);
        self.watched.api.event("MODIFIED", self.cart().object(annotations));
    }

    /// The texts of the events for a reason.
    ///
    /// # Panics
    /// If one has none.
    pub fn notes(&self, reason: &str) -> Vec<String> {
        let events = &self.watched.api.shared().posted;
        let these = events.iter().filter(|event| event["reason"] == reason);
        these.map(|event| event["note"].as_str().expect("a text").to_owned()).collect()
    }

    /// Makes flows of the first pod that are compared, each captured once.
    ///
    /// # Panics
    /// If one is not.
    #[track_caller]
    pub fn captured_once(&self) {
        self.cart().captured_once();
    }
}
