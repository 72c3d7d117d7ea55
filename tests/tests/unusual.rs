//! Flows that are not made by a plain connect(), under iptables and under the agent. The section Limits of the README lists
//! what the agent does not capture.

use tests::differential::Capture;
use tests::iptables::{Backend, IptablesDns, IptablesOptions};
use tests::testbed::Ids;
use tests::unusual::fixture::{Made, under};
use tests::unusual::{Method, UnusualOutcome, UnusualSocket};

const IPTABLES: Capture = Capture::Iptables(Backend::Nft);
const V4: &str = "198.51.100.7:80";
const V6: &str = "[2001:db8::7]:80";

fn unusual(method: Method, to: &str) -> UnusualSocket {
    UnusualSocket::new(method, to.parse().expect("an address"))
}

fn by(capture: &Capture, unusual: &UnusualSocket, made: Made) -> UnusualOutcome {
    under(capture, &IptablesOptions::injected(), unusual, made).expect("a result")
}

/// Captured as by iptables, and the client sees the destination as its peer.
fn captured(method: &Method, made: Made) {
    for to in [V4, V6] {
        let unusual = unusual(method.clone(), to);
        for capture in [IPTABLES, Capture::agent().expect("the agent")] {
            let outcome = by(&capture, &unusual, made);
            assert_eq!(outcome.server(), "outbound", "{capture:?}: {unusual:?}: {outcome:?}");
            assert_eq!(outcome.peers, unusual.to, "{capture:?}: {unusual:?}: {outcome:?}");
            let own = outcome.own.map(|own| own.ip().to_string());
            let expected = if to == V4 { "10.66.0.2" } else { "fd66::2" };
            assert_eq!(own.as_deref(), Some(expected), "{capture:?}: {unusual:?}: {outcome:?}");
        }
    }
}

#[test]
fn io_uring_is_captured() {
    captured(&Method::IoUring, Made::After);
}

#[test]
fn fast_open_is_captured() {
    captured(&Method::FastOpenSend, Made::After);
    captured(&Method::FastOpenConnect, Made::After);
}

#[test]
fn mptcp_is_captured() {
    captured(&Method::Multipath, Made::After);
}

#[test]
fn a_mark_does_not_avoid_capture() {
    captured(&Method::Mark(1337), Made::After);
}

#[test]
fn a_socket_made_before_capture_is_captured_when_it_connects() {
    captured(&Method::Plain, Made::Before);
}

/// A redirected connection stays in the pod, which a socket bound to eth0 cannot reach, as under iptables.
#[test]
fn a_socket_bound_to_a_device_cannot_connect() {
    let unusual = unusual(Method::Device("eth0".into()), V4);
    let (iptables, agent) = (
        by(&IPTABLES, &unusual, Made::After),
        by(&Capture::agent().expect("the agent"), &unusual, Made::After),
    );
    assert_eq!(iptables, agent);
    assert!(agent.servers[0].is_err(), "{agent:?}");
    // Connections of the proxy are not redirected.
    let unusual = UnusualSocket { made_by: Ids::PROXY, used_by: Ids::PROXY, ..unusual };
    assert_eq!(by(&Capture::agent().expect("the agent"), &unusual, Made::After).server(), "world");
}

/// Not captured, as the README says: a raw socket needs CAP_NET_RAW, and no hook could redirect it.
#[test]
fn a_raw_socket_is_not_captured() {
    let source = "10.66.0.2".parse().expect("an address");
    let unusual = unusual(Method::Raw(source), "10.96.0.10:53");
    let dns = Some(IptablesDns { all: true, servers: Vec::new() });
    let options = IptablesOptions { dns, ..IptablesOptions::injected() };
    let by = |capture| under(&capture, &options, &unusual, Made::After).expect("a result");
    assert_eq!(by(IPTABLES).server(), "dns");
    assert_eq!(by(Capture::agent().expect("the agent")).server(), "world");
}
