//! The proxy's listening sockets: inbound connections reach an open one, whatever the number and order of opening and
//! closing.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;

use intercept_common::Family;
use socket2::{Domain, Protocol, Socket, Type};
use tests::actor::{Actor, Bind, Dial, DialOutcome, Listen, Listening, Transport};
use tests::agent::{Agent, INIT_FLAGS};
use tests::status::count_of;
use tests::steps::{self, SocketKind, Step};
use tests::testbed::{Ids, Pod, PodSpec};

struct ListenersFixture {
    inside: Actor,
    world: Actor,
    agent: Agent,
    pod: Pod,
}

impl ListenersFixture {
    fn new(label: &str) -> Self {
        let agent = Agent::new(label).expect("the agent");
        let pod = Pod::new(PodSpec::new(label)).expect("a pod");
        let inside = Actor::start(&pod).expect("an actor");
        let world = Actor::start(pod.neighbour()).expect("an actor");
        Self { inside, world, agent, pod }
    }

    fn open(&self, name: &str, count: usize) -> Vec<Listening> {
        (0..count)
            .map(|_| {
                let mut bind = Bind::new(Ids::PROXY, SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), 15006));
                bind.reuseport = true;
                let listen = Listen { name: name.into(), transport: Transport::Tcp, bind };
                self.inside.listen(listen).expect("a listener")
            })
            .collect()
    }

    fn close(&self, listening: Vec<Listening>) {
        for each in listening {
            self.inside.close(each).expect("closed");
        }
    }

    fn answer(&self, family: Family) -> String {
        let to = SocketAddr::new(self.pod.address(family), 8080);
        match self.world.dial(Dial::new(Ids::ROOT, to)).expect("dialled").outcome {
            DialOutcome::Answered(answer) => answer.server,
            other => format!("{other:?}"),
        }
    }
}

#[test]
fn listeners_may_come_and_go_in_any_number() {
    for (old, new) in [(8, 8), (16, 16), (8, 1), (1, 8), (100, 100)] {
        for attached_first in [false, true] {
            let fixture = ListenersFixture::new("replaced");
            let attach = || fixture.agent.attach(&fixture.pod, &INIT_FLAGS).expect("attached");
            if attached_first {
                attach();
            }
            let first = fixture.open("old", old);
            if !attached_first {
                attach();
            }
            assert_eq!(fixture.answer(Family::V4), "old");
            let second = fixture.open("new", new);
            fixture.close(first);
            for _ in 0..4 {
                assert_eq!(
                    fixture.answer(Family::V4),
                    "new",
                    "{old} and then {new}, attached first: {attached_first}"
                );
            }
            // The newest are closed, and older ones stay.
            let third = fixture.open("newest", old);
            fixture.close(third);
            for _ in 0..4 {
                assert_eq!(fixture.answer(Family::V4), "new", "after {old} newest");
            }
            fixture.close(second);
            assert_ne!(fixture.answer(Family::V4), "new");
            let _again = fixture.open("again", 1);
            assert_eq!(fixture.answer(Family::V4), "again");
            fixture.agent.detach(&fixture.pod).expect("detached");
        }
    }
}

/// Sockets that are opened and closed do not use up the slots.
#[test]
fn a_listener_that_is_opened_again_and_again_takes_no_more_room() {
    let fixture = ListenersFixture::new("flapping");
    fixture.agent.attach(&fixture.pod, &INIT_FLAGS).expect("attached");
    let _stays = fixture.open("stays", 1);
    for _ in 0..600 {
        fixture.close(fixture.open("flaps", 1));
    }
    assert_eq!(fixture.answer(Family::V4), "stays");
    fixture.agent.detach(&fixture.pod).expect("detached");
}

/// One pod cannot fill the map of all pods' listeners: beyond its budget a listener is counted, and the others serve.
#[test]
fn a_pod_with_too_many_listeners_is_limited_to_its_own() {
    for attached_first in [true, false] {
        let fixture = ListenersFixture::new("many");
        let attach = || fixture.agent.attach(&fixture.pod, &INIT_FLAGS).expect("attached");
        if attached_first {
            attach();
        }
        let many = fixture.open("many", 600);
        if !attached_first {
            attach();
        }
        assert_eq!(fixture.answer(Family::V4), "many");
        let pods = fixture.agent.pods().expect("a status");
        let listed = pods[0].listeners.len();
        assert_eq!(listed, 512, "attached first: {attached_first}");
        fixture.close(many);
        let _again = fixture.open("again", 1);
        assert_eq!(fixture.answer(Family::V4), "again");
        fixture.agent.detach(&fixture.pod).expect("detached");
    }
}

fn mptcp(at: SocketAddr) -> std::io::Result<OwnedFd> {
    let socket = Socket::new(Domain::for_address(at), Type::STREAM, Some(Protocol::MPTCP))?;
    socket.bind(&at.into())?;
    socket.listen(16)?;
    Ok(socket.into())
}

/// With an existing MPTCP listener, attach succeeds and prints a warning.
#[test]
fn an_mptcp_listener_does_not_keep_a_pod_from_being_attached() {
    let fixture = ListenersFixture::new("mptcp");
    let at = SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), 15006);
    let listener = fixture.pod.netns.run(|| mptcp(at)).expect("entered").expect("a listener of MPTCP");
    // A process in the pod's namespace that holds the listener.
    let mut holder = std::process::Command::new("sleep").arg("60").stdin(listener).spawn().expect("sleep");
    fixture.pod.cgroup.add(holder.id()).expect("added");
    let mut attach = fixture.agent.for_pod("attach", &fixture.pod, &INIT_FLAGS);
    let output = tests::agent::finish(&mut attach).expect("run");
    let log = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{log}");
    assert!(log.contains("MPTCP"), "{log}");
    assert_eq!(fixture.answer(Family::V4), "Refused");
    let pods = fixture.agent.pods().expect("a status");
    assert_eq!(pods[0].mptcp_listeners[0].port, 15006, "{pods:#?}");
    holder.kill().expect("killed");
    holder.wait().expect("gone");
    // The restarted proxy falls back to TCP, as runtimes do.
    let _tcp = fixture.open("again", 1);
    assert_eq!(fixture.answer(Family::V4), "again");
    fixture.agent.detach(&fixture.pod).expect("detached");
}

#[test]
fn the_proxy_is_refused_mptcp_and_nobody_else() {
    let fixture = ListenersFixture::new("refused");
    fixture.agent.attach(&fixture.pod, &INIT_FLAGS).expect("attached");
    let open = |ids| steps::run(&fixture.pod, ids, &[Step::Open(SocketKind::Mptcp4)]).expect("run");
    assert_eq!(open(Ids::PROXY), ["EPROTONOSUPPORT"]);
    assert_eq!(open(Ids { uid: 1000, gid: 1337 }), ["EPROTONOSUPPORT"]);
    assert_eq!(open(Ids::APP), ["ok"]);
    assert_eq!(open(Ids::ROOT), ["ok"]);
    let pods = fixture.agent.pods().expect("a status");
    assert_eq!(count_of(&pods[0].failures, "mptcp_refused"), 2, "{pods:#?}");
    fixture.agent.detach(&fixture.pod).expect("detached");
    assert_eq!(open(Ids::PROXY), ["ok"]);
}

/// A proxy on 127.0.0.1 and ::1 accepts redirected connections, but none from outside.
#[test]
fn a_proxy_on_localhost_gets_nothing_from_outside() {
    let fixture = ListenersFixture::new("localhost");
    fixture.agent.attach(&fixture.pod, &INIT_FLAGS).expect("attached");
    for at in [IpAddr::from(Ipv4Addr::LOCALHOST), Ipv6Addr::LOCALHOST.into()] {
        for port in [15001, 15006] {
            let bind = Bind::new(Ids::PROXY, SocketAddr::new(at, port));
            let listen = Listen { name: port.to_string(), transport: Transport::Tcp, bind };
            fixture.inside.listen(listen).expect("a listener");
        }
    }
    for family in Family::ALL {
        assert_ne!(fixture.answer(family), "15006");
        let service = if family == Family::V6 { "[fd96::10]:80" } else { "10.96.0.10:80" };
        let dial = Dial::new(Ids::APP, service.parse().expect("an address"));
        let DialOutcome::Answered(answer) = fixture.inside.dial(dial).expect("dialled").outcome else {
            panic!("{service}")
        };
        assert_eq!(answer.server, "15001");
        assert_eq!(answer.peer.ip(), fixture.pod.address(family));
        assert!(answer.local.ip().is_loopback(), "{answer:?}");
    }
    // The stand-in addresses are not reachable from outside.
    for to in ["[fd69:6e74::1]:15001", "[fd69:6e74::8000:0:0:1]:15001", "[fd69:6e74::1]:8080"] {
        let mut dial = Dial::new(Ids::ROOT, to.parse().expect("an address"));
        dial.timeout = std::time::Duration::from_millis(300);
        let outcome = fixture.world.dial(dial).expect("dialled").outcome;
        assert!(!matches!(outcome, DialOutcome::Answered(_)), "{to}: {outcome:?}");
    }
    fixture.agent.detach(&fixture.pod).expect("detached");
}
