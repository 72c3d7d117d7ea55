//! The command line and logging.

mod deferred;
mod logging;
mod parse;
mod pod;

use std::{path::PathBuf, time::Duration};

use crate::{
    daemon::{protocol::DEFAULT_SOCKET, takeover::DEFAULT_MIN_FLOWS, workload::WorkloadRef},
    options::RawOptions,
    programs::DEFAULT_MAX_CONNECTIONS,
    store::DEFAULT_BPFFS,
};

pub(crate) use deferred::Deferred;
pub(crate) use logging::start_logging;
use parse::{arguments, minutes, namespace, seconds, workload};
pub(crate) use pod::{CutoverArgs, Direction, ExplainArgs, FlowContainer, InspectArgs};

use clap::{ArgGroup, Args, Parser, Subcommand, ValueEnum};

/// Takes a pod's traffic through its sidecar proxy with eBPF, as istio-iptables does with netfilter.
#[derive(Parser)]
#[command(name = "intercept-agent", version, max_term_width = 110)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) logging: Logging,
    #[command(subcommand)]
    pub(crate) command: Command,
}

impl Cli {
    /// Parses the arguments of this process, and exits if they are wrong.
    pub(crate) fn of_process() -> Self {
        let arguments = arguments(std::env::args_os());
        // A runtime waits for the plugin at each pod, and the parser takes a third of the time to start.
        if arguments.len() == 2 && arguments[1] == "cni" {
            return Self::plugin();
        }
        Self::parse_from(arguments)
    }
}

/// How to log. Results go to standard output, logs to standard error.
#[derive(Args)]
pub(crate) struct Logging {
    /// Log lines as text or JSON
    #[arg(long, global = true, value_enum, default_value_t = LogFormat::Text, env = "INTERCEPT_LOG_FORMAT")]
    log_format: LogFormat,
    /// What to log: error, warn, info, debug or trace, or pairs of `module=level`
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
    /// Capture a pod; returns once the capture is active
    ///
    /// The capture outlives the agent. The same options again change nothing; other options replace the capture
    /// atomically.
    Attach(Deferred<AttachArgs>),
    /// Release a pod, or all pods, and leave nothing behind
    Detach(Deferred<DetachArgs>),
    /// Capture a pod in the foreground: follow its addresses and routes, detach on SIGINT or SIGTERM
    Run(Deferred<AttachArgs>),
    /// Keep what `attach --machine --confirm` attached
    Confirm(Deferred<ConfirmArgs>),
    /// Take off what is not confirmed; `attach --confirm` starts it
    #[command(hide = true)]
    Guard(Deferred<GuardArgs>),
    /// Show attached pods and their counters
    Status(Deferred<StatusArgs>),
    /// Show how a flow would be decided, and by which row
    Explain(Deferred<ExplainArgs>),
    /// Report which sockets of a captured pod go around the proxy, and why
    Audit(Deferred<InspectArgs>),
    /// Prove by a connection in a captured pod that the proxy is reached; exits with 126 if it is not
    ///
    /// Outbound, a process without privileges connects from the pod to an address that nobody has. Inbound, the kernel is
    /// asked which socket a connection from outside would reach.
    Prove(Deferred<InspectArgs>),
    /// Enforce the policy of a pod in shadow mode in place of its rules of iptables, without a restart
    ///
    /// The rules that capture the pod are taken out of its namespace, and saved. Each new connection is captured by the
    /// policy or by the rules, and established connections continue. A command that was interrupted is finished by running
    /// it again, in either direction.
    Cutover(Deferred<CutoverArgs>),
    /// Check what this kernel supports; loads every program and removes it again
    Check(Deferred<CheckArgs>),
    /// Keep every pod of this node captured
    ///
    /// Pods come from --pods-dir, from the CNI plugin and, with --node-name, from the Kubernetes API. The daemon adopts
    /// captures that are active when it starts, and they stay active when it ends.
    Daemon(Deferred<DaemonArgs>),
    /// Print decisions as they are made; one reader at a time
    Trace(Deferred<TraceArgs>),
    /// Switch joined connections of this node off or on, from the next message on
    Accelerate(Deferred<AccelerateArgs>),
    /// Remove everything from this node: captures, programs, maps and the CNI plugin; a running daemon releases its
    /// pods
    Cleanup(Deferred<CleanupArgs>),
    /// Run as the CNI plugin, as a container runtime does, or install it on the node
    Cni(Deferred<CniArgs>),
    /// The command line of istio-iptables, for the namespace and the pod in which it runs
    #[command(name = "istio-iptables")]
    IstioIptables(Deferred<IstioArgs>),
}

/// Parameters of the node's programs and maps.
#[derive(Args, Clone)]
pub(crate) struct Load {
    /// Most redirected connections on this node; takes effect when the first pod loads the programs
    #[arg(long, value_name = "N", default_value_t = DEFAULT_MAX_CONNECTIONS, env = "INTERCEPT_MAX_CONNECTIONS",
          value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) max_connections: u32,
}

/// The bpffs.
#[derive(Args, Clone)]
pub(crate) struct Bpffs {
    /// Mount point of bpffs; mounted if necessary
    #[arg(long, default_value = DEFAULT_BPFFS, env = "INTERCEPT_BPFFS")]
    pub(crate) bpffs: PathBuf,
}

#[derive(Args)]
pub(crate) struct AttachArgs {
    /// The pod's cgroup (cgroup2); with --machine any number of cgroups of the machine [default: the whole machine]
    #[arg(long, value_name = "PATH", required_unless_present = "machine")]
    pub(crate) cgroup_path: Vec<PathBuf>,
    /// Capture this machine in its own network namespace, or only the named cgroups of it
    #[arg(long)]
    pub(crate) machine: bool,
    /// With --machine: take everything off again unless `intercept-agent confirm` is run within this time
    #[arg(long, value_name = "SECONDS", requires = "machine", value_parser = clap::value_parser!(u32).range(1..=86400))]
    pub(crate) confirm: Option<u32>,
    /// The pod's network namespace [default: that of the processes in the cgroup]
    #[arg(long, value_name = "PATH", conflicts_with = "machine")]
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
    /// The pod's cgroup [default: the parent of this container's cgroup]
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
#[group(required = true, multiple = true)]
pub(crate) struct Which {
    /// The pod's cgroup, or cgroups of a machine's workload, of which one is enough
    #[arg(long, value_name = "PATH", conflicts_with = "all")]
    pub(crate) cgroup_path: Vec<PathBuf>,
    /// The whole machine, unless cgroups are named
    #[arg(long, conflicts_with = "all")]
    pub(crate) machine: bool,
    /// All pods of this node, and the programs
    #[arg(long)]
    pub(crate) all: bool,
}

/// An attached pod or workload.
#[derive(Args)]
pub(crate) struct WhichCapture {
    /// Cgroup of the attached pod, or one of a machine's workload
    #[arg(long, value_name = "PATH", required_unless_present = "machine")]
    pub(crate) cgroup_path: Option<PathBuf>,
    /// The whole machine, unless a cgroup is named
    #[arg(long)]
    pub(crate) machine: bool,
}

#[derive(Args)]
pub(crate) struct ConfirmArgs {
    /// Only the workload with this cgroup [default: all that wait]
    #[arg(long, value_name = "PATH")]
    pub(crate) cgroup_path: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) bpffs: Bpffs,
}

#[derive(Args)]
pub(crate) struct GuardArgs {
    /// When to do it
    #[arg(long)]
    pub(crate) seconds: u32,
    #[command(flatten)]
    pub(crate) bpffs: Bpffs,
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
    /// Only the pod with this cgroup
    #[arg(long, value_name = "PATH")]
    pub(crate) cgroup_path: Option<PathBuf>,
    /// What shadow mode has compared, and each kind of difference
    #[arg(long)]
    pub(crate) shadow: bool,
    /// Print JSON
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
    /// Folder of pods: one JSON file each, with `cgroup`, and `netns`, `arguments`, `environment` as for `attach`
    #[arg(long, value_name = "PATH", env = "INTERCEPT_PODS_DIR")]
    pub(crate) pods_dir: Option<PathBuf>,
    /// Serve /metrics, /healthz and /readyz on this address [default: off]
    #[arg(long, value_name = "ADDRESS:PORT", env = "INTERCEPT_METRICS_ADDRESS")]
    pub(crate) metrics_address: Option<std::net::SocketAddr>,
    /// Search for the cgroups of Kubernetes pods below this folder [default: the mount point of cgroup2]
    #[arg(long, value_name = "PATH", env = "INTERCEPT_CGROUP_ROOT")]
    pub(crate) cgroup_root: Option<PathBuf>,
    /// Watch the pods of this node through the Kubernetes API [default: off]
    #[arg(long, value_name = "NAME", env = "INTERCEPT_NODE_NAME", group = "asks")]
    pub(crate) node_name: Option<String>,
    /// How long the CNI plugin's ADD of a pod with a sidecar waits until the API reports the pod. Afterwards its
    /// annotations decide, until the API reports it
    #[arg(long, value_name = "SECONDS", default_value = "1", env = "INTERCEPT_API_WAIT", value_parser = seconds)]
    pub(crate) api_wait: Duration,
    /// How often each pod is proven to reach its proxy, and its sockets are audited; also after each change of its policy.
    /// 0 is never
    #[arg(long, value_name = "MINUTES", default_value = "10", env = "INTERCEPT_PROVE_INTERVAL", value_parser = minutes)]
    pub(crate) prove_interval: Duration,
    /// With --shadow among the options: enforce this percentage of the workloads, by a hash of namespace, kind and name. A
    /// higher percentage adds workloads to those of a lower one. Annotations, labels and --enforce-workloads take precedence
    #[arg(long, value_name = "N", default_value_t = 0, env = "INTERCEPT_ENFORCE_PERCENT", requires = "node_name",
          value_parser = clap::value_parser!(u8).range(0..=100))]
    pub(crate) enforce_percent: u8,
    /// With --shadow among the options: enforce these workloads, comma-separated, each as NAMESPACE/KIND/NAME, such as
    /// shop/Deployment/cart. Annotations and labels take precedence
    #[arg(long, value_name = "WORKLOADS", value_delimiter = ',', env = "INTERCEPT_ENFORCE_WORKLOADS",
          requires = "node_name", value_parser = workload)]
    pub(crate) enforce_workloads: Vec<WorkloadRef>,
    /// Flows that must have been compared, without a difference, before a pod is cut over from its rules of iptables
    #[arg(long, value_name = "N", default_value_t = DEFAULT_MIN_FLOWS, env = "INTERCEPT_CUTOVER_MIN_FLOWS",
          value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) cutover_min_flows: u64,
    /// Whether IPv6 of pods with a sidecar is captured
    #[arg(long, value_enum, default_value_t = CaptureIpv6::AsIstio, env = "INTERCEPT_IPV6")]
    pub(crate) ipv6: CaptureIpv6,
    /// Keep the CNI plugin in the node's configuration when other programs rewrite it
    #[arg(long, env = "INTERCEPT_CNI_KEEP", group = "asks")]
    pub(crate) cni_keep: bool,
    #[command(flatten)]
    pub(crate) plugin: CniPlugin,
    #[command(flatten)]
    pub(crate) socket: Socket,
    #[command(flatten)]
    pub(crate) load: Load,
    /// Join connections between proxies of this node, bypassing TCP; the same as --accelerate among the options
    #[arg(long, env = "INTERCEPT_ACCELERATE", requires = "node_name")]
    pub(crate) accelerate: bool,
    #[command(flatten)]
    pub(crate) bpffs: Bpffs,
    /// Options of `attach` for every pod of the API and of the plugin; annotations take precedence
    #[arg(last = true, value_name = "OPTIONS", requires = "asks")]
    pub(crate) options: Vec<String>,
}

/// The daemon's socket.
#[derive(Args, Clone)]
pub(crate) struct Socket {
    /// Path of the daemon's socket, which only root can use
    #[arg(long, value_name = "PATH", default_value = DEFAULT_SOCKET, env = "INTERCEPT_SOCKET")]
    pub(crate) socket: PathBuf,
}

#[derive(Args)]
pub(crate) struct TraceArgs {
    /// Only the pod with this cgroup
    #[arg(long, value_name = "PATH")]
    pub(crate) cgroup_path: Option<PathBuf>,
    /// Exit after this many events
    #[arg(long, value_name = "N")]
    pub(crate) count: Option<u64>,
    /// Print one JSON object per line
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) bpffs: Bpffs,
}

/// The node's CNI directories.
#[derive(Args, Clone)]
pub(crate) struct CniFolders {
    /// Directory of CNI configurations
    #[arg(long, value_name = "PATH", default_value = "/etc/cni/net.d", env = "INTERCEPT_CNI_CONF_DIR")]
    pub(crate) cni_conf_dir: PathBuf,
    /// Directory of CNI plugins
    #[arg(long, value_name = "PATH", default_value = "/opt/cni/bin", env = "INTERCEPT_CNI_BIN_DIR")]
    pub(crate) cni_bin_dir: PathBuf,
}

/// How the CNI plugin is installed.
#[derive(Args, Clone)]
pub(crate) struct CniPlugin {
    #[command(flatten)]
    pub(crate) folders: CniFolders,
    /// File of the cluster's network, to which the plugin is added [default: the one that the runtime uses]
    #[arg(long, value_name = "FILE", env = "INTERCEPT_CNI_CONF_NAME", conflicts_with = "cni_standalone")]
    pub(crate) cni_conf_name: Option<String>,
    /// Install the plugin as a network of this name for Multus, in a file of its own instead of a list
    #[arg(long, value_name = "NETWORK", env = "INTERCEPT_CNI_STANDALONE")]
    pub(crate) cni_standalone: Option<String>,
    /// Which pods are captured through the plugin
    #[arg(long = "select", value_enum, default_value_t = SelectPods::Sidecar, env = "INTERCEPT_CNI_SELECT")]
    pub(crate) select: SelectPods,
    /// Mesh whose sidecars are captured
    #[arg(long, value_enum, default_value_t = SidecarMesh::Istio, env = "INTERCEPT_MESH")]
    pub(crate) mesh: SidecarMesh,
    /// Ignore pods in these namespaces, comma-separated
    #[arg(
        long,
        value_name = "NAMES",
        value_delimiter = ',',
        default_value = "kube-system",
        env = "INTERCEPT_EXCLUDE_NAMESPACES",
        value_parser = namespace
    )]
    pub(crate) exclude_namespaces: Vec<String>,
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
    /// Copy the plugin and append it to the node's list of plugins; can be repeated
    Install {
        #[command(flatten)]
        plugin: CniPlugin,
        #[command(flatten)]
        socket: Socket,
        /// Options of `attach` for every pod; annotations take precedence
        #[arg(last = true, value_name = "OPTIONS")]
        options: Vec<String>,
    },
    /// Remove the plugin from every list, and its copy
    Uninstall {
        #[command(flatten)]
        folders: CniFolders,
    },
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum CaptureIpv6 {
    /// If the proxy has ISTIO_DUAL_STACK, or the pod's first address is IPv6
    AsIstio,
    /// Always; connections are refused if the proxy does not listen on IPv6
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
    /// Pods with a sidecar
    Sidecar,
    /// Every pod, for nodes without Kubernetes
    All,
}

#[derive(Args)]
pub(crate) struct AccelerateArgs {
    /// The switch for all pods of this node
    #[arg(value_enum)]
    pub(crate) switch: OnOff,
    #[command(flatten)]
    pub(crate) bpffs: Bpffs,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum OnOff {
    /// Join connections of pods with --accelerate
    On,
    /// Join nothing; joined connections continue by TCP
    Off,
}

#[derive(Args)]
pub(crate) struct CheckArgs {
    /// Only whether connections can be joined; tested on connections in a new network namespace
    #[arg(long)]
    pub(crate) accelerate: bool,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) bpffs: Bpffs,
}
