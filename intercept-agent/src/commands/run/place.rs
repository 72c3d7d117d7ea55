//! The pod or workload that `run` captures: whether it still exists, and what keeps its namespace open.

use std::path::{Path, PathBuf};

use anyhow::Result;

use crate::{
    cgroup::CgroupDir,
    daemon::capture::{AppliedPod, Liveness, leads_to},
    ids::NetnsCookie,
    node::{Node, Target},
    options::Config,
    record::RecordOrigin,
    routes::{Follower, Subscription},
};

/// What `run` has open of a pod. It keeps the namespace alive, so it is closed when nothing else leads there.
pub(super) struct OpenPlace {
    pub(super) target: Target,
    pub(super) changes: Follower,
}

/// A pod or workload, known without a descriptor that would keep it alive.
pub(super) struct RunPlace {
    pod: AppliedPod,
    /// The cgroups of a machine's workload that existed at the last check.
    cgroups: Vec<(PathBuf, u64)>,
    pub(super) open: Option<OpenPlace>,
}

/// Subscribes to what `run` follows in a namespace.
pub(super) fn subscribe(target: &Target, config: &Config) -> Result<Subscription> {
    let mut changes = Subscription::open(&target.netns)?;
    if !config.virt_interfaces.is_empty() {
        // Only the agent can let the proxy's listeners answer for the guests of -k (IP_TRANSPARENT), so it polls for
        // new ones.
        changes.watch_listeners(&target.netns, config.proxy_port)?;
    }
    Ok(changes)
}

impl RunPlace {
    pub(super) fn new(target: Target, changes: Follower) -> Self {
        let name = |cgroup: &CgroupDir| (cgroup.path().to_owned(), cgroup.id());
        Self {
            pod: AppliedPod {
                cookie: target.netns.cookie(),
                cgroup: target.cgroup.path().to_owned(),
                cgroup_id: target.cgroup.id(),
                netns_inode: target.netns.inode(),
                netns_path: target.netns_path.clone(),
            },
            cgroups: target.cgroups().into_iter().map(name).collect(),
            open: Some(OpenPlace { target, changes }),
        }
    }

    pub(super) fn cookie(&self) -> NetnsCookie {
        self.pod.cookie
    }

    /// Waits for a change of addresses or routes.
    pub(super) async fn changed(&mut self) -> Result<(), crate::routes::RoutesError> {
        match &mut self.open {
            Some(open) => open.changes.changed().await.map(drop),
            None => std::future::pending().await,
        }
    }

    /// Whether the pod still exists. If nothing else leads to its namespace, closes it, so that the kernel can tell; opens it
    /// again when something does. A workload exists as long as one of its cgroups does.
    pub(super) fn exists(&mut self, bpffs: &Path, config: &Config) -> Result<bool> {
        if self.pod.cookie.is_workload() {
            let is_gone = |(path, id): &mut (PathBuf, u64)| !leads_to(path, *id);
            for (path, _) in self.cgroups.extract_if(.., is_gone) {
                tracing::warn!(cgroup = %path.display(), "this cgroup of the workload is gone, and its capture with it");
            }
            return Ok(!self.cgroups.is_empty());
        }
        match (self.pod.liveness(), &self.open) {
            (Liveness::Gone, _) => Ok(false),
            (Liveness::Alive, Some(_)) => Ok(true),
            (Liveness::Alive, None) => self.reopen(config).map(|()| true),
            (Liveness::Unknown, open) => {
                if open.is_some() {
                    tracing::info!(
                        "nothing leads to the pod's network namespace any more, so it is not followed"
                    );
                    self.open = None;
                }
                match Node::find(bpffs)? {
                    Some(node) => Ok(node.cgroup_of(self.pod.cookie)?.is_some()),
                    None => Ok(false),
                }
            }
        }
    }

    fn reopen(&mut self, config: &Config) -> Result<()> {
        let Some(netns) = self.pod.netns()? else { return Ok(()) };
        let (cgroup, netns_path) = (CgroupDir::open(&self.pod.cgroup)?, self.pod.netns_path.clone());
        let origin = RecordOrigin::Command;
        let target = Target { cgroup, also: Vec::new(), netns, netns_path, origin, confirm: None };
        let changes = subscribe(&target, config)?.follow()?;
        tracing::info!(netns = target.netns.name(), "following the pod's network namespace again");
        self.open = Some(OpenPlace { target, changes });
        Ok(())
    }
}
