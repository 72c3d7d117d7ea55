//! `cleanup`: leave nothing on the node.

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
    // The plugin first: it must not ask for new pods meanwhile. A daemon that is running would put it back.
    drop(socket::request(&args.socket.socket, &DaemonRequest::StopInstalling));
    let folders = Folders {
        configurations: args.folders.cni_conf_dir.clone(),
        binaries: args.folders.cni_bin_dir.clone(),
    };
    let uninstalled = install::uninstall(&folders);
    for path in uninstalled.as_deref().unwrap_or_default() {
        say!("took the plugin out of {}", path.display());
    }
    match socket::request(&args.socket.socket, &DaemonRequest::Leave) {
        Ok(Response::Done(_)) => say!("the daemon let go of all pods"),
        Ok(other) => bail!("having the daemon let go of all pods: {other:?}"),
        // None runs.
        Err(_) => {}
    }
    detach::detach_all(&args.bpffs.bpffs)?;
    uninstalled?;
    Ok(())
}
