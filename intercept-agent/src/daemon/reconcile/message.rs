//! What the loop is told.

use std::collections::HashSet;

use tokio::sync::oneshot;

use super::{PodReport, PodResult};
use crate::{
    daemon::{
        capture::{CaptureError, Captured},
        desired::{DesiredPod, Key},
        view::{ObjectClaim, ObjectId, ObjectUid, SandboxClaim},
    },
    ids::NetnsCookie,
    node::NodeError,
    record::Record,
};

/// What happened. What sources say is kept by source ([`crate::daemon::view`]): none undoes what another has said.
pub enum Message {
    /// A file of the folder describes a pod, or does not read.
    File(Key, Box<Result<DesiredPod, String>>),
    /// A file of the folder is gone.
    FileRemoved(Key),
    /// The folder has these files, and no others.
    FilesListed(HashSet<Key>),
    /// An object of the API speaks for a pod.
    Object(Key, Box<ObjectClaim>),
    /// An object of the API is gone.
    ObjectDeleted(Key, ObjectId),
    /// The API has these objects on this node, and no others.
    ObjectsListed(HashSet<ObjectUid>),
    /// The runtime has a sandbox for a pod, and is told what became of it.
    Sandbox(Key, Box<SandboxClaim>, oneshot::Sender<PodResult>),
    /// The API has said nothing of the pod of this sandbox for as long as one waits for it.
    ApiTimeout(Key, String),
    /// The sandbox of a pod is going away.
    Delete {
        /// The pod.
        key: Key,
        /// Its sandbox: a pod may have another one by now.
        sandbox: String,
        /// Told when nothing is in force any more.
        reply: oneshot::Sender<PodResult>,
    },
    /// Whether a pod is in force.
    Check(Key, oneshot::Sender<PodResult>),
    /// What of a pod is known.
    Report(oneshot::Sender<Vec<PodReport>>),
    /// The runtime has these sandboxes and no others; told how many pods are released for that.
    Collect(HashSet<String>, oneshot::Sender<usize>),
    /// Take everything away, and stay away.
    Leave(oneshot::Sender<Result<(), NodeError>>),
    /// The namespace of a pod changed.
    Changed(Key, NetnsCookie),
    /// The worker is done with a pod.
    Done(Key, Box<JobOutcome>),
    /// What is in force, and what of it was not known.
    Resynced(Vec<NetnsCookie>, Vec<Record>),
}

/// How a job ended.
pub enum JobOutcome {
    /// It is in force.
    Captured(Result<Captured, CaptureError>),
    /// It is out of force.
    Released(Result<(), CaptureError>),
    /// Nothing leads to its namespace any more: whether it is there all the same.
    Alive(Result<bool, CaptureError>),
}
