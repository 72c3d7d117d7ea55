//! The protocol of the daemon's socket. Each connection carries one request and one answer, both a line of JSON.

use std::{collections::BTreeMap, net::IpAddr, path::PathBuf, time::Duration};

use serde::{Deserialize, Serialize};

use super::{
    desired::CaptureArgs,
    report::{PodFailure, PodReport},
};

/// Default path of the socket.
pub const DEFAULT_SOCKET: &str = "/run/intercept/agent.sock";
/// Most bytes of a request.
pub const MAX_LINE: u64 = 1 << 20;
/// Time limit for writing a request, and for the plugin to wait for the answer.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// A request.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "snake_case", deny_unknown_fields)]
pub enum DaemonRequest {
    /// Capture the pod of a sandbox. Answered once the capture is active.
    Add(Box<Add>),
    /// The sandbox is being removed.
    Delete(SandboxInfo),
    /// Whether the capture of the sandbox's pod is active and up to date.
    Check(SandboxInfo),
    /// Report all pods.
    Report,
    /// Whether a pod that starts now would be captured.
    Ready,
    /// Release the pods of all sandboxes except these.
    Collect {
        /// Ids of the sandboxes.
        valid: Vec<String>,
    },
    /// Stop installing the plugin.
    StopInstalling,
    /// Release all pods and refuse new ones.
    Leave,
}

/// A sandbox and its pod.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SandboxInfo {
    /// `CNI_CONTAINERID`.
    pub sandbox: String,
    /// The pod's UID; `None` outside Kubernetes.
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
    /// Returns the sandbox of the request.
    pub(super) fn sandbox(&self) -> Option<&SandboxInfo> {
        match self {
            Self::Add(add) => Some(&add.pod),
            Self::Delete(sandbox) | Self::Check(sandbox) => Some(sandbox),
            Self::Report | Self::Ready | Self::Collect { .. } | Self::StopInstalling | Self::Leave => None,
        }
    }
}

impl SandboxInfo {
    /// Whether the names can be printed in logs and metrics. Kubernetes allows no others.
    pub(super) fn is_printable(&self) -> bool {
        let names = [&self.sandbox, &self.namespace, &self.name];
        names.into_iter().chain(&self.uid).all(|name| !name.contains(char::is_control))
    }
}

/// The arguments of ADD.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Add {
    /// The sandbox.
    pub pod: SandboxInfo,
    /// `CNI_NETNS`.
    pub netns: PathBuf,
    /// The pod's cgroup, if the runtime passes it: a path from the root of the hierarchy, or the name of a systemd
    /// slice.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cgroup: Option<String>,
    /// The pod's annotations, if the runtime passes them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub annotations: Option<BTreeMap<String, String>>,
    /// The pod's addresses in the order of the network plugins.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub addresses: Vec<IpAddr>,
    /// Which pods are captured.
    #[serde(default)]
    pub select: Select,
    /// Arguments of the plugin's configuration, for every pod.
    #[serde(default)]
    pub given: CaptureArgs,
}

/// Which pods are captured through the plugin.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Select {
    /// Pods with a sidecar.
    #[default]
    Sidecar,
    /// Every pod, for nodes without Kubernetes.
    All,
}

/// Why the daemon refuses a request that it has not attempted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The request cannot be parsed.
    Request,
    /// The client is not root.
    Forbidden,
    /// A pod that starts now would not be captured.
    NotReady,
    /// The daemon is shutting down.
    Ending,
    /// The agent is being removed from the node.
    Leaving,
    /// Another sandbox was added for the pod.
    Superseded,
    /// The pod is not captured.
    Absent,
    /// The daemon failed.
    Internal,
}

impl Refusal {
    /// The word in answers, stable.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Request => "request",
            Self::Forbidden => "forbidden",
            Self::NotReady => "not_ready",
            Self::Ending => "ending",
            Self::Leaving => "leaving",
            Self::Superseded => "superseded",
            Self::Absent => "absent",
            Self::Internal => "internal",
        }
    }
}

/// An answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Response {
    /// Success, with one word for how.
    Done(String),
    /// Failure.
    Failed(PodFailure),
    /// The answer to [`DaemonRequest::Report`].
    Pods(Vec<PodReport>),
}
