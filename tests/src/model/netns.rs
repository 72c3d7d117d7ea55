//! An artificial namespace: interfaces, addresses and routes, with a naive lookup.

use std::net::IpAddr;

use intercept_agent::facade::routes::{Interface, Reach, Route, RouteSnapshot};
use ipnet::IpNet;

/// A namespace.
#[derive(Debug, Clone)]
pub struct ModelNetns {
    /// Names of the interfaces, `lo` first. The ifindex is the position plus one.
    pub links: Vec<String>,
    /// Routes with distinct prefixes.
    pub routes: Vec<(IpNet, ModelLink)>,
}

/// The target of a route.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ModelLink {
    /// The addresses are local.
    Own {
        /// The source address of unbound sockets.
        source: Option<IpAddr>,
    },
    /// An interface, as a position in [`ModelNetns::links`].
    Out {
        /// The position.
        link: usize,
        /// The source address of unbound sockets.
        source: Option<IpAddr>,
    },
    /// Unreachable.
    Nowhere,
}

impl ModelNetns {
    /// The most specific route to an address.
    pub fn way(&self, addr: IpAddr) -> Option<ModelLink> {
        let covering = self.routes.iter().filter(|(net, _)| net.contains(&addr));
        covering.max_by_key(|(net, _)| net.prefix_len()).map(|(_, way)| *way)
    }

    /// The egress interface for an address and the source address of unbound sockets. `None` without a route.
    pub fn egress(&self, addr: IpAddr) -> Option<(&str, Option<IpAddr>)> {
        match self.way(addr)? {
            ModelLink::Own { source } => Some(("lo", source)),
            ModelLink::Out { link, source } => Some((&self.links[link], source)),
            ModelLink::Nowhere => None,
        }
    }

    /// The snapshot that the agent would read from netlink.
    pub fn snapshot(&self) -> RouteSnapshot {
        let interfaces = self.links.iter().zip(1..).map(|(name, index)| Interface {
            index,
            name: name.clone(),
            loopback: name == "lo",
            up: true,
        });
        let mut routes: Vec<Route> = self.routes.iter().map(|(prefix, way)| route(*prefix, *way)).collect();
        routes.sort_by_key(|route| route.prefix);
        RouteSnapshot { interfaces: interfaces.collect(), routes, broadcasts: Vec::new() }
    }
}

fn route(prefix: IpNet, way: ModelLink) -> Route {
    let (reach, source) = match way {
        ModelLink::Own { source } => (Reach::Local, source),
        ModelLink::Out { link, source } => {
            (Reach::Via(u32::try_from(link + 1).expect("a handful of interfaces")), source)
        }
        ModelLink::Nowhere => (Reach::None, None),
    };
    Route { prefix, reach, others: Vec::new(), source }
}
