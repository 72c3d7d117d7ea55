//! The daemon as a whole: sources, loop, socket and HTTP in one runtime on one thread, beside the worker's.

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
    desired::{CaptureArgs, CaptureArgsError},
    folder::{Folder, FolderError},
    http,
    kubernetes::{Kubernetes, KubernetesError},
    metrics::Metrics,
    placement::Placement,
    plugin::Installer,
    ready::Readiness,
    reconcile::{Message, PodReport, Reconciler},
    sidecar::Selection,
    socket::{Server, SocketError},
    source::{PodSource, SourceContext},
    worker::{Priority, Worker},
};
use crate::{cgroup, cni::install::Plugin, ids::NetnsCookie, node::NodeError};

/// The loop looks at its pods more often than twice a second; a worker that takes longer than this is stuck.
const STUCK: Duration = Duration::from_secs(15);

/// What the daemon is started with.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Where bpffs is.
    pub bpffs: PathBuf,
    /// Most redirected connections that the node remembers.
    pub max_connections: u32,
    /// A folder of pods.
    pub pods_dir: Option<PathBuf>,
    /// The socket for the CNI plugin.
    pub socket: PathBuf,
    /// Where metrics and probes are answered; nowhere if none.
    pub metrics_address: Option<SocketAddr>,
    /// Below which folder pods' cgroups are looked for; by default where cgroup2 is mounted.
    pub cgroup_root: Option<PathBuf>,
    /// Watch the Kubernetes API for pods of this node.
    pub node: Option<String>,
    /// How long a sandbox that is added waits for the API's word on its pod.
    pub api_wait: Duration,
    /// Which pods are looked at.
    pub selection: Selection,
    /// Options for every pod of the API; annotations are stronger.
    pub defaults: CaptureArgs,
    /// The CNI plugin that is to be kept installed, if any.
    pub plugin: Option<Plugin>,
}

/// Why the daemon cannot start.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    #[error(transparent)]
    Kubernetes(#[from] KubernetesError),
    #[error("reading the options for every pod")]
    Defaults(#[source] CaptureArgsError),
    #[error(transparent)]
    Folder(#[from] FolderError),
    #[error(transparent)]
    Socket(#[from] SocketError),
    #[error("taking over what is in force on this node")]
    Adopt(#[source] CaptureError),
    #[error("listening on {address} for metrics")]
    Metrics { address: SocketAddr, source: io::Error },
    #[error("starting a thread")]
    Thread(#[source] io::Error),
}

/// What the probes look at.
#[derive(Clone)]
struct Probes {
    metrics: Metrics,
    readiness: Readiness,
    messages: UnboundedSender<Message>,
    bpffs: PathBuf,
    scraping: Arc<Mutex<()>>,
}

/// Run until `shutdown` is ready. What is in force stays in force.
pub async fn serve(settings: Settings, shutdown: impl Future<Output = ()>) -> Result<(), ServeError> {
    raise_file_limit();
    let worker =
        Worker::start(settings.bpffs.clone(), settings.max_connections).map_err(ServeError::Thread)?;
    let metrics = Metrics::new();
    let (mut reconciler, messages) = Reconciler::new(worker.clone(), metrics.clone());
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
        tracing::info!(address = %listener.local_addr().unwrap_or(address), "answering for metrics and probes");
        tokio::spawn(http::serve(listener, router(probes), http::Limits::default()));
    }

    let started = std::time::Instant::now();
    match reconciler.adopt().await {
        Ok(pods) => tracing::info!(pods, took = ?started.elapsed(), "took over what is in force"),
        // Whoever asks for a pod, or whether we are ready, is told; and all goes well once it is taken away.
        Err(CaptureError::Node(error @ NodeError::OtherLayout(_))) => {
            tracing::error!(error = &error as &dyn std::error::Error, "no pod can be captured");
        }
        Err(error) => return Err(ServeError::Adopt(error)),
    }
    adopted.store(true, Ordering::Release);
    // Only now, when what is in force is known, may a source say what is not wanted any more.
    let context = SourceContext { messages, readiness };
    for source in sources {
        tracing::debug!(source = source.name(), "starting");
        tokio::spawn(source.run(context.clone()));
    }
    // Only now, when there is something for the plugin to ask.
    if let Some(installer) = installer {
        tokio::spawn(installer.run());
    }
    tokio::select! {
        () = reconciler.run() => {}
        () = shutdown => tracing::info!("ending; what is in force stays in force"),
    }
    Ok(())
}

/// The sources that the settings name, in the order in which they are started.
async fn open_sources(
    settings: &Settings,
    reconciler: &mut Reconciler,
) -> Result<Vec<Box<dyn PodSource>>, ServeError> {
    settings.defaults.check().map_err(ServeError::Defaults)?;
    let mounts = settings.cgroup_root.clone().map_or_else(cgroup::mounts, |root| vec![root]);
    let placement = || Placement::below(mounts.clone());
    let mut sources: Vec<Box<dyn PodSource>> = Vec::new();
    // First, because it also says whether another daemon runs.
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
    // AppliedPod until the work is done, also when its client has gone away meanwhile.
    let one_at_a_time = scraping.lock_owned().await;
    // Walks the maps: not on the thread that everything else runs on.
    let text = tokio::task::spawn_blocking(move || {
        let _one_at_a_time = one_at_a_time;
        metrics.text(&bpffs, &names)
    });
    let text = text.await;
    let text = text.map_err(|_| StatusCode::INTERNAL_SERVER_ERROR)?;
    Ok(([("content-type", "application/openmetrics-text; version=1.0.0; charset=utf-8")], text))
}

/// Whether restarting would help: the loop turns, and the worker works.
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
                "the worker has been at one job for {STUCK:?}; {} wait\n",
                probes.readiness.worker.waiting()
            ),
        ),
    }
}

/// Whether a pod that is started now would be captured.
async fn readyz(State(probes): State<Probes>) -> (StatusCode, String) {
    match probes.readiness.of_node().await {
        Ok(()) => (StatusCode::OK, "ok\n".to_owned()),
        Err(problem) => (StatusCode::SERVICE_UNAVAILABLE, format!("{problem}\n")),
    }
}

/// Two descriptors a pod, and a shell's limit is 1024.
fn raise_file_limit() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    if let Err(error) = setrlimit(Resource::Nofile, limit) {
        tracing::warn!(%error, "raising the limit of open files: a node of many pods may run out of them");
    }
}
