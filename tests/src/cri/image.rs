//! Images with busybox, built locally so that nothing is pulled.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use serde_json::json;

#[path = "../../../xtask/src/image/archive.rs"]
mod archive;

/// Names that link to busybox.
const PROGRAMS: [&str; 5] = ["sh", "nc", "sleep", "timeout", "wget"];

/// Creates the archive of an image with busybox only.
pub(super) fn make(folder: &Path, name: &str) -> Result<PathBuf> {
    let root = folder.join("busybox");
    busybox(&root)?;
    make_archive(&root, &["/bin/sleep", "3600"], name, &folder.join("busybox.tar"))
}

/// Creates the files of an image with busybox. Returns the folder of its programs.
pub fn busybox(root: &Path) -> Result<PathBuf> {
    for path in ["bin", "etc", "usr", "lib", "lib64", "proc", "sys", "dev", "tmp"] {
        fs::create_dir_all(root.join(path))?;
    }
    let busybox = ["/bin/busybox", "/usr/bin/busybox"].into_iter().find(|path| Path::new(path).is_file());
    let busybox = busybox.context("there is no busybox: install busybox-static")?;
    fs::copy(busybox, root.join("bin/busybox"))?;
    for program in PROGRAMS {
        symlink("busybox", root.join("bin").join(program))?;
    }
    Ok(root.join("bin"))
}

/// Creates the archive of an image of these files. A pod may pass its own arguments.
pub fn make_archive(root: &Path, program: &[&str], name: &str, to: &Path) -> Result<PathBuf> {
    let config = json!({ "Entrypoint": program, "Env": ["PATH=/bin:/usr/bin:/usr/local/bin"] });
    let architecture = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };
    let platform = archive::Platform { architecture, root };
    drop(archive::write(&[platform], &config, name, archive::GzipLevel(1), to)?);
    Ok(to.to_owned())
}
