//! The arguments of the commands, and logging.

use std::{io::IsTerminal as _, net::IpAddr, path::PathBuf, time::Duration};

use clap::{ArgGroup, Args, Parser, Subcommand, ValueEnum};
use intercept_agent::{
    daemon::protocol::DEFAULT_SOCKET, options::RawOptions, programs::DEFAULT_MAX_CONNECTIONS,
    store::DEFAULT_BPFFS,
};

/// Takes a pod's traffic through its sidecar proxy with eBPF, as istio-iptables does with netfilter.
#[derive(Parser)]
#[command(name = "intercept-agent", version, max_term_width = 110)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) logging: Logging,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// How to log; results go to standard output, logs to standard error.
#[derive(Args)]
pub(crate) struct Logging {
    /// Log lines as text or JSON
    #[arg(long, global = true, value_enum, default_value_t = LogFormat::Text, env = "INTERCEPT_LOG_FORMAT")]
    log_format: LogFormat,
    /// What to log: error, warn, info, debug or trace, or `module=level` pairs
    #[arg(long, global = true, default_value = "info", env = "INTERCEPT_LOG")]
    log: String,
}

#[derive(Clone, Copy, ValueEnum)]
enum LogFormat {
    Text,
    Json,
}

#[derive(Subcommand)]
pub(crate) enum Command {
    /// Capture one pod; returns once it is in force
    ///
    /// The capture outlives the agent. The same options again change nothing, other options replace the
    /// capture in one step.
    Attach(AttachArgs),
    /// Remove the capture of one pod, or of all, and leave nothing behind
    Detach(DetachArgs),
    /// Capture one pod in the foreground: follow its addresses and routes, detach on SIGINT or SIGTERM
    Run(AttachArgs),
    /// Show what is attached, and its counters
    Status(StatusArgs),
    /// Say how a flow would be decided, and by which row
    Explain(ExplainArgs),
    /// Say what this kernel can and cannot do; loads every program and takes it away again
    Check(CheckArgs),
    /// Keep every pod of this node captured
    ///
    /// Pods are those of --pods-dir, those that the CNI plugin asks for and, with --node-name, those of the
    /// Kubernetes API. What is in force when it starts is
    /// taken over, and stays in force when it ends.
    Daemon(DaemonArgs),
    /// Show decisions as they are made; one reader at a time
    Trace(TraceArgs),
    /// Switch joined connections of this node off and on, from the next message on
    Accelerate(AccelerateArgs),
    /// Remove everything from this node: pods, programs, maps, the CNI plugin; a daemon that runs lets go
    Cleanup(CleanupArgs),
    /// The CNI plugin, as a container runtime calls it; or put it into the node's configuration
    Cni(CniArgs),
    /// The command line of istio-iptables, for the namespace and the pod that it runs in
    #[command(name = "istio-iptables")]
    IstioIptables(IstioArgs),
}

/// The node's programs and maps, and what they are to do besides istio-iptables' options.
#[derive(Args, Clone)]
pub(crate) struct Load {
    /// Most redirected connections that this node remembers; counts when the programs are loaded, by the first pod
    #[arg(long, value_name = "N", default_value_t = DEFAULT_MAX_CONNECTIONS, env = "INTERCEPT_MAX_CONNECTIONS",
          value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) max_connections: u32,
}

/// Which bpffs.
#[derive(Args, Clone)]
pub(crate) struct Bpffs {
    /// Where bpffs is, or is to be mounted
    #[arg(long, default_value = DEFAULT_BPFFS, env = "INTERCEPT_BPFFS")]
    pub(crate) bpffs: PathBuf,
}

#[derive(Args)]
pub(crate) struct AttachArgs {
    /// The pod's cgroup, version 2
    #[arg(long, value_name = "PATH")]
    pub(crate) cgroup_path: PathBuf,
    /// The pod's network namespace [default: that of the processes in the cgroup]
    #[arg(long, value_name = "PATH")]
    pub(crate) netns: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) bpffs: Bpffs,
    #[command(flatten)]
    pub(crate) load: Load,
    #[command(flatten)]
    pub(crate) options: RawOptions,
}

#[derive(Args)]
pub(crate) struct IstioArgs {
    /// The pod's cgroup [default: the one around this container's own]
    #[arg(long, value_name = "PATH", env = "INTERCEPT_CGROUP_PATH")]
    pub(crate) cgroup_path: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) bpffs: Bpffs,
    #[command(flatten)]
    pub(crate) load: Load,
    #[command(flatten)]
    pub(crate) options: RawOptions,
}

#[derive(Args)]
#[group(required = true, multiple = false)]
pub(crate) struct Which {
    /// The pod's cgroup
    #[arg(long, value_name = "PATH")]
    pub(crate) cgroup_path: Option<PathBuf>,
    /// Every pod of this node, and the programs
    #[arg(long)]
    pub(crate) all: bool,
}

#[derive(Args)]
pub(crate) struct DetachArgs {
    #[command(flatten)]
    pub(crate) which: Which,
    #[command(flatten)]
    pub(crate) bpffs: Bpffs,
}

#[derive(Args)]
pub(crate) struct StatusArgs {
    /// Only the pod of this cgroup
    #[arg(long, value_name = "PATH")]
    pub(crate) cgroup_path: Option<PathBuf>,
    /// For tools
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) bpffs: Bpffs,
    #[command(flatten)]
    pub(crate) socket: Socket,
}

#[derive(Args)]
#[command(group = ArgGroup::new("asks").multiple(true))]
pub(crate) struct DaemonArgs {
    /// A folder of pods: one JSON file each, with `cgroup`, and `netns`, `arguments`, `environment` as for `attach`
    #[arg(long, value_name = "PATH", env = "INTERCEPT_PODS_DIR")]
    pub(crate) pods_dir: Option<PathBuf>,
    /// Answer GET /metrics, /healthz and /readyz here [default: nowhere]
    #[arg(long, value_name = "ADDRESS:PORT", env = "INTERCEPT_METRICS_ADDRESS")]
    pub(crate) metrics_address: Option<std::net::SocketAddr>,
    /// Look for the cgroups of Kubernetes' pods below this folder [default: where cgroup2 is mounted]
    #[arg(long, value_name = "PATH", env = "INTERCEPT_CGROUP_ROOT")]
    pub(crate) cgroup_root: Option<PathBuf>,
    /// Watch the Kubernetes API for the pods of this node [default: no API]
    #[arg(long, value_name = "NAME", env = "INTERCEPT_NODE_NAME", group = "asks")]
    pub(crate) node_name: Option<String>,
    /// How long the CNI plugin's ADD of a pod with a sidecar waits for the API to tell of the pod. Then its
    /// annotations decide, until the API does
    #[arg(long, value_name = "SECONDS", default_value = "1", env = "INTERCEPT_API_WAIT", value_parser = seconds)]
    pub(crate) api_wait: Duration,
    /// Ignore the pods of these namespaces, a list
    #[arg(
        long,
        value_name = "NAMES",
        value_delimiter = ',',
        default_value = "kube-system",
        env = "INTERCEPT_EXCLUDE_NAMESPACES",
        value_parser = namespace
    )]
    pub(crate) exclude_namespaces: Vec<String>,
    /// Whether the IPv6 of pods with a sidecar is captured
    #[arg(long, value_enum, default_value_t = CaptureIpv6::AsIstio, env = "INTERCEPT_IPV6")]
    pub(crate) ipv6: CaptureIpv6,
    /// Whose sidecars the pods have
    #[arg(long, value_enum, default_value_t = SidecarMesh::Istio, env = "INTERCEPT_MESH")]
    pub(crate) mesh: SidecarMesh,
    /// Keep the CNI plugin in the node's configuration, whoever writes that again
    #[arg(long, env = "INTERCEPT_CNI_KEEP", group = "asks")]
    pub(crate) cni_keep: bool,
    #[command(flatten)]
    pub(crate) plugin: CniPlugin,
    #[command(flatten)]
    pub(crate) socket: Socket,
    #[command(flatten)]
    pub(crate) load: Load,
    /// Join the connections between proxies of this node past TCP: the same as --accelerate among the options
    #[arg(long, env = "INTERCEPT_ACCELERATE", requires = "node_name")]
    pub(crate) accelerate: bool,
    #[command(flatten)]
    pub(crate) bpffs: Bpffs,
    /// Options of `attach` for every pod of the API and of the plugin; annotations are stronger
    #[arg(last = true, value_name = "OPTIONS", requires = "asks")]
    pub(crate) options: Vec<String>,
}

/// Which socket.
#[derive(Args, Clone)]
pub(crate) struct Socket {
    /// The daemon's socket, for root alone
    #[arg(long, value_name = "PATH", default_value = DEFAULT_SOCKET, env = "INTERCEPT_SOCKET")]
    pub(crate) socket: PathBuf,
}

#[derive(Args)]
pub(crate) struct TraceArgs {
    /// Only the pod of this cgroup
    #[arg(long, value_name = "PATH")]
    pub(crate) cgroup_path: Option<PathBuf>,
    /// End after so many
    #[arg(long, value_name = "N")]
    pub(crate) count: Option<u64>,
    /// One JSON object a line
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) bpffs: Bpffs,
}

/// Where a node has its CNI files.
#[derive(Args, Clone)]
pub(crate) struct CniFolders {
    /// Configurations of CNI
    #[arg(long, value_name = "PATH", default_value = "/etc/cni/net.d", env = "INTERCEPT_CNI_CONF_DIR")]
    pub(crate) cni_conf_dir: PathBuf,
    /// Plugins of CNI
    #[arg(long, value_name = "PATH", default_value = "/opt/cni/bin", env = "INTERCEPT_CNI_BIN_DIR")]
    pub(crate) cni_bin_dir: PathBuf,
}

/// The CNI plugin, as it is installed.
#[derive(Args, Clone)]
pub(crate) struct CniPlugin {
    #[command(flatten)]
    pub(crate) folders: CniFolders,
    /// The file of the cluster's network, which the plugin is put into [default: the one that the runtime takes]
    #[arg(long, value_name = "FILE", env = "INTERCEPT_CNI_CONF_NAME", conflicts_with = "cni_standalone")]
    pub(crate) cni_conf_name: Option<String>,
    /// Install the plugin as a network of this name for Multus, in a file of its own rather than in a list
    #[arg(long, value_name = "NETWORK", env = "INTERCEPT_CNI_STANDALONE")]
    pub(crate) cni_standalone: Option<String>,
    /// Which pods the plugin has captured
    #[arg(long = "select", value_enum, default_value_t = SelectPods::Sidecar, env = "INTERCEPT_CNI_SELECT")]
    pub(crate) select: SelectPods,
}

#[derive(Args)]
pub(crate) struct CleanupArgs {
    #[command(flatten)]
    pub(crate) folders: CniFolders,
    #[command(flatten)]
    pub(crate) socket: Socket,
    #[command(flatten)]
    pub(crate) bpffs: Bpffs,
}

#[derive(Args)]
pub(crate) struct CniArgs {
    #[command(subcommand)]
    pub(crate) command: Option<CniCommand>,
}

#[derive(Subcommand)]
pub(crate) enum CniCommand {
    /// Copy the plugin, and put it last in the node's list of plugins; again: no change
    Install {
        #[command(flatten)]
        plugin: CniPlugin,
        #[command(flatten)]
        socket: Socket,
        /// Options of `attach` for every pod; annotations are stronger
        #[arg(last = true, value_name = "OPTIONS")]
        options: Vec<String>,
    },
    /// Take the plugin out of every list, and its copy away
    Uninstall {
        #[command(flatten)]
        folders: CniFolders,
    },
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum CaptureIpv6 {
    /// If the proxy has ISTIO_DUAL_STACK, or the pod's first address is of IPv6
    AsIstio,
    /// Also of a proxy that may not listen there: it is refused then
    Always,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum SidecarMesh {
    Istio,
    Linkerd,
    Kuma,
    Consul,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum SelectPods {
    /// Those with a sidecar
    Sidecar,
    /// Every pod, for nodes without Kubernetes
    All,
}

#[derive(Args)]
pub(crate) struct AccelerateArgs {
    /// What the node's pods may do
    #[arg(value_enum)]
    pub(crate) switch: OnOff,
    #[command(flatten)]
    pub(crate) bpffs: Bpffs,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum OnOff {
    /// Join what the pods' options ask for
    On,
    /// Join nothing; what is joined goes on by TCP
    Off,
}

#[derive(Args)]
pub(crate) struct CheckArgs {
    /// Only whether connections could be joined past TCP: tried out on some in a namespace that is made for it
    #[arg(long)]
    pub(crate) accelerate: bool,
    /// For tools
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) bpffs: Bpffs,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Direction {
    /// Made in the pod
    Outbound,
    /// Arriving at the pod
    Inbound,
}

#[derive(Args)]
pub(crate) struct ExplainArgs {
    /// Which way the flow goes
    #[arg(value_enum)]
    pub(crate) direction: Direction,
    /// The attached pod of this cgroup; answered from the entries that the programs use
    #[arg(long, value_name = "PATH")]
    pub(crate) cgroup_path: PathBuf,
    /// What is dialled
    #[arg(long, value_name = "ADDRESS")]
    pub(crate) dst: IpAddr,
    /// The port that is dialled
    #[arg(long, value_name = "PORT")]
    pub(crate) dport: u16,
    /// Outbound: what the socket is bound to. Inbound: who dials
    #[arg(long, value_name = "ADDRESS")]
    pub(crate) src: Option<IpAddr>,
    /// The user that made the socket, as the node sees it
    #[arg(long, default_value_t = 0)]
    pub(crate) uid: u32,
    /// The group that made the socket, as the node sees it
    #[arg(long, default_value_t = 0)]
    pub(crate) gid: u32,
    /// Outbound: SO_MARK of the socket
    #[arg(long, default_value_t = 0)]
    pub(crate) mark: u32,
    /// UDP rather than TCP
    #[arg(long)]
    pub(crate) udp: bool,
    /// Inbound: the index of the interface that the flow arrives on
    #[arg(long, default_value_t = 0, value_name = "INDEX")]
    pub(crate) ifindex: u32,
    /// For tools
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) bpffs: Bpffs,
}

/// A name as Kubernetes allows it, or nothing: an empty list excludes no namespace.
fn namespace(text: &str) -> Result<String, String> {
    let is_sound = |c: u8| matches!(c, b'a'..=b'z' | b'0'..=b'9' | b'-');
    if text.len() <= 63 && text.bytes().all(is_sound) {
        Ok(text.to_owned())
    } else {
        Err("a namespace has lower-case letters, digits and `-` only, at most 63".to_owned())
    }
}

/// A time in seconds. The plugin gives up after half a minute.
fn seconds(text: &str) -> Result<Duration, String> {
    let seconds = text.parse().ok().filter(|seconds| (0.0..=10.0).contains(seconds));
    seconds.map(Duration::from_secs_f64).ok_or_else(|| "give seconds, 0 to 10".to_owned())
}

/// Start logging to standard error.
pub(crate) fn start_logging(logging: &Logging) {
    use tracing_subscriber::EnvFilter;
    // What these say, the daemon says as well, in fewer words; they can be asked for by name.
    let directives = format!("kube_client=off,kube_runtime=off,{}", logging.log);
    let (filter, wrong) = match EnvFilter::try_new(directives) {
        Ok(filter) => (filter, None),
        Err(error) => (EnvFilter::new("info"), Some(error)),
    };
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_target(false)
        .with_ansi(std::io::stderr().is_terminal());
    match logging.log_format {
        LogFormat::Text => subscriber.init(),
        LogFormat::Json => subscriber.json().init(),
    }
    if let Some(error) = wrong {
        tracing::warn!(%error, log = logging.log, "the filter of --log does not read: logging info");
    }
}
