//! Interfaces, addresses, routes and rules of a namespace, over rtnetlink.

use std::future::Future;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd, AsRawFd};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use futures_util::TryStreamExt;
use ipnet::IpNet;
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressHeaderFlags};
use netlink_packet_route::link::{LinkAttribute, LinkMessage};
use netlink_packet_route::route::{RouteMessage, RouteScope, RouteType};
use netlink_packet_route::rule::RuleAction;
use rtnetlink::{Handle, LinkDummy, LinkUnspec, LinkVeth, RouteMessageBuilder};

use super::Namespace;

/// The kernel's table of local addresses, which has precedence over all others.
pub const TABLE_LOCAL: u32 = 255;
/// The table of ordinary routes.
pub const TABLE_MAIN: u32 = 254;

/// A route.
#[derive(Debug, Clone, Copy)]
pub struct RouteSpec<'a> {
    /// Destinations.
    pub to: IpNet,
    /// The next hop. `None`: the destinations are on the link.
    pub via: Option<IpAddr>,
    /// The interface. Optional with a next hop.
    pub dev: Option<&'a str>,
    /// The routing table.
    pub table: u32,
    /// The destinations are local addresses (type `local`).
    pub local: bool,
}

impl Namespace {
    /// Runs a future with a netlink handle inside the namespace.
    pub fn netlink<T: Send, F>(&self, work: impl FnOnce(Handle) -> F + Send) -> Result<T>
    where
        F: Future<Output = Result<T>>,
    {
        // Outside of the namespace: the process's first runtime makes sockets for signals, which stay, and would keep their
        // namespace from being removed.
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
        self.run(move || {
            runtime.block_on(async {
                let (connection, handle, _) =
                    rtnetlink::new_connection().context("opening a netlink socket")?;
                tokio::spawn(connection);
                work(handle).await
            })
        })?
        .with_context(|| format!("configuring {}", self.name()))
    }

    /// Connects this namespace to `other` by a veth pair, both ends up.
    pub fn veth(&self, name: &str, other: &Self, other_name: &str) -> Result<()> {
        self.netlink(async |handle| {
            // Both ends may have the same name, so the peer is created in its own namespace.
            let peer = LinkUnspec::new_with_name(other_name).setns_by_fd(other.as_fd().as_raw_fd()).build();
            let mut link = LinkVeth::new(name, other_name).build();
            replace_peer(&mut link, peer);
            handle
                .link()
                .add(link)
                .execute()
                .await
                .with_context(|| format!("making the interfaces {name} and {other_name}"))
        })?;
        // After creation: an end without its peer cannot be up (ENOTCONN).
        self.link_up(name)?;
        other.link_up(other_name)
    }

    /// Adds a dummy interface, up.
    pub fn dummy(&self, name: &str) -> Result<()> {
        self.netlink(async |handle| {
            handle
                .link()
                .add(LinkDummy::new(name).up().build())
                .execute()
                .await
                .with_context(|| format!("making the interface {name}"))
        })
    }

    /// Removes an interface.
    pub fn delete_link(&self, name: &str) -> Result<()> {
        self.netlink(async |handle| {
            let index = index(&handle, name).await?;
            handle.link().del(index).execute().await.with_context(|| format!("removing {name}"))
        })
    }

    /// Sets an interface up.
    pub fn link_up(&self, name: &str) -> Result<()> {
        self.set_link(name, true)
    }

    /// Sets an interface down.
    pub fn link_down(&self, name: &str) -> Result<()> {
        self.set_link(name, false)
    }

    fn set_link(&self, name: &str, up: bool) -> Result<()> {
        self.netlink(async |handle| {
            let message = LinkUnspec::new_with_name(name);
            let message = if up { message.up() } else { message.down() };
            handle
                .link()
                .set(message.build())
                .execute()
                .await
                .with_context(|| format!("setting {name} {}", if up { "up" } else { "down" }))
        })
    }

    /// The index of an interface.
    pub fn link_index(&self, name: &str) -> Result<u32> {
        self.netlink(async |handle| index(&handle, name).await)
    }

    /// Adds an address without duplicate address detection, so that it is usable at once.
    pub fn add_address(&self, dev: &str, address: IpNet) -> Result<()> {
        self.netlink(async |handle| {
            let index = index(&handle, dev).await?;
            let mut request = handle.address().add(index, address.addr(), address.prefix_len());
            if address.addr().is_ipv6() {
                let message = request.message_mut();
                message.header.flags |= AddressHeaderFlags::Nodad;
                message.attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
            }
            request.execute().await.with_context(|| format!("adding {address} to {dev}"))
        })?;
        match address.addr() {
            IpAddr::V4(_) => Ok(()),
            IpAddr::V6(addr) => self.await_local_route(addr),
        }
    }

    /// Waits until packets to an IPv6 address of this namespace arrive: a work queue adds the route for it, some
    /// time after the address (addrconf_dad_work; seen to lose the race on Linux 6.18).
    fn await_local_route(&self, addr: Ipv6Addr) -> Result<()> {
        const LOCAL: u32 = 0x8000_0000;
        let wanted: String = addr.octets().iter().map(|byte| format!("{byte:02x}")).collect();
        let deadline = Instant::now() + Duration::from_secs(5);
        loop {
            // Destination, prefix in hexadecimal, source, prefix, next hop, metric, references, use, flags, device.
            let table = self.run(|| std::fs::read_to_string("/proc/thread-self/net/ipv6_route"))?;
            let table = table.context("reading the IPv6 routes")?;
            let found = table.lines().map(|line| line.split_whitespace().collect::<Vec<_>>()).any(|fields| {
                let flags = fields.get(8).and_then(|flags| u32::from_str_radix(flags, 16).ok());
                fields[..2] == [wanted.as_str(), "80"] && flags.is_some_and(|flags| flags & LOCAL != 0)
            });
            if found {
                return Ok(());
            }
            if Instant::now() > deadline {
                bail!("{addr} has been added to {}, but its route does not appear", self.name());
            }
            std::thread::yield_now();
        }
    }

    /// Removes an address.
    pub fn delete_address(&self, dev: &str, address: IpNet) -> Result<()> {
        self.netlink(async |handle| {
            let index = index(&handle, dev).await?;
            let found = handle
                .address()
                .get()
                .set_link_index_filter(index)
                .set_address_filter(address.addr())
                .execute()
                .try_next()
                .await?
                .with_context(|| format!("{dev} does not have {address}"))?;
            handle
                .address()
                .del(found)
                .execute()
                .await
                .with_context(|| format!("removing {address} from {dev}"))
        })
    }

    /// Adds a route.
    pub fn add_route(&self, route: RouteSpec<'_>) -> Result<()> {
        self.netlink(async |handle| {
            let message = route_message(&handle, route).await?;
            handle.route().add(message).execute().await.with_context(|| format!("adding {route:?}"))
        })
    }

    /// Removes a route that [`Namespace::add_route`] added.
    pub fn delete_route(&self, route: RouteSpec<'_>) -> Result<()> {
        self.netlink(async |handle| {
            let message = route_message(&handle, route).await?;
            handle.route().del(message).execute().await.with_context(|| format!("removing {route:?}"))
        })
    }

    /// Routes packets with this mark by `table` (`ip rule add fwmark MARK lookup TABLE`), for both families.
    pub fn add_mark_rule(&self, mark: u32, table: u32) -> Result<()> {
        self.netlink(async |handle| {
            let rule = || handle.rule().add().fw_mark(mark).table_id(table).action(RuleAction::ToTable);
            rule().v4().execute().await.with_context(|| format!("routing mark {mark} by table {table}"))?;
            rule().v6().execute().await.with_context(|| format!("routing mark {mark} by table {table}, IPv6"))
        })
    }
}

/// Replaces the message for the peer, which rtnetlink makes of its name only.
fn replace_peer(link: &mut LinkMessage, peer: LinkMessage) {
    use netlink_packet_route::link::{InfoData, InfoVeth, LinkInfo};
    for attribute in &mut link.attributes {
        let LinkAttribute::LinkInfo(infos) = attribute else { continue };
        for info in infos {
            if let LinkInfo::Data(InfoData::Veth(veth)) = info {
                *veth = InfoVeth::Peer(peer);
                return;
            }
        }
    }
    unreachable!("a veth message has a peer");
}

async fn index(handle: &Handle, name: &str) -> Result<u32> {
    let link = handle.link().get().match_name(name.to_owned()).execute().try_next().await;
    match link {
        Ok(Some(link)) => Ok(link.header.index),
        Ok(None) => bail!("there is no interface {name}"),
        Err(error) => Err(error).with_context(|| format!("looking up the interface {name}")),
    }
}

async fn route_message(handle: &Handle, route: RouteSpec<'_>) -> Result<RouteMessage> {
    let dev = match route.dev {
        Some(dev) => Some(index(handle, dev).await?),
        None => None,
    };
    let kind = if route.local { RouteType::Local } else { RouteType::Unicast };
    let scope = match (route.local, route.via) {
        (true, _) => RouteScope::Host,
        (false, None) => RouteScope::Link,
        (false, Some(_)) => RouteScope::Universe,
    };
    macro_rules! build {
        ($family:ty, $net:expr, $via:expr) => {{
            let mut message = RouteMessageBuilder::<$family>::new()
                .destination_prefix($net.addr(), $net.prefix_len())
                .table_id(route.table)
                .kind(kind)
                .scope(scope);
            if let Some(via) = $via {
                message = message.gateway(via);
            }
            if let Some(dev) = dev {
                message = message.output_interface(dev);
            }
            message.build()
        }};
    }
    Ok(match (route.to, route.via) {
        (IpNet::V4(net), None) => build!(Ipv4Addr, net, None),
        (IpNet::V4(net), Some(IpAddr::V4(via))) => build!(Ipv4Addr, net, Some(via)),
        (IpNet::V6(net), None) => build!(Ipv6Addr, net, None),
        (IpNet::V6(net), Some(IpAddr::V6(via))) => build!(Ipv6Addr, net, Some(via)),
        (to, Some(via)) => bail!("{to} cannot be reached via {via}: another family"),
    })
}
