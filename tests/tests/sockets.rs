//! Sockets as real programs use them: compares each sequence of calls under iptables and under the agent, call by call.

use tests::differential::Capture;
use tests::iptables::{Backend, IptablesCidrs, IptablesOptions};
use tests::steps::compared::{
    ProxyBind, SocketsFixture, as_iptables, at, dns, same, tproxy, under, with_dns,
};
use tests::steps::{self, SocketKind, Step};
use tests::testbed::Ids;

use SocketKind::{Mptcp4, Tcp4, Tcp6, Udp4, Udp6};
use Step::{
    Ask, AskAt, AskBy, AskFor, Bind as BindTo, Close, Connect, Disconnect, Name, Open, Peer, Read,
    ReuseAddress, Shutdown, UnicastInterface, Use,
};

/// 0.0.0.0 is the bound source, or 127.0.0.1; `::` is ::1. The kernel says so after the hook has decided.
#[test]
fn an_unspecified_destination_is_what_the_kernel_makes_of_it() {
    for options in [IptablesOptions::injected(), tproxy()] {
        let local = |steps: &[Step], expected: &[&str]| {
            same(&options, ProxyBind::Wildcard, Ids::APP, steps, expected)
        };
        local(
            &[Open(Tcp4), Connect(at("0.0.0.0:8080")), Peer, Read],
            &["ok", "ok", "127.0.0.1:8080", "app from 127.0.0.1:*"],
        );
        local(&[Open(Tcp4), Connect(at("0.0.0.0:8081"))], &["ok", "ECONNREFUSED"]);
        local(
            &[Open(Tcp6), Connect(at("[::]:8080")), Peer, Read],
            &["ok", "ok", "[::1]:8080", "app from [::1]:*"],
        );
        local(&[Open(Tcp6), Connect(at("[::]:8081"))], &["ok", "ECONNREFUSED"]);
        local(
            &[Open(Tcp6), Connect(at("[::ffff:0.0.0.0]:8080")), Peer, Read],
            &["ok", "ok", "[::ffff:127.0.0.1]:8080", "app from 127.0.0.1:*"],
        );
        local(
            &[Open(Tcp4), BindTo(at("10.66.0.2:0")), Connect(at("0.0.0.0:8080")), Peer, Read],
            &["ok", "ok", "ok", "10.66.0.2:8080", "app from 10.66.0.2:*"],
        );
        local(
            &[Open(Tcp6), BindTo(at("[fd66::2]:0")), Connect(at("[::]:8080")), Peer, Read],
            &["ok", "ok", "ok", "[::1]:8080", "app from [fd66::2]:*"],
        );
        local(
            &[Open(Tcp6), BindTo(at("[::ffff:10.66.0.2]:0")), Connect(at("[::]:8080")), Peer, Read],
            &["ok", "ok", "ok", "[::ffff:127.0.0.1]:8080", "app from 10.66.0.2:*"],
        );
    }
}

#[test]
fn an_unspecified_destination_is_decided_by_lists_too() {
    // Captured although it is local, because -q and -i name it.
    let options = IptablesOptions {
        include_cidrs: IptablesCidrs::List(vec![
            "127.0.0.0/8".parse().expect("a network"),
            "10.66.0.0/24".parse().expect("a network"),
        ]),
        ..IptablesOptions::injected()
    };
    let steps = [Open(Tcp4), BindTo(at("10.66.0.2:0")), Connect(at("0.0.0.0:8080")), Peer, Read];
    let expected = ["ok", "ok", "ok", "10.66.0.2:8080", "outbound for 10.66.0.2:8080 from 10.66.0.2:*"];
    same(&options, ProxyBind::Wildcard, Ids::APP, &steps, &expected);
    let excluded =
        IptablesOptions { exclude_cidrs: vec!["10.66.0.2/32".parse().expect("a network")], ..options };
    let expected = ["ok", "ok", "ok", "10.66.0.2:8080", "app from 10.66.0.2:*"];
    same(&excluded, ProxyBind::Wildcard, Ids::APP, &steps, &expected);
    // A connection of the proxy to its own pod goes to the inbound port, also with an unspecified address.
    let expected = ["ok", "ok", "ok", "10.66.0.2:8080", "inbound for 10.66.0.2:8080 from 10.66.0.2:*"];
    same(&IptablesOptions::injected(), ProxyBind::Wildcard, Ids::PROXY, &steps, &expected);
}

#[test]
fn queries_to_an_unspecified_server_are_answered_by_localhost() {
    with_dns(&[Open(Udp4), AskAt(at("0.0.0.0:53"))], &["ok", "dns by 127.0.0.1:53"]);
    with_dns(
        &[Open(Udp4), Connect(at("0.0.0.0:53")), Peer, Ask],
        &["ok", "ok", "127.0.0.1:53", "dns by 127.0.0.1:53"],
    );
    with_dns(&[Open(Udp6), AskAt(at("[::]:53"))], &["ok", "dns by [::1]:53"]);
    with_dns(&[Open(Udp6), Connect(at("[::]:53")), Peer, Ask], &["ok", "ok", "[::1]:53", "dns by [::1]:53"]);
    with_dns(&[Open(Udp6), AskAt(at("[::ffff:0.0.0.0]:53"))], &["ok", "dns by [::ffff:127.0.0.1]:53"]);
    with_dns(
        &[Open(Udp4), BindTo(at("10.66.0.2:0")), Connect(at("0.0.0.0:53")), Peer, Ask],
        &["ok", "ok", "ok", "10.66.0.2:53", "dns by 10.66.0.2:53"],
    );
    with_dns(
        &[Open(Udp4), BindTo(at("10.66.0.2:0")), AskAt(at("0.0.0.0:53"))],
        &["ok", "ok", "dns by 10.66.0.2:53"],
    );
}

/// One source port with two destinations, with every kind of bind. iptables connects both as well, but the proxy sees
/// another port for the second.
#[test]
fn a_source_port_serves_for_several_destinations() {
    for (kind, own, first, second, shown) in [
        (Tcp4, "0.0.0.0:5555", "10.96.0.10:80", "10.96.0.11:443", "10.66.0.2"),
        (Tcp4, "10.66.0.2:5555", "10.96.0.10:80", "10.96.0.11:443", "10.66.0.2"),
        (Tcp6, "[::]:5555", "[fd96::10]:80", "[fd96::11]:443", "[fd66::2]"),
        (Tcp6, "[fd66::2]:5555", "[fd96::10]:80", "[fd96::11]:443", "[fd66::2]"),
    ] {
        for proxy in [ProxyBind::Wildcard, ProxyBind::Localhost] {
            let name = format!("{shown}:5555");
            let read = |to: &str| format!("outbound for {to} from {name}");
            let (one, two) = (read(first), read(second));
            let steps = [
                Open(kind),
                ReuseAddress,
                BindTo(at(own)),
                Connect(at(first)),
                Name,
                Read,
                Open(kind),
                ReuseAddress,
                BindTo(at(own)),
                Connect(at(second)),
                Name,
                Read,
            ];
            let expected = ["ok", "ok", "ok", "ok", &name, &one, "ok", "ok", "ok", "ok", &name, &two];
            let agent = Capture::agent().expect("the agent");
            assert_eq!(under(&agent, &IptablesOptions::injected(), proxy, Ids::APP, &steps), expected);
        }
    }
}

/// No state of an earlier connect() stays, whatever the next call is.
#[test]
fn every_connect_begins_from_nothing() {
    with_dns(
        &[Open(Udp4), Connect(at("10.96.0.10:53")), Peer, Connect(at("10.66.0.1:7777")), Peer, Ask],
        &["ok", "ok", "10.96.0.10:53", "ok", "10.66.0.1:7777", "world by 10.66.0.1:7777"],
    );
    with_dns(
        &[Open(Udp6), Connect(at("[fd96::10]:53")), Connect(at("[fd66::1]:7777")), Peer, Ask],
        &["ok", "ok", "ok", "[fd66::1]:7777", "world by [fd66::1]:7777"],
    );
    // Without a listener the first connect() fails after the hook.
    let options = IptablesOptions { envoy_port: 15009, ..IptablesOptions::injected() };
    for (kind, first, second, own) in [
        (Tcp4, "10.96.0.10:80", "127.0.0.1:8080", "127.0.0.1:*"),
        (Tcp6, "[fd96::10]:80", "[::1]:8080", "[::1]:*"),
        (Tcp6, "[::ffff:10.96.0.10]:80", "[::ffff:127.0.0.1]:8080", "127.0.0.1:*"),
    ] {
        let read = format!("app from {own}");
        same(
            &options,
            ProxyBind::Wildcard,
            Ids::APP,
            &[Open(kind), Connect(at(first)), Connect(at(second)), Peer, Read],
            &["ok", "ECONNREFUSED", "ok", second, &read],
        );
    }
}

/// A redirected socket has its old state after a disconnect or a failed connect().
#[test]
fn nothing_of_a_redirect_stays_on_a_socket() {
    as_iptables(
        &[
            Open(Tcp4),
            Connect(at("10.96.0.10:80")),
            Name,
            Disconnect,
            Connect(at("127.0.0.1:8080")),
            Name,
            Read,
        ],
        &["ok", "ok", "10.66.0.2:*", "ok", "ok", "127.0.0.1:*", "app from 127.0.0.1:*"],
    );
    as_iptables(
        &[Open(Tcp6), Connect(at("[fd96::10]:80")), Name, Disconnect, Connect(at("[::1]:8080")), Name, Read],
        &["ok", "ok", "[fd66::2]:*", "ok", "ok", "[::1]:*", "app from [::1]:*"],
    );
    // Another interface gives another source.
    let options = IptablesOptions { exclude_interfaces: vec!["eth1".into()], ..IptablesOptions::injected() };
    same(
        &options,
        ProxyBind::Wildcard,
        Ids::APP,
        &[Open(Tcp4), Connect(at("10.96.0.10:80")), Disconnect, Connect(at("172.20.0.5:80")), Name, Read],
        &["ok", "ok", "ok", "ok", "10.67.0.2:*", "world from 10.67.0.2:*"],
    );
    let refused = IptablesOptions { envoy_port: 15009, ..options };
    same(
        &refused,
        ProxyBind::Wildcard,
        Ids::APP,
        &[Open(Tcp4), Connect(at("10.96.0.10:80")), Connect(at("172.20.0.5:80")), Name, Read],
        &["ok", "ECONNREFUSED", "ok", "10.67.0.2:*", "world from 10.67.0.2:*"],
    );
}

#[test]
fn a_datagram_socket_is_free_once_it_is_disconnected() {
    let options = IptablesOptions { exclude_interfaces: vec!["eth1".into()], ..dns() };
    let check =
        |steps: &[Step], expected: &[&str]| same(&options, ProxyBind::Wildcard, Ids::APP, steps, expected);
    // To a server that is not captured, over another interface, and back.
    check(
        &[
            Open(Udp4),
            Connect(at("10.96.0.10:53")),
            Name,
            Ask,
            Disconnect,
            Name,
            Connect(at("172.20.0.5:53")),
            Name,
            Ask,
            Disconnect,
            Connect(at("10.96.0.11:53")),
            Name,
            Ask,
        ],
        &[
            "ok",
            "ok",
            "10.66.0.2:*",
            "dns by 10.96.0.10:53",
            "ok",
            "0.0.0.0:0",
            "ok",
            "10.67.0.2:*",
            "world by 172.20.0.5:53",
            "ok",
            "ok",
            "10.66.0.2:*",
            "dns by 10.96.0.11:53",
        ],
    );
    check(
        &[
            Open(Udp6),
            Connect(at("[fd96::10]:53")),
            Ask,
            Disconnect,
            Name,
            Connect(at("[fd20::5]:53")),
            Name,
            Ask,
        ],
        &["ok", "ok", "dns by [fd96::10]:53", "ok", "[::]:0", "ok", "[fd67::2]:*", "world by [fd20::5]:53"],
    );
    check(
        &[Open(Udp4), Connect(at("10.96.0.10:53")), Disconnect, Connect(at("127.0.0.1:7777")), Name, Ask],
        &["ok", "ok", "ok", "ok", "127.0.0.1:*", "app by 127.0.0.1:7777"],
    );
    check(
        &[Open(Udp4), Connect(at("10.96.0.10:53")), Disconnect, AskAt(at("10.96.0.12:53"))],
        &["ok", "ok", "ok", "dns by 10.96.0.12:53"],
    );
}

/// What no hook can undo: sendmsg() may not bind, so that a socket which connect() has bound stays so until the next
/// connect().
#[test]
fn a_disconnected_datagram_socket_keeps_its_source_until_it_connects() {
    let options = IptablesOptions { exclude_interfaces: vec!["eth1".into()], ..dns() };
    let agent = Capture::agent().expect("the agent");
    let give =
        |capture: &Capture, steps: &[Step]| under(capture, &options, ProxyBind::Wildcard, Ids::APP, steps);
    let over_eth1 = [Open(Udp4), Connect(at("10.96.0.10:53")), Disconnect, AskFor(at("172.20.0.5:7777"))];
    let mapped = [Open(Udp6), Connect(at("[fd96::10]:53")), Disconnect, AskAt(at("[::ffff:10.66.0.1]:7777"))];
    let iptables = Capture::Iptables(Backend::Nft);
    assert_eq!(give(&iptables, &over_eth1)[3], "world saw 10.67.0.2:*");
    assert_eq!(give(&agent, &over_eth1)[3], "world saw 10.66.0.2:*");
    assert_eq!(give(&iptables, &mapped)[3], "world by [::ffff:10.66.0.1]:7777");
    assert_eq!(give(&agent, &mapped)[3], "ENETUNREACH");
    let connects = [
        Open(Udp4),
        Connect(at("10.96.0.10:53")),
        Disconnect,
        Connect(at("172.20.0.5:7777")),
        Name,
        Disconnect,
        AskFor(at("172.20.0.5:7777")),
    ];
    let expected = ["ok", "ok", "ok", "ok", "10.67.0.2:*", "ok", "world saw 10.67.0.2:*"];
    same(&options, ProxyBind::Wildcard, Ids::APP, &connects, &expected);
}

/// As systemd-resolved asks. A query that is redirected has its interface by then.
#[test]
fn a_query_may_choose_its_interface() {
    let eth0 = || "eth0".to_owned();
    with_dns(
        &[Open(Udp4), UnicastInterface(eth0()), AskAt(at("10.96.0.10:53"))],
        &["ok", "ok", "dns by 10.96.0.10:53"],
    );
    with_dns(
        &[Open(Udp6), UnicastInterface(eth0()), AskAt(at("[fd96::10]:53"))],
        &["ok", "ok", "dns by [fd96::10]:53"],
    );
    with_dns(
        &[Open(Udp4), UnicastInterface(eth0()), Connect(at("10.96.0.10:53")), Ask],
        &["ok", "ok", "ok", "dns by 10.96.0.10:53"],
    );
    with_dns(&[Open(Udp4), AskBy(at("10.96.0.10:53"), eth0())], &["ok", "dns by 10.96.0.10:53"]);
    with_dns(&[Open(Udp6), AskBy(at("[fd96::10]:53"), eth0())], &["ok", "dns by [fd96::10]:53"]);
    // A query that is not captured leaves by the chosen interface.
    as_iptables(&[Open(Udp4), AskBy(at("10.96.0.10:53"), "eth0".into())], &["ok", "world by 10.96.0.10:53"]);
}

#[test]
fn tcp_has_no_connections_to_groups() {
    for (kind, to) in [
        (Tcp4, "224.0.0.1:80"),
        (Tcp4, "239.1.2.3:80"),
        (Tcp4, "255.255.255.255:80"),
        (Tcp4, "10.66.0.255:80"),
        (Tcp6, "[ff0e::1]:80"),
    ] {
        as_iptables(&[Open(kind), Connect(at(to))], &["ok", "ENETUNREACH"]);
    }
}

/// getpeername and getsockname also work after the connection has ended.
#[test]
fn a_closed_connection_keeps_its_names() {
    as_iptables(
        &[Open(Tcp4), Connect(at("10.96.0.10:80")), Read, Shutdown, Name],
        &["ok", "ok", "outbound for 10.96.0.10:80 from 10.66.0.2:*", "ok", "10.66.0.2:*"],
    );
}

#[test]
fn mptcp_clients_get_the_right_names() {
    as_iptables(
        &[Open(Mptcp4), Connect(at("10.96.0.10:80")), Name, Peer, Read, Close, Use(0)],
        &[
            "ok",
            "ok",
            "10.66.0.2:*",
            "10.96.0.10:80",
            "outbound for 10.96.0.10:80 from 10.66.0.2:*",
            "ok",
            "ok",
        ],
    );
}

/// One of two equal-cost routes leads to an interface of -c. iptables decides by the hash of each connection; the agent
/// captures all of them.
#[test]
fn a_route_that_leaves_by_an_excluded_interface_too_is_captured() {
    let fixture = SocketsFixture::new("ecmp", ProxyBind::Wildcard);
    let add = "ip route add 198.18.0.0/16 nexthop via 10.66.0.1 dev eth0 nexthop via 10.67.0.1 dev eth1 && \
               ip route add 198.19.0.0/16 nexthop via 10.67.0.1 dev eth1 nexthop via 10.67.0.7 dev eth1";
    let status = fixture.pod.command("sh").expect("a command").args(["-c", add]).status().expect("sh");
    assert!(status.success());
    let options = IptablesOptions { exclude_interfaces: vec!["eth1".into()], ..IptablesOptions::injected() };
    let agent = Capture::agent().expect("the agent");
    let captured = agent.start(&options, &fixture.pod).expect("captured");
    let dial = |to: String| {
        let steps = [Open(Tcp4), Connect(at(&to)), Read];
        steps::run(&fixture.pod, Ids::APP, &steps).expect("run").pop().expect("an outcome")
    };
    for n in 1..=16 {
        let mixed = dial(format!("198.18.0.{n}:80"));
        assert!(mixed.starts_with("outbound"), "{n}: {mixed}");
        let excluded = dial(format!("198.19.0.{n}:80"));
        assert!(!excluded.starts_with("outbound"), "{n}: {excluded}");
    }
    captured.stop().expect("stopped");
}

/// The source is the one that the kernel chooses for the destination (RFC 6724), not for the route.
#[test]
fn of_several_ipv6_addresses_the_closest_is_the_source() {
    let agent = Capture::agent().expect("the agent");
    for capture in [&Capture::Iptables(Backend::Nft), &agent] {
        let fixture = SocketsFixture::new("rfc6724", ProxyBind::Wildcard);
        for own in ["2001:db8:a::2/64", "2001:db8:b::2/64", "2001:db8:b:8000::2/64"] {
            fixture.pod.netns.add_address("eth0", own.parse().expect("an address")).expect("added");
        }
        let captured = capture.start(&IptablesOptions::injected(), &fixture.pod).expect("captured");
        for (to, own) in [
            ("2001:db8:a:1::9", "2001:db8:a::2"),
            ("2001:db8:b:1::9", "2001:db8:b::2"),
            ("2001:db8:b:9000::9", "2001:db8:b:8000::2"),
        ] {
            let steps = [Open(Tcp6), Connect(at(&format!("[{to}]:80"))), Name, Read];
            let outcomes = steps::run(&fixture.pod, Ids::APP, &steps).expect("run");
            let read = format!("outbound for [{to}]:80 from [{own}]:*");
            assert_eq!(outcomes[2..], [format!("[{own}]:*"), read], "{capture:?}: {to}");
        }
        captured.stop().expect("stopped");
    }
}

/// A link-local destination. Under iptables the connection fails, because the destination binds the socket to its
/// interface.
#[test]
fn the_source_of_a_link_local_destination_is_on_its_link() {
    let fixture = SocketsFixture::new("link-local", ProxyBind::Wildcard);
    let index = fixture.pod.netns.link_index("eth0").expect("an index");
    let to = std::net::SocketAddrV6::new("fe80::1234".parse().expect("an address"), 80, 0, index);
    let agent = Capture::agent().expect("the agent");
    let captured = agent.start(&IptablesOptions::injected(), &fixture.pod).expect("captured");
    let steps = [Open(Tcp6), Connect(to.into()), Name, Peer, Read];
    let outcomes = steps::run(&fixture.pod, Ids::APP, &steps).expect("run");
    assert!(outcomes[2].starts_with("[fe80::"), "{outcomes:?}");
    assert_eq!(outcomes[3], "[fe80::1234]:80");
    assert_eq!(outcomes[4], format!("outbound for [fe80::1234]:80 from {}", outcomes[2]));
    captured.stop().expect("stopped");
}
