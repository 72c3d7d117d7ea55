//! Processes that appear in a user namespace which does not own the pod's network namespace.

use std::{fs, path::PathBuf};

use intercept_agent::facade::{daemon::PodState, maps::Maps};
use tests::{
    agent::Agent,
    daemon::{Daemon, OUTBOUND},
    testbed::Sandbox,
};

/// Whether the policy of the only pod is for this user.
fn is_for(agent: &Agent, user: u32) -> bool {
    let policies = Maps::open(&agent.store().join("maps")).and_then(|maps| maps.policies());
    policies.is_ok_and(|policies| policies.iter().any(|(_, policy)| policy.uids[0] == user))
}

#[test]
fn ids_follow_the_first_processes_of_a_pod_that_was_attached_empty() {
    let agent = Agent::new("d-userns").expect("the agent");
    let daemon = Daemon::start(&agent, &[]).expect("a daemon");
    let pod = Sandbox::new("userns").expect("a sandbox");
    daemon.put("a", &pod, &OUTBOUND).expect("put");
    daemon.wait_for("a", PodState::Captured).expect("captured");
    assert!(is_for(&agent, 1337), "nothing runs yet");

    // As a runtime does it: the process is in the cgroup before it is in its user namespace.
    let mut unshare = pod.command("unshare").expect("a command");
    let mut process = unshare.args(["--user", "sleep", "600"]).spawn().expect("started");
    let file = |name: &str| PathBuf::from(format!("/proc/{}/{name}", process.id()));
    let own = fs::read_link("/proc/self/ns/user").expect("readable");
    daemon
        .wait("its namespace", |_| fs::read_link(file("ns/user")).is_ok_and(|link| link != own))
        .expect("made");
    fs::write(file("uid_map"), "0 100000 65536").expect("written");
    fs::write(file("gid_map"), "0 100000 65536").expect("written");
    daemon.wait("the ids are translated", |_| is_for(&agent, 101_337)).expect("translated");
    process.kill().and_then(|()| process.wait()).expect("killed");
}
