//! A pod that is removed, or restarted, without a detach: its cgroup or its namespace is gone, and the other may be there
//! still. What remains is shown, is removed, and is in no way of what takes the pod's place.

use std::{
    fs,
    net::SocketAddr,
    process::Command,
    time::{Duration, Instant},
};

use intercept_agent::facade::daemon::PodState;
use intercept_common::Family;
use serde_json::json;
use tests::{
    actor::{Actor, Bind, Dial, DialOutcome, Listen, OriginalDst, Transport},
    agent::{Agent, INIT_FLAGS, finish, succeed},
    daemon::{Daemon, OUTBOUND},
    snapshot::Snapshot,
    testbed::{Ids, Namespace, Pod, PodSpec, Sandbox},
};

/// How long anything may take.
const PATIENCE: Duration = Duration::from_secs(60);
const SERVICES: [&str; 2] = ["10.96.0.10:80", "[fd96::10]:80"];

fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is_so() {
        assert!(Instant::now() < deadline, "{what}: not after {PATIENCE:?}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Waits until the only pod has this state.
fn becomes(agent: &Agent, state: &str) {
    until(state, || agent.pods().expect("a status").iter().all(|pod| pod.state == state));
    assert_eq!(agent.pods().expect("a status").len(), 1);
}

/// A process that is the proxy and the application.
fn inside(pod: &Sandbox) -> Actor {
    let actor = Actor::start(pod).expect("an actor");
    for (name, ids, port) in
        [("proxy", Ids::PROXY, 15001), ("proxy", Ids::PROXY, 15006), ("app", Ids::APP, 8080)]
    {
        listen(&actor, name, ids, port);
    }
    actor
}

fn listen(actor: &Actor, name: &str, ids: Ids, port: u16) {
    for any in ["0.0.0.0", "::"] {
        let bind = Bind::new(ids, SocketAddr::new(any.parse().expect("an address"), port));
        let listen = Listen { name: name.into(), transport: Transport::Tcp, bind };
        actor.listen(listen).expect("a server");
    }
}

/// The server of a connection to the address, with the destination that it learned.
fn server(actor: &Actor, ids: Ids, to: SocketAddr) -> (String, bool) {
    match actor.dial(Dial::new(ids, to)).expect("dialled").outcome {
        DialOutcome::Answered(answer) => {
            let knows = answer.original_dst == Some(OriginalDst::Addr(to));
            (answer.server, knows)
        }
        other => (format!("{other:?}"), false),
    }
}

/// Both directions, both families.
fn assert_captured(pod: &Pod, inside: &Actor, world: &Actor) {
    for to in SERVICES {
        let to = to.parse().expect("an address");
        assert_eq!(server(inside, Ids::APP, to), ("proxy".to_owned(), true), "{to}");
    }
    for family in Family::ALL {
        let to = SocketAddr::new(pod.address(family), 8080);
        assert_eq!(server(world, Ids::ROOT, to), ("proxy".to_owned(), true), "{to}");
    }
}

/// Removes the pod's cgroup, and makes another of the same name.
fn make_cgroup_again(pod: &Pod) {
    until("an empty cgroup", || fs::remove_dir(pod.cgroup.path()).is_ok());
    fs::create_dir(pod.cgroup.path()).expect("a cgroup");
}

#[test]
fn a_cgroup_of_the_same_name_is_captured_in_the_same_namespace() {
    let agent = Agent::new("gone-cgroup").expect("the agent");
    let pod = Pod::new(PodSpec::new("gone-cgroup")).expect("a pod");
    let world = Actor::start(pod.neighbour()).expect("an actor");
    listen(&world, "world", Ids::ROOT, 80);
    let clean = Snapshot::of(&pod).expect("a snapshot");

    let first = inside(&pod);
    agent.attach(&pod, &INIT_FLAGS).expect("attached");
    assert_captured(&pod, &first, &world);
    let captured = Snapshot::of(&pod).expect("a snapshot");
    drop(first);
    make_cgroup_again(&pod);
    becomes(&agent, "gone");
    let said = succeed(agent.command("status")).expect("a status");
    assert!(said.contains("(gone") && said.contains("the next attach or detach removes"), "{said}");

    let second = inside(&pod);
    assert_eq!(server(&second, Ids::APP, SERVICES[0].parse().expect("an address")).0, "world");
    assert!(agent.attach(&pod, &INIT_FLAGS).expect("attached").starts_with("attached"));
    assert_captured(&pod, &second, &world);
    assert_eq!(captured.difference(&Snapshot::of(&pod).expect("a snapshot")), [""; 0]);
    becomes(&agent, "attached");
    agent.detach(&pod).expect("detached");
    assert_eq!(clean.difference(&Snapshot::of(&pod).expect("a snapshot")), [""; 0]);
    assert!(!agent.bpffs().join("intercept").exists());
}

/// What was changed in a namespace goes with a detach, also if the cgroup was removed and there is another.
#[test]
fn detach_by_name_restores_the_namespace_of_a_removed_cgroup() {
    let agent = Agent::new("gone-detach").expect("the agent");
    let pod = Pod::new(PodSpec::new("gone-detach")).expect("a pod");
    let clean = Snapshot::of(&pod).expect("a snapshot");
    for is_made_again in [false, true] {
        agent.attach(&pod, &INIT_FLAGS).expect("attached");
        until("an empty cgroup", || fs::remove_dir(pod.cgroup.path()).is_ok());
        if is_made_again {
            fs::create_dir(pod.cgroup.path()).expect("a cgroup");
        }
        becomes(&agent, "gone");
        let said = agent.detach(&pod).expect("detached");
        assert!(said.starts_with("detached cgroup"), "{said}");
        if !is_made_again {
            fs::create_dir(pod.cgroup.path()).expect("a cgroup");
        }
        assert_eq!(clean.difference(&Snapshot::of(&pod).expect("a snapshot")), [""; 0]);
        assert!(!agent.bpffs().join("intercept").exists());
    }
}

/// A container in a slice is restarted: the slice stays, and has another namespace.
#[test]
fn another_namespace_is_captured_in_the_same_cgroup() {
    let agent = Agent::new("gone-netns").expect("the agent");
    let mut pod = Sandbox::new("gone-netns").expect("a pod");
    for is_detached in [false, true] {
        assert!(agent.attach(&pod, &INIT_FLAGS).expect("attached").starts_with("attached"));
        let Sandbox { cgroup, netns } = pod;
        drop(netns);
        pod = Sandbox { cgroup, netns: Namespace::new("gone-netns").expect("a namespace") };
        becomes(&agent, "gone");
        if is_detached {
            let said = agent.detach(&pod).expect("detached");
            assert!(said.starts_with("detached cgroup"), "{said}");
            assert!(!agent.bpffs().join("intercept").exists());
        }
    }
    agent.attach(&pod, &INIT_FLAGS).expect("attached");
    let Sandbox { cgroup, netns } = pod;
    drop(netns);
    becomes(&agent, "gone");
    agent.detach_all().expect("detached");
    assert!(!agent.bpffs().join("intercept").exists());
    drop(cgroup);
}

/// A namespace that is still there cannot be captured by another's cgroup without a word.
#[test]
fn a_restart_beside_a_living_container_is_refused_with_the_way_out() {
    let agent = Agent::new("gone-living").expect("the agent");
    let pod = Sandbox::new("gone-living").expect("a pod");
    let restarted = Namespace::new("gone-living-again").expect("a namespace");
    agent.attach(&pod, &INIT_FLAGS).expect("attached");
    let attach = || {
        let mut command = agent.command("attach");
        command.arg("--cgroup-path").arg(pod.cgroup.path());
        command.arg("--netns").arg(restarted.path()).args(INIT_FLAGS);
        command
    };
    let output = finish(&mut attach()).expect("run");
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && error.contains("detach it first"), "{error}");
    agent.detach(&pod).expect("detached");
    succeed(attach()).expect("attached");
}

#[test]
fn run_ends_with_the_pod() {
    let agent = Agent::new("gone-run").expect("the agent");
    // The cgroup is removed first, or the namespace.
    for is_cgroup in [true, false] {
        let pod = Sandbox::new("gone-run").expect("a pod");
        let (running, said) = agent.run(&pod, &INIT_FLAGS).expect("attached");
        assert!(said.starts_with("attached"), "{said}");
        let Sandbox { cgroup, netns } = pod;
        let path = cgroup.path().to_owned();
        let (cgroup, netns) = if is_cgroup {
            drop(cgroup);
            (None, Some(netns))
        } else {
            drop(netns);
            (Some(cgroup), None)
        };
        let (status, log) = running.ended(PATIENCE).expect("ended");
        assert_eq!(status.code(), Some(1), "{log}");
        assert!(log.contains(&format!("cgroup {} is gone", path.display())), "{log}");
        assert!(!agent.bpffs().join("intercept").exists());
        if let Some(netns) = netns {
            let left = Sandbox { cgroup: tests::testbed::Cgroup::new("gone-run").expect("a cgroup"), netns };
            let new = Sandbox::new("gone-new").expect("a pod");
            let [left, new] = [&left, &new].map(|pod| Snapshot::of(pod).expect("a snapshot"));
            assert_eq!(new.difference(&left), [""; 0], "left in the namespace");
        }
        drop(cgroup);
    }
}

/// A file of a pod without the path of its namespace, whose container is restarted in the same cgroup.
#[test]
fn the_daemon_captures_the_namespace_of_a_restarted_container() {
    let agent = Agent::new("gone-daemon").expect("the agent");
    let daemon = Daemon::start(&agent, &[]).expect("a daemon");
    let Sandbox { cgroup, netns } = Sandbox::new("gone-daemon").expect("a pod");
    let again = Namespace::new("gone-daemon-again").expect("a namespace");
    let pod = Sandbox { cgroup, netns };
    let start = |pod: &Sandbox| pod.command("sleep").expect("a command").arg("600").spawn().expect("started");
    let mut first = start(&pod);
    let text = json!({"cgroup": pod.cgroup.path(), "arguments": OUTBOUND});
    daemon.put_text("a", &text.to_string()).expect("put");
    let cookie = daemon.wait_for("a", PodState::Captured).expect("captured").netns_cookie;
    let Sandbox { cgroup, netns } = pod;
    drop(netns);
    let pod = Sandbox { cgroup, netns: again };
    // The next one starts before the first has ended.
    let mut second = start(&pod);
    first.kill().and_then(|()| first.wait()).expect("killed");
    let restarted = Instant::now();
    let is_other = |daemon: &Daemon<'_>| {
        let report = daemon.report("a").ok()??;
        Some(report.state == PodState::Captured && report.netns_cookie? != cookie?)
    };
    daemon.wait("the other namespace is captured", |d| is_other(d) == Some(true)).expect("captured");
    println!("captured after {:?}", restarted.elapsed());
    assert_eq!(agent.pods().expect("a status").len(), 1);
    second.kill().and_then(|()| second.wait()).expect("killed");
}

/// The detach of the last pod removes the state, whose lock others wait for.
#[test]
fn pods_that_come_and_go_at_once_fail_none() {
    let agent = Agent::new("gone-at-once").expect("the agent");
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                let pod = Sandbox::new("gone-at-once").expect("a pod");
                for _ in 0..8 {
                    agent.attach(&pod, &INIT_FLAGS).expect("attached");
                    agent.detach(&pod).expect("detached");
                }
            });
        }
    });
    assert!(!agent.bpffs().join("intercept").exists());
}

#[test]
fn the_first_pods_of_a_node_mount_one_bpffs() {
    let agent = Agent::new("gone-mounts").expect("the agent");
    let mounts = || {
        let path = agent.bpffs().to_str().expect("text").to_owned();
        let mounts = fs::read_to_string("/proc/self/mountinfo").expect("read");
        mounts.lines().filter(|line| line.split(' ').nth(4) == Some(&path)).count()
    };
    let pods = [(); 3].map(|()| Sandbox::new("gone-mounts").expect("a pod"));
    for _ in 0..5 {
        let mut unmount = Command::new("umount");
        unmount.arg(agent.bpffs());
        succeed(unmount).expect("unmounted");
        assert_eq!(mounts(), 0);
        std::thread::scope(|scope| {
            for pod in &pods {
                scope.spawn(|| agent.attach(pod, &INIT_FLAGS).expect("attached"));
            }
        });
        assert_eq!((mounts(), agent.pods().expect("a status").len()), (1, 3));
        for pod in &pods {
            agent.detach(pod).expect("detached");
        }
    }
}
