//! Sockets in ways that are rarer than those of `sockets.rs`: each sequence of calls under iptables and under the agent.

use tests::differential::Capture;
use tests::iptables::{Backend, IptablesCidrs, IptablesOptions};
use tests::steps::compared::{ProxyBind, as_iptables, at, same, tproxy, under};
use tests::steps::{SocketKind, Step};
use tests::testbed::Ids;

use SocketKind::{Mptcp4, Tcp4, Tcp6};
use Step::{
    AwaitConnection, Bind, Connect, Disconnect, FastOpen, Name, Nonblocking, Open, Peer, Read, Shutdown,
    UnicastInterface,
};

fn option(level: i32, name: i32) -> Step {
    Step::Option { level, name, value: 1u32.to_ne_bytes().to_vec() }
}

fn bind_without_port() -> Step {
    option(libc::IPPROTO_IP, libc::IP_BIND_ADDRESS_NO_PORT)
}

fn fast_open() -> Step {
    option(libc::IPPROTO_TCP, libc::TCP_FASTOPEN_CONNECT)
}

fn mark(mark: u32) -> Step {
    Step::Option { level: libc::SOL_SOCKET, name: libc::SO_MARK, value: mark.to_ne_bytes().to_vec() }
}

fn bind_to_device(name: &str) -> Step {
    Step::Option { level: libc::SOL_SOCKET, name: libc::SO_BINDTODEVICE, value: name.as_bytes().to_vec() }
}

/// Nothing listens where outbound connections go.
fn refused() -> IptablesOptions {
    IptablesOptions { envoy_port: 15009, ..IptablesOptions::injected() }
}

/// For both places where the proxy may listen.
fn wherever_the_proxy_is(options: &IptablesOptions, ids: Ids, steps: &[Step], expected: &[&str]) {
    for proxy in [ProxyBind::Wildcard, ProxyBind::Localhost] {
        same(options, proxy, ids, steps, expected);
    }
}

#[test]
fn an_unspecified_mapped_destination_with_lists() {
    let nets = ["127.0.0.0/8", "10.66.0.0/24"].map(|net| net.parse().expect("a network"));
    let options = IptablesOptions {
        include_cidrs: IptablesCidrs::List(nets.to_vec()),
        exclude_cidrs: vec!["127.0.0.1/32".parse().expect("a network")],
        ..IptablesOptions::injected()
    };
    let check =
        |steps: &[Step], expected: &[&str]| same(&options, ProxyBind::Wildcard, Ids::APP, steps, expected);
    let read = "outbound for 10.66.0.2:8080 from 10.66.0.2:*";
    check(
        &[Open(Tcp6), Bind(at("[::ffff:10.66.0.2]:0")), Connect(at("[::ffff:0.0.0.0]:8080")), Peer, Read],
        &["ok", "ok", "ok", "[::ffff:10.66.0.2]:8080", read],
    );
    check(
        &[Open(Tcp6), Connect(at("[::ffff:0.0.0.0]:8080")), Peer, Read],
        &["ok", "ok", "[::ffff:127.0.0.1]:8080", "app from 127.0.0.1:*"],
    );
    check(
        &[Open(Tcp4), Bind(at("127.0.0.2:0")), Connect(at("0.0.0.0:8080")), Peer, Read],
        &["ok", "ok", "ok", "127.0.0.2:8080", "outbound for 127.0.0.2:8080 from 127.0.0.2:*"],
    );
}

#[test]
fn a_source_that_the_process_chose() {
    for (kind, from, to, shown) in [
        (Tcp4, "10.67.0.2:0", "10.96.0.10:80", "10.67.0.2:*"),
        (Tcp6, "[fd67::2]:0", "[fd96::10]:80", "[fd67::2]:*"),
        (Tcp6, "[::1]:0", "[fd96::10]:80", "[::1]:*"),
    ] {
        let read = format!("outbound for {to} from {shown}");
        let steps = [Open(kind), Bind(at(from)), Connect(at(to)), Name, Peer, Read];
        wherever_the_proxy_is(
            &IptablesOptions::injected(),
            Ids::APP,
            &steps,
            &["ok", "ok", "ok", shown, to, &read],
        );
    }
    // Which cannot leave by the route of the destination.
    for from in ["127.0.0.1:0", "127.0.0.6:0"] {
        as_iptables(&[Open(Tcp4), Bind(at(from)), Connect(at("10.96.0.10:80"))], &["ok", "ok", "EINVAL"]);
    }
    let name = "[fd66::2]:*";
    let read = "outbound for [fd96::10]:80 from [fd66::2]:*";
    as_iptables(
        &[Open(Tcp6), bind_without_port(), Bind(at("[fd66::2]:0")), Connect(at("[fd96::10]:80")), Name, Read],
        &["ok", "ok", "ok", "ok", name, read],
    );
    let port = option(libc::SOL_SOCKET, libc::SO_REUSEPORT);
    let one = |to: &str| [Open(Tcp6), port.clone(), Bind(at("[fd66::2]:5560")), Connect(at(to))];
    as_iptables(
        &[one("[fd96::10]:80"), one("[fd96::10]:443"), one("[fd96::10]:80")].concat(),
        &["ok", "ok", "ok", "ok", "ok", "ok", "ok", "ok", "ok", "ok", "ok", "EADDRNOTAVAIL"],
    );
}

#[test]
fn connections_that_are_not_waited_for() {
    let (name, read) = ("10.66.0.2:*", "outbound for 10.96.0.10:80 from 10.66.0.2:*");
    let (first, second) = (Connect(at("10.96.0.10:80")), Connect(at("10.96.0.11:443")));
    wherever_the_proxy_is(
        &IptablesOptions::injected(),
        Ids::APP,
        &[Open(Tcp4), Nonblocking, first.clone(), second.clone(), AwaitConnection, second, Name, Peer, Read],
        &["ok", "ok", "EINPROGRESS", "ok", "ok", "EISCONN", name, "10.96.0.10:80", read],
    );
    // The name stays until the next connect(), whatever that is.
    wherever_the_proxy_is(
        &refused(),
        Ids::APP,
        &[
            Open(Tcp4),
            Nonblocking,
            first.clone(),
            AwaitConnection,
            Peer,
            Name,
            Connect(at("127.0.0.1:8080")),
            Name,
        ],
        &["ok", "ok", "EINPROGRESS", "ECONNREFUSED", "ENOTCONN", name, "ECONNABORTED", "0.0.0.0:*"],
    );
    same(
        &refused(),
        ProxyBind::Wildcard,
        Ids::APP,
        &[Open(Tcp6), Nonblocking, Connect(at("[fd96::10]:80")), AwaitConnection, Name, Disconnect, Name],
        &["ok", "ok", "EINPROGRESS", "ECONNREFUSED", "[fd66::2]:*", "ok", "[::]:*"],
    );
    // Another source than that of the default route.
    same(
        &refused(),
        ProxyBind::Wildcard,
        Ids::APP,
        &[Open(Tcp4), Nonblocking, Connect(at("172.20.0.5:80")), AwaitConnection, Name],
        &["ok", "ok", "EINPROGRESS", "ECONNREFUSED", "10.67.0.2:*"],
    );
    same(
        &refused(),
        ProxyBind::Wildcard,
        Ids::APP,
        &[
            Open(Tcp4),
            first.clone(),
            Peer,
            Name,
            Open(Mptcp4),
            first,
            Peer,
            Connect(at("127.0.0.1:8080")),
            Read,
        ],
        &[
            "ok",
            "ECONNREFUSED",
            "ENOTCONN",
            "0.0.0.0:*",
            "ok",
            "ECONNREFUSED",
            "ENOTCONN",
            "ok",
            "app from 127.0.0.1:*",
        ],
    );
}

#[test]
fn sockets_that_are_connected_again() {
    let (name, first) = ("10.66.0.2:*", "outbound for 10.96.0.10:80 from 10.66.0.2:*");
    as_iptables(
        &[
            Open(Tcp4),
            Connect(at("10.96.0.10:80")),
            Connect(at("127.0.0.1:8080")),
            Name,
            Read,
            Disconnect,
            Peer,
            Name,
            Connect(at("10.96.0.11:443")),
            Name,
            Peer,
        ],
        &["ok", "ok", "EISCONN", name, first, "ok", "ENOTCONN", "0.0.0.0:*", "ok", name, "10.96.0.11:443"],
    );
    as_iptables(
        &[
            Open(Tcp4),
            Disconnect,
            Connect(at("10.96.0.10:80")),
            Disconnect,
            Disconnect,
            Bind(at("10.66.0.2:0")),
            Name,
        ],
        &["ok", "ok", "ok", "ok", "ok", "ok", name],
    );
    as_iptables(
        &[
            Open(Tcp6),
            Connect(at("[fd96::10]:80")),
            Shutdown,
            Disconnect,
            Connect(at("[::1]:8080")),
            Name,
            Read,
        ],
        &["ok", "ok", "ok", "ok", "ok", "[::1]:*", "app from [::1]:*"],
    );
    let mapped = "[::ffff:10.66.0.2]:5556";
    as_iptables(
        &[
            Open(Tcp6),
            Bind(at(mapped)),
            Connect(at("[::ffff:10.96.0.10]:80")),
            Read,
            Disconnect,
            Name,
            Connect(at("[::ffff:127.0.0.1]:8080")),
            Name,
            Read,
        ],
        &[
            "ok",
            "ok",
            "ok",
            "outbound for 10.96.0.10:80 from 10.66.0.2:5556",
            "ok",
            mapped,
            "ok",
            mapped,
            "app from 10.66.0.2:5556",
        ],
    );
    as_iptables(
        &[
            Open(Tcp4),
            Bind(at("0.0.0.0:5557")),
            Connect(at("10.96.0.10:80")),
            Name,
            Disconnect,
            Name,
            Connect(at("127.0.0.1:8080")),
            Read,
        ],
        &["ok", "ok", "ok", "10.66.0.2:5557", "ok", "0.0.0.0:5557", "ok", "app from 127.0.0.1:5557"],
    );
    as_iptables(
        &[Open(Mptcp4), Connect(at("10.96.0.10:80")), Disconnect, Connect(at("127.0.0.1:8080")), Name, Read],
        &["ok", "ok", "ok", "ok", "127.0.0.1:*", "app from 127.0.0.1:*"],
    );
    same(
        &IptablesOptions::injected(),
        ProxyBind::Wildcard,
        Ids::PROXY,
        &[
            Open(Tcp6),
            Connect(at("[fd66::2]:8080")),
            Read,
            Disconnect,
            Connect(at("[fd96::10]:80")),
            Name,
            Read,
        ],
        &[
            "ok",
            "ok",
            "inbound for [fd66::2]:8080 from [fd66::2]:*",
            "ok",
            "ok",
            "[fd66::2]:*",
            "world from [fd66::2]:*",
        ],
    );
}

#[test]
fn data_with_the_syn() {
    for (kind, to, name, read) in [
        (Tcp4, "10.96.0.10:80", "10.66.0.2:*", "outbound for 10.96.0.10:80 from 10.66.0.2:*"),
        (Tcp6, "[fd96::10]:80", "[fd66::2]:*", "outbound for [fd96::10]:80 from [fd66::2]:*"),
        (
            Tcp6,
            "[::ffff:10.96.0.10]:80",
            "[::ffff:10.66.0.2]:*",
            "outbound for 10.96.0.10:80 from 10.66.0.2:*",
        ),
    ] {
        as_iptables(&[Open(kind), FastOpen(at(to)), Name, Peer, Read], &["ok", "ok", name, to, read]);
        as_iptables(
            &[Open(kind), fast_open(), Connect(at(to)), Name, Peer, Read],
            &["ok", "ok", "ok", name, to, read],
        );
    }
    same(
        &refused(),
        ProxyBind::Wildcard,
        Ids::APP,
        &[Open(Tcp4), FastOpen(at("10.96.0.10:80")), Peer, FastOpen(at("127.0.0.1:8080")), Peer, Read],
        &["ok", "ECONNREFUSED", "ENOTCONN", "ok", "127.0.0.1:8080", "app from 127.0.0.1:*"],
    );
}

#[test]
fn an_interface_or_a_mark_that_the_process_chose() {
    let eth = |n: u8| UnicastInterface(format!("eth{n}"));
    let check = |options: &IptablesOptions, steps: &[Step], expected: &[&str]| {
        same(options, ProxyBind::Wildcard, Ids::ROOT, steps, expected);
    };
    let injected = IptablesOptions::injected();
    for (step, kind, to, read) in [
        (eth(0), Tcp4, "10.96.0.10:80", "outbound for 10.96.0.10:80 from 10.66.0.2:*"),
        (eth(0), Tcp6, "[fd96::10]:80", "outbound for [fd96::10]:80 from [fd66::2]:*"),
        (eth(1), Tcp4, "172.20.0.5:80", "outbound for 172.20.0.5:80 from 10.67.0.2:*"),
        (mark(1337), Tcp4, "10.96.0.10:80", "outbound for 10.96.0.10:80 from 10.66.0.2:*"),
        (bind_to_device("lo"), Tcp4, "127.0.0.1:8080", "app from 127.0.0.1:*"),
    ] {
        check(&injected, &[Open(kind), step, Connect(at(to)), Peer, Read], &["ok", "ok", "ok", to, read]);
    }
    for step in [eth(1), bind_to_device("eth1")] {
        check(
            &IptablesOptions { exclude_interfaces: vec!["eth1".into()], ..IptablesOptions::injected() },
            &[Open(Tcp4), step, Connect(at("172.20.0.5:80")), Name, Read],
            &["ok", "ok", "ok", "10.67.0.2:*", "world from 10.67.0.2:*"],
        );
    }
    let read = "outbound for 10.96.0.10:80 from 10.66.0.2:*";
    check(
        &tproxy(),
        &[Open(Tcp4), mark(1338), Connect(at("10.96.0.10:80")), Read],
        &["ok", "ok", "ok", read],
    );
    check(
        &tproxy(),
        &[Open(Tcp4), mark(1337), Connect(at("10.66.0.2:8080")), Read],
        &["ok", "ok", "ok", "app from 10.66.0.2:*"],
    );
    // Transparent, without and with an address that is nobody's: answers to that are lost.
    let transparent = || option(libc::IPPROTO_IP, libc::IP_TRANSPARENT);
    check(
        &injected,
        &[Open(Tcp4), transparent(), Connect(at("10.96.0.10:80")), Read],
        &["ok", "ok", "ok", read],
    );
    check(
        &injected,
        &[Open(Tcp4), transparent(), Bind(at("10.9.9.9:0")), Connect(at("10.96.0.10:80"))],
        &["ok", "ok", "ok", "EINPROGRESS"],
    );
}

/// Where a redirect and the socket's own choice exclude each other, both ways of capturing fail, each in its way. Nothing
/// gets around the proxy.
#[test]
fn what_is_bound_to_an_interface_does_not_get_around_the_proxy() {
    let agent = Capture::agent().expect("the agent");
    let iptables = Capture::Iptables(Backend::Nft);
    let connect = |capture: &Capture, options: &IptablesOptions, kind, step: &Step, to: &str| {
        let steps = [Open(kind), step.clone(), Connect(at(to)), Read];
        under(capture, options, ProxyBind::Wildcard, Ids::ROOT, &steps).split_off(2)
    };
    let (injected, eth0) = (IptablesOptions::injected(), bind_to_device("eth0"));
    let lost = ["EINPROGRESS", "EAGAIN"];
    for capture in [&iptables, &agent] {
        assert_eq!(connect(capture, &injected, Tcp4, &eth0, "10.96.0.10:80"), lost, "{capture:?}");
    }
    assert_eq!(connect(&iptables, &injected, Tcp6, &eth0, "[fd96::10]:80"), lost);
    assert_eq!(connect(&agent, &injected, Tcp6, &eth0, "[fd96::10]:80"), ["ENETUNREACH", "ENOTCONN"]);
    // The proxy's own mark on a client's socket, in TPROXY mode: iptables routes it to the pod itself.
    let (options, own) = (tproxy(), mark(1337));
    let dial = |capture| connect(capture, &options, Tcp4, &own, "10.96.0.10:80");
    assert_eq!(dial(&iptables), ["ENETUNREACH", "ENOTCONN"]);
    assert_eq!(dial(&agent), ["ok", "outbound for 10.96.0.10:80 from 10.66.0.2:*"]);
}
