//! What is changed in a pod's namespace itself, as istio-iptables changes it: an address that the proxy's inbound
//! passthrough binds, in TPROXY mode the rules and routes that bring marked packets to the loopback interface, and for
//! the interfaces of -k those that keep what arrives there for elsewhere in the pod.
//!
//! What was there already is left alone, when installing and when removing.

use std::{
    fs, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket},
    time::Duration,
};

use futures_util::TryStreamExt as _;
use intercept_common::Addr;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use netlink_packet_route::{
    AddressFamily, IpProtocol,
    link::{LinkAttribute, LinkMessage},
    route::{RouteMessage, RouteScope, RouteType},
    rule::{RuleAction, RuleAttribute, RuleHeader, RuleMessage},
};
use rtnetlink::{Handle, RouteMessageBuilder};
use serde::{Deserialize, Serialize};

mod localhost;

use localhost::{add_local_prefix, add_localhost_by, index_of, local_prefix_route, localhost_route};

use crate::{
    netns::{Netns, NetnsError},
    options::{Config, Dns, InboundMode},
};

/// Changes made in a namespace, in order.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Plumbing(Vec<Change>);

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Change {
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

/// Why the namespace could not be prepared.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "each is its text")]
pub enum PlumbingError {
    #[error(transparent)]
    Netns(#[from] NetnsError),
    #[error("opening netlink in it")]
    Open(#[source] io::Error),
    #[error("{action} (needs CAP_NET_ADMIN in it)")]
    Netlink { action: &'static str, source: Box<rtnetlink::Error> },
    #[error("setting {path} in it")]
    Sysctl { path: &'static str, source: io::Error },
}

const ACCEPT_MARK: &str = "/proc/sys/net/ipv4/tcp_fwmark_accept";
const DISABLE_V6: &str = "/proc/sys/net/ipv6/conf/lo/disable_ipv6";

/// Make what the options ask for, given what was made before; unmake what they no longer do. On failure nothing new
/// is left.
pub fn apply(netns: &Netns, config: &Config, before: &Plumbing) -> Result<Plumbing, PlumbingError> {
    let config = config.clone();
    let before = before.clone();
    inside(netns, async move |handle| {
        let wanted = wanted(&config, &links(&handle).await?);
        let mut done: Vec<Change> =
            before.0.iter().filter(|c| wanted.iter().any(|w| w.same(c))).cloned().collect();
        let kept = done.len();
        for change in wanted {
            if done.iter().any(|d| d.same(&change)) {
                continue;
            }
            match make(&handle, change).await {
                Ok(Some(made)) => done.push(made),
                Ok(None) => {}
                Err(error) => {
                    for made in done[kept..].iter().rev() {
                        unmake(&handle, made).await;
                    }
                    return Err(error);
                }
            }
        }
        for change in before.0.iter().filter(|c| !done.contains(c)).rev() {
            unmake(&handle, change).await;
        }
        Ok(Plumbing(done))
    })?
}

/// Unmake all of it. Goes on after a failure, which is logged.
pub fn remove(netns: &Netns, plumbing: &Plumbing) {
    let changes = plumbing.0.clone();
    if changes.is_empty() {
        return;
    }
    let removed = inside(netns, async move |handle| {
        for change in changes.iter().rev() {
            unmake(&handle, change).await;
        }
    });
    if let Err(error) = removed {
        tracing::warn!(
            netns = netns.name(),
            error = &error as &dyn std::error::Error,
            "restoring the namespace"
        );
    }
}

fn inside<T: Send, F: AsyncFnOnce(Handle) -> T + Send>(netns: &Netns, work: F) -> Result<T, PlumbingError> {
    netns.run(|| {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(PlumbingError::Open)?;
        runtime.block_on(async {
            let (connection, handle, _) = rtnetlink::new_connection().map_err(PlumbingError::Open)?;
            let connection = tokio::spawn(connection);
            let result = work(handle).await;
            connection.abort();
            Ok(result)
        })
    })?
}

fn has_v6() -> bool {
    fs::read_to_string(DISABLE_V6).is_ok_and(|value| value.trim() == "0")
}

/// The table of -k: any that is neither the kernel's nor that of -r.
fn guest_table(config: &Config) -> u32 {
    if config.tproxy_table == 15001 { 15002 } else { 15001 }
}

/// `links` are the names of the namespace's interfaces.
fn wanted(config: &Config, links: &[String]) -> Vec<Change> {
    let mut changes = Vec::new();
    let v6 = has_v6();
    if v6 {
        changes.push(Change::PassthroughAddress);
        let (net, len) = Addr::SPREAD_PREFIX_V6;
        changes.push(Change::LocalPrefix { net: Ipv6Net::new_assert(net, len).into() });
    }
    for (net, len) in Addr::SPREAD_PREFIXES_V4.into_iter().chain([Addr::NUMBERED_PREFIX_V4]) {
        changes.push(Change::LocalPrefix { net: Ipv4Net::new_assert(net, len).into() });
    }
    if config.dns != Dns::Off {
        for interface in links.iter().filter(|name| *name != "lo") {
            for v6 in [false, true].into_iter().take(1 + usize::from(v6)) {
                changes.push(Change::LocalhostBy { v6, interface: interface.clone() });
            }
        }
    }
    if config.mode == InboundMode::Tproxy {
        let (mark, table) = (config.tproxy_mark, config.tproxy_table);
        for v6 in [false, true].into_iter().take(1 + usize::from(v6)) {
            changes.push(Change::LocalTable { v6, table });
            changes.push(Change::MarkRule { v6, mark, table });
        }
        changes.push(Change::AcceptMark { before: String::new() });
    }
    changes.extend(guests(config, links, v6));
    changes
}

/// netfilter rewrites what arrives on an interface of -k to an address of the pod. Here it keeps its destination, so
/// the pod must take that for its own, on these interfaces only.
fn guests(config: &Config, links: &[String], v6: bool) -> Vec<Change> {
    let table = guest_table(config);
    let interfaces: Vec<&String> =
        links.iter().filter(|name| config.virt_interfaces.iter().any(|named| named.matches(name))).collect();
    if interfaces.is_empty() {
        return Vec::new();
    }
    let everything = [IpNet::V4(Ipv4Net::default()), IpNet::V6(Ipv6Net::default())];
    let nets: &[IpNet] = if config.include.all { &everything } else { &config.include.list };
    let nets = nets.iter().filter(|net| v6 || net.addr().is_ipv4());
    let mut changes: Vec<Change> = nets.map(|&net| Change::GuestRoute { net, table }).collect();
    for interface in interfaces {
        for v6 in [false, true].into_iter().take(1 + usize::from(v6)) {
            changes.push(Change::GuestRule { v6, interface: interface.clone(), table });
        }
    }
    changes
}

impl Change {
    /// Whether two are the same change, whatever was before it.
    fn same(&self, other: &Self) -> bool {
        matches!((self, other), (Self::AcceptMark { .. }, Self::AcceptMark { .. })) || self == other
    }
}

/// Make a change. None if it was made by someone else already.
async fn make(handle: &Handle, change: Change) -> Result<Option<Change>, PlumbingError> {
    let failed = |action| move |source| PlumbingError::Netlink { action, source: Box::new(source) };
    let made = match &change {
        Change::PassthroughAddress => {
            let lo = loopback(handle).await?;
            let added = handle.address().add(lo, IpAddr::V6(PASSTHROUGH_V6), 128).execute().await;
            let added = unless_there(added).map_err(failed("adding ::6/128 to the loopback interface"))?;
            // The kernel makes its route a moment later, and the mirror is to find it.
            for _ in 0..1000 {
                if UdpSocket::bind((PASSTHROUGH_V6, 0))
                    .and_then(|socket| socket.connect((PASSTHROUGH_V6, 9)))
                    .is_ok()
                {
                    break;
                }
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            added
        }
        Change::LocalPrefix { net } => add_local_prefix(handle, *net).await?,
        Change::LocalhostBy { v6, interface } => add_localhost_by(handle, *v6, interface).await?,
        Change::GuestRoute { net, table } => {
            let route = local_route(*net, *table, loopback(handle).await?);
            unless_there(handle.route().add(route).execute().await)
                .map_err(failed("adding a local route for a network of -i to the table of -k"))?
        }
        Change::GuestRule { v6, interface, table } => {
            let mut request = handle.rule().add();
            *request.message_mut() = guest_rule(*v6, interface, *table);
            let there = rules(handle, *v6).await?.iter().any(|rule| is_guest_rule(rule, interface, *table));
            !there
                && unless_there(request.execute().await)
                    .map_err(failed("adding a rule for an interface of -k"))?
        }
        Change::LocalTable { v6, table } => {
            let route = local_route(everything(*v6), *table, loopback(handle).await?);
            unless_there(handle.route().add(route).execute().await)
                .map_err(failed("adding a local default route to the table of -r"))?
        }
        Change::MarkRule { v6, mark, table } => {
            let mut request = handle.rule().add();
            *request.message_mut() = mark_rule(*v6, *mark, *table);
            // The kernel takes the same rule twice; another's is told by looking.
            if rules(handle, *v6).await?.iter().any(|rule| is_mark_rule(rule, *mark, *table)) {
                false
            } else {
                unless_there(request.execute().await).map_err(failed("adding a rule for the mark of -t"))?
            }
        }
        Change::AcceptMark { .. } => {
            let sysctl = |source| PlumbingError::Sysctl { path: ACCEPT_MARK, source };
            let before = fs::read_to_string(ACCEPT_MARK).map_err(sysctl)?.trim().to_owned();
            if before == "1" {
                return Ok(None);
            }
            set(ACCEPT_MARK, "1").map_err(sysctl)?;
            return Ok(Some(Change::AcceptMark { before }));
        }
    };
    Ok(made.then_some(change))
}

/// Unmake a change; what is gone already is fine, anything else is logged.
async fn unmake(handle: &Handle, change: &Change) {
    let result = match change {
        Change::PassthroughAddress => del_passthrough(handle).await,
        Change::LocalTable { v6, table } => match loopback(handle).await {
            Ok(lo) => {
                let route = local_route(everything(*v6), *table, lo);
                handle.route().del(route).execute().await.map_err(box_netlink)
            }
            Err(error) => Err(error),
        },
        Change::LocalPrefix { net } => match loopback(handle).await {
            Ok(lo) => {
                let route = local_prefix_route(*net, lo);
                handle.route().del(route).execute().await.map_err(box_netlink)
            }
            Err(error) => Err(error),
        },
        Change::LocalhostBy { v6, interface } => match index_of(handle, interface).await {
            Ok(Some(index)) => {
                handle.route().del(localhost_route(*v6, index)).execute().await.map_err(box_netlink)
            }
            // Its routes went with it.
            Ok(None) => Ok(()),
            Err(error) => Err(error),
        },
        Change::GuestRoute { net, table } => match loopback(handle).await {
            Ok(lo) => handle.route().del(local_route(*net, *table, lo)).execute().await.map_err(box_netlink),
            Err(error) => Err(error),
        },
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
    if let Err(error) = result {
        tracing::warn!(
            ?change,
            error = &error as &dyn std::error::Error,
            "undoing a change of the namespace"
        );
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
    PlumbingError::Netlink { action: "removing it", source: Box::new(source) }
}

fn unless_there(result: Result<(), rtnetlink::Error>) -> Result<bool, rtnetlink::Error> {
    match result {
        Ok(()) => Ok(true),
        Err(rtnetlink::Error::NetlinkError(message)) if message.raw_code() == -libc::EEXIST => Ok(false),
        Err(error) => Err(error),
    }
}

const PASSTHROUGH_V6: Ipv6Addr = Ipv6Addr::new(0, 0, 0, 0, 0, 0, 0, 6);

async fn loopback(handle: &Handle) -> Result<u32, PlumbingError> {
    let action = "looking for the loopback interface";
    let mut links = handle.link().get().match_name("lo".to_owned()).execute();
    match links.try_next().await {
        Ok(Some(link)) => Ok(link.header.index),
        Ok(None) => Err(PlumbingError::Open(io::Error::new(io::ErrorKind::NotFound, action))),
        Err(source) => Err(PlumbingError::Netlink { action, source: Box::new(source) }),
    }
}

async fn del_passthrough(handle: &Handle) -> Result<(), PlumbingError> {
    let lo = loopback(handle).await?;
    let mut addresses = handle
        .address()
        .get()
        .set_link_index_filter(lo)
        .set_address_filter(IpAddr::V6(PASSTHROUGH_V6))
        .execute();
    while let Some(address) = addresses.try_next().await.map_err(box_netlink)? {
        handle.address().del(address).execute().await.map_err(box_netlink)?;
    }
    Ok(())
}

/// The names of all interfaces.
async fn links(handle: &Handle) -> Result<Vec<String>, PlumbingError> {
    let failed =
        |source| PlumbingError::Netlink { action: "listing the interfaces", source: Box::new(source) };
    let found: Vec<_> = handle.link().get().execute().try_collect().await.map_err(failed)?;
    let name = |link: LinkMessage| {
        link.attributes.into_iter().find_map(|attribute| match attribute {
            LinkAttribute::IfName(name) => Some(name),
            _ => None,
        })
    };
    Ok(found.into_iter().filter_map(name).collect())
}

fn everything(v6: bool) -> IpNet {
    if v6 { Ipv6Net::default().into() } else { Ipv4Net::default().into() }
}

fn local_route(net: IpNet, table: u32, lo: u32) -> RouteMessage {
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
