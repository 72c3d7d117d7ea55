//! Changes in a pod's namespace like those of istio-iptables: an address that the proxy's inbound passthrough binds; in
//! TPROXY mode, rules and routes that lead marked packets to the loopback interface; and for the interfaces of -k,
//! rules and routes that deliver their traffic for other destinations in the pod. Also the addresses that redirected
//! connections use.
//!
//! Existing addresses, rules and routes are neither replaced nor removed. [`plan`] decides without a change,
//! [`add_addresses`] and [`add_others`] run before a policy is activated, and [`remove`] after another has replaced it.

use std::{
    fs, io, thread,
    time::{Duration, Instant},
};

use intercept_common::{Addr, Family};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use netlink_sys::protocols::NETLINK_ROUTE;
use serde::{Deserialize, Serialize};

mod change;
mod confined;
mod localhost;

use change::{ACCEPT_MARK, NetnsChange, PASSTHROUGH_V6, make, present, unmake};
use confined::after_local;

use crate::{
    netlink::Questions,
    netns::{Netns, NetnsError},
    options::{Config, Dns, InboundMode},
    routes::{Reach, Route, RouteReading, RouteSnapshot, RouteSocket},
};

/// How long the kernel may take to deliver to an address that was added.
const DELIVERY_TIME: Duration = Duration::from_secs(1);
/// Questions whether it does that are asked without a pause.
const DELIVERY_ATTEMPTS: u32 = 4;
/// Pause between two later ones.
const DELIVERY_INTERVAL: Duration = Duration::from_micros(100);

/// Changes that the agent has made in a namespace, in order.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct NetnsChanges(Vec<NetnsChange>);

/// Why a namespace cannot be changed.
#[derive(Debug, thiserror::Error)]
pub enum NetnsSetupError {
    #[error(transparent)]
    Netns(#[from] NetnsError),
    #[error("opening a netlink socket in the pod's namespace")]
    Open(#[source] io::Error),
    #[error("{action} (needs CAP_NET_ADMIN in the pod's namespace)")]
    Netlink { action: &'static str, source: io::Error },
    #[error("setting {path} in the pod's namespace")]
    Sysctl { path: &'static str, source: io::Error },
}

/// The state of a namespace that determines its changes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NetnsState {
    /// Whether IPv6 is enabled.
    has_v6: bool,
    /// Whether the loopback interface is up. IPv6 routes through an interface that is down are refused, and routes are
    /// removed when it goes down.
    loopback_up: bool,
    /// The stand-in prefixes whose only local route is their own. The route is removed when the loopback interface is
    /// set down.
    confined: Vec<IpNet>,
    /// Value of the setting that [`NetnsChange::AcceptMark`] changes.
    accept_mark: String,
    /// The priority of a rule right after that of the local table, of IPv4 and of IPv6. `None` if the kernel has no rules:
    /// then the local table is searched first, and nothing can be added after it.
    after_local: [Option<u32>; 2],
    /// The desired changes that already exist, made by the agent or not.
    present: Vec<NetnsChange>,
}

/// The changes to make in a namespace, decided before the first one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NetnsPlan {
    kept: Vec<NetnsChange>,
    added: Vec<NetnsChange>,
    dropped: Vec<NetnsChange>,
    after_local: [Option<u32>; 2],
    loopback_up: bool,
}

impl NetnsPlan {
    /// Whether there is nothing to change.
    pub fn is_empty(&self) -> bool {
        self.added.is_empty() && self.dropped.is_empty()
    }

    /// Returns the agent's changes after all additions and removals.
    pub fn result(&self) -> NetnsChanges {
        NetnsChanges(self.kept.iter().chain(&self.added).cloned().collect())
    }

    /// Returns the changes to add.
    pub fn additions(&self) -> NetnsAdditions {
        let Self { added, after_local, loopback_up, .. } = self;
        let changes = NetnsChanges(added.clone());
        NetnsAdditions { changes, after_local: *after_local, loopback_up: *loopback_up }
    }

    /// Returns the changes to remove after the policy that needed them has been replaced.
    pub fn removals(&self) -> NetnsChanges {
        NetnsChanges(self.dropped.clone())
    }

    /// Returns the namespace's routes after all additions.
    pub fn expected(&self, snapshot: RouteSnapshot) -> RouteSnapshot {
        // Routes in the tables of -r and -k are for marked or arriving packets, so output routes do not change. A
        // second route to localhost has no effect either, because it comes after the first.
        self.added.iter().fold(snapshot, |snapshot, change| match change {
            NetnsChange::PassthroughAddress => snapshot.with_loopback_address(PASSTHROUGH_V6.into()),
            NetnsChange::LocalPrefix { net } => snapshot.with_local_prefix(*net),
            _ => snapshot,
        })
    }
}

/// The changes to add, and what is needed to make them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NetnsAdditions {
    /// The changes.
    pub changes: NetnsChanges,
    after_local: [Option<u32>; 2],
    loopback_up: bool,
}

impl NetnsChanges {
    /// Adds those of `other` that are not among them.
    pub fn merge(&mut self, other: &Self) {
        let more = other.without(self);
        self.0.extend(more.0);
    }

    /// Returns the changes that are not in `other`.
    pub fn without(&self, other: &Self) -> Self {
        let only = |change: &&NetnsChange| !other.0.iter().any(|o| o.same(change));
        Self(self.0.iter().filter(only).cloned().collect())
    }

    /// Whether the agent has made no changes.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// Reads the state of a namespace, beyond what was read for its routes.
pub fn find(netns: &Netns, config: &Config, reading: &RouteReading) -> Result<NetnsState, NetnsSetupError> {
    let RouteReading { snapshot, listed, socket } = reading;
    let mut found = netns.run(|| -> Result<NetnsState, NetnsSetupError> {
        let accept_mark = match config.mode {
            InboundMode::Redirect => String::new(),
            InboundMode::Tproxy => {
                let sysctl = |source| NetnsSetupError::Sysctl { path: ACCEPT_MARK, source };
                fs::read_to_string(ACCEPT_MARK).map_err(sysctl)?.trim().to_owned()
            }
        };
        let loopback_up = snapshot.interfaces.iter().any(|interface| interface.loopback && interface.up);
        let has_v6 = listed.has_v6;
        let confined =
            local_prefixes(families(has_v6)).filter(|net| !is_inside_local(snapshot, net)).collect();
        let after_local = listed.rules.each_ref().map(|rules| after_local(rules));
        Ok(NetnsState { has_v6, loopback_up, confined, accept_mark, after_local, present: Vec::new() })
    })??;
    let is_local =
        |change: &NetnsChange| matches!(change, NetnsChange::LocalPrefix { net } if snapshot.is_local(net));
    let (local, asked): (Vec<_>, Vec<_>) =
        wanted(config, &snapshot.interface_names(), &found).into_iter().partition(is_local);
    found.present = netns.run(|| socket.with(|questions| present(questions, &listed.rules, asked)))??;
    found.present.extend(local);
    Ok(found)
}

/// Returns the changes for these options, without making them. `before` are the agent's earlier changes. `shared` are those
/// that it made for other workloads in the namespace: who needs one of them as well may be the last to remove it.
pub fn plan(
    config: &Config,
    interfaces: &[&str],
    found: &NetnsState,
    before: &NetnsChanges,
    shared: &NetnsChanges,
) -> NetnsPlan {
    if config.shadow {
        // Connections of a pod that was enforced go on, and need what was added for them.
        return NetnsPlan { kept: before.0.clone(), ..NetnsPlan::default() };
    }
    let wanted = wanted(config, interfaces, found);
    let (mut kept, dropped): (Vec<NetnsChange>, Vec<NetnsChange>) =
        before.0.iter().cloned().partition(|change| wanted.iter().any(|w| w.same(change)));
    let also = shared.without(before).0.into_iter().filter(|change| wanted.iter().any(|w| w.same(change)));
    kept.extend(also);
    let dropped = NetnsChanges(dropped).without(shared).0;
    let is_new = |change: &NetnsChange| {
        ![&kept, &found.present].iter().any(|list| list.iter().any(|c| c.same(change)))
    };
    let added = wanted.into_iter().filter(is_new).collect();
    NetnsPlan { kept, added, dropped, after_local: found.after_local, loopback_up: found.loopback_up }
}

/// Adds the addresses of a plan. The kernel completes them in the background, during the next steps of an attach. No
/// connection uses them before a policy is active. For `made` see [`add_others`].
pub fn add_addresses(
    netns: &Netns,
    socket: &RouteSocket,
    additions: &NetnsAdditions,
    made: &mut NetnsChanges,
) -> Result<(), NetnsSetupError> {
    add(netns, socket, additions, NetnsChange::is_address, made)
}

/// Makes the other changes of a plan, and waits until its addresses can be used. `made` receives those that were made, even
/// after a failure, so that the caller can remove them. They are fewer than planned if another process has made some since.
pub fn add_others(
    netns: &Netns,
    socket: &RouteSocket,
    additions: &NetnsAdditions,
    made: &mut NetnsChanges,
) -> Result<(), NetnsSetupError> {
    add(netns, socket, additions, |change| !change.is_address(), made)?;
    if additions.loopback_up && made.0.contains(&NetnsChange::PassthroughAddress) {
        await_delivery(netns, socket);
    }
    Ok(())
}

fn add(
    netns: &Netns,
    socket: &RouteSocket,
    additions: &NetnsAdditions,
    is_now: impl Fn(&NetnsChange) -> bool,
    made: &mut NetnsChanges,
) -> Result<(), NetnsSetupError> {
    let now: Vec<_> = additions.changes.0.iter().filter(|&change| is_now(change)).cloned().collect();
    if now.is_empty() {
        return Ok(());
    }
    netns.run(|| {
        socket.with(|questions| -> Result<(), NetnsSetupError> {
            for change in now {
                made.0.extend(make(questions, change, additions.after_local)?);
            }
            Ok(())
        })
    })?
}

/// Waits until packets to `::6` arrive. The kernel adds the local route of an address from a work queue, after it has
/// acknowledged the address. Until then it routes packets to the loopback interface and drops them there.
fn await_delivery(netns: &Netns, socket: &RouteSocket) {
    let deadline = Instant::now() + DELIVERY_TIME;
    let mut asked = 0;
    let late = loop {
        // The work queue may be waiting for this processor, and then needs a few microseconds of it.
        thread::yield_now();
        match socket.is_local(PASSTHROUGH_V6.into()) {
            Ok(true) => return,
            Ok(false) if Instant::now() >= deadline => break None,
            Ok(false) if asked < DELIVERY_ATTEMPTS => asked += 1,
            Ok(false) => thread::sleep(DELIVERY_INTERVAL),
            Err(error) => break Some(error),
        }
    };
    tracing::warn!(
        netns = netns.name(),
        error = late.as_ref().map(|error| error as &dyn std::error::Error),
        "the kernel does not deliver to ::6 yet: connections to it may be slow at first"
    );
}

/// Removes all changes. A failure is logged and the remaining changes are still removed.
///
/// # Errors
/// Only failures that a later call may not have: lack of memory or descriptors, and interrupted calls.
pub fn remove(netns: &Netns, netns_setup: &NetnsChanges) -> Result<(), NetnsSetupError> {
    let changes = netns_setup.0.clone();
    if changes.is_empty() {
        return Ok(());
    }
    inside(netns, |questions| {
        let mut removed = Ok(());
        for change in changes.iter().rev() {
            if let Err(error) = unmake(questions, change)
                && error.may_pass()
            {
                removed = Err(error);
            }
        }
        removed
    })?
}

impl NetnsSetupError {
    /// Whether a later call may succeed: lack of memory or descriptors, or an interrupted call.
    fn may_pass(&self) -> bool {
        let code = match self {
            Self::Netns(_) => None,
            Self::Open(error) | Self::Sysctl { source: error, .. } | Self::Netlink { source: error, .. } => {
                error.raw_os_error()
            }
        };
        let is_short = [libc::ENOMEM, libc::ENOBUFS, libc::EMFILE, libc::ENFILE, libc::EINTR, libc::EAGAIN];
        code.is_some_and(|code| is_short.contains(&code))
    }
}

fn inside<T: Send>(
    netns: &Netns,
    work: impl FnOnce(&mut Questions) -> T + Send,
) -> Result<T, NetnsSetupError> {
    netns.run(|| {
        let mut questions = Questions::open(netns, NETLINK_ROUTE)?.map_err(NetnsSetupError::Open)?;
        Ok(work(&mut questions))
    })?
}

/// Returns the table for -k, which is neither one of the kernel's nor that of -r.
fn guest_table(config: &Config) -> u32 {
    if config.tproxy_table == 15001 { 15002 } else { 15001 }
}

/// Whether a prefix is inside a larger local one, such as 127.0.0.0/8.
fn is_inside_local(snapshot: &RouteSnapshot, net: &IpNet) -> bool {
    let around = |route: &&Route| route.prefix != *net && route.prefix.contains(net);
    snapshot.routes.iter().filter(around).any(|route| route.reach == Reach::Local)
}

/// The families in which a namespace is captured.
fn families(has_v6: bool) -> &'static [Family] {
    if has_v6 { &Family::ALL } else { &[Family::V4] }
}

/// Returns the prefixes to which redirected connections connect and from which queries are sent.
fn local_prefixes(families: &[Family]) -> impl Iterator<Item = IpNet> {
    let (net, len) = Addr::STAND_IN_PREFIX_V6;
    let of_v6 = families.contains(&Family::V6).then(|| IpNet::V6(Ipv6Net::new_assert(net, len)));
    let of_v4 = Addr::STAND_IN_PREFIXES_V4.into_iter().chain([Addr::NUMBERED_PREFIX_V4]);
    of_v6.into_iter().chain(of_v4.map(|(net, len)| Ipv4Net::new_assert(net, len).into()))
}

/// Returns the changes that the options need.
fn wanted(config: &Config, interfaces: &[&str], found: &NetnsState) -> Vec<NetnsChange> {
    let mut changes = Vec::new();
    if config.shadow {
        return changes;
    }
    let families = families(found.has_v6);
    if found.has_v6 {
        changes.push(NetnsChange::PassthroughAddress);
    }
    if found.loopback_up {
        changes.extend(found.confined.iter().map(|&net| NetnsChange::Confined { net }));
        changes.extend(local_prefixes(families).map(|net| NetnsChange::LocalPrefix { net }));
    }
    if config.dns != Dns::Off && found.loopback_up {
        for interface in interfaces.iter().filter(|name| **name != "lo") {
            for &family in families {
                changes.push(NetnsChange::LocalhostBy { family, interface: (*interface).to_owned() });
            }
        }
    }
    if config.mode == InboundMode::Tproxy {
        let (mark, table) = (config.tproxy_mark, config.tproxy_table);
        for &family in families {
            changes.push(NetnsChange::LocalTable { family, table });
            changes.push(NetnsChange::MarkRule { family, mark, table });
        }
        changes.push(NetnsChange::AcceptMark { before: found.accept_mark.clone() });
    }
    changes.extend(guests(config, interfaces, families));
    changes
}

/// Returns the changes for guests. netfilter rewrites the destination of packets that arrive on an interface of -k to
/// an address of the pod. Here the destination stays, so it must be local in the pod, only for these interfaces.
fn guests(config: &Config, interfaces: &[&str], families: &[Family]) -> Vec<NetnsChange> {
    let table = guest_table(config);
    let is_named = |name: &&&str| config.virt_interfaces.iter().any(|named| named.matches(name));
    let interfaces: Vec<&&str> = interfaces.iter().filter(is_named).collect();
    if interfaces.is_empty() {
        return Vec::new();
    }
    let everything = [IpNet::V4(Ipv4Net::default()), IpNet::V6(Ipv6Net::default())];
    let nets: &[IpNet] = if config.include.all { &everything } else { &config.include.list };
    let nets = nets.iter().filter(|net| families.contains(&Family::of(&net.addr())));
    let mut changes: Vec<NetnsChange> = nets.map(|&net| NetnsChange::GuestRoute { net, table }).collect();
    for interface in interfaces {
        for &family in families {
            changes.push(NetnsChange::GuestRule { family, interface: (*interface).to_owned(), table });
        }
    }
    changes
}

#[cfg(test)]
mod tests;
