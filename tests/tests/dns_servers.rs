//! A datagram socket that queries several DNS servers: each answer has the address of the right server.

use std::net::{IpAddr, SocketAddr};

use tests::{
    actor::{Actor, Bind, Listen, Queried, Query, QueryReply, Sending, Transport},
    agent::Agent,
    iptables::{Backend, IptablesDns, IptablesOptions, apply},
    testbed::{Ids, Pod, PodSpec},
};

/// A pod with datagram servers instead of a proxy.
fn answering(label: &str, listen: [&str; 2]) -> (Actor, Pod) {
    let pod = Pod::new(PodSpec::new(label)).expect("a pod");
    let inside = Actor::start(&pod).expect("an actor");
    for addr in listen {
        let mut bind = Bind::new(Ids::PROXY, SocketAddr::new(addr.parse().expect("an address"), 15053));
        bind.v6only = true;
        inside.listen(Listen { name: "dns".into(), transport: Transport::Udp, bind }).expect("a server");
    }
    (inside, pod)
}

const LOCALHOST: [&str; 2] = ["127.0.0.1", "::1"];
const ANY: [&str; 2] = ["0.0.0.0", "::"];
const ALL_DNS: [&str; 6] = ["-u", "1337", "-i", "*", "--redirect-dns", "--capture-all-dns"];

fn servers(text: &str, count: u32) -> Vec<SocketAddr> {
    let first: IpAddr = text.parse().expect("an address");
    let nth = |n: u32| match first {
        IpAddr::V4(first) => IpAddr::from((first.to_bits() + n).to_be_bytes()),
        IpAddr::V6(first) => IpAddr::from((first.to_bits() + u128::from(n)).to_be_bytes()),
    };
    (0..count).map(|n| SocketAddr::new(nth(n), 53)).collect()
}

fn asked(inside: &Actor, query: Query) -> Vec<Option<SocketAddr>> {
    let Queried { replies, .. } = inside.query(query).expect("queried");
    let from = |reply: &QueryReply| match reply {
        QueryReply::Answered { from, answer } => {
            assert_eq!(answer.server, "dns");
            Some(SocketAddr::new(from.ip().to_canonical(), from.port()))
        }
        _ => None,
    };
    replies.iter().map(from).collect()
}

fn to_all(servers: &[SocketAddr], sending: Sending) -> Query {
    Query { to: servers.to_vec(), sending, ..Query::new(Ids::APP, servers[0]) }
}

/// Every query is sent before the first answer is read.
fn each_answer_has_its_server(inside: &Actor) {
    for sending in [Sending::To, Sending::Many] {
        for (first, mapped) in [("10.96.0.10", false), ("10.96.0.10", true), ("fd96::10", false)] {
            let mut servers = servers(first, 5);
            // A repeated query keeps the entry of its server.
            servers.extend_from_within(..3);
            let query = Query { mapped, ..to_all(&servers, sending) };
            let expected: Vec<_> = servers.iter().copied().map(Some).collect();
            assert_eq!(asked(inside, query), expected, "{sending:?} {first} mapped {mapped}");
        }
    }
}

#[test]
fn one_socket_asks_several_servers() {
    for listen in [LOCALHOST, ANY] {
        let agent = Agent::new("dns").expect("the agent");
        let (inside, pod) = answering("several", listen);
        agent.attach(&pod, &ALL_DNS).expect("attached");
        each_answer_has_its_server(&inside);
    }
}

#[test]
fn one_socket_asks_several_servers_under_iptables() {
    let (inside, pod) = answering("several-nft", LOCALHOST);
    let options = IptablesOptions {
        dns: Some(IptablesDns { all: true, servers: Vec::new() }),
        ..IptablesOptions::injected()
    };
    apply(&options, &pod, Backend::Nft).expect("rules");
    each_answer_has_its_server(&inside);
}

/// A socket has room for nine servers with pending answers. With more, answers of the oldest have an address that belongs
/// to no server, but never that of another server.
#[test]
fn too_many_servers_are_never_confused() {
    let agent = Agent::new("dns").expect("the agent");
    let (inside, pod) = answering("too-many", LOCALHOST);
    agent.attach(&pod, &ALL_DNS).expect("attached");
    let servers = servers("10.96.0.10", 14);
    let from = asked(&inside, to_all(&servers, Sending::To));
    for (n, (server, from)) in servers.iter().zip(&from).enumerate() {
        if n == 0 || n >= 14 - 8 {
            assert_eq!(*from, Some(*server), "{n}");
        } else {
            let lost = from.expect("an answer");
            assert!(lost.ip().to_string().starts_with("127.53."), "{n}: {lost}");
        }
    }
}

/// Documented: a socket that is bound to an address receives answers at that address only, so all answers are attributed
/// to the last server.
#[test]
fn a_bound_socket_knows_the_server_asked_last() {
    let agent = Agent::new("dns").expect("the agent");
    let (inside, pod) = answering("bound", LOCALHOST);
    agent.attach(&pod, &ALL_DNS).expect("attached");
    for (first, from) in [("10.96.0.10", "10.66.0.2"), ("fd96::10", "fd66::2")] {
        let servers = servers(first, 3);
        let query = Query { from: from.parse().ok(), ..to_all(&servers, Sending::To) };
        assert_eq!(asked(&inside, query), vec![Some(servers[2]); 3]);
    }
}
