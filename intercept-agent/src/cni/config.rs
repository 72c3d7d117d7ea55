//! The plugin's part of a conflist, with what the runtime adds to it.

use std::{collections::BTreeMap, path::PathBuf};

use serde::{Deserialize, Deserializer};
use serde_json::Value;

use crate::daemon::{
    desired::CaptureArgs,
    protocol::{DEFAULT_SOCKET, Select},
};

/// The plugin's type, which is the name of its binary.
pub const PLUGIN: &str = "intercept-cni";

/// The configuration. What other plugins read in theirs is not looked at.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(default)]
pub struct PluginConfig {
    /// Version of the specification.
    #[serde(rename = "cniVersion")]
    pub cni_version: Option<String>,
    /// The daemon's socket.
    pub socket: PathBuf,
    /// Which pods are captured.
    pub select: Select,
    /// Options for every pod, as `attach` takes them.
    pub arguments: Vec<String>,
    /// Variables for every pod, as `attach` reads them.
    pub environment: BTreeMap<String, String>,
    /// This is a network of its own, without plugins before it.
    pub standalone: bool,
    /// GC: what is attached, and nothing else.
    #[serde(rename = "cni.dev/valid-attachments")]
    pub valid: Option<Vec<Attachment>>,
    /// What the plugins before gave.
    #[serde(rename = "prevResult")]
    pub previous: Option<Value>,
    /// What the runtime adds for the capabilities.
    #[serde(rename = "runtimeConfig")]
    pub runtime: RuntimeConfig,
}

/// An attachment of a sandbox to a network.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct Attachment {
    /// The sandbox.
    #[serde(rename = "containerID")]
    pub container_id: String,
}

/// What the runtime adds.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct RuntimeConfig {
    /// The pod's annotations; none if the runtime does not pass them.
    #[serde(rename = "io.kubernetes.cri.pod-annotations", deserialize_with = "passed")]
    pub annotations: Option<BTreeMap<String, String>>,
    /// The pod's cgroup.
    #[serde(rename = "cgroupPath")]
    pub cgroup_path: Option<String>,
}

/// Whose annotations say how a pod is captured.
const DOMAINS: [&str; 5] = ["istio.io", "linkerd.io", "kuma.io", "consul.hashicorp.com", "intercept"];

/// The annotations that the daemon reads. A pod may have 256 KiB of others, which are none of its business.
pub(super) fn relevant(annotations: &BTreeMap<String, String>) -> BTreeMap<String, String> {
    let is_read = |name: &str| {
        let domain = name.split_once('/').map_or("", |(domain, _)| domain);
        DOMAINS
            .iter()
            .any(|read| domain.strip_suffix(read).is_some_and(|sub| sub.is_empty() || sub.ends_with('.')))
    };
    let kept = annotations.iter().filter(|(name, _)| is_read(name));
    kept.map(|(name, value)| (name.clone(), value.clone())).collect()
}

/// A pod without annotations has `null` from containerd, whose empty maps have no JSON of their own.
fn passed<'de, D>(input: D) -> Result<Option<BTreeMap<String, String>>, D::Error>
where
    D: Deserializer<'de>,
{
    Option::deserialize(input).map(|annotations| Some(annotations.unwrap_or_default()))
}

impl Default for PluginConfig {
    fn default() -> Self {
        Self {
            cni_version: None,
            socket: PathBuf::from(DEFAULT_SOCKET),
            select: Select::default(),
            arguments: Vec::new(),
            environment: BTreeMap::new(),
            standalone: false,
            valid: None,
            previous: None,
            runtime: RuntimeConfig::default(),
        }
    }
}

impl PluginConfig {
    /// Read what came on standard input.
    pub fn read(text: &[u8]) -> Result<Self, serde_json::Error> {
        serde_json::from_slice(text)
    }

    /// The options for every pod.
    pub fn given(&self) -> CaptureArgs {
        CaptureArgs { arguments: self.arguments.clone(), environment: self.environment.clone() }
    }
}
