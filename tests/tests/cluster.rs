//! The chart in a cluster: helm installs the agent, a Deployment's pods and a Job's are captured before their first
//! connection and through everything that happens to the agent and the node, and uninstalling leaves nothing.
//!
//! `cargo xtask cluster` builds Kubernetes and runs this.

use std::{
    collections::BTreeMap,
    fs,
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Result, bail, ensure};
use serde_json::{Value, json};
use tests::{
    agent::Agent,
    cluster::{AccessLine, App, Cluster, NAMESPACE, SERVICE, clients, servers},
};

/// As docs/istio.md and docs/operations.md have them.
const RELEASE: &str = "intercept";
const SYSTEM: &str = "intercept-system";
const EXCLUDED: &str = "traffic.sidecar.istio.io/excludeOutboundPorts";

/// What clients have said of their requests, by path.
struct ClientRequests {
    answered: Vec<String>,
    failed: Vec<String>,
}

impl ClientRequests {
    fn of(cluster: &Cluster, pod: &Value) -> Result<Self> {
        let said = cluster.printed(pod, "app")?;
        let with = |word: &str| {
            let lines = said.lines().filter_map(|line| line.strip_prefix(word));
            lines.map(|path| path.trim().to_owned()).collect()
        };
        Ok(Self { answered: with("answered "), failed: with("failed ") })
    }
}

fn text<'a>(object: &'a Value, pointer: &str) -> &'a str {
    object.pointer(pointer).and_then(Value::as_str).unwrap_or_default()
}

fn address(pod: &Value) -> &str {
    text(pod, "/status/podIP")
}

/// How often each path is in an access log, and where each was going and came from.
fn by_path(lines: Vec<AccessLine>, listener: &str) -> BTreeMap<String, Vec<AccessLine>> {
    let mut paths: BTreeMap<String, Vec<AccessLine>> = BTreeMap::new();
    for line in lines.into_iter().filter(|line| line.listener == listener) {
        paths.entry(line.path.clone()).or_default().push(line);
    }
    paths
}

/// Every answered request of a client has passed its own proxy and the backend's, once each, with the destination that it
/// dialled and the client that dialled. Returns how many there are.
fn both_proxies_passed(cluster: &Cluster, client: &Value, backend: &Value) -> Result<usize> {
    let answered = ClientRequests::of(cluster, client)?.answered;
    // Read after what it said; Envoy writes its log every 50 ms.
    std::thread::sleep(Duration::from_millis(200));
    let outbound = by_path(cluster.logged(client)?, "outbound");
    let inbound = by_path(cluster.logged(backend)?, "inbound");
    let (from, to) = (address(client), address(backend));
    for path in &answered {
        match outbound.get(path).map(Vec::as_slice) {
            Some([line]) => {
                ensure!(line.original == format!("{SERVICE}:80"), "{line:?}");
                ensure!(line.client.starts_with(&format!("{from}:")), "{line:?}: the client is {from}");
            }
            other => bail!("{path} has passed its own proxy as {other:?}"),
        }
        match inbound.get(path).map(Vec::as_slice) {
            Some([line]) => {
                ensure!(line.original == format!("{to}:8080"), "{line:?}");
                ensure!(line.client.starts_with(&format!("{from}:")), "{line:?}: the client is {from}");
            }
            other => bail!("{path} has passed the backend's proxy as {other:?}"),
        }
    }
    Ok(answered.len())
}

/// Waits until a client has been answered so much more often.
fn wait_for_more(cluster: &Cluster, app: App, more: usize) {
    let answered =
        || -> Result<usize> { Ok(ClientRequests::of(cluster, &cluster.pod(app)?)?.answered.len()) };
    let before = answered().unwrap_or_default();
    let what = format!("{} is answered {more} times", app.as_str());
    cluster.wait(&what, |_| Ok(answered()? >= before + more)).expect("answered");
}

/// The cgroups that are captured, as the kernel has it, by the UIDs of their pods.
fn captured(agent: &Agent) -> Vec<String> {
    let pods = agent.pods().expect("status");
    let cgroups = pods.iter().map(|pod| pod.cgroup.display().to_string());
    let mut uids: Vec<_> = cgroups
        .map(|path| path.rsplit_once("/pod").map_or(path.clone(), |(_, uid)| uid.to_owned()))
        .collect();
    uids.sort();
    uids
}

fn are_captured(cluster: &Cluster, agent: &Agent, apps: &[App]) {
    let uid = |app: &App| cluster.pod(*app).map(|pod| text(&pod, "/metadata/uid").to_owned());
    let so = |_: &Cluster| {
        let mut uids = apps.iter().map(uid).collect::<Result<Vec<_>>>()?;
        uids.sort();
        let found = captured(agent);
        ensure!(found == uids, "{found:?} are captured, and not {uids:?}");
        Ok(true)
    };
    cluster.wait("those pods are captured, and no others", so).expect("captured");
}

fn rolled_out(cluster: &Cluster, namespace: &str, what: &[&str]) {
    for object in what {
        let done = cluster.kubectl(&["-n", namespace, "rollout", "status", object, "--timeout=300s"]);
        done.unwrap_or_else(|error| panic!("{error:#}\n{}", cluster.logs()));
    }
}

/// The files of the node that the agent changes.
fn files(cluster: &Cluster) -> (Value, Vec<PathBuf>) {
    let node = cluster.node();
    let conf = fs::read_to_string(node.cni_file()).expect("read");
    let plugins = fs::read_dir(node.cni_bin()).expect("listed").flatten().map(|entry| entry.path());
    let mut all: Vec<_> = plugins.collect();
    all.extend(fs::read_dir(node.cni_conf()).expect("listed").flatten().map(|entry| entry.path()));
    all.sort();
    (serde_json::from_str(&conf).expect("JSON"), all)
}

/// As docs/istio.md says, on a node whose folders of CNI are elsewhere.
fn install(cluster: &Cluster) {
    let node = cluster.node();
    let set = |name: &str, value: PathBuf| format!("{name}={}", value.display());
    let (conf, bin) = (set("cni.confDir", node.cni_conf()), set("cni.binDir", node.cni_bin()));
    let namespace = json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": SYSTEM } });
    cluster.apply(&namespace).expect("a namespace");
    let chart = cluster.chart().expect("the chart");
    let arguments = ["install", RELEASE, &chart, "-n", SYSTEM, "--set", &conf, "--set", &bin];
    cluster.helm(&arguments).unwrap_or_else(|error| panic!("{error:#}\n{}", cluster.logs()));
    rolled_out(cluster, SYSTEM, &["daemonset/intercept"]);
    let check = ["-n", SYSTEM, "exec", "daemonset/intercept", "--", "/intercept-agent", "check"];
    let said = cluster.kubectl(&check).expect("checked");
    assert!(!said.contains("MISSING"), "{said}");
}

/// The application runs, and what captures it lets nothing pass.
fn run_application(cluster: &Cluster, agent: &Agent) {
    cluster.apply(&servers()).expect("applied");
    rolled_out(cluster, NAMESPACE, &["deploy/backend", "deploy/plain-server", "deploy/gateway"]);
    let service = format!("{SERVICE}:80").parse().expect("an address");
    cluster
        .wait("the service", |cluster| Ok(cluster.get(service, "/node")?.contains(" 200 ")))
        .expect("answers");
    cluster.apply(&clients()).expect("applied");
    rolled_out(cluster, NAMESPACE, &["deploy/frontend", "deploy/held", "deploy/plain"]);
    let complete = ["-n", NAMESPACE, "wait", "--for=condition=complete", "job/job", "--timeout=300s"];
    cluster.kubectl(&complete).unwrap_or_else(|error| panic!("{error:#}\n{}", cluster.logs()));
    for app in [App::Frontend, App::Held, App::Plain] {
        wait_for_more(cluster, app, 20);
    }
    // Neither a gateway nor what has no sidecar, nor what has ended.
    are_captured(cluster, agent, &[App::Backend, App::Frontend, App::Held]);
}

/// What every client has said since it started.
fn nothing_has_passed(cluster: &Cluster) {
    let pod = |app| cluster.pod(app).expect("a pod");
    let backend = pod(App::Backend);
    for (app, least) in [(App::Frontend, 20), (App::Held, 20), (App::Job, 20)] {
        let client = pod(app);
        let passed = both_proxies_passed(cluster, &client, &backend);
        let count = passed.unwrap_or_else(|error| panic!("{}: {error:#}", app.as_str()));
        assert!(count >= least, "{} was answered {count} times", app.as_str());
        let failed = ClientRequests::of(cluster, &client).expect("requests").failed;
        assert!(failed.is_empty(), "{}: {failed:?}", app.as_str());
    }
    let plain = ClientRequests::of(cluster, &pod(App::Plain)).expect("requests");
    assert!(plain.answered.len() >= 20 && plain.failed.len() < 5, "{:?}", plain.failed);
    for app in [App::Backend, App::Frontend, App::Held, App::Job, App::Gateway] {
        let lines = cluster.logged(&pod(app)).expect("a log");
        assert!(lines.iter().all(|line| !line.path.starts_with("/plain")), "{} has seen it", app.as_str());
    }
}

/// What arrives at the gateway passes on by the backend's proxy, and what the gateway does itself is left alone.
fn gateway_is_left_alone(cluster: &Cluster) {
    let (gateway, backend) = (cluster.pod(App::Gateway).expect("it"), cluster.pod(App::Backend).expect("it"));
    let to = format!("{}:8080", address(&gateway)).parse().expect("an address");
    let answer = cluster.get(to, "/by-gateway").expect("answered");
    assert!(answer.contains(" 200 ") && answer.ends_with(&format!("{}:8080", address(&backend))), "{answer}");
    let find = |pod: &Value| -> Result<Option<AccessLine>> {
        Ok(cluster.logged(pod)?.into_iter().find(|line| line.path == "/by-gateway"))
    };
    cluster
        .wait("both have logged it", |_| Ok(find(&gateway)?.and(find(&backend)?).is_some()))
        .expect("logged");
    let (outside, inside) = (find(&gateway).expect("it"), find(&backend).expect("it"));
    assert_eq!(outside.expect("logged").listener, "gateway");
    let inside = inside.expect("logged");
    assert_eq!(inside.listener, "inbound");
    assert!(inside.client.starts_with(&format!("{}:", address(&gateway))), "{inside:?}");
}

/// A changed annotation is followed while the pod runs.
fn annotations_are_followed(cluster: &Cluster) {
    let pod = cluster.pod(App::Frontend).expect("a pod");
    let annotate = |change: &str| {
        let arguments =
            ["-n", NAMESPACE, "annotate", "--overwrite", "pod", text(&pod, "/metadata/name"), change];
        cluster.kubectl(&arguments).expect("annotated");
    };
    let passes_by = |by: bool| {
        let what = format!("the last request has passed by its proxy: {by}");
        let so = |cluster: &Cluster| {
            let requests = ClientRequests::of(cluster, &pod)?;
            std::thread::sleep(Duration::from_millis(200));
            let outbound = by_path(cluster.logged(&pod)?, "outbound");
            Ok(requests.answered.last().is_some_and(|path| outbound.contains_key(path) != by))
        };
        cluster.wait(&what, so).expect("followed");
    };
    passes_by(false);
    annotate(&format!("{EXCLUDED}=80"));
    passes_by(true);
    annotate(&format!("{EXCLUDED}-"));
    passes_by(false);
    let failed = ClientRequests::of(cluster, &pod).expect("requests").failed;
    assert!(failed.is_empty(), "{failed:?}");
}

/// Every pod that can go goes, and what comes in its place is captured.
fn drain(cluster: &Cluster, agent: &Agent) {
    let drain =
        ["drain", "node-1", "--ignore-daemonsets", "--delete-emptydir-data", "--force", "--timeout=300s"];
    cluster.kubectl(&drain).unwrap_or_else(|error| panic!("{error:#}\n{}", cluster.logs()));
    are_captured(cluster, agent, &[]);
    cluster.kubectl(&["uncordon", "node-1"]).expect("uncordoned");
    let all = ["deploy/backend", "deploy/plain-server", "deploy/gateway", "deploy/frontend", "deploy/held"];
    rolled_out(cluster, NAMESPACE, &all);
    are_captured(cluster, agent, &[App::Backend, App::Frontend, App::Held]);
    let backend = cluster.pod(App::Backend).expect("a pod");
    for app in [App::Frontend, App::Held] {
        wait_for_more(cluster, app, 20);
        let passed = both_proxies_passed(cluster, &cluster.pod(app).expect("a pod"), &backend);
        passed.unwrap_or_else(|error| panic!("{}: {error:#}", app.as_str()));
    }
}

/// As docs/operations.md says.
fn uninstall(cluster: &Cluster) {
    let chart = cluster.chart().expect("the chart");
    let upgrade = ["upgrade", RELEASE, &chart, "-n", SYSTEM, "--reuse-values", "--set", "cleanUpOnExit=true"];
    cluster.helm(&upgrade).expect("upgraded");
    rolled_out(cluster, SYSTEM, &["daemonset/intercept"]);
    cluster.helm(&["uninstall", RELEASE, "-n", SYSTEM]).expect("uninstalled");
    let none = |cluster: &Cluster| Ok(cluster.list("pods", SYSTEM)?.is_empty());
    cluster.wait("the agent's pod is gone", none).expect("gone");
}

/// Says how long a step has taken.
fn step(name: &str, step: impl FnOnce()) {
    let start = Instant::now();
    step();
    println!("{name}: {:.1} s", start.elapsed().as_secs_f64());
}

#[test]
#[ignore = "needs Kubernetes: `cargo xtask cluster` builds it and runs this"]
fn the_chart_captures_an_application_until_it_is_uninstalled() {
    let mut agent = Agent::new("cluster").expect("the agent");
    let start = Instant::now();
    let mut cluster = Cluster::start(agent.bpffs()).expect("a cluster");
    println!("a node that is ready: {:.1} s", start.elapsed().as_secs_f64());
    agent.start_by([vec!["nsenter".to_owned()], cluster.node().entry().to_vec()].concat());
    let before = files(&cluster);

    step("installing", || install(&cluster));
    step("starting the application", || run_application(&cluster, &agent));
    step("both proxies are passed", || nothing_has_passed(&cluster));
    step("a gateway", || gateway_is_left_alone(&cluster));
    step("rolling the DaemonSet", || {
        cluster.kubectl(&["-n", SYSTEM, "rollout", "restart", "daemonset/intercept"]).expect("restarted");
        rolled_out(&cluster, SYSTEM, &["daemonset/intercept"]);
        wait_for_more(&cluster, App::Frontend, 10);
        nothing_has_passed(&cluster);
    });
    step("changing annotations", || annotations_are_followed(&cluster));
    step("draining the node", || drain(&cluster, &agent));
    step("uninstalling", || uninstall(&cluster));

    assert!(!agent.bpffs().join("intercept").exists());
    assert_eq!(files(&cluster), before);
    let roles = cluster.list("clusterroles,clusterrolebindings", "").expect("listed");
    assert!(roles.iter().all(|role| text(role, "/metadata/name") != RELEASE));
    // What runs goes on, and passes no proxy on its way out or in.
    let pod = cluster.pod(App::Frontend).expect("a pod");
    wait_for_more(&cluster, App::Frontend, 10);
    let last = ClientRequests::of(&cluster, &pod).expect("requests").answered.pop().expect("answered");
    std::thread::sleep(Duration::from_millis(200));
    for proxy in [&pod, &cluster.pod(App::Backend).expect("a pod")] {
        let lines = cluster.logged(proxy).expect("a log");
        assert!(lines.iter().all(|line| line.path != last), "{last} has passed a proxy");
    }
    cluster.check().expect("all programs run");
}
