//! Pods of a real container runtime: containerd runs them, its CNI plugins and ours make their network.
//!
//! `cargo xtask cri` gets containerd and runs this.

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    time::{Duration, Instant},
};

use serde_json::json;
use tests::{
    agent::{Agent, deployed_capabilities, succeed},
    cri::{Client, IMAGE, Node, PodConfig, Sandbox, uid, wait},
    daemon::Daemon,
    testbed::Ids,
};

const STATUS: (&str, &str) = ("sidecar.istio.io/status", "{}");
const LEFT_ALONE: (&str, &str) = ("traffic.sidecar.istio.io/excludeOutboundPorts", "81");
/// An address of the node's, where a connection arrives that is not captured.
const SERVICE: &str = "10.96.0.10";

/// What answers as the sidecar: it says where the connection was going, and from where it came.
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

struct Bed {
    node: Node,
    client: Client,
}

impl Bed {
    fn config(&self, name: &str, annotations: &[(&str, &str)]) -> PodConfig {
        let cgroup = self.node.make_pod_cgroup(&uid(name)).expect("a cgroup");
        PodConfig::new(name, &cgroup, &self.node.logs().join(name), annotations)
    }

    fn run(&self, name: &str, annotations: &[(&str, &str)]) -> Sandbox {
        let run = self.client.run(&self.config(name, annotations));
        run.unwrap_or_else(|error| panic!("{name}: {error:#}\n{}", self.node.log()))
    }

    fn dial(&self, sandbox: &Sandbox, container: &str, port: u16) -> (i32, String) {
        let dial = format!("nc -w 5 {SERVICE} {port} </dev/null 2>&1");
        let done = self.client.finish(sandbox, container, IMAGE, Ids::APP, &["/bin/sh", "-c", &dial]);
        done.unwrap_or_else(|error| panic!("{container}: {error:#}\n{}", self.node.log()))
    }
}

/// Answers what arrives at the node itself, for as long as this process runs.
fn answer_on(node: &Node) {
    let mut ip = node.command("ip").expect("a command");
    ip.args(["address", "add", "10.96.0.10/32", "dev", "lo"]);
    succeed(ip).expect("added");
    for port in [80, 81] {
        let listen = || TcpListener::bind((SERVICE, port)).expect("bound");
        let listener = node.place().netns.run(listen).expect("entered");
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                drop((&stream).write_all(b"the node\n"));
            }
        });
    }
}

#[test]
#[ignore = "needs containerd: `cargo xtask cri` gets it and runs this"]
fn pods_of_containerd_are_captured_before_their_first_connection() {
    let mut agent = Agent::new("cri").expect("the agent");
    let node = Node::new(agent.bpffs()).expect("a node");
    let client = Client::connect(&node.socket()).expect("connected");
    client.wait_for_image(IMAGE).expect("imported");
    answer_on(&node);
    let mut starter = vec!["nsenter".to_owned()];
    starter.extend(node.entry());
    agent.start_by(starter);
    // As its container has it.
    agent.confine(&deployed_capabilities("intercept.yaml").expect("a list"));
    let mut daemon = Daemon::start(&agent, &[]).expect("a daemon");

    let mut install = agent.start(agent.program());
    install.args(["cni", "install", "--cni-conf-dir"]).arg(node.cni_conf());
    install.arg("--cni-bin-dir").arg(node.cni_bin()).arg("--socket").arg(daemon.socket());
    succeed(install).expect("installed");
    let bed = Bed { node, client };
    let in_force = || agent.status().expect("status").as_array().map_or(0, Vec::len);

    // It is in force when RunPodSandbox returns: nothing listens, so the first connection is refused.
    let pod = bed.run("captured", &[STATUS, LEFT_ALONE]);
    assert_eq!(in_force(), 1);
    let (code, said) = bed.dial(&pod, "first", 80);
    assert!(code == 1 && said.contains("refused"), "{code} {said}");
    assert_eq!(bed.dial(&pod, "left-alone", 81), (0, "the node\n".to_owned()));
    let address = bed.client.address(&pod).expect("an address");
    let proxy = ["/usr/bin/python3", "-c", PROXY];
    bed.client.start(&pod, "proxy", IMAGE, Ids::PROXY, &proxy).expect("started");
    let mut attempt = 0;
    wait("the proxy", || {
        attempt += 1;
        let (code, said) = bed.dial(&pod, &format!("app-{attempt}"), 80);
        assert!(code == 1 || said == format!("{SERVICE}:80 from {address}\n"), "{said}");
        Ok(code == 0)
    })
    .expect("the proxy answers");
    // What arrives goes to the proxy as well, whatever its port.
    let to: SocketAddr = format!("{address}:8080").parse().expect("an address");
    let mut stream =
        bed.node.place().netns.run(|| TcpStream::connect(to)).expect("entered").expect("connected");
    let mut said = String::new();
    stream.read_to_string(&mut said).expect("read");
    assert_eq!(said, format!("{to} from 10.88.0.1\n"));

    // One without a sidecar is left alone.
    let plain = bed.run("plain", &[]);
    assert_eq!(bed.dial(&plain, "app", 80), (0, "the node\n".to_owned()));
    assert_eq!(in_force(), 1);

    // Gone when StopPodSandbox returns.
    bed.client.stop(&pod).expect("stopped");
    assert_eq!(agent.status().expect("status"), json!([]));
    bed.client.remove(&pod).expect("removed");
    bed.node.remove_pod_cgroup(&uid("captured")).expect("nothing is left in it");

    // Without the daemon a pod with a sidecar does not start, and one without does.
    let stopped_later = bed.run("meanwhile", &[STATUS]);
    daemon.kill().expect("killed");
    let refused = bed.client.run(&bed.config("refused", &[STATUS])).expect_err("not captured");
    assert!(refused.to_string().contains("is `intercept-agent daemon` running"), "{refused:#}");
    let unharmed = bed.run("unharmed", &[]);
    assert_eq!(bed.dial(&unharmed, "app", 80), (0, "the node\n".to_owned()));
    // And one that is captured can go.
    bed.client.stop(&stopped_later).expect("stopped");
    bed.client.remove(&stopped_later).expect("removed");
    bed.node.remove_pod_cgroup(&uid("meanwhile")).expect("nothing is left in it");
    daemon.restart().expect("started");
    let back = Instant::now();
    daemon.wait("its state is gone", |_| in_force() == 0).expect("gone");
    assert!(back.elapsed() < Duration::from_secs(1), "{:?}", back.elapsed());
    // The runtime tries again, as the kubelet has it do.
    let healed = bed.run("refused", &[STATUS]);
    assert_eq!(in_force(), 1);
    for sandbox in [healed, plain, unharmed] {
        bed.client.stop(&sandbox).expect("stopped");
        bed.client.remove(&sandbox).expect("removed");
    }
    assert_eq!(agent.status().expect("status"), json!([]));
}
