//! The actor reports what happened.

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use tests::actor::{
    Actor, Answer, Bind, Dial, DialOutcome, FlowStage, Listen, OriginalDst, Query, QueryReply, Relay,
    RelayDirection, Sending, Transport,
};
use tests::testbed::{Ids, Pod, PodSpec};

fn addr(text: &str) -> SocketAddr {
    text.parse().unwrap_or_else(|_| panic!("{text} is not an address"))
}

fn serve(actor: &Actor, name: &str, transport: Transport, at: &str) {
    let bind = Bind::new(Ids::APP, addr(at));
    actor.listen(Listen { name: name.into(), transport, bind }).expect("a server");
}

fn answer(outcome: DialOutcome) -> Answer {
    match outcome {
        DialOutcome::Answered(answer) => answer,
        other => panic!("not answered: {other:?}"),
    }
}

struct ActorFixture {
    app: Actor,
    world: Actor,
    pod: Pod,
}

fn fixture(label: &str) -> ActorFixture {
    let pod = Pod::new(PodSpec::new(label)).expect("a pod");
    let world = Actor::start(pod.neighbour()).expect("an actor");
    let app = Actor::start(&pod).expect("an actor");
    ActorFixture { app, world, pod }
}

#[test]
fn connections_are_reported_from_both_ends() {
    let ActorFixture { app, world, pod } = fixture("both-ends");
    serve(&world, "world4", Transport::Tcp, "0.0.0.0:80");
    serve(&world, "world6", Transport::Tcp, "[::]:80");
    for (to, from, mapped, server) in [
        ("198.51.100.7:80", None, false, "world4"),
        ("198.51.100.7:80", Some("10.66.0.2"), true, "world4"),
        ("[2001:db8::7]:80", Some("fd66::2"), false, "world6"),
        ("[2001:db8::7]:80", None, false, "world6"),
    ] {
        let from: Option<IpAddr> = from.map(|text| text.parse().expect("an address"));
        let dial = Dial { from, mapped, ..Dial::new(Ids::PROXY, addr(to)) };
        let seen = app.dial(dial).expect("dialled");
        let answer = answer(seen.outcome);
        assert_eq!(answer.server, server);
        assert_eq!(answer.local, addr(to));
        assert_eq!(answer.peer.ip(), pod.address(intercept_common::Family::of(&answer.peer.ip())));
        assert_eq!(answer.peername, Some(answer.peer));
        // No connection tracking in the neighbour: no original destination.
        assert!(matches!(answer.original_dst, Some(OriginalDst::Errno(_))), "{answer:?}");
        let sockname = seen.sockname.expect("a name");
        assert_eq!((sockname.ip().to_canonical(), sockname.port()), (answer.peer.ip(), answer.peer.port()));
        assert_eq!(sockname.is_ipv6(), mapped || addr(to).is_ipv6());
        assert_eq!(seen.peername, seen.peername_after);
        assert_eq!(seen.peername.map(|name| name.ip().to_canonical()), Some(addr(to).ip()));
    }
    let refused = app.dial(Dial::new(Ids::APP, addr("198.51.100.7:81"))).expect("dialled");
    assert_eq!(refused.outcome, DialOutcome::Refused);
}

#[test]
fn a_closed_server_refuses() {
    let ActorFixture { app, world: _world, pod: _pod } = fixture("closed");
    let bind = Bind::new(Ids::APP, addr("127.0.0.1:8080"));
    let listen = Listen { name: "app".into(), transport: Transport::Tcp, bind };
    let listening = app.listen(listen.clone()).expect("a server");
    let dial = || app.dial(Dial::new(Ids::APP, addr("127.0.0.1:8080"))).expect("dialled").outcome;
    assert_eq!(answer(dial()).server, "app");
    app.close(listening).expect("closed");
    assert_eq!(dial(), DialOutcome::Refused);
    app.listen(listen.clone()).expect("the port is free again");
    assert!(app.listen(listen).is_err(), "two servers on one port");
}

/// Sockets belong to the requested user and group, as the kernel shows by their owner and by the right to bind.
#[test]
fn flows_have_the_requested_user_and_group() {
    let ActorFixture { app, world: _world, pod } = fixture("owners");
    let ids = Ids { uid: 4321, gid: 1234 };
    let bind = Bind::new(ids, addr("0.0.0.0:8080"));
    app.listen(Listen { name: "owned".into(), transport: Transport::Tcp, bind }).expect("a server");
    let table = pod.netns.run(|| std::fs::read_to_string("/proc/thread-self/net/tcp")).expect("entered");
    let table = table.expect("read");
    let line = table.lines().find(|line| line.contains(":1F90 ")).expect("the listener");
    assert_eq!(line.split_whitespace().nth(7), Some("4321"), "{table}");
    // The group of the thread is in its status file.
    let threads = std::fs::read_dir(format!("/proc/{}/task", app.pid())).expect("threads");
    let groups: Vec<String> = threads
        .filter_map(|thread| std::fs::read_to_string(thread.ok()?.path().join("status")).ok())
        .filter(|status| status.contains("Uid:\t4321\t4321\t4321"))
        .collect();
    assert_eq!(groups.len(), 1);
    assert!(groups[0].contains("Gid:\t1234\t1234\t1234\t1234"), "{}", groups[0]);
    assert!(groups[0].contains("Groups:\t \n"), "{}", groups[0]);
}

#[test]
fn datagrams_are_answered_from_where_they_were_sent() {
    let ActorFixture { app, world, pod } = fixture("datagrams");
    serve(&world, "world4", Transport::Udp, "0.0.0.0:53");
    serve(&world, "world6", Transport::Udp, "[::]:53");
    for (to, mapped) in [("198.51.100.7:53", false), ("198.51.100.8:53", true), ("[2001:db8::7]:53", false)] {
        for sending in [Sending::To, Sending::Connected, Sending::Many] {
            let mut all = vec![addr(to)];
            if sending != Sending::Connected {
                all.extend((10..15).map(|n| match addr(to).ip() {
                    IpAddr::V4(_) => addr(&format!("203.0.113.{n}:53")),
                    IpAddr::V6(_) => addr(&format!("[2001:db8::{n}]:53")),
                }));
            }
            let query = Query { to: all.clone(), mapped, sending, ..Query::new(Ids::APP, addr(to)) };
            let seen = app.query(query).expect("queried");
            for (to, reply) in all.iter().zip(seen.replies) {
                let QueryReply::Answered { from, answer } = reply else { panic!("{to}: {reply:?}") };
                assert_eq!(SocketAddr::new(from.ip().to_canonical(), from.port()), *to);
                assert_eq!(answer.local, *to);
                assert_eq!(answer.peer.ip(), pod.address(intercept_common::Family::of(&to.ip())));
            }
            assert_eq!(seen.peername.is_some(), sending == Sending::Connected);
        }
    }
    let refused =
        app.query(Query { sending: Sending::Connected, ..Query::new(Ids::APP, addr("127.0.0.1:9")) });
    let refused = &refused.expect("queried").replies[0];
    assert!(matches!(refused, QueryReply::Failed { errno: libc::ECONNREFUSED, .. }), "{refused:?}");
}

/// Without interception the relay is the original destination of a connection to it. It must report so, and must not
/// connect to itself.
#[test]
fn a_relay_reports_the_original_destination() {
    let ActorFixture { app, world: _world, pod: _pod } = fixture("relay-alone");
    let relay = Relay {
        name: "outbound".into(),
        bind: Bind::new(Ids::PROXY, addr("0.0.0.0:15001")),
        direction: RelayDirection::Outbound,
        report: true,
        reset: false,
        workers: 2,
    };
    app.relay(relay).expect("a relay");
    let seen = app.dial(Dial::new(Ids::APP, addr("127.0.0.1:15001"))).expect("dialled");
    assert_eq!(seen.outcome, DialOutcome::Dropped(FlowStage::Read), "{seen:?}");
    let told = app.relayed(1, Duration::from_secs(5));
    assert_eq!(told.len(), 1);
    assert_eq!(told[0].local, addr("127.0.0.1:15001"));
    assert_eq!(Some(told[0].peer), seen.sockname);
    assert!(told[0].error.is_some());
}

#[test]
fn thousands_of_flows_do_not_take_long() {
    let ActorFixture { app, world, pod: _pod } = fixture("thousands");
    serve(&world, "world4", Transport::Tcp, "0.0.0.0:80");
    let start = Instant::now();
    for _ in 0..10 {
        let dials = (0..200).map(|n| {
            let ids = Ids { uid: 1000 + n % 4, gid: 1000 };
            Dial::new(ids, addr(&format!("198.51.100.{}:80", n % 250)))
        });
        for seen in app.dial_all(dials.collect()).expect("dialled") {
            assert_eq!(answer(seen.outcome).server, "world4");
        }
    }
    // Two thousand took 0.35 s in a debug build on two cores.
    assert!(start.elapsed() < Duration::from_secs(10), "2000 flows took {:?}", start.elapsed());
    eprintln!("2000 flows took {:?}", start.elapsed());
}
