//! Workloads of a machine: several may be in the host's namespace, each with its cgroups and its own set of programs.

use std::{
    collections::HashMap,
    os::fd::{AsFd as _, OwnedFd},
    path::PathBuf,
    time::Duration,
};

use intercept_common::{
    layout::{PodPolicy, policy},
    names,
};

use super::{Living, Node, NodeError, Target};
use crate::{
    cgroup::CgroupDir,
    ids::NetnsCookie,
    listeners::Listener,
    netns_setup::NetnsChanges,
    programs::{self, ProgramError},
    sys,
};

/// The programs of a workload, loaded when the first is needed.
#[derive(Default)]
pub(super) struct OwnPrograms(Option<HashMap<&'static str, OwnedFd>>);

impl OwnPrograms {
    /// One of the programs. `None` if it serves an option that this kernel does not support.
    pub(super) fn get(
        &mut self,
        node: &Node,
        workload: NetnsCookie,
        netns: NetnsCookie,
        program: &str,
    ) -> Result<Option<&OwnedFd>, ProgramError> {
        let loaded = match self.0.take() {
            Some(loaded) => loaded,
            None => programs::load_for_workload(&node.store.maps(), workload, netns)?,
        };
        Ok(self.0.insert(loaded).get(program))
    }
}

impl Target {
    /// Whether it is a workload of a machine.
    pub fn is_workload(&self) -> bool {
        self.netns.cookie().is_workload()
    }

    /// Its cgroups: one, except of a machine's workload.
    pub fn cgroups(&self) -> Vec<&CgroupDir> {
        std::iter::once(&self.cgroup).chain(&self.also).collect()
    }

    /// The bits of a policy that depend on the target.
    pub(super) fn flags(&self) -> u32 {
        match (self.is_workload(), self.cgroup.is_root()) {
            (false, _) => 0,
            // All of the machine's addresses are the workload's.
            (true, true) => policy::MACHINE,
            (true, false) => policy::MACHINE | policy::BY_LISTENER,
        }
    }

    /// A policy that is activated now.
    pub(super) fn expiring(&self, policy: PodPolicy) -> PodPolicy {
        let nanoseconds = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        let expires_at = self.confirm.map_or(0, |time| boot_time().saturating_add(nanoseconds(time)));
        PodPolicy { expires_at, ..policy }
    }

    /// Refuses a proxy outside of the workload's cgroups: without the programs it would not learn original destinations.
    pub(super) fn refuse_outside(&self, listener: &Listener) -> Result<(), NodeError> {
        if !self.is_workload() {
            return Ok(());
        }
        for cgroup in self.cgroups() {
            if cgroup.processes()?.contains(&listener.pid) {
                return Ok(());
            }
        }
        Err(NodeError::ProxyOutside { port: listener.port, pid: listener.pid.as_raw_nonzero().get() })
    }

    /// Refuses what would be captured by two workloads, or two workloads with one proxy.
    pub(super) fn refuse_workloads(
        &self,
        policy: &PodPolicy,
        policies: &[(NetnsCookie, PodPolicy)],
        living: &Living,
    ) -> Result<(), NodeError> {
        for (&cookie, other) in living {
            if !cookie.is_workload() || cookie == self.netns.cookie() {
                continue;
            }
            for theirs in &other.cgroups {
                for own in self.cgroups() {
                    refuse_overlap(own, theirs)?;
                }
            }
            let ports = |policy: &PodPolicy| {
                let dns = (policy.flags & policy::DNS != 0).then_some(policy.dns_port);
                [Some(policy.outbound_port), Some(policy.inbound_port), dns]
            };
            let found = policies.iter().find(|(netns, _)| *netns == cookie);
            let taken = found.map(|(_, policy)| ports(policy)).unwrap_or_default();
            if let Some(port) = ports(policy).into_iter().flatten().find(|port| taken.contains(&Some(*port)))
            {
                return Err(NodeError::ProxyTaken { port, cgroup: other.cgroup_name() });
            }
        }
        Ok(())
    }
}

fn refuse_overlap(own: &CgroupDir, theirs: &super::plan::LivingCgroup) -> Result<(), NodeError> {
    let (own_name, their_name) = (own.path().display().to_string(), theirs.name());
    if own.id() == theirs.id {
        return Err(NodeError::InWorkload { cgroup: their_name });
    }
    let (inner, outer) = if own.lineage()?.contains(&theirs.id) {
        (own_name, their_name.clone())
    } else if theirs.lineage.contains(&own.id()) {
        (their_name.clone(), own_name)
    } else {
        return Ok(());
    };
    Err(NodeError::Nested { inner, outer, captured: their_name })
}

impl Node {
    /// The folders of a pod's links: one for each cgroup, the first being the pod's own folder.
    pub(super) fn link_folders(&self, target: &Target) -> Vec<(PathBuf, u64)> {
        let own = self.store.pod(target.netns.cookie());
        let also = target.also.iter().map(|cgroup| (own.join(folder_of(cgroup.id())), cgroup.id()));
        std::iter::once((own.clone(), target.cgroup.id())).chain(also).collect()
    }

    /// As `link_folders`, of those that there are.
    pub(super) fn existing_link_folders(&self, cookie: NetnsCookie) -> Result<Vec<PathBuf>, NodeError> {
        let mut folders = vec![self.store.pod(cookie)];
        if cookie.is_workload() {
            folders.extend(self.store.folders_of(cookie)?);
        }
        Ok(folders)
    }

    /// Detaches a workload from cgroups that it no longer has.
    pub(super) fn remove_other_links(&self, target: &Target) -> Result<(), NodeError> {
        if !target.is_workload() {
            return Ok(());
        }
        let needed = self.link_folders(target);
        for folder in self.store.folders_of(target.netns.cookie())? {
            if needed.iter().all(|(needed, _)| *needed != folder) {
                self.detach_links(&folder);
                self.store.remove(&folder)?;
            }
        }
        Ok(())
    }

    /// Detaches the links in a folder. What fails is detached a little later, by the removal of the pin.
    pub(super) fn detach_links(&self, folder: &std::path::Path) {
        for program in names::CGROUP_PROGRAMS.iter().chain([&names::SK_LOOKUP]) {
            let link = sys::open_pin(&folder.join(program));
            let _goes_with_its_pin = link.and_then(|link| sys::link_detach(link.as_fd()));
        }
    }

    /// The changes of the host's namespace that other workloads need.
    pub(super) fn changes_of_others(&self, cookie: NetnsCookie) -> Result<NetnsChanges, NodeError> {
        let mut changes = NetnsChanges::default();
        if !cookie.is_workload() {
            return Ok(changes);
        }
        for (other, policy) in self.maps.policies()? {
            if other.is_workload()
                && other != cookie
                && let Some(record) = self.store.read_record(other, policy.id)?
            {
                changes.merge(&record.netns_setup);
            }
        }
        Ok(changes)
    }

    /// Confirms the workloads that would expire, or only one. Returns those that were confirmed.
    pub fn confirm(&mut self, only: Option<NetnsCookie>) -> Result<Vec<NetnsCookie>, NodeError> {
        let mut confirmed = Vec::new();
        for (cookie, policy) in self.maps.policies()? {
            if policy.expires_at == 0 || only.is_some_and(|only| only != cookie) || is_expired(&policy) {
                continue;
            }
            self.maps.activate(cookie, &PodPolicy { expires_at: 0, ..policy })?;
            confirmed.push(cookie);
        }
        Ok(confirmed)
    }
}

pub(super) fn folder_of(cgroup_id: u64) -> String {
    format!("cgroup-{cgroup_id}")
}

/// Whether a policy was not confirmed in time. The programs ignore it.
pub(super) fn is_expired(policy: &PodPolicy) -> bool {
    policy.expires_at != 0 && boot_time() >= policy.expires_at
}

/// How long a policy has an effect unless it is confirmed.
pub fn remaining(policy: &PodPolicy) -> Option<Duration> {
    (policy.expires_at != 0).then(|| Duration::from_nanos(policy.expires_at.saturating_sub(boot_time())))
}

/// Nanoseconds of `CLOCK_BOOTTIME`, as the programs read it.
pub fn boot_time() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    let nanoseconds =
        Duration::new(now.tv_sec.unsigned_abs(), 0).as_nanos() + u128::from(now.tv_nsec.unsigned_abs());
    u64::try_from(nanoseconds).unwrap_or(u64::MAX)
}
