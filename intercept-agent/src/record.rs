//! The record of an attached pod: its policy, the changes made for it, and the source that asked for it.

use std::{fs, os::unix::fs::MetadataExt as _, path::PathBuf};

use serde::{Deserialize, Serialize};

use crate::{
    ids::{CookieNumber, NetnsCookie, PodUid, PolicyId, PolicyNumber, Slot, SlotNumber},
    netns::{Netns, NetnsError},
    netns_setup::NetnsChanges,
    options::Config,
    store::is_short,
};

/// The source that asked for a pod, which may also end the capture.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RecordOrigin {
    /// `attach` or `run`. Only `detach` ends it.
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
        /// The sandbox for which the CNI plugin was called, if it was.
        sandbox: Option<String>,
    },
}

impl RecordOrigin {
    /// The pod's UID, of a pod of Kubernetes.
    pub fn pod_uid(&self) -> Option<&str> {
        match self {
            Self::Pod { uid, .. } => Some(&uid.0),
            Self::Command | Self::File { .. } => None,
        }
    }

    /// Its name for logs, if it has one.
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

/// The record of an attached pod.
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
    /// Path of the cgroup, as it was given.
    pub cgroup: PathBuf,
    /// Id of the cgroup. A later cgroup of the same name has another.
    pub cgroup_id: u64,
    /// Further cgroups of a machine's workload.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub also: Vec<PathBuf>,
    /// Inode of the network namespace.
    pub netns_inode: u64,
    /// A path that leads to the namespace, if one was given.
    pub netns_path: Option<PathBuf>,
    /// The options, with ids as the pod sees them.
    pub config: Config,
    /// Digest of the compiled policy.
    pub digest: u64,
    /// The changes of the namespace.
    pub netns_setup: NetnsChanges,
    /// The source that asked for it.
    #[serde(default)]
    pub origin: RecordOrigin,
    /// When this policy was activated, in seconds since 1970.
    pub since: u64,
}

/// Opens the namespace of a pod, of which there may be no record. As [`Record::netns`].
pub fn netns_of(record: Option<&Record>) -> Result<Option<Netns>, NetnsError> {
    record.map_or(Ok(None), Record::netns)
}

impl Record {
    /// Its name for logs: `namespace/name` of a pod, or the path of the cgroup.
    pub fn name(&self) -> String {
        self.origin.name().unwrap_or_else(|| self.cgroup.display().to_string())
    }

    /// The paths of its cgroups.
    pub fn cgroups(&self) -> impl Iterator<Item = &PathBuf> {
        std::iter::once(&self.cgroup).chain(&self.also)
    }

    /// Opens its namespace, by its path or by a process in it. `None` if it is gone, which a lack of descriptors does not show.
    pub fn netns(&self) -> Result<Option<Netns>, NetnsError> {
        // Access is refused to processes of others, which may have this number by now.
        let if_it = |opened: Result<Netns, NetnsError>| match opened {
            Err(error) if is_short(&error) => Err(error),
            opened => Ok(opened.ok().filter(|netns| netns.cookie() == self.cookie)),
        };
        if self.cookie.is_workload() {
            let netns = if_it(Netns::of_machine(self.cookie))?;
            return Ok(netns.filter(|netns| netns.inode() == self.netns_inode));
        }
        if let Some(path) = &self.netns_path
            && let Some(netns) = if_it(Netns::open(path))?
        {
            return Ok(Some(netns));
        }
        let failed = |source| NetnsError::Open { name: "/proc".to_owned(), source };
        for process in fs::read_dir("/proc").map_err(failed)?.filter_map(Result::ok) {
            let path = process.path().join("ns/net");
            if fs::metadata(&path).is_ok_and(|found| found.ino() == self.netns_inode)
                && let Some(netns) = if_it(Netns::open(&path))?
            {
                return Ok(Some(netns));
            }
        }
        Ok(None)
    }
}
