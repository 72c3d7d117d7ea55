//! A pod that is being cut over: no other command cuts it over meanwhile.

use std::path::{Path, PathBuf};

use super::{Caution, CutoverError, Keeper, RulesState, SavedRules, now};
use crate::{
    cgroup::CgroupDir,
    ids::NetnsCookie,
    netns::Netns,
    node::{Node, NodeError, Observation, Rewrite, Target},
    options::{Config, InboundMode},
    programs::DEFAULT_MAX_CONNECTIONS,
    record::{Record, RecordOrigin},
    shadow::ShadowReport,
    store::{Lock, Store},
};

/// What a pod's policy does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum PolicyMode {
    /// It decides and compares.
    Shadow,
    /// It captures.
    Enforce,
}

pub(super) struct CutoverPod {
    bpffs: PathBuf,
    store: Store,
    target: Target,
    record: Record,
    /// What the shadow has found.
    shadow: Option<ShadowReport>,
    _lock: Lock,
}

impl CutoverPod {
    pub(super) fn open(bpffs: &Path, cgroup: &CgroupDir, keeper: Keeper) -> Result<Self, CutoverError> {
        let path = || cgroup.path().to_owned();
        let absent = || CutoverError::NotAttached { cgroup: path() };
        let find = || -> Result<Option<(Node, NetnsCookie)>, NodeError> {
            let Some(node) = Node::find(bpffs)? else { return Ok(None) };
            let found = node.pod_of_cgroup(cgroup.id())?;
            Ok(found.map(|(cookie, _)| (node, cookie)))
        };
        let (node, cookie, lock) = loop {
            let (node, cookie) = find()?.ok_or_else(absent)?;
            let store = node.store().clone();
            // Commands for other pods go on meanwhile.
            drop(node);
            let lock = match store.lock_pod(cookie) {
                Err(error) if error.is_not_found() => return Err(absent()),
                lock => lock?,
            };
            let (node, found) = find()?.ok_or_else(absent)?;
            // Else it was detached and attached again.
            if found == cookie && store.is_lock_of(&lock, cookie) {
                break (node, cookie, lock);
            }
        };
        let store = node.store().clone();
        let record = node.record_of(cookie)?.ok_or(NodeError::NoRecord(cookie))?;
        let shadow = ShadowReport::read(node.maps().shadow(), cookie).map_err(NodeError::from)?;
        let is_kept = store.is_kept();
        drop(node);
        if cookie.is_workload() {
            return Err(CutoverError::Machine { cgroup: path() });
        }
        // Without a daemon nothing else changes the pod, and the next one goes on from there.
        if keeper == Keeper::Command && record.origin != RecordOrigin::Command && is_kept {
            return Err(CutoverError::Kept { cgroup: path(), name: record.name() });
        }
        let netns = match record.netns().map_err(NodeError::from)? {
            Some(netns) => netns,
            None => Netns::of_cgroup(cgroup)?,
        };
        let target = Target {
            cgroup: CgroupDir::open(cgroup.path()).map_err(NodeError::from)?,
            also: Vec::new(),
            netns,
            netns_path: record.netns_path.clone(),
            origin: record.origin.clone(),
            confirm: None,
        };
        Ok(Self { bpffs: bpffs.to_owned(), store, target, record, shadow, _lock: lock })
    }

    pub(super) fn cgroup(&self) -> &Path {
        self.target.cgroup.path()
    }

    pub(super) fn netns(&self) -> &Netns {
        &self.target.netns
    }

    pub(super) fn cookie(&self) -> NetnsCookie {
        self.record.cookie
    }

    pub(super) fn config(&self) -> &Config {
        &self.record.config
    }

    pub(super) fn mode(&self) -> PolicyMode {
        if self.record.config.shadow { PolicyMode::Shadow } else { PolicyMode::Enforce }
    }

    pub(super) fn refuse_tproxy(&self) -> Result<(), CutoverError> {
        match self.config().mode {
            InboundMode::Redirect => Ok(()),
            InboundMode::Tproxy => Err(CutoverError::Tproxy { netns: self.netns().name().to_owned() }),
        }
    }

    pub(super) fn refuse_disagreement(&self, keeper: Keeper, caution: Caution) -> Result<(), CutoverError> {
        super::refuse_disagreement(self.shadow.as_ref(), self.cgroup(), keeper, caution)
    }

    pub(super) fn saved(&self) -> Result<Option<SavedRules>, CutoverError> {
        Ok(self.store.saved_rules(self.cookie())?)
    }

    pub(super) fn save(&self, saved: &mut SavedRules, state: RulesState) -> Result<(), CutoverError> {
        (saved.state, saved.since) = (state, now());
        Ok(self.store.save_rules(self.cookie(), saved)?)
    }

    pub(super) fn forget(&self) -> Result<(), CutoverError> {
        Ok(self.store.forget_rules(self.cookie())?)
    }

    /// Changes what the policy does, by one write.
    pub(super) fn switch(&mut self, mode: PolicyMode) -> Result<(), CutoverError> {
        let config = Config { shadow: mode == PolicyMode::Shadow, ..self.record.config.clone() };
        let mut observed = Observation::of(&self.target, &config, None)?;
        let mut node = Node::open(&self.bpffs, DEFAULT_MAX_CONNECTIONS)?;
        node.attach(&self.target, &config, &mut observed, Rewrite::IfChanged)?;
        self.record.config = config;
        Ok(())
    }
}
