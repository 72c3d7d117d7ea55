//! A pod without its proxy: connections are refused, or pass as if the pod were not captured if that is requested.

use std::net::{IpAddr, SocketAddr};

use tests::{
    actor::{Actor, Bind, Dial, DialOutcome, Listen, Query, QueryReply, Transport},
    agent::Agent,
    testbed::{Ids, Pod, PodSpec},
};

const FLAGS: [&str; 8] = ["-u", "1337", "-i", "*", "-b", "*", "--redirect-dns", "--capture-all-dns"];
const SERVICES: [&str; 2] = ["10.96.0.10", "fd96::10"];

fn listen(actor: &Actor, name: &str, ids: Ids, transport: Transport, port: u16) {
    for any in ["0.0.0.0", "::"] {
        let any: IpAddr = any.parse().expect("an address");
        let bind = Bind::new(ids, SocketAddr::new(any, port));
        actor.listen(Listen { name: name.into(), transport, bind }).expect("a server");
    }
}

/// The servers that answer an outbound connection, a query and an inbound connection, of both families.
fn answers(pod: &Pod, inside: &Actor, world: &Actor) -> Vec<String> {
    let who = |outcome: DialOutcome| match outcome {
        DialOutcome::Answered(answer) => answer.server,
        other => format!("{other:?}"),
    };
    let mut answers = Vec::new();
    for service in SERVICES {
        let service: IpAddr = service.parse().expect("an address");
        let dial = Dial::new(Ids::APP, SocketAddr::new(service, 80));
        answers.push(who(inside.dial(dial).expect("dialled").outcome));
        let query = Query::new(Ids::APP, SocketAddr::new(service, 53));
        answers.push(match inside.query(query).expect("asked").replies.remove(0) {
            QueryReply::Answered { from, answer } => format!("{} as {from}", answer.server),
            other => format!("{other:?}"),
        });
        let app =
            Dial::new(Ids::ROOT, SocketAddr::new(pod.address(intercept_common::Family::of(&service)), 8080));
        answers.push(who(world.dial(app).expect("dialled").outcome));
    }
    answers
}

#[test]
fn only_an_open_pod_works_without_its_proxy() {
    let agent = Agent::new("open").expect("the agent");
    let pod = Pod::new(PodSpec::new("open")).expect("a pod");
    let (inside, world) =
        (Actor::start(&pod).expect("an actor"), Actor::start(pod.neighbour()).expect("an actor"));
    listen(&inside, "app", Ids::APP, Transport::Tcp, 8080);
    listen(&world, "world", Ids::ROOT, Transport::Tcp, 80);
    listen(&world, "world", Ids::ROOT, Transport::Udp, 53);
    let dns = SERVICES.map(|server| {
        let server = SocketAddr::new(server.parse().expect("an address"), 53);
        (format!("world as {server}"), format!("proxy as {server}"))
    });

    agent.attach(&pod, &FLAGS).expect("attached");
    for answer in answers(&pod, &inside, &world) {
        assert!(!answer.contains("world") && !answer.contains("app"), "around the proxy: {answer}");
    }

    agent.attach(&pod, &[&FLAGS[..], &["--open-without-proxy"]].concat()).expect("attached");
    assert_eq!(
        answers(&pod, &inside, &world),
        ["world", &dns[0].0, "app", "world", &dns[1].0, "app"],
        "open, without the proxy"
    );

    let proxy = Actor::start(&pod).expect("an actor");
    for (name, port) in [("proxy", 15001), ("proxy", 15006)] {
        listen(&proxy, name, Ids::PROXY, Transport::Tcp, port);
    }
    listen(&proxy, "proxy", Ids::PROXY, Transport::Udp, 15053);
    assert_eq!(
        answers(&pod, &inside, &world),
        ["proxy", &dns[0].1, "proxy", "proxy", &dns[1].1, "proxy"],
        "open, with the proxy"
    );
    // Open again after the proxy has ended.
    drop(proxy);
    assert_eq!(answers(&pod, &inside, &world)[0], "world");
    agent.detach(&pod).expect("detached");
}
