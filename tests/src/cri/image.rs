//! An image with nothing but busybox, made here so that nothing is pulled.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use serde_json::json;

#[path = "../../../xtask/src/image/archive.rs"]
mod archive;

/// What is linked to busybox.
const PROGRAMS: [&str; 3] = ["sh", "nc", "sleep"];

/// Make the archive in a folder.
pub(super) fn make(folder: &Path, name: &str) -> Result<PathBuf> {
    let root = folder.join("root");
    for path in ["bin", "etc", "usr", "lib", "lib64", "proc", "sys", "dev", "tmp"] {
        fs::create_dir_all(root.join(path))?;
    }
    let busybox = ["/bin/busybox", "/usr/bin/busybox"].into_iter().find(|path| Path::new(path).is_file());
    let busybox = busybox.context("there is no busybox: install busybox-static")?;
    fs::copy(busybox, root.join("bin/busybox"))?;
    for program in PROGRAMS {
        symlink("busybox", root.join("bin").join(program))?;
    }
    let archive = folder.join("image.tar");
    let config = json!({ "Cmd": ["/bin/sleep", "3600"], "Env": ["PATH=/bin:/usr/bin"] });
    let architecture = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };
    drop(archive::write(&[archive::Platform { architecture, root: &root }], &config, name, &archive)?);
    Ok(archive)
}
