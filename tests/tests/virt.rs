//! `-k`: connections that arrive on a guest's interface for addresses outside the pod go to the outbound listener.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use nix::sys::socket::{getsockopt, sockopt};
use tests::actor::{Actor, Bind, Dial, DialOutcome, Dialled, FlowStage, Listen, OriginalDst, Transport};
use tests::agent::Agent;
use tests::agent::{finish, succeed};
use tests::iptables::{Backend, IptablesCidrs, IptablesOptions, apply};
use tests::testbed::netlink::{RouteSpec, TABLE_LOCAL};
use tests::testbed::{Ids, Pod, PodSpec, Sandbox};

/// Destinations of guests: one in -i, and one that is not.
const CAPTURED: [&str; 2] = ["203.0.113.80:80", "[2001:db8:9::80]:80"];
const OTHER: [&str; 2] = ["203.0.114.80:80", "[2001:db8:a::80]:80"];
const FROM: [&str; 2] = ["198.51.100.9", "2001:db8::9"];
const FLAGS: [&str; 6] = ["-u", "1337", "-k", "eth1", "-i", "203.0.113.0/24,2001:db8:9::/48"];

/// The pod. The world routes the guests' destinations over its eth1.
fn pod(label: &str) -> (Pod, Actor, Actor) {
    let pod = Pod::new(PodSpec::new(label).with_eth1()).expect("a pod");
    let by_eth1 = [
        ("203.0.113.0/24", "10.67.0.2"),
        ("203.0.114.0/24", "10.67.0.2"),
        ("2001:db8:9::/48", "fd67::2"),
        ("2001:db8:a::/48", "fd67::2"),
    ];
    for (to, via) in by_eth1 {
        let (to, via) = (to.parse().expect("a net"), via.parse().ok());
        // In the local table, because in the world every address is local by default.
        let route = RouteSpec { to, via, dev: Some("pod0-1"), table: TABLE_LOCAL, local: false };
        pod.neighbour().netns.add_route(route).expect("a route");
    }
    let (inside, world) =
        (Actor::start(&pod).expect("an actor"), Actor::start(pod.neighbour()).expect("an actor"));
    (pod, inside, world)
}

fn listen(inside: &Actor) {
    for any in ["0.0.0.0:15001", "[::]:15001"] {
        let bind = Bind::new(Ids::PROXY, any.parse().expect("an address"));
        inside.listen(Listen { name: "outbound".into(), transport: Transport::Tcp, bind }).expect("a proxy");
    }
}

fn dial(world: &Actor, to: &str, from: &str) -> Dialled {
    let to: SocketAddr = to.parse().expect("an address");
    let timeout = Duration::from_millis(700);
    world.dial(Dial { from: from.parse().ok(), timeout, ..Dial::new(Ids::ROOT, to) }).expect("dialled")
}

fn arrives_at_the_proxy(seen: &Dialled, to: &str, from: &str) {
    let DialOutcome::Answered(answer) = &seen.outcome else { panic!("{to}: {:?}", seen.outcome) };
    assert_eq!(answer.server, "outbound");
    assert_eq!(answer.original_dst, Some(OriginalDst::Addr(to.parse().expect("an address"))));
    assert_eq!(answer.peer.ip().to_string(), from);
}

fn routing(sandbox: &Sandbox) -> String {
    let mut ip = sandbox.command("/bin/sh").expect("a command");
    ip.args(["-c", "for v in 4 6; do ip -$v rule; ip -$v route show table all; done"]);
    succeed(ip).expect("ip runs")
}

fn guests_are_captured(world: &Actor) {
    for (to, from) in CAPTURED.into_iter().zip(FROM) {
        arrives_at_the_proxy(&dial(world, to, from), to, from);
    }
    for (to, from) in OTHER.into_iter().zip(FROM) {
        let seen = dial(world, to, from);
        assert!(!matches!(seen.outcome, DialOutcome::Answered(_)), "{to}: {:?}", seen.outcome);
    }
}

#[test]
fn guests_are_captured_under_the_agent() {
    let agent = Agent::new("virt").expect("the agent");
    let (pod, inside, world) = pod("virt-agent");
    listen(&inside);
    let before = routing(&pod);
    agent.attach(&pod, &FLAGS).expect("attached");
    guests_are_captured(&world);
    agent.detach(&pod).expect("detached");
    assert_eq!(routing(&pod), before);
}

#[test]
fn guests_are_captured_under_iptables() {
    let (pod, inside, world) = pod("virt-nft");
    let include = ["203.0.113.0/24", "2001:db8:9::/48"].map(|net| net.parse().expect("a net"));
    let options = IptablesOptions {
        virtual_interfaces: vec!["eth1".into()],
        include_cidrs: IptablesCidrs::List(include.into()),
        ..IptablesOptions::default()
    };
    apply(&options, &pod, Backend::Nft).expect("rules");
    listen(&inside);
    guests_are_captured(&world);
}

/// Documented: a listener that starts after the attach without IP_TRANSPARENT cannot answer for IPv4 addresses outside the
/// pod, and no connection passes. The next attach sets the option.
#[test]
fn a_later_listener_serves_guests_once_attached_again() {
    let agent = Agent::new("virt").expect("the agent");
    let (pod, inside, world) = pod("virt-later");
    agent.attach(&pod, &FLAGS).expect("attached");
    listen(&inside);
    arrives_at_the_proxy(&dial(&world, CAPTURED[1], FROM[1]), CAPTURED[1], FROM[1]);
    let seen = dial(&world, CAPTURED[0], FROM[0]);
    assert_eq!(seen.outcome, DialOutcome::TimedOut(FlowStage::Connect));
    assert!(agent.attach(&pod, &FLAGS).expect("attached").starts_with("unchanged"));
    guests_are_captured(&world);
}

/// `run` and the daemon set the option within a second, and reset it at the end.
#[test]
fn a_later_listener_serves_guests_where_the_agent_stays() {
    let agent = Agent::new("virt").expect("the agent");
    let (pod, inside, world) = pod("virt-stays");
    let (running, _) = agent.run(&pod, &FLAGS).expect("in force");
    let before = transparent(&pod);
    assert_eq!(before, [false; 0]);
    listen(&inside);
    let deadline = Instant::now() + Duration::from_secs(1);
    while !transparent(&pod).contains(&true) {
        assert!(Instant::now() < deadline, "{:?}", transparent(&pod));
        std::thread::yield_now();
    }
    guests_are_captured(&world);
    running.terminate().expect("ended");
    assert!(!transparent(&pod).contains(&true));
}

/// However few descriptors a detach has, the option is reset by it or by the next.
#[test]
fn a_detach_without_descriptors_leaves_no_option_behind() {
    let mut agent = Agent::new("virt").expect("the agent");
    let (pod, inside, _) = pod("virt-few");
    listen(&inside);
    for descriptors in 3.. {
        agent.attach(&pod, &FLAGS).expect("attached");
        assert!(transparent(&pod).contains(&true));
        agent.start_by(vec!["prlimit".to_owned(), format!("--nofile={descriptors}")]);
        let output = finish(&mut agent.for_pod("detach", &pod, &[])).expect("prlimit starts");
        agent.start_by(Vec::new());
        let error = String::from_utf8_lossy(&output.stderr);
        if !output.status.success() {
            let again = finish(&mut agent.for_pod("detach", &pod, &[])).expect("it starts");
            let unknown = String::from_utf8_lossy(&again.stderr);
            assert!(again.status.success() || unknown.contains("not attached"), "{descriptors}: {unknown}");
        }
        assert!(!transparent(&pod).contains(&true), "{descriptors}: {error}");
        if output.status.success() && error.is_empty() {
            assert!(descriptors > 8, "it did with {descriptors} descriptors");
            break;
        }
    }
}

/// IP_TRANSPARENT of each listener on 15001.
fn transparent(pod: &Pod) -> Vec<bool> {
    let find = || {
        intercept_agent::facade::listeners::find(&netns_of(pod), &[&cgroup_of(pod)], &[15001]).expect("found")
    };
    find()
        .listeners
        .iter()
        .map(|listener| getsockopt(&listener.fd, sockopt::IpTransparent).expect("told"))
        .collect()
}

fn netns_of(pod: &Pod) -> intercept_agent::facade::netns::Netns {
    intercept_agent::facade::netns::Netns::open(pod.netns.path()).expect("opened")
}

fn cgroup_of(pod: &Pod) -> intercept_agent::facade::cgroup::CgroupDir {
    intercept_agent::facade::cgroup::CgroupDir::open(pod.cgroup.path()).expect("opened")
}

/// Only connections that arrive on these interfaces are captured. The pod's connections to the same destinations leave it.
#[test]
fn connections_of_the_pod_still_leave() {
    let agent = Agent::new("virt").expect("the agent");
    let (pod, inside, world) = pod("virt-own");
    listen(&inside);
    let bind = Bind::new(Ids::ROOT, "0.0.0.0:80".parse().expect("an address"));
    world.listen(Listen { name: "world".into(), transport: Transport::Tcp, bind }).expect("a server");
    agent.attach(&pod, &["-u", "1337", "-k", "eth1", "-i", "203.0.115.0/24", "-b", ""]).expect("attached");
    let to = "203.0.115.7:80".parse().expect("an address");
    let seen = inside.dial(Dial::new(Ids::PROXY, to)).expect("dialled");
    let DialOutcome::Answered(answer) = &seen.outcome else { panic!("{:?}", seen.outcome) };
    assert_eq!((answer.server.as_str(), answer.local), ("world", to));
}
