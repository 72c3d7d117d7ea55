//! `--proxy-cgroup`: the proxy is who runs in its container and has its ids. `--exempt-cgroup`: what a container sends is
//! left alone.

use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use intercept_common::Family;
use serde_json::Value;
use tests::actor::{
    Actor, Bind, Dial, DialOutcome, Listen, Listening, OriginalDst, Query, QueryReply, Transport,
};
use tests::agent::{Agent, finish, succeed};
use tests::status::{StatusEntry, count_of};
use tests::testbed::{Ids, Pod, PodSpec, cgroup};

const FLAGS: [&str; 9] = ["-u", "1337", "-g", "1337", "-i", "*", "-b", "*", "--redirect-dns"];
const SERVICES: [&str; 2] = ["10.96.0.10", "fd96::10"];
/// Only the group is the proxy's.
const GROUP: Ids = Ids { uid: 1000, gid: 1337 };

/// A pod with a container for the application and one for the proxy, each with an actor.
struct ContainersFixture {
    app: Actor,
    proxy: Actor,
    world: Actor,
    agent: Agent,
    pod: Pod,
}

impl ContainersFixture {
    fn new(label: &str) -> Self {
        let agent = Agent::new(label).expect("the agent");
        let pod = Pod::new(PodSpec::new(label)).expect("a pod");
        let start = |name: &str| {
            let actor = Actor::start(&pod).expect("an actor");
            enter(&pod, name, actor.pid());
            actor
        };
        let (app, proxy) = (start("app"), start("proxy"));
        let world = Actor::start(pod.neighbour()).expect("an actor");
        listen(&world, "world", Ids::ROOT, Transport::Tcp, 80);
        listen(&world, "world", Ids::ROOT, Transport::Udp, 53);
        listen(&app, "app", Ids::APP, Transport::Tcp, 8080);
        Self { app, proxy, world, agent, pod }
    }

    fn start_proxy(&self) {
        for port in [15001, 15006] {
            listen(&self.proxy, "proxy", Ids::PROXY, Transport::Tcp, port);
        }
        listen(&self.proxy, "proxy", Ids::PROXY, Transport::Udp, 15053);
    }

    fn cgroup(&self, name: &str) -> String {
        self.pod.cgroup.path().join(name).display().to_string()
    }

    /// Attaches with these containers. Returns what was done.
    fn attach(&self, more: &[&str]) -> String {
        let all = [&FLAGS[..], &["--capture-all-dns"], more].concat();
        let said = self.agent.attach(&self.pod, &all).expect("attached");
        said.split(' ').next().expect("a word").to_owned()
    }

    /// The servers of a connection and of a query to the world, and of a connection to the pod's own address, of both
    /// families.
    fn reaches(&self, actor: &Actor, ids: Ids) -> Vec<String> {
        let mut servers = Vec::new();
        for service in SERVICES {
            let service: IpAddr = service.parse().expect("an address");
            servers.push(server(actor, Dial::new(ids, SocketAddr::new(service, 80))));
            let query = Query::new(ids, SocketAddr::new(service, 53));
            servers.push(match actor.query(query).expect("asked").replies.remove(0) {
                QueryReply::Answered { answer, .. } => answer.server,
                other => format!("{other:?}"),
            });
            let own = SocketAddr::new(self.pod.address(Family::of(&service)), 8080);
            servers.push(server(actor, Dial::new(ids, own)));
        }
        servers
    }

    /// The servers of connections that arrive for the application.
    fn arriving(&self) -> Vec<String> {
        let to = |family| SocketAddr::new(self.pod.address(family), 8080);
        Family::ALL.map(|family| server(&self.world, Dial::new(Ids::ROOT, to(family)))).to_vec()
    }

    fn status(&self) -> StatusEntry {
        self.agent.pods().expect("a status").remove(0)
    }
}

fn enter(pod: &Pod, container: &str, pid: u32) -> PathBuf {
    let cgroup = pod.cgroup.path().join(container);
    fs::create_dir_all(&cgroup).expect("a cgroup");
    fs::write(cgroup.join("cgroup.procs"), pid.to_string()).expect("moved");
    cgroup
}

fn listen(actor: &Actor, name: &str, ids: Ids, transport: Transport, port: u16) -> Vec<Listening> {
    let open = |any: &str| {
        let bind = Bind::new(ids, SocketAddr::new(any.parse().expect("an address"), port));
        actor.listen(Listen { name: name.into(), transport, bind }).expect("a server")
    };
    ["0.0.0.0", "::"].map(open).to_vec()
}

fn server(actor: &Actor, dial: Dial) -> String {
    match actor.dial(dial).expect("dialled").outcome {
        DialOutcome::Answered(answer) => answer.server,
        other => format!("{other:?}"),
    }
}

const PROXY: [&str; 6] = ["world", "world", "proxy", "world", "world", "proxy"];
const APPLICATION: [&str; 6] = ["proxy", "proxy", "app", "proxy", "proxy", "app"];
const EXEMPT: [&str; 6] = ["world", "world", "app", "world", "world", "app"];

#[test]
fn only_a_process_of_its_container_is_the_proxy() {
    let pod = ContainersFixture::new("container");
    pod.start_proxy();
    pod.attach(&[]);
    for ids in [Ids::PROXY, GROUP] {
        let reached = pod.reaches(&pod.app, ids);
        assert_eq!((&*reached[0], &*reached[3]), ("world", "world"), "{ids:?}: any process is the proxy");
    }

    let proxy = pod.cgroup("proxy");
    assert_eq!(pod.attach(&["--proxy-cgroup", &proxy]), "replaced");
    for ids in [Ids::PROXY, GROUP, Ids { uid: 1337, gid: 1000 }, Ids::APP] {
        assert_eq!(pod.reaches(&pod.app, ids), APPLICATION, "{ids:?} in the application's container");
    }
    assert_eq!(pod.reaches(&pod.proxy, Ids::PROXY), PROXY, "the proxy");
    assert_eq!(pod.reaches(&pod.proxy, Ids::APP), APPLICATION, "without the proxy's ids");
    assert_eq!(pod.arriving(), ["proxy", "proxy"]);

    // What is asked of a captured connection is the same whoever dialled it.
    let to: SocketAddr = "10.96.0.10:80".parse().expect("an address");
    let dialled = pod.app.dial(Dial::new(Ids::PROXY, to)).expect("dialled");
    let DialOutcome::Answered(answer) = dialled.outcome else { panic!("{dialled:?}") };
    assert_eq!(answer.original_dst, Some(OriginalDst::Addr(to)));
    assert_eq!(dialled.peername, Some(to));
    assert_eq!(Some(answer.peer), dialled.sockname);

    // Cgroups below the container's belong to it, and a process that moves counts by where it is when it connects.
    for (cgroup, reached) in [
        ("proxy/worker/deep", PROXY),
        ("app", APPLICATION),
        ("app/proxy", APPLICATION),
        ("", APPLICATION),
        ("proxy", PROXY),
    ] {
        enter(&pod.pod, cgroup, pod.app.pid());
        assert_eq!(pod.reaches(&pod.app, Ids::PROXY), reached, "in {cgroup:?}");
    }
    pod.attach(&[]);
    pod.agent.detach(&pod.pod).expect("detached");
}

#[test]
fn a_listener_in_another_container_is_not_the_proxys() {
    let pod = ContainersFixture::new("foreign");
    let proxy = pod.cgroup("proxy");
    // Before the attach, the agent takes listeners; after it, they register themselves.
    for attached_first in [false, true] {
        let attach = || drop(pod.attach(&["--proxy-cgroup", &proxy]));
        if attached_first {
            attach();
        }
        let foreign = listen(&pod.app, "foreign", Ids::PROXY, Transport::Tcp, 15006);
        if !attached_first {
            attach();
        }
        assert_eq!(pod.arriving(), ["Refused", "Refused"], "attached first: {attached_first}");
        for listening in foreign {
            pod.app.close(listening).expect("closed");
        }
        let own = listen(&pod.proxy, "proxy", Ids::PROXY, Transport::Tcp, 15006);
        assert_eq!(pod.arriving(), ["proxy", "proxy"], "attached first: {attached_first}");
        if attached_first {
            assert_eq!(count_of(&pod.status().failures, "foreign_listener"), 2);
        }
        pod.agent.detach(&pod.pod).expect("detached");
        for listening in own {
            pod.proxy.close(listening).expect("closed");
        }
    }
    // Listening in a cgroup below the container's.
    pod.attach(&["--proxy-cgroup", &proxy]);
    let worker = Actor::start(&pod.pod).expect("an actor");
    enter(&pod.pod, "proxy/worker", worker.pid());
    listen(&worker, "worker", Ids::PROXY, Transport::Tcp, 15006);
    assert_eq!(pod.arriving(), ["worker", "worker"]);
}

#[test]
fn an_exempt_container_sends_as_if_the_pod_were_not_captured() {
    let pod = ContainersFixture::new("exempt");
    let (init, proxy) = (pod.cgroup("init"), pod.cgroup("proxy"));
    let early = Actor::start(&pod.pod).expect("an actor");
    enter(&pod.pod, "init/step", early.pid());
    pod.attach(&[]);
    assert_ne!(pod.reaches(&early, Ids::APP), EXEMPT, "captured unless it is exempt");

    pod.attach(&["--exempt-cgroup", &init]);
    assert_eq!(pod.reaches(&early, Ids::APP), EXEMPT, "before the proxy runs");
    assert_eq!(count_of(&pod.status().decisions, "exempt_container"), 6);
    pod.start_proxy();
    for more in [vec!["--exempt-cgroup", &init], vec!["--exempt-cgroup", &init, "--proxy-cgroup", &proxy]] {
        pod.attach(&more);
        for ids in [Ids::APP, Ids::PROXY, Ids::ROOT] {
            assert_eq!(pod.reaches(&early, ids), EXEMPT, "{ids:?} {more:?}");
        }
        assert_eq!(pod.reaches(&pod.app, Ids::APP), APPLICATION, "{more:?}");
        assert_eq!(pod.reaches(&pod.proxy, Ids::PROXY), PROXY, "{more:?}");
    }
    // Only what it sends: connections to it arrive at the proxy.
    listen(&early, "early", Ids::APP, Transport::Tcp, 8081);
    let to = SocketAddr::new(pod.pod.address(Family::V4), 8081);
    assert_eq!(server(&pod.world, Dial::new(Ids::ROOT, to)), "proxy");
}

/// Runs the program $3 in the cgroup $1, in a cgroup namespace whose root this is, with the hierarchy mounted at $2.
const ON_NODE: &str = r#"
echo $$ >"$1/cgroup.procs"
shift
exec unshare --mount --cgroup sh -c 'umount "$1" && mount -t cgroup2 none "$1" && shift && exec "$@"' sh "$@"
"#;

/// As on the nodes of kind, which are containers.
#[test]
fn a_container_is_exempt_where_the_root_of_the_hierarchy_is_hidden() {
    let mut pod = ContainersFixture::new("hidden");
    let early = Actor::start(&pod.pod).expect("an actor");
    for (name, actor) in [("app", &pod.app), ("proxy", &pod.proxy), ("init/step", &early)] {
        enter(&pod.pod, &format!("kubepods/pod/{name}"), actor.pid());
    }
    pod.start_proxy();
    let mount = cgroup::mount_point().expect("cgroup2");
    let [node, at] = [pod.pod.cgroup.path(), &mount].map(|path| path.display().to_string());
    pod.agent.start_by(["sh", "-c", ON_NODE, "sh", &node, &at].map(str::to_owned).to_vec());
    let own = mount.join("kubepods/pod");
    let mut attach = pod.agent.command("attach");
    attach.arg("--cgroup-path").arg(&own).args(FLAGS).arg("--capture-all-dns");
    attach.arg("--exempt-cgroup").arg(own.join("init"));
    succeed(attach).expect("attached");
    assert_eq!(pod.reaches(&early, Ids::APP), EXEMPT);
    assert_eq!(pod.reaches(&pod.app, Ids::APP), APPLICATION);
    assert_eq!(pod.reaches(&pod.proxy, Ids::PROXY), PROXY);
}

#[test]
fn only_the_proxys_container_is_looped_back_under_tproxy() {
    let pod = ContainersFixture::new("contproxy");
    let proxy = pod.cgroup("proxy");
    for any in ["0.0.0.0", "::"] {
        let bind = Bind::new(Ids::PROXY, SocketAddr::new(any.parse().expect("an address"), 15006));
        let bind = Bind { transparent: true, ..bind };
        let listen = Listen { name: "proxy".into(), transport: Transport::Tcp, bind };
        pod.proxy.listen(listen).expect("a server");
    }
    for more in [&[][..], &["--proxy-cgroup", &proxy]] {
        pod.attach(&[&["-m", "TPROXY"], more].concat());
        let own = |actor: &Actor, family| {
            server(actor, Dial::new(Ids::PROXY, SocketAddr::new(pod.pod.address(family), 8080)))
        };
        for family in Family::ALL {
            let expected = if more.is_empty() { "proxy" } else { "app" };
            assert_eq!(own(&pod.app, family), expected, "{more:?}");
            assert_eq!(own(&pod.proxy, family), "proxy", "{more:?}");
        }
    }
}

#[test]
fn a_container_that_is_made_again_is_the_proxy_after_the_next_attach() {
    let pod = ContainersFixture::new("again");
    pod.start_proxy();
    let (proxy, app) = (pod.cgroup("proxy"), pod.cgroup("app"));
    pod.attach(&["--proxy-cgroup", &proxy]);
    assert_eq!(pod.attach(&["--proxy-cgroup", &proxy]), "unchanged");
    fs::rename(&proxy, pod.cgroup("old")).expect_err("a cgroup keeps its name");
    enter(&pod.pod, "app", pod.proxy.pid());
    fs::remove_dir(&proxy).expect("removed");
    enter(&pod.pod, "proxy", pod.proxy.pid());
    assert_eq!(pod.reaches(&pod.proxy, Ids::PROXY), APPLICATION, "another cgroup of the same name");
    assert_eq!(pod.attach(&["--proxy-cgroup", &proxy]), "replaced");
    assert_eq!(pod.reaches(&pod.proxy, Ids::PROXY), PROXY);

    // Several containers.
    pod.attach(&["--proxy-cgroup", &format!("{proxy},{app}")]);
    assert_eq!(pod.reaches(&pod.app, Ids::PROXY), PROXY);
}

#[test]
fn cgroups_outside_of_the_pod_are_refused_and_nothing_changes() {
    let pod = ContainersFixture::new("refused");
    let outside = Pod::new(PodSpec::new("other")).expect("a pod");
    let elsewhere = outside.cgroup.path().join("proxy");
    fs::create_dir(&elsewhere).expect("a cgroup");
    fs::create_dir(pod.cgroup("app/deep")).expect("a cgroup");
    let own = pod.pod.cgroup.path().display().to_string();
    let (proxy, deep) = (pod.cgroup("proxy"), pod.cgroup("app/deep"));
    let cases = [
        (["--proxy-cgroup", elsewhere.to_str().expect("a path"), "", ""], "not below the pod's"),
        (["--proxy-cgroup", &own, "", ""], "not below the pod's"),
        (["--proxy-cgroup", &pod.cgroup("gone"), "", ""], "opening cgroup"),
        (["--exempt-cgroup", "/proc", "", ""], "is not a cgroup"),
        (["--proxy-cgroup", &proxy, "--exempt-cgroup", &deep], "of the same level"),
    ]
    .map(|(flags, why)| (flags.map(str::to_owned), why));
    for (flags, why) in cases {
        let flags: Vec<&str> = flags.iter().map(String::as_str).filter(|flag| !flag.is_empty()).collect();
        let mut attach = pod.agent.for_pod("attach", &pod.pod, &FLAGS);
        let output = finish(attach.args(&flags)).expect("run");
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && error.contains(why), "{flags:?}: {error}");
        assert_eq!(pod.agent.pods().expect("a status"), [], "{flags:?}");
    }
}

#[test]
fn explain_names_the_row_by_container() {
    let pod = ContainersFixture::new("explained");
    fs::create_dir(pod.cgroup("init")).expect("a cgroup");
    let (proxy, init) = (pod.cgroup("proxy"), pod.cgroup("init"));
    pod.attach(&["--proxy-cgroup", &proxy, "--exempt-cgroup", &init]);
    for (container, reason) in
        [(None, "included_cidr"), (Some("proxy"), "proxy_uid"), (Some("exempt"), "exempt_container")]
    {
        let mut explain = pod.agent.command("explain");
        explain.args(["outbound", "--json", "--cgroup-path"]).arg(pod.pod.cgroup.path());
        explain.args(["--dst", "10.96.0.10", "--dport", "80", "--uid", "1337"]);
        if let Some(container) = container {
            explain.args(["--container", container]);
        }
        let said: Value = serde_json::from_str(&succeed(explain).expect("explained")).expect("JSON");
        assert_eq!(said["reason"], reason, "{container:?}");
    }
}
