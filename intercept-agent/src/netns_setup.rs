//! What is changed in a pod's namespace itself, as istio-iptables changes it: an address that the proxy's inbound
//! passthrough binds, in TPROXY mode the rules and routes that bring marked packets to the loopback interface, and for
//! the interfaces of -k those that keep what arrives there for elsewhere in the pod.
//!
//! What was there already is left alone, when installing and when removing. Three steps: [`plan`] decides without
//! changing anything, [`add`] comes before a policy is active, [`remove`] after another has replaced it.

use std::{fs, io};

use intercept_common::Addr;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use netlink_sys::protocols::NETLINK_ROUTE;
use serde::{Deserialize, Serialize};

mod change;
mod confined;
mod localhost;

use change::{ACCEPT_MARK, NetnsChange, PASSTHROUGH_V6, make, present, unmake};

use crate::{
    netlink::Questions,
    netns::{Netns, NetnsError},
    options::{Config, Dns, InboundMode},
    routes::{Reach, Route, RouteSnapshot},
};

/// Changes made in a namespace, in order.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct NetnsChanges(Vec<NetnsChange>);

/// Why the namespace could not be prepared.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "each is its text")]
pub enum NetnsSetupError {
    #[error(transparent)]
    Netns(#[from] NetnsError),
    #[error("opening netlink in it")]
    Open(#[source] io::Error),
    #[error("{action} (needs CAP_NET_ADMIN in it)")]
    Netlink { action: &'static str, source: io::Error },
    #[error("setting {path} in it")]
    Sysctl { path: &'static str, source: io::Error },
}

const DISABLE_V6: &str = "/proc/sys/net/ipv6/conf/lo/disable_ipv6";

/// What a namespace is like, as far as that decides what is to be changed in it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NetnsState {
    /// IPv6 is on.
    v6: bool,
    /// The loopback interface is up: IPv6 takes no route by one that is not, and none outlives its going down.
    loopback_up: bool,
    /// The stand-in addresses that are local by a route of their own alone, which the loopback interface loses when it is
    /// taken down.
    confined: Vec<IpNet>,
    /// What [`NetnsChange::AcceptMark`] would change.
    accept_mark: String,
    /// What the options ask for and exists, made by the agent or not.
    present: Vec<NetnsChange>,
}

/// What is to be changed in a namespace: decided before anything is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NetnsPlan {
    kept: Vec<NetnsChange>,
    added: Vec<NetnsChange>,
    dropped: Vec<NetnsChange>,
}

impl NetnsPlan {
    /// Whether nothing is to be changed.
    pub fn is_empty(&self) -> bool {
        self.added.is_empty() && self.dropped.is_empty()
    }

    /// What will be the agent's own once everything is added and what is not asked for any more is removed.
    pub fn result(&self) -> NetnsChanges {
        NetnsChanges(self.kept.iter().chain(&self.added).cloned().collect())
    }

    /// What is to be added.
    pub fn additions(&self) -> NetnsChanges {
        NetnsChanges(self.added.clone())
    }

    /// What is to be removed once the policy that needed it is replaced.
    pub fn removals(&self) -> NetnsChanges {
        NetnsChanges(self.dropped.clone())
    }

    /// The namespace's routes as they will be once everything is added.
    pub fn expected(&self, snapshot: RouteSnapshot) -> RouteSnapshot {
        // Routes in the tables of -r and -k are for marked and for arriving packets: no output route changes.
        // Nor does a second route to localhost, which comes after the first.
        self.added.iter().fold(snapshot, |snapshot, change| match change {
            NetnsChange::PassthroughAddress => snapshot.with_loopback_address(PASSTHROUGH_V6.into()),
            NetnsChange::LocalPrefix { net } => snapshot.with_local_prefix(*net),
            _ => snapshot,
        })
    }
}

impl NetnsChanges {
    /// What of it is not in `other`.
    pub fn without(&self, other: &Self) -> Self {
        let only = |change: &&NetnsChange| !other.0.iter().any(|o| o.same(change));
        Self(self.0.iter().filter(only).cloned().collect())
    }

    /// Whether there is nothing of the agent's own.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// Looks at the namespace, whose routes and interfaces are in `snapshot`; changes nothing.
pub fn find(netns: &Netns, config: &Config, snapshot: &RouteSnapshot) -> Result<NetnsState, NetnsSetupError> {
    let mut found = netns.run(|| -> Result<NetnsState, NetnsSetupError> {
        let accept_mark = match config.mode {
            InboundMode::Redirect => String::new(),
            InboundMode::Tproxy => {
                let sysctl = |source| NetnsSetupError::Sysctl { path: ACCEPT_MARK, source };
                fs::read_to_string(ACCEPT_MARK).map_err(sysctl)?.trim().to_owned()
            }
        };
        let loopback_up = snapshot.interfaces.iter().any(|interface| interface.loopback && interface.up);
        let v6 = has_v6();
        let confined = local_prefixes(v6).filter(|net| !is_inside_local(snapshot, net)).collect();
        Ok(NetnsState { v6, loopback_up, confined, accept_mark, present: Vec::new() })
    })??;
    let is_local =
        |change: &NetnsChange| matches!(change, NetnsChange::LocalPrefix { net } if snapshot.is_local(net));
    let (local, asked): (Vec<_>, Vec<_>) =
        wanted(config, &snapshot.interface_names(), &found).into_iter().partition(is_local);
    found.present = inside(netns, |questions| present(questions, asked))??;
    found.present.extend(local);
    Ok(found)
}

/// What is to be done for these options; changes nothing.
pub fn plan(config: &Config, interfaces: &[&str], found: &NetnsState, before: &NetnsChanges) -> NetnsPlan {
    let wanted = wanted(config, interfaces, found);
    let (kept, dropped): (Vec<NetnsChange>, Vec<NetnsChange>) =
        before.0.iter().cloned().partition(|change| wanted.iter().any(|w| w.same(change)));
    let is_new = |change: &NetnsChange| {
        ![&kept, &found.present].iter().any(|list| list.iter().any(|c| c.same(change)))
    };
    let added = wanted.into_iter().filter(is_new).collect();
    NetnsPlan { kept, added, dropped }
}

/// Adds what is planned. `made` is what it added, also after a failure, when the caller removes it: less than planned if
/// another process made it since.
pub fn add(netns: &Netns, additions: &NetnsChanges, made: &mut NetnsChanges) -> Result<(), NetnsSetupError> {
    if additions.is_empty() {
        return Ok(());
    }
    let additions = additions.0.clone();
    inside(netns, |questions| {
        for change in additions {
            made.0.extend(make(questions, change)?);
        }
        Ok(())
    })?
}

/// Removes all of it. A failure is logged and the rest is removed all the same; it is an error only if a later call may
/// succeed, because memory was short or netlink was interrupted.
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
    /// Whether it is about a shortage or an interrupted call, so that a later call may succeed.
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

fn has_v6() -> bool {
    fs::read_to_string(DISABLE_V6).is_ok_and(|value| value.trim() == "0")
}

/// The table of -k: any that is neither the kernel's nor that of -r.
fn guest_table(config: &Config) -> u32 {
    if config.tproxy_table == 15001 { 15002 } else { 15001 }
}

/// Whether a prefix is part of a larger local one, such as 127.0.0.0/8.
fn is_inside_local(snapshot: &RouteSnapshot, net: &IpNet) -> bool {
    let around = |route: &&Route| route.prefix != *net && route.prefix.contains(net);
    snapshot.routes.iter().filter(around).any(|route| route.reach == Reach::Local)
}

/// What redirected connections dial and queries come from.
fn local_prefixes(v6: bool) -> impl Iterator<Item = IpNet> {
    let (net, len) = Addr::STAND_IN_PREFIX_V6;
    let of_v6 = v6.then(|| IpNet::V6(Ipv6Net::new_assert(net, len)));
    let of_v4 = Addr::STAND_IN_PREFIXES_V4.into_iter().chain([Addr::NUMBERED_PREFIX_V4]);
    of_v6.into_iter().chain(of_v4.map(|(net, len)| Ipv4Net::new_assert(net, len).into()))
}

/// What the options ask for.
fn wanted(config: &Config, interfaces: &[&str], found: &NetnsState) -> Vec<NetnsChange> {
    let mut changes = Vec::new();
    let v6 = found.v6;
    if v6 {
        changes.push(NetnsChange::PassthroughAddress);
    }
    if found.loopback_up {
        changes.extend(found.confined.iter().map(|&net| NetnsChange::Confined { net }));
        changes.extend(local_prefixes(v6).map(|net| NetnsChange::LocalPrefix { net }));
    }
    if config.dns != Dns::Off && found.loopback_up {
        for interface in interfaces.iter().filter(|name| **name != "lo") {
            for v6 in [false, true].into_iter().take(1 + usize::from(v6)) {
                changes.push(NetnsChange::LocalhostBy { v6, interface: (*interface).to_owned() });
            }
        }
    }
    if config.mode == InboundMode::Tproxy {
        let (mark, table) = (config.tproxy_mark, config.tproxy_table);
        for v6 in [false, true].into_iter().take(1 + usize::from(v6)) {
            changes.push(NetnsChange::LocalTable { v6, table });
            changes.push(NetnsChange::MarkRule { v6, mark, table });
        }
        changes.push(NetnsChange::AcceptMark { before: found.accept_mark.clone() });
    }
    changes.extend(guests(config, interfaces, v6));
    changes
}

/// netfilter rewrites what arrives on an interface of -k to an address of the pod. Here it keeps its destination, so
/// the pod must take that for its own, on these interfaces only.
fn guests(config: &Config, interfaces: &[&str], v6: bool) -> Vec<NetnsChange> {
    let table = guest_table(config);
    let is_named = |name: &&&str| config.virt_interfaces.iter().any(|named| named.matches(name));
    let interfaces: Vec<&&str> = interfaces.iter().filter(is_named).collect();
    if interfaces.is_empty() {
        return Vec::new();
    }
    let everything = [IpNet::V4(Ipv4Net::default()), IpNet::V6(Ipv6Net::default())];
    let nets: &[IpNet] = if config.include.all { &everything } else { &config.include.list };
    let nets = nets.iter().filter(|net| v6 || net.addr().is_ipv4());
    let mut changes: Vec<NetnsChange> = nets.map(|&net| NetnsChange::GuestRoute { net, table }).collect();
    for interface in interfaces {
        for v6 in [false, true].into_iter().take(1 + usize::from(v6)) {
            changes.push(NetnsChange::GuestRule { v6, interface: (*interface).to_owned(), table });
        }
    }
    changes
}

#[cfg(test)]
mod tests;
