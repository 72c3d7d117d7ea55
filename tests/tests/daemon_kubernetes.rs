//! The daemon beside an API server that gives recorded answers.

use std::{
    fs,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::{Arc, Mutex},
    thread,
};

use intercept_agent::daemon::{
    protocol::{Add, Request, Response, Sandbox, Select},
    reconcile::{Report, State},
    wanted::Given,
};
use serde_json::{Value, json};
use tests::{
    agent::Agent,
    daemon::{Daemon, OUTBOUND, answers, proxy, service},
    testbed::{Pod, PodSpec},
};

const UID: &str = "5f0c8a52-52f6-4c0e-9d0e-2f4f7f2a1f10";

/// Answers a list with the pods that are there, then streams events to whoever watches.
struct Api {
    address: SocketAddr,
    state: Arc<Mutex<Shared>>,
}

#[derive(Default)]
struct Shared {
    pods: Vec<Value>,
    watchers: Vec<TcpStream>,
    asked: Vec<String>,
    posted: Vec<Value>,
    version: u64,
}

impl Api {
    fn start(pods: Vec<Value>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("an address");
        let state = Arc::new(Mutex::new(Shared { pods, version: 100, ..Shared::default() }));
        let shared = Arc::clone(&state);
        // Ends with the process.
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let shared = Arc::clone(&shared);
                thread::spawn(move || answer(stream, &shared));
            }
        });
        Self { address, state }
    }

    fn shared(&self) -> std::sync::MutexGuard<'_, Shared> {
        self.state.lock().expect("whole")
    }

    /// Send an event to all who watch.
    fn event(&self, kind: &str, mut pod: Value) {
        let mut shared = self.shared();
        shared.version += 1;
        pod["metadata"]["resourceVersion"] = json!(shared.version.to_string());
        let line = format!("{}\n", json!({ "type": kind, "object": pod }));
        shared.watchers.retain_mut(|watcher| watcher.write_all(line.as_bytes()).is_ok());
    }

    /// Cut everybody off.
    fn cut(&self) {
        self.shared().watchers.drain(..).for_each(|w| drop(w.shutdown(std::net::Shutdown::Both)));
    }
}

fn answer(mut stream: TcpStream, shared: &Mutex<Shared>) {
    let mut reader = BufReader::new(stream.try_clone().expect("a copy"));
    let mut head = reader.by_ref().lines().map_while(Result::ok).take_while(|line| !line.is_empty());
    let request = head.next().unwrap_or_default();
    let length = head.find_map(|line| {
        line.to_ascii_lowercase().strip_prefix("content-length:").map(|value| value.trim().to_owned())
    });
    head.for_each(drop);
    let mut body = vec![0; length.map_or(0, |length| length.parse().expect("a length"))];
    reader.read_exact(&mut body).expect("a body");
    let mut shared = shared.lock().expect("whole");
    let head = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\nconnection: close\r\n\r\n";
    if request.starts_with("POST ") {
        let posted: Value = serde_json::from_slice(&body).expect("JSON");
        let sent = stream.write_all(format!("{}{posted}", head.replace("200 OK", "201 Created")).as_bytes());
        shared.posted.push(posted);
        shared.asked.push(request);
        return sent.expect("sent");
    }
    let sent = if request.contains("watch=true") {
        let sent = stream.write_all(head.as_bytes());
        shared.watchers.push(stream);
        sent
    } else {
        let list = json!({
            "kind": "PodList", "apiVersion": "v1",
            "metadata": { "resourceVersion": shared.version.to_string() },
            "items": shared.pods,
        });
        stream.write_all(format!("{head}{list}").as_bytes())
    };
    shared.asked.push(request);
    sent.expect("sent");
}

fn pod(name: &str, uid: &str, spec: &Value, annotations: &Value) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": { "name": name, "namespace": "shop", "uid": uid, "resourceVersion": "1", "annotations": annotations },
        "spec": spec,
        "status": { "phase": "Running" },
    })
}

fn report(daemon: &Daemon<'_>, name: &str) -> Option<Report> {
    daemon.reports().expect("reports").into_iter().find(|report| report.name == format!("shop/{name}"))
}

fn is(daemon: &Daemon<'_>, name: &str, state: State) -> bool {
    report(daemon, name).is_some_and(|report| report.state == state)
}

#[test]
fn pods_of_the_api_are_captured_followed_and_released() {
    let agent = Agent::new("d-api").expect("the agent");
    let place = Pod::new(PodSpec::new("api")).expect("a pod");
    let actor = proxy(&place);
    // The kubelet's layout, below the cgroup that the test may use.
    let cgroup = place.cgroup.path().join(format!("kubepods/burstable/pod{UID}"));
    fs::create_dir_all(&cgroup).expect("made");
    for pid in place.cgroup.processes().expect("listed") {
        fs::write(cgroup.join("cgroup.procs"), pid.to_string()).expect("moved");
    }

    // A native sidecar with a user of its own.
    let sidecar = json!({ "name": "istio-proxy", "restartPolicy": "Always", "args": ["proxy", "sidecar"],
                          "securityContext": { "runAsUser": 1337, "runAsGroup": 1337 } });
    let spec = json!({ "containers": [{ "name": "app" }], "initContainers": [sidecar] });
    let host = json!({ "hostNetwork": true, "containers": [{ "name": "istio-proxy" }] });
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
    let config = json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "c",
        "clusters": [{ "name": "c", "cluster": { "server": format!("http://{}", api.address) } }],
        "users": [{ "name": "u", "user": {} }],
        "contexts": [{ "name": "c", "context": { "cluster": "c", "user": "u" } }],
    });
    fs::write(&kubeconfig, config.to_string()).expect("written");
    let root = place.cgroup.path().to_str().expect("text");
    let arguments = ["--node-name", "node-1", "--cgroup-root", root];
    let variables = [("KUBECONFIG", kubeconfig.to_str().expect("text"))];
    let mut daemon = Daemon::start_with(&agent, &arguments, &variables).expect("a daemon");

    daemon.wait("captured", |daemon| is(daemon, "cart", State::Captured)).expect("captured");
    assert_eq!(answers(&actor, service()).as_deref(), Some("proxy"));
    let left = |name: &str| report(&daemon, name).and_then(|report| report.left_alone);
    assert_eq!(left("host").as_deref(), Some("host_network"));
    assert_eq!(left("plain").as_deref(), Some("no_sidecar"));
    let problem = report(&daemon, "wrong").and_then(|report| report.problem).expect("a problem");
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
    let mut questions = asked.iter().filter(|request| request.starts_with("GET "));
    assert!(questions.all(|request| request.contains("spec.nodeName%3Dnode-1")), "{asked:?}");

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

    daemon.wait("settled", |daemon| is(daemon, "cart", State::Captured)).expect("settled");

    // Without an answer of the API what is in force stays; neither is it needed to start.
    daemon.kill().expect("killed");
    api.cut();
    api.shared().pods.clear();
    fs::write(&kubeconfig, config.to_string().replace(&api.address.to_string(), "127.0.0.1:1"))
        .expect("written");
    daemon.restart().expect("started");
    daemon.wait("taken over", |daemon| is(daemon, "cart", State::Captured)).expect("taken over");
    assert_eq!(answers(&actor, service()).as_deref(), Some("proxy"));

    // Gone from the API meanwhile.
    daemon.kill().expect("killed");
    fs::write(&kubeconfig, config.to_string()).expect("written");
    daemon.restart().expect("started");
    daemon.wait("released", |daemon| report(daemon, "cart").is_none()).expect("released");
    assert_eq!(agent.status().expect("status"), json!([]));

    // It comes, and goes, by events.
    daemon.wait("it watches", |_| !api.shared().watchers.is_empty()).expect("it watches");
    api.event("ADDED", pod("cart", UID, &spec, &none));
    daemon.wait("captured", |daemon| is(daemon, "cart", State::Captured)).expect("captured");
    api.event("DELETED", pod("cart", UID, &spec, &none));
    daemon.wait("released", |daemon| report(daemon, "cart").is_none()).expect("released");
    assert_eq!(agent.status().expect("status"), json!([]));

    // Where the runtime asked, it alone says when the pod goes: a list may be older.
    let sandbox =
        Sandbox { sandbox: "s".into(), uid: Some(UID.into()), namespace: "shop".into(), name: "cart".into() };
    let add = Add {
        pod: sandbox.clone(),
        netns: place.netns.path().to_owned(),
        cgroup: None,
        annotations: None,
        select: Select::All,
        given: Given { arguments: OUTBOUND.map(str::to_owned).to_vec(), ..Given::default() },
    };
    let done = |word: &str| Response::Done(word.into());
    assert_eq!(daemon.ask(&Request::Add(Box::new(add))).expect("an answer"), done("captured"));
    api.event("DELETED", pod("cart", UID, &spec, &none));
    daemon.kill().expect("killed");
    api.cut();
    api.shared().pods = vec![pod("plain", "uid-plain", &plain, &none)];
    daemon.restart().expect("started");
    daemon.wait("the API was heard", |daemon| is(daemon, "plain", State::LeftAlone)).expect("heard");
    daemon.wait("it watches", |_| !api.shared().watchers.is_empty()).expect("it watches");
    api.event("DELETED", pod("cart", UID, &spec, &none));
    api.event("DELETED", pod("plain", "uid-plain", &plain, &none));
    daemon.wait("the event was heard", |daemon| report(daemon, "plain").is_none()).expect("heard");
    daemon.wait("still captured", |daemon| is(daemon, "cart", State::Captured)).expect("captured");
    assert_eq!(answers(&actor, service()).as_deref(), Some("proxy"));
    assert_eq!(daemon.ask(&Request::Delete(sandbox)).expect("an answer"), done("released"));
    assert_eq!(agent.status().expect("status"), json!([]));
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
