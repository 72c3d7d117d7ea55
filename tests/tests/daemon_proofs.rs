//! The daemon proves its pods from time to time and audits their sockets, and a pod that is stuck delays no other.

use std::{
    fs,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use socket2::{Domain, Protocol, Socket, Type};
use tests::{
    actor::{Actor, Bind, Listen, Transport},
    agent::{Agent, succeed},
    daemon::{Daemon, free_address, get},
    testbed::{Ids, Pod, PodSpec},
};

const FLAGS: [&str; 6] = ["-u", "1337", "-i", "*", "-b", "*"];
/// Every 0.6 s.
const INTERVAL: [&str; 2] = ["--prove-interval", "0.01"];

fn proxy(pod: &Pod, ids: Ids) -> Actor {
    let proxy = Actor::start(pod).expect("an actor");
    for port in [15001, 15006] {
        for any in ["0.0.0.0", "::"] {
            let any: IpAddr = any.parse().expect("an address");
            let bind = Bind::new(ids, SocketAddr::new(any, port));
            proxy.listen(Listen { name: "proxy".into(), transport: Transport::Tcp, bind }).expect("a server");
        }
    }
    proxy
}

fn state(daemon: &Daemon<'_>, pod: &str) -> String {
    let report = daemon.report(pod).expect("reports").and_then(|report| report.proof);
    report.map_or("none".to_owned(), |proof| proof.failure.map_or(proof.state, |failure| failure.cause))
}

#[test]
fn a_proof_that_fails_is_reported_until_it_succeeds() {
    let agent = Agent::new("d-proof").expect("the agent");
    let address = free_address();
    let listen = address.to_string();
    let arguments = [&INTERVAL[..], &["--metrics-address", &listen]].concat();
    let daemon = Daemon::start(&agent, &arguments).expect("a daemon");
    let pod = Pod::new(PodSpec::new("proof")).expect("a pod");
    let own = proxy(&pod, Ids::PROXY);
    daemon.put("a", &pod, &FLAGS).expect("put");
    daemon.wait("proven", |daemon| state(daemon, "a") == "proven").expect("proven");
    let metrics = || get(address, "/metrics").1;
    assert!(metrics().contains("intercept_proofs_total{result=\"proven\"}"), "{}", metrics());
    assert!(!metrics().contains("intercept_pod_proof_failed{"), "{}", metrics());

    drop(own);
    let foreign = proxy(&pod, Ids::APP);
    daemon.wait("it fails", |daemon| state(daemon, "a") == "foreign_listener").expect("failed");
    let failed = "intercept_pod_proof_failed{pod=\"a.json\",cause=\"foreign_listener\"} 1";
    daemon
        .wait("the metric", |_| metrics().contains(failed))
        .unwrap_or_else(|e| panic!("{e}: {}", metrics()));
    let mut status = agent.command("status");
    status.arg("--socket").arg(daemon.socket());
    let text = succeed(status).expect("a status");
    assert!(text.contains("proof        failed, last proven"), "{text}");
    assert!(text.contains("is not the proxy (foreign_listener)"), "{text}");

    drop(foreign);
    let _own = proxy(&pod, Ids::PROXY);
    daemon.wait("proven again", |daemon| state(daemon, "a") == "proven").expect("proven");
    daemon.wait("no metric", |_| !metrics().contains("intercept_pod_proof_failed{")).expect("gone");
}

#[test]
fn sockets_around_the_proxy_are_counted() {
    let agent = Agent::new("d-audit").expect("the agent");
    let address = free_address();
    let listen = address.to_string();
    let arguments = [&INTERVAL[..], &["--metrics-address", &listen]].concat();
    let daemon = Daemon::start(&agent, &arguments).expect("a daemon");
    let pod = Pod::new(PodSpec::new("around")).expect("a pod");
    let _proxy = proxy(&pod, Ids::PROXY);
    daemon.put("a", &pod, &FLAGS).expect("put");
    daemon.wait("proven", |daemon| state(daemon, "a") == "proven").expect("proven");
    let raw = pod.netns.run(|| Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::ICMPV4))).expect("inside");
    let counts = |text: &str| get(address, "/metrics").1.contains(text);
    daemon.wait("counted", |_| counts("intercept_bypasses{cause=\"raw\"} 1")).expect("counted");
    let report = daemon.report("a").expect("reports").and_then(|report| report.proof).expect("probed");
    assert_eq!(report.bypasses.get("raw"), Some(&1), "{report:?}");
    drop(raw);
    daemon.wait("gone", |_| !counts("intercept_bypasses{")).expect("not counted");
}

#[test]
fn a_pod_that_is_frozen_delays_no_other() {
    let agent = Agent::new("d-ice").expect("the agent");
    let daemon = Daemon::start(&agent, &INTERVAL).expect("a daemon");
    let pods: Vec<Pod> = (0..2).map(|n| Pod::new(PodSpec::new(&format!("ice{n}"))).expect("a pod")).collect();
    let _proxies: Vec<Actor> = pods.iter().map(|pod| proxy(pod, Ids::PROXY)).collect();
    daemon.put("p0", &pods[0], &FLAGS).expect("put");
    daemon.wait("proven", |daemon| state(daemon, "p0") == "proven").expect("proven");
    let freeze = pods[0].cgroup.path().join("cgroup.freeze");
    fs::write(&freeze, "1").expect("frozen");
    // In flight now, for seconds.
    std::thread::sleep(Duration::from_secs(1));
    daemon.put("p1", &pods[1], &FLAGS).expect("put");
    daemon.wait("another is proven", |daemon| state(daemon, "p1") == "proven").expect("proven");
    daemon.wait("the frozen one is not", |daemon| state(daemon, "p0") == "unprobed").expect("seen");
    fs::write(&freeze, "0").expect("thawed");
    daemon.wait("proven again", |daemon| state(daemon, "p0") == "proven").expect("proven");
}
