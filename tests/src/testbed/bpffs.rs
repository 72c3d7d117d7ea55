//! A bpffs that is mounted as long as its guard lives. Unmounting it removes its pins.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use super::{complain, name};

/// Where the mounts are. Not below a bpffs: names there may not contain dots.
pub const FOLDER: &str = "/run";

/// A mounted bpffs, or the folder for one.
#[derive(Debug)]
pub struct BpffsMount {
    path: PathBuf,
}

impl BpffsMount {
    /// Mounts a new bpffs.
    pub fn new(label: &str) -> Result<Self> {
        let bpffs = Self::folder(label)?;
        mount("bpf", &bpffs.path, "bpf", MountFlags::empty(), Some(c"mode=0700"))
            .with_context(|| format!("mounting a bpffs at {}", bpffs.path.display()))?;
        Ok(bpffs)
    }

    /// Creates only the folder, on which the agent mounts a bpffs.
    pub fn folder(label: &str) -> Result<Self> {
        let path = Path::new(FOLDER).join(name::fresh(&format!("{label}-bpf")));
        fs::create_dir(&path).with_context(|| format!("making {}", path.display()))?;
        Ok(Self { path })
    }

    /// The mount point, for `--bpffs`.
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

/// Unmounts everything at `path` and removes the folder, which may contain files: a process that outlived the mount
/// can have written them.
pub(super) fn remove(path: &Path) -> std::io::Result<()> {
    loop {
        match unmount(path, UnmountFlags::DETACH) {
            Ok(()) => {}
            // Nothing is mounted here (any more).
            Err(rustix::io::Errno::INVAL) => return fs::remove_dir_all(path),
            Err(error) => return Err(error.into()),
        }
    }
}
