//! Expectations that follow from the meaning of the rules, not from the interpreter.

use super::*;
use crate::iptables::options::{Groups, IptablesCidrs, IptablesDns, IptablesPorts, Tproxy};

const APP: Ids = Ids { uid: 1000, gid: 1000 };
const PROXY: Ids = Ids { uid: 1337, gid: 1337 };

fn from_here(owner: Ids, out: &str, from: &str, to: &str) -> Packet {
    let from = SocketAddr::new(from.parse().expect("an address"), 40000);
    let to = to.parse().expect("an address");
    Packet {
        protocol: Protocol::Tcp,
        from,
        to,
        origin: PacketOrigin::Here { out: out.into(), owner, mark: 0 },
    }
}

fn from_outside(on: &str, to: &str) -> Packet {
    let from = "198.51.100.9:40000".parse().expect("an address");
    let to = to.parse().expect("an address");
    Packet { protocol: Protocol::Tcp, from, to, origin: PacketOrigin::Outside { on: on.into() } }
}

#[test]
fn injected() {
    let walker = Walker::new(&IptablesOptions::injected());
    for (packet, verdict) in [
        (from_here(APP, "eth0", "10.66.0.2", "198.51.100.7:80"), IptablesVerdict::Redirect(15001)),
        (from_here(PROXY, "eth0", "10.66.0.2", "198.51.100.7:80"), IptablesVerdict::Pass),
        (from_here(PROXY, "lo", "10.66.0.2", "10.66.0.2:80"), IptablesVerdict::Redirect(15006)),
        (from_here(PROXY, "lo", "10.66.0.2", "10.66.0.2:15008"), IptablesVerdict::Pass),
        (from_here(PROXY, "lo", "127.0.0.6", "10.66.0.2:80"), IptablesVerdict::Pass),
        (from_here(PROXY, "lo", "127.0.0.1", "127.0.0.1:80"), IptablesVerdict::Pass),
        (from_here(PROXY, "lo", "127.0.0.1", "127.0.0.6:15002"), IptablesVerdict::Redirect(15006)),
        (from_here(APP, "lo", "10.66.0.2", "10.66.0.2:80"), IptablesVerdict::Pass),
        (from_here(APP, "eth0", "fd66::2", "[2001:db8::7]:80"), IptablesVerdict::Redirect(15001)),
        (from_here(PROXY, "lo", "::1", "[::6]:15002"), IptablesVerdict::Redirect(15006)),
        (from_outside("eth0", "10.66.0.2:8080"), IptablesVerdict::Redirect(15006)),
        (from_outside("eth0", "10.66.0.2:15090"), IptablesVerdict::Pass),
        (from_outside("eth0", "10.66.0.2:15021"), IptablesVerdict::Redirect(15006)),
        (from_outside("eth0", "10.66.0.2:15008"), IptablesVerdict::Pass),
    ] {
        assert_eq!(walker.walk(&packet), verdict, "{packet:?}");
    }
}

#[test]
fn a_virtual_interface_comes_before_an_excluded_one() {
    let options = IptablesOptions {
        virtual_interfaces: vec!["eth1".into()],
        exclude_interfaces: vec!["eth1".into(), "eth2".into()],
        include_cidrs: IptablesCidrs::List(vec!["10.67.0.0/24".parse().expect("a network")]),
        exclude_cidrs: vec!["10.67.0.2/32".parse().expect("a network")],
        inbound_ports: IptablesPorts::All,
        ..IptablesOptions::default()
    };
    let walker = Walker::new(&options);
    assert_eq!(walker.walk(&from_outside("eth1", "10.67.0.2:80")), IptablesVerdict::Redirect(15001));
    assert_eq!(walker.walk(&from_outside("eth1", "10.66.0.2:80")), IptablesVerdict::Pass);
    assert_eq!(walker.walk(&from_outside("eth2", "10.66.0.2:80")), IptablesVerdict::Pass);
    assert_eq!(walker.walk(&from_outside("eth0", "10.66.0.2:80")), IptablesVerdict::Redirect(15006));
}

#[test]
fn tproxy_takes_the_proxys_connections_to_the_pod() {
    let options =
        IptablesOptions { tproxy: Some(Tproxy { mark: 1337, table: 133 }), ..IptablesOptions::injected() };
    let walker = Walker::new(&options);
    let group_only = Ids { uid: 0, gid: 1337 };
    assert_eq!(walker.walk(&from_outside("eth0", "10.66.0.2:15008")), IptablesVerdict::Tproxy(15006));
    assert_eq!(
        walker.walk(&from_here(group_only, "lo", "10.66.0.2", "10.66.0.2:15008")),
        IptablesVerdict::Tproxy(15006)
    );
    assert_eq!(walker.walk(&from_here(group_only, "lo", "127.0.0.6", "10.66.0.2:80")), IptablesVerdict::Pass);
    assert_eq!(walker.walk(&from_here(APP, "lo", "10.66.0.2", "10.66.0.2:80")), IptablesVerdict::Pass);
    assert_eq!(
        walker.walk(&from_here(PROXY, "lo", "10.66.0.2", "10.66.0.2:80")),
        IptablesVerdict::Redirect(15006)
    );
}

#[test]
fn dns_goes_to_the_agent() {
    let dns = IptablesDns { all: false, servers: vec!["10.96.0.10".parse().expect("an address")] };
    let options = IptablesOptions {
        dns: Some(dns),
        owner_groups: Groups::Except(vec![77]),
        ..IptablesOptions::injected()
    };
    let walker = Walker::new(&options);
    let datagram =
        |owner, to| Packet { protocol: Protocol::Udp, ..from_here(owner, "eth0", "10.66.0.2", to) };
    assert_eq!(walker.walk(&datagram(APP, "10.96.0.10:53")), IptablesVerdict::Redirect(15053));
    assert_eq!(walker.walk(&datagram(APP, "10.96.0.11:53")), IptablesVerdict::Pass);
    assert_eq!(walker.walk(&datagram(PROXY, "10.96.0.10:53")), IptablesVerdict::Pass);
    assert_eq!(walker.walk(&datagram(Ids { uid: 1, gid: 77 }, "10.96.0.10:53")), IptablesVerdict::Pass);
}
