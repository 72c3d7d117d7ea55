//! Obstacles that an administrator has to remove: the daemon reports them and continues by itself.

use std::{
    fs,
    os::fd::AsFd as _,
    path::{Path, PathBuf},
};

use aya::maps::MapData;
use aya_obj::Object;
use intercept_agent::facade::{
    daemon::{PodReport, PodState},
    maps::Maps,
    programs::CAPTURE,
    sys,
};
use intercept_common::{layout, names};
use tests::{
    agent::{Agent, succeed},
    daemon::{Daemon, OUTBOUND, answers, free_address, get, proxy, service},
    testbed::{Pod, PodSpec, Sandbox},
};

/// The capacity of the map of ports. Each pod uses one entry more than it has ports, because no two ports here share a
/// prefix.
const ROOM: u32 = 10;

/// Creates the map of ports with a small capacity, before the agent would create it.
fn with_little_room(agent: &Agent) {
    let maps = agent.store().join("maps");
    fs::create_dir_all(&maps).expect("made");
    let mut map = Object::parse(CAPTURE).expect("an object").maps.remove(names::PORTS).expect("a map");
    map.set_max_entries(ROOM);
    let map = MapData::create(map, names::PORTS, None).expect("made");
    sys::pin(map.fd().as_fd(), &maps.join(names::PORTS)).expect("pinned");
}

/// The number of entries in the map of ports.
fn ports_in_use(agent: &Agent) -> usize {
    let maps = agent.store().join("maps");
    let fill = Maps::open(&maps).and_then(|tables| tables.fill(&maps)).expect("read");
    fill.maps.iter().find(|(name, ..)| *name == names::PORTS).expect("listed").1
}

#[test]
fn a_full_map_fails_only_the_pod_that_does_not_fit() {
    let agent = Agent::new("d-room").expect("the agent");
    with_little_room(&agent);
    let daemon = Daemon::start(&agent, &[]).expect("a daemon");
    let pod = Pod::new(PodSpec::new("room")).expect("a pod");
    let actor = proxy(&pod);
    let (large, late) = (Sandbox::new("large").expect("a place"), Sandbox::new("late").expect("a place"));
    let put = |name: &str, sandbox: &Sandbox, ports: &str| {
        daemon.put(name, sandbox, &[&OUTBOUND[..], &["-o", ports]].concat()).expect("put");
    };
    let is_full = |report: PodReport| {
        let problem = report.failure.expect("a problem");
        assert_eq!(problem.cause, "map_full");
        assert!(problem.text.contains("PORTS, which is full: shorten"), "{problem:?}");
    };

    put("small", &pod, "1,3,5");
    daemon.wait_for("small", PodState::Captured).expect("captured");
    put("large", &large, "1,3,5,7,9,11");
    is_full(daemon.wait_for("large", PodState::Failed).expect("failed"));
    let tried = |d: &Daemon<'_>| d.report("large").is_ok_and(|r| r.is_some_and(|r| r.failures > 2));
    daemon.wait("it is tried again", tried).expect("retried");

    // The same for an active pod whose list grows. No entry of a refused list stays in the map, even before the failure
    // of another pod would remove it.
    daemon.remove("large").expect("removed");
    daemon.wait("it is forgotten", |daemon| daemon.report("large").is_ok_and(|r| r.is_none())).expect("gone");
    let before = ports_in_use(&agent);
    put("small", &pod, "1,3,5,7,9,11");
    is_full(daemon.wait_for("small", PodState::Failed).expect("failed"));
    assert_eq!(ports_in_use(&agent), before);
    put("large", &large, "1,3,5,7,9,11");
    is_full(daemon.wait_for("large", PodState::Failed).expect("failed"));
    assert_eq!(answers(&actor, service()).as_deref(), Some("proxy"));
    put("late", &late, "1,3,5,7,9");
    daemon.wait_for("late", PodState::Captured).expect("what did not fit takes no room");
    assert_eq!(answers(&actor, service()).as_deref(), Some("proxy"));

    for name in ["small", "late"] {
        daemon.remove(name).expect("removed");
    }
    daemon.wait_for("large", PodState::Captured).expect("captured when there is room");
}

/// A pod that an agent with another layout has captured.
fn pod_of_another_layout(agent: &Agent) -> PathBuf {
    let version = agent.bpffs().join("intercept").join(format!("v{}", layout::VERSION + 1));
    fs::create_dir_all(version.join("pods/77")).expect("made");
    let record = sys::create_blob("record", b"unreadable").expect("made");
    sys::pin(record.as_fd(), &version.join("pods/77/record-1")).expect("pinned");
    version
}

#[test]
fn pods_of_another_layout_are_ignored_until_they_are_removed() {
    let agent = Agent::new("d-layout").expect("the agent");
    let other = pod_of_another_layout(&agent);
    let probes = free_address();
    let mut daemon = Daemon::start(&agent, &["--metrics-address", &probes.to_string()]).expect("a daemon");
    let sandbox = Sandbox::new("layout").expect("a place");
    daemon.put("a", &sandbox, &OUTBOUND).expect("put");

    let tells = |text: &str, other: &Path| {
        assert!(text.contains(&other.display().to_string()), "{text}");
        assert!(text.contains("`intercept-agent detach --all`"), "{text}");
    };
    let problem = |report: PodReport| report.failure.expect("a problem").text;
    tells(&problem(daemon.wait_for("a", PodState::Failed).expect("failed")), &other);
    let (status, text) = get(probes, "/readyz");
    assert_eq!(status, 503);
    tells(&text, &other);
    // A restart would not help.
    assert_eq!(get(probes, "/healthz").0, 200);
    assert!(other.join("pods/77/record-1").exists() && !agent.store().exists());

    agent.detach_all().expect("detached");
    daemon.wait_for("a", PodState::Captured).expect("captured");
    assert_eq!(get(probes, "/readyz").0, 200);
    assert!(!other.exists());

    // The same by `cleanup`, after which a daemon that is started works.
    daemon.kill().expect("killed");
    agent.detach_all().expect("detached");
    let other = pod_of_another_layout(&agent);
    daemon.restart().expect("started");
    tells(&problem(daemon.wait_for("a", PodState::Failed).expect("failed")), &other);
    let mut cleanup = agent.command("cleanup");
    cleanup.arg("--socket").arg(daemon.socket());
    for option in ["--cni-conf-dir", "--cni-bin-dir"] {
        cleanup.arg(option).arg(daemon.folder());
    }
    succeed(cleanup).expect("cleaned up");
    assert!(!agent.bpffs().join("intercept").exists());
    daemon.kill().expect("killed");
    daemon.restart().expect("started");
    daemon.wait_for("a", PodState::Captured).expect("captured");
}
