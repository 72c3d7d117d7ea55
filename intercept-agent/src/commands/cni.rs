//! `cni`: the plugin, and its way into a node's configuration.

use anyhow::{Context as _, Result};
use intercept_agent::{
    cni::{
        Call,
        install::{self, Folders},
    },
    escape,
};

use super::{Failed, say};
use crate::cli::{CniArgs, CniCommand, CniFolders, SelectPods};

pub(super) fn cni(args: CniArgs) -> Result<()> {
    match args.command {
        None => plugin(),
        Some(CniCommand::Install { folders, socket, select, options }) => {
            let select = match select {
                SelectPods::Sidecar => "sidecar",
                SelectPods::All => "all",
            };
            let entry = install::entry(&socket.socket, select, &options);
            match install::install(&in_folders(folders), &entry)? {
                Some(path) => say!("put the plugin into {}", path.display()),
                None => say!("unchanged"),
            }
            Ok(())
        }
        Some(CniCommand::Uninstall { folders }) => {
            let changed = install::uninstall(&in_folders(folders))?;
            for path in &changed {
                say!("took the plugin out of {}", path.display());
            }
            if changed.is_empty() {
                say!("unchanged");
            }
            Ok(())
        }
    }
}

fn in_folders(folders: CniFolders) -> Folders {
    Folders { configurations: folders.cni_conf_dir, binaries: folders.cni_bin_dir }
}

fn plugin() -> Result<()> {
    match Call::read().context("reading the configuration from standard input")?.perform() {
        Ok(None) => Ok(()),
        Ok(Some(result)) => {
            say!("{}", escape::json(&result)?);
            Ok(())
        }
        Err(error) => {
            say!("{}", escape::json(&error)?);
            Err(Failed::Told.into())
        }
    }
}
