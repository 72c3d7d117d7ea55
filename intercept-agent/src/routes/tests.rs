//! Routes of real namespaces, set up with iproute2.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::process::Command;
use std::time::{Duration, Instant};

use super::*;
use crate::testing::new_netns;

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

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime")
}

/// Waits until the followed state satisfies `wanted`.
async fn until(change: &str, follower: &mut Follower, wanted: impl Fn(&RouteSnapshot) -> bool) {
    let wait = async {
        while !wanted(follower.current()) {
            follower.changed().await.expect("following");
        }
    };
    let waited = tokio::time::timeout(Duration::from_secs(60), wait).await;
    assert!(waited.is_ok(), "{change} is not followed: {:#?}", follower.current());
}

#[test]
fn changes_are_followed() {
    let netns = pod();
    runtime().block_on(async {
        let mut follower = Follower::start(&netns).unwrap();
        assert_eq!(*follower.current(), RouteSnapshot::snapshot(&netns).unwrap());
        for (change, destination, expected) in [
            // A secondary address: the kernel prefers the first of its subnet even for connections to it.
            ("addr add 10.244.1.9/24 dev eth0", "10.244.1.9", Some("10.244.1.9/32 lo 10.244.1.5")),
            ("addr del 10.244.1.9/24 dev eth0", "10.244.1.9", Some("10.244.1.0/24 eth0 10.244.1.5")),
            ("addr add fd00:9::9/64 dev net1 nodad", "fd00:9::9", Some("fd00:9::9/128 lo fd00:9::9")),
            ("route add 10.96.0.0/12 dev net1", "10.96.0.1", Some("10.96.0.0/12 net1 192.168.7.9")),
            ("-6 route add blackhole fd00:97::/64", "fd00:97::1", Some("fd00:97::/64 - none")),
            ("rule add to 10.70.0.0/16 blackhole", "10.70.0.1", Some("10.70.0.0/16 - none")),
            ("link set eth0 down", "8.8.8.8", None),
        ] {
            ip(&netns, &[change]);
            let start = Instant::now();
            until(change, &mut follower, |snapshot| way(snapshot, destination).as_deref() == expected).await;
            let took = start.elapsed();
            assert!(took < Duration::from_millis(200), "{change} was followed after {took:?}");
        }
        ip(&netns, &["link set net1 name data0"]);
        until("a change", &mut follower, |now| now.interfaces.iter().any(|i| i.name == "data0")).await;
    });
}

#[test]
fn a_change_without_effect_is_not_reported() {
    let netns = pod();
    runtime().block_on(async {
        let mut follower = Follower::start(&netns).unwrap();
        // There are events, but no rule looks up table 200.
        ip(&netns, &["route add 10.51.0.0/16 dev net1 table 200"]);
        let quiet = tokio::time::timeout(Duration::from_millis(300), follower.changed()).await;
        assert!(quiet.is_err(), "reported {quiet:?}");
        // Changes are still followed after the timeout.
        ip(&netns, &["route add 10.52.0.0/16 dev net1"]);
        until("a change", &mut follower, |snapshot| {
            way(snapshot, "10.52.1.1").is_some_and(|way| way.contains("net1"))
        })
        .await;
    });
}

/// Whether a netlink socket in `netns` has dropped an event.
fn has_lost_events(netns: &Netns) -> bool {
    let read = || std::fs::read_to_string("/proc/thread-self/net/netlink").expect("the netlink sockets");
    let sockets = netns.run(read).expect("entering");
    let drops = |line: &str| line.split_ascii_whitespace().nth(8).and_then(|drops| drops.parse::<u32>().ok());
    sockets.lines().skip(1).any(|line| drops(line).expect("a number of drops") > 0)
}

#[test]
fn lost_events_are_made_up_for() {
    let netns = pod();
    runtime().block_on(async {
        let mut follower = Follower::start(&netns).unwrap();
        follower.shrink_buffer();
        // More events than the socket buffers.
        for batch in 0..8 {
            let lines: Vec<_> = (0..64).map(|n| format!("route add 10.{batch}.{n}.0/24 dev net1")).collect();
            ip(&netns, &lines.iter().map(String::as_str).collect::<Vec<_>>());
        }
        assert!(has_lost_events(&netns), "the buffer was meant to overflow");
        until("a change", &mut follower, |snapshot| {
            way(snapshot, "10.7.63.1").is_some_and(|way| way.contains("net1"))
        })
        .await;
        assert_eq!(*follower.current(), RouteSnapshot::snapshot(&netns).unwrap());
        ip(&netns, &["route del 10.7.63.0/24"]);
        until("a change", &mut follower, |snapshot| {
            way(snapshot, "10.7.63.1").is_some_and(|way| way.contains("eth0"))
        })
        .await;
    });
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
    requests.until(Instant::now());
    for _ in 0..2 {
        let late = requests.routes(AddressFamily::Inet);
        assert!(matches!(late, Err(RoutesError::Slow { .. })), "{:?}", late.map(drop));
    }
    requests.until(Instant::now() + Duration::from_secs(10));
    assert!(requests.routes(AddressFamily::Inet).expect("routes").len() > 64);
    let (read, _) = RouteSnapshot::read(&mut requests).expect("a snapshot");
    assert_eq!(read, RouteSnapshot::snapshot(&netns).expect("a snapshot"));
}

/// A pod that changes its routes endlessly costs at most a fiftieth of a processor, however slow that is.
#[test]
fn a_flapping_table_is_read_less_and_less() {
    let netns = pod();
    let lines: Vec<String> = (0..256).map(|n| format!("route add 12.0.{n}.0/24 dev net1")).collect();
    ip(&netns, &lines.iter().map(String::as_str).collect::<Vec<_>>());
    runtime().block_on(async {
        let mut follower = Follower::start(&netns).unwrap();
        for (change, back) in [("add", "del"), ("del", "add")].into_iter().cycle().take(4) {
            let changes = [change, back, change].map(|change| format!("route {change} 12.9.9.0/24 dev net1"));
            ip(&netns, &changes.each_ref().map(String::as_str));
            let is_there = |now: &RouteSnapshot| way(now, "12.9.9.1").is_some_and(|way| way.contains("net1"));
            until(change, &mut follower, |now| is_there(now) == (change == "add")).await;
        }
        let readings = follower.readings();
        assert!(readings.len() >= 4, "it is followed all the same: {readings:?}");
        for pair in readings.windows(2) {
            assert!(pair[1].began - pair[0].ended >= pair[0].took * 50, "{pair:?}");
        }
    });
}
