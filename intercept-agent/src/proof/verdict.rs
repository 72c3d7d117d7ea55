//! What the kernel's records say of a probe.

use std::{io, net::SocketAddr};

use intercept_common::{
    Family,
    decide::Owner,
    layout::{ConnKey, policy},
};

use super::{ProbeDialled, Probed, ProofCause, ProofLeg, ProofState, plan::InboundProbe};
use crate::{
    audit::Inventory,
    netlink::Questions,
    sockets::{self, OpenSocket},
};

/// The port of a connection that does not exist: the lookup goes on to the listeners.
const NO_CONNECTION: u16 = 1;

/// Judges the probes of a pod.
pub(super) struct Judge<'a> {
    pod: &'a Probed<'a>,
    /// What listens, by family.
    listeners: [Vec<OpenSocket>; 2],
}

/// What was seen of one direction and family.
enum LegVerdict {
    Nothing(String),
    Proven(String),
    Failed(ProofCause, String),
}

impl<'a> Judge<'a> {
    pub(super) fn new(pod: &'a Probed<'a>, questions: &mut Questions) -> io::Result<Self> {
        let listeners =
            [sockets::listeners(questions, Family::V4)?, sockets::listeners(questions, Family::V6)?];
        Ok(Self { pod, listeners })
    }

    /// Whether a connection may be made: without a listener it is refused, or goes where it is addressed to.
    pub(super) fn may_dial(&self, family: Family) -> bool {
        self.listens(family, self.pod.policy.outbound_port)
    }

    fn listens(&self, family: Family, port: u16) -> bool {
        let [v4, v6] = &self.listeners;
        let has = |sockets: &[OpenSocket]| sockets.iter().any(|socket| socket.local.port() == port);
        // One of IPv6 may accept IPv4 as well.
        has(v6) || (family == Family::V4 && has(v4))
    }

    fn is_open(&self) -> bool {
        self.pod.policy.flags & policy::OPEN_WITHOUT_PROXY != 0
    }

    fn no_listener(&self, port: u16) -> LegVerdict {
        if self.is_open() {
            let text = format!(
                "the proxy does not listen on {port}, and --open-without-proxy lets such connections pass"
            );
            return LegVerdict::Nothing(text);
        }
        LegVerdict::Failed(ProofCause::NoListener, format!("nothing listens on the proxy's port {port}"))
    }

    /// The connection of a family, `outcome` is that of the child.
    pub(super) fn outbound(
        &self,
        family: Family,
        planned: Option<SocketAddr>,
        outcome: Option<ProbeDialled>,
        questions: &mut Questions,
    ) -> io::Result<ProofLeg> {
        let port = self.pod.policy.outbound_port;
        let verdict = match (planned, outcome) {
            (None, _) => LegVerdict::Nothing("the rules capture no connection that can be probed".to_owned()),
            (Some(_), None) => self.no_listener(port),
            (Some(_), Some(ProbeDialled::Failed(error))) => {
                let text = format!("the connection failed ({})", io::Error::from(error));
                LegVerdict::Failed(ProofCause::Refused, text)
            }
            (Some(to), Some(ProbeDialled::Pending { port, inode })) => {
                match self.reached(family, to, (port, inode), questions)? {
                    failed @ LegVerdict::Failed(ProofCause::NotRedirected, _) => failed,
                    _ => LegVerdict::Failed(
                        ProofCause::Timeout,
                        "the connection was neither accepted nor refused in time".to_owned(),
                    ),
                }
            }
            (Some(to), Some(ProbeDialled::Connected { port, inode })) => {
                self.reached(family, to, (port, inode), questions)?
            }
        };
        Ok(leg("outbound", family, planned, verdict))
    }

    /// Where a connection to `to` went, by its local port and the inode of its socket.
    fn reached(
        &self,
        family: Family,
        to: SocketAddr,
        (port, inode): (u16, u64),
        questions: &mut Questions,
    ) -> io::Result<LegVerdict> {
        let proxy_port = self.pod.policy.outbound_port;
        let Some(client) = sockets::connection(questions, family, port, inode)? else {
            let text = "the connection was reset before its socket could be looked at".to_owned();
            return Ok(LegVerdict::Failed(ProofCause::Refused, text));
        };
        let key = ConnKey {
            netns: self.pod.netns.cookie(),
            client: client.local.ip().into(),
            proxy: client.remote.ip().into(),
            client_port: client.local.port(),
            proxy_port: client.remote.port(),
            reserved: 0,
        };
        let original = self.pod.maps.look_up(|lookup| lookup.original(&key)).map_err(io::Error::other)?;
        let Some(original) = original else {
            let cause =
                if client.remote == to { ProofCause::NotRedirected } else { ProofCause::WrongDestination };
            let text = match cause {
                ProofCause::NotRedirected => {
                    "the connection goes to its destination and not to the proxy".to_owned()
                }
                _ => format!("the connection goes to {}, without a record of its destination", client.remote),
            };
            return Ok(LegVerdict::Failed(cause, text));
        };
        let recorded = SocketAddr::new(original.addr.into(), original.port());
        if client.remote.port() != proxy_port || recorded != to {
            let text =
                format!("the connection goes to {} with the original destination {recorded}", client.remote);
            return Ok(LegVerdict::Failed(ProofCause::WrongDestination, text));
        }
        let other = SocketAddr::new(client.local.ip(), NO_CONNECTION);
        let listener = sockets::receiver(questions, client.remote, other, 0)?;
        Ok(self.owned(listener.as_ref(), proxy_port))
    }

    /// The connection from outside.
    pub(super) fn inbound(
        &self,
        family: Family,
        planned: Option<&InboundProbe>,
        questions: &mut Questions,
    ) -> io::Result<ProofLeg> {
        let port = self.pod.policy.inbound_port;
        let verdict = match planned {
            None => LegVerdict::Nothing("the rules capture no connection that can be probed".to_owned()),
            Some(_) if !self.listens(family, port) => self.no_listener(port),
            Some(probe) => match sockets::receiver(questions, probe.local, probe.remote, probe.ifindex)? {
                Some(found) if found.local.port() == port => self.owned(Some(&found), port),
                Some(found) => LegVerdict::Failed(
                    ProofCause::NotSteered,
                    format!("a connection from outside reaches the socket on {}", found.local),
                ),
                None => LegVerdict::Failed(
                    ProofCause::NotSteered,
                    "a connection from outside reaches no socket".to_owned(),
                ),
            },
        };
        Ok(leg("inbound", family, planned.map(|probe| probe.local), verdict))
    }

    /// Whether a listener is the proxy's.
    fn owned(&self, listener: Option<&OpenSocket>, port: u16) -> LegVerdict {
        let Some(listener) = listener else {
            return LegVerdict::Failed(
                ProofCause::NoListener,
                format!("nothing listens on the proxy's port {port}"),
            );
        };
        if self.is_proxys(listener) {
            return LegVerdict::Proven(format!("it reaches the proxy on {port}"));
        }
        let text = format!("what listens on {port} (uid {}) is not the proxy", listener.uid);
        LegVerdict::Failed(ProofCause::ForeignListener, text)
    }

    fn is_proxys(&self, listener: &OpenSocket) -> bool {
        let policy = self.pod.policy;
        let by_uid = policy.is_proxy(listener.uid, Owner::NONE.gid);
        let by_container = policy.flags & policy::PROXY_CONTAINER != 0;
        if by_uid && !by_container {
            return true;
        }
        // Its group is that of its process, and its container that of its cgroup: both take long to find.
        let Ok(inventory) = Inventory::read(self.pod.cgroups, self.pod.netns) else { return false };
        let owner = inventory.owner(listener);
        let container = policy.container_of(inventory.ancestor(listener.cgroup, policy.cgroup_level));
        policy.is_proxy(owner.uid, owner.gid) && policy.may_be_proxy(container)
    }
}

fn leg(
    direction: &'static str,
    family: Family,
    destination: Option<SocketAddr>,
    verdict: LegVerdict,
) -> ProofLeg {
    let (state, cause, text) = match verdict {
        LegVerdict::Nothing(text) => (ProofState::NothingToProve, None, text),
        LegVerdict::Proven(text) => (ProofState::Proven, None, text),
        LegVerdict::Failed(cause, text) => (ProofState::Failed, Some(cause), text),
    };
    ProofLeg { direction, family: family.version(), state, destination, cause, text }
}
