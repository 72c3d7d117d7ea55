//! What is remembered of an attached pod: its policy, what was changed for it, and who asked for it.

use std::{fs, os::unix::fs::MetadataExt as _, path::PathBuf};

use serde::{Deserialize, Serialize};

use crate::{
    ids::{CookieNumber, NetnsCookie, PodUid, PolicyId, PolicyNumber, Slot, SlotNumber},
    netns::Netns,
    netns_setup::NetnsChanges,
    options::Config,
};

/// Who asked for a pod. It may then be taken away when the same no longer asks.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RecordOrigin {
    /// `attach` or `run`: only `detach` takes it away.
    #[default]
    Command,
    /// A file of the daemon's folder of pods.
    File {
        /// Its name in the folder.
        name: String,
    },
    /// Kubernetes, or a container runtime through the CNI plugin.
    Pod {
        /// The pod's UID; without Kubernetes, the id of its sandbox.
        uid: PodUid,
        /// Its namespace; may be empty.
        namespace: String,
        /// Its name; may be empty.
        name: String,
        /// The sandbox that the plugin was called for, if it was.
        sandbox: Option<String>,
    },
}

impl RecordOrigin {
    /// A name for people, where it has one.
    pub fn name(&self) -> Option<String> {
        match self {
            Self::Command => None,
            Self::File { name } => Some(name.clone()),
            Self::Pod { uid, namespace, name, .. } => Some(match (namespace.as_str(), name.as_str()) {
                ("", "") => uid.0.clone(),
                (namespace, "") => format!("{namespace}/{uid}"),
                (namespace, name) => format!("{namespace}/{name}"),
            }),
        }
    }
}

/// What is remembered of an attached pod, beside its links.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Netns cookie.
    #[serde(with = "CookieNumber")]
    pub cookie: NetnsCookie,
    /// [`intercept_common::layout::PodPolicy::id`] of the policy that this record describes.
    #[serde(with = "PolicyNumber")]
    pub policy: PolicyId,
    /// Index of its counters.
    #[serde(with = "SlotNumber")]
    pub slot: Slot,
    /// The cgroup, as it was named.
    pub cgroup: PathBuf,
    /// Its id, which a cgroup of the same name made later does not have.
    pub cgroup_id: u64,
    /// Inode of the network namespace.
    pub netns_inode: u64,
    /// A path that leads to the namespace, if one was given.
    pub netns_path: Option<PathBuf>,
    /// What is captured; ids as seen inside the pod.
    pub config: Config,
    /// Tells the compiled policy apart from another.
    pub digest: u64,
    /// What was changed in the namespace.
    pub netns_setup: NetnsChanges,
    /// Who asked for it.
    #[serde(default)]
    pub origin: RecordOrigin,
    /// Seconds since 1970 when this policy was put in force.
    pub since: u64,
}

impl Record {
    /// A name for people: `namespace/name` of a pod, or what there is.
    pub fn name(&self) -> String {
        self.origin.name().unwrap_or_else(|| self.cgroup.display().to_string())
    }

    /// Its namespace, by the path it was given by or by a process that is in it. None if it is gone.
    pub fn netns(&self) -> Option<Netns> {
        let is_it = |netns: &Netns| netns.cookie() == self.cookie;
        let by_path = self.netns_path.as_ref().and_then(|path| Netns::open(path).ok()).filter(is_it);
        by_path.or_else(|| {
            fs::read_dir("/proc").ok()?.filter_map(Result::ok).find_map(|process| {
                let path = process.path().join("ns/net");
                let inode = fs::metadata(&path).ok()?.ino();
                (inode == self.netns_inode).then(|| Netns::open(&path).ok()).flatten().filter(is_it)
            })
        })
    }
}
