//! A bpffs that lives as long as its guard: what is pinned there goes with it.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use super::{complain, name};

/// bpffs itself takes no names with dots, so the mounts are elsewhere.
pub const FOLDER: &str = "/run";

/// A bpffs of its owner's alone.
#[derive(Debug)]
pub struct BpffsMount {
    path: PathBuf,
}

impl BpffsMount {
    /// A new, empty one.
    pub fn new(label: &str) -> Result<Self> {
        let bpffs = Self::folder(label)?;
        mount("bpf", &bpffs.path, "bpf", MountFlags::empty(), Some(c"mode=0700"))
            .with_context(|| format!("mounting a bpffs at {}", bpffs.path.display()))?;
        Ok(bpffs)
    }

    /// Only the folder, for the agent to mount one on.
    pub fn folder(label: &str) -> Result<Self> {
        let path = Path::new(FOLDER).join(name::fresh(&format!("{label}-bpf")));
        fs::create_dir(&path).with_context(|| format!("making {}", path.display()))?;
        Ok(Self { path })
    }

    /// Where it is mounted, as `--bpffs` takes it.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for BpffsMount {
    fn drop(&mut self) {
        if let Err(error) = remove(&self.path) {
            complain(&format_args!("removing the bpffs {}: {error}", self.path.display()));
        }
    }
}

/// Unmounts what is mounted there, and removes the folder. A process that outlived the mount may have written into it.
pub(super) fn remove(path: &Path) -> std::io::Result<()> {
    loop {
        match unmount(path, UnmountFlags::DETACH) {
            Ok(()) => {}
            // Not a mount point, or not any more.
            Err(rustix::io::Errno::INVAL) => return fs::remove_dir_all(path),
            Err(error) => return Err(error.into()),
        }
    }
}
