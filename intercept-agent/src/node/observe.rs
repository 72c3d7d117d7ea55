//! What an attach reads of the pod, before it locks the store. Everything that a pod can make slow is here, where no
//! other pod waits for it.

use super::{NodeError, Target};
use crate::{
    containers::ContainerCgroups,
    netns_setup,
    options::Config,
    routes::{RouteReading, RouteSnapshot, RouteSocket, Subscription},
    userns::IdMaps,
};

/// The state of a pod's namespaces.
#[derive(Debug)]
pub struct Observation {
    pub(super) snapshot: RouteSnapshot,
    /// The socket by which it was read.
    pub(super) socket: RouteSocket,
    pub(super) found: netns_setup::NetnsState,
    pub(super) ids: IdMaps,
    pub(super) containers: ContainerCgroups,
}

impl Observation {
    /// Reads it. A subscription to the namespace reads the routes itself, so that it misses no change after them.
    pub fn of(
        target: &Target,
        config: &Config,
        changes: Option<&mut Subscription>,
    ) -> Result<Self, NodeError> {
        target.netns.run(|| {
            let netns = || target.netns.name().to_owned();
            let reading = match changes {
                Some(changes) => changes.look(),
                None => RouteReading::of(&target.netns),
            };
            let reading = reading.map_err(|source| NodeError::RouteSnapshot { netns: netns(), source })?;
            let found = netns_setup::find(&target.netns, config, &reading)
                .map_err(|source| NodeError::NetnsChanges { netns: netns(), source })?;
            let cgroup = target.cgroup.path().display().to_string();
            let ids = if target.is_workload() {
                IdMaps::identity()
            } else {
                IdMaps::of_pod(&target.netns, &target.cgroup)
                    .map_err(|source| NodeError::UserNs { cgroup, source })?
            };
            let containers = ContainerCgroups::find(config, &target.cgroups(), target.origin.pod_uid())?;
            let RouteReading { snapshot, socket, .. } = reading;
            Ok(Self { snapshot, socket, found, ids, containers })
        })?
    }

    /// The routes now; after an attach, the routes with its changes.
    pub fn into_routes(self) -> RouteSnapshot {
        self.snapshot
    }
}
