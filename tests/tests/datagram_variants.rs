//! Datagram sockets in ways that are rarer than those of `sockets.rs`: each sequence of calls under iptables and under the
//! agent.

use tests::iptables::IptablesOptions;
use tests::steps::SocketKind::{Udp4, Udp6};
use tests::steps::Step::{self, Ask, AskAll, AskAt, Bind, Connect, Disconnect, Name, Open, Peer};
use tests::steps::compared::{ProxyBind, at, dns, same, with_dns};
use tests::testbed::Ids;

#[test]
fn queries_by_sockets_that_are_used_in_every_way() {
    let options = IptablesOptions { exclude_interfaces: vec!["eth1".into()], ..dns() };
    let check =
        |steps: &[Step], expected: &[&str]| same(&options, ProxyBind::Wildcard, Ids::APP, steps, expected);
    check(
        &[
            Open(Udp4),
            Connect(at("10.96.0.10:53")),
            Connect(at("10.96.0.11:53")),
            Ask,
            Connect(at("10.66.0.1:7777")),
            Ask,
            Connect(at("10.96.0.12:53")),
            Peer,
            Ask,
            Disconnect,
            Peer,
            Name,
            AskAt(at("10.66.0.1:7777")),
            AskAt(at("10.96.0.13:53")),
        ],
        &[
            "ok",
            "ok",
            "ok",
            "dns by 10.96.0.11:53",
            "ok",
            "world by 10.66.0.1:7777",
            "ok",
            "10.96.0.12:53",
            "dns by 10.96.0.12:53",
            "ok",
            "ENOTCONN",
            "0.0.0.0:0",
            "world by 10.66.0.1:7777",
            "dns by 10.96.0.13:53",
        ],
    );
    // A connected socket hears its own server alone.
    check(
        &[
            Open(Udp6),
            Connect(at("[fd96::10]:53")),
            AskAt(at("[fd96::11]:53")),
            AskAt(at("[fd66::1]:7777")),
            Ask,
        ],
        &["ok", "ok", "EAGAIN", "EAGAIN", "dns by [fd96::10]:53"],
    );
    check(
        &[
            Open(Udp4),
            Connect(at("10.66.0.1:7777")),
            Ask,
            Connect(at("10.96.0.10:53")),
            Name,
            Ask,
            Connect(at("172.20.0.5:53")),
            Name,
            Ask,
        ],
        &[
            "ok",
            "ok",
            "world by 10.66.0.1:7777",
            "ok",
            "10.66.0.2:*",
            "dns by 10.96.0.10:53",
            "ok",
            "10.66.0.2:*",
            "world by 172.20.0.5:53",
        ],
    );
    check(
        &[
            Open(Udp4),
            AskAt(at("10.96.0.10:53")),
            Connect(at("10.96.0.11:53")),
            Ask,
            Disconnect,
            AskAt(at("127.0.0.1:7777")),
        ],
        &["ok", "dns by 10.96.0.10:53", "ok", "dns by 10.96.0.11:53", "ok", "app by 127.0.0.1:7777"],
    );
    check(
        &[
            Open(Udp4),
            Bind(at("0.0.0.0:5558")),
            Connect(at("10.96.0.10:53")),
            Name,
            Ask,
            Disconnect,
            Name,
            AskAt(at("127.0.0.1:7777")),
        ],
        &[
            "ok",
            "ok",
            "ok",
            "10.66.0.2:5558",
            "dns by 10.96.0.10:53",
            "ok",
            "0.0.0.0:5558",
            "app by 127.0.0.1:7777",
        ],
    );
    // One of both families.
    check(
        &[
            Open(Udp6),
            Connect(at("[::ffff:10.96.0.10]:53")),
            Name,
            Ask,
            Disconnect,
            Name,
            Connect(at("[fd96::10]:53")),
            Name,
            Ask,
        ],
        &[
            "ok",
            "ok",
            "[::ffff:10.66.0.2]:*",
            "dns by [::ffff:10.96.0.10]:53",
            "ok",
            "[::]:0",
            "ok",
            "[fd66::2]:*",
            "dns by [fd96::10]:53",
        ],
    );
}

#[test]
fn several_queries_in_one_call() {
    let all = |to: &[&str]| AskAll(to.iter().map(|to| at(to)).collect());
    with_dns(
        &[Open(Udp4), all(&["10.96.0.10:53", "10.96.0.11:53", "10.66.0.1:7777"])],
        &["ok", "dns by 10.96.0.10:53, dns by 10.96.0.11:53, world by 10.66.0.1:7777"],
    );
    with_dns(
        &[Open(Udp6), all(&["[fd96::10]:53", "[::ffff:10.96.0.11]:53", "[fd66::1]:7777"])],
        &["ok", "dns by [::ffff:10.96.0.11]:53, dns by [fd96::10]:53, world by [fd66::1]:7777"],
    );
}
