//! The number of concurrent connections of one pod.

use std::time::{Duration, Instant};

use tests::agent::{Agent, INIT_FLAGS};
use tests::load::{self, Accept, LoadDial, LoadMethod, LoadProcess, LoadRole, LoadTally};
use tests::testbed::{Ids, Pod, PodSpec};

use crate::fixture::{addr, eventually};

/// Each end needs a descriptor, and a process may have 20,000 here.
const PROCESSES: u32 = 4;
const EACH: u32 = 15_000;

/// With a single address of the proxy the limit would be 28,232 local ports.
#[test]
fn sixty_thousand_connections_to_three_destinations() {
    hold("0.0.0.0:15001", ["10.96.0.1:80", "10.96.0.2:80", "198.51.100.3:443"]);
}

#[test]
fn sixty_thousand_ipv6_connections_to_three_destinations() {
    hold("[::]:15001", ["[fd96::1]:80", "[fd96::2]:80", "[2001:db8::3]:443"]);
}

/// A range of ten ports for twenty destinations, to a proxy that is bound to localhost.
#[test]
fn every_destination_has_the_whole_range_of_ports() {
    for (proxy, to) in [
        ("127.0.0.1:15001", "10.96.0.{}:80"),
        ("[::1]:15001", "[fd96::{}]:80"),
        ("0.0.0.0:15001", "10.96.0.{}:80"),
        ("[::]:15001", "[fd96::{}]:80"),
    ] {
        let agent = Agent::new("range").expect("the agent");
        let pod = Pod::new(PodSpec::new("range")).expect("a pod");
        pod.netns.sysctl("net/ipv4/ip_local_port_range", "40000 40009").expect("set");
        let program = load::program().expect("the swarm");
        agent.attach(&pod, &INIT_FLAGS).expect("attached");
        let accept = Accept { addr: addr(proxy), backlog: 512, keep: true, paused: false };
        let mut running =
            LoadProcess::start(&program, &pod, Ids::PROXY, &LoadRole::Accept(accept)).expect("a proxy");
        let to = (1..=20).map(|n| addr(&to.replace("{}", &n.to_string()))).collect();
        // Ten for each of twenty, less the ports that the kernel only assigns in pairs.
        let dial = LoadDial { to, from: None, count: 100, threads: 1, method: LoadMethod::Held };
        let mut clients =
            LoadProcess::start(&program, &pod, Ids::APP, &LoadRole::Dial(dial)).expect("clients");
        let right = LoadTally { right: 100, ..LoadTally::default() };
        assert_eq!(clients.tally().expect("a tally"), right, "{proxy}");
        assert_eq!(running.seen().expect("a tally"), right, "{proxy}");
        agent.detach(&pod).expect("detached");
    }
}

fn hold(proxy: &str, to: [&str; 3]) {
    let agent = Agent::new("crowd").expect("the agent");
    let pod = Pod::new(PodSpec::new("crowd")).expect("a pod");
    let program = load::program().expect("the swarm");
    agent.attach(&pod, &INIT_FLAGS).expect("attached");
    let accept = Accept { addr: addr(proxy), backlog: 4096, keep: true, paused: false };
    let start = |ids, role: &LoadRole| LoadProcess::start(&program, &pod, ids, role).expect("a load process");
    let mut proxies: Vec<LoadProcess> =
        (0..PROCESSES).map(|_| start(Ids::PROXY, &LoadRole::Accept(accept.clone()))).collect();
    let to = to.map(addr).to_vec();
    let dial = LoadRole::Dial(LoadDial { to, from: None, count: EACH, threads: 2, method: LoadMethod::Held });
    let begun = Instant::now();
    let mut clients: Vec<LoadProcess> = (0..PROCESSES).map(|_| start(Ids::APP, &dial)).collect();
    let all = |swarms: &mut Vec<LoadProcess>, ask: fn(&mut LoadProcess) -> LoadTally| {
        swarms.iter_mut().map(ask).fold(LoadTally::default(), LoadTally::and)
    };
    let right = LoadTally { right: PROCESSES * EACH, ..LoadTally::default() };
    assert_eq!(all(&mut clients, |swarm| swarm.tally().expect("a tally")), right);
    eprintln!("{} connections in {:?}", right.right, begun.elapsed());
    assert_eq!(all(&mut proxies, |swarm| swarm.seen().expect("a tally")), right);
    assert_eq!(agent.remembered().expect("the map"), (PROCESSES * EACH) as usize);

    // Each original destination is still right with all connections open.
    all(&mut proxies, |swarm| swarm.again().map(|()| LoadTally::default()).expect("asked"));
    assert_eq!(all(&mut proxies, |swarm| swarm.seen().expect("a tally")), right);
    drop((clients, proxies));
    let limit = Duration::from_secs(30);
    eventually("original destinations", limit, &0, || agent.remembered().expect("the map"));
    agent.detach(&pod).expect("detached");
}
