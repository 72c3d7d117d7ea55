//! Ids of pods, policies and slots: those of the maps as `intercept-common` has them, their form in JSON, and the UID of a
//! pod.

use std::fmt;

pub use intercept_common::{NetnsCookie, PolicyId, Slot};
use serde::{Deserialize, Serialize};

/// UID of a pod, as Kubernetes and the container runtime know it. Without Kubernetes, the id of the pod's sandbox.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct PodUid(pub String);

impl fmt::Display for PodUid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// [`NetnsCookie`] as a number in JSON: `#[serde(with = "CookieNumber")]`.
#[derive(Serialize, Deserialize)]
#[serde(remote = "NetnsCookie")]
pub struct CookieNumber(u64);

/// [`PolicyId`] as a number in JSON.
#[derive(Serialize, Deserialize)]
#[serde(remote = "PolicyId")]
pub struct PolicyNumber(u32);

/// [`Slot`] as a number in JSON.
#[derive(Serialize, Deserialize)]
#[serde(remote = "Slot")]
pub(crate) struct SlotNumber(u32);
