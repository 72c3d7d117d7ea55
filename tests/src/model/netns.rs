//! A made-up namespace: interfaces, addresses and routes, looked up naively.

use std::net::IpAddr;

use intercept_agent::routes::{Interface, Reach, Route, RouteSnapshot};
use ipnet::IpNet;

/// A namespace.
#[derive(Debug, Clone)]
pub struct ModelNetns {
    /// Names of the interfaces; the index of each is its place here plus one, and `lo` is the first.
    pub links: Vec<String>,
    /// Each prefix once.
    pub routes: Vec<(IpNet, ModelLink)>,
}

/// What a route does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ModelLink {
    /// The addresses are the namespace's own.
    Own {
        /// The source of unbound sockets.
        source: Option<IpAddr>,
    },
    /// Out by this interface, by its place in [`Place::links`].
    Out {
        /// The interface.
        link: usize,
        /// The source of unbound sockets.
        source: Option<IpAddr>,
    },
    /// Nowhere: unreachable.
    Nowhere,
}

impl ModelNetns {
    /// The longest route that covers an address.
    pub fn way(&self, addr: IpAddr) -> Option<ModelLink> {
        let covering = self.routes.iter().filter(|(net, _)| net.contains(&addr));
        covering.max_by_key(|(net, _)| net.prefix_len()).map(|(_, way)| *way)
    }

    /// The interface by which packets to an address leave, and the source that unbound sockets get; none if they do
    /// not leave at all.
    pub fn egress(&self, addr: IpAddr) -> Option<(&str, Option<IpAddr>)> {
        match self.way(addr)? {
            ModelLink::Own { source } => Some(("lo", source)),
            ModelLink::Out { link, source } => Some((&self.links[link], source)),
            ModelLink::Nowhere => None,
        }
    }

    /// What the agent would have read from netlink.
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
