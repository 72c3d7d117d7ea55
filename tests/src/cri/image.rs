//! An image with nothing but busybox, made here so that nothing is pulled.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};
use serde_json::json;

use crate::agent::succeed;

/// What is linked to busybox.
const PROGRAMS: [&str; 3] = ["sh", "nc", "sleep"];

/// Make the archive in a folder, in the form of `docker save`.
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
    let tar = |archive: &Path, of: &Path| {
        let mut tar = Command::new("tar");
        tar.arg("-C")
            .arg(of)
            .args(["--owner=0", "--group=0", "--numeric-owner", "-cf"])
            .arg(archive)
            .arg(".");
        succeed(tar)
    };
    let image = folder.join("image");
    fs::create_dir(&image)?;
    let layer = image.join("layer.tar");
    tar(&layer, &root)?;
    let mut sum = Command::new("sha256sum");
    sum.arg(&layer);
    let sum = succeed(sum)?;
    let digest = sum.split(' ').next().context("no digest")?;
    let config = json!({
        "architecture": if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" },
        "os": "linux",
        "config": { "Cmd": ["/bin/sleep", "3600"], "Env": ["PATH=/bin:/usr/bin"] },
        "rootfs": { "type": "layers", "diff_ids": [format!("sha256:{digest}")] },
    });
    fs::write(image.join("config.json"), config.to_string())?;
    let manifest = json!([{ "Config": "config.json", "RepoTags": [name], "Layers": ["layer.tar"] }]);
    fs::write(image.join("manifest.json"), manifest.to_string())?;
    let archive = folder.join("image.tar");
    tar(&archive, &image)?;
    Ok(archive)
}
