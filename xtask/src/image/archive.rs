//! An image of one layer, as an archive in the form of `docker save`: `docker load`, `podman load` and `ctr images import`
//! take it.

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

/// Write the image of this name with what is in the folder `root`; `config` is what Dockerfiles set. The same files
/// give the same image.
pub(crate) fn write(root: &Path, config: &Value, name: &str, to: &Path) -> Result<()> {
    let parts = to.with_extension("parts");
    // Of a run that was killed.
    drop(fs::remove_dir_all(&parts));
    fs::create_dir_all(&parts).with_context(|| format!("making {}", parts.display()))?;
    tar(root, &parts.join("layer.tar"))?;
    let sum = output(Command::new("sha256sum").arg("--").arg(parts.join("layer.tar")))?;
    let digest = sum.split(' ').next().context("sha256sum says nothing")?;
    let config = json!({
        "architecture": if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" },
        "os": "linux",
        "config": config,
        "rootfs": { "type": "layers", "diff_ids": [format!("sha256:{digest}")] },
    });
    let manifest = json!([{ "Config": "config.json", "RepoTags": [name], "Layers": ["layer.tar"] }]);
    for (file, content) in [("config.json", config), ("manifest.json", manifest)] {
        fs::write(parts.join(file), content.to_string()).with_context(|| format!("writing {file}"))?;
    }
    tar(&parts, to)?;
    fs::remove_dir_all(&parts).with_context(|| format!("removing {}", parts.display()))
}

fn tar(folder: &Path, to: &Path) -> Result<()> {
    let mut tar = Command::new("tar");
    tar.args(["--sort=name", "--mtime=@0", "--owner=0", "--group=0", "--numeric-owner", "--format=ustar"]);
    output(tar.arg("-C").arg(folder).arg("-cf").arg(to).arg(".")).map(drop)
}

fn output(command: &mut Command) -> Result<String> {
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("starting {command:?}"))?;
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{command:?}: {}: {errors}", output.status);
    Ok(String::from_utf8(output.stdout)?)
}
