//! The same flows in a pod under another mesh's own rules, and in a pod that the agent captures by that mesh's annotations.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use ipnet::{IpNet, Ipv6Net};

use super::case::{DatagramMethod, End, Flow, FlowKind};
use super::observed::Observed;
use super::{layout, run};
use crate::actor::{Actor, Bind, Listen, Transport};
use crate::agent::succeed;
use crate::iptables::chains::PASSTHROUGH_V6;
use crate::testbed::{Ids, Pod};

/// No packet is lost between the two namespaces, so a missing answer is soon certain.
const TIMEOUT: Duration = Duration::from_secs(2);
const WINDOW: usize = 400;
/// Ports on which applications and the outside world accept connections. 81 has no listener.
const APP_PORTS: [u16; 10] = [22, 53, 80, 443, 3306, 4191, 4567, 8080, 9090, 15008];
const APP_UDP_PORTS: [u16; 2] = [53, 5353];

/// A pod of another mesh.
#[derive(Debug, Clone)]
pub struct MeshPod {
    /// A name for messages.
    pub name: &'static str,
    /// The mesh's rules, as input of iptables-restore; lines with -4 or -6 are for one family.
    pub rules: &'static str,
    /// Whether the mesh installs the rules for IPv6, too.
    pub ipv6: Ipv6Rules,
    /// The ports of the proxy's listeners: outbound, inbound, DNS.
    pub ports: [u16; 3],
    /// The proxy's user and group.
    pub proxy: Ids,
    /// Flags of the agent.
    pub arguments: Vec<String>,
}

/// Whether a mesh has rules for IPv6.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ipv6Rules {
    /// The same as for IPv4.
    Installed,
    /// None.
    Absent,
}

/// What captures the pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MeshCapture {
    /// The mesh's own rules.
    OwnRules,
    /// The agent at this path.
    Agent(PathBuf),
}

/// All flows: every user to every destination and port, and connections from outside.
pub fn flows(pod: &MeshPod, users: &[Ids]) -> Vec<Flow> {
    let tcp_ports = [&[22, 53, 80, 81, 443, 3306, 8080, 15008], &pod.ports[..]].concat();
    let v4 = ["198.51.100.7", "203.0.113.9", "10.66.0.2", "10.66.0.3", "127.0.0.1", "127.0.0.2"];
    let v6 = ["2001:db8::7", "fd96::10", "fd66::2", "::1"];
    let destinations: Vec<IpAddr> =
        v4.iter().chain(&v6).map(|text| text.parse().expect("an address")).collect();
    let mut flows = Vec::new();
    for &ids in users {
        for &to in &destinations {
            let mut add = |kind, port, from| {
                let to = SocketAddr::new(to, port);
                flows.push(Flow { end: End::Pod, ids, kind, to, from, mapped: false });
            };
            for &port in &tcp_ports {
                add(FlowKind::Tcp, port, None);
            }
            for method in [DatagramMethod::To, DatagramMethod::Connected] {
                for port in [53, 5353] {
                    add(FlowKind::Udp(method), port, None);
                }
            }
            // The source of a proxy that passes inbound connections on.
            if layout::is_own(&layout::spec("compared"), to) {
                let from =
                    if to.is_ipv4() { Ipv4Addr::new(127, 0, 0, 6).into() } else { PASSTHROUGH_V6.into() };
                add(FlowKind::Tcp, 80, Some(from));
                add(FlowKind::Udp(DatagramMethod::Connected), 53, Some(from));
            }
        }
    }
    for (to, sources) in [
        ("10.66.0.2", ["198.51.100.7", "203.0.113.9", "10.66.0.1"]),
        ("fd66::2", ["2001:db8::7", "fd96::10", "fd66::1"]),
    ] {
        for source in sources {
            for &port in tcp_ports.iter().chain(&[4191, 4567, 9090]) {
                let to = SocketAddr::new(to.parse().expect("an address"), port);
                let from = Some(source.parse().expect("an address"));
                flows.push(Flow {
                    end: End::World,
                    ids: Ids::APP,
                    kind: FlowKind::Tcp,
                    to,
                    from,
                    mapped: false,
                });
            }
        }
    }
    flows
}

/// Makes the flows in a new pod. Returns the result of each.
pub fn observe_mesh(mesh: &MeshPod, by: &MeshCapture, flows: &[Flow]) -> Result<Vec<Observed>> {
    let pod = Pod::new(layout::spec("mesh")).context("making a pod")?;
    let world = Actor::start(pod.neighbour())?;
    let inside = Actor::start(&pod)?;
    serve(&world, mesh, End::World)?;
    match by {
        MeshCapture::OwnRules => install(mesh, &pod)?,
        MeshCapture::Agent(agent) => attach(agent, mesh, &pod)?,
    }
    serve(&inside, mesh, End::Pod)?;
    let flows: Vec<_> = flows.iter().map(|flow| (flow.clone(), TIMEOUT)).collect();
    let mut seen = Vec::with_capacity(flows.len());
    for flows in flows.chunks(WINDOW) {
        seen.extend(run::make(flows, &inside, &world)?);
    }
    if let MeshCapture::Agent(agent) = by {
        let mut detach = Command::new(agent);
        detach.arg("detach").arg("--cgroup-path").arg(pod.cgroup.path());
        succeed(detach)?;
    }
    Ok(seen)
}

fn install(mesh: &MeshPod, pod: &Pod) -> Result<()> {
    let file = tempfile::NamedTempFile::new()?;
    std::fs::write(file.path(), mesh.rules)?;
    for program in ["iptables-nft-restore", "ip6tables-nft-restore"] {
        if program.starts_with("ip6") && mesh.ipv6 == Ipv6Rules::Absent {
            continue;
        }
        let mut restore = pod.command(program)?;
        restore.arg("--noflush").arg(file.path());
        succeed(restore).with_context(|| format!("the rules of {}", mesh.name))?;
    }
    // As Kuma does, and the agent.
    pod.netns.add_address("lo", IpNet::V6(Ipv6Net::from(PASSTHROUGH_V6)))
}

fn attach(agent: &Path, mesh: &MeshPod, pod: &Pod) -> Result<()> {
    let mut attach = Command::new(agent);
    attach.arg("attach").arg("--cgroup-path").arg(pod.cgroup.path()).arg("--netns").arg(pod.netns.path());
    attach.args(&mesh.arguments);
    succeed(attach).map(drop)
}

fn serve(actor: &Actor, mesh: &MeshPod, end: End) -> Result<()> {
    let [outbound, inbound, dns] = mesh.ports;
    let own = [(outbound, "outbound"), (inbound, "inbound"), (dns, "dns")];
    for transport in [Transport::Tcp, Transport::Udp] {
        let app: &[u16] = if transport == Transport::Tcp { &APP_PORTS } else { &APP_UDP_PORTS };
        for port in app.iter().copied().chain(mesh.ports) {
            let proxy = own.iter().find(|(own, _)| *own == port).map(|(_, name)| *name);
            let (name, ids) = match (end, proxy) {
                (End::World, _) => ("world", Ids::ROOT),
                (End::Pod, Some(name)) => (name, mesh.proxy),
                (End::Pod, None) => ("app", Ids::APP),
            };
            for any in [IpAddr::V4(Ipv4Addr::UNSPECIFIED), Ipv6Addr::UNSPECIFIED.into()] {
                let bind = Bind::new(ids, SocketAddr::new(any, port));
                actor.listen(Listen { name: name.into(), transport, bind })?;
            }
        }
    }
    ensure!(!own.iter().any(|(port, _)| APP_PORTS.contains(port)), "the proxy has ports of its own");
    Ok(())
}
