//! What is said on the daemon's socket: one request and one answer a connection, each a line of JSON.

use std::{collections::BTreeMap, net::IpAddr, path::PathBuf, time::Duration};

use serde::{Deserialize, Serialize};

use super::{
    desired::CaptureArgs,
    reconcile::{PodFailure, PodReport},
};

/// Where the socket is unless told otherwise.
pub const DEFAULT_SOCKET: &str = "/run/intercept/agent.sock";
/// More than any request has.
pub const MAX_LINE: u64 = 1 << 20;
/// How long a request may take to be written, and how long the plugin waits for the answer.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// A request.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "snake_case", deny_unknown_fields)]
pub enum DaemonRequest {
    /// Put the pod of a sandbox in force; answered once it is.
    Add(Box<Add>),
    /// The sandbox is going away.
    Delete(SandboxInfo),
    /// Whether the pod of the sandbox is in force as it should be.
    Check(SandboxInfo),
    /// What is known of every pod.
    Report,
    /// Whether a pod that is started now would be captured.
    Ready,
    /// These are all the sandboxes there are: release the pods of others.
    Collect {
        /// By id.
        valid: Vec<String>,
    },
    /// Do not put the plugin into the node's configuration again.
    StopInstalling,
    /// Take everything away, and stay away from then on.
    Leave,
}

/// A sandbox and the pod that it is of.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SandboxInfo {
    /// `CNI_CONTAINERID`.
    pub sandbox: String,
    /// The pod's UID; outside Kubernetes there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uid: Option<String>,
    /// The pod's namespace.
    #[serde(default)]
    pub namespace: String,
    /// The pod's name.
    #[serde(default)]
    pub name: String,
}

impl DaemonRequest {
    /// The sandbox that it is about.
    pub(super) fn sandbox(&self) -> Option<&SandboxInfo> {
        match self {
            Self::Add(add) => Some(&add.pod),
            Self::Delete(sandbox) | Self::Check(sandbox) => Some(sandbox),
            Self::Report | Self::Ready | Self::Collect { .. } | Self::StopInstalling | Self::Leave => None,
        }
    }
}

impl SandboxInfo {
    /// Whether the names may stand in logs and metrics. Kubernetes allows only such.
    pub(super) fn is_printable(&self) -> bool {
        let names = [&self.sandbox, &self.namespace, &self.name];
        names.into_iter().chain(&self.uid).all(|name| !name.contains(char::is_control))
    }
}

/// What ADD knows.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Add {
    /// Whose.
    pub pod: SandboxInfo,
    /// `CNI_NETNS`.
    pub netns: PathBuf,
    /// The pod's cgroup, where the runtime told the plugin; relative to the root of the hierarchy, or systemd's
    /// `slice` name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cgroup: Option<String>,
    /// The pod's annotations, where the runtime told the plugin.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub annotations: Option<BTreeMap<String, String>>,
    /// The pod's addresses, first the first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub addresses: Vec<IpAddr>,
    /// Which pods are captured.
    #[serde(default)]
    pub select: Select,
    /// Options of the plugin's configuration, for every pod.
    #[serde(default)]
    pub given: CaptureArgs,
}

/// Which pods the plugin has captured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Select {
    /// Those with a sidecar.
    #[default]
    Sidecar,
    /// Every pod; for nodes without Kubernetes.
    All,
}

/// The answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Response {
    /// Done; one word for how.
    Done(String),
    /// Not done.
    Failed(PodFailure),
    /// To [`DaemonRequest::Report`].
    Pods(Vec<PodReport>),
}
