//! The follower of a namespace.

use std::time::Duration;

use super::*;

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
