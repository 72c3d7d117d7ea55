//! Who made a socket counts, not who connects it: as under iptables, whose owner match looks at the socket.

use tests::differential::Capture;
use tests::iptables::{Backend, Options};
use tests::slip::bed::{Made, under};
use tests::slip::{Manner, Slip};
use tests::testbed::Ids;

const IPTABLES: Capture = Capture::Iptables(Backend::Nft);

/// Both ways of capture, and who answers what is captured and what is not.
fn expect(manner: Manner, made_by: Ids, used_by: Ids, server: &str) {
    let to = "198.51.100.7:80".parse().expect("an address");
    let slip = Slip { made_by, used_by, ..Slip::new(manner, to) };
    for capture in [IPTABLES, Capture::agent().expect("the agent")] {
        let slipped = under(&capture, &Options::injected(), &slip, Made::After).expect("slipped");
        assert_eq!(slipped.server(), server, "{capture:?}: {slip:?}: {slipped:?}");
        assert_eq!(slipped.peers, [to], "{capture:?}: {slip:?}: {slipped:?}");
    }
}

#[test]
fn setresuid_after_socket_changes_nothing() {
    expect(Manner::Plain, Ids::APP, Ids::PROXY, "outbound");
    expect(Manner::Plain, Ids::PROXY, Ids::APP, "world");
    // The group alone.
    let group = Ids { uid: 1000, gid: 1337 };
    expect(Manner::Plain, group, Ids::APP, "world");
}

#[test]
fn a_socket_that_is_passed_stays_its_makers() {
    expect(Manner::Passed, Ids::APP, Ids::PROXY, "outbound");
    expect(Manner::Passed, Ids::PROXY, Ids::APP, "world");
}

#[test]
fn a_setuid_program_counts_as_its_owner() {
    expect(Manner::SetUserId, Ids::PROXY, Ids::APP, "world");
    expect(Manner::SetUserId, Ids::APP, Ids::PROXY, "outbound");
}

/// The options mean the ids inside the pod's user namespace.
#[test]
fn ids_are_those_inside_a_user_namespace() {
    let agent = Capture::agent().expect("the agent");
    for (ids, server) in [(Ids::PROXY, "world"), (Ids::APP, "outbound")] {
        let slip = Slip {
            made_by: ids,
            used_by: ids,
            user_namespace: Some(100_000),
            ..Slip::new(Manner::Plain, "198.51.100.7:80".parse().expect("an address"))
        };
        let slipped = under(&agent, &Options::injected(), &slip, Made::Before).expect("slipped");
        assert_eq!(slipped.server(), server, "{slip:?}: {slipped:?}");
    }
}
