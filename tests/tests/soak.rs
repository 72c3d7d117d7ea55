//! The soak finds what it is for, and a short one finds nothing.

use std::{net::SocketAddr, process::Command};

use tests::{
    actor::Dialled,
    agent::Agent,
    soak::{
        dice::Dice,
        faults::OPTIONS,
        ledger::{Expected, Kind, Ledger, SeenProxy},
        steady::{SteadyPod, World},
    },
    testbed::sweep::leftovers,
};

/// Enough for every kind of connection to be among them.
const CONNECTIONS: usize = 60;

fn connect(pod: &SteadyPod, world: &World, ledger: &Ledger) {
    let mut dice = Dice::new(7, 0);
    for _ in 0..CONNECTIONS {
        pod.connect(world, &mut dice, ledger).expect("dialled");
    }
}

#[test]
fn a_pod_that_is_released_in_secret_is_found() {
    let agent = Agent::new("soak-bypass").expect("the agent");
    let world = World::new().expect("a world");
    let pod = SteadyPod::new("bypass", &world, None).expect("a pod");
    agent.attach(pod.pod(), &OPTIONS).expect("attached");
    let ledger = Ledger::new();
    connect(&pod, &world, &ledger);
    assert_eq!(ledger.findings(), [""; 0]);
    assert_eq!(ledger.connections(), CONNECTIONS as u64);

    agent.detach(pod.pod()).expect("detached");
    connect(&pod, &world, &ledger);
    let own = ledger.connections() - CONNECTIONS as u64;
    assert_eq!(ledger.count(Kind::Bypassed), CONNECTIONS as u64 - own, "{:?}", ledger.findings());
    assert!(own < CONNECTIONS as u64 / 2, "only the proxy's own connections are right: {own}");
}

#[test]
fn a_port_that_is_left_out_in_secret_is_found() {
    let agent = Agent::new("soak-port").expect("the agent");
    let world = World::new().expect("a world");
    let pod = SteadyPod::new("port", &world, None).expect("a pod");
    agent.attach(pod.pod(), &[&OPTIONS[..], &["-o", "443"]].concat()).expect("attached");
    let ledger = Ledger::new();
    connect(&pod, &world, &ledger);
    assert!(
        ledger.count(Kind::Bypassed) > 0
            && ledger.findings().iter().all(|text| text.contains(":443: reached world"))
    );
}

/// A refusal is right while a proxy restarts, and at no other time; a bypass never is.
#[test]
fn only_a_restart_of_the_proxy_excuses_a_refusal() {
    use tests::actor::DialOutcome::Refused;
    let to = SocketAddr::from(([10, 0, 0, 1], 80));
    let refused = Dialled { outcome: Refused, sockname: None, peername: None, peername_after: None };
    let ledger = Ledger::new();
    ledger.judge("pod", Expected::SeenProxy(to), SeenProxy::Restarted, &refused);
    assert_eq!(ledger.count(Kind::Lost), 0);
    ledger.judge("pod", Expected::SeenProxy(to), SeenProxy::Listening, &refused);
    assert_eq!(ledger.count(Kind::Lost), 1);
}

#[test]
fn a_short_soak_finds_nothing_and_leaves_nothing() {
    let mut command = Command::new(env!("CARGO_BIN_EXE_soak"));
    let child = command
        .args(["--minutes", "0.4", "--seed", "1"])
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .expect("it starts");
    let pid = child.id();
    let output = child.wait_with_output().expect("it ends");
    let [out, err] = [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned());
    // The machine may be too busy, and the build too slow, for times to tell anything.
    let findings: Vec<_> =
        err.lines().filter(|line| line.starts_with("FOUND") && !line.contains(": Slow: ")).collect();
    assert!(findings.is_empty(), "{out}\n{err}");
    assert!(out.contains("seed 1") && out.contains("0 lost, 0 bypassed, 0 misled"), "{out}\n{err}");
    assert_eq!(leftovers(pid).expect("listed"), Vec::<std::path::PathBuf>::new());
}
