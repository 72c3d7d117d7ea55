//! The capabilities that deploy/ gives the agent: each is needed, and they are enough.

use std::{
    collections::BTreeSet,
    fs,
    io::Write as _,
    net::{SocketAddr, TcpListener, TcpStream},
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use clap::Parser;
use intercept_agent::facade::{
    cgroup::CgroupDir,
    daemon::PodState,
    netns::Netns,
    node::{Node, Observation, Rewrite, Target},
    options::{EtcFiles, RawOptions},
    programs::DEFAULT_MAX_CONNECTIONS,
    record::RecordOrigin,
};
use intercept_common::Family;
use rustix::thread::{CapabilitySet, CapabilitySets, set_capabilities};
use serde_json::json;
use tests::{
    agent::{Agent, deployed_capabilities, finish, succeed},
    daemon::{Daemon, proxy},
    testbed::{Ids, Pod, PodSpec},
};

const FLAGS: [&str; 6] = ["-i", "*", "-b", "*", "-u", "1337"];

fn manifest() -> Vec<String> {
    deployed_capabilities("intercept.yaml").expect("a list")
}

/// Without these, pods are captured and not proven.
const FOR_PROBES: [&str; 2] = ["SETUID", "SETGID"];

fn for_captures() -> Vec<String> {
    manifest().into_iter().filter(|name| !FOR_PROBES.contains(&name.as_str())).collect()
}

fn bit(name: &str) -> CapabilitySet {
    match name {
        "NET_ADMIN" => CapabilitySet::NET_ADMIN,
        "SYS_ADMIN" => CapabilitySet::SYS_ADMIN,
        "SYS_PTRACE" => CapabilitySet::SYS_PTRACE,
        "DAC_OVERRIDE" => CapabilitySet::DAC_OVERRIDE,
        other => panic!("{other} is new in deploy/: what fails without it?"),
    }
}

/// A pod whose processes all run as the proxy's user, with a listener from before the capture.
struct ProxyPod {
    pod: Pod,
    listener: TcpListener,
    proxy: Child,
}

impl ProxyPod {
    fn new(label: &str) -> Self {
        let pod = Pod::new(PodSpec::new(label)).expect("a pod");
        let listener = pod.netns.run(|| TcpListener::bind("0.0.0.0:15006")).expect("entered").expect("bound");
        // This process holds the listener, too, but outside the pod, where the agent does not search.
        let held: OwnedFd = listener.try_clone().expect("a copy").into();
        let mut holder = pod.command_as("sleep", Ids::PROXY).expect("a command");
        let proxy = holder.arg("600").stdin(Stdio::from(held)).spawn().expect("started");
        Self { pod, listener, proxy }
    }

    /// Whether a connection from outside to a port on which nothing listens arrives at the proxy.
    fn captured(&self) -> bool {
        let to = SocketAddr::new(self.pod.address(Family::V4), 8080);
        let limit = Duration::from_secs(5);
        let dialled = self.pod.neighbour().netns.run(|| TcpStream::connect_timeout(&to, limit));
        let Ok(client) = dialled.expect("entered") else { return false };
        let (accepted, peer) = self.listener.accept().expect("accepted");
        assert_eq!((accepted.local_addr().expect("bound"), peer), (to, client.local_addr().expect("bound")));
        true
    }
}

impl Drop for ProxyPod {
    fn drop(&mut self) {
        drop(self.proxy.kill());
        drop(self.proxy.wait());
    }
}

#[test]
fn the_agent_asks_for_those_that_the_manifests_give() {
    let list = manifest();
    assert_eq!(list, deployed_capabilities("chart/templates/daemonset.yaml").expect("a list"));
    let mut agent = Agent::new("c-asked").expect("the agent");
    agent.confine(&[]);
    let output = finish(&mut agent.command("daemon")).expect("started");
    let error = String::from_utf8(output.stderr).expect("text");
    assert!(!output.status.success(), "{error}");
    let asked: BTreeSet<_> = error
        .split(|c: char| !c.is_ascii_alphanumeric() && c != '_')
        .filter_map(|word| word.strip_prefix("CAP_"))
        .collect();
    assert_eq!(asked, for_captures().iter().map(String::as_str).collect(), "{error}");
}

#[test]
fn with_just_these_every_way_captures() {
    let mut agent = Agent::new("c-enough").expect("the agent");
    agent.confine(&manifest());

    let by_hand = ProxyPod::new("by-hand");
    assert!(!by_hand.captured());
    let cgroup = by_hand.pod.cgroup.path();
    let mut attach = agent.command("attach");
    attach.arg("--cgroup-path").arg(cgroup).args(FLAGS);
    succeed(attach).expect("attached");
    assert!(by_hand.captured());
    agent.detach(&by_hand.pod).expect("detached");

    // TPROXY changes the pod's rules and routes.
    let tproxy = ProxyPod::new("tproxy");
    agent.attach(&tproxy.pod, &[&FLAGS[..], &["-m", "TPROXY"]].concat()).expect("attached");
    agent.detach(&tproxy.pod).expect("detached");

    let daemon = Daemon::start(&agent, &[]).expect("a daemon");
    let text = json!({"cgroup": cgroup, "arguments": FLAGS});
    daemon.put_text("a", &text.to_string()).expect("put");
    daemon.wait_for("a", PodState::Captured).expect("captured");
    assert!(by_hand.captured());

    let by_plugin = ProxyPod::new("by-plugin");
    let (installed, plugin) = install(&agent, &daemon);
    let call = |command| {
        let mut call = agent.start(&plugin);
        add_call(&mut call, command, &by_plugin.pod);
        let mut child = call.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("started");
        let mut config = installed.clone();
        config["runtimeConfig"] = json!({"cgroupPath": relative(by_plugin.pod.cgroup.path())});
        child.stdin.take().expect("piped").write_all(config.to_string().as_bytes()).expect("written");
        let output = child.wait_with_output().expect("ended");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    };
    call("ADD");
    assert!(by_plugin.captured());
    call("DEL");
    assert!(!by_plugin.captured());
}

/// Installs the plugin into a node's configuration. Returns its entry as a runtime passes it on, and the program.
fn install(agent: &Agent, daemon: &Daemon<'_>) -> (serde_json::Value, PathBuf) {
    let (conf, bin) = (daemon.folder().join("net.d"), daemon.folder().join("bin"));
    fs::create_dir(&conf).expect("made");
    let path = conf.join("10-net.conflist");
    let list = json!({"cniVersion": "1.0.0", "name": "net", "plugins": [{"type": "bridge"}]});
    fs::write(&path, list.to_string()).expect("written");
    let mut install = agent.start(agent.program());
    install.args(["cni", "install", "--select", "all", "--cni-conf-dir"]).arg(&conf);
    install.arg("--cni-bin-dir").arg(&bin).arg("--socket").arg(daemon.socket()).arg("--").args(FLAGS);
    succeed(install).expect("installed");
    let list: serde_json::Value =
        serde_json::from_str(&fs::read_to_string(path).expect("read")).expect("JSON");
    let mut entry = list["plugins"][1].clone();
    entry["cniVersion"] = json!("1.0.0");
    entry["name"] = json!("net");
    entry["prevResult"] = json!({"cniVersion": "1.0.0", "interfaces": [], "ips": [], "dns": {}});
    (entry, bin.join("intercept-cni"))
}

fn add_call(call: &mut Command, command: &str, pod: &Pod) {
    call.env("CNI_COMMAND", command)
        .env("CNI_CONTAINERID", "s")
        .env("CNI_NETNS", pod.netns.path())
        .env("CNI_IFNAME", "eth0")
        .env("CNI_ARGS", "K8S_POD_NAMESPACE=shop;K8S_POD_NAME=cart;K8S_POD_UID=uid-1");
}

fn relative(cgroup: &Path) -> String {
    let mount = tests::testbed::cgroup::mount_point().expect("cgroup2");
    cgroup.strip_prefix(mount).expect("below the mount").display().to_string()
}

#[test]
fn without_any_of_them_it_is_refused_by_name() {
    let list = for_captures();
    let running = ProxyPod::new("refused");
    for missing in &list {
        let mut agent = Agent::new("c-refused").expect("the agent");
        let rest: Vec<_> = list.iter().filter(|name| *name != missing).cloned().collect();
        agent.confine(&rest);
        let entries = || fs::read_dir(agent.bpffs()).expect("listed").count();
        let before = entries();
        for mut command in [agent.for_pod("attach", &running.pod, &FLAGS), agent.command("daemon")] {
            let output = finish(&mut command).expect("started");
            let error = String::from_utf8(output.stderr).expect("text");
            assert!(!output.status.success() && error.contains(&format!("CAP_{missing}")), "{error}");
            for other in &rest {
                assert!(!error.contains(&format!("CAP_{other}")), "{other} is there: {error}");
            }
        }
        assert_eq!(entries(), before, "something was changed");
    }
}

/// A probe is a user of the pod's.
#[test]
fn without_those_for_probes_a_pod_is_not_proven() {
    let pod = Pod::new(PodSpec::new("unproven")).expect("a pod");
    let _proxy = proxy(&pod);
    let mut agent = Agent::new("c-unproven").expect("the agent");
    agent.attach(&pod, &FLAGS).expect("attached");
    let mut is_probed = |missing: Option<&str>| {
        let rest: Vec<_> = manifest().into_iter().filter(|name| Some(name.as_str()) != missing).collect();
        agent.start_by(Vec::new());
        agent.confine(&rest);
        let mut prove = agent.command("prove");
        let output = finish(prove.arg("--cgroup-path").arg(pod.cgroup.path())).expect("started");
        let said = [output.stdout, output.stderr].concat();
        let said = String::from_utf8(said).expect("text");
        !said.contains("giving up privileges for a probe")
    };
    assert!(is_probed(None));
    for missing in FOR_PROBES {
        assert!(!is_probed(Some(missing)), "{missing}");
    }
}

#[derive(Parser)]
struct AttachArguments {
    #[command(flatten)]
    options: RawOptions,
}

/// Attaches as `attach` does, without its check of capabilities.
fn attach_unasked(bpffs: &Path, cgroup: &Path) -> anyhow::Result<()> {
    let cgroup = CgroupDir::open(cgroup)?;
    let netns = Netns::of_cgroup(&cgroup)?;
    let line = AttachArguments::parse_from([&["attach"][..], &FLAGS].concat());
    let (config, ..) = line.options.validate(&EtcFiles::below("/"))?;
    let target = Target {
        cgroup,
        also: Vec::new(),
        netns,
        netns_path: None,
        origin: RecordOrigin::Command,
        confirm: None,
    };
    let mut observed = Observation::of(&target, &config, None)?;
    let mut node = Node::open(bpffs, DEFAULT_MAX_CONNECTIONS)?;
    node.attach(&target, &config, &mut observed, Rewrite::IfChanged)?;
    Ok(())
}

#[test]
fn none_of_them_is_superfluous() {
    let list = for_captures();
    let whole = list.iter().fold(CapabilitySet::empty(), |all, name| all | bit(name));
    for missing in list.iter().map(Some).chain([None]) {
        let running = ProxyPod::new("needed");
        let agent = Agent::new("c-needed").expect("the agent");
        let have = missing.map_or(whole, |name| whole - bit(name));
        let attached = std::thread::scope(|scope| {
            let confined = scope.spawn(|| {
                // For this thread and those that it starts.
                let inheritable = CapabilitySet::empty();
                let sets = CapabilitySets { effective: have, permitted: have, inheritable };
                set_capabilities(None, sets).expect("set");
                attach_unasked(agent.bpffs(), running.pod.cgroup.path())
            });
            confined.join().expect("no panic")
        });
        let captured = attached.is_ok() && running.captured();
        assert_eq!(captured, missing.is_none(), "without {missing:?}: {attached:?}");
    }
}
