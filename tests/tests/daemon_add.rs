//! How long a runtime waits for the CNI plugin's ADD: for its process, its question to the daemon, and the capture.
//!
//! `INTERCEPT_TEST_ADDS` is the number of pods of each kind (default 60).

use std::{
    fs, thread,
    time::{Duration, Instant},
};

use intercept_agent::facade::daemon::PodState;
use serde_json::{Value, json};
use tests::{
    agent::Agent,
    api::{ApiNode, pod},
    plugin::{CniSandbox, RuntimePlugin},
    soak::admission::Percentiles,
    testbed::Sandbox,
};

fn number() -> u32 {
    std::env::var("INTERCEPT_TEST_ADDS").map_or(60, |text| text.parse().expect("a number"))
}

#[derive(Clone, Copy, Debug)]
enum NewKind {
    /// Without a sidecar.
    Plain,
    /// With one, by annotations and by its object.
    Injected,
}

/// A pod before its sandbox runs: its cgroup has no process.
struct NewPod<'a> {
    node: &'a ApiNode<'a>,
    plugin: RuntimePlugin,
    object: Value,
    uid: String,
    sandbox: Sandbox,
}

impl<'a> NewPod<'a> {
    fn new(node: &'a ApiNode<'a>, kind: NewKind, number: u32) -> Self {
        let uid = format!("00000000-0000-4000-8000-{number:012}");
        let cgroup = node.kubelet.path().join(format!("kubepods/burstable/pod{uid}"));
        fs::create_dir_all(cgroup).expect("made");
        let proxy = json!({ "name": "istio-proxy", "args": ["proxy", "sidecar"] });
        let (containers, annotations) = match kind {
            NewKind::Plain => (json!([{ "name": "app" }]), json!({})),
            NewKind::Injected => (
                json!([{ "name": "app" }, proxy]),
                json!({ "sidecar.istio.io/interceptionMode": "REDIRECT" }),
            ),
        };
        let mut object = pod(&uid, &uid, &json!({ "containers": containers }), &annotations);
        object["status"]["phase"] = json!("Pending");
        if matches!(kind, NewKind::Plain) {
            object["metadata"]["annotations"] = json!({});
        }
        let plugin = RuntimePlugin::new(node.agent, &node.daemon);
        Self { node, plugin, object, uid, sandbox: Sandbox::new("added").expect("a sandbox") }
    }

    fn call(&self, command: &str) -> Duration {
        let sandbox = CniSandbox {
            object: &self.object,
            uid: &self.uid,
            netns: self.sandbox.netns.path(),
            address: "10.66.0.2/24",
        };
        let started = Instant::now();
        assert_eq!(self.plugin.call(command, &sandbox).expect("called"), Ok(()), "{command}");
        started.elapsed()
    }

    fn announce(&self) {
        self.node.api.event("ADDED", self.object.clone());
    }

    /// The daemon has the API's word on it.
    fn announce_and_wait(&self) {
        self.announce();
        self.node.wait("it is known", || self.node.report(&self.uid).is_some());
    }

    fn state(&self) -> Option<PodState> {
        self.node.report(&self.uid).map(|report| report.state)
    }

    fn end(self) {
        self.call("DEL");
        self.node.api.event("DELETED", self.object.clone());
        self.node.wait("it is gone", || self.node.report(&self.uid).is_none());
    }
}

/// The time at a quarter of all: the rest says what else the machine did.
fn quarter(times: &[Duration]) -> Duration {
    let mut times = times.to_vec();
    times.sort_unstable();
    times[times.len() / 4]
}

fn tell(what: &str, times: &[Duration]) -> Percentiles {
    let percentiles = Percentiles::of(times).expect("some");
    println!("{what}: {percentiles}");
    percentiles
}

#[test]
fn where_the_api_has_spoken_add_takes_milliseconds() {
    let agent = Agent::new("d-add").expect("the agent");
    let node = ApiNode::new(&agent, &["--api-wait", "10"]).expect("a node");
    // The programs are loaded, and pages of the binary read.
    let first = NewPod::new(&node, NewKind::Injected, 0);
    first.announce_and_wait();
    println!("the node's first: {:.1?}", first.call("ADD"));
    first.end();
    let mut starts = Vec::new();
    for (kind, at, state) in
        [(NewKind::Plain, 1, PodState::Ignored), (NewKind::Injected, 2, PodState::Captured)]
    {
        let mut adds = Vec::new();
        for n in 0..number() {
            let pod = NewPod::new(&node, kind, at * 100_000 + n);
            pod.announce_and_wait();
            starts.push(pod.call("VERSION"));
            adds.push(pod.call("ADD"));
            assert_eq!(pod.state(), Some(state));
            pod.end();
        }
        let found = tell(&format!("ADD, {kind:?}"), &adds);
        assert!(quarter(&adds) < Duration::from_millis(150), "{adds:?}");
        if !cfg!(debug_assertions) {
            assert!(found.p50 < Duration::from_millis(10), "{adds:?}");
            assert!(found.p99 < Duration::from_millis(20), "{adds:?}");
        }
    }
    tell("VERSION, which only starts the plugin", &starts);
}

#[test]
fn where_it_has_not_add_takes_as_long_as_the_wait() {
    const ROUNDS: u32 = 8;
    let late = Duration::from_millis(200);
    let agent = Agent::new("d-add-late").expect("the agent");
    {
        let node = ApiNode::new(&agent, &["--api-wait", "10"]).expect("a node");
        let after: Vec<Duration> = (0..ROUNDS)
            .map(|n| {
                let pod = NewPod::new(&node, NewKind::Injected, n);
                let (took, spoken) = thread::scope(|scope| {
                    let started = Instant::now();
                    let add = scope.spawn(|| pod.call("ADD"));
                    thread::sleep(late);
                    assert!(!add.is_finished(), "it waits");
                    let spoken = started.elapsed();
                    pod.announce();
                    (add.join().expect("no panic"), spoken)
                });
                assert_eq!(pod.state(), Some(PodState::Captured));
                pod.end();
                took.saturating_sub(spoken)
            })
            .collect();
        tell("ADD, after the API's word that it waited for", &after);
        assert!(quarter(&after) < Duration::from_millis(150), "{after:?}");
    }
    let node = ApiNode::new(&agent, &["--api-wait", "0.2"]).expect("a node");
    let beyond: Vec<Duration> = (0..ROUNDS)
        .map(|n| {
            let pod = NewPod::new(&node, NewKind::Injected, 100 + n);
            let took = pod.call("ADD");
            assert!(took >= late, "it waits: {took:?}");
            assert_eq!(pod.state(), Some(PodState::Captured));
            pod.end();
            took - late
        })
        .collect();
    tell("ADD, beyond the wait for a silent API", &beyond);
    assert!(quarter(&beyond) < Duration::from_millis(150), "{beyond:?}");
    // What has no mark of the injector does not wait.
    let plain: Vec<Duration> = (0..ROUNDS)
        .map(|n| {
            let pod = NewPod::new(&node, NewKind::Plain, 200 + n);
            let took = pod.call("ADD");
            pod.end();
            took
        })
        .collect();
    tell("ADD, Plain, with a silent API", &plain);
    assert!(quarter(&plain) < Duration::from_millis(100), "{plain:?}");
}
