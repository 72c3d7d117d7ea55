//! What the loop is told.

use std::collections::HashSet;

use tokio::sync::oneshot;

use super::{Answer, Report};
use crate::{
    daemon::{
        capture::{CaptureError, Captured},
        wanted::{Key, Wanted},
    },
    node::NodeError,
    store::Record,
};

/// Where pods are wanted from.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub enum Source {
    /// The folder.
    Folder,
    /// The Kubernetes API.
    Kubernetes,
}

/// What happened.
pub enum Message {
    /// A source wants a pod, or wants it otherwise.
    Want(Box<Wanted>),
    /// A source does not want it any more.
    Unwanted(Key),
    /// The API knows the pod no more.
    Deleted(Key),
    /// What a source says of a pod cannot be understood. What is in force stays.
    Refused {
        /// The pod.
        key: Key,
        /// A name for people.
        name: String,
        /// What is wrong.
        problem: String,
    },
    /// A source says that the pod is not to be captured.
    LeftAlone {
        /// The pod.
        key: Key,
        /// A name for people.
        name: String,
        /// Why: one word, for metrics.
        why: &'static str,
    },
    /// A source has told of all it has: what it had wanted before and is not among these is gone.
    Synced(Source, HashSet<Key>),
    /// Put a pod in force and say so.
    Add(Box<Wanted>, oneshot::Sender<Answer>),
    /// The sandbox of a pod is going away.
    Delete {
        /// The pod.
        key: Key,
        /// Its sandbox: a pod may have another one by now.
        sandbox: String,
        /// Told when nothing is in force any more.
        reply: oneshot::Sender<Answer>,
    },
    /// Whether a pod is in force.
    Check(Key, oneshot::Sender<Answer>),
    /// What of a pod is known.
    Report(oneshot::Sender<Vec<Report>>),
    /// The runtime has these sandboxes and no others; told how many pods are released for that.
    Collect(HashSet<String>, oneshot::Sender<usize>),
    /// Take everything away, and stay away.
    Leave(oneshot::Sender<Result<(), NodeError>>),
    /// The namespace of a pod changed.
    Changed(Key, u64),
    /// The worker is done with a pod.
    Done(Key, Box<Outcome>),
    /// What is in force, and what of it was not known.
    Audited(Vec<u64>, Vec<Record>),
}

/// How a job ended.
pub enum Outcome {
    /// It is in force.
    Captured(Result<Captured, CaptureError>),
    /// It is out of force.
    Released(Result<(), CaptureError>),
    /// Nothing leads to its namespace any more: whether it is there all the same.
    Alive(Result<bool, CaptureError>),
}
