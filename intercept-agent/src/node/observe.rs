//! What an attach reads of the pod, before it locks the store. Everything that a pod can make slow is here, where no other
//! pod waits for it.

use super::{NodeError, Target};
use crate::{
    mirror::{Follower, Mirror},
    options::Config,
    plumbing,
    userns::IdMaps,
};

/// What a pod's namespaces are like.
#[derive(Debug)]
pub struct Observation {
    pub(super) mirror: Mirror,
    pub(super) found: plumbing::Found,
    pub(super) ids: IdMaps,
}

impl Observation {
    /// Read it. A follower of the namespace reads the routes itself, so that it misses no change after them.
    pub fn of(target: &Target, config: &Config, follower: Option<&mut Follower>) -> Result<Self, NodeError> {
        target.netns.run(|| {
            let netns = || target.netns.name().to_owned();
            let mirror = match follower {
                Some(follower) => follower.look().cloned(),
                None => Mirror::snapshot(&target.netns),
            };
            let mirror = mirror.map_err(|source| NodeError::Mirror { netns: netns(), source })?;
            let found = plumbing::find(&target.netns, config, &mirror)
                .map_err(|source| NodeError::Plumbing { netns: netns(), source })?;
            let cgroup = target.cgroup.path().display().to_string();
            let ids = IdMaps::of_pod(&target.netns, &target.cgroup)
                .map_err(|source| NodeError::UserNs { cgroup, source })?;
            Ok(Self { mirror, found, ids })
        })?
    }

    /// The routes as they are; after an attach, as that has made them.
    pub fn into_mirror(self) -> Mirror {
        self.mirror
    }
}
