//! State of the agent that cannot be read does not affect other pods.

use std::{fs, os::fd::AsFd as _};

use intercept_agent::facade::sys;
use tests::{
    agent::{Agent, finish, succeed},
    daemon::{Daemon, OUTBOUND, answers, proxy, service},
    snapshot::{Snapshot, tree},
    testbed::{Pod, PodSpec},
};

/// Overwrites a pod's record.
fn damage(agent: &Agent, cookie: u64) {
    let pod = agent.store().join("pods").join(cookie.to_string());
    let entries = fs::read_dir(pod).expect("a folder").map(|entry| entry.expect("an entry").path());
    let is_record = |path: &std::path::PathBuf| path.display().to_string().contains("record-");
    let record = entries.into_iter().find(is_record).expect("a record");
    fs::remove_file(&record).expect("removed");
    let other = sys::create_blob("record", b"of another version").expect("made");
    sys::pin(other.as_fd(), &record).expect("pinned");
}

fn cookie_of(agent: &Agent, at: usize) -> u64 {
    agent.pods().expect("a status")[at].netns_cookie
}

#[test]
fn a_record_that_cannot_be_read_stops_no_command() {
    let agent = Agent::new("broken").expect("the agent");
    let (pod, other) =
        (Pod::new(PodSpec::new("broken")).expect("a pod"), Pod::new(PodSpec::new("whole")).expect("a pod"));
    let (inside, beside) = (proxy(&pod), proxy(&other));
    let clean = tree(agent.bpffs()).expect("a tree");
    let before = Snapshot::of(&other).expect("a snapshot");
    for repair in ["attach", "detach", "detach --all", "cleanup"] {
        agent.attach(&pod, &OUTBOUND).expect("attached");
        let cookie = cookie_of(&agent, 0);
        damage(&agent, cookie);
        agent.attach(&other, &OUTBOUND).expect("another pod does not mind");
        let pods = agent.pods().expect("a status");
        assert_eq!(pods.len(), 2, "{pods:#?}");
        assert_eq!((pods[0].state.as_str(), pods[1].state.as_str()), ("attached", "broken"), "{pods:#?}");
        assert_eq!(pods[1].netns_cookie, cookie);
        assert!(
            pods[1].problem.as_ref().is_some_and(|text| text.contains("attach the pod again")),
            "{pods:#?}"
        );
        let text = succeed(agent.command("status")).expect("a status");
        assert!(text.contains("broken"), "{text}");
        // The data path has not changed.
        assert_eq!(answers(&inside, service()).as_deref(), Some("proxy"), "{repair}");
        match repair {
            "attach" => {
                assert!(agent.attach(&pod, &OUTBOUND).expect("attached").starts_with("replaced"));
                assert_eq!(agent.pods().expect("a status")[1].state, "attached");
                agent.detach(&pod).expect("detached");
            }
            "detach" => _ = agent.detach(&pod).expect("detached"),
            "detach --all" => _ = agent.detach_all().expect("detached"),
            _ => {
                let mut cleanup = agent.command("cleanup");
                let folder = tempfile::tempdir().expect("a folder");
                cleanup.arg("--socket").arg(folder.path().join("none"));
                for option in ["--cni-conf-dir", "--cni-bin-dir"] {
                    cleanup.arg(option).arg(folder.path());
                }
                succeed(cleanup).expect("cleaned up");
            }
        }
        if agent.store().exists() {
            assert_eq!(answers(&beside, service()).as_deref(), Some("proxy"), "{repair}");
            agent.detach(&other).expect("detached");
        }
        assert_eq!(tree(agent.bpffs()).expect("a tree"), clean, "{repair}");
        assert_eq!(before.difference(&Snapshot::of(&other).expect("a snapshot")), [""; 0], "{repair}");
    }
}

#[test]
fn a_daemon_starts_beside_a_broken_pod() {
    let agent = Agent::new("d-broken").expect("the agent");
    let (pod, other) = (
        Pod::new(PodSpec::new("d-broken")).expect("a pod"),
        Pod::new(PodSpec::new("d-whole")).expect("a pod"),
    );
    let (inside, beside) = (proxy(&pod), proxy(&other));
    agent.attach(&pod, &OUTBOUND).expect("attached");
    damage(&agent, cookie_of(&agent, 0));
    let daemon = Daemon::start(&agent, &[]).expect("a daemon");
    daemon.put("whole", &other, &OUTBOUND).expect("put");
    daemon.wait_for("whole", intercept_agent::facade::daemon::PodState::Captured).expect("captured");
    for actor in [&inside, &beside] {
        assert_eq!(answers(actor, service()).as_deref(), Some("proxy"));
    }
    // Capturing the pod again repairs it.
    daemon.put("broken", &pod, &OUTBOUND).expect("put");
    daemon.wait_for("broken", intercept_agent::facade::daemon::PodState::Captured).expect("captured");
    let pods = agent.pods().expect("a status");
    let states: Vec<_> = pods.iter().map(|pod| pod.state.as_str()).collect();
    assert_eq!(states, ["attached"; 2], "{pods:#?}");
}

#[test]
fn a_missing_map_is_reported_and_everything_can_be_removed() {
    let agent = Agent::new("no-map").expect("the agent");
    let pod = Pod::new(PodSpec::new("no-map")).expect("a pod");
    let inside = proxy(&pod);
    let clean = tree(agent.bpffs()).expect("a tree");
    agent.attach(&pod, &OUTBOUND).expect("attached");
    fs::remove_file(agent.store().join("maps/GROUPS")).expect("removed");
    let output = finish(&mut agent.command("status")).expect("started");
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && error.contains("map GROUPS of the agent is not there"), "{error}");
    assert_eq!(answers(&inside, service()).as_deref(), Some("proxy"));
    agent.detach_all().expect("detached");
    assert_eq!(tree(agent.bpffs()).expect("a tree"), clean);

    // An attach loads what is missing, and puts its programs under the pods that are there.
    agent.attach(&pod, &OUTBOUND).expect("attached");
    fs::remove_file(agent.store().join("maps/GROUPS")).expect("removed");
    agent.attach(&pod, &OUTBOUND).expect("attached again");
    assert_eq!(answers(&inside, service()).as_deref(), Some("proxy"));
    agent.detach_all().expect("detached");
}
