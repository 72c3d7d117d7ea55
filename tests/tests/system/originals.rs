//! Original destinations: right for every reader, and removed with their connection.

use std::net::SocketAddr;
use std::time::Duration;

use intercept_common::Family;

use tests::actor::binary::ReadableCopy;
use tests::agent::{Agent, INIT_FLAGS};
use tests::load::{self, Accept, LoadDial, LoadMethod, LoadProcess, LoadRole, LoadTally};
use tests::testbed::{Ids, Pod, PodSpec, Sandbox};

use crate::fixture::{addr, eventually};

const LIMIT: Duration = Duration::from_secs(20);

fn proxy(program: &ReadableCopy, sandbox: &Sandbox, accept: Accept) -> LoadProcess {
    LoadProcess::start(program, sandbox, Ids::PROXY, &LoadRole::Accept(accept)).expect("a proxy")
}

fn accept(at: &str) -> Accept {
    Accept { addr: addr(at), backlog: 4096, keep: false, paused: false }
}

/// Services without listeners, so that only the proxy can answer.
fn services(family: Family) -> Vec<SocketAddr> {
    let service =
        |n| if family == Family::V6 { format!("[fd96::{n}]:80") } else { format!("10.96.0.{n}:80") };
    (1..=10).map(|n| addr(&service(n))).collect()
}

/// The result of a proxy after this number of connections.
fn seen(proxy: &mut LoadProcess, count: u32) -> LoadTally {
    let mut sum = LoadTally::default();
    eventually("connections that the proxy has seen", LIMIT, &true, || {
        sum = std::mem::take(&mut sum).and(proxy.seen().expect("a tally"));
        sum.right + sum.silent + sum.wrong.values().sum::<u32>() >= count
    });
    sum
}

fn all_right(count: u32) -> LoadTally {
    LoadTally { right: count, ..LoadTally::default() }
}

fn fast_opens(pod: &Pod) -> u64 {
    // Two lines for each group: the names and the values.
    let read = || std::fs::read_to_string("/proc/thread-self/net/netstat");
    let text = pod.netns.run(read).expect("entered").expect("netstat");
    let mut lines = text.lines().filter(|line| line.starts_with("TcpExt:"));
    let (names, values) = (lines.next().expect("names"), lines.next().expect("values"));
    let mut pairs = names.split_whitespace().zip(values.split_whitespace());
    let (_, value) = pairs.find(|(name, _)| *name == "TCPFastOpenActive").expect("the counter");
    value.parse().expect("a number")
}

/// After a hundred thousand connections of every kind, no entry is left.
#[test]
fn they_are_forgotten_with_their_connections() {
    let agent = Agent::new("originals").expect("the agent");
    let pod = Pod::new(PodSpec::new("originals")).expect("a pod");
    // Clients and servers of Fast Open, without cookies.
    pod.netns.sysctl("net/ipv4/tcp_fastopen", "1543").expect("Fast Open");
    let program = load::program().expect("the swarm");
    assert!(agent.attach(&pod, &INIT_FLAGS).expect("attached").starts_with("attached"));
    let dial = |to: &[SocketAddr], count: u32, method: LoadMethod| {
        let dial = LoadDial { to: to.to_vec(), from: None, count, threads: 4, method };
        let tally = LoadProcess::dial(&program, &pod, Ids::APP, dial).expect("dialled");
        assert_eq!(tally, all_right(count), "{method:?}");
    };
    // By phase, so that a leak can be attributed.
    let forgotten = |what: &str| {
        eventually(what, LIMIT, &0, || agent.remembered().expect("the map"));
    };
    let mut total = 0;
    for (family, at, share) in [(Family::V4, "0.0.0.0:15001", 4), (Family::V6, "[::]:15001", 1)] {
        let to = services(family);
        // Without a listener.
        dial(&to, 2_000 * share, LoadMethod::Refused);
        forgotten("refused");

        let mut running = proxy(&program, &pod, accept(at));
        dial(&to, 11_000 * share, LoadMethod::Answered);
        assert_eq!(seen(&mut running, 11_000 * share), all_right(11_000 * share));
        forgotten("answered");
        let before = fast_opens(&pod);
        dial(&to, 1_000 * share, LoadMethod::FastOpenSend);
        dial(&to, 500 * share, LoadMethod::FastOpenConnect);
        assert_eq!(seen(&mut running, 1_500 * share), all_right(1_500 * share));
        assert!(fast_opens(&pod) - before >= u64::from(1_500 * share), "no data went with the SYN");
        forgotten("opened fast");

        // The client closes before the proxy accepts, and the proxy still gets the destination.
        for method in [LoadMethod::Early, LoadMethod::EarlyFastOpen] {
            for _ in 0..share {
                running.pause().expect("paused");
                dial(&to, 1_500, method);
                running.go().expect("going");
                assert_eq!(seen(&mut running, 1_500), all_right(1_500), "{method:?}");
                forgotten(&format!("{method:?}"));
            }
        }

        // More than the backlog: some connections are reset, and some are not even established.
        running.pause().expect("paused");
        dial(&to, 2_500 * share, LoadMethod::Abandoned);
        running.go().expect("going");
        forgotten("abandoned");
        drop(running);
        total += (2_000 + 11_000 + 1_500 + 3_000 + 2_500) * share;
    }
    assert_eq!(total, 100_000);
    agent.detach(&pod).expect("detached");
}

/// The same addresses and ports at both ends, at the same time.
#[test]
fn pods_of_equal_addresses_are_kept_apart() {
    const COUNT: u32 = 500;
    let agent = Agent::new("equals").expect("the agent");
    let program = load::program().expect("the swarm");
    let pods: Vec<Pod> =
        (0..2).map(|n| Pod::new(PodSpec::new(&format!("equals{n}"))).expect("a pod")).collect();
    let mut running = Vec::new();
    for (pod, service) in pods.iter().zip(["192.0.2.1:80", "192.0.2.2:443"]) {
        agent.attach(pod, &INIT_FLAGS).expect("attached");
        // One address, so that the proxy's end is the same for all destinations.
        let mut proxy = proxy(&program, pod, Accept { keep: true, ..accept("127.0.0.1:15001") });
        let from = Some(SocketAddr::new(pod.address(Family::V4), 20_000));
        let dial =
            LoadDial { to: vec![addr(service)], from, count: COUNT, threads: 1, method: LoadMethod::Held };
        let mut clients =
            LoadProcess::start(&program, pod, Ids::APP, &LoadRole::Dial(dial)).expect("clients");
        assert_eq!(clients.tally().expect("a tally"), all_right(COUNT));
        assert_eq!(proxy.seen().expect("a tally"), all_right(COUNT));
        running.push((proxy, clients));
    }
    assert_eq!(agent.remembered().expect("the map"), 2 * COUNT as usize);
    for (proxy, _) in &mut running {
        proxy.again().expect("asked");
        assert_eq!(proxy.seen().expect("a tally"), all_right(COUNT));
    }
    // Connections of one pod end, and those of the other stay.
    drop(running.remove(0));
    eventually("original destinations", LIMIT, &(COUNT as usize), || agent.remembered().expect("the map"));
    let (proxy, _clients) = &mut running[0];
    proxy.again().expect("asked");
    assert_eq!(proxy.seen().expect("a tally"), all_right(COUNT));
    drop(running);
    eventually("original destinations", LIMIT, &0, || agent.remembered().expect("the map"));
    agent.detach_all().expect("detached");
}
