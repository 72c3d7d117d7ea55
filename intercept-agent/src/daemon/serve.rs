//! Runs the daemon: sources, reconciler, socket and HTTP in a runtime on one thread, beside the worker's.

use std::{
    io,
    net::SocketAddr,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use axum::{Router, extract::State, http::StatusCode, routing::get};
use tokio::sync::{Mutex, mpsc::UnboundedSender, oneshot};

use super::{
    capture::CaptureError,
    cutover::Cutovers,
    desired::{CaptureArgs, CaptureArgsError},
    folder::{Folder, FolderError},
    http,
    kubernetes::{Kubernetes, KubernetesError},
    metrics::Metrics,
    placement::Placement,
    plugin::Installer,
    prove::ProofSettings,
    ready::Readiness,
    reconcile::{Message, Reconciler},
    report::PodReport,
    sidecar::Selection,
    socket::{Server, SocketError},
    source::{PodSource, SourceContext},
    worker::{Priority, Worker},
};
use crate::{acceleration::self_test, cgroup, cni::install::Plugin, ids::NetnsCookie, node::NodeError};

/// A worker that takes longer than this for one job is stuck, and so is a reconciler that does not check its pods.
const STUCK: Duration = Duration::from_secs(15);

/// The settings of the daemon.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Mount point of bpffs.
    pub bpffs: PathBuf,
    /// Most redirected connections of the node.
    pub max_connections: u32,
    /// A folder of pods.
    pub pods_dir: Option<PathBuf>,
    /// The socket for the CNI plugin.
    pub socket: PathBuf,
    /// Address that serves metrics and probes.
    pub metrics_address: Option<SocketAddr>,
    /// Folder in which the pods' cgroups are searched for; by default the mount points of cgroup2.
    pub cgroup_root: Option<PathBuf>,
    /// Watch the Kubernetes API for pods of this node.
    pub node: Option<String>,
    /// How long the ADD of a sandbox waits until the API reports its pod.
    pub api_wait: Duration,
    /// Least number of flows that are compared before a pod is cut over.
    pub cutover_min_flows: u64,
    /// Time between two probes of a pod, if pods are probed.
    pub prove_interval: Option<Duration>,
    /// Which pods are captured.
    pub selection: Selection,
    /// Options for every pod of the API. Annotations override them.
    pub defaults: CaptureArgs,
    /// The CNI plugin that is kept installed, if any.
    pub plugin: Option<Plugin>,
}

/// Why the daemon cannot start.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    #[error(transparent)]
    Kubernetes(#[from] KubernetesError),
    #[error("reading the options for every pod")]
    Defaults(#[source] CaptureArgsError),
    #[error(
        "--enforce-percent and --enforce-workloads choose workloads among pods in shadow mode, and shadow mode is not the \
         default: give --shadow among the options (`intercept-agent daemon ... -- --shadow`, chart: mode=shadow)"
    )]
    NothingToEnforce,
    #[error(transparent)]
    Folder(#[from] FolderError),
    #[error(transparent)]
    Socket(#[from] SocketError),
    #[error("reading the applied pods of this node")]
    Adopt(#[source] CaptureError),
    #[error("listening on {address} for metrics")]
    Metrics { address: SocketAddr, source: io::Error },
    #[error("starting a thread")]
    Thread(#[source] io::Error),
}

/// What the probes check.
#[derive(Clone)]
struct Probes {
    metrics: Metrics,
    readiness: Readiness,
    messages: UnboundedSender<Message>,
    bpffs: PathBuf,
    scraping: Arc<Mutex<()>>,
}

/// Runs until `shutdown` is ready. Applied pods stay applied.
pub async fn serve(settings: Settings, shutdown: impl Future<Output = ()>) -> Result<(), ServeError> {
    raise_file_limit();
    let defaults = settings.defaults.check().map_err(ServeError::Defaults)?;
    if !settings.selection.enforced.is_empty() && !defaults.shadow {
        return Err(ServeError::NothingToEnforce);
    }
    if !defaults.accelerate.is_empty() {
        // So that its result is known when the first pod comes.
        self_test::has_ended();
    }
    let worker =
        Worker::start(settings.bpffs.clone(), settings.max_connections).map_err(ServeError::Thread)?;
    let metrics = Metrics::new();
    let cutovers = Cutovers::new(settings.bpffs.clone(), settings.cutover_min_flows);
    let (mut reconciler, messages) = Reconciler::new(worker.clone(), cutovers, metrics.clone());
    if let Some(interval) = settings.prove_interval {
        reconciler.prove(ProofSettings { bpffs: settings.bpffs.clone(), interval });
    }
    let sources = open_sources(&settings, &mut reconciler).await?;
    let (installer, handle) = settings.plugin.map(|plugin| Installer::new(plugin, metrics.clone())).unzip();
    let adopted = Arc::new(AtomicBool::new(false));
    let readiness = Readiness { worker, adopted: Arc::clone(&adopted), installer: handle };
    if let Some(address) = settings.metrics_address {
        let probes = Probes {
            metrics: metrics.clone(),
            readiness: readiness.clone(),
            messages: messages.clone(),
            bpffs: settings.bpffs,
            scraping: Arc::default(),
        };
        let listener = tokio::net::TcpListener::bind(address)
            .await
            .map_err(|source| ServeError::Metrics { address, source })?;
        tracing::info!(address = %listener.local_addr().unwrap_or(address), "serving metrics and probes");
        tokio::spawn(http::serve(listener, router(probes), http::Limits::default()));
    }

    let started = std::time::Instant::now();
    match reconciler.adopt().await {
        Ok(pods) => tracing::info!(pods, took = ?started.elapsed(), "read the applied pods"),
        // Requests and probes report it. It ends when the other agent's state is removed.
        Err(CaptureError::Node(error @ NodeError::OtherLayout(_))) => {
            tracing::error!(error = &error as &dyn std::error::Error, "no pod can be captured");
        }
        Err(error) => return Err(ServeError::Adopt(error)),
    }
    adopted.store(true, Ordering::Release);
    // A source may end claims only now, when the applied pods are known.
    let context = SourceContext { messages, readiness };
    for source in sources {
        tracing::debug!(source = source.name(), "starting");
        tokio::spawn(source.run(context.clone()));
    }
    // Only now, when the socket answers the plugin.
    if let Some(installer) = installer {
        tokio::spawn(installer.run());
    }
    tokio::select! {
        () = reconciler.run() => {}
        () = shutdown => tracing::info!("shutting down; captured pods stay captured"),
    }
    Ok(())
}

/// The sources of these settings, in the order in which they are started.
async fn open_sources(
    settings: &Settings,
    reconciler: &mut Reconciler,
) -> Result<Vec<Box<dyn PodSource>>, ServeError> {
    let mounts = settings.cgroup_root.clone().map_or_else(cgroup::mounts, |root| vec![root]);
    let placement = || Placement::below(mounts.clone());
    let mut sources: Vec<Box<dyn PodSource>> = Vec::new();
    // First, because it detects another running daemon.
    let socket = Server::open(&settings.socket, placement(), settings.selection.clone())?;
    let kubernetes = match settings.node.clone() {
        Some(node) => {
            let (selection, defaults) = (settings.selection.clone(), settings.defaults.clone());
            let kubernetes = Kubernetes::open(node, selection, defaults, placement()).await?;
            reconciler.publish_events_to(kubernetes.events());
            reconciler.await_api(settings.api_wait);
            Some(kubernetes)
        }
        None => None,
    };
    if let Some(path) = settings.pods_dir.clone() {
        sources.push(Box::new(Folder::open(path)?));
    }
    if let Some(kubernetes) = kubernetes {
        sources.push(Box::new(kubernetes));
    }
    sources.push(Box::new(socket));
    Ok(sources)
}

fn router(probes: Probes) -> Router {
    Router::new()
        .route("/metrics", get(metrics))
        .route("/healthz", get(healthz))
        .route("/readyz", get(readyz))
        .with_state(probes)
}

async fn reports(probes: &Probes) -> Option<Vec<PodReport>> {
    let (reply, answer) = oneshot::channel();
    probes.messages.send(Message::Report(reply)).ok()?;
    answer.await.ok()
}

async fn metrics(
    State(probes): State<Probes>,
) -> Result<([(&'static str, &'static str); 1], String), StatusCode> {
    let reports = reports(&probes).await.ok_or(StatusCode::SERVICE_UNAVAILABLE)?;
    let names = reports
        .into_iter()
        .filter_map(|report| Some((NetnsCookie(report.netns_cookie?), report.name)))
        .collect();
    let Probes { metrics, bpffs, scraping, .. } = probes;
    // Counted until the work is done, even if the client has gone meanwhile.
    let one_at_a_time = scraping.lock_owned().await;
    // It reads whole maps, so not on the thread of the runtime.
    let text = tokio::task::spawn_blocking(move || {
        let _one_at_a_time = one_at_a_time;
        metrics.text(&bpffs, &names)
    });
    let text = text.await;
    let text = text.map_err(|_| StatusCode::INTERNAL_SERVER_ERROR)?;
    Ok(([("content-type", "application/openmetrics-text; version=1.0.0; charset=utf-8")], text))
}

/// Fails if a restart would help: the reconciler or the worker is stuck.
async fn healthz(State(probes): State<Probes>) -> (StatusCode, String) {
    let since = probes.metrics.since_beat();
    if since > STUCK {
        return (
            StatusCode::SERVICE_UNAVAILABLE,
            format!("the loop has not looked at its pods for {since:?}\n"),
        );
    }
    match tokio::time::timeout(STUCK, probes.readiness.worker.run(Priority::Urgent, |_| ())).await {
        Ok(Ok(())) => (StatusCode::OK, "ok\n".to_owned()),
        Ok(Err(failed)) => (StatusCode::SERVICE_UNAVAILABLE, format!("{failed}\n")),
        Err(_) => (
            StatusCode::SERVICE_UNAVAILABLE,
            format!(
                "the worker has been busy with one job for {STUCK:?}; {} wait\n",
                probes.readiness.worker.waiting()
            ),
        ),
    }
}

/// Whether a pod that starts now would be captured.
async fn readyz(State(probes): State<Probes>) -> (StatusCode, String) {
    match probes.readiness.of_node().await {
        Ok(()) => (StatusCode::OK, "ok\n".to_owned()),
        Err(problem) => (StatusCode::SERVICE_UNAVAILABLE, format!("{problem}\n")),
    }
}

/// Raises the limit of open files: each pod takes two, and a shell's limit is 1024.
fn raise_file_limit() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    if let Err(error) = setrlimit(Resource::Nofile, limit) {
        tracing::warn!(%error, "raising the limit of open files; a node with many pods may run out of them");
    }
}
