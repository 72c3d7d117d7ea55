//! The daemon with an API server that gives recorded answers.

use std::fs;

use intercept_agent::facade::daemon::{
    Add, CaptureArgs, DaemonRequest, ModeRule, PodMode, PodReport, PodState, Response, SandboxInfo, Select,
};
use serde_json::json;
use tests::{
    agent::Agent,
    api::{Api, WatchedApi, pod},
    daemon::{Daemon, OUTBOUND, add, answers, proxy, service},
    testbed::{Pod, PodSpec},
};

const UID: &str = "5f0c8a52-52f6-4c0e-9d0e-2f4f7f2a1f10";

fn report(daemon: &Daemon<'_>, name: &str) -> Option<PodReport> {
    daemon.reports().expect("reports").into_iter().find(|report| report.name == format!("shop/{name}"))
}

fn is(daemon: &Daemon<'_>, name: &str, state: PodState) -> bool {
    report(daemon, name).is_some_and(|report| report.state == state)
}

#[test]
fn pods_of_the_api_are_captured_followed_and_released() {
    let agent = Agent::new("d-api").expect("the agent");
    let sandbox = Pod::new(PodSpec::new("api")).expect("a pod");
    let actor = proxy(&sandbox);
    // The kubelet's layout, below the cgroup that the test may use.
    let cgroup = sandbox.cgroup.path().join(format!("kubepods/burstable/pod{UID}"));
    fs::create_dir_all(&cgroup).expect("made");
    for pid in sandbox.cgroup.processes().expect("listed") {
        fs::write(cgroup.join("cgroup.procs"), pid.to_string()).expect("moved");
    }

    // A native sidecar with its own user.
    let sidecar = json!({ "name": "istio-proxy", "restartPolicy": "Always", "args": ["proxy", "sidecar"],
                          "securityContext": { "runAsUser": 1337, "runAsGroup": 1337 } });
    let spec = json!({ "containers": [{ "name": "app" }], "initContainers": [sidecar] });
    let host = json!({ "hostNetwork": true, "containers": [{ "name": "app" }, { "name": "istio-proxy" }] });
    let plain = json!({ "containers": [{ "name": "app" }] });
    let none = json!({});
    let api = Api::start(vec![
        pod("cart", UID, &spec, &none),
        pod("host", "uid-host", &host, &none),
        pod("plain", "uid-plain", &plain, &none),
        pod("wrong", "uid-wrong", &spec, &json!({ "traffic.sidecar.istio.io/includeInboundPorts": "http" })),
    ]);
    let folder = tempfile::tempdir().expect("a folder");
    let kubeconfig = folder.path().join("kubeconfig");
    api.write_kubeconfig(&kubeconfig).expect("written");
    let root = sandbox.cgroup.path().to_str().expect("text");
    let arguments = ["--node-name", "node-1", "--cgroup-root", root];
    let variables = [("KUBECONFIG", kubeconfig.to_str().expect("text"))];
    let mut daemon = Daemon::start_with(&agent, &arguments, &variables).expect("a daemon");

    daemon.wait("captured", |daemon| is(daemon, "cart", PodState::Captured)).expect("captured");
    assert_eq!(answers(&actor, service()).as_deref(), Some("proxy"));
    let left = |name: &str| report(&daemon, name).and_then(|report| report.left_alone);
    assert_eq!(left("host").as_deref(), Some("host_network"));
    assert_eq!(left("plain").as_deref(), Some("no_sidecar"));
    let problem = report(&daemon, "wrong").and_then(|report| report.failure).expect("a problem");
    daemon.wait("an event says so", |_| !api.shared().posted.is_empty()).expect("an event");
    let events = std::mem::take(&mut api.shared().posted);
    assert_eq!(events.len(), 1, "{events:?}");
    assert_eq!(events[0]["regarding"]["name"], "wrong", "{events:?}");
    assert_eq!((&events[0]["reason"], &events[0]["type"]), (&json!("NotCaptured"), &json!("Warning")));
    assert_eq!(events[0]["note"], problem.text, "{events:?}");
    assert!(problem.cause == "options" && problem.text.contains("includeInboundPorts"), "{problem:?}");
    daemon.wait("it watches", |_| !api.shared().watchers.is_empty()).expect("it watches");
    let otherwise = json!({ "traffic.sidecar.istio.io/excludeOutboundPorts": "https" });
    api.event("MODIFIED", pod("wrong", "uid-wrong", &spec, &otherwise));
    daemon.wait("another event, with another text", |_| !api.shared().posted.is_empty()).expect("an event");
    let events = std::mem::take(&mut api.shared().posted);
    assert!(
        events[0]["note"].as_str().is_some_and(|note| note.contains("excludeOutboundPorts")),
        "{events:?}"
    );
    let asked = api.shared().asked.clone();
    let questions = |of: &'static str| asked.iter().filter(move |request| request.starts_with(of));
    assert!(questions("GET /api/v1/pods").all(|asked| asked.contains("spec.nodeName%3Dnode-1")), "{asked:?}");
    // Of namespaces only those with a label matter.
    let mut of_namespaces = questions("GET /api/v1/namespaces");
    assert!(of_namespaces.all(|asked| asked.contains("labelSelector=intercept%2Fmode")), "{asked:?}");
    let known = questions("GET /api/v1/pods").chain(questions("GET /api/v1/namespaces")).count();
    assert_eq!(questions("GET ").count(), known, "{asked:?}");

    // A changed annotation, in place.
    let excluded = json!({ "traffic.sidecar.istio.io/excludeOutboundIPRanges": "10.96.0.0/16" });
    api.event("MODIFIED", pod("cart", UID, &spec, &excluded));
    daemon
        .wait("not captured any more", |_| answers(&actor, service()).as_deref() != Some("proxy"))
        .expect("changed");
    api.event("MODIFIED", pod("cart", UID, &spec, &none));
    daemon
        .wait("captured again", |_| answers(&actor, service()).as_deref() == Some("proxy"))
        .expect("changed back");

    daemon.wait("settled", |daemon| is(daemon, "cart", PodState::Captured)).expect("settled");

    // Captures stay while the API does not answer, and the daemon starts without it.
    daemon.kill().expect("killed");
    api.cut();
    api.shared().pods.clear();
    let config = fs::read_to_string(&kubeconfig).expect("read");
    let nowhere = config.replace(&api.address().to_string(), "127.0.0.1:1");
    fs::write(&kubeconfig, nowhere).expect("written");
    daemon.restart().expect("started");
    daemon.wait("taken over", |daemon| is(daemon, "cart", PodState::Captured)).expect("taken over");
    assert_eq!(answers(&actor, service()).as_deref(), Some("proxy"));

    // Deleted from the API meanwhile.
    daemon.kill().expect("killed");
    fs::write(&kubeconfig, config).expect("written");
    daemon.restart().expect("started");
    daemon.wait("released", |daemon| report(daemon, "cart").is_none()).expect("released");
    assert_eq!(agent.pods().expect("status"), []);

    // Created and deleted by events.
    daemon.wait("it watches", |_| !api.shared().watchers.is_empty()).expect("it watches");
    api.event("ADDED", pod("cart", UID, &spec, &none));
    daemon.wait("captured", |daemon| is(daemon, "cart", PodState::Captured)).expect("captured");
    api.event("DELETED", pod("cart", UID, &spec, &none));
    daemon.wait("released", |daemon| report(daemon, "cart").is_none()).expect("released");
    assert_eq!(agent.pods().expect("status"), []);

    // A pod that the runtime announced ends when the runtime says so, because a list may be older.
    let info = SandboxInfo {
        sandbox: "s".into(),
        uid: Some(UID.into()),
        namespace: "shop".into(),
        name: "cart".into(),
    };
    let add = Add {
        pod: info.clone(),
        netns: sandbox.netns.path().to_owned(),
        cgroup: None,
        annotations: None,
        addresses: Vec::new(),
        select: Select::All,
        given: CaptureArgs { arguments: OUTBOUND.map(str::to_owned).to_vec(), ..CaptureArgs::default() },
    };
    let done = |word: &str| Response::Done(word.into());
    assert_eq!(daemon.ask(&DaemonRequest::Add(Box::new(add))).expect("an answer"), done("captured"));
    api.event("DELETED", pod("cart", UID, &spec, &none));
    daemon.kill().expect("killed");
    api.cut();
    api.shared().pods = vec![pod("plain", "uid-plain", &plain, &none)];
    daemon.restart().expect("started");
    daemon.wait("the API was heard", |daemon| is(daemon, "plain", PodState::Ignored)).expect("heard");
    daemon.wait("it watches", |_| !api.shared().watchers.is_empty()).expect("it watches");
    api.event("DELETED", pod("cart", UID, &spec, &none));
    api.event("DELETED", pod("plain", "uid-plain", &plain, &none));
    daemon.wait("the event was heard", |daemon| report(daemon, "plain").is_none()).expect("heard");
    daemon.wait("still captured", |daemon| is(daemon, "cart", PodState::Captured)).expect("captured");
    assert_eq!(answers(&actor, service()).as_deref(), Some("proxy"));
    assert_eq!(daemon.ask(&DaemonRequest::Delete(info)).expect("an answer"), done("released"));
    assert_eq!(agent.pods().expect("status"), []);
}

/// What each source knows of why a pod has its mode. The percentile of the Deployment `cart` is 24.
#[test]
fn the_mode_follows_the_workload_as_far_as_a_source_knows_it() {
    let agent = Agent::new("d-api-mode").expect("the agent");
    let sandbox = Pod::new(PodSpec::new("api-mode")).expect("a pod");
    let actor = proxy(&sandbox);
    let cgroup = sandbox.cgroup.path().join(format!("kubepods/burstable/pod{UID}"));
    fs::create_dir_all(&cgroup).expect("made");
    for pid in sandbox.cgroup.processes().expect("listed") {
        fs::write(cgroup.join("cgroup.procs"), pid.to_string()).expect("moved");
    }
    let spec = json!({ "containers": [{ "name": "app" }, { "name": "istio-proxy" }] });
    let owned = |name: &str, uid: &str, kind: &str, owner: &str, labels: serde_json::Value| {
        let mut pod = pod(name, uid, &spec, &json!({}));
        let owner =
            json!({ "apiVersion": "v1", "kind": kind, "name": owner, "uid": "o", "controller": true });
        pod["metadata"]["ownerReferences"] = json!([owner]);
        pod["metadata"]["labels"] = labels;
        pod
    };
    let pods = vec![
        owned("cart-x", UID, "ReplicaSet", "cart-5d4f", json!({ "pod-template-hash": "5d4f" })),
        owned("bill-x", "uid-bill", "Job", "bill-29406720", json!({})),
        owned("log-x", "uid-log", "DaemonSet", "log", json!({})),
        owned("db-0", "uid-db", "StatefulSet", "db", json!({})),
        pod("alone", "uid-alone", &spec, &json!({})),
    ];
    let root = sandbox.cgroup.path().to_str().expect("text").to_owned();
    let arguments = |percent: &'static str| {
        ["--cgroup-root", &root, "--enforce-percent", percent, "--", "--shadow"].map(str::to_owned)
    };
    let start = arguments("25");
    let start: Vec<&str> = start.iter().map(String::as_str).collect();
    let mut node = WatchedApi::start(&agent, pods, &start, &[]).expect("a daemon");
    node.daemon.wait("captured", |daemon| is(daemon, "cart-x", PodState::Captured)).expect("captured");
    assert_eq!(answers(&actor, service()).as_deref(), Some("proxy"));
    let mode = |daemon: &Daemon<'_>, name: &str| report(daemon, name).and_then(|report| report.mode);
    let cart = mode(&node.daemon, "cart-x").expect("a mode");
    assert_eq!((cart.mode, cart.rule), (PodMode::Enforce, ModeRule::EnforcePercent));
    for (name, workload) in [
        ("cart-x", "shop/Deployment/cart"),
        ("bill-x", "shop/CronJob/bill"),
        ("log-x", "shop/DaemonSet/log"),
        ("db-0", "shop/StatefulSet/db"),
        ("alone", "shop/Pod/alone"),
    ] {
        let found = mode(&node.daemon, name).expect("a mode");
        assert_eq!(found.workload.as_deref(), Some(workload), "{name}");
    }
    let less = arguments("24");
    let less: Vec<&str> = less.iter().map(String::as_str).collect();
    node.restart_with(&less).expect("started");
    node.daemon
        .wait("in shadow mode", |_| answers(&actor, service()).as_deref() != Some("proxy"))
        .expect("in shadow mode");
    let cart = mode(&node.daemon, "cart-x").expect("a mode");
    assert_eq!((cart.mode, cart.rule, cart.percentile), (PodMode::Shadow, ModeRule::Default, Some(24)));

    // Neither a file nor the runtime tells the workload.
    let (file, added) = (
        Pod::new(PodSpec::new("mode-file")).expect("a pod"),
        Pod::new(PodSpec::new("mode-add")).expect("a pod"),
    );
    let _proxies = (proxy(&file), proxy(&added));
    node.daemon.put("a", &file, &OUTBOUND).expect("put");
    let by_file = node.daemon.wait_for("a", PodState::Captured).expect("captured").mode.expect("a mode");
    assert_eq!((by_file.mode, by_file.rule, by_file.workload), (PodMode::Enforce, ModeRule::File, None));
    node.daemon.kill().expect("killed");
    let without_api = Daemon::start(&agent, &[]).expect("a daemon");
    let arguments = [&OUTBOUND[..], &["--shadow"]].concat().into_iter().map(str::to_owned).collect();
    let request = add(&added, "uid-added", arguments).expect("a request");
    assert_eq!(without_api.ask(&request).expect("an answer"), Response::Done("captured".into()));
    let mut reports = without_api.reports().expect("reports").into_iter();
    let by_runtime = reports.find(|report| report.pod == "pod/uid-added").and_then(|report| report.mode);
    let by_runtime = by_runtime.expect("a mode");
    let found = (by_runtime.mode, by_runtime.rule, by_runtime.workload);
    assert_eq!(found, (PodMode::Shadow, ModeRule::Default, None));
}

#[test]
fn without_a_way_to_the_api_it_does_not_start() {
    let agent = Agent::new("d-noapi").expect("the agent");
    let mut command = agent.command("daemon");
    let folder = tempfile::tempdir().expect("a folder");
    let socket = folder.path().join("agent.sock");
    command.env("KUBECONFIG", folder.path().join("absent")).env("HOME", folder.path());
    command.env_remove("KUBERNETES_SERVICE_HOST").arg("--node-name").arg("n").arg("--socket").arg(socket);
    let output = command.output().expect("started");
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && error.contains("--node-name needs"), "{error}");
}
