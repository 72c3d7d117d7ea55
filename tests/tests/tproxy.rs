//! TPROXY with Envoy: the server sees the client's address, as under iptables, and the changes of the namespace are undone
//! afterwards.

use std::net::SocketAddr;

use tests::actor::{Actor, Bind, Dial, DialOutcome, Listen, Transport};
use tests::agent::Agent;
use tests::agent::succeed;
use tests::envoy;
use tests::iptables::{Backend, IptablesOptions, Tproxy, apply};
use tests::testbed::{Ids, Pod, PodSpec, Sandbox};

const FLAGS: [&str; 14] =
    ["-m", "TPROXY", "-t", "1337", "-r", "133", "-u", "1337", "-g", "1337", "-i", "*", "-b", "*"];

fn listen(actor: &Actor, name: &str, ids: Ids, port: u16) {
    for any in ["0.0.0.0", "::"] {
        let bind = Bind::new(ids, SocketAddr::new(any.parse().expect("an address"), port));
        actor.listen(Listen { name: name.into(), transport: Transport::Tcp, bind }).expect("a server");
    }
}

/// Asserts that the application sees the addresses of clients in the world through a transparent Envoy.
fn client_is_kept(label: &str, capture: impl FnOnce(&Pod)) -> Pod {
    let pod = Pod::new(PodSpec::new(label)).expect("a pod");
    let (inside, world) =
        (Actor::start(&pod).expect("an actor"), Actor::start(pod.neighbour()).expect("an actor"));
    listen(&inside, "app", Ids::APP, 8080);
    capture(&pod);
    let program = envoy::program().expect("Envoy: cargo xtask setup envoy");
    let envoy = envoy::transparent(&program, &pod, 1337).expect("Envoy starts");
    for (to, from) in [("10.66.0.2:8080", "198.51.100.9"), ("[fd66::2]:8080", "2001:db8::9")] {
        let to: SocketAddr = to.parse().expect("an address");
        for _ in 0..20 {
            let seen =
                world.dial(Dial { from: from.parse().ok(), ..Dial::new(Ids::ROOT, to) }).expect("dialled");
            let DialOutcome::Answered(answer) = &seen.outcome else { panic!("{to}: {:?}", seen.outcome) };
            assert_eq!((answer.server.as_str(), answer.local), ("app", to));
            assert_eq!(answer.peer.ip().to_string(), from, "the application does not see the client itself");
            assert_ne!(Some(answer.peer), seen.sockname, "not by way of Envoy, which has a port of its own");
        }
    }
    drop(envoy);
    // Without the proxy no connection passes. The agent refuses them; TPROXY without a listener drops them.
    let seen =
        world.dial(Dial::new(Ids::ROOT, "10.66.0.2:8080".parse().expect("an address"))).expect("dialled");
    assert!(!matches!(seen.outcome, DialOutcome::Answered(_)), "{:?}", seen.outcome);
    pod
}

fn routing(sandbox: &Sandbox) -> String {
    let mut ip = sandbox.command("/bin/sh").expect("a command");
    ip.args(["-c", "for v in 4 6; do ip -$v rule; ip -$v route show table all; done; sysctl -n net.ipv4.tcp_fwmark_accept"]);
    succeed(ip).expect("ip runs")
}

#[test]
fn the_client_is_kept_under_the_agent() {
    let agent = Agent::new("tproxy").expect("the agent");
    let mut before = String::new();
    let pod = client_is_kept("tproxy-agent", |pod| {
        before = routing(pod);
        agent.attach(pod, &FLAGS).expect("attached");
        let during = routing(pod);
        assert!(during.contains("fwmark 0x539 lookup 133") && during.contains("table 133"), "{during}");
    });
    agent.detach(&pod).expect("detached");
    assert_eq!(routing(&pod), before);
}

#[test]
fn the_client_is_kept_under_iptables() {
    let options =
        IptablesOptions { tproxy: Some(Tproxy { mark: 1337, table: 133 }), ..IptablesOptions::injected() };
    client_is_kept("tproxy-nft", |pod| {
        apply(&options, pod, Backend::Nft).expect("rules");
    });
}
