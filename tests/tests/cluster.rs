//! The chart in a cluster: helm installs the agent, a Deployment's pods and a Job's are captured before their first
//! connection and through everything that happens to the agent and the node, and uninstalling leaves nothing.
//!
//! `cargo xtask cluster` builds Kubernetes and runs this.

use std::{
    fs,
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use tests::{
    agent::Agent,
    cluster::{
        APP_IMAGE, App, CAPTURED, CLIENTS, Cluster, DocumentedCommands, NAMESPACE, NODE, SERVICE, clients,
        requests::{self, ClientRequests, ServiceClient},
        servers,
    },
};

/// As docs/istio.md and docs/operations.md have them.
const RELEASE: &str = "intercept";
const SYSTEM: &str = "intercept-system";
const EXCLUDED: &str = "traffic.sidecar.istio.io/excludeOutboundPorts";

fn text<'a>(object: &'a Value, pointer: &str) -> &'a str {
    object.pointer(pointer).and_then(Value::as_str).unwrap_or_default()
}

fn address(pod: &Value) -> &str {
    text(pod, "/status/podIP")
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

fn rolled_out(cluster: &Cluster, namespace: &str, what: &[impl AsRef<str>]) {
    for object in what {
        let arguments = ["-n", namespace, "rollout", "status", object.as_ref(), "--timeout=300s"];
        let done = cluster.kubectl(&arguments);
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

/// Runs a command of docs/istio.md.
fn documented(cluster: &Cluster, page: &DocumentedCommands, part: &str, replaced: &[(&str, &str)]) -> String {
    let start = Instant::now();
    let done = page.run(cluster, part, replaced);
    println!("    {part:?}: {:.1} s", start.elapsed().as_secs_f64());
    done.unwrap_or_else(|error| panic!("{error:#}\n{}", cluster.logs()))
}

/// The values of a node whose folders of CNI are elsewhere.
const VALUES: &str = "values.json";

fn write_values(cluster: &Cluster) {
    let node = cluster.node();
    let values = json!({ "cni": { "confDir": node.cni_conf(), "binDir": node.cni_bin() } });
    cluster.write(VALUES, &values.to_string()).expect("written");
}

/// A chart with the name of istio-cni, whose pods do nothing.
fn install_stand_in(cluster: &Cluster) {
    let labels = json!({ "k8s-app": "istio-cni-node" });
    let container = json!({ "name": "install-cni", "image": APP_IMAGE, "command": ["sleep", "100000"] });
    let daemon_set = json!({
        "apiVersion": "apps/v1", "kind": "DaemonSet", "metadata": { "name": "istio-cni-node" },
        "spec": { "selector": { "matchLabels": labels }, "template": {
            "metadata": { "labels": labels },
            "spec": { "containers": [container], "terminationGracePeriodSeconds": 1 },
        } },
    });
    let chart = json!({ "apiVersion": "v2", "name": "istio-cni", "version": "1.0.0" });
    for (name, content) in [("Chart.yaml", chart), ("templates/node.yaml", daemon_set)] {
        cluster.write(&format!("istio-cni/{name}"), &content.to_string()).expect("written");
    }
    let install = "helm install istio-cni ./istio-cni -n istio-system --create-namespace";
    cluster.shell(install).expect("installed");
    rolled_out(cluster, "istio-system", &["daemonset/istio-cni-node"]);
}

/// From istio-cni, node by node. At the end the agent is uninstalled.
fn migrate(cluster: &Cluster, page: &DocumentedCommands) {
    let run = |part: &str, replaced: &[(&str, &str)]| documented(cluster, page, part, replaced);
    let count = |namespace| cluster.list("pods", namespace).expect("pods").len();
    let node = [("NODE", NODE)];
    install_stand_in(cluster);
    run("kubectl create namespace", &[]);
    run("kubectl label namespace", &[]);
    let selector = "--set nodeSelector.intercept=yes";
    run(selector, &[(selector, &format!("{selector} --values {VALUES}"))]);
    run("patch daemonset istio-cni-node", &[]);
    rolled_out(cluster, "istio-system", &["daemonset/istio-cni-node"]);
    assert_eq!((count("istio-system"), count(SYSTEM)), (1, 0), "the node has no label");

    run("kubectl drain", &node);
    run("kubectl label node", &node);
    let moved = |cluster: &Cluster| Ok(agent_restarts(cluster).is_ok() && count("istio-system") == 0);
    step("    moving", || cluster.wait("the agent stands in for istio-cni", moved).expect("moved"));
    run("rollout status", &[]);
    run("kubectl uncordon", &node);
    run("--reset-values", &[("VALUES.yaml", VALUES)]);
    run("rollout status", &[]);
    let selector = cluster.shell("kubectl -n intercept-system get daemonset intercept -o jsonpath='{.spec.template.spec.nodeSelector}'");
    assert_eq!(selector.expect("printed").trim(), r#"{"kubernetes.io/os":"linux"}"#);
    run("helm uninstall istio-cni", &[]);
    cluster.shell("helm uninstall intercept -n intercept-system").expect("uninstalled");
    let none = |_: &Cluster| Ok(count(SYSTEM) == 0);
    step("    uninstalling", || cluster.wait("the agent's pod is gone", none).expect("gone"));
}

/// On a fresh cluster.
fn install(cluster: &Cluster, page: &DocumentedCommands) {
    let values = format!("gke.yaml --values {VALUES}");
    documented(cluster, page, "gke.yaml", &[("REGISTRY/", "docker.io/library/"), ("gke.yaml", &values)]);
    documented(cluster, page, "rollout status", &[]);
    let said = documented(cluster, page, "/intercept-agent check", &[]);
    assert!(!said.contains("MISSING"), "{said}");
}

/// A pod has istio-validation and is captured.
fn look_at_a_pod(cluster: &Cluster, page: &DocumentedCommands) {
    let pod = cluster.pod(App::Frontend).expect("a pod");
    let names = [("NAMESPACE", NAMESPACE), ("POD", text(&pod, "/metadata/name"))];
    let init = documented(cluster, page, "get pod POD", &names);
    assert_eq!(init.trim(), "istio-validation");
    let status = documented(cluster, page, "/intercept-agent status", &[]);
    assert!(status.contains(text(&pod, "/metadata/uid")), "{status}");
}

/// The agent's container can make probes. Whether a pod that starts is proven at once is another matter.
fn pods_are_probed(cluster: &Cluster) {
    let events = cluster.shell("kubectl get events -A --field-selector reason=NotProven");
    let events = events.expect("listed");
    assert!(!events.contains("unprobed"), "{events}");
}

/// Every workload is restarted.
fn restart_workloads(cluster: &Cluster, page: &DocumentedCommands, agent: &Agent) {
    documented(cluster, page, "rollout restart", &[("NAMESPACE", NAMESPACE)]);
    let all = CAPTURED.into_iter().chain([App::Gateway, App::Plain, App::PlainServer]);
    rolled_out(cluster, NAMESPACE, &all.map(|app| format!("deploy/{}", app.as_str())).collect::<Vec<_>>());
    are_captured(cluster, agent, &CAPTURED);
    // The servers' logs begin with their new pods: some requests are those of old clients, others were answered by old servers.
    let counts = requests::count(cluster).expect("requests");
    assert_eq!(counts.around_a_proxy(), 0, "{counts:#?}");
}

/// The application runs.
fn run_application(cluster: &Cluster, agent: &Agent) {
    cluster.apply(&servers()).expect("applied");
    let servers = ["backend", "transparent", "dual-stack", "plain-server", "gateway"];
    rolled_out(cluster, NAMESPACE, &servers.map(|name| format!("deploy/{name}")));
    let service = format!("{SERVICE}:80").parse().expect("an address");
    cluster
        .wait("the service", |cluster| Ok(cluster.get(service, "/node")?.contains(" 200 ")))
        .expect("answers");
    cluster.apply(&clients()).expect("applied");
    let clients = ["dual-client", "frontend", "held", "exempt", "plain"];
    rolled_out(cluster, NAMESPACE, &clients.map(|name| format!("deploy/{name}")));
    let complete = ["-n", NAMESPACE, "wait", "--for=condition=complete", "job/job", "--timeout=300s"];
    cluster.kubectl(&complete).unwrap_or_else(|error| panic!("{error:#}\n{}", cluster.logs()));
    // Neither a gateway nor what has no sidecar, nor what has ended.
    are_captured(cluster, agent, &CAPTURED);
}

/// Every client goes on, and since the servers started, no request of a captured one has gone around a proxy.
fn nothing_has_passed(cluster: &Cluster, failures: Failures) {
    for app in CLIENTS {
        requests::wait_for_more(cluster, app, 10).expect("answered");
    }
    let counts = requests::count(cluster).unwrap_or_else(|error| panic!("{error:#}\n{}", cluster.logs()));
    println!("    {counts}");
    assert_eq!((counts.around_a_proxy(), counts.touched()), (0, 0), "{counts:#?}");
    assert!(counts.transparent() > 0 && counts.over_ipv6() > 0, "{counts:#?}");
    let failed = requests::of_other_client(cluster).expect("requests").failed;
    assert!(failures == Failures::Tolerated || failed.is_empty(), "{failed:?}");
    for route in ServiceClient::all() {
        let checked = requests::both_proxies_passed(cluster, &route);
        checked.unwrap_or_else(|error| panic!("{route:?}: {error:#}"));
        let failed = route.requests(cluster).expect("requests").failed;
        assert!(failures == Failures::Tolerated || failed.is_empty(), "{route:?}: {failed:?}");
    }
}

/// Whether requests may fail. None may go around a proxy.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Failures {
    None,
    /// Servers and clients start in any order.
    Tolerated,
}

/// What an exempt container sends passes the backend's proxy alone, although the node is a container itself: its mount of the
/// hierarchy begins below the root.
fn exempt_container_is_left_alone(cluster: &Cluster) {
    let backend = cluster.pod(App::Backend).expect("it");
    let left_alone = |_: &Cluster| {
        let served = requests::served(cluster, &backend)?;
        let last = served.iter().rfind(|request| request.is_exempt());
        Ok(last.is_some_and(|request| request.passed == ["inbound"]))
    };
    cluster.wait("its requests pass one proxy", left_alone).expect("exempt");
}

/// What arrives at the gateway passes on by the backend's proxy, and what the gateway does itself is left alone.
fn gateway_is_left_alone(cluster: &Cluster) {
    let (gateway, backend) = (cluster.pod(App::Gateway).expect("it"), cluster.pod(App::Backend).expect("it"));
    let to = format!("{}:8080", address(&gateway)).parse().expect("an address");
    let answer = cluster.get(to, "/by-gateway").expect("answered");
    assert!(answer.contains(" 200 ") && answer.ends_with(&format!("{}:8080", address(&backend))), "{answer}");
    let served = || requests::served(cluster, &backend).expect("requests");
    let found = served().into_iter().find(|request| request.path == "/by-gateway").expect("it was served");
    assert_eq!(found.passed, ["gateway", "inbound"]);
}

/// A changed annotation is followed while the pod runs.
fn annotations_are_followed(cluster: &Cluster) {
    let (pod, backend) = (cluster.pod(App::Frontend).expect("a pod"), cluster.pod(App::Backend).expect("it"));
    let annotate = |change: &str| {
        let arguments =
            ["-n", NAMESPACE, "annotate", "--overwrite", "pod", text(&pod, "/metadata/name"), change];
        cluster.kubectl(&arguments).expect("annotated");
    };
    let passes = |proxies: &[&str]| {
        let own = format!("/{}/", text(&pod, "/metadata/name"));
        let so = |cluster: &Cluster| {
            let served = requests::served(cluster, &backend)?;
            let last = served.iter().rfind(|request| request.path.starts_with(&own));
            Ok(last.is_some_and(|request| request.passed == proxies))
        };
        cluster.wait(&format!("the last request has passed {proxies:?}"), so).expect("followed");
    };
    passes(&["outbound", "inbound"]);
    annotate(&format!("{EXCLUDED}=80"));
    passes(&["inbound"]);
    annotate(&format!("{EXCLUDED}-"));
    passes(&["outbound", "inbound"]);
    let failed = ClientRequests::of(cluster, &pod, "app").expect("requests").failed;
    assert!(failed.is_empty(), "{failed:?}");
}

/// Replaces values of the chart, which rolls the DaemonSet.
fn upgrade(cluster: &Cluster, values: &[&str]) {
    let chart = cluster.chart().expect("the chart");
    let mut arguments = vec!["upgrade", RELEASE, &chart, "-n", SYSTEM, "--reuse-values"];
    arguments.extend(values.iter().flat_map(|value| ["--set", value]));
    cluster.helm(&arguments).unwrap_or_else(|error| panic!("{error:#}\n{}", cluster.logs()));
    rolled_out(cluster, SYSTEM, &["daemonset/intercept"]);
}

/// How often the agent's container has been started again, once it is ready.
fn agent_restarts(cluster: &Cluster) -> Result<u64> {
    let pods = cluster.list("pods", SYSTEM)?;
    let status = pods.first().and_then(|pod| pod.pointer("/status/containerStatuses/0"));
    let status = status.context("there is no agent")?;
    ensure!(status["ready"] == true, "the agent is not ready");
    Ok(status["restartCount"].as_u64().unwrap_or_default())
}

/// The daemon is killed, and the kubelet starts it again. Something may happen meanwhile.
fn daemon_is_killed(cluster: &Cluster, meanwhile: impl FnOnce(&dyn Fn())) {
    let before = agent_restarts(cluster).expect("it runs");
    let containers = cluster.containers(SYSTEM, "agent").expect("listed");
    meanwhile(&|| cluster.kill(&containers).expect("killed"));
    cluster.wait("the daemon is back", |cluster| Ok(agent_restarts(cluster)? > before)).expect("back");
}

/// The API answers nothing for a while, in which the daemon starts again.
fn api_is_silent(cluster: &Cluster) {
    daemon_is_killed(cluster, |kill| {
        cluster.server().stop().expect("stopped");
        kill();
        std::thread::sleep(Duration::from_secs(3));
        cluster.server().resume().expect("started");
    });
}

/// Pods of these Deployments start again.
fn replace(cluster: &Cluster, apps: &[App]) {
    for app in apps {
        let pod = cluster.pod(*app).expect("a pod");
        let name = text(&pod, "/metadata/name");
        cluster.kubectl(&["-n", NAMESPACE, "delete", "pod", name, "--wait=false"]).expect("deleted");
    }
}

/// Whether the daemon has decided on the pod before the API has reported it.
fn annotations_have_decided(cluster: &Cluster, app: App) -> bool {
    let log = cluster.kubectl(&["-n", SYSTEM, "logs", "daemonset/intercept"]).expect("a log");
    let pod = cluster.pod(app).expect("a pod");
    let name = text(&pod, "/metadata/name");
    log.lines().any(|line| line.contains("has not reported this pod in time") && line.contains(name))
}

/// The agent does not hear of pods that start: their annotations decide after `apiWait`.
fn api_does_not_report(cluster: &Cluster) {
    let apps = [App::Frontend, App::Held];
    cluster.cut_agent_off().expect("cut off");
    replace(cluster, &apps);
    rolled_out(cluster, NAMESPACE, &apps.map(|app| format!("deploy/{}", app.as_str())));
    for app in apps {
        assert!(annotations_have_decided(cluster, app), "{}", app.as_str());
    }
    cluster.reconnect_agent().expect("reconnected");
}

/// The agent hears of pods when their ADD has waited for seconds.
fn api_reports_late(cluster: &Cluster) {
    const LATE: Duration = Duration::from_secs(3);
    let apps = [App::Frontend, App::Held];
    cluster.cut_agent_off().expect("cut off");
    replace(cluster, &apps);
    std::thread::sleep(LATE);
    for app in apps {
        let pod = cluster.pod(app).expect("a pod");
        assert_eq!((text(&pod, "/status/phase"), address(&pod)), ("Pending", ""), "{pod:#}");
    }
    cluster.reconnect_agent().expect("reconnected");
    rolled_out(cluster, NAMESPACE, &apps.map(|app| format!("deploy/{}", app.as_str())));
    for app in apps {
        assert!(!annotations_have_decided(cluster, app), "{}", app.as_str());
    }
}

/// The primary network plugin writes its file again. A pod that starts a second later is captured from its first
/// connection.
fn cni_file_is_rewritten(cluster: &Cluster) {
    let path = cluster.node().cni_file();
    let read = || serde_json::from_slice::<Value>(&fs::read(&path).expect("read")).expect("JSON");
    let complete = read();
    let mut conf = complete.clone();
    conf["plugins"].as_array_mut().expect("a list").retain(|plugin| plugin["type"] != "intercept-cni");
    assert_ne!(conf, complete, "the plugin is in {}", path.display());
    fs::write(&path, conf.to_string()).expect("written");
    std::thread::sleep(Duration::from_secs(1));
    assert_eq!(read(), complete);
    let apps = [App::Frontend, App::Held];
    replace(cluster, &apps);
    rolled_out(cluster, NAMESPACE, &apps.map(|app| format!("deploy/{}", app.as_str())));
}

/// Every pod that can go goes, and nothing is captured.
fn drain(cluster: &Cluster, page: &DocumentedCommands, agent: &Agent) {
    documented(cluster, page, "kubectl drain", &[("NODE", NODE)]);
    are_captured(cluster, agent, &[]);
}

/// The node reboots: all pods have ended, bpffs is empty, and the kubelet starts pods again before the agent runs.
fn reboot(cluster: &Cluster, agent: &Agent) {
    upgrade(cluster, &["nodeSelector.awake=yes"]);
    let none = |cluster: &Cluster| Ok(cluster.list("pods", SYSTEM)?.is_empty());
    cluster.wait("the agent is gone", none).expect("gone");
    fs::remove_dir_all(agent.bpffs().join("intercept")).expect("removed");
    cluster.kubectl(&["uncordon", "node-1"]).expect("uncordoned");
    // A pod without a sidecar starts, one with a sidecar waits.
    rolled_out(cluster, NAMESPACE, &["deploy/plain", "deploy/plain-server"]);
    for app in CAPTURED {
        cluster
            .wait("the plugin has been asked", |cluster| {
                let name = format!("involvedObject.name={}", text(&cluster.pod(app)?, "/metadata/name"));
                let events =
                    cluster.kubectl(&["-n", NAMESPACE, "get", "events", "--field-selector", &name])?;
                Ok(events.contains("FailedCreatePodSandBox"))
            })
            .expect("asked");
        let pod = cluster.pod(app).expect("a pod");
        assert_eq!((text(&pod, "/status/phase"), address(&pod)), ("Pending", ""), "{pod:#}");
    }
    cluster.kubectl(&["label", "node", "node-1", "awake=yes"]).expect("labelled");
    let some = |cluster: &Cluster| Ok(!cluster.list("pods", SYSTEM)?.is_empty());
    cluster.wait("the agent is back", some).expect("back");
    rolled_out(cluster, SYSTEM, &["daemonset/intercept"]);
    let all = CAPTURED.into_iter().chain([App::Gateway]);
    rolled_out(cluster, NAMESPACE, &all.map(|app| format!("deploy/{}", app.as_str())).collect::<Vec<_>>());
    are_captured(cluster, agent, &CAPTURED);
}

/// As docs/operations.md says.
fn uninstall(cluster: &Cluster) {
    upgrade(cluster, &["cleanUpOnExit=true"]);
    cluster.helm(&["uninstall", RELEASE, "-n", SYSTEM]).expect("uninstalled");
    let none = |cluster: &Cluster| Ok(cluster.list("pods", SYSTEM)?.is_empty());
    cluster.wait("the agent's pod is gone", none).expect("gone");
}

/// What runs goes on, and passes no proxy on its way out or in.
fn is_uncaptured(cluster: &Cluster) {
    let backend = cluster.pod(App::Backend).expect("a pod");
    let before = requests::served(cluster, &backend).expect("requests").len();
    for app in CLIENTS {
        requests::wait_for_more(cluster, app, 10).expect("answered");
    }
    let served = requests::served(cluster, &backend).expect("requests");
    let late = &served[before..];
    // One that was under way.
    let captured = late.iter().skip(3).filter(|request| !request.passed.is_empty()).count();
    assert!(late.len() > 20 && captured == 0, "{captured} of {} have passed a proxy", late.len());
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

    let page = DocumentedCommands::read("istio.md").expect("the page");
    write_values(&cluster);
    cluster.removing_ended(|| {
        step("migrating from istio-cni", || migrate(&cluster, &page));
        step("installing", || install(&cluster, &page));
        step("starting the application", || run_application(&cluster, &agent));
        step("a pod", || look_at_a_pod(&cluster, &page));
        step("requests", || nothing_has_passed(&cluster, Failures::None));
        step("probes", || pods_are_probed(&cluster));
        step("a gateway", || gateway_is_left_alone(&cluster));
        step("an exempt container", || exempt_container_is_left_alone(&cluster));
        step("a killed daemon", || daemon_is_killed(&cluster, |kill| kill()));
        step("an API that does not report pods", || api_does_not_report(&cluster));
        step("requests", || nothing_has_passed(&cluster, Failures::None));
        step("upgrading the chart", || upgrade(&cluster, &["log=debug", "apiWait=10"]));
        step("requests", || nothing_has_passed(&cluster, Failures::None));
        step("an API that reports pods late", || api_reports_late(&cluster));
        step("requests", || nothing_has_passed(&cluster, Failures::None));
        step("a silent API", || api_is_silent(&cluster));
        step("requests", || nothing_has_passed(&cluster, Failures::None));
        step("a rewritten CNI file", || cni_file_is_rewritten(&cluster));
        step("requests", || nothing_has_passed(&cluster, Failures::None));
        step("changing annotations", || annotations_are_followed(&cluster));
        step("restarting the workloads", || restart_workloads(&cluster, &page, &agent));
        step("draining the node", || drain(&cluster, &page, &agent));
        step("rebooting the node", || reboot(&cluster, &agent));
        step("requests", || nothing_has_passed(&cluster, Failures::Tolerated));
        step("uninstalling", || uninstall(&cluster));
        step("requests without the agent", || is_uncaptured(&cluster));
    });

    let left = page.left();
    assert!(left.iter().all(|command| command.contains("istio/istiod")), "{left:#?}");
    assert!(!agent.bpffs().join("intercept").exists());
    assert_eq!(files(&cluster), before);
    let roles = cluster.list("clusterroles,clusterrolebindings", "").expect("listed");
    assert!(roles.iter().all(|role| text(role, "/metadata/name") != RELEASE));
    cluster.check().expect("all programs run");
}
