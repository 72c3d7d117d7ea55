//! Messages to the reconciler.

use std::collections::HashSet;

use tokio::sync::oneshot;

use crate::{
    cutover::CutoverError,
    daemon::{
        capture::{CaptureError, Captured, ResyncResult},
        cutover::CutoverAttempt,
        desired::{DesiredPod, Key},
        prove::ProbeResult,
        report::{PodReport, PodResult},
        view::{ObjectClaim, ObjectId, ObjectUid, SandboxClaim},
    },
    ids::NetnsCookie,
};

/// A message. Claims are kept by source ([`crate::daemon::view`]), so that no source changes another's.
pub enum Message {
    /// A file of the folder, with its pod or why it cannot be read.
    File(Key, Box<Result<DesiredPod, String>>),
    /// A file of the folder is gone.
    FileRemoved(Key),
    /// All files of the folder.
    FilesListed(HashSet<Key>),
    /// An object of the API, with its claim.
    Object(Key, Box<ObjectClaim>),
    /// An object of the API is gone.
    ObjectDeleted(Key, ObjectId),
    /// All objects of the API on this node.
    ObjectsListed(HashSet<ObjectUid>),
    /// The runtime has created a sandbox, and waits for the result.
    Sandbox(Key, Box<SandboxClaim>, oneshot::Sender<PodResult>),
    /// The API has not reported the pod of this sandbox within the time limit.
    ApiTimeout(Key, String),
    /// The sandbox of a pod is being removed.
    Delete {
        /// The pod.
        key: Key,
        /// Its sandbox. The pod may have another one by now.
        sandbox: String,
        /// Answered when nothing is applied any more.
        reply: oneshot::Sender<PodResult>,
    },
    /// Ask whether a pod is captured.
    Check(Key, oneshot::Sender<PodResult>),
    /// Report all pods.
    Report(oneshot::Sender<Vec<PodReport>>),
    /// All sandboxes of the runtime. The answer is the number of pods that are released.
    Collect(HashSet<String>, oneshot::Sender<usize>),
    /// Release all pods and refuse new ones.
    Leave(oneshot::Sender<Result<(), CutoverError>>),
    /// The namespace of a pod changed.
    Changed(Key, NetnsCookie),
    /// The worker is done with a pod.
    Done(Key, Box<JobOutcome>),
    /// An attempt to cut a pod over has ended, or it is back.
    CutoverEnded(Key, Box<CutoverAttempt>),
    /// A probe of a pod has ended.
    Probed(Key, NetnsCookie, Box<ProbeResult>),
    /// The applied pods were compared with the maps.
    Resynced(Box<ResyncResult>),
}

/// How a job ended.
pub enum JobOutcome {
    /// The result of a capture.
    Captured(Result<Captured, CaptureError>),
    /// The result of a release.
    Released(Result<(), CaptureError>),
    /// Whether the namespace of a pod exists to which nothing leads any more.
    Alive(Result<bool, CaptureError>),
}
