//! `cni`: the plugin and its installation.

use std::{collections::BTreeSet, path::Path};

use anyhow::{Context as _, Result};

use super::{Failed, print_line};
use crate::{
    cli::{CniArgs, CniCommand, CniFolders, CniPlugin, SelectPods, SidecarMesh},
    cni::{
        Call,
        install::{self, Folders, Installed, Mode, Plugin, PluginEntry},
    },
    daemon::mesh::Mesh,
    escape,
};

pub(super) fn cni(args: CniArgs) -> Result<()> {
    match args.command {
        None => plugin(),
        Some(CniCommand::Install { plugin, socket, options }) => {
            match in_place(plugin, &socket.socket, &options).install()? {
                Installed { path, changed: true } => print_line!("added the plugin to {}", path.display()),
                Installed { changed: false, .. } => print_line!("unchanged"),
            }
            Ok(())
        }
        Some(CniCommand::Uninstall { folders }) => {
            let changed = install::uninstall(&in_folders(folders))?;
            for path in &changed {
                print_line!("removed the plugin from {}", path.display());
            }
            if changed.is_empty() {
                print_line!("unchanged");
            }
            Ok(())
        }
    }
}

/// Returns the plugin that the command line describes.
pub(super) fn in_place(plugin: CniPlugin, socket: &Path, options: &[String]) -> Plugin {
    let select = match plugin.select {
        SelectPods::Sidecar => "sidecar",
        SelectPods::All => "all",
    };
    let entry = PluginEntry {
        socket,
        select,
        mesh: plugin.mesh.into(),
        exclude_namespaces: &plugin.excluded(),
        arguments: options,
    }
    .json();
    let mode = match plugin.cni_standalone {
        Some(network) => Mode::Standalone { network },
        None => Mode::Chained { file: plugin.cni_conf_name },
    };
    Plugin { folders: in_folders(plugin.folders), mode, entry, binary: install::OWN_BINARY.into() }
}

impl CniPlugin {
    /// The namespaces whose pods are ignored.
    pub(super) fn excluded(&self) -> BTreeSet<String> {
        self.exclude_namespaces.iter().filter(|name| !name.is_empty()).cloned().collect()
    }
}

impl From<SidecarMesh> for Mesh {
    fn from(mesh: SidecarMesh) -> Self {
        match mesh {
            SidecarMesh::Istio => Self::Istio,
            SidecarMesh::Linkerd => Self::Linkerd,
            SidecarMesh::Kuma => Self::Kuma,
            SidecarMesh::Consul => Self::Consul,
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
            print_line!("{}", escape::json(&result)?);
            Ok(())
        }
        Err(error) => {
            print_line!("{}", escape::json(&error)?);
            Err(Failed::Reported.into())
        }
    }
}
