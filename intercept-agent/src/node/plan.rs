//! Plans an attach from what was observed, before anything is changed.

use std::path::PathBuf;

use intercept_common::layout::{self, PodPolicy, budget};

use super::{Living, NodeError, Target};
use crate::{
    cgroup::{CgroupDir, CgroupError},
    compile::{Compiled, Entries},
    ids::{NetnsCookie, PolicyId, Slot},
    netns_setup::{self, NetnsAdditions, NetnsChanges},
    options::Config,
    record::Record,
};

/// The input of a plan.
pub(super) struct PlanInput<'a> {
    pub(super) target: &'a Target,
    /// As the pod sees its ids.
    pub(super) config: &'a Config,
    /// The policies of all pods by netns cookie.
    pub(super) policies: &'a [(NetnsCookie, PodPolicy)],
    /// The record of the pod's own policy, if it has one that can be read.
    pub(super) record: Option<&'a Record>,
    /// The pods that exist.
    pub(super) living: &'a Living,
    /// The ids of the cgroups around the pod's own.
    pub(super) lineage: &'a [u64],
    /// Whether all links of the pod are in place.
    pub(super) links_intact: bool,
    /// The changes of the namespace.
    pub(super) namespace: netns_setup::NetnsPlan,
    /// [`PodPolicy::max_connections`].
    pub(super) max_connections: u32,
    /// From the options and the routes as they will be.
    pub(super) compiled: Compiled,
    /// Seconds since 1970.
    pub(super) now: u64,
}

/// Whether an unchanged policy is written again.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Rewrite {
    /// Only if it differs.
    IfChanged,
    /// Always.
    Always,
}

/// What is to be done.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum AttachPlan {
    /// The same policy is active.
    Unchanged(Box<PodPolicy>),
    /// There is something to do.
    PolicyChange(Box<PolicyChange>),
}

/// What is to be done.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct PolicyChange {
    /// Lists all changes of the namespace, including those still to be made, so that they can be undone after a crash.
    pub(super) record: Record,
    pub(super) policy: PodPolicy,
    pub(super) entries: Entries,
    /// To be added to the namespace before the switch.
    pub(super) additions: NetnsAdditions,
    /// To be removed from it after the switch.
    pub(super) removals: NetnsChanges,
    /// The policy that is replaced.
    pub(super) before: Option<PodPolicy>,
}

/// Makes the plan. `draw` gives random numbers for the policy's id, which must not meet entries left by a crashed
/// agent.
pub(super) fn plan(
    input: PlanInput<'_>,
    rewrite: Rewrite,
    draw: impl FnMut() -> u32,
) -> Result<AttachPlan, NodeError> {
    let PlanInput { target, config, policies, record, living, namespace, compiled, .. } = input;
    if target.is_workload() {
        target.refuse_workloads(&compiled.policy, policies, living)?;
    } else {
        refuse_conflicts(target, input.lineage, living)?;
    }
    refuse_beyond_budget(&compiled.entries)?;
    let cookie = target.netns.cookie();
    let before = policies.iter().find(|(netns, _)| *netns == cookie).map(|(_, policy)| *policy);
    let digest = compiled.digest();
    if let (Some(policy), Some(record)) = (&before, record)
        && rewrite == Rewrite::IfChanged
        && record.config == *config
        && record.digest == digest
        && record.origin == target.origin
        && input.links_intact
        // To attach again without --confirm confirms.
        && policy.expires_at == 0
        && namespace.is_empty()
    {
        return Ok(AttachPlan::Unchanged(Box::new(*policy)));
    }
    let (slot, id) = free(policies, before.as_ref(), draw)?;
    let record = Record {
        cookie,
        policy: id,
        slot,
        cgroup: target.cgroup.path().to_owned(),
        cgroup_id: target.cgroup.id(),
        also: target.also.iter().map(|cgroup| cgroup.path().to_owned()).collect(),
        netns_inode: target.netns.inode(),
        netns_path: target.netns_path.clone(),
        config: config.clone(),
        digest,
        netns_setup: namespace.result(),
        origin: target.origin.clone(),
        since: input.now,
    };
    Ok(AttachPlan::PolicyChange(Box::new(PolicyChange {
        record,
        policy: PodPolicy { id, slot, max_connections: input.max_connections, ..compiled.policy },
        entries: compiled.entries,
        additions: namespace.additions(),
        removals: namespace.removals(),
        before,
    })))
}

/// Checks the budget of the pod in the shared maps.
fn refuse_beyond_budget(entries: &Entries) -> Result<(), NodeError> {
    for (what, needed, limit) in [
        ("prefixes of its CIDR lists and routes", entries.destinations.len(), budget::DESTINATIONS),
        ("prefixes of its lists of ports", entries.ports.len(), budget::PORTS),
        ("owner groups", entries.groups.len(), budget::GROUPS),
        ("interfaces named by -c and -k", entries.interfaces.len(), budget::INTERFACES),
    ] {
        if needed > limit as usize {
            return Err(NodeError::OverBudget { what, needed, limit });
        }
    }
    Ok(())
}

/// A namespace has one capture and a cgroup one namespace, and no captured pod's cgroup is in another's: programs that
/// are attached twice would run twice.
fn refuse_conflicts(target: &Target, lineage: &[u64], living: &Living) -> Result<(), NodeError> {
    let (own, cgroup_id) = (target.netns.cookie(), target.cgroup.id());
    // Those of a machine's workloads ignore sockets of other namespaces, so a pod may be below one.
    for (&cookie, pod) in living.iter().filter(|(cookie, _)| !cookie.is_workload()) {
        let Some(theirs) = pod.cgroups.first() else { continue };
        let cgroup = || theirs.name();
        match (cookie == own, theirs.id == cgroup_id) {
            (true, false) => {
                return Err(NodeError::NetnsTaken {
                    netns: target.netns.name().to_owned(),
                    cgroup: cgroup(),
                });
            }
            (false, true) => {
                return Err(NodeError::CgroupTaken { cgroup: cgroup(), inode: pod.netns_inode });
            }
            _ => {}
        }
        let own = || target.cgroup.path().display().to_string();
        if lineage.contains(&theirs.id) {
            return Err(NodeError::Nested { inner: own(), outer: cgroup(), captured: cgroup() });
        }
        if theirs.lineage.contains(&cgroup_id) {
            return Err(NodeError::Nested { inner: cgroup(), outer: own(), captured: cgroup() });
        }
    }
    Ok(())
}

/// The slot of the policy that is replaced, or a free one; and an unused id.
fn free(
    policies: &[(NetnsCookie, PodPolicy)],
    before: Option<&PodPolicy>,
    draw: impl FnMut() -> u32,
) -> Result<(Slot, PolicyId), NodeError> {
    let is_free = |slot: &Slot| policies.iter().all(|(_, policy)| policy.slot != *slot);
    let slot = match before {
        Some(policy) => policy.slot,
        None => {
            (0..layout::MAX_PODS).map(Slot).find(is_free).ok_or(NodeError::TooManyPods(policies.len()))?
        }
    };
    let is_new = |id: &PolicyId| id.0 != 0 && policies.iter().all(|(_, policy)| policy.id != *id);
    Ok((slot, std::iter::repeat_with(draw).map(PolicyId).find(is_new).unwrap_or(PolicyId(1))))
}

/// A pod that exists.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct LivingPod {
    /// Its cgroup; of a machine's workload those that exist.
    pub(super) cgroups: Vec<LivingCgroup>,
    /// Inode of its namespace.
    pub(super) netns_inode: u64,
}

/// A cgroup of a pod.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct LivingCgroup {
    pub(super) id: u64,
    /// As the pod's record names it, if that can be read.
    pub(super) path: Option<PathBuf>,
    /// The ids of the cgroups around it, if they can be read.
    pub(super) lineage: Vec<u64>,
}

impl LivingPod {
    /// A pod that is attached now.
    pub(super) fn of(target: &Target) -> Result<Self, CgroupError> {
        let living = |cgroup: &CgroupDir| {
            let path = Some(cgroup.path().to_owned());
            Ok(LivingCgroup { id: cgroup.id(), path, lineage: cgroup.lineage()? })
        };
        let cgroups = target.cgroups().into_iter().map(living).collect::<Result<_, _>>()?;
        Ok(Self { cgroups, netns_inode: target.netns.inode() })
    }

    /// Its first cgroup.
    pub(super) fn cgroup_name(&self) -> String {
        self.cgroups.first().map(LivingCgroup::name).unwrap_or_default()
    }
}

impl LivingCgroup {
    pub(super) fn name(&self) -> String {
        match &self.path {
            Some(path) => path.display().to_string(),
            None => format!("with id {}", self.id),
        }
    }
}
