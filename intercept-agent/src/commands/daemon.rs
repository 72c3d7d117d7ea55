//! `daemon`.

use anyhow::{Context as _, Result};
use intercept_agent::daemon::{
    serve::{Settings, serve},
    wanted::Given,
};
use tokio::signal::unix::{SignalKind, signal};

use crate::cli::DaemonArgs;

pub(super) fn daemon(args: DaemonArgs) -> Result<()> {
    super::check::require_privileges()?;
    let mut arguments = args.options;
    if args.accelerate {
        // Weaker than what the options say themselves.
        arguments.insert(0, "--accelerate".to_owned());
    }
    let settings = Settings {
        bpffs: args.bpffs.bpffs,
        max_connections: args.load.max_connections,
        pods_dir: args.pods_dir,
        socket: args.socket.socket,
        metrics_address: args.metrics_address,
        cgroup_root: args.cgroup_root,
        node: args.node_name,
        defaults: Given { arguments, ..Given::default() },
    };
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
