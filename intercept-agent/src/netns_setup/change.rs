//! A single change in a namespace: whether it exists, making it, and removing it.

use std::{
    fs, io,
    net::{Ipv4Addr, Ipv6Addr},
};

use intercept_common::Family;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use netlink_packet_core::{NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REQUEST};
use netlink_packet_route::{
    AddressFamily, IpProtocol, RouteNetlinkMessage,
    address::{AddressAttribute, AddressHeaderFlags, AddressMessage},
    route::{RouteAddress, RouteAttribute, RouteMessage, RouteScope, RouteType},
    rule::{RuleAction, RuleAttribute, RuleHeader, RuleMessage},
};
use rtnetlink::RouteMessageBuilder;
use serde::{Deserialize, Serialize};

use crate::netlink::Questions;

use super::{
    NetnsSetupError,
    confined::{confine, confining, is_confining},
    localhost::{add_local_prefix, add_localhost_by, index_of, local_prefix_route, localhost_route},
};

/// The setting that [`NetnsChange::AcceptMark`] changes.
pub(super) const ACCEPT_MARK: &str = "/proc/sys/net/ipv4/tcp_fwmark_accept";

/// Records contain whether a family is IPv6.
mod is_v6 {
    use serde::{Deserialize as _, Deserializer, Serializer};

    use super::Family;

    pub(super) fn serialize<S: Serializer>(family: &Family, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bool(*family == Family::V6)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Family, D::Error> {
        Ok(if bool::deserialize(deserializer)? { Family::V6 } else { Family::V4 })
    }
}

/// A change in a namespace.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum NetnsChange {
    /// `::6/128` on the loopback interface. 127.0.0.6 is local anyway.
    PassthroughAddress,
    /// These addresses are local, with 127.0.0.1 or ::1 as their source. Redirected connections connect to them
    /// ([`intercept_common::StandIn`]), and queries are sent from them.
    LocalPrefix { net: IpNet },
    /// These addresses are unreachable while they are not local, so that no connection to them leaves the pod.
    Confined { net: IpNet },
    /// 127.0.0.1 or ::1 is reachable for a socket that has selected this interface.
    LocalhostBy {
        #[serde(with = "is_v6", rename = "v6")]
        family: Family,
        interface: String,
    },
    /// Every address is local in this table.
    LocalTable {
        #[serde(with = "is_v6", rename = "v6")]
        family: Family,
        table: u32,
    },
    /// Packets with this mark use this table.
    MarkRule {
        #[serde(with = "is_v6", rename = "v6")]
        family: Family,
        mark: u32,
        table: u32,
    },
    /// These destinations are local in this table.
    GuestRoute { net: IpNet, table: u32 },
    /// TCP packets that arrive on this interface use this table if it has a route.
    GuestRule {
        #[serde(with = "is_v6", rename = "v6")]
        family: Family,
        interface: String,
        table: u32,
    },
    /// Sockets that accept a marked connection answer with its mark. Contains the previous value.
    AcceptMark { before: String },
}

impl NetnsChange {
    /// Whether two changes are equal, apart from the previous value.
    pub(super) fn same(&self, other: &Self) -> bool {
        matches!((self, other), (Self::AcceptMark { .. }, Self::AcceptMark { .. })) || self == other
    }

    pub(super) fn is_address(&self) -> bool {
        matches!(self, Self::PassthroughAddress)
    }
}

/// Returns those changes that already exist. `rules` are those of IPv4 and IPv6.
pub(super) fn present(
    questions: &mut Questions,
    rules: &[Vec<RuleMessage>; 2],
    changes: Vec<NetnsChange>,
) -> Result<Vec<NetnsChange>, NetnsSetupError> {
    let mut state = Present { addresses: None, routes: [None, None] };
    let rules = |family: Family| rules[usize::from(family == Family::V6)].iter();
    let mut found = Vec::new();
    for change in changes {
        let there = match &change {
            NetnsChange::PassthroughAddress => state.has_passthrough(questions)?,
            NetnsChange::LocalTable { family, table } => {
                state.has_route(questions, everything(*family), *table)?
            }
            NetnsChange::GuestRoute { net, table } => state.has_route(questions, *net, *table)?,
            NetnsChange::MarkRule { family, mark, table } => {
                rules(*family).any(|rule| is_mark_rule(rule, *mark, *table))
            }
            NetnsChange::GuestRule { family, interface, table } => {
                rules(*family).any(|rule| is_guest_rule(rule, interface, *table))
            }
            NetnsChange::Confined { net } => {
                rules(Family::of(&net.addr())).any(|rule| is_confining(rule, *net))
            }
            NetnsChange::AcceptMark { before } => before == "1",
            // Found by the routes, or when it is added.
            NetnsChange::LocalPrefix { .. } | NetnsChange::LocalhostBy { .. } => false,
        };
        if there {
            found.push(change);
        }
    }
    Ok(found)
}

/// Lists of netlink, each read at most once and only if it is needed.
struct Present {
    addresses: Option<bool>,
    routes: [Option<Vec<(IpNet, u32)>>; 2],
}

impl Present {
    fn has_passthrough(&mut self, questions: &mut Questions) -> Result<bool, NetnsSetupError> {
        if let Some(there) = self.addresses {
            return Ok(there);
        }
        let mut question = AddressMessage::default();
        question.header.family = AddressFamily::Inet6;
        let question = RouteNetlinkMessage::GetAddress(question);
        let action = "reading the addresses of the loopback interface";
        let is_it = |message: &RouteNetlinkMessage| {
            let RouteNetlinkMessage::NewAddress(address) = message else { return false };
            address.header.index == LOOPBACK
                && address.attributes.contains(&AddressAttribute::Address(PASSTHROUGH_V6.into()))
        };
        let found = list(questions, question, action)?;
        Ok(*self.addresses.insert(found.iter().any(is_it)))
    }

    fn has_route(
        &mut self,
        questions: &mut Questions,
        net: IpNet,
        table: u32,
    ) -> Result<bool, NetnsSetupError> {
        let slot = &mut self.routes[usize::from(net.addr().is_ipv6())];
        if slot.is_none() {
            *slot = Some(local_routes(questions, Family::of(&net.addr()))?);
        }
        Ok(slot.as_ref().is_some_and(|routes| routes.contains(&(net.trunc(), table))))
    }
}

/// Makes a change. `None` if it already exists. `after_local` is as in [`super::NetnsState`].
pub(super) fn make(
    questions: &mut Questions,
    change: NetnsChange,
    after_local: [Option<u32>; 2],
) -> Result<Option<NetnsChange>, NetnsSetupError> {
    let made = match &change {
        NetnsChange::PassthroughAddress => {
            let message = RouteNetlinkMessage::NewAddress(passthrough());
            add(questions, message, "adding ::6/128 to the loopback interface")?
        }
        NetnsChange::LocalPrefix { net } => add_local_prefix(questions, *net)?,
        NetnsChange::Confined { net } => confine(questions, *net, after_local)?,
        NetnsChange::LocalhostBy { family, interface } => add_localhost_by(questions, *family, interface)?,
        NetnsChange::GuestRoute { net, table } => {
            let route = RouteNetlinkMessage::NewRoute(local_route(*net, *table, LOOPBACK));
            add(questions, route, "adding a local route for a network of -i to the table of -k")?
        }
        NetnsChange::GuestRule { family, interface, table } => {
            let rule = RouteNetlinkMessage::NewRule(guest_rule(*family, interface, *table));
            add(questions, rule, "adding a rule for an interface of -k")?
        }
        NetnsChange::LocalTable { family, table } => {
            let route = RouteNetlinkMessage::NewRoute(local_route(everything(*family), *table, LOOPBACK));
            add(questions, route, "adding a local default route to the table of -r")?
        }
        NetnsChange::MarkRule { family, mark, table } => {
            let rule = RouteNetlinkMessage::NewRule(mark_rule(*family, *mark, *table));
            add(questions, rule, "adding a rule for the mark of -t")?
        }
        NetnsChange::AcceptMark { .. } => {
            set(ACCEPT_MARK, "1").map_err(|source| NetnsSetupError::Sysctl { path: ACCEPT_MARK, source })?;
            true
        }
    };
    Ok(made.then_some(change))
}

/// Reverts a change. If it no longer exists, that is not an error. Other failures are logged.
pub(super) fn unmake(questions: &mut Questions, change: &NetnsChange) -> Result<(), NetnsSetupError> {
    let result = match change {
        NetnsChange::PassthroughAddress => remove(questions, RouteNetlinkMessage::DelAddress(passthrough())),
        NetnsChange::LocalTable { family, table } => {
            let route = local_route(everything(*family), *table, LOOPBACK);
            remove(questions, RouteNetlinkMessage::DelRoute(route))
        }
        NetnsChange::LocalPrefix { net } => {
            remove(questions, RouteNetlinkMessage::DelRoute(local_prefix_route(*net, LOOPBACK)))
        }
        NetnsChange::Confined { net } => remove(questions, RouteNetlinkMessage::DelRule(confining(*net))),
        NetnsChange::LocalhostBy { family, interface } => match index_of(interface) {
            Ok(Some(index)) => {
                remove(questions, RouteNetlinkMessage::DelRoute(localhost_route(*family, index)))
            }
            // Its routes were removed with it.
            Ok(None) => Ok(()),
            Err(error) => Err(error),
        },
        NetnsChange::GuestRoute { net, table } => {
            remove(questions, RouteNetlinkMessage::DelRoute(local_route(*net, *table, LOOPBACK)))
        }
        NetnsChange::GuestRule { family, interface, table } => {
            remove(questions, RouteNetlinkMessage::DelRule(guest_rule(*family, interface, *table)))
        }
        NetnsChange::MarkRule { family, mark, table } => {
            remove(questions, RouteNetlinkMessage::DelRule(mark_rule(*family, *mark, *table)))
        }
        NetnsChange::AcceptMark { before } => {
            set(ACCEPT_MARK, before).map_err(|source| NetnsSetupError::Sysctl { path: ACCEPT_MARK, source })
        }
    };
    match result {
        Err(error) if is_absent(&error) => Ok(()),
        Err(error) => {
            tracing::warn!(
                ?change,
                error = &error as &dyn std::error::Error,
                "reverting a change in the namespace"
            );
            Err(error)
        }
        Ok(()) => Ok(()),
    }
}

/// Writes a setting of the calling thread's namespace. In containers /proc/sys is read-only.
fn set(path: &str, value: &str) -> io::Result<()> {
    match fs::write(path, value) {
        Err(error) if error.kind() == io::ErrorKind::ReadOnlyFilesystem => set_in_own_mount(path, value),
        done => done,
    }
}

/// Writes a setting through a procfs that is not attached to any path.
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

/// Adds an address, rule or route. False if it already exists.
pub(super) fn add(
    questions: &mut Questions,
    message: RouteNetlinkMessage,
    action: &'static str,
) -> Result<bool, NetnsSetupError> {
    match questions.change(message, NLM_F_CREATE | NLM_F_EXCL) {
        Ok(()) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::EEXIST) => Ok(false),
        Err(source) => Err(NetnsSetupError::Netlink { action, source }),
    }
}

fn remove(questions: &mut Questions, message: RouteNetlinkMessage) -> Result<(), NetnsSetupError> {
    let removed = questions.change(message, 0);
    removed
        .map_err(|source| NetnsSetupError::Netlink { action: "removing a change of the namespace", source })
}

fn list(
    questions: &mut Questions,
    question: RouteNetlinkMessage,
    action: &'static str,
) -> Result<Vec<RouteNetlinkMessage>, NetnsSetupError> {
    let found = questions.ask(question, NLM_F_REQUEST | NLM_F_DUMP);
    found.map(|(found, _)| found).map_err(|source| NetnsSetupError::Netlink { action, source })
}

/// Whether the object to remove, or its interface, does not exist.
fn is_absent(error: &NetnsSetupError) -> bool {
    let NetnsSetupError::Netlink { source, .. } = error else { return false };
    let absent = [libc::ENOENT, libc::ESRCH, libc::EADDRNOTAVAIL, libc::ENODEV];
    source.raw_os_error().is_some_and(|code| absent.contains(&code))
}

pub(super) const PASSTHROUGH_V6: Ipv6Addr = Ipv6Addr::new(0, 0, 0, 0, 0, 0, 0, 6);

/// Index of the loopback interface in every namespace (`LOOPBACK_IFINDEX` of the kernel).
pub(super) const LOOPBACK: u32 = 1;

fn passthrough() -> AddressMessage {
    let mut message = AddressMessage::default();
    // Otherwise the kernel adds it as tentative, and on a busy machine it can be bound only a while later.
    message.header.flags = AddressHeaderFlags::Nodad;
    message.header.family = AddressFamily::Inet6;
    message.header.prefix_len = 128;
    message.header.index = LOOPBACK;
    message.attributes.push(AddressAttribute::Address(PASSTHROUGH_V6.into()));
    message
}

/// Returns prefix and table of the local routes of a family.
fn local_routes(questions: &mut Questions, family: Family) -> Result<Vec<(IpNet, u32)>, NetnsSetupError> {
    let mut question = RouteMessage::default();
    question.header.address_family = address_family(family);
    let found = list(questions, RouteNetlinkMessage::GetRoute(question), "reading the routes")?;
    let key = |message| {
        let RouteNetlinkMessage::NewRoute(route) = message else { return None };
        if route.header.kind != RouteType::Local || route.header.address_family != address_family(family) {
            return None;
        }
        let (mut address, mut table) = (everything(family).addr(), u32::from(route.header.table));
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
    Ok(found.into_iter().filter_map(key).collect())
}

pub(super) fn address_family(family: Family) -> AddressFamily {
    match family {
        Family::V4 => AddressFamily::Inet,
        Family::V6 => AddressFamily::Inet6,
    }
}

fn everything(family: Family) -> IpNet {
    match family {
        Family::V4 => Ipv4Net::default().into(),
        Family::V6 => Ipv6Net::default().into(),
    }
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

fn guest_rule(family: Family, interface: &str, table: u32) -> RuleMessage {
    let mut rule = RuleMessage::default();
    rule.header =
        RuleHeader { family: address_family(family), action: RuleAction::ToTable, ..RuleHeader::default() };
    rule.attributes.push(RuleAttribute::Iifname(interface.to_owned()));
    rule.attributes.push(RuleAttribute::IpProtocol(IpProtocol::Tcp));
    rule.attributes.push(RuleAttribute::Table(table));
    rule
}

fn is_guest_rule(rule: &RuleMessage, interface: &str, table: u32) -> bool {
    rule.attributes.contains(&RuleAttribute::Iifname(interface.to_owned()))
        && rule.attributes.contains(&RuleAttribute::Table(table))
}

fn mark_rule(family: Family, mark: u32, table: u32) -> RuleMessage {
    let mut rule = RuleMessage::default();
    rule.header =
        RuleHeader { family: address_family(family), action: RuleAction::ToTable, ..RuleHeader::default() };
    rule.attributes.push(RuleAttribute::FwMark(mark));
    rule.attributes.push(RuleAttribute::Table(table));
    rule
}

fn is_mark_rule(rule: &RuleMessage, mark: u32, table: u32) -> bool {
    rule.attributes.contains(&RuleAttribute::FwMark(mark))
        && (rule.attributes.contains(&RuleAttribute::Table(table)) || u32::from(rule.header.table) == table)
}
