//! Finds the executables that the testbed starts.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use tempfile::TempDir;

use crate::testbed::name;

/// Finds a binary of this workspace: at the path in the environment variable, else in the folder of the running
/// executable or in its parent, where cargo puts it.
pub fn locate(name: &str, variable: &str) -> Result<PathBuf> {
    if let Some(path) = std::env::var_os(variable) {
        return Ok(path.into());
    }
    let here = std::env::current_exe().context("finding the running executable")?;
    for folder in here.ancestors().skip(1).take(2) {
        let path = folder.join(name);
        if path.is_file() {
            return Ok(path);
        }
    }
    bail!("no {name} near {}: build it, or set {variable}", here.display());
}

/// A copy of an executable that every user may run. Other users have no access to a checkout in root's home.
#[derive(Debug)]
pub struct ReadableCopy {
    path: PathBuf,
    _folder: TempDir,
}

impl ReadableCopy {
    /// Copies `original` into a new temporary folder.
    pub fn of(original: &Path) -> Result<Self> {
        let folder = name::scratch("copy").context("making a folder")?;
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755))?;
        let name = original.file_name().with_context(|| format!("{} is no file", original.display()))?;
        let path = folder.path().join(name);
        // Not by this process: a child that another thread starts meanwhile would hold the file open for writing until it
        // executes, and the file could not be executed.
        let copied = Command::new("cp").arg("--").args([original, &path]).status().context("running cp")?;
        ensure!(copied.success(), "copying {}: cp failed", original.display());
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
        Ok(Self { path, _folder: folder })
    }

    /// The copy.
    pub fn path(&self) -> &Path {
        &self.path
    }
}
