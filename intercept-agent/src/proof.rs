//! Proof that a captured pod's connections reach its proxy, from the kernel's own records.
//!
//! Outbound, a child process of the agent in the pod's cgroup and namespace makes a connection that the rules capture. The
//! kernel then says what became of it: the record of its original destination in ORIG_DST, the socket that it is connected
//! to, and whose listener that is. The proxy need not cooperate. Inbound, no connection is made: the kernel is asked which
//! socket a connection from outside would reach, and answers by the same lookup, with the same programs, as for a SYN.

mod dialer;
mod plan;
mod verdict;

use std::{io, net::SocketAddr, time::Duration};

use intercept_common::{Family, layout::PodPolicy};
use netlink_sys::protocols::NETLINK_SOCK_DIAG;
use rustix::io::Errno;
use serde::Serialize;

use self::{dialer::Dialer, plan::ProbePlan, verdict::Judge};
use crate::{
    cgroup::CgroupDir,
    maps::{Maps, MapsError},
    netlink::Questions,
    netns::{Netns, NetnsError},
    options::Config,
};

/// How long the connections of a probe may take.
pub const PATIENCE: Duration = Duration::from_secs(5);

/// Why a pod could not be probed.
#[derive(Debug, thiserror::Error)]
pub enum ProofError {
    #[error("asking for the sockets of network namespace {netns}")]
    Sockets { netns: String, source: io::Error },
    #[error("reading the addresses of network namespace {netns}")]
    Addresses { netns: String, source: io::Error },
    #[error("{step} for a probe")]
    Setup { step: &'static str, source: io::Error },
    #[error(
        "the probe was killed or did not report; check whether the pod is frozen or has reached its memory limit"
    )]
    Silent,
    #[error(transparent)]
    Netns(#[from] NetnsError),
    #[error(transparent)]
    Maps(#[from] MapsError),
}

/// What a connection of a probe failed by. The words are stable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ProofCause {
    /// Nothing listens on the proxy's port.
    NoListener,
    /// The connection went to its destination instead of the proxy.
    NotRedirected,
    /// A connection from outside does not reach the proxy's inbound port.
    NotSteered,
    /// It reached the proxy's port with another original destination, or with none.
    WrongDestination,
    /// What listens on the proxy's port is not the proxy.
    ForeignListener,
    /// The connection failed.
    Refused,
    /// Nothing happened in time.
    Timeout,
    /// The pod could not be probed.
    Unprobed,
}

impl ProofCause {
    /// The word for it. Stable.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::NoListener => "no_listener",
            Self::NotRedirected => "not_redirected",
            Self::NotSteered => "not_steered",
            Self::WrongDestination => "wrong_destination",
            Self::ForeignListener => "foreign_listener",
            Self::Refused => "refused",
            Self::Timeout => "timeout",
            Self::Unprobed => "unprobed",
        }
    }
}

/// What was found of one direction and family, or of a pod. The words are stable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ProofState {
    /// The rules capture no such connection.
    NothingToProve,
    /// It reaches the proxy.
    Proven,
    /// It does not.
    Failed,
}

impl ProofState {
    /// The word for it. Stable.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::NothingToProve => "nothing_to_prove",
            Self::Proven => "proven",
            Self::Failed => "failed",
        }
    }
}

/// One direction and family of a proof. The names are stable.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ProofLeg {
    pub direction: &'static str,
    pub family: u8,
    pub state: ProofState,
    pub destination: Option<SocketAddr>,
    pub cause: Option<ProofCause>,
    /// What was seen.
    pub text: String,
}

/// What a probe found. The names are stable.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Proof {
    pub state: ProofState,
    pub legs: Vec<ProofLeg>,
}

impl Proof {
    fn of(legs: Vec<ProofLeg>) -> Self {
        let state = legs.iter().map(|leg| leg.state).max().unwrap_or(ProofState::NothingToProve);
        Self { state, legs }
    }

    /// The first failure, with its direction and family.
    pub fn failure(&self) -> Option<(ProofCause, String)> {
        self.legs.iter().find_map(|leg| {
            let ProofLeg { direction, family, text, .. } = leg;
            Some((leg.cause?, format!("{direction} IPv{family}: {text}")))
        })
    }
}

/// A captured pod that is probed.
pub struct Probed<'a> {
    /// Its cgroup; of a machine's workload all of them. Probes run in the first.
    pub cgroups: &'a [&'a CgroupDir],
    /// Its namespace.
    pub netns: &'a Netns,
    /// Its active policy.
    pub policy: &'a PodPolicy,
    /// Its options.
    pub config: &'a Config,
    /// The node's maps.
    pub maps: &'a Maps,
}

impl Probed<'_> {
    /// Probes both directions and families. Takes at most [`PATIENCE`] and what the child process needs to start. Changes
    /// nothing; the proxy sees a connection in each family, which is closed at once.
    pub fn prove(&self) -> Result<Proof, ProofError> {
        let failed = |source| ProofError::Sockets { netns: self.netns.name().to_owned(), source };
        let mut questions = Questions::open(self.netns, NETLINK_SOCK_DIAG)?.map_err(failed)?;
        let plan = ProbePlan::of(self)?;
        let judge = Judge::new(self, &mut questions).map_err(failed)?;
        let mut legs = Vec::new();
        let targets = Family::ALL.map(|family| {
            plan.outbound
                .iter()
                .find(|probe| Family::of(&probe.ip()) == family)
                .copied()
                .filter(|_| judge.may_dial(family))
        });
        let dialled = match plan.owner.zip(self.cgroups.first()) {
            Some((owner, cgroup)) if targets.iter().any(Option::is_some) => {
                Some(Dialer::dial(self.netns, cgroup, owner, targets, PATIENCE)?)
            }
            _ => None,
        };
        for (index, family) in Family::ALL.into_iter().enumerate() {
            let planned = plan.outbound.iter().find(|probe| Family::of(&probe.ip()) == family).copied();
            let outcome = dialled.as_ref().and_then(|dialled| dialled.outcomes[index]);
            legs.push(judge.outbound(family, planned, outcome, &mut questions).map_err(failed)?);
        }
        // The connections are closed.
        drop(dialled);
        for family in Family::ALL {
            let planned = plan.inbound.iter().find(|probe| Family::of(&probe.local.ip()) == family);
            legs.push(judge.inbound(family, planned, &mut questions).map_err(failed)?);
        }
        Ok(Proof::of(legs))
    }
}

/// What became of a connection of the child.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ProbeDialled {
    /// It is established. The local port and the inode of its socket.
    Connected { port: u16, inode: u64 },
    /// Nothing happened before the deadline.
    Pending { port: u16, inode: u64 },
    /// It failed.
    Failed(Errno),
}
