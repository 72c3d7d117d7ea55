//! The node's programs and maps, and the pods they are attached to.
//!
//! One write to POLICIES activates a policy. An attach first makes a plan ([`plan`]); then it adds, makes that one
//! write, and removes ([`apply`]). What it adds affects no connection, so an agent that crashes leaves the old policy
//! active. What it did not get to remove, the next call removes ([`collect`]).

mod accelerate;
mod applications;
mod apply;
mod collect;
mod error;
mod links;
mod observe;
mod open;
mod paused;
mod plan;
mod query;
mod register;
mod shadow;
mod workload;

use std::{cell::OnceCell, collections::BTreeMap, path::PathBuf, sync::Arc, time::Duration};

use self::links::SharedPrograms;
use crate::{
    cgroup::CgroupDir,
    ids::NetnsCookie,
    maps::Maps,
    netns::Netns,
    programs::Lookup,
    record::RecordOrigin,
    store::{Lock, Store},
};

pub use apply::Attached;
pub use collect::DetachedPod;
pub use error::NodeError;
pub use observe::Observation;
pub use paused::Paused;
pub use plan::{LivingPod, Rewrite};
pub use query::{BrokenPod, PodRecords};
pub use workload::{boot_time, remaining};

/// The cgroup and the network namespace to attach to.
pub struct Target {
    /// Its cgroup.
    pub cgroup: CgroupDir,
    /// Further cgroups of a machine's workload.
    pub also: Vec<CgroupDir>,
    /// Its network namespace.
    pub netns: Netns,
    /// A path that leads to the namespace, if one was given.
    pub netns_path: Option<PathBuf>,
    /// The source that asks for it.
    pub origin: RecordOrigin,
    /// The capture ends after this time unless it is confirmed; only of a machine's workload.
    pub confirm: Option<Duration>,
}

/// The node's store and maps, with the store locked.
pub struct Node {
    store: Store,
    maps: Maps,
    lookup: OnceCell<Lookup>,
    shared: SharedPrograms,
    living: Option<Arc<Living>>,
    lock: Lock,
}

/// The pods that are there, by netns cookie.
pub type Living = BTreeMap<NetnsCookie, LivingPod>;
