//! A node whose daemon watches an API server with recorded answers.

use anyhow::Result;
use intercept_agent::facade::daemon::PodReport;
use serde_json::Value;
use tempfile::TempDir;

use super::Api;
use crate::{agent::Agent, daemon::Daemon, testbed::Cgroup};

/// Arguments with which a daemon watches the API.
const OWN: [&str; 2] = ["--node-name", "node-1"];

/// An API, and a daemon that watches it.
#[derive(Debug)]
pub struct WatchedApi<'a> {
    /// The API.
    pub api: Api,
    /// The daemon.
    pub daemon: Daemon<'a>,
    _kubeconfig: TempDir,
}

impl<'a> WatchedApi<'a> {
    /// Starts an API with these pods, and a daemon with these arguments and variables beside its own. Waits until it watches.
    pub fn start(
        agent: &'a Agent,
        pods: Vec<Value>,
        arguments: &[&str],
        variables: &[(&str, &str)],
    ) -> Result<Self> {
        let api = Api::start(pods);
        let folder = tempfile::tempdir()?;
        let kubeconfig = folder.path().join("kubeconfig");
        api.write_kubeconfig(&kubeconfig)?;
        let kubeconfig = kubeconfig.display().to_string();
        let arguments = [&OWN, arguments].concat();
        let variables = [&[("KUBECONFIG", kubeconfig.as_str())], variables].concat();
        let daemon = Daemon::start_with(agent, &arguments, &variables)?;
        let watched = Self { api, daemon, _kubeconfig: folder };
        watched.await_watches()?;
        Ok(watched)
    }

    /// Kills the daemon if it runs, and starts one with these arguments beside its own. Waits until it watches.
    ///
    /// # Errors
    /// If it does not start.
    pub fn restart_with(&mut self, arguments: &[&str]) -> Result<()> {
        if self.daemon.pid().is_some() {
            self.daemon.kill()?;
        }
        self.api.cut();
        self.daemon.set_arguments(&[&OWN, arguments].concat());
        self.daemon.restart()?;
        self.await_watches()
    }

    /// Waits until the daemon watches pods and namespaces.
    ///
    /// # Errors
    /// If it does not in time.
    pub fn await_watches(&self) -> Result<()> {
        self.daemon.wait("it watches", |_| {
            let shared = self.api.shared();
            !shared.watchers.is_empty() && !shared.namespace_watchers.is_empty()
        })
    }
}

/// A node with an API, cgroups as of a kubelet, and the daemon.
#[derive(Debug)]
pub struct ApiNode<'a> {
    /// The agent.
    pub agent: &'a Agent,
    /// The API.
    pub api: Api,
    /// The cgroup below which the kubelet makes those of pods.
    pub kubelet: Cgroup,
    /// The daemon, which watches the API.
    pub daemon: Daemon<'a>,
    _kubeconfig: TempDir,
}

impl<'a> ApiNode<'a> {
    /// Starts a daemon with these arguments beside its own.
    pub fn new(agent: &'a Agent, more: &[&str]) -> Result<Self> {
        let kubelet = Cgroup::new("kubelet")?;
        let root = kubelet.path().display().to_string();
        let arguments = [&["--cgroup-root", &root], more].concat();
        let WatchedApi { api, daemon, _kubeconfig } = WatchedApi::start(agent, Vec::new(), &arguments, &[])?;
        Ok(Self { agent, api, kubelet, daemon, _kubeconfig })
    }

    /// What the daemon knows of the pod with this UID.
    pub fn report(&self, uid: &str) -> Option<PodReport> {
        let key = format!("pod/{uid}");
        self.daemon.reports().expect("reports").into_iter().find(|report| report.pod == key)
    }

    /// Waits until a condition holds.
    pub fn wait(&self, what: &str, so: impl Fn() -> bool) {
        self.daemon.wait(what, |_| so()).unwrap_or_else(|error| panic!("{error:#}"));
    }
}
