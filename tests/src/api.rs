//! An API server with recorded answers, for what the real one is too slow or too old.

use std::{
    fs,
    io::{self, BufRead as _, BufReader, Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    path::Path,
    sync::{Arc, Mutex},
    thread,
};

use serde_json::{Value, json};

mod node;

pub use node::{ApiNode, WatchedApi};

/// Answers a list with the current pods, and streams events to all watchers.
#[derive(Debug)]
pub struct Api {
    address: SocketAddr,
    state: Arc<Mutex<Shared>>,
}

/// The state of the server, and the requests that it got.
#[derive(Debug, Default)]
pub struct Shared {
    /// The list of pods.
    pub pods: Vec<Value>,
    /// The list of namespaces.
    pub namespaces: Vec<Value>,
    /// The connections of watchers of pods.
    pub watchers: Vec<TcpStream>,
    /// Those of watchers of namespaces.
    pub namespace_watchers: Vec<TcpStream>,
    /// The first lines of all requests.
    pub asked: Vec<String>,
    /// The bodies of POST requests.
    pub posted: Vec<Value>,
    version: u64,
}

impl Api {
    /// Starts a server with these pods. It runs until the process ends.
    pub fn start(pods: Vec<Value>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("an address");
        let state = Arc::new(Mutex::new(Shared { pods, version: 100, ..Shared::default() }));
        let shared = Arc::clone(&state);
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let shared = Arc::clone(&shared);
                thread::spawn(move || answer(stream, &shared));
            }
        });
        Self { address, state }
    }

    /// The address of the server.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Writes a kubeconfig for the server.
    pub fn write_kubeconfig(&self, path: &Path) -> io::Result<()> {
        let config = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "c",
            "clusters": [{ "name": "c", "cluster": { "server": format!("http://{}", self.address) } }],
            "users": [{ "name": "u", "user": {} }],
            "contexts": [{ "name": "c", "context": { "cluster": "c", "user": "u" } }],
        });
        fs::write(path, config.to_string())
    }

    /// The state of the server.
    pub fn shared(&self) -> std::sync::MutexGuard<'_, Shared> {
        self.state.lock().expect("whole")
    }

    /// Sends an event to all watchers of its kind.
    pub fn event(&self, kind: &str, mut object: Value) {
        let mut shared = self.shared();
        shared.version += 1;
        object["metadata"]["resourceVersion"] = json!(shared.version.to_string());
        let line = format!("{}\n", json!({ "type": kind, "object": object }));
        let watchers =
            if object["kind"] == "Namespace" { &mut shared.namespace_watchers } else { &mut shared.watchers };
        watchers.retain_mut(|watcher| watcher.write_all(line.as_bytes()).is_ok());
    }

    /// Closes the connections of all watchers.
    pub fn cut(&self) {
        let mut shared = self.shared();
        let namespaces = std::mem::take(&mut shared.namespace_watchers);
        let all = shared.watchers.drain(..).chain(namespaces);
        all.for_each(|watcher| drop(watcher.shutdown(std::net::Shutdown::Both)));
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
    let of_namespaces = request.starts_with("GET /api/v1/namespaces?");
    let sent = if request.contains("watch=true") {
        let sent = stream.write_all(head.as_bytes());
        let watchers = if of_namespaces { &mut shared.namespace_watchers } else { &mut shared.watchers };
        watchers.push(stream);
        sent
    } else {
        let (kind, items) = match of_namespaces {
            true => ("NamespaceList", &shared.namespaces),
            false => ("PodList", &shared.pods),
        };
        let list = json!({
            "kind": kind, "apiVersion": "v1",
            "metadata": { "resourceVersion": shared.version.to_string() },
            "items": items,
        });
        stream.write_all(format!("{head}{list}").as_bytes())
    };
    shared.asked.push(request);
    sent.expect("sent");
}

/// The injector's status annotation of a pod whose sidecar does not capture by itself.
pub const INJECTED: &str = r#"{"initContainers":["istio-validation"],"containers":["istio-proxy"]}"#;

/// A namespace whose label asks for this mode.
pub fn namespace(name: &str, mode: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Namespace",
        "metadata": { "name": name, "resourceVersion": "1", "labels": { "intercept/mode": mode } },
    })
}

/// A running injected pod in the namespace `shop`.
pub fn pod(name: &str, uid: &str, spec: &Value, annotations: &Value) -> Value {
    let mut annotations = annotations.clone();
    annotations["sidecar.istio.io/status"] = json!(INJECTED);
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": { "name": name, "namespace": "shop", "uid": uid, "resourceVersion": "1", "annotations": annotations },
        "spec": spec,
        "status": { "phase": "Running" },
    })
}
