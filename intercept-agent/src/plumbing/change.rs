//! One change in a namespace: whether it is made already, making it, and taking it back.

use std::{
    fs, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket},
};

use futures_util::TryStreamExt as _;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use netlink_packet_route::{
    AddressFamily, IpProtocol,
    address::{AddressAttribute, AddressMessage},
    route::{RouteAddress, RouteAttribute, RouteMessage, RouteScope, RouteType},
    rule::{RuleAction, RuleAttribute, RuleHeader, RuleMessage},
};
use rtnetlink::{Handle, RouteMessageBuilder};
use serde::{Deserialize, Serialize};

use super::{
    PlumbingError,
    localhost::{add_local_prefix, add_localhost_by, index_of, local_prefix_route, localhost_route},
};

/// The setting of the namespace that [`Change::AcceptMark`] changes.
pub(super) const ACCEPT_MARK: &str = "/proc/sys/net/ipv4/tcp_fwmark_accept";

/// What may be made in a namespace.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Change {
    /// `::6/128` on the loopback interface; IPv4 has 127.0.0.6 without being told.
    PassthroughAddress,
    /// These addresses are local, with 127.0.0.1 or ::1 as their source: what redirected connections dial
    /// ([`intercept_common::Spread`]), and sources of queries.
    LocalPrefix { net: IpNet },
    /// 127.0.0.1 or ::1 is reached by a socket that has chosen this interface.
    LocalhostBy { v6: bool, interface: String },
    /// Everything is local in this table.
    LocalTable { v6: bool, table: u32 },
    /// Packets with this mark are routed by this table.
    MarkRule { v6: bool, mark: u32, table: u32 },
    /// These destinations are local in this table.
    GuestRoute { net: IpNet, table: u32 },
    /// TCP that arrives on this interface is routed by this table, if that has a route.
    GuestRule { v6: bool, interface: String, table: u32 },
    /// What accepts a marked connection answers with the mark. Holds what was set before.
    AcceptMark { before: String },
}

impl Change {
    /// Whether two are the same change, whatever was before it.
    pub(super) fn same(&self, other: &Self) -> bool {
        matches!((self, other), (Self::AcceptMark { .. }, Self::AcceptMark { .. })) || self == other
    }
}

/// Those of the changes that are made already.
pub(super) async fn present(handle: &Handle, changes: Vec<Change>) -> Result<Vec<Change>, PlumbingError> {
    let mut state = Present { addresses: None, rules: [None, None], routes: [None, None] };
    let mut found = Vec::new();
    for change in changes {
        let there = match &change {
            Change::PassthroughAddress => state.has_passthrough(handle).await?,
            Change::LocalTable { v6, table } => state.has_route(handle, everything(*v6), *table).await?,
            Change::GuestRoute { net, table } => state.has_route(handle, *net, *table).await?,
            Change::MarkRule { v6, mark, table } => {
                state.rules(handle, *v6).await?.iter().any(|rule| is_mark_rule(rule, *mark, *table))
            }
            Change::GuestRule { v6, interface, table } => {
                state.rules(handle, *v6).await?.iter().any(|rule| is_guest_rule(rule, interface, *table))
            }
            Change::AcceptMark { before } => before == "1",
            // Told by the routes, or by adding it.
            Change::LocalPrefix { .. } | Change::LocalhostBy { .. } => false,
        };
        if there {
            found.push(change);
        }
    }
    Ok(found)
}

/// What netlink lists, each read once and only if it is asked for.
struct Present {
    addresses: Option<bool>,
    rules: [Option<Vec<RuleMessage>>; 2],
    routes: [Option<Vec<(IpNet, u32)>>; 2],
}

impl Present {
    async fn has_passthrough(&mut self, handle: &Handle) -> Result<bool, PlumbingError> {
        if let Some(there) = self.addresses {
            return Ok(there);
        }
        let failed = |source| netlink("reading the addresses of the loopback interface", source);
        let addresses = handle.address().get().set_link_index_filter(LOOPBACK);
        let found: Vec<_> = addresses
            .set_address_filter(IpAddr::V6(PASSTHROUGH_V6))
            .execute()
            .try_collect()
            .await
            .map_err(failed)?;
        Ok(*self.addresses.insert(!found.is_empty()))
    }

    async fn rules(&mut self, handle: &Handle, v6: bool) -> Result<&[RuleMessage], PlumbingError> {
        let slot = &mut self.rules[usize::from(v6)];
        if slot.is_none() {
            *slot = Some(rules(handle, v6).await?);
        }
        Ok(slot.as_deref().unwrap_or_default())
    }

    async fn has_route(&mut self, handle: &Handle, net: IpNet, table: u32) -> Result<bool, PlumbingError> {
        let slot = &mut self.routes[usize::from(net.addr().is_ipv6())];
        if slot.is_none() {
            *slot = Some(local_routes(handle, net.addr().is_ipv6()).await?);
        }
        Ok(slot.as_ref().is_some_and(|routes| routes.contains(&(net.trunc(), table))))
    }
}

/// Make a change. None if it exists already.
pub(super) async fn make(handle: &Handle, change: Change) -> Result<Option<Change>, PlumbingError> {
    let made = match &change {
        Change::PassthroughAddress => {
            let added = handle.address().add(LOOPBACK, IpAddr::V6(PASSTHROUGH_V6), 128).execute().await;
            unless_there(added).map_err(|e| netlink("adding ::6/128 to the loopback interface", e))?
        }
        Change::LocalPrefix { net } => add_local_prefix(handle, *net).await?,
        Change::LocalhostBy { v6, interface } => add_localhost_by(handle, *v6, interface).await?,
        Change::GuestRoute { net, table } => {
            let route = local_route(*net, *table, LOOPBACK);
            unless_there(handle.route().add(route).execute().await)
                .map_err(|e| netlink("adding a local route for a network of -i to the table of -k", e))?
        }
        Change::GuestRule { v6, interface, table } => {
            let mut request = handle.rule().add();
            *request.message_mut() = guest_rule(*v6, interface, *table);
            unless_there(request.execute().await)
                .map_err(|e| netlink("adding a rule for an interface of -k", e))?
        }
        Change::LocalTable { v6, table } => {
            let route = local_route(everything(*v6), *table, LOOPBACK);
            unless_there(handle.route().add(route).execute().await)
                .map_err(|e| netlink("adding a local default route to the table of -r", e))?
        }
        Change::MarkRule { v6, mark, table } => {
            let mut request = handle.rule().add();
            *request.message_mut() = mark_rule(*v6, *mark, *table);
            unless_there(request.execute().await)
                .map_err(|e| netlink("adding a rule for the mark of -t", e))?
        }
        Change::AcceptMark { .. } => {
            set(ACCEPT_MARK, "1").map_err(|source| PlumbingError::Sysctl { path: ACCEPT_MARK, source })?;
            true
        }
    };
    Ok(made.then_some(change))
}

/// Unmake a change. What is gone already is no failure; any other is logged.
pub(super) async fn unmake(handle: &Handle, change: &Change) -> Result<(), PlumbingError> {
    let result = match change {
        Change::PassthroughAddress => del_passthrough(handle).await,
        Change::LocalTable { v6, table } => {
            let route = local_route(everything(*v6), *table, LOOPBACK);
            handle.route().del(route).execute().await.map_err(box_netlink)
        }
        Change::LocalPrefix { net } => {
            handle.route().del(local_prefix_route(*net, LOOPBACK)).execute().await.map_err(box_netlink)
        }
        Change::LocalhostBy { v6, interface } => match index_of(interface) {
            Ok(Some(index)) => {
                handle.route().del(localhost_route(*v6, index)).execute().await.map_err(box_netlink)
            }
            // Its routes went with it.
            Ok(None) => Ok(()),
            Err(error) => Err(error),
        },
        Change::GuestRoute { net, table } => {
            let route = local_route(*net, *table, LOOPBACK);
            handle.route().del(route).execute().await.map_err(box_netlink)
        }
        Change::GuestRule { v6, interface, table } => {
            handle.rule().del(guest_rule(*v6, interface, *table)).execute().await.map_err(box_netlink)
        }
        Change::MarkRule { v6, mark, table } => {
            handle.rule().del(mark_rule(*v6, *mark, *table)).execute().await.map_err(box_netlink)
        }
        Change::AcceptMark { before } => {
            set(ACCEPT_MARK, before).map_err(|source| PlumbingError::Sysctl { path: ACCEPT_MARK, source })
        }
    };
    match result {
        Err(error) if is_absent(&error) => Ok(()),
        Err(error) => {
            tracing::warn!(
                ?change,
                error = &error as &dyn std::error::Error,
                "undoing a change of the namespace"
            );
            Err(error)
        }
        Ok(()) => Ok(()),
    }
}

/// Write a setting of the calling thread's namespace. Containers have /proc/sys mounted read only.
fn set(path: &str, value: &str) -> io::Result<()> {
    match fs::write(path, value) {
        Err(error) if error.kind() == io::ErrorKind::ReadOnlyFilesystem => set_in_own_mount(path, value),
        done => done,
    }
}

/// Through a procfs that is mounted nowhere, and for this alone.
fn set_in_own_mount(path: &str, value: &str) -> io::Result<()> {
    use rustix::{
        fs::{Mode, OFlags, openat},
        mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsmount, fsopen},
    };
    let context = fsopen("proc", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_create(&context)?;
    let proc = fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())?;
    let below = path.trim_start_matches("/proc/");
    let file = openat(proc, below, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())?;
    io::Write::write_all(&mut fs::File::from(file), value.as_bytes())
}

fn box_netlink(source: rtnetlink::Error) -> PlumbingError {
    netlink("removing it", source)
}

fn netlink(action: &'static str, source: rtnetlink::Error) -> PlumbingError {
    PlumbingError::Netlink { action, source: Box::new(source) }
}

/// Whether what was to be removed is not there, or the interface that it was for.
fn is_absent(error: &PlumbingError) -> bool {
    let PlumbingError::Netlink { source, .. } = error else { return false };
    let rtnetlink::Error::NetlinkError(message) = &**source else { return false };
    [libc::ENOENT, libc::ESRCH, libc::EADDRNOTAVAIL, libc::ENODEV].contains(&-message.raw_code())
}

pub(super) fn unless_there(result: Result<(), rtnetlink::Error>) -> Result<bool, rtnetlink::Error> {
    match result {
        Ok(()) => Ok(true),
        Err(rtnetlink::Error::NetlinkError(message)) if message.raw_code() == -libc::EEXIST => Ok(false),
        Err(error) => Err(error),
    }
}

pub(super) const PASSTHROUGH_V6: Ipv6Addr = Ipv6Addr::new(0, 0, 0, 0, 0, 0, 0, 6);

/// The loopback interface has this index in every namespace (`LOOPBACK_IFINDEX` of the kernel).
pub(super) const LOOPBACK: u32 = 1;

async fn del_passthrough(handle: &Handle) -> Result<(), PlumbingError> {
    let mut message = AddressMessage::default();
    message.header.family = AddressFamily::Inet6;
    message.header.prefix_len = 128;
    message.header.index = LOOPBACK;
    message.attributes.push(AddressAttribute::Local(PASSTHROUGH_V6.into()));
    handle.address().del(message).execute().await.map_err(box_netlink)?;
    // A request that could not be sent ends as one that was done.
    if UdpSocket::bind((PASSTHROUGH_V6, 0)).is_ok() {
        return Err(netlink("removing ::6/128 from the loopback interface", rtnetlink::Error::RequestFailed));
    }
    Ok(())
}

/// Prefix and table of the local routes of a family.
async fn local_routes(handle: &Handle, v6: bool) -> Result<Vec<(IpNet, u32)>, PlumbingError> {
    let question = if v6 {
        RouteMessageBuilder::<Ipv6Addr>::new().build()
    } else {
        RouteMessageBuilder::<Ipv4Addr>::new().build()
    };
    let found: Vec<RouteMessage> = handle
        .route()
        .get(question)
        .execute()
        .try_collect()
        .await
        .map_err(|e| netlink("reading the routes", e))?;
    let local = |route: &RouteMessage| route.header.kind == RouteType::Local;
    let key = |route: RouteMessage| {
        let (mut address, mut table) = (everything(v6).addr(), u32::from(route.header.table));
        for attribute in &route.attributes {
            match attribute {
                RouteAttribute::Destination(RouteAddress::Inet(to)) => address = (*to).into(),
                RouteAttribute::Destination(RouteAddress::Inet6(to)) => address = (*to).into(),
                RouteAttribute::Table(number) => table = *number,
                _ => {}
            }
        }
        Some((IpNet::new(address, route.header.destination_prefix_length).ok()?, table))
    };
    Ok(found.into_iter().filter(local).filter_map(key).collect())
}

fn everything(v6: bool) -> IpNet {
    if v6 { Ipv6Net::default().into() } else { Ipv4Net::default().into() }
}

pub(super) fn local_route(net: IpNet, table: u32, lo: u32) -> RouteMessage {
    macro_rules! build {
        ($family:ty, $net:expr) => {
            RouteMessageBuilder::<$family>::new()
                .destination_prefix($net.network(), $net.prefix_len())
                .kind(RouteType::Local)
                .scope(RouteScope::Host)
                .table_id(table)
                .output_interface(lo)
                .build()
        };
    }
    match net {
        IpNet::V4(net) => build!(Ipv4Addr, net),
        IpNet::V6(net) => build!(Ipv6Addr, net),
    }
}

fn guest_rule(v6: bool, interface: &str, table: u32) -> RuleMessage {
    let mut rule = RuleMessage::default();
    rule.header = RuleHeader {
        family: if v6 { AddressFamily::Inet6 } else { AddressFamily::Inet },
        action: RuleAction::ToTable,
        ..RuleHeader::default()
    };
    rule.attributes.push(RuleAttribute::Iifname(interface.to_owned()));
    rule.attributes.push(RuleAttribute::IpProtocol(IpProtocol::Tcp));
    rule.attributes.push(RuleAttribute::Table(table));
    rule
}

fn is_guest_rule(rule: &RuleMessage, interface: &str, table: u32) -> bool {
    rule.attributes.contains(&RuleAttribute::Iifname(interface.to_owned()))
        && rule.attributes.contains(&RuleAttribute::Table(table))
}

fn mark_rule(v6: bool, mark: u32, table: u32) -> RuleMessage {
    let mut rule = RuleMessage::default();
    rule.header = RuleHeader {
        family: if v6 { AddressFamily::Inet6 } else { AddressFamily::Inet },
        action: RuleAction::ToTable,
        ..RuleHeader::default()
    };
    rule.attributes.push(RuleAttribute::FwMark(mark));
    rule.attributes.push(RuleAttribute::Table(table));
    rule
}

async fn rules(handle: &Handle, v6: bool) -> Result<Vec<RuleMessage>, PlumbingError> {
    let version = if v6 { rtnetlink::IpVersion::V6 } else { rtnetlink::IpVersion::V4 };
    handle
        .rule()
        .get(version)
        .execute()
        .try_collect()
        .await
        .map_err(|source| PlumbingError::Netlink { action: "reading the rules", source: Box::new(source) })
}

fn is_mark_rule(rule: &RuleMessage, mark: u32, table: u32) -> bool {
    rule.attributes.contains(&RuleAttribute::FwMark(mark))
        && (rule.attributes.contains(&RuleAttribute::Table(table)) || u32::from(rule.header.table) == table)
}
