//! A node whose daemon watches an API server with recorded answers.

use anyhow::Result;
use intercept_agent::facade::daemon::PodReport;
use tempfile::TempDir;

use super::Api;
use crate::{agent::Agent, daemon::Daemon, testbed::Cgroup};

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
        let api = Api::start(Vec::new());
        let folder = tempfile::tempdir()?;
        let kubeconfig = folder.path().join("kubeconfig");
        api.write_kubeconfig(&kubeconfig)?;
        let kubelet = Cgroup::new("kubelet")?;
        let (root, kubeconfig) = (kubelet.path().display().to_string(), kubeconfig.display().to_string());
        let arguments = [&["--node-name", "node-1", "--cgroup-root", &root], more].concat();
        let daemon = Daemon::start_with(agent, &arguments, &[("KUBECONFIG", &kubeconfig)])?;
        daemon.wait("it watches", |_| !api.shared().watchers.is_empty())?;
        Ok(Self { agent, api, kubelet, daemon, _kubeconfig: folder })
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
