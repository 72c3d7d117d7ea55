//! Removal of what killed runs left.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};

use super::{
    bpffs, cgroup,
    name::{self, Maker},
    namespace,
};

/// Removes the namespaces, cgroups and bpffs mounts of processes that are dead. Returns their paths.
pub fn sweep() -> Result<Vec<PathBuf>> {
    let mut removed = Vec::new();
    for (path, maker) in ours()? {
        if maker.is_alive() {
            continue;
        }
        if path.starts_with(namespace::FOLDER) {
            namespace::remove(&path).with_context(|| format!("removing the namespace {}", path.display()))?;
        } else if path.starts_with(bpffs::FOLDER) {
            bpffs::remove(&path).with_context(|| format!("removing the bpffs {}", path.display()))?;
        } else {
            cgroup::remove(&path).with_context(|| format!("removing the cgroup {}", path.display()))?;
        }
        removed.push(path);
    }
    Ok(removed)
}

/// The namespaces, cgroups and bpffs mounts that the process `pid` of this PID namespace made and has not removed.
pub fn leftovers(pid: u32) -> Result<Vec<PathBuf>> {
    let wanted = Maker::of(pid);
    Ok(ours()?.into_iter().filter(|(_, maker)| *maker == wanted).map(|(path, _)| path).collect())
}

fn ours() -> Result<Vec<(PathBuf, Maker)>> {
    let mut found = Vec::new();
    for folder in [PathBuf::from(namespace::FOLDER), PathBuf::from(bpffs::FOLDER), cgroup::mount_point()?] {
        let Ok(entries) = fs::read_dir(&folder) else { continue };
        for entry in entries {
            let entry = entry.with_context(|| format!("listing {}", folder.display()))?;
            if let Some(maker) = entry.file_name().to_str().and_then(name::maker) {
                found.push((entry.path(), maker));
            }
        }
    }
    Ok(found)
}
