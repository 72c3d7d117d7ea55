//! What slips through elsewhere: every way of making a flow that is not a plain connect(), under iptables and under the
//! agent. What the agent does not capture is in README, section Limits.

use tests::differential::Capture;
use tests::iptables::{Backend, Dns, Options};
use tests::slip::bed::{Made, under};
use tests::slip::{Manner, Slip, Slipped};
use tests::testbed::Ids;

const IPTABLES: Capture = Capture::Iptables(Backend::Nft);
const V4: &str = "198.51.100.7:80";
const V6: &str = "[2001:db8::7]:80";

fn slip(manner: Manner, to: &str) -> Slip {
    Slip::new(manner, to.parse().expect("an address"))
}

fn by(capture: &Capture, slip: &Slip, made: Made) -> Slipped {
    under(capture, &Options::injected(), slip, made).expect("slipped")
}

/// Captured as by iptables, and the client sees whom it dialled.
fn captured(manner: &Manner, made: Made) {
    for to in [V4, V6] {
        let slip = slip(manner.clone(), to);
        for capture in [IPTABLES, Capture::agent().expect("the agent")] {
            let slipped = by(&capture, &slip, made);
            assert_eq!(slipped.server(), "outbound", "{capture:?}: {slip:?}: {slipped:?}");
            assert_eq!(slipped.peers, slip.to, "{capture:?}: {slip:?}: {slipped:?}");
            let own = slipped.own.map(|own| own.ip().to_string());
            let expected = if to == V4 { "10.66.0.2" } else { "fd66::2" };
            assert_eq!(own.as_deref(), Some(expected), "{capture:?}: {slip:?}: {slipped:?}");
        }
    }
}

#[test]
fn io_uring_is_captured() {
    captured(&Manner::IoUring, Made::After);
}

#[test]
fn fast_open_is_captured() {
    captured(&Manner::FastOpenSend, Made::After);
    captured(&Manner::FastOpenConnect, Made::After);
}

#[test]
fn mptcp_is_captured() {
    captured(&Manner::Multipath, Made::After);
}

#[test]
fn a_mark_is_no_way_out() {
    captured(&Manner::Mark(1337), Made::After);
}

#[test]
fn a_socket_made_before_capture_is_captured_when_it_connects() {
    captured(&Manner::Plain, Made::Before);
}

/// What is redirected stays in the pod, which a socket bound to eth0 does not reach: under iptables neither.
#[test]
fn a_socket_bound_to_a_device_reaches_nobody() {
    let slip = slip(Manner::Device("eth0".into()), V4);
    let (iptables, agent) =
        (by(&IPTABLES, &slip, Made::After), by(&Capture::agent().expect("the agent"), &slip, Made::After));
    assert_eq!(iptables, agent);
    assert!(agent.servers[0].is_err(), "{agent:?}");
    // The proxy's own is not redirected.
    let slip = Slip { made_by: Ids::PROXY, used_by: Ids::PROXY, ..slip };
    assert_eq!(by(&Capture::agent().expect("the agent"), &slip, Made::After).server(), "world");
}

/// Not captured, as README says: a raw socket needs CAP_NET_RAW, and calls no hook that could redirect it.
#[test]
fn a_raw_socket_is_not_captured() {
    let source = "10.66.0.2".parse().expect("an address");
    let slip = slip(Manner::Raw(source), "10.96.0.10:53");
    let dns = Some(Dns { all: true, servers: Vec::new() });
    let options = Options { dns, ..Options::injected() };
    let by = |capture| under(&capture, &options, &slip, Made::After).expect("slipped");
    assert_eq!(by(IPTABLES).server(), "dns");
    assert_eq!(by(Capture::agent().expect("the agent")).server(), "world");
}
