//! `prove` shows by real sockets that a pod's connections reach its proxy, and says why they do not.

use std::{
    fs,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    time::{Duration, Instant},
};

use aya::maps::{Map, MapData, ProgramArray};
use intercept_common::names;
use serde_json::Value;
use tests::{
    actor::{Actor, Bind, Listen, Listening, Transport, binary::ReadableCopy},
    agent::{Agent, finish},
    envoy::{self, Sidecar, Speaks},
    snapshot::Snapshot,
    testbed::{Ids, Pod, PodSpec},
};

const ALL: [&str; 6] = ["-u", "1337", "-i", "*", "-b", "*"];
const LEGS: [(&str, u64); 4] = [("outbound", 4), ("outbound", 6), ("inbound", 4), ("inbound", 6)];

struct ProveFixture {
    agent: Agent,
    pod: Pod,
    /// Answers at every address outside, so that a connection that is not redirected is made.
    _world: Actor,
}

impl ProveFixture {
    fn new(label: &str) -> Self {
        let agent = Agent::new(label).expect("the agent");
        let pod = Pod::new(PodSpec::new(label)).expect("a pod");
        let world = Actor::start(pod.neighbour()).expect("an actor");
        for port in [80, 15001, 15002] {
            listen(&world, "world", Ids::ROOT, port);
        }
        Self { agent, pod, _world: world }
    }

    /// Exit code and answer of `prove`.
    fn prove(&self) -> (i32, Value) {
        let mut prove = self.agent.command("prove");
        let output =
            finish(prove.arg("--json").arg("--cgroup-path").arg(self.pod.cgroup.path())).expect("run");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        let proof = serde_json::from_str(&text).unwrap_or_else(|_| Value::String(errors));
        (output.status.code().expect("exited"), proof)
    }

    /// State and cause of each leg.
    fn legs(&self) -> [String; 4] {
        let (code, proof) = self.prove();
        let legs = words(&proof);
        let failed = legs.iter().any(|leg| !["proven", "nothing_to_prove"].contains(&leg.as_str()));
        assert_eq!(code, if failed { 126 } else { 0 }, "{proof:#}");
        legs
    }

    /// The folder of the pod's pins.
    fn pins(&self) -> PathBuf {
        let cookie = self.agent.pods().expect("a status")[0].netns_cookie;
        self.agent.store().join("pods").join(cookie.to_string())
    }

    /// Takes a link away, which the kernel then detaches.
    fn detach(&self, program: &str) {
        let found = fs::read_dir(self.pins()).expect("pins").flatten().map(|entry| entry.path());
        let mut removed = 0;
        for pin in
            found.filter(|pin| pin.file_name().is_some_and(|name| name.to_string_lossy().contains(program)))
        {
            fs::remove_file(&pin).expect("removed");
            removed += 1;
        }
        assert!(removed > 0, "no pin of {program} in {}", self.pins().display());
    }
}

impl ProveFixture {
    /// Takes the program away that decides on inbound connections.
    fn unsteer(&self) {
        let path = self.agent.store().join("maps").join(names::JUMP_TABLE);
        let data = MapData::from_pin(&path).expect("the map");
        let mut table: ProgramArray<_> = Map::ProgramArray(data).try_into().expect("of programs");
        table.clear_index(&0).expect("cleared");
    }
}

/// `proven`, `nothing_to_prove`, or the cause, by direction and family.
fn words(proof: &Value) -> [String; 4] {
    LEGS.map(|(direction, family)| {
        let legs = proof["legs"].as_array().unwrap_or_else(|| panic!("no legs: {proof:#}"));
        let leg = legs.iter().find(|leg| leg["direction"] == direction && leg["family"] == family);
        let leg = leg.unwrap_or_else(|| panic!("no {direction} IPv{family}: {proof:#}"));
        leg["cause"].as_str().or(leg["state"].as_str()).expect("a word").to_owned()
    })
}

fn listen(actor: &Actor, name: &str, ids: Ids, port: u16) -> Vec<Listening> {
    ["0.0.0.0", "::"]
        .map(|any| {
            let any: IpAddr = any.parse().expect("an address");
            let bind = Bind::new(ids, SocketAddr::new(any, port));
            actor.listen(Listen { name: name.into(), transport: Transport::Tcp, bind }).expect("a server")
        })
        .into_iter()
        .collect()
}

fn proxy(pod: &Pod, ids: Ids) -> Actor {
    let proxy = Actor::start(pod).expect("an actor");
    listen(&proxy, "proxy", ids, 15001);
    listen(&proxy, "proxy", ids, 15006);
    proxy
}

#[test]
fn both_directions_and_families_are_proven_and_nothing_stays() {
    let fixture = ProveFixture::new("prove");
    let pod = &fixture.pod;
    let (code, error) = fixture.prove();
    assert!(code == 1 && error.as_str().is_some_and(|text| text.contains("is not attached")), "{error}");

    let _proxy = proxy(pod, Ids::PROXY);
    fixture.agent.attach(pod, &ALL).expect("attached");
    let before = Snapshot::of(pod).expect("a snapshot");
    let started = Instant::now();
    assert_eq!(fixture.legs(), ["proven"; 4]);
    let took = started.elapsed();
    assert!(took < Duration::from_secs(2), "{took:?}");
    assert_eq!(before.difference(&Snapshot::of(pod).expect("a snapshot")), [""; 0]);
    let left = fs::read_dir(pod.cgroup.path()).expect("a cgroup").flatten();
    assert_eq!(left.filter(|entry| entry.path().is_dir()).count(), 0, "the child's cgroup is gone");
    // The proxy closes the connections; then no record of them is left.
    let deadline = Instant::now() + Duration::from_secs(5);
    while fixture.agent.remembered().expect("the map") > 0 {
        assert!(
            Instant::now() < deadline,
            "{} connections are recorded",
            fixture.agent.remembered().unwrap()
        );
        std::thread::sleep(Duration::from_millis(20));
    }
    let (_, proof) = fixture.prove();
    assert_eq!(proof["state"], "proven");
    assert_eq!(proof["legs"][0]["destination"], "192.0.2.1:15001", "{proof:#}");
    assert_eq!(proof["legs"][2]["destination"], "10.66.0.2:15002", "{proof:#}");
}

#[test]
fn options_decide_what_there_is_to_prove() {
    let fixture = ProveFixture::new("prove-opt");
    let _proxy = proxy(&fixture.pod, Ids::PROXY);
    let nothing = "nothing_to_prove";
    let both = |out: &str, inbound: &str| [out, out, inbound, inbound].map(str::to_owned);
    for (flags, environment, expected) in [
        (vec!["-u", "1337", "-i", "", "-b", ""], None, both(nothing, nothing)),
        (vec!["-u", "1337", "-i", "*", "-b", ""], None, both("proven", nothing)),
        (vec!["-u", "1337", "-i", "", "-b", "8080,9000:9100"], None, both(nothing, "proven")),
        (
            vec!["-u", "1337", "-i", "10.96.0.0/12,fd96::/64", "-b", "*", "-d", "15002"],
            None,
            both("proven", "proven"),
        ),
        (
            vec!["-u", "1337", "-i", "10.96.0.0/12", "-b", "*"],
            None,
            ["proven", nothing, "proven", "proven"].map(str::to_owned),
        ),
        (vec!["-u", "1337", "-i", "", "-q", "443", "-b", "*"], None, both("proven", "proven")),
        (vec!["-u", "1337", "-i", "*", "-o", "15001,15002", "-b", "*"], None, both(nothing, "proven")),
        (
            vec!["-u", "65534,65533", "-g", "65534", "-i", "*", "-b", "*"],
            None,
            both("foreign_listener", "foreign_listener"),
        ),
        (vec!["-u", "1337", "-i", "*", "-b", "*", "-m", "TPROXY"], None, both("proven", "proven")),
        (
            vec!["-u", "1337", "-i", "*", "-b", "*", "--redirect-dns", "--capture-all-dns"],
            None,
            both("proven", "proven"),
        ),
        (vec!["-u", "1337", "-i", "*", "-b", "*", "-c", "eth0"], None, both(nothing, nothing)),
        (
            vec!["-u", "1337", "-i", "*", "-b", "*", "--without-ipv6"],
            None,
            ["proven", nothing, "proven", nothing].map(str::to_owned),
        ),
        (ALL.to_vec(), Some(("ISTIO_OUTBOUND_OWNER_GROUPS", "4000,4001")), both("proven", "proven")),
        (
            ALL.to_vec(),
            Some(("ISTIO_OUTBOUND_OWNER_GROUPS_EXCLUDE", "65534,65533")),
            both("proven", "proven"),
        ),
    ] {
        let mut attach = fixture.agent.for_pod("attach", &fixture.pod, &flags);
        attach.envs(environment);
        let output = finish(&mut attach).expect("run");
        assert!(output.status.success(), "{flags:?}: {}", String::from_utf8_lossy(&output.stderr));
        assert_eq!(fixture.legs(), expected, "{flags:?} {environment:?}");
    }
}

#[test]
fn without_the_proxy_the_proof_fails_and_with_another_too() {
    let fixture = ProveFixture::new("prove-who");
    fixture.agent.attach(&fixture.pod, &ALL).expect("attached");
    assert_eq!(fixture.legs(), ["no_listener"; 4]);
    fixture.agent.attach(&fixture.pod, &[&ALL[..], &["--open-without-proxy"]].concat()).expect("attached");
    assert_eq!(fixture.legs(), ["nothing_to_prove"; 4], "such connections pass");

    fixture.agent.attach(&fixture.pod, &ALL).expect("attached");
    let other = proxy(&fixture.pod, Ids::APP);
    assert_eq!(fixture.legs(), ["foreign_listener"; 4]);
    drop(other);
    let own = Actor::start(&fixture.pod).expect("an actor");
    let v4 = |port| {
        let bind = Bind::new(Ids::PROXY, SocketAddr::new("0.0.0.0".parse().expect("an address"), port));
        own.listen(Listen { name: "proxy".into(), transport: Transport::Tcp, bind }).expect("a server")
    };
    let _listening = [v4(15001), v4(15006)];
    assert_eq!(fixture.legs(), ["proven", "no_listener", "proven", "no_listener"]);
}

#[test]
fn programs_that_are_detached_are_found() {
    let fixture = ProveFixture::new("prove-gone");
    let _proxy = proxy(&fixture.pod, Ids::PROXY);
    fixture.agent.attach(&fixture.pod, &ALL).expect("attached");
    assert_eq!(fixture.legs(), ["proven"; 4]);
    fixture.detach("connect6");
    assert_eq!(fixture.legs(), ["proven", "not_redirected", "proven", "proven"]);
    fixture.unsteer();
    assert_eq!(fixture.legs(), ["proven", "not_redirected", "not_steered", "not_steered"]);
}

#[test]
fn a_frozen_pod_holds_nobody_and_leaves_nothing() {
    let fixture = ProveFixture::new("prove-ice");
    let _proxy = proxy(&fixture.pod, Ids::PROXY);
    fixture.agent.attach(&fixture.pod, &ALL).expect("attached");
    let freeze = fixture.pod.cgroup.path().join("cgroup.freeze");
    fs::write(&freeze, "1").expect("frozen");
    let started = Instant::now();
    let (code, error) = fixture.prove();
    let took = started.elapsed();
    fs::write(&freeze, "0").expect("thawed");
    assert!(code == 1 && error.as_str().is_some_and(|text| text.contains("frozen")), "{code} {error}");
    assert!(took < Duration::from_secs(15), "{took:?}");
    assert_eq!(fixture.legs(), ["proven"; 4], "and the next one is not disturbed");
}

#[test]
fn envoy_is_proven_and_logs_one_connection_of_each_family() {
    let fixture = ProveFixture::new("prove-envoy");
    let program = ReadableCopy::of(&envoy::program().expect("Envoy")).expect("copied");
    let sidecar = Sidecar::start(&program, &fixture.pod, Speaks::Tcp).expect("Envoy");
    fixture.agent.attach(&fixture.pod, &ALL).expect("attached");
    for _ in 0..3 {
        assert_eq!(fixture.legs(), ["proven"; 4]);
    }
    let logged = sidecar.logged(6, Duration::from_secs(10)).expect("a log");
    let original: Vec<&str> = logged.iter().map(|line| line.original.as_str()).collect();
    assert!(logged.iter().all(|line| line.listener == "outbound"), "nothing inbound: {logged:?}");
    for to in ["192.0.2.1:15001", "[2001:db8::1]:15001"] {
        assert_eq!(original.iter().filter(|original| **original == to).count(), 3, "{logged:?}");
    }
    drop(sidecar);

    // As Istio runs it under TPROXY: as root, with the proxy's group.
    let flags = ["-u", "1337", "-i", "", "-b", "*", "-m", "TPROXY"];
    fixture.agent.attach(&fixture.pod, &flags).expect("attached");
    let _envoy = envoy::transparent(program.path(), &fixture.pod, 1337).expect("Envoy");
    assert_eq!(fixture.legs(), ["nothing_to_prove", "nothing_to_prove", "proven", "proven"]);
}
