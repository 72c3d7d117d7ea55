//! A new build of the agent replaces the programs of attached pods without a gap.

use std::{
    fs,
    net::{IpAddr, SocketAddr},
    os::fd::AsFd as _,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    time::{Duration, Instant},
};

use intercept_agent::facade::sys;
use intercept_common::Family;
use tests::{
    actor::{Actor, Bind, Dial, DialOutcome, Listen, Transport},
    agent::{Agent, succeed},
    testbed::{Ids, Pod, PodSpec},
};

/// The folder of the layout.
fn version(bpffs: &Path) -> PathBuf {
    let mut store = fs::read_dir(bpffs.join("intercept")).expect("a store");
    store.next().expect("a layout").expect("an entry").path()
}

fn programs(bpffs: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(version(bpffs))
        .expect("a folder")
        .map(|entry| entry.expect("an entry").file_name().into_string().expect("a name"))
        .filter(|name| name.starts_with("programs-"))
        .collect();
    names.sort();
    names
}

/// Waits until the kernel has added the last of a pod's routes, which would replace the policy.
fn await_link_local_address(pod: &Pod) {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let mut ip = pod.command("ip").expect("a command");
        ip.args(["-6", "addr", "show", "scope", "link"]);
        let addresses = succeed(ip).expect("addresses");
        if addresses.contains("fe80::") && !addresses.contains("tentative") {
            return;
        }
        assert!(Instant::now() < deadline, "{addresses}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn programs_are_replaced_without_a_gap() {
    let agent = Agent::new("upgrade").expect("the agent");
    let pod = Pod::new(PodSpec::new("upgrade")).expect("a pod");
    let (inside, world) =
        (Actor::start(&pod).expect("an actor"), Actor::start(pod.neighbour()).expect("an actor"));
    for (name, port) in [("outbound", 15001), ("inbound", 15006)] {
        let bind = Bind::new(Ids::PROXY, SocketAddr::new(IpAddr::from([0, 0, 0, 0]), port));
        inside.listen(Listen { name: name.into(), transport: Transport::Tcp, bind }).expect("a proxy");
    }
    let attach = || agent.attach(&pod, &["-i", "*", "-b", "*", "-u", "1337"]).expect("attached");
    await_link_local_address(&pod);
    assert!(attach().starts_with("attached"));
    let own = programs(agent.bpffs());
    assert_eq!(own.len(), 1, "{own:?}");

    let out = Dial::new(Ids::APP, SocketAddr::from(([10, 96, 0, 10], 80)));
    let back = Dial::new(Ids::ROOT, SocketAddr::new(pod.address(Family::V4), 8080));
    let (stop, dialled) = (AtomicBool::new(false), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        // Every connection reaches the proxy with its original destination during the upgrade.
        let client = scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                for (actor, dial, proxy) in [(&inside, &out, "outbound"), (&world, &back, "inbound")] {
                    match actor.dial(dial.clone()).expect("dialled").outcome {
                        DialOutcome::Answered(answer) => assert_eq!(answer.server, proxy),
                        other => panic!("{proxy}, after {}: {other:?}", dialled.load(Ordering::Relaxed)),
                    }
                    dialled.fetch_add(1, Ordering::Relaxed);
                }
            }
        });
        let replaced = catch_unwind(AssertUnwindSafe(|| {
            for other in ["programs-0000000000000001", "programs-0000000000000002"] {
                // As another build would leave them.
                let version = version(agent.bpffs());
                fs::rename(version.join(&own[0]), version.join(other)).expect("renamed");
                let said = attach();
                assert!(said.starts_with("unchanged"), "{said}");
                assert_eq!(programs(agent.bpffs()), own, "the other build's are gone");
            }
        }));
        // Also after a failure, because the client would not end otherwise.
        stop.store(true, Ordering::Relaxed);
        for result in [replaced, client.join()] {
            result.unwrap_or_else(|panic| resume_unwind(panic));
        }
    });
    assert!(dialled.load(Ordering::Relaxed) > 20, "too few connections to tell");
    agent.detach(&pod).expect("detached");
    assert!(!agent.bpffs().join("intercept").exists());
}

#[test]
fn another_layout_without_pods_is_removed() {
    let agent = Agent::new("idle").expect("the agent");
    let pod = Pod::new(PodSpec::new("idle")).expect("a pod");
    let idle = agent.bpffs().join("intercept/v1");
    fs::create_dir_all(idle.join("maps")).expect("made");
    let map = sys::create_blob("left", b"behind").expect("a map");
    sys::pin(map.as_fd(), &idle.join("maps/LEFT")).expect("pinned");
    agent.attach(&pod, &["-i", "*"]).expect("attached");
    assert!(!idle.exists());
    agent.detach(&pod).expect("detached");
}
