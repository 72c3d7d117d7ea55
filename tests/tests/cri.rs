//! Pods of a real container runtime: containerd runs them, and the agent's image as deploy/ describes. Their network is made
//! by CNI plugins, of which the agent's is one.
//!
//! `cargo xtask cri` downloads containerd, makes the image and runs these tests.

use std::{
    env, fs,
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    path::Path,
    time::{Duration, Instant},
};

use serde_json::Value;
use tests::{
    agent::{Agent, succeed},
    cri::{CriClient, CriNode, DaemonPod, IMAGE, PodConfig, PodNetwork, PodSandbox, uid, wait},
    testbed::Ids,
};

const STATUS: (&str, &str) = (
    "sidecar.istio.io/status",
    r#"{"initContainers":["istio-validation"],"containers":["istio-proxy"],"revision":"default"}"#,
);
const LEFT_ALONE: (&str, &str) = ("traffic.sidecar.istio.io/excludeOutboundPorts", "81");
const TPROXY: (&str, &str) = ("sidecar.istio.io/interceptionMode", "TPROXY");
/// An address of the node, which connections reach that are not captured.
const SERVICE: &str = "10.96.0.10";

/// The sidecar: it answers with the original destination and the source of the connection.
const PROXY: &str = r#"
import selectors, socket, struct
waiting = selectors.DefaultSelector()
for port in 15001, 15006:
    listener = socket.create_server(("0.0.0.0", port))
    waiting.register(listener, selectors.EVENT_READ)
while True:
    for key, _ in waiting.select():
        accepted, peer = key.fileobj.accept()
        port, address = struct.unpack("!2xH4s8x", accepted.getsockopt(0, 80, 16))
        accepted.sendall(b"%s:%d from %s\n" % (socket.inet_ntoa(address).encode(), port, peer[0].encode()))
        accepted.close()
"#;

struct CriFixture<'a> {
    node: &'a CriNode,
    client: &'a CriClient,
}

impl CriFixture<'_> {
    fn config(&self, name: &str, annotations: &[(&str, &str)]) -> PodConfig {
        let cgroup = self.node.make_pod_cgroup(&uid(name)).expect("a cgroup");
        PodConfig::new(name, &cgroup, &self.node.logs().join(name), annotations)
    }

    fn run(&self, name: &str, annotations: &[(&str, &str)]) -> PodSandbox {
        let run = self.client.run(&self.config(name, annotations));
        run.unwrap_or_else(|error| panic!("{name}: {error:#}\n{}", self.node.log()))
    }

    fn end(&self, name: &str, sandbox: &PodSandbox) {
        self.client.stop(sandbox).expect("stopped");
        self.client.remove(sandbox).expect("removed");
        self.node.remove_pod_cgroup(&uid(name)).expect("nothing is left in it");
    }

    fn dial(&self, sandbox: &PodSandbox, container: &str, port: u16) -> (i32, String) {
        let dial = format!("nc -w 5 {SERVICE} {port} </dev/null 2>&1");
        let done = self.client.finish(sandbox, container, IMAGE, Ids::APP, &["/bin/sh", "-c", &dial]);
        done.unwrap_or_else(|error| panic!("{container}: {error:#}\n{}", self.node.log()))
    }
}

/// Answers connections to the node while this process runs.
fn answer_on(node: &CriNode) {
    let mut ip = node.command("ip").expect("a command");
    ip.args(["address", "add", "10.96.0.10/32", "dev", "lo"]);
    succeed(ip).expect("added");
    for port in [80, 81] {
        let listen = || TcpListener::bind((SERVICE, port)).expect("bound");
        let listener = node.sandbox().netns.run(listen).expect("entered");
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                drop((&stream).write_all(b"the node\n"));
            }
        });
    }
}

#[test]
#[ignore = "needs containerd: `cargo xtask cri` gets it and runs this"]
fn the_daemonsets_pod_captures_pods_before_their_first_connection() {
    let mut agent = Agent::new("cri").expect("the agent");
    let node = CriNode::new(agent.bpffs(), PodNetwork::Bridged).expect("a node");
    let client = CriClient::connect(&node.socket()).expect("connected");
    client.wait_for_image(IMAGE).expect("imported");
    answer_on(&node);
    let mut starter = vec!["nsenter".to_owned()];
    starter.extend(node.entry());
    agent.start_by(starter);
    let configuration = || fs::read_to_string(node.cni_file()).expect("read");
    let (before, plugins) = (configuration(), fs::read_dir(node.cni_bin()).expect("listed").count());

    let manifest = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/intercept.yaml");
    let mut daemon = DaemonPod::start(&node, &client, &manifest, "agent")
        .unwrap_or_else(|error| panic!("{error:#}\n{}", node.log()));
    let fixture = CriFixture { node: &node, client: &client };
    let captured = || agent.pods().expect("status").len();

    // The capture is active when RunPodSandbox returns: nothing listens, so the first connection is refused.
    let pod = fixture.run("captured", &[STATUS, LEFT_ALONE]);
    assert_eq!(captured(), 1);
    let (code, said) = fixture.dial(&pod, "first", 80);
    assert!(code == 1 && said.contains("refused"), "{code} {said}");
    assert_eq!(fixture.dial(&pod, "left-alone", 81), (0, "the node\n".to_owned()));
    let address = client.address(&pod).expect("an address");
    let proxy = ["/usr/bin/python3", "-c", PROXY];
    client.start(&pod, "proxy", IMAGE, Ids::PROXY, &proxy).expect("started");
    let proxied = (0, format!("{SERVICE}:80 from {address}\n"));
    let mut attempt = 0;
    wait("the proxy", || {
        attempt += 1;
        let answer = fixture.dial(&pod, &format!("app-{attempt}"), 80);
        assert!(answer.0 == 1 || answer == proxied, "{answer:?}");
        Ok(answer.0 == 0)
    })
    .expect("the proxy answers");
    // Inbound connections to any port go to the proxy, too.
    let to: SocketAddr = format!("{address}:8080").parse().expect("an address");
    let mut stream =
        node.sandbox().netns.run(|| TcpStream::connect(to)).expect("entered").expect("connected");
    let mut said = String::new();
    stream.read_to_string(&mut said).expect("read");
    assert_eq!(said, format!("{to} from 10.88.0.1\n"));

    // A pod without a sidecar is ignored. The namespace of a pod in TPROXY mode is changed.
    let plain = fixture.run("plain", &[]);
    assert_eq!(fixture.dial(&plain, "app", 80), (0, "the node\n".to_owned()));
    assert_eq!(captured(), 1);
    let tproxy = fixture.run("tproxy", &[STATUS, TPROXY]);
    assert_eq!(captured(), 2);
    fixture.end("tproxy", &tproxy);
    assert_eq!(captured(), 1);

    // Without the daemon, captures stay. A pod with a sidecar does not start, and one without does.
    let stopped_later = fixture.run("meanwhile", &[STATUS]);
    daemon.kill().expect("killed");
    assert_eq!(fixture.dial(&pod, "without-daemon", 80), proxied);
    let refused = client.run(&fixture.config("refused", &[STATUS])).expect_err("not captured");
    assert!(refused.to_string().contains("that `intercept-agent daemon` is running"), "{refused:#}");
    let unharmed = fixture.run("unharmed", &[]);
    assert_eq!(fixture.dial(&unharmed, "app", 80), (0, "the node\n".to_owned()));
    // A captured pod can be deleted.
    fixture.end("meanwhile", &stopped_later);
    daemon.restart().expect("started");
    let back = Instant::now();
    wait("its state is gone", || Ok(captured() == 1)).expect("gone");
    assert!(back.elapsed() < Duration::from_secs(1), "{:?}", back.elapsed());
    assert_eq!(fixture.dial(&pod, "taken-over", 80), proxied);
    // The runtime tries again, as the kubelet has it do.
    let healed = fixture.run("refused", &[STATUS]);
    assert_eq!(captured(), 2);

    // Gone when StopPodSandbox returns.
    fixture.end("captured", &pod);
    assert_eq!(captured(), 1);

    // Uninstalling: the pod that cleans up takes the place of the other, and ends.
    daemon.delete().expect("ended");
    assert_eq!(captured(), 1);
    let manifest = env::var_os("INTERCEPT_UNINSTALL").expect("`cargo xtask cri` sets it");
    let last = DaemonPod::start(&node, &client, Path::new(&manifest), "last").expect("started");
    assert_eq!(captured(), 1);
    last.delete().expect("ended");
    assert!(!agent.bpffs().join("intercept").exists());
    let json = |text: &str| serde_json::from_str::<Value>(text).expect("JSON");
    assert_eq!(json(&configuration()), json(&before));
    assert_eq!(fs::read_dir(node.cni_bin()).expect("listed").count(), plugins);
    assert_eq!(fixture.dial(&healed, "released", 80), (0, "the node\n".to_owned()));
    let after = fixture.run("after", &[STATUS]);
    assert_eq!(fixture.dial(&after, "app", 80), (0, "the node\n".to_owned()));
    for (name, sandbox) in [("refused", healed), ("plain", plain), ("unharmed", unharmed), ("after", after)] {
        fixture.end(name, &sandbox);
    }
}
