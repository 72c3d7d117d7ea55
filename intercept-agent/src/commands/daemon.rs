//! `daemon`.

use anyhow::{Context as _, Result};
use tokio::signal::unix::{SignalKind, signal};

use crate::{
    cli::{CaptureIpv6, DaemonArgs},
    daemon::{
        desired::CaptureArgs,
        mode::EnforcedWorkloads,
        serve::{Settings, serve},
        sidecar::{Ipv6, Selection},
    },
    sys,
};

pub(super) fn daemon(args: DaemonArgs) -> Result<()> {
    super::check::require_privileges()?;
    let selection = Selection {
        exclude_namespaces: args.plugin.excluded(),
        ipv6: match args.ipv6 {
            CaptureIpv6::AsIstio => Ipv6::AsIstio,
            CaptureIpv6::Always => Ipv6::Always,
        },
        mesh: args.plugin.mesh.into(),
        enforced: EnforcedWorkloads {
            percent: args.enforce_percent,
            listed: args.enforce_workloads.into_iter().collect(),
        },
    };
    let plugin = args.cni_keep.then(|| super::cni::in_place(args.plugin, &args.socket.socket, &args.options));
    let mut arguments = args.options;
    if args.accelerate {
        // First, so that other options take precedence.
        arguments.insert(0, "--accelerate".to_owned());
    }
    let settings = Settings {
        plugin,
        bpffs: args.bpffs.bpffs,
        max_connections: args.load.max_connections,
        pods_dir: args.pods_dir,
        socket: args.socket.socket,
        metrics_address: args.metrics_address,
        cgroup_root: args.cgroup_root,
        node: args.node_name,
        api_wait: args.api_wait,
        cutover_min_flows: args.cutover_min_flows,
        prove_interval: Some(args.prove_interval).filter(|interval| !interval.is_zero()),
        selection,
        defaults: CaptureArgs { arguments, ..CaptureArgs::default() },
    };
    // Before there are threads.
    sys::bound_arenas();
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().context("starting the runtime")?;
    runtime.block_on(async {
        let mut interrupt = signal(SignalKind::interrupt()).context("listening for SIGINT")?;
        let mut terminate = signal(SignalKind::terminate()).context("listening for SIGTERM")?;
        let shutdown = async {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
        };
        Ok(serve(settings, shutdown).await?)
    })
}
