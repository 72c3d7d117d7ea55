//! `cleanup`: removes everything from the node.

use anyhow::{Result, bail};
use intercept_agent::{
    cni::install::{self, Folders},
    daemon::{
        protocol::{DaemonRequest, Response},
        socket,
    },
};

use super::{detach, say};
use crate::cli::CleanupArgs;

pub(super) fn cleanup(args: &CleanupArgs) -> Result<()> {
    // The plugin comes first, so that it cannot request new pods meanwhile. A running daemon would install it again.
    drop(socket::request(&args.socket.socket, &DaemonRequest::StopInstalling));
    let folders = Folders {
        configurations: args.folders.cni_conf_dir.clone(),
        binaries: args.folders.cni_bin_dir.clone(),
    };
    let uninstalled = install::uninstall(&folders);
    for path in uninstalled.as_deref().unwrap_or_default() {
        say!("removed the plugin from {}", path.display());
    }
    match socket::request(&args.socket.socket, &DaemonRequest::Leave) {
        Ok(Response::Done(_)) => say!("the daemon released all pods"),
        Ok(other) => bail!("asking the daemon to release all pods: {other:?}"),
        // No daemon is running.
        Err(_) => {}
    }
    detach::detach_all(&args.bpffs.bpffs)?;
    uninstalled?;
    Ok(())
}
