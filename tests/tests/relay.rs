//! The relay as the proxy of a sidecar, under real iptables: the original destinations that it reads, its onward
//! connections, and what both ends see.

use std::net::SocketAddr;
use std::time::Duration;

use tests::actor::{
    Actor, Answer, Bind, Dial, DialOutcome, Dialled, Listen, OriginalDst, Relay, RelayDirection, Relayed,
    Transport,
};
use tests::iptables::{Backend, IptablesOptions, Tproxy, apply};
use tests::testbed::{Ids, Pod, PodSpec};

fn addr(text: &str) -> SocketAddr {
    text.parse().unwrap_or_else(|_| panic!("{text} is not an address"))
}

struct RelayFixture {
    inside: Actor,
    world: Actor,
    _pod: Pod,
}

/// A pod with an application on 8080 and an outbound and inbound relay, and the world on 80.
fn fixture(label: &str, options: &IptablesOptions, proxy: Ids, inbound: RelayDirection) -> RelayFixture {
    let pod = Pod::new(PodSpec::new(label)).expect("a pod");
    apply(options, &pod, Backend::Nft).expect("rules");
    let (inside, world) =
        (Actor::start(&pod).expect("an actor"), Actor::start(pod.neighbour()).expect("an actor"));
    for any in ["0.0.0.0", "[::]"] {
        let listen = |name: &str, port: u16, ids| {
            let bind = Bind::new(ids, addr(&format!("{any}:{port}")));
            Listen { name: name.into(), transport: Transport::Tcp, bind }
        };
        inside.listen(listen("app", 8080, Ids::APP)).expect("a server");
        world.listen(listen("world", 80, Ids::ROOT)).expect("a server");
        for (name, port, direction) in [
            ("outbound", options.envoy_port, RelayDirection::Outbound),
            ("inbound", options.inbound_port, inbound),
        ] {
            let mut bind = Bind::new(proxy, addr(&format!("{any}:{port}")));
            bind.transparent = options.tproxy.is_some() && name == "inbound";
            let relay = Relay { name: name.into(), bind, direction, report: true, reset: false, workers: 2 };
            inside.relay(relay).expect("a relay");
        }
    }
    RelayFixture { inside, world, _pod: pod }
}

fn answer(seen: &Dialled) -> &Answer {
    match &seen.outcome {
        DialOutcome::Answered(answer) => answer,
        other => panic!("not answered: {other:?}"),
    }
}

fn told(fixture: &RelayFixture) -> Relayed {
    let mut told = fixture.inside.relayed(1, Duration::from_secs(5));
    assert_eq!(told.len(), 1, "{told:?}");
    told.remove(0)
}

fn outbound(fixture: &RelayFixture) {
    for to in ["198.51.100.7:80", "[2001:db8::7]:80"] {
        let to = addr(to);
        let seen = fixture.inside.dial(Dial::new(Ids::APP, to)).expect("dialled");
        assert_eq!((answer(&seen).server.as_str(), answer(&seen).local), ("world", to));
        let told = told(fixture);
        assert_eq!(told.relay, "outbound");
        assert_eq!(told.original_dst, OriginalDst::Addr(to));
        assert_eq!(Some(told.peer), seen.sockname);
        assert_eq!(told.error, None);
    }
}

#[test]
fn under_redirect() {
    let fixture =
        fixture("relay-redirect", &IptablesOptions::injected(), Ids::PROXY, RelayDirection::Inbound);
    outbound(&fixture);
    for (to, onwards) in [("10.66.0.2:8080", "127.0.0.6"), ("[fd66::2]:8080", "::6")] {
        let to = addr(to);
        let seen = fixture.world.dial(Dial::new(Ids::ROOT, to)).expect("dialled");
        assert_eq!((answer(&seen).server.as_str(), answer(&seen).local), ("app", to));
        assert_eq!(answer(&seen).peer.ip().to_string(), onwards);
        let told = told(&fixture);
        assert_eq!(told.relay, "inbound");
        assert_eq!(told.original_dst, OriginalDst::Addr(to));
        assert_eq!(Some(told.peer), seen.sockname);
    }
}

/// Under TPROXY Istio's proxy is recognised by its group. Its onward connections have a mark.
#[test]
fn under_tproxy() {
    let tproxy = Tproxy { mark: 1337, table: 133 };
    let options = IptablesOptions { tproxy: Some(tproxy), ..IptablesOptions::injected() };
    let proxy = Ids { uid: 0, gid: 1337 };
    let fixture =
        fixture("relay-tproxy", &options, proxy, RelayDirection::InboundTransparent { mark: tproxy.mark });
    outbound(&fixture);
    for (to, from) in [("10.66.0.2:8080", "198.51.100.9"), ("[fd66::2]:8080", "2001:db8::9")] {
        let (to, from) = (addr(to), from.parse().expect("an address"));
        let dial = Dial { from: Some(from), ..Dial::new(Ids::ROOT, to) };
        let seen = fixture.world.dial(dial).expect("dialled");
        assert_eq!((answer(&seen).server.as_str(), answer(&seen).local), ("app", to));
        assert_eq!(answer(&seen).peer.ip(), from, "the application does not see the client itself");
        let told = told(&fixture);
        assert_eq!((told.local, told.original_dst), (to, OriginalDst::Addr(to)));
        assert_eq!(Some(told.peer), seen.sockname);
    }
}
