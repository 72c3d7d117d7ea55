//! Routes of real namespaces, set up with iproute2.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::process::Command;
use std::time::{Duration, Instant};

use super::*;
use crate::testing::new_netns;

mod follow;

/// Runs `ip` with each of the lines inside `netns`.
fn ip(netns: &Netns, lines: &[&str]) {
    let run = || {
        for line in lines {
            let output = Command::new("ip").args(line.split(' ')).output().expect("iproute2 is installed");
            assert!(output.status.success(), "ip {line}: {}", String::from_utf8_lossy(&output.stderr));
        }
    };
    netns.run(run).expect("entering");
}

/// A pod with two dual-stack interfaces and default routes through the first.
fn pod() -> Netns {
    let netns = new_netns();
    ip(
        &netns,
        &[
            "link set lo up",
            "link add eth0 type veth peer name far0",
            "link add net1 type veth peer name far1",
            "link set far0 addrgenmode none up",
            "link set far1 addrgenmode none up",
            "link set eth0 up",
            "link set net1 up",
            "addr add 10.244.1.5/24 dev eth0",
            "addr add fd00:244::5/64 dev eth0 nodad",
            "addr add 192.168.7.9/16 dev net1",
            "addr add fd00:7::9/64 dev net1 nodad",
            "route add default via 10.244.1.1",
            "-6 route add default via fd00:244::1",
        ],
    );
    settle(&netns, &["fd00:244::5", "fd00:7::9"]);
    netns
}

/// Waits until these IPv6 addresses are local. The kernel adds them from a work queue.
fn settle(netns: &Netns, own: &[&str]) {
    let deadline = Instant::now() + Duration::from_secs(10);
    let is_own = |snapshot: &RouteSnapshot, text: &str| {
        snapshot.lookup(address(text)).is_some_and(|route| route.reach == Reach::Local)
    };
    loop {
        let snapshot = RouteSnapshot::snapshot(netns).expect("a snapshot");
        if own.iter().all(|address| is_own(&snapshot, address)) {
            return;
        }
        assert!(Instant::now() < deadline, "{own:?} are not all local in {snapshot:#?}");
        std::thread::yield_now();
    }
}

fn address(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

/// Returns prefix, interface (`-` for none) and source of the route for `destination`.
fn way(snapshot: &RouteSnapshot, destination: &str) -> Option<String> {
    let route = snapshot.lookup(address(destination))?;
    let egress = match route.reach {
        Reach::Local => "lo",
        Reach::Via(index) => {
            &snapshot.interfaces.iter().find(|interface| interface.index == index).expect("an interface").name
        }
        Reach::None => "-",
    };
    let source = route.source.map_or("none".to_owned(), |source| source.to_string());
    Some(format!("{} {egress} {source}", route.prefix))
}

#[track_caller]
fn expect(snapshot: &RouteSnapshot, ways: &[(&str, &str)]) {
    for (destination, expected) in ways {
        assert_eq!(way(snapshot, destination).as_deref().unwrap_or("no route"), *expected, "{destination}");
    }
}

/// Compares `snapshot` with the kernel's answers for addresses in and around its prefixes.
#[track_caller]
fn agrees_with_the_kernel(netns: &Netns, snapshot: &RouteSnapshot) {
    let mut requests = Requests::open(netns).expect("a socket");
    // xorshift with a constant seed, so that a failure can be reproduced.
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let mut destinations = Vec::new();
    for prefix in snapshot.routes.iter().map(|route| route.prefix) {
        for near in [prefix.network(), prefix.broadcast()] {
            for _ in 0..20 {
                // At the edge, next to it, or anywhere inside.
                let step = random() % 4;
                let host = u128::from(random()) << 64 | u128::from(random());
                let (step4, host4) = (u32::try_from(step).unwrap(), u32::try_from(host >> 96).unwrap());
                destinations.push(match (near, prefix) {
                    (IpAddr::V4(near), IpNet::V4(prefix)) => {
                        let near = near.to_bits();
                        let inside = prefix.network().to_bits() | (host4 & prefix.hostmask().to_bits());
                        let bits = [near.wrapping_add(step4), near.wrapping_sub(step4), inside];
                        IpAddr::V4(Ipv4Addr::from_bits(bits[usize::try_from(random() % 3).unwrap()]))
                    }
                    (IpAddr::V6(near), IpNet::V6(prefix)) => {
                        let near = near.to_bits();
                        let inside = prefix.network().to_bits() | (host & prefix.hostmask().to_bits());
                        let bits = [near.wrapping_add(step.into()), near.wrapping_sub(step.into()), inside];
                        IpAddr::V6(Ipv6Addr::from_bits(bits[usize::try_from(random() % 3).unwrap()]))
                    }
                    _ => unreachable!("both are of one family"),
                });
            }
        }
    }
    let mut compared = 0;
    for destination in destinations {
        let asked =
            snapshot.resolve(&mut requests, IpNet::from(destination), destination).expect("an answer");
        // Broadcast and multicast are not in the snapshot, and 0.0.0.0 and :: stand for this host.
        let Some(asked) = asked.filter(|_| !destination.is_multicast() && !destination.is_unspecified())
        else {
            continue;
        };
        let (reach, source) =
            snapshot.lookup(destination).map_or((Reach::None, None), |route| (route.reach, route.source));
        // In a local prefix without a source, each destination is its own.
        let source = if reach == Reach::Local { source.or(Some(destination)) } else { source };
        assert_eq!((reach, source), (asked.reach, asked.source), "{destination} in {snapshot:#?}");
        compared += 1;
    }
    assert!(compared > 100, "only {compared} addresses were compared");
}

#[test]
fn interfaces_are_mirrored() {
    let netns = pod();
    let snapshot = RouteSnapshot::snapshot(&netns).unwrap();
    let mut shown: Vec<_> = snapshot.interfaces.iter().map(|i| (i.name.as_str(), i.loopback, i.up)).collect();
    shown.sort_unstable();
    assert_eq!(shown, ["eth0", "far0", "far1", "lo", "net1"].map(|name| (name, name == "lo", true)));
    let shown: Vec<_> = snapshot.interfaces.iter().map(|interface| interface.index).collect();
    let index = |name: &str| {
        let read = || std::fs::read_to_string(format!("/proc/thread-self/net/dev_snmp6/{name}"));
        let text = netns.run(read).expect("entering").expect("an interface of IPv6");
        let index =
            text.lines().next().and_then(|line| line.split_ascii_whitespace().nth(1)).expect("ifIndex");
        index.parse::<u32>().expect("a number")
    };
    let mut expected = ["eth0", "far0", "far1", "net1", "lo"].map(index);
    expected.sort_unstable();
    assert_eq!(shown, expected);
}

#[test]
fn names_that_are_not_text_do_no_harm() {
    use std::os::unix::ffi::OsStrExt as _;
    let netns = pod();
    let before = RouteSnapshot::snapshot(&netns).expect("a snapshot");
    let run = |line: &[u8]| {
        let words = line.split(|byte| *byte == b' ').map(std::ffi::OsStr::from_bytes);
        let output = Command::new("ip").args(words).output().expect("iproute2 is installed");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    };
    let change = || {
        run(b"link add d\xff\xc3y0 type veth peer name far2");
        run(b"link property add dev net1 altname alt\xe2\x82name");
        run(b"link set net1 alias a\xf0");
        run(b"rule add iif d\xff\xc3y0 lookup 77");
        run(b"rule add oif d\xff\xc3y0 lookup 77");
    };
    netns.run(change).expect("entering");
    let snapshot = RouteSnapshot::snapshot(&netns).expect("a snapshot");
    let names: Vec<_> = snapshot.interfaces.iter().map(|i| i.name.as_str()).collect();
    assert!(names.contains(&"d??y0") && names.len() == before.interfaces.len() + 2, "{names:?}");
    assert_eq!(snapshot.routes, before.routes);
}

#[test]
fn an_empty_namespace_has_no_routes() {
    let snapshot = RouteSnapshot::snapshot(&new_netns()).unwrap();
    assert_eq!(snapshot.routes, []);
    assert_eq!(way(&snapshot, "127.0.0.1"), None);
}

#[test]
fn routes_are_as_the_kernel_decides() {
    let netns = pod();
    let snapshot = RouteSnapshot::snapshot(&netns).unwrap();
    expect(
        &snapshot,
        &[
            ("127.0.0.1", "127.0.0.1/32 lo 127.0.0.1"),
            ("127.0.0.6", "127.0.0.0/8 lo 127.0.0.1"),
            ("::1", "::1/128 lo ::1"),
            ("10.244.1.5", "10.244.1.5/32 lo 10.244.1.5"),
            ("::ffff:10.244.1.5", "10.244.1.5/32 lo 10.244.1.5"),
            ("192.168.7.9", "192.168.7.9/32 lo 192.168.7.9"),
            ("fd00:244::5", "fd00:244::5/128 lo fd00:244::5"),
            ("fd00:7::9", "fd00:7::9/128 lo fd00:7::9"),
            ("10.244.1.77", "10.244.1.0/24 eth0 10.244.1.5"),
            ("192.168.200.1", "192.168.0.0/16 net1 192.168.7.9"),
            ("fd00:7::1234", "fd00:7::/64 net1 fd00:7::9"),
            ("8.8.8.8", "0.0.0.0/0 eth0 10.244.1.5"),
            ("2606:4700::1", "::/0 eth0 fd00:244::5"),
        ],
    );
    agrees_with_the_kernel(&netns, &snapshot);
}

#[test]
fn special_routes_are_mirrored() {
    let netns = pod();
    ip(
        &netns,
        &[
            "route add 10.96.0.10/32 dev net1",
            "route add blackhole 10.97.0.0/16",
            "route add unreachable 10.98.0.0/16",
            "route add prohibit 10.99.0.0/16",
            "-6 route add blackhole fd00:97::/64",
            "-6 route add unreachable fd00:98::/64",
            "addr add 10.244.1.6/24 dev eth0",
            "route add 172.16.0.0/12 via 10.244.1.1 src 10.244.1.6",
            "addr add fd00:244::6/64 dev eth0 nodad",
            "-6 route add fd00:172::/64 via fd00:244::1 src fd00:244::6",
            // The first has the lower metric.
            "route add 172.31.0.0/16 dev net1 metric 10",
            "route add 172.31.0.0/16 dev eth0 metric 20",
            "route add 100.64.0.0/10 nexthop via 10.244.1.1 nexthop via 10.244.1.2",
            "route add local 203.0.113.0/24 dev lo",
            // A subnet that consists only of its network and broadcast addresses.
            "addr add 10.9.9.1/30 dev net1",
            "route add 10.9.9.2/32 dev eth0",
        ],
    );
    settle(&netns, &["fd00:244::6"]);
    let snapshot = RouteSnapshot::snapshot(&netns).unwrap();
    expect(
        &snapshot,
        &[
            ("10.96.0.10", "10.96.0.10/32 net1 192.168.7.9"),
            ("10.97.1.1", "10.97.0.0/16 - none"),
            ("10.98.1.1", "10.98.0.0/16 - none"),
            ("10.99.1.1", "10.99.0.0/16 - none"),
            ("fd00:97::1", "fd00:97::/64 - none"),
            ("fd00:98::1", "fd00:98::/64 - none"),
            ("172.16.5.5", "172.16.0.0/12 eth0 10.244.1.6"),
            ("fd00:172::5", "fd00:172::/64 eth0 fd00:244::6"),
            ("172.31.1.1", "172.31.0.0/16 net1 192.168.7.9"),
            ("100.64.1.1", "100.64.0.0/10 eth0 10.244.1.5"),
            ("203.0.113.9", "203.0.113.0/24 lo none"),
            ("10.9.9.0", "10.9.9.0/30 net1 10.9.9.1"),
        ],
    );
    agrees_with_the_kernel(&netns, &snapshot);
}

#[test]
fn rules_are_honoured() {
    let netns = pod();
    ip(
        &netns,
        &[
            "route add 10.50.0.0/16 dev net1 table 100",
            "route add 10.51.0.0/16 dev net1 table 200",
            "route add default dev net1 table 300",
            "rule add lookup 100 priority 100",
            "rule add to 10.60.0.0/16 lookup 300 priority 110",
            // The rule and route of TPROXY, which no unmarked socket follows.
            "route add local default dev lo table 133",
            "rule add fwmark 1337 lookup 133 priority 120",
        ],
    );
    let snapshot = RouteSnapshot::snapshot(&netns).unwrap();
    expect(
        &snapshot,
        &[
            ("10.50.1.1", "10.50.0.0/16 net1 192.168.7.9"),
            // No rule looks up table 200.
            ("10.51.1.1", "0.0.0.0/0 eth0 10.244.1.5"),
            ("10.60.1.1", "10.60.0.0/16 net1 192.168.7.9"),
            ("8.8.8.8", "0.0.0.0/0 eth0 10.244.1.5"),
        ],
    );
    agrees_with_the_kernel(&netns, &snapshot);
}

#[test]
fn what_is_gone_or_down_is_not_routed() {
    let netns = pod();
    ip(&netns, &["addr del 192.168.7.9/16 dev net1", "link set eth0 down"]);
    let snapshot = RouteSnapshot::snapshot(&netns).unwrap();
    for gone in ["192.168.7.9", "192.168.200.1", "8.8.8.8", "2606:4700::1", "10.244.1.77"] {
        assert_eq!(way(&snapshot, gone), None, "{gone}");
    }
    // An IPv4 address stays while its interface is down; an IPv6 address does not.
    expect(
        &snapshot,
        &[("10.244.1.5", "10.244.1.5/32 lo 10.244.1.5"), ("fd00:7::9", "fd00:7::9/128 lo fd00:7::9")],
    );
    assert!(!snapshot.interfaces.iter().any(|interface| interface.name == "eth0" && interface.up));
    agrees_with_the_kernel(&netns, &snapshot);
}

#[test]
fn a_link_local_source_is_the_source_where_there_is_no_other() {
    let netns = new_netns();
    ip(
        &netns,
        &[
            "link set lo up",
            "link add eth0 type veth peer name far0",
            "link set far0 addrgenmode none up",
            "link set eth0 addrgenmode none up",
            "addr add fe80::9/64 dev eth0 nodad",
            "-6 route add default dev eth0",
        ],
    );
    expect(&RouteSnapshot::snapshot(&netns).unwrap(), &[("2606:4700::1", "::/0 eth0 fe80::9")]);
}

#[test]
fn sources_follow_the_labels_of_ipv6() {
    let netns = pod();
    ip(&netns, &["addr add 2a00:1450::5/64 dev eth0 nodad"]);
    settle(&netns, &["2a00:1450::5"]);
    let snapshot = RouteSnapshot::snapshot(&netns).unwrap();
    expect(
        &snapshot,
        &[("2606:4700::1", "::/0 eth0 2a00:1450::5"), ("fd12:3456::1", "fc00::/7 eth0 fd00:244::5")],
    );
    agrees_with_the_kernel(&netns, &snapshot);
}

#[test]
fn more_routes_than_are_read_are_refused_with_the_figure_and_reading_goes_on() {
    let netns = pod();
    let batch = std::env::temp_dir().join(format!("intercept-routes-{}", std::process::id()));
    let lines = |action: &str| -> String {
        let line = |n: usize| format!("route {action} 11.{}.{}.0/24 dev net1\n", n / 256, n % 256);
        (0..=MAX_ENTRIES).map(line).collect()
    };
    let batch_of = |action: &str| {
        std::fs::write(&batch, lines(action)).expect("written");
        ip(&netns, &[&format!("-batch {}", batch.display())]);
    };
    batch_of("add");
    let mut requests = Requests::open(&netns).expect("a socket");
    let error = RouteSnapshot::read(&mut requests).unwrap_err();
    let RoutesError::TooMany { found, limit: MAX_ENTRIES, .. } = error else { panic!("{error:?}") };
    assert!(found > MAX_ENTRIES, "{error}");
    batch_of("del");
    _ = std::fs::remove_file(&batch);
    assert!(RouteSnapshot::read(&mut requests).is_ok(), "by the same socket");
}

#[test]
fn an_answer_that_is_given_up_is_not_taken_for_the_next() {
    let netns = pod();
    let lines: Vec<String> = (0..64).map(|n| format!("route add 12.{n}.0.0/16 dev net1")).collect();
    ip(&netns, &lines.iter().map(String::as_str).collect::<Vec<_>>());
    let mut requests = Requests::open(&netns).expect("a socket");
    let later = || Instant::now() + Duration::from_secs(10);
    let give_up = |requests: &mut Requests| {
        requests.until(Instant::now());
        for _ in 0..2 {
            let late = requests.routes(AddressFamily::Inet);
            assert!(matches!(late, Err(RoutesError::Slow { .. })), "{:?}", late.map(drop));
        }
        requests.until(later());
    };
    give_up(&mut requests);
    assert!(requests.routes(AddressFamily::Inet).expect("routes").len() > 64);
    // The first question of a snapshot is of another kind.
    give_up(&mut requests);
    let expected = RouteSnapshot::snapshot(&netns).expect("a snapshot");
    assert_eq!(RouteSnapshot::read(&mut requests).expect("a snapshot").0, expected);
    requests.until(Instant::now());
    let late = requests.ask([12, 3, 0, 1].into());
    assert!(matches!(late, Err(RoutesError::Slow { .. })), "{:?}", late.map(drop));
    requests.until(later());
    assert_eq!(RouteSnapshot::read(&mut requests).expect("a snapshot").0, expected);
}
