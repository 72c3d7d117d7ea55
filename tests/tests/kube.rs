//! The daemon with a real API: kube-apiserver checks the rights of the agent's account and reports pods.
//!
//! `cargo xtask kube` builds kube-apiserver and runs these tests. Native sidecars are missing, see [`tests::kube`].

use std::{
    fs,
    net::SocketAddr,
    path::PathBuf,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use intercept_agent::facade::daemon::{PodReport, PodState};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tempfile::TempDir;
use tests::{
    agent::{Agent, deployed_capabilities},
    daemon::{Daemon, answers, get},
    kube::{Deployed, KubeClient, KubePods, KubeServer, NODE, RunningPod, object},
    plugin::{CniSandbox, RuntimePlugin},
    testbed::name,
};

const WITH_SIDECAR: [&str; 2] = ["app", "istio-proxy"];
const EXCLUDED: &str = "traffic.sidecar.istio.io/excludeOutboundPorts";
const INBOUND: &str = "traffic.sidecar.istio.io/includeInboundPorts";
const METRICS: &str = "127.0.0.1:15099";

/// Starts the agent with only the access to the API that its container gets from the kubelet and the runtime.
const CONTAINER: &str = r#"
set -e
folder=$1 bpffs=$2
shift 2
mkdir -p "$folder/bpffs"
mount --bind "$bpffs" "$folder/bpffs"
mkdir -p "$folder/netns"
mount --bind /run/netns "$folder/netns"
mount -t tmpfs none /run
mkdir -p /run/secrets /run/netns "$bpffs"
mount --bind "$folder/netns" /run/netns
ln -s "$folder/kubernetes.io" /run/secrets/
mount --bind "$folder/bpffs" "$bpffs"
unset KUBECONFIG HOME
exec 2>>"$folder/log"
exec "$@"
"#;

/// The agent on the node where the API is.
struct AgentNode {
    agent: Agent,
    folder: TempDir,
}

impl AgentNode {
    fn new(server: &KubeServer, client: &KubeClient<'_>, deployed: &Deployed) -> Self {
        let folder = name::scratch("agent").expect("a folder");
        client.write_secrets(&deployed.account, folder.path()).expect("a token");
        let mut agent = Agent::new("kube").expect("the agent");
        let netns = format!("--net={}", server.sandbox().netns.path().display());
        let mut starter: Vec<String> =
            ["nsenter", &netns, "unshare", "--mount", "--propagation", "slave", "sh", "-c", CONTAINER, "sh"]
                .map(str::to_owned)
                .to_vec();
        starter.extend([folder.path(), agent.bpffs()].map(|path| path.to_str().expect("text").to_owned()));
        agent.start_by(starter);
        agent.confine(&deployed_capabilities("intercept.yaml").expect("a list"));
        Self { agent, folder }
    }

    fn daemon(&self, pods: &KubePods<'_>) -> Daemon<'_> {
        let root = pods.root().to_str().expect("text");
        let arguments = ["--cgroup-root", root, "--metrics-address", METRICS];
        let variables = [
            ("INTERCEPT_NODE_NAME", NODE),
            ("KUBERNETES_SERVICE_HOST", "127.0.0.1"),
            ("KUBERNETES_SERVICE_PORT", "6443"),
        ];
        let daemon = Daemon::start_with(&self.agent, &arguments, &variables);
        daemon.unwrap_or_else(|error| panic!("{error:#}\n{}", self.log()))
    }

    fn log(&self) -> String {
        fs::read_to_string(self.folder.path().join("log")).unwrap_or_default()
    }

    /// Waits until a condition holds. A timeout shows the log.
    fn wait(&self, daemon: &Daemon<'_>, what: &str, so: impl Fn(&Daemon<'_>) -> bool) {
        daemon.wait(what, so).unwrap_or_else(|error| panic!("{error:#}\n{}", self.log()));
    }

    fn wait_for(&self, daemon: &Daemon<'_>, name: &str, state: PodState) -> PodReport {
        self.wait(daemon, &format!("{name} is {state:?}"), |daemon| {
            report(daemon, name).is_some_and(|report| report.state == state)
        });
        report(daemon, name).expect("it is there")
    }

    fn wait_for_log(&self, daemon: &Daemon<'_>, text: &str) {
        self.wait(daemon, &format!("the log has {text:?}"), |_| self.log().contains(text));
    }

    /// The captured cgroups in the kernel's state.
    fn in_force(&self) -> Vec<PathBuf> {
        let pods = self.agent.pods().unwrap_or_else(|error| panic!("{error:#}\n{}", self.log()));
        pods.into_iter().map(|pod| pod.cgroup).collect()
    }
}

fn report(daemon: &Daemon<'_>, name: &str) -> Option<PodReport> {
    daemon.reports().expect("reports").into_iter().find(|report| report.name == format!("shop/{name}"))
}

fn with_sidecar(name: &str, annotations: &Value) -> Value {
    object(name, &WITH_SIDECAR, annotations)
}

/// The server that answers the pod's application at a service.
fn at(pod: &RunningPod, port: u16) -> Option<String> {
    answers(&pod.actor, SocketAddr::from(([10, 96, 0, 10], port)))
}

fn is_captured(pod: &RunningPod) -> bool {
    at(pod, 80).as_deref() == Some("proxy")
}

fn is_ignored(pod: &RunningPod) -> bool {
    at(pod, 80).as_deref() == Some("the world")
}

fn annotate(client: &KubeClient<'_>, pod: &RunningPod, name: &str, value: &Value) {
    client.patch(&pod.object, &json!({ "metadata": { "annotations": { name: value } } })).expect("annotated");
}

#[test]
#[ignore = "needs kube-apiserver: `cargo xtask kube` builds it and runs this"]
fn pods_of_the_real_api_are_captured_followed_and_released() {
    let server = KubeServer::start().expect("an API");
    let client = KubeClient::connect(&server).expect("a client");
    let deployed = client.deploy().expect("deployed");
    let pods = KubePods::new(&client).expect("a kubelet");
    let node = AgentNode::new(&server, &client, &deployed);
    let run = |object: &Value| pods.run(object).unwrap_or_else(|error| panic!("{error:#}\n{}", server.log()));

    // Before the daemon.
    let early = run(&with_sidecar("early", &json!({ EXCLUDED: "81" })));
    let plain = run(&object("plain", &["app"], &json!({})));
    let wrong = run(&with_sidecar("wrong", &json!({ INBOUND: "http" })));
    let mut elsewhere = with_sidecar("elsewhere", &json!({}));
    elsewhere["spec"]["nodeName"] = json!("node-2");
    let elsewhere = run(&elsewhere);
    let mut host = with_sidecar("host", &json!({}));
    host["spec"]["hostNetwork"] = json!(true);
    let host = run(&host);
    let daemon = node.daemon(&pods);

    let first = node.wait_for(&daemon, "early", PodState::Captured);
    assert_eq!(at(&early, 80).as_deref(), Some("proxy"));
    assert_eq!(at(&early, 81).as_deref(), Some("the world"));
    let cgroup = first.cgroup.clone().expect("a cgroup");
    assert!(cgroup.ends_with(format!("kubepods/burstable/pod{}", early.uid())), "{}", cgroup.display());
    assert_eq!(node.in_force(), std::slice::from_ref(&cgroup));

    // Pods of other nodes are ignored. Pods of this node without a sidecar or without a network are counted.
    for (name, why) in [("plain", "no_sidecar"), ("host", "host_network")] {
        let report = node.wait_for(&daemon, name, PodState::Ignored);
        assert_eq!(report.left_alone.as_deref(), Some(why));
    }
    assert!(is_ignored(&plain) && is_ignored(&host) && is_ignored(&elsewhere));
    assert_eq!(report(&daemon, "elsewhere"), None);
    node.wait(&daemon, "they are counted", |_| {
        let (_, text) = server
            .sandbox()
            .netns
            .run(|| get(METRICS.parse().expect("an address"), "/metrics"))
            .expect("entered");
        ["no_sidecar", "host_network"]
            .iter()
            .all(|why| text.contains(&format!("intercept_pods_left_alone{{why=\"{why}\"}} 1\n")))
    });

    // A pod with a wrong annotation gets an event with the cause.
    let problem = node.wait_for(&daemon, "wrong", PodState::Failed).failure.expect("a problem");
    assert!(problem.text.contains(INBOUND), "{problem:?}");
    let like =
        json!({ "apiVersion": "events.k8s.io/v1", "kind": "Event", "metadata": { "namespace": "shop" } });
    let events = || client.list(&like).expect("listed");
    node.wait(&daemon, "an event", |_| !events().is_empty());
    let event = match events().as_slice() {
        [event] => event.clone(),
        events => panic!("{events:?}"),
    };
    assert_eq!((&event["reason"], &event["type"]), (&json!("NotCaptured"), &json!("Warning")));
    assert_eq!(event["note"], problem.text);
    assert_eq!(event["regarding"]["name"], "wrong");
    assert_eq!(event["regarding"]["uid"], wrong.uid());
    assert_eq!(event["reportingInstance"], NODE);
    assert!(is_ignored(&wrong));
    // Corrected, it is captured. Wrong again, its event is counted, and the capture stays.
    annotate(&client, &wrong, INBOUND, &json!("8080"));
    node.wait_for(&daemon, "wrong", PodState::Captured);
    assert!(is_captured(&wrong));
    annotate(&client, &wrong, INBOUND, &json!("http"));
    node.wait(&daemon, "the event is counted", |_| {
        events().iter().any(|event| event["series"]["count"] == 2)
    });
    assert_eq!(events().len(), 1);
    assert!(is_captured(&wrong));

    // After it.
    let late = run(&with_sidecar("late", &json!({ EXCLUDED: "80" })));
    node.wait_for(&daemon, "late", PodState::Captured);
    assert_eq!(at(&late, 80).as_deref(), Some("the world"));
    assert_eq!(at(&late, 81).as_deref(), Some("proxy"));

    // A changed annotation, in place.
    annotate(&client, &early, EXCLUDED, &json!("80"));
    node.wait(&daemon, "the other port", |_| at(&early, 81).as_deref() == Some("proxy"));
    assert_eq!(at(&early, 80).as_deref(), Some("the world"));
    annotate(&client, &early, EXCLUDED, &Value::Null);
    node.wait(&daemon, "both ports", |_| is_captured(&early));
    assert_eq!(at(&early, 81).as_deref(), Some("proxy"));
    assert_eq!(node.wait_for(&daemon, "early", PodState::Captured).netns_cookie, first.netns_cookie);
    assert!(!node.log().contains("released"), "{}", node.log());

    // A terminating pod stays captured until it ends.
    client.delete(&late.object).expect("deleted");
    annotate(&client, &early, EXCLUDED, &json!("81"));
    node.wait(&daemon, "later news", |_| at(&early, 81).as_deref() == Some("the world"));
    assert_eq!(at(&late, 81).as_deref(), Some("proxy"));
    client.delete_at_once(&late.object).expect("deleted");
    let ended = Instant::now();
    node.wait(&daemon, "released", |daemon| report(daemon, "late").is_none());
    assert!(ended.elapsed() < Duration::from_secs(1), "{:?}", ended.elapsed());
    assert_eq!(at(&late, 81).as_deref(), Some("the world"));
    assert_eq!(node.in_force().len(), 2);
    for pod in [&early, &wrong, &plain, &host, &elsewhere] {
        client.delete_at_once(&pod.object).expect("deleted");
    }
    node.wait(&daemon, "all are gone", |daemon| daemon.reports().is_ok_and(|reports| reports.is_empty()));
    assert!(node.in_force().is_empty());
}

#[test]
#[ignore = "needs kube-apiserver: `cargo xtask kube` builds it and runs this"]
fn capture_outlives_the_real_api() {
    let server = KubeServer::start().expect("an API");
    let client = KubeClient::connect(&server).expect("a client");
    let deployed = client.deploy().expect("deployed");
    let pods = KubePods::new(&client).expect("a kubelet");
    let node = AgentNode::new(&server, &client, &deployed);
    let run = |name: &str| pods.run(&with_sidecar(name, &json!({}))).expect("it runs");
    let kept = run("kept");
    let ended = run("ended");
    let daemon = node.daemon(&pods);
    for name in ["kept", "ended"] {
        node.wait_for(&daemon, name, PodState::Captured);
    }

    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        // This capture has no gap during the following steps.
        let dialled = scope.spawn(|| {
            let mut dialled = 0;
            while !over.load(Ordering::Relaxed) {
                assert_eq!(at(&kept, 80).as_deref(), Some("proxy"), "after {dialled} connections");
                dialled += 1;
            }
            dialled
        });
        let news = || {
            server.stop().expect("stopped");
            node.wait_for_log(&daemon, "active captures stay");
            assert_eq!(node.in_force().len(), 2);
            server.resume().expect("started");
            let after = run("after");
            node.wait_for(&daemon, "after", PodState::Captured);
            assert!(is_captured(&after) && is_captured(&ended));
            // The outage took seconds and many attempts. Each kind of error is reported once, of pods and of namespaces.
            node.wait_for_log(&daemon, "the API is back");
            let log = node.log();
            assert!(log.matches("active captures stay").count() <= 6, "{log}");

            // The daemon misses a deletion and a creation, and the API has compacted the events between.
            let process = daemon.pid().and_then(|pid| Pid::from_raw(pid.cast_signed())).expect("it runs");
            kill_process(process, Signal::STOP).expect("stopped");
            let unheard =
                json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": "unheard" } });
            client.create(&unheard).expect("made");
            server.stop().expect("stopped");
            server.resume().expect("started");
            client.delete_at_once(&ended.object).expect("deleted");
            let missed = run("missed");
            kill_process(process, Signal::CONT).expect("continued");
            node.wait_for(&daemon, "missed", PodState::Captured);
            node.wait(&daemon, "released", |daemon| report(daemon, "ended").is_none());
            assert!(is_captured(&missed) && is_captured(&after) && is_ignored(&ended));
            let log = node.log();
            assert!(log.contains("too old resource version"), "{log}");
        };
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(news));
        over.store(true, Ordering::Relaxed);
        let dialled = dialled.join();
        outcome.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        assert!(dialled.is_ok_and(|dialled| dialled > 0));
    });
    assert_eq!(node.in_force().len(), 3);
}

#[test]
#[ignore = "needs kube-apiserver: `cargo xtask kube` builds it and runs this"]
fn a_right_that_is_missing_is_named_and_waited_for() {
    let server = KubeServer::start().expect("an API");
    let client = KubeClient::connect(&server).expect("a client");
    let deployed = client.deploy().expect("deployed");
    let pods = KubePods::new(&client).expect("a kubelet");
    let node = AgentNode::new(&server, &client, &deployed);
    let allow = |namespaces: &[&str], pods: &[&str]| {
        let rules = json!([
            { "apiGroups": [""], "resources": ["namespaces"], "verbs": namespaces },
            { "apiGroups": [""], "resources": ["pods"], "verbs": pods },
        ]);
        client.patch(&deployed.role, &json!({ "rules": rules })).expect("changed");
    };
    let run = |name: &str, annotations| pods.run(&with_sidecar(name, &annotations)).expect("it runs");

    // A rule must have a verb; the agent does not use "get".
    allow(&["get"], &["list", "watch"]);
    let first = run("first", json!({}));
    run("wrong", json!({ INBOUND: "http" }));
    let daemon = node.daemon(&pods);
    // Pods are read only when the modes of namespaces are known.
    node.wait_for_log(&daemon, "listing: the API refused the request: namespaces is forbidden");
    assert!(is_ignored(&first));
    const BOTH: [&str; 2] = ["list", "watch"];
    allow(&BOTH, &["get"]);
    node.wait_for_log(&daemon, "listing: the API refused the request: pods is forbidden");
    assert!(is_ignored(&first));

    allow(&BOTH, &["list"]);
    node.wait_for(&daemon, "first", PodState::Captured);
    assert!(is_captured(&first));
    node.wait_for_log(&daemon, "starting to watch: the API refused the request: pods is forbidden");
    node.wait_for_log(&daemon, "cannot create resource \"events\"");
    let second = run("second", json!({}));

    allow(&BOTH, &BOTH);
    node.wait_for(&daemon, "second", PodState::Captured);
    assert!(is_captured(&first) && is_captured(&second));
    // The log names the account and the missing right, once.
    let refused = "system:serviceaccount:intercept-system:intercept\\\" cannot watch resource \\\"pods";
    let log = node.log();
    let attempts = log.matches("starting to watch").count();
    assert_eq!((attempts > 0, log.matches(refused).count()), (true, attempts), "{log}");
}

#[test]
#[ignore = "needs kube-apiserver: `cargo xtask kube` builds it and runs this"]
fn the_real_api_decides_what_the_real_plugin_adds() {
    const MODE: &str = "sidecar.istio.io/interceptionMode";
    let server = KubeServer::start().expect("an API");
    let client = KubeClient::connect(&server).expect("a client");
    let deployed = client.deploy().expect("deployed");
    let pods = KubePods::new(&client).expect("a kubelet");
    let node = AgentNode::new(&server, &client, &deployed);
    let daemon = node.daemon(&pods);
    let plugin = RuntimePlugin::new(&node.agent, &daemon);
    let call = |command: &str, pod: &RunningPod| {
        let (uid, netns) = (pod.uid(), pod.sandbox.netns.path());
        let sandbox = CniSandbox { object: &pod.object, uid, netns, address: "10.66.0.2/24" };
        plugin
            .call(command, &sandbox)
            .expect("called")
            .unwrap_or_else(|error| panic!("{error}\n{}", node.log()));
    };
    let sidecar = |name: &str| with_sidecar(name, &json!({ MODE: "REDIRECT" }));
    let mut gateway = sidecar("gateway");
    gateway["spec"]["containers"][1]["args"] = json!(["proxy", "router"]);
    let mut grpc = sidecar("grpc");
    grpc["spec"]["containers"][1]["env"] = json!([{ "name": "DISABLE_ENVOY", "value": "true" }]);
    let mut with_init = sidecar("with-init");
    with_init["spec"]["initContainers"] = json!([{ "name": "istio-init", "image": "none" }]);
    let mut user = sidecar("user");
    user["spec"]["containers"][1]["securityContext"] = json!({ "runAsUser": 1444, "runAsGroup": 1444 });
    let kinds = [
        (sidecar("sidecar"), None),
        (user, None),
        (gateway, Some("gateway")),
        (grpc, Some("proxy_disabled")),
        (with_init, Some("captures_itself")),
        (object("plain", &["app"], &json!({})), Some("no_sidecar")),
        (with_sidecar("none", &json!({ MODE: "NONE" })), Some("mode_none")),
    ];
    let kinds = kinds.map(|(object, ignored)| (pods.run(&object).expect("it runs"), ignored));
    for (pod, ignored) in &kinds {
        // Added before or after the daemon has heard of it, as it happens; again once it surely has.
        for attempt in ["first", "again"] {
            call("ADD", pod);
            let name = pod.object["metadata"]["name"].as_str().expect("a name");
            let report = report(&daemon, name).expect("known");
            assert_eq!(report.left_alone.as_deref(), *ignored, "{name}, {attempt}");
            assert_eq!(is_captured(pod), ignored.is_none(), "{name}, {attempt}");
        }
    }
    let arguments = |pod: &RunningPod| {
        let pods = node.agent.pods().expect("status");
        let name = format!("pod{}", pod.uid());
        pods.into_iter().find(|pod| pod.cgroup.ends_with(&name)).expect("captured").arguments.concat()
    };
    assert!(arguments(&kinds[1].0).contains("1444"), "{}", arguments(&kinds[1].0));

    // The API accepts an object that claims to mirror another. It only affects its own pod.
    let before = arguments(&kinds[0].0);
    let mut evil = with_sidecar("evil", &json!({ MODE: "REDIRECT", EXCLUDED: "1:65535" }));
    evil["metadata"]["annotations"]["kubernetes.io/config.mirror"] = json!(kinds[0].0.uid());
    evil["metadata"]["ownerReferences"] =
        json!([{ "apiVersion": "v1", "kind": "Node", "name": NODE, "uid": kinds[0].0.uid() }]);
    let evil = pods.run(&evil).expect("it runs");
    node.wait_for(&daemon, "evil", PodState::Captured);
    assert_eq!(arguments(&kinds[0].0), before);
    client.delete_at_once(&evil.object).expect("deleted");
    node.wait(&daemon, "it is gone", |daemon| report(daemon, "evil").is_none());
    assert!(is_captured(&kinds[0].0));
    assert_eq!(arguments(&kinds[0].0), before);

    // The object may go first; only the runtime ends the pod.
    for (pod, ignored) in &kinds {
        client.delete_at_once(&pod.object).expect("deleted");
        assert_eq!(is_captured(pod), ignored.is_none());
        call("DEL", pod);
    }
    node.wait(&daemon, "all are gone", |daemon| daemon.reports().is_ok_and(|reports| reports.is_empty()));
    assert!(node.in_force().is_empty());
}
