//! The user that made a socket counts, not the user that connects it, as with the owner match of iptables.

use tests::differential::Capture;
use tests::iptables::{Backend, IptablesOptions};
use tests::testbed::Ids;
use tests::unusual::fixture::{Made, under};
use tests::unusual::{Method, UnusualSocket};

const IPTABLES: Capture = Capture::Iptables(Backend::Nft);

/// Both captures, and the servers that answer captured and other flows.
fn expect(method: Method, made_by: Ids, used_by: Ids, server: &str) {
    let to = "198.51.100.7:80".parse().expect("an address");
    let unusual = UnusualSocket { made_by, used_by, ..UnusualSocket::new(method, to) };
    for capture in [IPTABLES, Capture::agent().expect("the agent")] {
        let outcome = under(&capture, &IptablesOptions::injected(), &unusual, Made::After).expect("slipped");
        assert_eq!(outcome.server(), server, "{capture:?}: {unusual:?}: {outcome:?}");
        assert_eq!(outcome.peers, [to], "{capture:?}: {unusual:?}: {outcome:?}");
    }
}

#[test]
fn setresuid_after_socket_changes_nothing() {
    expect(Method::Plain, Ids::APP, Ids::PROXY, "outbound");
    expect(Method::Plain, Ids::PROXY, Ids::APP, "world");
    // Only the group.
    let group = Ids { uid: 1000, gid: 1337 };
    expect(Method::Plain, group, Ids::APP, "world");
}

#[test]
fn a_socket_that_is_passed_stays_its_makers() {
    expect(Method::Passed, Ids::APP, Ids::PROXY, "outbound");
    expect(Method::Passed, Ids::PROXY, Ids::APP, "world");
}

#[test]
fn a_setuid_program_counts_as_its_owner() {
    expect(Method::SetUserId, Ids::PROXY, Ids::APP, "world");
    expect(Method::SetUserId, Ids::APP, Ids::PROXY, "outbound");
}

/// The options contain ids of the pod's user namespace.
#[test]
fn ids_are_those_inside_a_user_namespace() {
    let agent = Capture::agent().expect("the agent");
    for (ids, server) in [(Ids::PROXY, "world"), (Ids::APP, "outbound")] {
        let unusual = UnusualSocket {
            made_by: ids,
            used_by: ids,
            user_namespace: Some(100_000),
            ..UnusualSocket::new(Method::Plain, "198.51.100.7:80".parse().expect("an address"))
        };
        let outcome = under(&agent, &IptablesOptions::injected(), &unusual, Made::Before).expect("slipped");
        assert_eq!(outcome.server(), server, "{unusual:?}: {outcome:?}");
    }
}
