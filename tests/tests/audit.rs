//! `audit` reports every socket of a captured pod that goes around the proxy, with the cause, and no other.

use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;
use socket2::{Domain, Protocol, Socket, Type};
use tests::actor::{Actor, Bind, Listen, Transport};
use tests::agent::{Agent, finish, succeed};
use tests::steps::{self, SocketKind, Step};
use tests::testbed::{Ids, Pod, PodSpec};

const FLAGS: [&str; 6] = ["-u", "1337", "-i", "*", "-b", "*"];

/// A process that is killed when it is dropped.
struct SocketHolder(Child);

impl SocketHolder {
    fn spawn(command: &mut Command) -> Self {
        Self(command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().expect("started"))
    }
}

impl Drop for SocketHolder {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

struct AuditFixture {
    agent: Agent,
    pod: Pod,
    world: Actor,
}

impl AuditFixture {
    fn new(label: &str) -> Self {
        let agent = Agent::new(label).expect("the agent");
        let pod = Pod::new(PodSpec::new(label)).expect("a pod");
        let world = Actor::start(pod.neighbour()).expect("an actor");
        listen(&world, "world", Ids::ROOT, 80);
        Self { agent, pod, world }
    }

    fn audit(&self) -> Value {
        let mut audit = self.agent.command("audit");
        audit.arg("--json").arg("--cgroup-path").arg(self.pod.cgroup.path());
        serde_json::from_str(&succeed(audit).expect("audited")).expect("JSON")
    }

    /// A connection that stays open, made by bash after `before`.
    fn connect(&self, ids: Ids, before: &str, to: &str) -> SocketHolder {
        let script = format!("{before}exec 3<>/dev/tcp/{to}/80; exec sleep 600");
        SocketHolder::spawn(self.pod.command_as("bash", ids).expect("a command").args(["-c", &script]))
    }

    /// Audits until it is so.
    fn wait(&self, what: &str, so: impl Fn(&Value) -> bool) -> Value {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            let audit = self.audit();
            if so(&audit) {
                return audit;
            }
            assert!(Instant::now() < deadline, "{what}: {audit:#}");
            thread::sleep(Duration::from_millis(50));
        }
    }
}

fn listen(actor: &Actor, name: &str, ids: Ids, port: u16) {
    for any in ["0.0.0.0", "::"] {
        let any: IpAddr = any.parse().expect("an address");
        let bind = Bind::new(ids, SocketAddr::new(any, port));
        actor.listen(Listen { name: name.into(), transport: Transport::Tcp, bind }).expect("a server");
    }
}

fn causes(audit: &Value) -> Vec<String> {
    let bypasses = audit["bypasses"].as_array().expect("bypasses");
    bypasses.iter().map(|bypass| bypass["cause"].as_str().expect("a word").to_owned()).collect()
}

#[test]
fn what_goes_around_the_proxy_is_found_with_its_cause() {
    let fixture = AuditFixture::new("audit");
    let (pod, agent) = (&fixture.pod, &fixture.agent);
    let output = finish(agent.command("audit").arg("--cgroup-path").arg(pod.cgroup.path())).expect("run");
    assert!(!output.status.success() && String::from_utf8_lossy(&output.stderr).contains("is not attached"));

    let proxy = Actor::start(pod).expect("an actor");
    listen(&proxy, "proxy", Ids::PROXY, 15001);
    let early = [fixture.connect(Ids::APP, "", "10.96.0.10"), fixture.connect(Ids::APP, "", "fd96::10")];
    // Attached when both are connected: each is then seen by the agent as a connection older than the capture.
    let connected = || {
        let list = succeed({
            let mut ss = pod.command("ss").expect("a command");
            ss.args(["-Htn", "state", "connected", "dport", "=", ":80"]);
            ss
        });
        list.expect("ss").lines().count()
    };
    while connected() < 2 {
        thread::sleep(Duration::from_millis(20));
    }
    agent.attach(pod, &FLAGS).expect("attached");
    let audit = fixture.audit();
    assert_eq!(causes(&audit), ["before_capture"; 2], "{audit:#}");
    let first = &audit["bypasses"][0];
    assert_eq!(first["reason"], "included_cidr");
    assert_eq!((&first["direction"], &first["protocol"]), (&"outbound".into(), &"tcp".into()));
    assert_eq!((&first["uid"], &first["process"]), (&1000.into(), &"sleep".into()));
    drop(early);

    // Captured connections and the proxy's own are none of it.
    let held = [fixture.connect(Ids::APP, "", "10.96.0.10"), fixture.connect(Ids::APP, "", "fd96::10")];
    let own = fixture.connect(Ids::PROXY, "", "10.96.0.10");
    let audit = fixture.wait("captured", |audit| {
        audit["captured"] == 2 && audit["passed"]["proxy_uid"] == 1 && causes(audit).is_empty()
    });
    assert!(audit["proxy"].is_u64(), "{audit:#}");

    let other = Pod::new(PodSpec::new("audit-other")).expect("a pod");
    let enter = format!("echo $$ > {}/cgroup.procs; ", other.cgroup.path().display());
    let elsewhere = fixture.connect(Ids::ROOT, &enter, "10.96.0.10");
    let audit = fixture.wait("in another cgroup", |audit| causes(audit) == ["other_cgroup"]);
    assert!(audit["bypasses"][0]["cgroup"].as_str().is_some_and(|name| name.starts_with("id ")), "{audit:#}");

    let raw = pod.netns.run(|| Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::ICMPV4))).expect("inside");
    let stray = SocketHolder::spawn(pod.command("unshare").expect("a command").args(["-n", "sleep", "600"]));
    fixture.wait("all of them", |audit| causes(audit) == ["other_cgroup", "raw", "other_namespace"]);
    let mut text = agent.command("audit");
    text.arg("--cgroup-path").arg(pod.cgroup.path());
    let text = succeed(text).expect("audited");
    assert!(text.contains("2 connections captured"), "{text}");
    assert!(text.contains("around the proxy: raw raw"), "{text}");
    assert!(text.contains("around the proxy: other_namespace sleep["), "{text}");

    drop((raw, stray, elsewhere));
    fixture.wait("gone", |audit| causes(audit).is_empty());
    drop((held, own));
}

#[test]
fn a_container_that_is_not_the_proxys_is_audited_as_the_application() {
    let fixture = AuditFixture::new("audit-c");
    let pod = &fixture.pod;
    let container = |name: &str| {
        let path = pod.cgroup.path().join(name);
        fs::create_dir(&path).expect("a cgroup");
        path.display().to_string()
    };
    let (app, proxy) = (container("app"), container("proxy"));
    let enter = |cgroup: &str| format!("echo $$ > {cgroup}/cgroup.procs; ");
    let root = ["-u", "0", "-i", "*", "-b", "*"];
    fixture.agent.attach(pod, &root).expect("attached");
    let held = [
        fixture.connect(Ids::ROOT, &enter(&app), "10.96.0.10"),
        fixture.connect(Ids::ROOT, &enter(&proxy), "fd96::10"),
    ];
    fixture.wait("both pass", |audit| audit["passed"]["proxy_uid"] == 2);
    fixture.agent.attach(pod, &[&root[..], &["--proxy-cgroup", &proxy]].concat()).expect("replaced");
    let audit = fixture.audit();
    assert_eq!(audit["passed"]["proxy_uid"], 1, "{audit:#}");
    assert_eq!(causes(&audit), ["before_capture"], "{audit:#}");
    assert_eq!(audit["bypasses"][0]["cgroup"], "app", "{audit:#}");
    drop((held, &fixture.world));
}

/// In TPROXY mode the rules let the connections with the mark of the proxy pass where they arrive, and redirect them as others
/// where they leave.
#[test]
fn the_mark_of_the_proxy_on_another_socket_is_found() {
    let fixture = AuditFixture::new("audit-mark");
    let pod = &fixture.pod;
    let inside = Actor::start(pod).expect("an actor");
    listen(&inside, "proxy", Ids::PROXY, 15001);
    listen(&inside, "app", Ids::APP, 8080);
    fixture.agent.attach(pod, &[&FLAGS[..], &["-m", "TPROXY"]].concat()).expect("attached");
    let connect = |ids, mark: u32, to: &str| {
        let to = to.parse().expect("an address");
        let mark =
            Step::Option { level: libc::SOL_SOCKET, name: libc::SO_MARK, value: mark.to_ne_bytes().to_vec() };
        let steps = [Step::Open(SocketKind::Tcp4), mark, Step::Connect(to), Step::Pause];
        let mut running = steps::start(pod, ids, "", &steps).expect("started");
        running.await_pause().expect("connected");
        running
    };
    let outside = connect(Ids::ROOT, 1337, "10.96.0.10:80");
    let unmarked = connect(Ids::ROOT, 1336, "10.66.0.2:8080");
    let audit = fixture.audit();
    assert_eq!((&audit["captured"], causes(&audit)), (&1.into(), Vec::new()), "{audit:#}");
    let marked = connect(Ids::ROOT, 1337, "10.66.0.2:8080");
    let audit = fixture.audit();
    assert_eq!((&audit["captured"], causes(&audit)), (&1.into(), vec!["mark".to_owned()]), "{audit:#}");
    let found = &audit["bypasses"][0];
    assert_eq!(
        (&found["remote"], &found["direction"]),
        (&"10.66.0.2:8080".into(), &"outbound".into()),
        "{audit:#}"
    );
    assert_eq!((&found["uid"], &found["process"]), (&0.into(), &"steps".into()), "{audit:#}");
    for running in [outside, unmarked, marked] {
        assert!(running.finish().expect("run").iter().all(|outcome| outcome == "ok"));
    }
    fixture.wait("closed", |audit| causes(audit).is_empty());
}

/// Cgroups and namespaces that a process of the pod makes after the capture: the programs cover the one, not the other.
#[test]
fn what_is_nested_after_the_capture_is_found() {
    let fixture = AuditFixture::new("audit-nested");
    let pod = &fixture.pod;
    let proxy = Actor::start(pod).expect("an actor");
    listen(&proxy, "proxy", Ids::PROXY, 15001);
    fixture.agent.attach(pod, &FLAGS).expect("attached");
    let nested = pod.cgroup.path().join("nested/deeper");
    fs::create_dir_all(&nested).expect("cgroups");
    let enter = format!("echo $$ > {}/cgroup.procs; ", nested.display());
    let held =
        [fixture.connect(Ids::ROOT, &enter, "10.96.0.10"), fixture.connect(Ids::ROOT, &enter, "fd96::10")];
    fixture.wait("captured", |audit| audit["captured"] == 2 && causes(audit).is_empty());

    // Packets of its own, from a cgroup and a namespace that did not exist when the pod was captured.
    let script = format!("{enter}exec unshare -n sleep 600");
    let stray = SocketHolder::spawn(pod.command("sh").expect("a command").args(["-c", &script]));
    let audit = fixture.wait("a namespace", |audit| {
        causes(audit) == ["other_namespace"] && audit["bypasses"][0]["process"] == "sleep"
    });
    assert_eq!(audit["captured"], 2, "{audit:#}");

    // Out of the pod's cgroup again, in a cgroup that is made beside it, but in its network namespace.
    let beside = Pod::new(PodSpec::new("audit-beside")).expect("a pod");
    let outside = beside.cgroup.path().join("nested");
    fs::create_dir(&outside).expect("a cgroup");
    let enter = format!("echo $$ > {}/cgroup.procs; ", outside.display());
    let escaped = fixture.connect(Ids::ROOT, &enter, "10.96.0.10");
    fixture.wait("in another cgroup", |audit| causes(audit) == ["other_cgroup", "other_namespace"]);
    drop((stray, escaped));
    fixture.wait("gone", |audit| causes(audit).is_empty());
    drop((held, &fixture.world));
}
