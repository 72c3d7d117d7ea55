//! Pods, and the namespace that stands for the world outside.

use std::net::IpAddr;
use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result};
use intercept_common::Family;
use ipnet::IpNet;

use super::Sandbox;
use super::netlink::{RouteSpec, TABLE_LOCAL, TABLE_MAIN};

/// The outside world: a namespace in which every address except those of the pods' networks is local, so that a
/// wildcard listener accepts connections to any of them.
#[derive(Debug)]
pub struct Neighbour {
    sandbox: Sandbox,
    pods: AtomicU32,
}

/// An interface of a pod, connected to the outside world.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodInterface {
    /// Its name.
    pub name: String,
    /// The pod's addresses with the prefix length of the link. The first of each family is the primary one.
    pub pod: Vec<IpNet>,
    /// The neighbour's addresses, one of each family.
    pub neighbour: Vec<IpNet>,
    /// Destinations routed over it.
    pub routes: Vec<IpNet>,
}

/// The configuration of a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodSpec {
    /// A part of the names of the pod's namespace and cgroup.
    pub label: String,
    /// The interfaces, eth0 first.
    pub interfaces: Vec<PodInterface>,
}

/// A pod: a namespace, a cgroup, and links to its neighbour.
#[derive(Debug)]
pub struct Pod {
    sandbox: Sandbox,
    neighbour: Arc<Neighbour>,
    spec: PodSpec,
}

impl PodSpec {
    /// eth0 with 10.66.0.2/24 and fd66::2/64, and default routes over it via .1 and ::1.
    pub fn new(label: &str) -> Self {
        let eth0 = PodInterface {
            name: "eth0".into(),
            pod: nets(&["10.66.0.2/24", "fd66::2/64"]),
            neighbour: nets(&["10.66.0.1/24", "fd66::1/64"]),
            routes: nets(&["0.0.0.0/0", "::/0"]),
        };
        Self { label: label.into(), interfaces: vec![eth0] }
    }

    /// Adds eth1 with 10.67.0.2/24 and fd67::2/64, over which 172.20.0.0/16 and fd20::/16 are routed.
    #[must_use]
    pub fn with_eth1(mut self) -> Self {
        self.interfaces.push(PodInterface {
            name: "eth1".into(),
            pod: nets(&["10.67.0.2/24", "fd67::2/64"]),
            neighbour: nets(&["10.67.0.1/24", "fd67::1/64"]),
            routes: nets(&["172.20.0.0/16", "fd20::/16"]),
        });
        self
    }

    /// Adds another address of the pod to an interface.
    #[must_use]
    pub fn with_address(mut self, interface: usize, address: &str) -> Self {
        self.interfaces[interface].pod.extend(nets(&[address]));
        self
    }
}

impl Neighbour {
    /// A new outside world without pods.
    pub fn new(label: &str) -> Result<Arc<Self>> {
        let sandbox = Sandbox::new(&format!("{label}-world"))?;
        for everything in nets(&["0.0.0.0/0", "::/0"]) {
            // In the local table, where the kernel looks up whether an address is its own.
            let route =
                RouteSpec { to: everything, via: None, dev: Some("lo"), table: TABLE_LOCAL, local: true };
            sandbox.netns.add_route(route)?;
        }
        // The local route allows to bind any IPv4 address; IPv6 also needs this setting.
        sandbox.netns.sysctl("net/ipv6/ip_nonlocal_bind", "1")?;
        Ok(Arc::new(Self { sandbox, pods: AtomicU32::new(0) }))
    }
}

impl Pod {
    /// A pod with a new outside world.
    pub fn new(spec: PodSpec) -> Result<Self> {
        let neighbour = Neighbour::new(&spec.label)?;
        Self::join(spec, neighbour)
    }

    /// A pod connected to an existing outside world, which may have other pods with other addresses.
    pub fn join(spec: PodSpec, neighbour: Arc<Neighbour>) -> Result<Self> {
        let sandbox = Sandbox::new(&spec.label)?;
        let n = neighbour.pods.fetch_add(1, Ordering::Relaxed);
        for (i, interface) in spec.interfaces.iter().enumerate() {
            let far = format!("pod{n}-{i}");
            connect(&sandbox, interface, &neighbour.sandbox, &far)
                .with_context(|| format!("connecting {} of {}", interface.name, spec.label))?;
        }
        Ok(Self { sandbox, neighbour, spec })
    }

    /// The outside world.
    pub fn neighbour(&self) -> &Arc<Neighbour> {
        &self.neighbour
    }

    /// Its configuration.
    pub fn spec(&self) -> &PodSpec {
        &self.spec
    }

    /// The primary address of eth0.
    ///
    /// # Panics
    /// If the pod has none of that family.
    pub fn address(&self, family: Family) -> IpAddr {
        let addresses = &self.spec.interfaces[0].pod;
        addresses
            .iter()
            .map(IpNet::addr)
            .find(|addr| Family::of(addr) == family)
            .expect("an address of the family")
    }
}

impl Deref for Neighbour {
    type Target = Sandbox;
    fn deref(&self) -> &Sandbox {
        &self.sandbox
    }
}

impl Deref for Pod {
    type Target = Sandbox;
    fn deref(&self) -> &Sandbox {
        &self.sandbox
    }
}

fn connect(pod: &Sandbox, interface: &PodInterface, world: &Sandbox, far: &str) -> Result<()> {
    pod.netns.veth(&interface.name, &world.netns, far)?;
    for address in &interface.neighbour {
        world.netns.add_address(far, *address)?;
        // More specific than the local default route, so that the pod's networks are not local here.
        let link =
            RouteSpec { to: address.trunc(), via: None, dev: Some(far), table: TABLE_LOCAL, local: false };
        world.netns.add_route(link)?;
    }
    for address in &interface.pod {
        pod.netns.add_address(&interface.name, *address)?;
    }
    for to in &interface.routes {
        let via = interface.neighbour.iter().map(IpNet::addr).find(|a| a.is_ipv6() == to.addr().is_ipv6());
        let route = RouteSpec { to: *to, via, dev: Some(&interface.name), table: TABLE_MAIN, local: false };
        pod.netns.add_route(route)?;
    }
    Ok(())
}

fn nets(texts: &[&str]) -> Vec<IpNet> {
    texts
        .iter()
        .map(|text| text.parse().unwrap_or_else(|_| panic!("{text} is not an address with prefix")))
        .collect()
}
