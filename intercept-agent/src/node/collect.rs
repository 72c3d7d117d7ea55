//! Removes state: of a detached pod, of a pod's inactive policies, of pods that are gone, and of crashed agents.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    sync::Arc,
};

use intercept_common::layout::PodPolicy;

use super::{Living, LivingPod, Node, NodeError, plan::LivingCgroup, workload::is_expired};
use crate::{
    cgroup::CgroupDir,
    compile,
    ids::{NetnsCookie, PolicyId},
    netns::Netns,
    netns_setup::{self, NetnsChanges, NetnsSetupError},
    record::{Record, netns_of},
    store::{Store, is_short},
};

/// A pod of [`Node::detach_all`].
#[derive(Debug)]
pub struct DetachedPod {
    /// Cookie of its namespace.
    pub cookie: NetnsCookie,
    /// Its cgroup, if the record of its active policy can be read.
    pub cgroup: Option<PathBuf>,
    /// Whether it was detached.
    pub result: Result<(), NodeError>,
}

impl Node {
    /// Deactivates a pod and removes everything of it. `netns` is its namespace, if it can still be reached.
    pub fn detach(&mut self, cookie: NetnsCookie, netns: Option<&Netns>) -> Result<(), NodeError> {
        match netns {
            Some(netns) => {
                self.refuse_uncaptured(cookie)?;
                self.remove_pod(cookie, Some(netns))
            }
            None => self.remove_unreachable(cookie),
        }
    }

    /// Removes programs and maps if no pod uses them and no daemon keeps them.
    pub fn remove_if_unused(self) -> Result<(), NodeError> {
        if self.store.pods()?.is_empty() && !self.store.is_kept() {
            self.switch_joining_off();
            self.store.remove_all()?;
        }
        Ok(())
    }

    /// Detaches every pod, active or not: a detach that was killed leaves a pod that is not. Returns each with the name
    /// of its cgroup, which is unknown if its record cannot be read.
    pub fn detach_all(&mut self) -> Result<Vec<DetachedPod>, NodeError> {
        let active = self.maps.policies()?.into_iter().map(|(cookie, _)| cookie);
        let cookies: BTreeSet<NetnsCookie> = active.chain(self.store.pods()?).collect();
        let mut pods = Vec::new();
        for cookie in cookies {
            let record = self.record_of(cookie)?;
            let netns = netns_of(record.as_ref())?;
            let cgroup = record.map(|record| record.cgroup);
            pods.push(DetachedPod { cookie, cgroup, result: self.detach(cookie, netns.as_ref()) });
        }
        Ok(pods)
    }

    /// Detaches every pod and removes programs and maps, also if a pod cannot be detached. Only a pod that nothing would capture
    /// then keeps them.
    pub fn remove_everything(mut self) -> Result<(), NodeError> {
        let mut uncaptured = None;
        for pod in self.detach_all()? {
            match pod.result {
                Ok(()) => {}
                Err(error @ NodeError::RulesOut { .. }) => uncaptured = Some(error),
                Err(error) => {
                    let cookie = pod.cookie;
                    tracing::warn!(%cookie, error = &error as &dyn std::error::Error, "detaching");
                }
            }
        }
        match uncaptured {
            Some(error) => Err(error),
            None => self.remove_programs(),
        }
    }

    /// Removes programs and maps, and what is left of pods.
    pub fn remove_programs(self) -> Result<(), NodeError> {
        self.switch_joining_off();
        Ok(self.store.remove_all()?)
    }

    /// Removes the state of every layout in this bpffs, which [`Node::find`] cannot open. What was changed in the pods'
    /// namespaces is undone as far as their records can be read. False if there is no state.
    pub fn remove_unreadable(bpffs: &Path) -> Result<bool, NodeError> {
        let Some(store) = Store::find_any(bpffs)? else { return Ok(false) };
        let _lock = store.lock()?;
        for layout in store.layouts()? {
            for cookie in layout.pods()? {
                restore_unreadable(&layout, cookie);
            }
        }
        store.remove_all()?;
        Ok(true)
    }

    /// Removes what is left of pods and agents that are gone: folders without an active policy, pods whose cgroup or
    /// namespace is gone. Returns the pods that exist, by cookie.
    pub fn sweep(&mut self) -> Result<Arc<Living>, NodeError> {
        let active = self.maps.policies()?;
        let mut living = Living::new();
        for cookie in self.store.pods()? {
            let policy = active.iter().find(|(netns, _)| *netns == cookie).map(|(_, policy)| policy);
            let pod = match policy {
                Some(policy) => self.living_pod(cookie, policy)?,
                None => None,
            };
            match pod {
                Some(pod) => _ = living.insert(cookie, pod),
                None => self.remove_unreachable(cookie)?,
            }
        }
        let living = Arc::new(living);
        self.living = Some(Arc::clone(&living));
        Ok(living)
    }

    /// Returns the pods that exist. The daemon sweeps now and then, and in between checks only pods that were added.
    /// A pod that is gone conflicts with none, because the kernel does not reuse its cookie or the id of its cgroup.
    pub(super) fn living(&mut self) -> Result<Arc<Living>, NodeError> {
        let Some(mut known) = self.living.take() else { return self.sweep() };
        // Nothing else has it now, so it is changed in place.
        let living = Arc::make_mut(&mut known);
        let listed = self.store.pods()?;
        living.retain(|cookie, _| listed.binary_search(cookie).is_ok());
        for cookie in listed {
            if !living.contains_key(&cookie)
                && let Some(policy) = self.maps.policy(cookie)?
                && let Some(pod) = self.living_pod(cookie, &policy)?
            {
                living.insert(cookie, pod);
            }
        }
        self.living = Some(Arc::clone(&known));
        Ok(known)
    }

    /// A pod, if it exists.
    fn living_pod(&self, cookie: NetnsCookie, policy: &PodPolicy) -> Result<Option<LivingPod>, NodeError> {
        let Some((ids, netns_inode)) = self.place_of(cookie)?.filter(|_| !is_expired(policy)) else {
            return Ok(None);
        };
        let record = self.store.readable_record(cookie, policy.id)?;
        let paths: Vec<PathBuf> = record.iter().flat_map(Record::cgroups).cloned().collect();
        let mut opened = Vec::new();
        for path in &paths {
            match CgroupDir::open_any(path) {
                Ok(dir) => opened.push(dir),
                Err(error) if is_short(&error) => return Err(error.into()),
                // It is gone, or has another path as this agent sees it.
                Err(_) => {}
            }
        }
        let living = |id: u64| {
            let dir = opened.iter().find(|dir| dir.id() == id);
            // A pod has one cgroup, whose name its record has even if it cannot be opened.
            let path = dir.map(|dir| dir.path().to_owned()).or_else(|| match paths.as_slice() {
                [path] => Some(path.clone()),
                _ => None,
            });
            let lineage = match dir.map(CgroupDir::lineage) {
                Some(Err(error)) if is_short(&error) => return Err(error.into()),
                found => found.and_then(Result::ok).unwrap_or_default(),
            };
            Ok(LivingCgroup { id, path, lineage })
        };
        let cgroups = ids.into_iter().map(living).collect::<Result<_, NodeError>>()?;
        Ok(Some(LivingPod { cgroups, netns_inode }))
    }

    /// Removes a pod whose namespace the caller does not have. If it still exists and the agent changed something in
    /// it, the record has its path.
    fn remove_unreachable(&mut self, cookie: NetnsCookie) -> Result<(), NodeError> {
        let mut netns = None;
        if self.may_have_netns(cookie)? {
            for (_, record) in self.store.records(cookie)? {
                match record {
                    Ok(record) if netns.is_none() && !record.netns_setup.is_empty() => {
                        netns = record.netns()?
                    }
                    Err(error) if error.may_pass() => return Err(error.into()),
                    _ => {}
                }
            }
        }
        self.remove_pod(cookie, netns.as_ref())
    }

    /// Removes what belongs to a pod's other policies: the replaced one, or one that a crashed agent did not activate.
    pub(super) fn remove_leftovers(
        &mut self,
        cookie: NetnsCookie,
        active: PolicyId,
        netns: &Netns,
    ) -> Result<(), NodeError> {
        let mut needed = self.changes_of_others(cookie)?;
        let mut others = Vec::new();
        for (id, record) in self.store.records(cookie)? {
            match record {
                Ok(record) if id == active => needed.merge(&record.netns_setup),
                Ok(record) => others.push(((id, compile::flags(&record.config)), record.netns_setup)),
                Err(error) if error.may_pass() => return Err(error.into()),
                // Its changes are not known, so nothing can be undone.
                Err(_) if id != active => others.push(((id, u32::MAX), NetnsChanges::default())),
                Err(_) => {}
            }
        }
        for (_, changes) in &others {
            netns_setup::remove(netns, &changes.without(&needed)).map_err(changing(netns))?;
        }
        if !others.is_empty() {
            self.maps.remove_lists(&others.iter().map(|(lists, _)| *lists).collect::<Vec<_>>())?;
            // Last, so that the next call repeats all of this if it fails before.
            self.store.drop_other_records(cookie, active)?;
        }
        Ok(())
    }

    /// Deactivates a pod and removes everything of it, including the changes of its namespace if that is given. After a
    /// failure, call it again.
    pub(super) fn remove_pod(&mut self, cookie: NetnsCookie, netns: Option<&Netns>) -> Result<(), NodeError> {
        let policy = self.maps.policy(cookie)?;
        if let Some(policy) = &policy
            && let Err(error) = self.stop_accelerating(cookie, policy.slot)
        {
            tracing::warn!(
                cookie = cookie.0,
                error = &error as &dyn std::error::Error,
                "joined connections stay joined"
            );
        }
        // Before the policy is deactivated: a call after that would not know which sockets it has changed.
        let listeners = match (&policy, netns) {
            (Some(policy), Some(netns)) => match self.store.readable_record(cookie, policy.id)? {
                Some(record) => self.changed_listeners(&record, policy, netns)?,
                None => Vec::new(),
            },
            _ => Vec::new(),
        };
        self.maps.deactivate(cookie)?;
        if let Some(netns) = netns {
            Self::restore_listeners(cookie, &listeners);
            self.restore(cookie, netns)?;
        }
        for folder in self.existing_link_folders(cookie)? {
            self.detach_links(&folder);
        }
        // Every list was written after its record.
        let records = self.store.records(cookie)?;
        let flags = |record: &Result<Record, _>| {
            record.as_ref().map_or(u32::MAX, |record| compile::flags(&record.config))
        };
        let mut lists: Vec<(PolicyId, u32)> =
            records.iter().map(|(id, record)| (*id, flags(record))).collect();
        lists.extend(policy.as_ref().map(|policy| (policy.id, policy.flags)));
        self.maps.remove_lists(&lists)?;
        // Reading the connections of all pods takes milliseconds, and most pods have closed theirs by now. The slot of an inactive
        // policy may count those of another pod.
        if policy.as_ref().is_none_or(|policy| self.maps.connections(policy.slot) != 0) {
            self.maps.remove_connections(cookie)?;
        }
        self.maps.remove_listeners(cookie)?;
        let others = self.maps.policies()?;
        let slots = records.iter().filter_map(|(_, record)| record.as_ref().ok()).map(|record| record.slot);
        for slot in slots.chain(policy.as_ref().map(|policy| policy.slot)) {
            // The slot of an inactive policy may belong to another pod by now.
            if others.iter().all(|(_, other)| other.slot != slot) {
                self.maps.reset_slot(slot)?;
            }
        }
        self.end_shadow(cookie)?;
        // Last, so that the next call repeats all of this if it fails before.
        Ok(self.store.remove(&self.store.pod(cookie))?)
    }

    /// Undoes the changes of the namespace that the pod's records list.
    fn restore(&self, cookie: NetnsCookie, netns: &Netns) -> Result<(), NodeError> {
        let needed = self.changes_of_others(cookie)?;
        for (policy, record) in self.store.records(cookie)? {
            match record {
                Ok(record) => netns_setup::remove(netns, &record.netns_setup.without(&needed))
                    .map_err(changing(netns))?,
                Err(error) if error.may_pass() => return Err(error.into()),
                Err(error) => tracing::warn!(
                    cookie = cookie.0,
                    policy = policy.0,
                    error = &error as &dyn std::error::Error,
                    "the changes of the namespace are unknown and stay"
                ),
            }
        }
        Ok(())
    }
}

/// Undoes the changes of a pod's namespace. There is no next call, so a failure is only logged.
fn restore_unreadable(store: &Store, cookie: NetnsCookie) {
    let undo = || -> Result<(), NodeError> {
        for (_, record) in store.records(cookie)? {
            let record = record?;
            if let Some(netns) = record.netns()? {
                netns_setup::remove(&netns, &record.netns_setup).map_err(changing(&netns))?;
            }
        }
        Ok(())
    };
    if let Err(error) = undo() {
        let error = &error as &dyn std::error::Error;
        tracing::warn!(%cookie, error, "what was changed in the namespace of this pod stays");
    }
}

/// The error of a change of a namespace.
pub(super) fn changing(netns: &Netns) -> impl FnOnce(NetnsSetupError) -> NodeError + use<> {
    let netns = netns.name().to_owned();
    move |source| NodeError::NetnsChanges { netns, source }
}
