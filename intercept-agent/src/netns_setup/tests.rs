//! Namespaces that are set up with iproute2.

use std::{
    net::{IpAddr, Ipv6Addr, UdpSocket},
    process::Command,
    time::{Duration, Instant},
};

use super::*;
use crate::{
    compile::compile,
    options::{Cidrs, InterfacePattern},
    routes::Reach,
    testing::new_netns,
};

const PLAIN: &[&str] = &["link set lo up"];
/// The kernel adds no link-local addresses, which would come at any time.
const PAIR: &[&str] = &[
    "link set lo up",
    "link add eth0 type veth peer name far0",
    "link set far0 addrgenmode none",
    "link set eth0 addrgenmode none",
    "link set far0 up",
    "link set eth0 up",
    "addr add 10.244.1.5/24 dev eth0",
    "route add default via 10.244.1.1",
];
const GLOBAL_V6: &[&str] =
    &["addr add fd00:244::5/64 dev eth0 nodad", "-6 route add default via fd00:244::1"];
/// IPv6 has a route and only a link-local address.
const LINK_LOCAL_V6: &[&str] =
    &["-6 addr add fe80::5/64 dev eth0 nodad", "-6 route add default via fe80::1 dev eth0"];

fn namespace(lines: &[&[&str]]) -> Netns {
    let netns = new_netns();
    let run = || {
        for line in lines.iter().copied().flatten() {
            let output = Command::new("ip").args(line.split(' ')).output().expect("iproute2 is installed");
            assert!(output.status.success(), "ip {line}: {}", String::from_utf8_lossy(&output.stderr));
        }
    };
    netns.run(run).expect("entering");
    netns
}

fn configs() -> [Config; 3] {
    let redirect = Config::default();
    let tproxy = Config { mode: InboundMode::Tproxy, ..Config::default() };
    let guests = Config {
        virt_interfaces: vec![InterfacePattern::Exact("eth0".to_owned())],
        include: Cidrs { all: true, ..Cidrs::default() },
        ..Config::default()
    };
    [redirect, tproxy, guests]
}

fn added(netns: &Netns, additions: &NetnsAdditions) -> NetnsChanges {
    let mut made = NetnsChanges::default();
    let socket = RouteReading::of(netns).expect("a reading").socket;
    add_addresses(netns, &socket, additions, &mut made).expect("added");
    add_others(netns, &socket, additions, &mut made).expect("added");
    made
}

fn planned(netns: &Netns, config: &Config, before: &NetnsChanges) -> (NetnsPlan, RouteSnapshot) {
    let reading = RouteReading::of(netns).expect("a reading");
    let found = find(netns, config, &reading).expect("looked at");
    let snapshot = reading.snapshot;
    (plan(config, &snapshot.interface_names(), &found, before, &NetnsChanges::default()), snapshot)
}

/// Reads the namespace until it has the expected state. The kernel adds addresses from a work queue.
#[track_caller]
fn eventually(netns: &Netns, mut is_it: impl FnMut(&RouteSnapshot) -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let snapshot = RouteSnapshot::snapshot(netns).expect("a snapshot");
        if is_it(&snapshot) {
            return;
        }
        assert!(Instant::now() < deadline, "still {snapshot:#?}");
        std::thread::yield_now();
    }
}

/// The kernel makes the route of an address later than it acknowledges the address. Packets that are sent between are lost.
#[test]
fn packets_to_an_added_address_arrive_at_once() {
    let netns = namespace(&[PLAIN]);
    let (plan, _) = planned(&netns, &Config::default(), &NetnsChanges::default());
    let ports = || {
        let receiver = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 0)).expect("a socket");
        receiver.set_read_timeout(Some(Duration::from_secs(5))).expect("set");
        (UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 0)).expect("a socket"), receiver)
    };
    let (sender, receiver) = netns.run(ports).expect("entering");
    let port = receiver.local_addr().expect("bound").port();
    for round in 0..500 {
        let made = added(&netns, &plan.additions());
        sender.send_to(b"early", (PASSTHROUGH_V6, port)).expect("sent");
        receiver.recv(&mut [0; 8]).unwrap_or_else(|error| panic!("round {round}: {error}"));
        remove(&netns, &made).expect("removed");
    }
}

/// A policy is compiled before the namespace is changed, and must be that of the changed namespace.
#[test]
fn what_is_expected_of_the_routes_comes_about() {
    for lines in [&[PLAIN][..], &[PAIR], &[PAIR, GLOBAL_V6], &[PAIR, LINK_LOCAL_V6]] {
        for config in configs() {
            let netns = namespace(lines);
            if lines.len() > 1 {
                let own = lines[1][0].split(['/', ' ']).find_map(|word| word.parse::<IpAddr>().ok());
                let own = own.expect("an address");
                eventually(&netns, |snapshot| snapshot.lookup(own).is_some_and(|r| r.reach == Reach::Local));
            }
            let (plan, snapshot) = planned(&netns, &config, &NetnsChanges::default());
            assert!(!plan.is_empty());
            let expected = compile(&config, &plan.expected(snapshot));
            assert_eq!(added(&netns, &plan.additions()), plan.additions().changes);
            eventually(&netns, |snapshot| compile(&config, snapshot) == expected);
            // There is nothing left to change.
            assert!(planned(&netns, &config, &plan.result()).0.is_empty(), "{config:?}");
            remove(&netns, &plan.result()).expect("removed");
            assert_eq!(planned(&netns, &config, &NetnsChanges::default()).0, plan, "{config:?}");
        }
    }
}

#[test]
fn what_another_process_made_is_neither_planned_nor_removed() {
    for config in configs() {
        let netns = namespace(&[PAIR, GLOBAL_V6]);
        let (theirs, _) = planned(&netns, &config, &NetnsChanges::default());
        added(&netns, &theirs.additions());
        let (plan, _) = planned(&netns, &config, &NetnsChanges::default());
        assert!(plan.is_empty() && plan.result().is_empty(), "{plan:?}");
    }
    // The same for a change that another process has made since the plan.
    let netns = namespace(&[PAIR, GLOBAL_V6]);
    let (plan, _) = planned(&netns, &Config::default(), &NetnsChanges::default());
    assert_eq!(added(&netns, &plan.additions()), plan.additions().changes);
    assert!(added(&netns, &plan.additions()).is_empty());
}

#[test]
fn what_is_asked_for_no_more_is_planned_to_go() {
    let netns = namespace(&[PAIR, GLOBAL_V6]);
    let [redirect, tproxy, _] = configs();
    let (first, _) = planned(&netns, &tproxy, &NetnsChanges::default());
    added(&netns, &first.additions());
    let (second, _) = planned(&netns, &redirect, &first.result());
    assert!(second.additions().changes.is_empty());
    assert_eq!(second.removals(), first.result().without(&second.result()));
    assert!(second.result().0.contains(&NetnsChange::PassthroughAddress), "both plans need it");
}
