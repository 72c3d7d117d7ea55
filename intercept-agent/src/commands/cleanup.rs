//! `cleanup`: removes everything from the node.

use anyhow::{Result, bail};

use super::{detach, print_line};
use crate::{
    cli::CleanupArgs,
    cni::install::{self, Folders},
    daemon::{
        protocol::{DaemonRequest, Response},
        socket,
    },
};

pub(super) fn cleanup(args: &CleanupArgs) -> Result<()> {
    // The plugin comes first, so that it cannot request new pods meanwhile. A running daemon would install it again.
    drop(socket::request(&args.socket.socket, &DaemonRequest::StopInstalling));
    let folders = Folders {
        configurations: args.folders.cni_conf_dir.clone(),
        binaries: args.folders.cni_bin_dir.clone(),
    };
    let uninstalled = install::uninstall(&folders);
    for path in uninstalled.as_deref().unwrap_or_default() {
        print_line!("removed the plugin from {}", path.display());
    }
    match socket::request(&args.socket.socket, &DaemonRequest::Leave) {
        Ok(Response::Done(_)) => print_line!("the daemon released all pods"),
        Ok(Response::Failed(problem)) => {
            bail!("asking the daemon to release all pods (its log says more): {}", problem.text)
        }
        Ok(other) => bail!("asking the daemon to release all pods: {other:?}"),
        // No daemon is running.
        Err(_) => {}
    }
    detach::detach_all(&args.bpffs.bpffs)?;
    uninstalled?;
    Ok(())
}
