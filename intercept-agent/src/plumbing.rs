//! What is changed in a pod's namespace itself, as istio-iptables changes it: an address that the proxy's inbound
//! passthrough binds, in TPROXY mode the rules and routes that bring marked packets to the loopback interface, and for
//! the interfaces of -k those that keep what arrives there for elsewhere in the pod.
//!
//! What was there already is left alone, when installing and when removing. Three steps: [`plan`] decides without
//! changing anything, [`add`] comes before a policy is active, [`remove`] after another has replaced it.

use std::{
    fs, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use futures_util::TryStreamExt as _;
use intercept_common::Addr;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use netlink_packet_route::{
    AddressFamily, IpProtocol,
    route::{RouteAddress, RouteAttribute, RouteMessage, RouteScope, RouteType},
    rule::{RuleAction, RuleAttribute, RuleHeader, RuleMessage},
};
use rtnetlink::{Handle, RouteMessageBuilder};
use serde::{Deserialize, Serialize};

mod localhost;

use localhost::{add_local_prefix, add_localhost_by, index_of, local_prefix_route, localhost_route};

use crate::{
    mirror::Mirror,
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

/// What a namespace is like, as far as that decides what is to be changed in it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// IPv6 is on.
    v6: bool,
    /// The loopback interface is up: IPv6 takes no route by one that is not, and none outlives its going down.
    loopback_up: bool,
    /// The setting that [`Change::AcceptMark`] changes.
    accept_mark: String,
    /// What the options ask for and exists, made by the agent or not.
    present: Vec<Change>,
}

/// What is to be changed in a namespace: decided before anything is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    kept: Vec<Change>,
    added: Vec<Change>,
    dropped: Vec<Change>,
}

impl Plan {
    /// Whether nothing is to be changed.
    pub fn is_empty(&self) -> bool {
        self.added.is_empty() && self.dropped.is_empty()
    }

    /// What will be the agent's own once everything is added and what is not asked for any more is removed.
    pub fn result(&self) -> Plumbing {
        Plumbing(self.kept.iter().chain(&self.added).cloned().collect())
    }

    /// What is to be added.
    pub fn additions(&self) -> Plumbing {
        Plumbing(self.added.clone())
    }

    /// What is to be removed once the policy that needed it is replaced.
    pub fn removals(&self) -> Plumbing {
        Plumbing(self.dropped.clone())
    }

    /// The namespace's routes as they will be once everything is added.
    pub fn expected(&self, mirror: Mirror) -> Mirror {
        // Routes in the tables of -r and -k are for marked and for arriving packets: no output route changes.
        // Nor does a second route to localhost, which comes after the first.
        self.added.iter().fold(mirror, |mirror, change| match change {
            Change::PassthroughAddress => mirror.with_loopback_address(PASSTHROUGH_V6.into()),
            Change::LocalPrefix { net } => mirror.with_local_prefix(*net),
            _ => mirror,
        })
    }
}

impl Plumbing {
    /// What of it is not in `other`.
    pub fn without(&self, other: &Self) -> Self {
        let only = |change: &&Change| !other.0.iter().any(|o| o.same(change));
        Self(self.0.iter().filter(only).cloned().collect())
    }

    /// Whether there is nothing of the agent's own.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// Looks at the namespace, whose routes and interfaces are in `mirror`; changes nothing.
pub fn find(netns: &Netns, config: &Config, mirror: &Mirror) -> Result<Found, PlumbingError> {
    let mut found = netns.run(|| -> Result<Found, PlumbingError> {
        let accept_mark = match config.mode {
            InboundMode::Redirect => String::new(),
            InboundMode::Tproxy => {
                let sysctl = |source| PlumbingError::Sysctl { path: ACCEPT_MARK, source };
                fs::read_to_string(ACCEPT_MARK).map_err(sysctl)?.trim().to_owned()
            }
        };
        let loopback_up = mirror.interfaces.iter().any(|interface| interface.loopback && interface.up);
        Ok(Found { v6: has_v6(), loopback_up, accept_mark, present: Vec::new() })
    })??;
    let is_local = |change: &Change| matches!(change, Change::LocalPrefix { net } if mirror.is_local(net));
    let (local, asked): (Vec<_>, Vec<_>) =
        wanted(config, &mirror.interface_names(), &found).into_iter().partition(is_local);
    found.present = inside(netns, async move |handle| present(&handle, asked).await)??;
    found.present.extend(local);
    Ok(found)
}

/// What is to be done for these options; changes nothing.
pub fn plan(config: &Config, interfaces: &[&str], found: &Found, before: &Plumbing) -> Plan {
    let wanted = wanted(config, interfaces, found);
    let (kept, dropped): (Vec<Change>, Vec<Change>) =
        before.0.iter().cloned().partition(|change| wanted.iter().any(|w| w.same(change)));
    let is_new =
        |change: &Change| ![&kept, &found.present].iter().any(|list| list.iter().any(|c| c.same(change)));
    let added = wanted.into_iter().filter(is_new).collect();
    Plan { kept, added, dropped }
}

/// Adds what is planned. `made` is what it added, also after a failure, when the caller removes it: less than planned if
/// another process made it since.
pub fn add(netns: &Netns, additions: &Plumbing, made: &mut Plumbing) -> Result<(), PlumbingError> {
    if additions.is_empty() {
        return Ok(());
    }
    let additions = additions.0.clone();
    let added = inside(netns, async move |handle| {
        let mut done: Vec<Change> = Vec::new();
        for change in additions {
            match make(&handle, change).await {
                Ok(made) => done.extend(made),
                Err(error) => return (done, Err(error)),
            }
        }
        (done, Ok(()))
    });
    let (done, result) = added?;
    made.0.extend(done);
    result
}

/// Removes all of it. A failure is logged and the rest is removed all the same; it is an error only if a later call may
/// succeed, because memory was short or netlink was interrupted.
pub fn remove(netns: &Netns, plumbing: &Plumbing) -> Result<(), PlumbingError> {
    let changes = plumbing.0.clone();
    if changes.is_empty() {
        return Ok(());
    }
    inside(netns, async move |handle| {
        let mut removed = Ok(());
        for change in changes.iter().rev() {
            if let Err(error) = unmake(&handle, change).await
                && error.may_pass()
            {
                removed = Err(error);
            }
        }
        removed
    })?
}

impl PlumbingError {
    /// Whether it is about a shortage or an interrupted call, so that a later call may succeed.
    fn may_pass(&self) -> bool {
        let code = match self {
            Self::Netns(_) => None,
            Self::Open(error) | Self::Sysctl { source: error, .. } => error.raw_os_error(),
            Self::Netlink { source, .. } => match &**source {
                rtnetlink::Error::NetlinkError(message) => Some(-message.raw_code()),
                // The question did not reach the kernel.
                _ => Some(libc::EAGAIN),
            },
        };
        let is_short = [libc::ENOMEM, libc::ENOBUFS, libc::EMFILE, libc::ENFILE, libc::EINTR, libc::EAGAIN];
        code.is_some_and(|code| is_short.contains(&code))
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

/// What the options ask for.
/// What redirected connections dial and queries come from.
fn local_prefixes(v6: bool) -> impl Iterator<Item = IpNet> {
    let (net, len) = Addr::SPREAD_PREFIX_V6;
    let of_v6 = v6.then(|| IpNet::V6(Ipv6Net::new_assert(net, len)));
    let of_v4 = Addr::SPREAD_PREFIXES_V4.into_iter().chain([Addr::NUMBERED_PREFIX_V4]);
    of_v6.into_iter().chain(of_v4.map(|(net, len)| Ipv4Net::new_assert(net, len).into()))
}

fn wanted(config: &Config, interfaces: &[&str], found: &Found) -> Vec<Change> {
    let mut changes = Vec::new();
    let v6 = found.v6;
    if v6 {
        changes.push(Change::PassthroughAddress);
    }
    if found.loopback_up {
        changes.extend(local_prefixes(v6).map(|net| Change::LocalPrefix { net }));
    }
    if config.dns != Dns::Off && found.loopback_up {
        for interface in interfaces.iter().filter(|name| **name != "lo") {
            for v6 in [false, true].into_iter().take(1 + usize::from(v6)) {
                changes.push(Change::LocalhostBy { v6, interface: (*interface).to_owned() });
            }
        }
    }
    if config.mode == InboundMode::Tproxy {
        let (mark, table) = (config.tproxy_mark, config.tproxy_table);
        for v6 in [false, true].into_iter().take(1 + usize::from(v6)) {
            changes.push(Change::LocalTable { v6, table });
            changes.push(Change::MarkRule { v6, mark, table });
        }
        changes.push(Change::AcceptMark { before: found.accept_mark.clone() });
    }
    changes.extend(guests(config, interfaces, v6));
    changes
}

/// netfilter rewrites what arrives on an interface of -k to an address of the pod. Here it keeps its destination, so
/// the pod must take that for its own, on these interfaces only.
fn guests(config: &Config, interfaces: &[&str], v6: bool) -> Vec<Change> {
    let table = guest_table(config);
    let is_named = |name: &&&str| config.virt_interfaces.iter().any(|named| named.matches(name));
    let interfaces: Vec<&&str> = interfaces.iter().filter(is_named).collect();
    if interfaces.is_empty() {
        return Vec::new();
    }
    let everything = [IpNet::V4(Ipv4Net::default()), IpNet::V6(Ipv6Net::default())];
    let nets: &[IpNet] = if config.include.all { &everything } else { &config.include.list };
    let nets = nets.iter().filter(|net| v6 || net.addr().is_ipv4());
    let mut changes: Vec<Change> = nets.map(|&net| Change::GuestRoute { net, table }).collect();
    for interface in interfaces {
        for v6 in [false, true].into_iter().take(1 + usize::from(v6)) {
            changes.push(Change::GuestRule { v6, interface: (*interface).to_owned(), table });
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

/// Those of the changes that are made already.
async fn present(handle: &Handle, changes: Vec<Change>) -> Result<Vec<Change>, PlumbingError> {
    let lo = loopback(handle).await?;
    let mut state = Present { addresses: None, rules: [None, None], routes: [None, None] };
    let mut found = Vec::new();
    for change in changes {
        let there = match &change {
            Change::PassthroughAddress => state.has_passthrough(handle, lo).await?,
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
    async fn has_passthrough(&mut self, handle: &Handle, lo: u32) -> Result<bool, PlumbingError> {
        if let Some(there) = self.addresses {
            return Ok(there);
        }
        let failed = |source| netlink("reading the addresses of the loopback interface", source);
        let addresses = handle.address().get().set_link_index_filter(lo);
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
async fn make(handle: &Handle, change: Change) -> Result<Option<Change>, PlumbingError> {
    let made = match &change {
        Change::PassthroughAddress => {
            let lo = loopback(handle).await?;
            let added = handle.address().add(lo, IpAddr::V6(PASSTHROUGH_V6), 128).execute().await;
            unless_there(added).map_err(|e| netlink("adding ::6/128 to the loopback interface", e))?
        }
        Change::LocalPrefix { net } => add_local_prefix(handle, *net).await?,
        Change::LocalhostBy { v6, interface } => add_localhost_by(handle, *v6, interface).await?,
        Change::GuestRoute { net, table } => {
            let route = local_route(*net, *table, loopback(handle).await?);
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
            let route = local_route(everything(*v6), *table, loopback(handle).await?);
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
async fn unmake(handle: &Handle, change: &Change) -> Result<(), PlumbingError> {
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

#[cfg(test)]
mod tests;
