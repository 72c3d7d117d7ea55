//! The model of the agent: parses, validates and compiles the command line, and calls `decide` with the entries that
//! would be in the maps.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;

use anyhow::{Context, Result};
use clap::Parser;
use intercept_agent::facade::compile::{Compiled, Entries, compile};
use intercept_agent::facade::options::{NameSource, RawOptions};
use intercept_common::decide::Owner;
use intercept_common::layout::Destination;
use intercept_common::{
    Addr, Decision, InboundFlow, OutboundFlow, PolicyId, PolicyLookup, ProxyListener, Reason, Verdict,
    decide::TproxyMark, decide_inbound, decide_outbound,
};

use super::{ModelFlow, ModelNetns, ModelVerdict};
use crate::iptables::IptablesOptions;

/// A compiled configuration.
#[derive(Debug)]
pub struct AgentModel(Compiled);

#[derive(Debug, Parser)]
#[command(name = "istio-iptables")]
struct ModelArgs {
    #[command(flatten)]
    raw: RawOptions,
}

/// A pod without users, whose name servers are those of the options.
struct CompiledPod(String);

impl NameSource for CompiledPod {
    fn user(&self, _: &str) -> io::Result<Option<u32>> {
        Ok(None)
    }
    fn group(&self, _: &str) -> io::Result<Option<u32>> {
        Ok(None)
    }
    fn resolv_conf(&self) -> io::Result<String> {
        Ok(self.0.clone())
    }
}

/// The entries instead of the maps. `marked` and `bypass` are what the connect hook stored for the connection.
struct InMemory<'a> {
    entries: &'a Entries,
    mark: TproxyMark,
}

impl PolicyLookup for InMemory<'_> {
    fn destination(&self, _: PolicyId, addr: Addr) -> Destination {
        let covering = self.entries.destinations.iter().filter(|(len, net, _)| covers(*len, *net, addr));
        let longest = covering.max_by_key(|(len, ..)| *len);
        longest.map_or(Destination { flags: 0, source: Addr::UNSPECIFIED }, |(_, _, value)| *value)
    }
    fn port(&self, _: PolicyId, port: u16) -> u32 {
        self.entries.ports.iter().find(|p| p.contains(port)).map_or(0, |p| p.bits)
    }
    fn group(&self, _: PolicyId, gid: u32) -> bool {
        self.entries.groups.contains_key(&gid)
    }
    fn interface(&self, _: PolicyId, ifindex: u32) -> u32 {
        self.entries.interfaces.get(&ifindex).copied().unwrap_or(0)
    }
    fn is_marked(&self) -> bool {
        self.mark == TproxyMark::Steered
    }
    fn is_bypass(&self) -> bool {
        self.mark == TproxyMark::Bypass
    }
}

fn covers(len: u32, net: Addr, addr: Addr) -> bool {
    let bits = |addr: Addr| u128::from_be_bytes(bytes(addr));
    let differing = bits(net) ^ bits(addr);
    len == 0 || differing >> (128 - len) == 0
}

fn bytes(addr: Addr) -> [u8; 16] {
    let mut bytes = [0; 16];
    for (to, word) in bytes.chunks_exact_mut(4).zip(addr.words()) {
        to.copy_from_slice(&word.to_ne_bytes());
    }
    bytes
}

impl AgentModel {
    /// Compiles the options as `attach` would.
    pub fn new(options: &IptablesOptions, netns: &ModelNetns) -> Result<Self> {
        let arguments = options.arguments(Path::new(""));
        let environment: HashMap<_, _> = options.environment().into_iter().collect();
        let line = std::iter::once("istio-iptables".to_owned()).chain(arguments);
        let raw = ModelArgs::try_parse_from(line).context("reading the command line")?.raw;
        let raw = raw.read_env(|name| environment.get(name).cloned());
        let (config, ..) =
            raw.validate(&CompiledPod(options.resolv_conf())).context("validating the options")?;
        Ok(Self(compile(&config, &netns.snapshot())))
    }

    /// The verdict on a flow, and the row that decides it.
    pub fn verdict(&self, netns: &ModelNetns, flow: &ModelFlow) -> (ModelVerdict, Reason) {
        let decision = match flow {
            ModelFlow::Made { .. } => self.made(netns, flow),
            ModelFlow::Arriving { link, from, to } => {
                self.arriving(*link, (*from).into(), *to, TproxyMark::None)
            }
        };
        (self.say(decision), decision.reason)
    }

    fn say(&self, decision: Decision) -> ModelVerdict {
        let policy = &self.0.policy;
        match decision.verdict {
            _ if decision.reason == Reason::NoRoute => ModelVerdict::Unroutable,
            Verdict::Pass => ModelVerdict::Passed,
            Verdict::Redirect(ProxyListener::Outbound) => ModelVerdict::To(policy.outbound_port),
            Verdict::Redirect(ProxyListener::Inbound) => ModelVerdict::To(policy.inbound_port),
            Verdict::Redirect(ProxyListener::Dns) => ModelVerdict::To(policy.dns_port),
        }
    }

    /// The decision of the connect hook, or that of sk_lookup where the connection passes over lo.
    fn made(&self, netns: &ModelNetns, flow: &ModelFlow) -> Decision {
        let ModelFlow::Made { udp, from, to, owner, mark } = flow else {
            unreachable!("only called for these")
        };
        let asked = OutboundFlow {
            protocol: if *udp { 17 } else { 6 },
            dst: to.ip().into(),
            dst_port: to.port(),
            src: from.map_or(Addr::UNSPECIFIED, Addr::from),
            owner: Owner { uid: owner.uid, gid: owner.gid },
            mark: *mark,
            container: 0,
        };
        let lookup = InMemory { entries: &self.0.entries, mark: TproxyMark::None };
        let decided = decide_outbound(&self.0.policy, &asked, &lookup);
        let left = decided.decision.verdict == Verdict::Pass && decided.decision.reason != Reason::NoRoute;
        let over_lo = netns.egress(to.ip()).is_some_and(|(out, _)| out == "lo");
        if !left || !over_lo || *udp || to.ip().is_loopback() {
            assert_ne!(decided.mark, TproxyMark::Steered, "marked, and never looked up: {decided:?}");
            return decided.decision;
        }
        // The source is any address of the pod; the proxy may also connect from the address of a client.
        let from = from.map_or(decided.source, Addr::from);
        let from = if from.is_unspecified() { asked.dst } else { from };
        let from = if decided.mark == TproxyMark::Bypass { somebody(*to) } else { from };
        let arrived = self.arriving(0, from, *to, decided.mark);
        match arrived.verdict {
            Verdict::Pass => decided.decision,
            Verdict::Redirect(_) => arrived,
        }
    }

    fn arriving(&self, link: usize, from: Addr, to: SocketAddr, mark: TproxyMark) -> Decision {
        let ifindex = u32::try_from(link + 1).expect("a handful of interfaces");
        let flow = InboundFlow { dst: to.ip().into(), dst_port: to.port(), src: from, ifindex };
        decide_inbound(&self.0.policy, &flow, &InMemory { entries: &self.0.entries, mark })
    }
}

/// An address that is in no namespace.
fn somebody(of: SocketAddr) -> Addr {
    let addr: IpAddr = match of {
        SocketAddr::V4(_) => Ipv4Addr::new(240, 0, 0, 1).into(),
        SocketAddr::V6(_) => Ipv6Addr::new(0x4001, 0, 0, 0, 0, 0, 0, 1).into(),
    };
    addr.into()
}
