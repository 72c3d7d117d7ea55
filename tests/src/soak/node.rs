//! A node: the agent, its daemon, which is killed now and then, an API and a kubelet's cgroups.

use std::{
    fs,
    io::ErrorKind,
    net::{SocketAddr, TcpStream},
    path::{Path, PathBuf},
    sync::{
        PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::{
    agent::Agent,
    api::{Api, pod},
    daemon::{Daemon, free_address},
    plugin::{CniSandbox, RuntimePlugin},
    testbed::{Cgroup, Sandbox, name},
};

/// How many redirected connections the node remembers; a pod may have a quarter. Few, so that a pod soon has its share.
pub const MAX_CONNECTIONS: u32 = 2000;
/// The annotation that changes an API pod's options.
pub const EXCLUDED: &str = "traffic.sidecar.istio.io/excludeOutboundPorts";
/// How long the daemon may take for what is not measured.
const PATIENCE: Duration = Duration::from_secs(30);

/// A node.
#[derive(Debug)]
pub struct SoakNode<'a> {
    agent: &'a Agent,
    daemon: RwLock<Daemon<'a>>,
    /// Odd while the daemon is gone or has not yet taken over.
    absences: AtomicU64,
    plugin: RuntimePlugin,
    metrics: SocketAddr,
    api: Api,
    kubelet: Cgroup,
    _kubeconfig: TempDir,
}

/// A pod that the API tells of, in the cgroup that a kubelet would make.
#[derive(Debug)]
pub struct ApiPod {
    object: Value,
    uid: String,
    cgroup: PathBuf,
}

impl<'a> SoakNode<'a> {
    /// A node whose daemon runs.
    pub fn new(agent: &'a Agent) -> Result<Self> {
        let api = Api::start(Vec::new());
        let folder = name::scratch("soak")?;
        let kubeconfig = folder.path().join("kubeconfig");
        api.write_kubeconfig(&kubeconfig)?;
        let kubelet = Cgroup::new("kubelet")?;
        let metrics = free_address();
        let arguments = [
            "--node-name",
            "node-1",
            "--cgroup-root",
            kubelet.path().to_str().context("a path of UTF-8")?,
            "--ipv6",
            "always",
            "--metrics-address",
            &metrics.to_string(),
            "--max-connections",
            &MAX_CONNECTIONS.to_string(),
            "--log",
            // Hostile pods have it say much.
            "off",
        ];
        let variables = [("KUBECONFIG", kubeconfig.to_str().context("a path of UTF-8")?)];
        let daemon = Daemon::start_with(agent, &arguments, &variables)?;
        let plugin = RuntimePlugin::new(agent, &daemon);
        let node = Self {
            agent,
            daemon: RwLock::new(daemon),
            absences: AtomicU64::new(0),
            plugin,
            metrics,
            api,
            kubelet,
            _kubeconfig: folder,
        };
        node.watches()?;
        Ok(node)
    }

    /// The agent.
    pub fn agent(&self) -> &'a Agent {
        self.agent
    }

    /// The daemon, which runs as long as this is held.
    pub fn daemon(&self) -> RwLockReadGuard<'_, Daemon<'a>> {
        self.daemon.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where the daemon answers probes.
    pub fn metrics(&self) -> SocketAddr {
        self.metrics
    }

    /// A number that changes whenever the daemon goes or comes.
    pub fn absences(&self) -> u64 {
        self.absences.load(Ordering::SeqCst)
    }

    /// Kills the daemon, and starts another a little later.
    pub fn kill_daemon(&self, absent: Duration) -> Result<()> {
        self.replace_daemon(Daemon::kill, absent)
    }

    /// Ends the daemon as the kubelet does, and starts another a little later.
    pub fn terminate_daemon(&self, absent: Duration) -> Result<()> {
        self.replace_daemon(|daemon| daemon.terminate().map(drop), absent)
    }

    fn replace_daemon(
        &self,
        end: impl FnOnce(&mut Daemon<'a>) -> Result<()>,
        absent: Duration,
    ) -> Result<()> {
        let mut daemon = self.exclusively();
        self.absences.fetch_add(1, Ordering::SeqCst);
        end(&mut daemon)?;
        self.api.cut();
        std::thread::sleep(absent);
        daemon.restart()?;
        self.watches()?;
        self.absences.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    /// Kills the daemon for good.
    pub fn end_daemon(&self) -> Result<()> {
        self.exclusively().kill()
    }

    /// Cuts the daemon off from the API.
    pub fn cut_api(&self) -> Result<()> {
        let _daemon = self.exclusively();
        self.api.cut();
        self.watches()
    }

    fn exclusively(&self) -> RwLockWriteGuard<'_, Daemon<'a>> {
        self.daemon.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn watches(&self) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        while self.api.shared().watchers.is_empty() {
            ensure!(Instant::now() < deadline, "the daemon does not watch the API");
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// A pod that the API does not tell of yet.
    pub fn api_pod(&self, name: &str, uid: String) -> Result<ApiPod> {
        let proxy = json!({ "name": "istio-proxy", "args": ["proxy", "sidecar"] });
        let spec = json!({ "containers": [{ "name": "app" }, proxy] });
        let annotations = json!({ "sidecar.istio.io/interceptionMode": "REDIRECT" });
        let object = pod(name, &uid, &spec, &annotations);
        let cgroup = self.kubelet.path().join(format!("kubepods/burstable/pod{uid}"));
        fs::create_dir_all(&cgroup).with_context(|| format!("making {}", cgroup.display()))?;
        Ok(ApiPod { object, uid, cgroup })
    }

    /// Has the API tell of a pod: ADDED, MODIFIED or DELETED. The daemon learns it from the watch or from the next list.
    pub fn tell(&self, kind: &str, pod: &ApiPod) {
        let _daemon = self.daemon();
        let mut shared = self.api.shared();
        shared.pods.retain(|other| other["metadata"]["uid"] != pod.uid.as_str());
        if kind != "DELETED" {
            shared.pods.push(pod.object.clone());
        }
        drop(shared);
        self.api.event(kind, pod.object.clone());
    }

    /// Calls the plugin as a runtime does; the inner error is what it prints.
    pub fn call(
        &self,
        command: &str,
        pod: &ApiPod,
        place: &Sandbox,
        address: &str,
    ) -> Result<Result<(), String>> {
        let sandbox = CniSandbox { object: &pod.object, uid: &pod.uid, netns: place.netns.path(), address };
        self.plugin.call(command, &sandbox)
    }

    /// Calls the plugin until it succeeds, as a runtime does; fails with what it says while the daemon runs.
    pub fn call_until_done(
        &self,
        command: &str,
        pod: &ApiPod,
        place: &Sandbox,
    ) -> Result<Result<(), String>> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let before = self.absences();
            let answer = self.call(command, pod, place, "10.66.0.2/24")?;
            let undisturbed = before.is_multiple_of(2) && self.absences() == before;
            if answer.is_ok() || undisturbed || Instant::now() > deadline {
                return Ok(answer);
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Whether a pod is captured with a port among its options.
    pub fn mentions(&self, place: &Sandbox, port: &str) -> Result<bool> {
        let pods = self.agent.pods()?;
        let pod = pods.iter().find(|pod| pod.cgroup == place.cgroup.path());
        Ok(pod.is_some_and(|pod| pod.arguments.iter().any(|argument| argument.contains(port))))
    }

    /// Opens connections to the probes' address.
    pub fn probe_connections(&self, count: u32) -> Vec<TcpStream> {
        (0..count).filter_map(|_| TcpStream::connect(self.metrics).ok()).collect()
    }

    /// The daemon's last state of all pods, to be shown with a finding.
    pub fn report_of(&self, key: &str) -> String {
        match self.daemon().reports() {
            Ok(reports) => format!("{:?}", reports.into_iter().find(|report| report.pod == key)),
            Err(error) => format!("{error:#}"),
        }
    }

    /// Where the kubelet's cgroups are.
    pub fn kubelet(&self) -> &Path {
        self.kubelet.path()
    }
}

impl ApiPod {
    /// Its UID.
    pub fn uid(&self) -> &str {
        &self.uid
    }

    /// Its cgroup.
    pub fn cgroup(&self) -> &Path {
        &self.cgroup
    }

    /// Sets or changes an annotation.
    pub fn annotate(&mut self, annotation: &str, value: &str) {
        self.object["metadata"]["annotations"][annotation] = json!(value);
    }

    /// Changes any other field of the metadata.
    pub fn set_metadata(&mut self, field: &str, value: Value) {
        self.object["metadata"][field] = value;
    }

    /// Moves processes into its cgroup.
    pub fn take(&self, processes: &[u32]) -> Result<()> {
        for pid in processes {
            fs::write(self.cgroup.join("cgroup.procs"), pid.to_string())
                .with_context(|| format!("moving {pid} to {}", self.cgroup.display()))?;
        }
        Ok(())
    }
}

impl Drop for ApiPod {
    fn drop(&mut self) {
        drop(fs::write(self.cgroup.join("cgroup.kill"), "1"));
        let deadline = Instant::now() + Duration::from_secs(5);
        // Busy until the last process has been reaped.
        while fs::remove_dir(&self.cgroup).is_err_and(|error| error.kind() == ErrorKind::ResourceBusy) {
            if Instant::now() > deadline {
                eprintln!("{} cannot be removed", self.cgroup.display());
                return;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}
