//! The CNI plugin, called as by a runtime, and the daemon that keeps it in the node's configuration.

use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use tests::{
    agent::{Agent, succeed},
    daemon::{Daemon, answers, call_plugin, free_address, get, proxy, service},
    testbed::{Pod, PodSpec, Sandbox, cgroup, name},
};

/// The configuration of the cluster's network, which its agent writes at every start.
fn primary() -> Value {
    json!({"cniVersion": "1.1.0", "name": "net", "plugins": [{"type": "bridge"}, {"type": "portmap"}]})
}

/// A node's CNI folders.
struct NodeFolders {
    _dir: tempfile::TempDir,
    configurations: PathBuf,
    binaries: PathBuf,
}

impl NodeFolders {
    fn new() -> Self {
        let dir = name::scratch("cni").expect("a folder");
        let (configurations, binaries) = (dir.path().join("net.d"), dir.path().join("bin"));
        for folder in [&configurations, &binaries] {
            fs::create_dir(folder).expect("created");
        }
        Self { _dir: dir, configurations, binaries }
    }

    fn folders(&self) -> [&str; 4] {
        fn path(folder: &Path) -> &str {
            folder.to_str().expect("text")
        }
        ["--cni-conf-dir", path(&self.configurations), "--cni-bin-dir", path(&self.binaries)]
    }

    fn list(&self) -> PathBuf {
        self.configurations.join("10-net.conflist")
    }

    fn write_primary(&self) {
        let beside = self.configurations.join(".new");
        fs::write(&beside, primary().to_string()).expect("written");
        fs::rename(beside, self.list()).expect("renamed");
    }

    fn read(&self) -> Value {
        serde_json::from_str(&fs::read_to_string(self.list()).expect("read")).expect("JSON")
    }

    /// The plugin's entry in the list.
    fn entry(&self) -> Option<Value> {
        let list = self.read();
        let plugins = list["plugins"].as_array().expect("a list");
        plugins.iter().find(|plugin| plugin["type"] == "intercept-cni").cloned()
    }

    /// Calls the plugin for a sandbox. Returns its exit status and output.
    fn call(&self, command: &str, config: &Value, sandbox: &Sandbox, id: &str) -> (bool, Value) {
        let (done, printed) = call_plugin(&self.binaries, command, config, sandbox, (id, "net1"));
        (done, serde_json::from_str(&printed).unwrap_or(Value::Null))
    }
}

/// The configuration that a runtime makes from an entry.
fn config(entry: &Value, sandbox: &Sandbox, more: &Value) -> Value {
    let mut config = entry.clone();
    let cgroup =
        sandbox.cgroup.path().strip_prefix(cgroup::mount_point().expect("cgroup2")).expect("below it");
    config["cniVersion"] = json!("1.1.0");
    config["name"] = json!("net");
    config["runtimeConfig"] = json!({ "cgroupPath": cgroup });
    for (name, value) in more.as_object().expect("fields") {
        config[name] = value.clone();
    }
    config
}

fn within_a_second(what: &str, so: impl Fn() -> bool) {
    let started = Instant::now();
    while !so() {
        assert!(started.elapsed() < Duration::from_secs(1), "{what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn metric(address: std::net::SocketAddr, name: &str) -> Option<String> {
    let (_, text) = get(address, "/metrics");
    text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ').map(str::to_owned))
}

#[test]
fn the_daemon_keeps_the_plugin_in_the_nodes_configuration() {
    let agent = Agent::new("dp-keep").expect("the agent");
    let node = NodeFolders::new();
    let probes = free_address();
    let address = probes.to_string();
    let arguments = [&["--cni-keep", "--metrics-address", &address][..], &node.folders()].concat();
    let mut daemon = Daemon::start(&agent, &arguments).expect("a daemon");
    let ready = || get(probes, "/readyz");

    // Before the cluster's network is configured.
    daemon.wait("it has looked", |_| ready().1.contains("the CNI plugin is not in the node")).expect("told");
    let (status, text) = ready();
    assert!(status == 503 && text.contains("there is no usable configuration yet"), "{text}");
    assert_eq!(metric(probes, "intercept_plugin_installed").as_deref(), Some("0"));
    node.write_primary();
    daemon.wait("it is installed", |_| node.entry().is_some() && ready().0 == 200).expect("installed");
    assert_eq!(metric(probes, "intercept_plugin_installed").as_deref(), Some("1"));

    // The cluster's network restarts, with and without a running daemon.
    let before = node.read();
    node.write_primary();
    within_a_second("the plugin is put back", || node.read() == before);
    fs::remove_file(node.binaries.join("intercept-cni")).expect("removed");
    within_a_second("the binary is put back", || node.binaries.join("intercept-cni").exists());
    daemon
        .wait("it is counted", |_| metric(probes, "intercept_plugin_writes_total").as_deref() == Some("2"))
        .expect("counted");
    daemon.kill().expect("killed");
    node.write_primary();
    daemon.restart().expect("started");
    daemon.wait("it is installed", |_| node.read() == before).expect("installed again");

    fs::write(node.list(), "{ broken").expect("written");
    daemon
        .wait("it is told", |_| ready().1.contains("it is not valid JSON; correct or remove it"))
        .expect("told");
    node.write_primary();
    daemon.wait("it is installed", |_| ready().0 == 200).expect("installed");

    // When the daemon ends, the plugin stays: pods that start then wait for the next daemon.
    assert!(daemon.terminate().expect("ended").success());
    assert_eq!(node.read(), before);
    daemon.restart().expect("started");
    let mut cleanup = agent.command("cleanup");
    cleanup.arg("--socket").arg(daemon.socket()).args(node.folders());
    succeed(cleanup).expect("cleaned up");
    assert_eq!(node.read(), primary());
    node.write_primary();
    let (status, text) = ready();
    assert!(status == 503, "{text}");
    assert_eq!((node.entry(), fs::read_dir(&node.binaries).expect("listed").count()), (None, 0));
}

#[test]
fn a_network_of_multus_captures_a_pod_without_a_chain() {
    let agent = Agent::new("dp-alone").expect("the agent");
    let node = NodeFolders::new();
    let folders = node.folders();
    let arguments =
        [&["--cni-keep", "--cni-standalone", "istio-cni", "--select", "all"][..], &folders].concat();
    let arguments = [&arguments[..], &["--", "-i", "*", "-u", "1337"]].concat();
    let daemon = Daemon::start(&agent, &arguments).expect("a daemon");
    let file = node.configurations.join("zzz-intercept-cni.conf");
    daemon.wait("its file", |_| file.exists()).expect("written");
    let network: Value = serde_json::from_str(&fs::read_to_string(&file).expect("read")).expect("JSON");
    assert_eq!(network["name"], "istio-cni");

    let pod = Pod::new(PodSpec::new("alone")).expect("a pod");
    let actor = proxy(&pod);
    let config = config(&network, &pod, &json!({}));
    assert_eq!(node.call("ADD", &config, &pod, "s"), (true, json!({"cniVersion": "1.1.0"})));
    assert_eq!(answers(&actor, service()).as_deref(), Some("proxy"));
    assert_eq!(node.call("CHECK", &config, &pod, "s"), (true, Value::Null));
    assert_eq!(node.call("DEL", &config, &pod, "s"), (true, Value::Null));
    assert_ne!(answers(&actor, service()).as_deref(), Some("proxy"));
}

#[test]
fn status_and_gc_are_answered_by_the_daemon() {
    let agent = Agent::new("dp-gc").expect("the agent");
    let node = NodeFolders::new();
    node.write_primary();
    let arguments = [&["--cni-keep", "--select", "all"][..], &node.folders(), &["--", "-i", "*"]].concat();
    let mut daemon = Daemon::start(&agent, &arguments).expect("a daemon");
    daemon.wait("it is installed", |_| node.entry().is_some()).expect("installed");
    let entry = node.entry().expect("installed");
    let (kept, lost) = (Sandbox::new("kept").expect("a sandbox"), Sandbox::new("lost").expect("a sandbox"));
    let previous = json!({"prevResult": {"cniVersion": "1.1.0", "ips": [{"address": "10.1.0.5/24"}]}});
    for (sandbox, id) in [(&kept, "kept"), (&lost, "lost")] {
        let (done, printed) = node.call("ADD", &config(&entry, sandbox, &previous), sandbox, id);
        assert!(done, "{printed}");
    }
    let attached = || agent.pods().expect("status").len();
    assert_eq!(attached(), 2);
    let plain = config(&entry, &kept, &json!({}));
    assert_eq!(node.call("STATUS", &plain, &kept, ""), (true, Value::Null));
    let valid = json!({"cni.dev/valid-attachments": [{"containerID": "kept", "ifname": "eth0"}]});
    assert_eq!(node.call("GC", &config(&entry, &kept, &valid), &kept, ""), (true, Value::Null));
    daemon.wait("the other is released", |_| attached() == 1).expect("released");
    assert_eq!(agent.pods().expect("status")[0].cgroup, kept.cgroup.path());

    daemon.kill().expect("killed");
    let (done, printed) = node.call("STATUS", &plain, &kept, "");
    assert!(!done && printed["code"] == 50, "{printed}");
    assert!(printed["msg"].as_str().is_some_and(|msg| msg.contains("intercept-agent daemon")), "{printed}");
}
