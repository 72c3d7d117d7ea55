//! The plugin's configuration, as the runtime passes it.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
};

use serde::{Deserialize, Deserializer};
use serde_json::Value;

use crate::daemon::{
    desired::CaptureArgs,
    mesh::Mesh,
    protocol::{DEFAULT_SOCKET, Select},
    sidecar,
};

/// The plugin's type, which is also the name of its binary.
pub const PLUGIN: &str = "intercept-cni";

/// The configuration. Unknown keys are ignored.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(default)]
pub struct PluginConfig {
    /// CNI version.
    #[serde(rename = "cniVersion")]
    pub cni_version: Option<String>,
    /// Path of the daemon's socket.
    pub socket: PathBuf,
    /// Which pods are captured.
    pub select: Select,
    /// The mesh by whose annotation the plugin recognizes pods with a sidecar while the daemon does not answer.
    pub mesh: Mesh,
    /// Namespaces whose pods start without the daemon.
    #[serde(rename = "excludeNamespaces")]
    pub exclude_namespaces: BTreeSet<String>,
    /// Arguments for every pod, as for `attach`.
    pub arguments: Vec<String>,
    /// Environment variables for every pod, as for `attach`.
    pub environment: BTreeMap<String, String>,
    /// Whether it is a network of its own, without preceding plugins.
    pub standalone: bool,
    /// For GC: all attachments that are still valid.
    #[serde(rename = "cni.dev/valid-attachments")]
    pub valid: Option<Vec<Attachment>>,
    /// The result of the preceding plugins.
    #[serde(rename = "prevResult")]
    pub previous: Option<Value>,
    /// What the runtime adds for capabilities.
    #[serde(rename = "runtimeConfig")]
    pub runtime: RuntimeConfig,
}

/// An attachment of a sandbox to a network.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct Attachment {
    /// Id of the sandbox.
    #[serde(rename = "containerID")]
    pub container_id: String,
}

/// Values for the declared capabilities.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct RuntimeConfig {
    /// The pod's annotations. `None` if the runtime does not pass them.
    #[serde(rename = "io.kubernetes.cri.pod-annotations", deserialize_with = "passed")]
    pub annotations: Option<BTreeMap<String, String>>,
    /// Path of the pod's cgroup.
    #[serde(rename = "cgroupPath")]
    pub cgroup_path: Option<String>,
}

/// Returns the annotations that the daemon reads. A pod may have 256 KiB of others.
pub(super) fn relevant(annotations: &BTreeMap<String, String>) -> BTreeMap<String, String> {
    let kept = annotations.iter().filter(|(name, _)| sidecar::reads(name));
    kept.map(|(name, value)| (name.clone(), value.clone())).collect()
}

/// containerd passes `null` for a pod without annotations.
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
            mesh: Mesh::default(),
            exclude_namespaces: BTreeSet::new(),
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
    /// Parses standard input, which must be an object: a list would pass as a configuration without names.
    pub fn read(text: &[u8]) -> Result<Self, serde_json::Error> {
        let fields: serde_json::Map<String, Value> = serde_json::from_slice(text)?;
        serde_json::from_value(Value::Object(fields))
    }

    /// Returns the arguments for every pod.
    pub fn given(&self) -> CaptureArgs {
        CaptureArgs { arguments: self.arguments.clone(), environment: self.environment.clone() }
    }
}
