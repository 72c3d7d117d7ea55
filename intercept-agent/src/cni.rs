//! The CNI plugin: it asks the daemon to capture a pod, or to release it.
//!
//! It implements versions 0.3.0 to 1.1.0 of the specification. The daemon does the work, because it also keeps it up to
//! date.
//!
//! The plugin is chained after those that create the pod's network, or is a network of its own that Multus adds to a
//! pod (`standalone`), without an interface or address.

mod chain;
mod config;
pub mod install;

use std::{
    collections::BTreeMap,
    io::{self, Read as _},
    net::IpAddr,
    path::{Path, PathBuf},
};

use serde_json::{Value, json};

pub use config::{PLUGIN, PluginConfig};

use crate::daemon::{
    protocol::{Add, DaemonRequest, Refusal, Response, SandboxInfo, Select},
    socket,
};

/// The supported versions, oldest first.
pub const VERSIONS: [&str; 5] = ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];
/// More than any configuration has. Kubernetes allows 256 KiB of annotations.
const MAX_STDIN: u64 = 4 << 20;

/// An error in the specification's format. The specification defines the codes below 100.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CniError {
    /// The code.
    pub code: u32,
    /// The operation, and what to do.
    pub msg: String,
    /// The causes.
    pub details: String,
}

impl CniError {
    const VERSION: u32 = 1;
    const ENVIRONMENT: u32 = 4;
    const IO: u32 = 5;
    const DECODE: u32 = 6;
    const CONFIG: u32 = 7;
    const TRY_AGAIN: u32 = 11;
    const NOT_AVAILABLE: u32 = 50;
    const NOT_CAPTURED: u32 = 100;

    fn new(code: u32, msg: impl Into<String>, details: impl ToString) -> Self {
        Self { code, msg: msg.into(), details: details.to_string() }
    }

    /// Formats the error as JSON.
    pub fn json(&self, version: &str) -> Value {
        json!({ "cniVersion": version, "code": self.code, "msg": self.msg, "details": self.details })
    }
}

/// The input of a call by the runtime.
#[derive(Clone, Debug, Default)]
pub struct Call {
    /// The variables whose names start with `CNI_`.
    pub environment: BTreeMap<String, String>,
    /// Standard input.
    pub stdin: Vec<u8>,
}

/// The output: a result or an error.
pub type Printed = Result<Option<Value>, Value>;

impl Call {
    /// Reads the input of this process.
    pub fn read() -> io::Result<Self> {
        let environment = std::env::vars_os()
            .filter_map(|(name, value)| {
                Some((name.into_string().ok()?, value.to_string_lossy().into_owned()))
            })
            .filter(|(name, _)| name.starts_with("CNI_"))
            .collect();
        let mut stdin = Vec::new();
        io::stdin().take(MAX_STDIN + 1).read_to_end(&mut stdin)?;
        Ok(Self { environment, stdin })
    }

    /// Executes the command.
    pub fn perform(&self) -> Printed {
        let newest = VERSIONS[VERSIONS.len() - 1];
        if u64::try_from(self.stdin.len()).is_ok_and(|length| length > MAX_STDIN) {
            let msg = format!("reading the configuration: it is longer than {MAX_STDIN} bytes");
            return Err(CniError::new(CniError::DECODE, msg, "").json(newest));
        }
        let config = match PluginConfig::read(&self.stdin) {
            Ok(config) => config,
            // VERSION may come without a configuration.
            Err(_) if self.command() == "VERSION" => PluginConfig::default(),
            Err(error) => {
                return Err(CniError::new(CniError::DECODE, "reading the configuration", error).json(newest));
            }
        };
        let version = config.cni_version.clone().unwrap_or_else(|| "0.2.0".to_owned());
        self.dispatch(&config, &version).map_err(|error| error.json(&version))
    }

    fn command(&self) -> &str {
        self.environment.get("CNI_COMMAND").map_or("", String::as_str)
    }

    fn dispatch(&self, config: &PluginConfig, version: &str) -> Result<Option<Value>, CniError> {
        if self.command() == "VERSION" {
            return Ok(Some(json!({ "cniVersion": version, "supportedVersions": VERSIONS })));
        }
        if !VERSIONS.contains(&version) {
            let msg = format!(
                "CNI version {version} is not supported: set cniVersion to one of {}",
                VERSIONS.join(", ")
            );
            return Err(CniError::new(CniError::VERSION, msg, ""));
        }
        match self.command() {
            "ADD" => self.add(config, version).map(Some),
            "DEL" => self.delete(config).map(|()| None),
            "CHECK" => self.check(config).map(|()| None),
            "STATUS" => status(config).map(|()| None),
            "GC" => collect(config).map(|()| None),
            other => Err(CniError::new(
                CniError::ENVIRONMENT,
                format!("CNI_COMMAND is {other:?}: ADD, DEL, CHECK, STATUS, GC or VERSION"),
                "",
            )),
        }
    }

    fn required(&self, name: &'static str) -> Result<&str, CniError> {
        let value = self.environment.get(name).map(String::as_str).filter(|value| !value.is_empty());
        value.ok_or_else(|| CniError::new(CniError::ENVIRONMENT, format!("{name} is not set"), ""))
    }

    fn sandbox(&self) -> Result<SandboxInfo, CniError> {
        let sandbox = self.required("CNI_CONTAINERID")?.to_owned();
        let args = self.environment.get("CNI_ARGS").map_or("", String::as_str);
        let arg = |name: &str| {
            let pairs = args.split(';').filter_map(|pair| pair.split_once('='));
            pairs
                .filter(|(key, _)| *key == name)
                .map(|(_, value)| value.to_owned())
                .find(|value| !value.is_empty())
        };
        Ok(SandboxInfo {
            sandbox,
            uid: arg("K8S_POD_UID"),
            namespace: arg("K8S_POD_NAMESPACE").unwrap_or_default(),
            name: arg("K8S_POD_NAME").unwrap_or_default(),
        })
    }

    fn add(&self, config: &PluginConfig, version: &str) -> Result<Value, CniError> {
        let netns = PathBuf::from(self.required("CNI_NETNS")?);
        self.required("CNI_IFNAME")?;
        let previous = match (&config.previous, config.standalone) {
            (Some(previous), _) => previous.clone(),
            (None, true) => json!({ "cniVersion": version }),
            (None, false) => {
                let msg = "there is no prevResult: this plugin must follow one that creates the pod's network; put it last \
                           in the plugins of a conflist (`intercept-agent cni install` does), or set `standalone` to \
                           true in a network of Multus";
                return Err(CniError::new(CniError::CONFIG, msg, ""));
            }
        };
        let pod = self.sandbox()?;
        let namespace = pod.namespace.clone();
        let request = DaemonRequest::Add(Box::new(Add {
            pod,
            netns,
            cgroup: config.runtime.cgroup_path.clone(),
            annotations: config.runtime.annotations.as_ref().map(config::relevant),
            addresses: addresses(&previous),
            select: config.select,
            given: config.given(),
        }));
        match socket::request(&config.socket, &request) {
            Ok(Response::Done(_)) => Ok(previous),
            Ok(other) => Err(refused("capturing the pod", &other)),
            // Injected pods have an annotation, and others start without the daemon. If the runtime does not pass
            // annotations on, all pods must start. The daemon captures the injected ones when it learns of them from
            // the API.
            Err(_) if ignores(config, &namespace) => Ok(previous),
            Err(error) => Err(unreachable(&config.socket, &error)),
        }
    }

    fn delete(&self, config: &PluginConfig) -> Result<(), CniError> {
        let sandbox = self.sandbox()?;
        match socket::request(&config.socket, &DaemonRequest::Delete(sandbox)) {
            // Without a daemon the next one releases it, because cgroup and namespace will be gone.
            Ok(Response::Done(_)) | Err(_) => Ok(()),
            Ok(other) => Err(refused("releasing the pod", &other)),
        }
    }

    fn check(&self, config: &PluginConfig) -> Result<(), CniError> {
        self.required("CNI_NETNS")?;
        let sandbox = self.sandbox()?;
        match socket::request(&config.socket, &DaemonRequest::Check(sandbox)) {
            Ok(Response::Done(_)) => Ok(()),
            Ok(other) => Err(refused("checking the pod", &other)),
            Err(error) => Err(unreachable(&config.socket, &error)),
        }
    }
}

/// Returns the pod's addresses in the order of the preceding plugins' results.
fn addresses(previous: &Value) -> Vec<IpAddr> {
    let ips = previous["ips"].as_array().into_iter().flatten();
    let written = ips.filter_map(|ip| ip["address"].as_str());
    written.filter_map(|address| address.split('/').next()?.parse().ok()).collect()
}

/// Whether a pod that starts now would be captured.
fn status(config: &PluginConfig) -> Result<(), CniError> {
    let not_available = |msg: String, details: &str| CniError::new(CniError::NOT_AVAILABLE, msg, details);
    match socket::request(&config.socket, &DaemonRequest::Ready) {
        Ok(Response::Done(_)) => Ok(()),
        Ok(Response::Failed(problem)) => {
            Err(not_available(format!("pods cannot be captured yet: {}", problem.text), &problem.cause))
        }
        Ok(other) => Err(refused("asking whether pods can be captured", &other)),
        Err(error) => {
            let CniError { msg, details, .. } = unreachable(&config.socket, &error);
            Err(not_available(msg, &details))
        }
    }
}

/// Releases attachments that the runtime does not list any more.
fn collect(config: &PluginConfig) -> Result<(), CniError> {
    // For a network of Multus, the list contains only the pods that requested it.
    let Some(valid) = config.valid.as_ref().filter(|_| !config.standalone) else { return Ok(()) };
    let valid = valid.iter().map(|attachment| attachment.container_id.clone()).collect();
    match socket::request(&config.socket, &DaemonRequest::Collect { valid }) {
        // Without a daemon the next one releases them.
        Ok(Response::Done(_)) | Err(_) => Ok(()),
        Ok(other) => Err(refused("releasing pods that are gone", &other)),
    }
}

/// Whether a pod of this namespace is not to be captured, as far as that is known without the daemon.
fn ignores(config: &PluginConfig, namespace: &str) -> bool {
    let annotations = config.runtime.annotations.as_ref();
    let is_plain = annotations.is_none_or(|annotations| !config.mesh.has_injected(annotations));
    config.select == Select::Sidecar && (is_plain || config.exclude_namespaces.contains(namespace))
}

fn refused(what: &str, response: &Response) -> CniError {
    match response {
        Response::Failed(problem) if problem.is(Refusal::Ending) => {
            CniError::new(CniError::TRY_AGAIN, format!("{what}: the daemon is shutting down"), &problem.text)
        }
        Response::Failed(problem) => {
            CniError::new(CniError::NOT_CAPTURED, format!("{what}: {}", problem.text), &problem.cause)
        }
        other => CniError::new(
            CniError::IO,
            format!("{what}: the daemon's answer does not match the request"),
            format!("{other:?}"),
        ),
    }
}

fn unreachable(path: &Path, error: &io::Error) -> CniError {
    let msg = format!(
        "asking the daemon on {}: check that `intercept-agent daemon` is running on this node",
        path.display()
    );
    CniError::new(CniError::TRY_AGAIN, msg, error)
}

#[cfg(test)]
mod tests;
