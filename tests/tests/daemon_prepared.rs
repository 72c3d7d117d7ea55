//! What the daemon has ready before there is a pod: entry programs of sk_lookup, which get the netns cookie of their pod when it
//! is attached.

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
    os::fd::AsFd as _,
    path::PathBuf,
};

use aya::{maps::MapInfo, programs::loaded_programs};
use intercept_agent::facade::{daemon::Response, sys};
use intercept_common::{Family, names};
use tests::{
    actor::{Actor, Bind, Dial, DialOutcome, Listen, Transport},
    agent::Agent,
    daemon::{self, Daemon},
    testbed::{Ids, Pod, PodSpec},
};

/// As many as the daemon keeps.
const SPARES: usize = 4;

/// The ids of an agent's entry programs, attached or not.
fn entry_programs(agent: &Agent) -> BTreeSet<u32> {
    let jumps = agent.store().join("maps").join(names::JUMP_TABLE);
    let jumps = MapInfo::from_pin(jumps).expect("a map").id();
    loaded_programs()
        .flatten()
        .filter(|program| program.name_as_str() == Some(names::SK_LOOKUP))
        // The shared program does not use that map.
        .filter(|program| program.map_ids().ok().flatten().is_some_and(|ids| ids.contains(&jumps)))
        .map(|program| program.id())
        .collect()
}

/// The entry programs of the attached pods.
fn attached_programs(agent: &Agent) -> BTreeSet<u32> {
    let link = |cookie: u64| -> PathBuf {
        agent.store().join("pods").join(cookie.to_string()).join(names::SK_LOOKUP)
    };
    let pods = agent.pods().expect("status");
    pods.iter()
        .map(|pod| {
            let link = sys::open_pin(&link(pod.netns_cookie)).expect("a link");
            sys::link_info(link.as_fd()).expect("its program").program
        })
        .collect()
}

fn add(daemon: &Daemon<'_>, pod: &Pod, uid: &str) {
    let flags = ["-u", "1337", "-i", "*", "-b", "*"].map(str::to_owned);
    let request = daemon::add(pod, uid, flags.into()).expect("a request");
    assert_eq!(daemon.ask(&request).expect("an answer"), Response::Done("captured".into()));
}

/// A pod whose proxy has a name of its own, and the world around it.
fn pod(name: &str) -> (Pod, Actor, Actor) {
    let pod = Pod::new(PodSpec::new(name)).expect("a pod");
    let inside = Actor::start(&pod).expect("an actor");
    for (server, ids, port) in [(name, Ids::PROXY, 15006), ("app", Ids::APP, 8080)] {
        let bind = Bind::new(ids, SocketAddr::new(IpAddr::from([0, 0, 0, 0]), port));
        inside.listen(Listen { name: server.into(), transport: Transport::Tcp, bind }).expect("a listener");
    }
    let world = Actor::start(pod.neighbour()).expect("an actor");
    (pod, inside, world)
}

/// The server that answers a connection from outside to the application's port.
fn answers(pod: &Pod, world: &Actor) -> String {
    let app = SocketAddr::new(pod.address(Family::V4), 8080);
    match world.dial(Dial::new(Ids::ROOT, app)).expect("dialled").outcome {
        DialOutcome::Answered(answer) => answer.server,
        other => format!("{other:?}"),
    }
}

#[test]
fn pods_get_programs_that_were_loaded_before_them() {
    let agent = Agent::new("ready").expect("the agent");
    let mut daemon = Daemon::start(&agent, &[]).expect("a daemon");
    daemon.wait("programs are ready", |_| entry_programs(&agent).len() == SPARES).expect("ready");
    let ready = entry_programs(&agent);
    let (one, _one_inside, one_world) = pod("one");
    add(&daemon, &one, "one");
    let first = attached_programs(&agent);
    assert!(first.is_subset(&ready) && first.len() == 1, "{first:?} of {ready:?}");
    assert_eq!(answers(&one, &one_world), "one");
    daemon.wait("others take its place", |_| entry_programs(&agent).len() == SPARES + 1).expect("ready");

    // Each has the cookie of its own namespace, also those for which no program was ready.
    let others: Vec<_> = (0..2 * SPARES).map(|n| pod(&format!("other{n}"))).collect();
    std::thread::scope(|scope| {
        for (n, (pod, ..)) in others.iter().enumerate() {
            let daemon = &daemon;
            scope.spawn(move || add(daemon, pod, &format!("other{n}")));
        }
    });
    for (n, (pod, _, world)) in others.iter().enumerate() {
        assert_eq!(answers(pod, world), format!("other{n}"));
    }
    assert_eq!(answers(&one, &one_world), "one");
    let all = others.len() + 1;
    daemon.wait("as many are ready", |_| entry_programs(&agent).len() == SPARES + all).expect("ready");

    // Without the daemon, only those that are attached are left.
    daemon.kill().expect("killed");
    let left = || entry_programs(&agent) == attached_programs(&agent);
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(5);
    while !left() {
        assert!(std::time::Instant::now() < deadline, "{:?}", entry_programs(&agent));
        std::thread::yield_now();
    }
    assert_eq!(attached_programs(&agent).len(), all);
    assert_eq!(answers(&one, &one_world), "one");
}
