//! Removal of what killed runs left.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};

use super::{bpffs, cgroup, name, namespace};

/// Removes the namespaces, cgroups and bpffs mounts of processes that are dead. Returns their paths.
pub fn sweep() -> Result<Vec<PathBuf>> {
    let mut removed = Vec::new();
    for (path, owner) in ours()? {
        if alive(owner) {
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

/// The namespaces, cgroups and bpffs mounts that process `owner` made and has not removed.
pub fn leftovers(owner: u32) -> Result<Vec<PathBuf>> {
    Ok(ours()?.into_iter().filter(|(_, pid)| *pid == owner).map(|(path, _)| path).collect())
}

fn ours() -> Result<Vec<(PathBuf, u32)>> {
    let mut found = Vec::new();
    for folder in [PathBuf::from(namespace::FOLDER), PathBuf::from(bpffs::FOLDER), cgroup::mount_point()?] {
        let Ok(entries) = fs::read_dir(&folder) else { continue };
        for entry in entries {
            let entry = entry.with_context(|| format!("listing {}", folder.display()))?;
            if let Some(owner) = entry.file_name().to_str().and_then(name::owner) {
                found.push((entry.path(), owner));
            }
        }
    }
    Ok(found)
}

fn alive(pid: u32) -> bool {
    i32::try_from(pid)
        .ok()
        .and_then(rustix::process::Pid::from_raw)
        .is_some_and(|pid| rustix::process::test_kill_process(pid) != Err(rustix::io::Errno::SRCH))
}
