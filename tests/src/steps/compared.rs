//! The same socket calls under iptables and under the agent: a pod with a proxy, an application and a name server, and
//! a world that answers.

use std::net::{IpAddr, SocketAddr};

use super::{Step, StepOutcome, run};
use crate::actor::{Actor, Bind, Listen, Transport};
use crate::differential::Capture;
use crate::iptables::{Backend, IptablesDns, IptablesOptions, Tproxy};
use crate::testbed::{Ids, Pod, PodSpec};

/// Where the proxy listens.
#[derive(Debug, Clone, Copy)]
pub enum ProxyBind {
    /// On 0.0.0.0 and `::`.
    Wildcard,
    /// On 127.0.0.1 and ::1.
    Localhost,
}

/// A pod with two interfaces in which the proxy, applications and a name server answer, and the world does.
#[derive(Debug)]
pub struct SocketsFixture {
    /// Listens in the pod.
    pub inside: Actor,
    _world: Actor,
    /// The pod.
    pub pod: Pod,
}

impl SocketsFixture {
    /// A new one, which is not captured.
    ///
    /// # Panics
    /// If it cannot be made.
    pub fn new(label: &str, proxy: ProxyBind) -> Self {
        let pod = Pod::new(PodSpec::new(label).with_eth1()).expect("a pod");
        let inside = Actor::start(&pod).expect("an actor");
        let world = Actor::start(pod.neighbour()).expect("an actor");
        for (any, localhost) in [("0.0.0.0", "127.0.0.1"), ("::", "::1")] {
            let at = if matches!(proxy, ProxyBind::Wildcard) { any } else { localhost };
            for (name, port) in [("outbound", 15001), ("inbound", 15006), ("dns", 15053)] {
                listen(&inside, name, Transport::Tcp, Ids::PROXY, at, port);
            }
            listen(&inside, "dns", Transport::Udp, Ids::PROXY, localhost, 15053);
            listen(&inside, "app", Transport::Tcp, Ids::APP, any, 8080);
            listen(&inside, "app", Transport::Udp, Ids::APP, any, 53);
            listen(&inside, "app", Transport::Udp, Ids::APP, any, 7777);
            for port in [80, 443, 3306] {
                listen(&world, "world", Transport::Tcp, Ids::ROOT, any, port);
            }
            for port in [53, 7777] {
                listen(&world, "world", Transport::Udp, Ids::ROOT, any, port);
            }
        }
        Self { inside, _world: world, pod }
    }
}

fn listen(actor: &Actor, name: &str, transport: Transport, ids: Ids, at: &str, port: u16) {
    let at: IpAddr = at.parse().expect("an address");
    let bind = Bind::new(ids, SocketAddr::new(at, port));
    actor.listen(Listen { name: name.into(), transport, bind }).expect("a listener");
}

/// What these calls give.
///
/// # Panics
/// If a pod cannot be made or captured, or the outcomes are others.
pub fn under(
    capture: &Capture,
    options: &IptablesOptions,
    proxy: ProxyBind,
    ids: Ids,
    steps: &[Step],
) -> Vec<StepOutcome> {
    let fixture = SocketsFixture::new("sockets", proxy);
    let captured = capture.start(options, &fixture.pod).expect("captured");
    let outcomes = run(&fixture.pod, ids, steps).expect("run");
    drop(fixture.inside);
    captured.stop().expect("stopped");
    outcomes
}

/// The same, call by call, as under iptables; and what that is, so that two that fail alike are seen.
///
/// # Panics
/// If a pod cannot be made or captured, or the outcomes are others.
pub fn same(options: &IptablesOptions, proxy: ProxyBind, ids: Ids, steps: &[Step], expected: &[&str]) {
    let agent = Capture::agent().expect("the agent");
    for capture in [&Capture::Iptables(Backend::Nft), &agent] {
        let outcomes = under(capture, options, proxy, ids, steps);
        let pairs: Vec<_> = steps.iter().zip(&outcomes).collect();
        assert_eq!(outcomes, expected, "{capture:?}: {pairs:#?}");
    }
}

/// [`same`] with the flags of Istio's injector, by an application.
///
/// # Panics
/// If a pod cannot be made or captured, or the outcomes are others.
pub fn as_iptables(steps: &[Step], expected: &[&str]) {
    same(&IptablesOptions::injected(), ProxyBind::Wildcard, Ids::APP, steps, expected);
}

/// [`as_iptables`] with all DNS captured.
///
/// # Panics
/// If a pod cannot be made or captured, or the outcomes are others.
pub fn with_dns(steps: &[Step], expected: &[&str]) {
    same(&dns(), ProxyBind::Wildcard, Ids::APP, steps, expected);
}

/// The flags of Istio's injector with all DNS captured.
pub fn dns() -> IptablesOptions {
    IptablesOptions {
        dns: Some(IptablesDns { all: true, servers: Vec::new() }),
        ..IptablesOptions::injected()
    }
}

/// The same in TPROXY mode.
pub fn tproxy() -> IptablesOptions {
    IptablesOptions { tproxy: Some(Tproxy { mark: 1337, table: 133 }), ..IptablesOptions::injected() }
}

/// An address with port.
///
/// # Panics
/// If it is none.
pub fn at(text: &str) -> SocketAddr {
    text.parse().unwrap_or_else(|_| panic!("{text} is not an address with port"))
}
