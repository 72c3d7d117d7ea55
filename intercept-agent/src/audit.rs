//! What a captured pod's sockets really do: each open connection is looked up among those that the programs redirected, and
//! one that goes around the proxy though the rules of the pod would redirect it is reported with the reason.
//!
//! The kernel's socket diagnostics say which sockets there are, not what was promised. They do not say when a socket was made.

mod inventory;

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::SocketAddr,
};

use intercept_common::{
    Decision, InboundFlow, NetnsCookie, OutboundFlow, PolicyLookup, Reason, Verdict,
    decide::{OutboundDecision, Owner, TproxyMark},
    decide_inbound, decide_outbound,
    layout::{ConnKey, OrigDst, PodPolicy, end},
};
use serde::Serialize;

pub(crate) use self::inventory::Inventory;
use crate::{
    cgroup::{CgroupDir, CgroupError},
    netns::{Netns, NetnsError},
    sockets::{self, OpenSocket, SocketClass},
};

/// Why a pod cannot be audited.
#[derive(Debug, thiserror::Error)]
pub enum AuditError {
    #[error("listing the sockets of network namespace {netns}")]
    Sockets { netns: String, source: io::Error },
    #[error(transparent)]
    Netns(#[from] NetnsError),
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
}

/// Why a socket goes around the proxy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum BypassCause {
    /// It was created in a cgroup outside of the pod's, to which the programs are not attached.
    OtherCgroup,
    /// It was connected before the capture, or by a process that was older than it.
    BeforeCapture,
    /// It has the mark of TPROXY without being the proxy's.
    Mark,
    /// A raw or packet socket, which no program sees.
    Raw,
    /// A process of the pod is in another network namespace.
    OtherNamespace,
    /// None of these: the programs did not see it though they were there.
    Unexplained,
}

impl BypassCause {
    /// The word for it. Stable.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::OtherCgroup => "other_cgroup",
            Self::BeforeCapture => "before_capture",
            Self::Mark => "mark",
            Self::Raw => "raw",
            Self::OtherNamespace => "other_namespace",
            Self::Unexplained => "unexplained",
        }
    }
}

/// A socket, or a process, that goes around the proxy. The names are stable.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Bypass {
    pub cause: BypassCause,
    pub direction: Option<&'static str>,
    pub protocol: Option<&'static str>,
    pub local: Option<SocketAddr>,
    pub remote: Option<SocketAddr>,
    /// The row that would have redirected it.
    pub reason: Option<&'static str>,
    pub uid: Option<u32>,
    pub pid: Option<i32>,
    pub process: Option<String>,
    pub cgroup: Option<String>,
}

/// What an audit found. The names are stable.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Audit {
    /// Connections that the programs redirected, by their clients' sockets.
    pub captured: usize,
    /// Sockets of the proxy.
    pub proxy: usize,
    /// Connections that the rules leave alone, by reason.
    pub passed: BTreeMap<&'static str, usize>,
    /// What goes around the proxy.
    pub bypasses: Vec<Bypass>,
}

/// The sockets and processes of a pod at one time.
pub struct ObservedSockets {
    open: Vec<OpenSocket>,
    inventory: Inventory,
}

impl ObservedSockets {
    /// Reads them, of a pod with one cgroup or of a machine's workload. May take long where there are many.
    pub fn of(cgroups: &[&CgroupDir], netns: &Netns) -> Result<Self, AuditError> {
        let failed = |source| AuditError::Sockets { netns: netns.name().to_owned(), source };
        let mut open = sockets::open(netns)?.map_err(failed)?;
        let inventory = Inventory::read(cgroups, netns)?;
        if netns.cookie().is_workload() {
            // The namespace has the sockets of the rest of the machine as well.
            open.retain(|socket| inventory.is_of_pod(socket));
        }
        Ok(Self { open, inventory })
    }
}

/// The pod that is audited, with what the agent knows of it.
pub struct Audited<'a, L> {
    /// Its sockets.
    pub observed: &'a ObservedSockets,
    /// Cookie of its namespace.
    pub cookie: NetnsCookie,
    /// Its policy.
    pub policy: &'a PodPolicy,
    /// When the policy became active, in seconds since 1970.
    pub since: u64,
    /// The lookups of the decision.
    pub lookup: &'a L,
    /// What the programs remember of a connection that they changed.
    pub original: &'a dyn Fn(&ConnKey) -> Option<OrigDst>,
}

impl<L: PolicyLookup> Audited<'_, L> {
    /// Looks at every socket of the pod.
    pub fn audit(&self) -> Audit {
        let ObservedSockets { open, inventory } = self.observed;
        let listening: BTreeSet<u16> =
            open.iter().filter(|socket| socket.is_listening).map(|socket| socket.local.port()).collect();
        let mut audit = Audit::default();
        for socket in open.iter().filter(|socket| !socket.is_listening) {
            match socket.protocol {
                SocketClass::Raw | SocketClass::Packet => {
                    audit.bypasses.push(self.bypass(socket, inventory, BypassCause::Raw, None));
                }
                SocketClass::Tcp if self.is_client(socket) => audit.captured += 1,
                SocketClass::Tcp => self.connection(socket, inventory, &listening, &mut audit),
            }
        }
        audit.bypasses.extend(inventory.strays().map(|process| Bypass {
            cause: BypassCause::OtherNamespace,
            direction: None,
            protocol: None,
            local: None,
            remote: None,
            reason: None,
            uid: Some(process.uid),
            pid: Some(process.pid),
            process: Some(process.name.clone()),
            cgroup: None,
        }));
        audit.bypasses.sort_by_key(|bypass| (bypass.cause, bypass.pid, bypass.local));
        audit
    }

    fn key(&self, client: SocketAddr, proxy: SocketAddr) -> ConnKey {
        let (client_port, proxy_port) = (client.port(), proxy.port());
        let (client, proxy) = (client.ip().into(), proxy.ip().into());
        ConnKey { netns: self.cookie, client, proxy, client_port, proxy_port, reserved: 0 }
    }

    /// Whether it is the client's end of a connection that the proxy has. One with the mark of TPROXY is remembered as well,
    /// and passes.
    fn is_client(&self, socket: &OpenSocket) -> bool {
        (self.original)(&self.key(socket.local, socket.remote))
            .is_some_and(|original| !passes_by_mark(&original))
    }

    /// A TCP connection that is not the client's end of a redirected one.
    fn connection(
        &self,
        socket: &OpenSocket,
        inventory: &Inventory,
        listening: &BTreeSet<u16>,
        audit: &mut Audit,
    ) {
        let owner = inventory.owner(socket);
        let container = self.policy.container_of(inventory.ancestor(socket.cgroup, self.policy.cgroup_level));
        let is_proxy = self.policy.is_proxy(owner.uid, owner.gid) && self.policy.may_be_proxy(container);
        let other_end = (self.original)(&self.key(socket.remote, socket.local));
        if other_end.as_ref().is_some_and(passes_by_mark) {
            // Its client is in the pod, and is looked at.
            *audit.passed.entry(Reason::LocalSource.as_str()).or_default() += 1;
            return;
        }
        let is_proxy_end = other_end.is_some();
        let accepted = listening.contains(&socket.local.port());
        if is_proxy_end || (accepted && is_proxy) || self.policy.proxy_port(socket.local.port()).is_some() {
            audit.proxy += 1;
            return;
        }
        let (direction, decision, has_mark) = if accepted {
            ("inbound", self.inbound(socket), false)
        } else {
            let decided = self.outbound(socket, owner, container);
            ("outbound", decided.decision, decided.mark == TproxyMark::Bypass && !is_proxy)
        };
        match decision.verdict {
            Verdict::Pass if !has_mark => *audit.passed.entry(decision.reason.as_str()).or_default() += 1,
            _ => {
                let cause = if has_mark { BypassCause::Mark } else { self.cause(socket, inventory) };
                let bypass = self.bypass(socket, inventory, cause, Some((direction, decision.reason)));
                audit.bypasses.push(bypass);
            }
        }
    }

    fn inbound(&self, socket: &OpenSocket) -> Decision {
        let flow = InboundFlow {
            dst: socket.local.ip().into(),
            dst_port: socket.local.port(),
            src: socket.remote.ip().into(),
            ifindex: 0,
        };
        decide_inbound(self.policy, &flow, self.lookup)
    }

    fn outbound(&self, socket: &OpenSocket, owner: Owner, container: u32) -> OutboundDecision {
        let flow = OutboundFlow {
            protocol: 6,
            dst: socket.remote.ip().into(),
            dst_port: socket.remote.port(),
            src: socket.local.ip().into(),
            owner,
            mark: socket.mark,
            container,
        };
        decide_outbound(self.policy, &flow, self.lookup)
    }

    fn cause(&self, socket: &OpenSocket, inventory: &Inventory) -> BypassCause {
        if socket.cgroup.is_some_and(|id| !inventory.is_in_pod(id)) {
            return BypassCause::OtherCgroup;
        }
        match inventory.process(socket) {
            // It cannot have connected anything before the capture.
            Some(process) if process.started > self.since => BypassCause::Unexplained,
            _ => BypassCause::BeforeCapture,
        }
    }

    fn bypass(
        &self,
        socket: &OpenSocket,
        inventory: &Inventory,
        cause: BypassCause,
        decided: Option<(&'static str, Reason)>,
    ) -> Bypass {
        let process = inventory.process(socket);
        let has_addresses = socket.protocol == SocketClass::Tcp;
        Bypass {
            cause,
            direction: decided.map(|(direction, _)| direction),
            protocol: Some(socket.protocol.as_str()),
            local: has_addresses.then_some(socket.local),
            remote: has_addresses.then_some(socket.remote),
            reason: decided.map(|(_, reason)| reason.as_str()),
            uid: Some(socket.uid),
            pid: process.map(|process| process.pid),
            process: process.map(|process| process.name.clone()),
            cgroup: socket.cgroup.and_then(|id| inventory.cgroup_name(id)),
        }
    }
}

fn passes_by_mark(original: &OrigDst) -> bool {
    original.port_and_ends & end::BYPASS != 0
}
