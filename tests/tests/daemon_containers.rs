//! `--proxy-container` and `--exempt-containers`: the daemon finds the containers' cgroups by what the kubelet mounts, and
//! follows containers that come, go and start again.

use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::Duration;

use intercept_agent::facade::daemon::PodState;
use tempfile::TempDir;
use tests::actor::{Actor, Bind, Dial, DialOutcome, Listen, Transport};
use tests::agent::Agent;
use tests::daemon::Daemon;
use tests::testbed::{Ids, Pod, PodSpec};

const UID: &str = "3e5d2a1c-0c1f-4d53-9f57-6b1d6a3b7c11";
const FLAGS: [&str; 10] = [
    "-i",
    "*",
    "-b",
    "*",
    "-u",
    "1337",
    "--proxy-container",
    "istio-proxy",
    "--exempt-containers",
    "fetch,migrate",
];

/// A container: its first process, with the mount of the kubelet, and an actor. Dropping it ends both.
struct RunningContainer {
    init: Child,
    actor: Actor,
}

impl RunningContainer {
    fn start(pod: &Pod, kubelet: &TempDir, name: &str, cgroup: &str) -> Self {
        let message = kubelet.path().join(format!("pods/{UID}/containers/{name}/0a1b"));
        fs::create_dir_all(message.parent().expect("a folder")).expect("made");
        fs::write(&message, "").expect("written");
        let target = kubelet.path().join("mounted");
        fs::write(&target, "").expect("written");
        Self::with_mount(pod, cgroup, &format!("--bind {}", message.display()), &target)
    }

    /// Its first process mounts something on `target`.
    fn with_mount(pod: &Pod, cgroup: &str, mount: &str, target: &Path) -> Self {
        let script = format!("mount {mount} {} && exec sleep 600", target.display());
        let mut command = pod.command("unshare").expect("a command");
        let command = command.args(["-m", "--propagation", "private", "sh", "-c", &script]);
        let init = command.stdin(Stdio::null()).spawn().expect("started");
        let cgroup = pod.cgroup.path().join(cgroup);
        fs::create_dir_all(&cgroup).expect("a cgroup");
        let enter = |pid: u32| fs::write(cgroup.join("cgroup.procs"), pid.to_string()).expect("moved");
        enter(init.id());
        let actor = Actor::start(pod).expect("an actor");
        enter(actor.pid());
        Self { init, actor }
    }

    fn reaches(&self, ids: Ids) -> String {
        let to: SocketAddr = "10.96.0.10:80".parse().expect("an address");
        let dial = Dial { timeout: Duration::from_secs(1), ..Dial::new(ids, to) };
        match self.actor.dial(dial).expect("dialled").outcome {
            DialOutcome::Answered(answer) => answer.server,
            other => format!("{other:?}"),
        }
    }
}

impl Drop for RunningContainer {
    fn drop(&mut self) {
        drop(self.init.kill());
        drop(self.init.wait());
    }
}

fn listen(actor: &Actor, name: &str, ids: Ids, port: u16) {
    let bind = Bind::new(ids, SocketAddr::new("0.0.0.0".parse().expect("an address"), port));
    actor.listen(Listen { name: name.into(), transport: Transport::Tcp, bind }).expect("a server");
}

#[test]
fn containers_are_followed_by_name() {
    let agent = Agent::new("d-containers").expect("the agent");
    let daemon = Daemon::start(&agent, &[]).expect("a daemon");
    let pod = Pod::new(PodSpec::new("d-containers")).expect("a pod");
    let kubelet = tests::testbed::name::scratch("kubelet").expect("a folder");
    let world = Actor::start(pod.neighbour()).expect("an actor");
    listen(&world, "world", Ids::ROOT, 80);
    let start = |name: &str, cgroup: &str| RunningContainer::start(&pod, &kubelet, name, cgroup);
    let comes_to = |container: &RunningContainer, ids: Ids, server: &str| {
        let what = format!("{ids:?} reaches {server}");
        daemon.wait(&what, |_| container.reaches(ids) == server).unwrap_or_else(|error| panic!("{error:#}"));
    };

    // Captured before any container runs, as by the CNI plugin.
    daemon.put("a", &pod, &FLAGS).expect("put");
    daemon.wait_for("a", PodState::Captured).expect("captured");
    let fetch = start("fetch", "cri-containerd-11.scope");
    comes_to(&fetch, Ids::APP, "world");
    let app = start("app", "cri-containerd-22.scope");
    let proxy = start("istio-proxy", "cri-containerd-33.scope");
    listen(&proxy.actor, "proxy", Ids::PROXY, 15001);
    comes_to(&proxy, Ids::PROXY, "world");
    assert_eq!(app.reaches(Ids::PROXY), "proxy", "an application with the proxy's ids");
    assert_eq!(fetch.reaches(Ids::APP), "world");

    // The proxy's container starts again, in another cgroup.
    drop(proxy);
    assert_eq!(app.reaches(Ids::PROXY), "Refused");
    let proxy = start("istio-proxy", "cri-containerd-44.scope");
    listen(&proxy.actor, "proxy", Ids::PROXY, 15001);
    comes_to(&proxy, Ids::PROXY, "world");
    assert_eq!(app.reaches(Ids::PROXY), "proxy");

    // A mount that a process can make for itself names no container.
    let forged = kubelet.path().join("forged");
    let inside = format!("/pods/{UID}/containers/istio-proxy/0a1b");
    let script =
        format!("-t tmpfs none {0} && mkdir -p {0}{inside} && mount --bind {0}{inside}", forged.display());
    fs::create_dir(&forged).expect("made");
    let target = kubelet.path().join("forged-target");
    fs::create_dir(&target).expect("made");
    let liar = RunningContainer::with_mount(&pod, "cri-containerd-55.scope", &script, &target);
    // By the time that a container is known which came later, this one has been looked at.
    let migrate = start("migrate", "cri-containerd-66.scope");
    comes_to(&migrate, Ids::APP, "world");
    assert_eq!(liar.reaches(Ids::PROXY), "proxy", "it says that it is the proxy's container");
    daemon.remove("a").expect("removed");
}
