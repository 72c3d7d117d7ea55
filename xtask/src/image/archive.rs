//! An image of one layer, for one architecture or several, as an archive of an OCI image layout: `ctr images import`,
//! `podman load` and newer versions of `docker load` take it. Older ones read `manifest.json`, which has the first
//! architecture alone.

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

const INDEX: &str = "application/vnd.oci.image.index.v1+json";
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";

/// The image's files for an architecture.
pub(crate) struct Platform<'a> {
    /// As image formats call it: "amd64".
    pub(crate) architecture: &'a str,
    /// The folder with the files.
    pub(crate) root: &'a Path,
}

/// Write the image of this name; `config` is what Dockerfiles set. The same files give the same image.
pub(crate) fn write(platforms: &[Platform<'_>], config: &Value, name: &str, to: &Path) -> Result<()> {
    let parts = to.with_extension("parts");
    // Of a run that was killed.
    drop(fs::remove_dir_all(&parts));
    let layout = Layout { folder: &parts };
    fs::create_dir_all(parts.join("blobs/sha256")).with_context(|| format!("making {}", parts.display()))?;

    let mut manifests = Vec::new();
    let mut compatible = None;
    for platform in platforms {
        let layer = layout.layer(platform.root)?;
        let config = layout.json(
            CONFIG,
            &json!({
                "architecture": platform.architecture,
                "os": "linux",
                "config": config,
                "rootfs": { "type": "layers", "diff_ids": [layer["digest"]] },
            }),
        )?;
        let manifest = json!({ "schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": [layer] });
        let mut manifest = layout.json(MANIFEST, &manifest)?;
        manifest["platform"] = json!({ "architecture": platform.architecture, "os": "linux" });
        manifests.push(manifest);
        let of_docker = json!([{ "Config": blob(&config), "RepoTags": [name], "Layers": [blob(&layer)] }]);
        compatible.get_or_insert(of_docker);
    }
    let compatible = compatible.context("an image for no architecture")?;
    let mut image = layout.json(INDEX, &json!({ "schemaVersion": 2, "mediaType": INDEX, "manifests": manifests }))?;
    image["annotations"] = json!({ "io.containerd.image.name": full_name(name), "org.opencontainers.image.ref.name": tag(name) });
    layout.file("index.json", &json!({ "schemaVersion": 2, "mediaType": INDEX, "manifests": [image] }))?;
    layout.file("oci-layout", &json!({ "imageLayoutVersion": "1.0.0" }))?;
    layout.file("manifest.json", &compatible)?;
    tar(&parts, to)?;
    fs::remove_dir_all(&parts).with_context(|| format!("removing {}", parts.display()))
}

/// A folder with blobs by digest.
struct Layout<'a> {
    folder: &'a Path,
}

impl Layout<'_> {
    /// Adds a folder as a layer; returns its descriptor.
    fn layer(&self, root: &Path) -> Result<Value> {
        let layer = self.folder.join("layer");
        tar(root, &layer)?;
        self.blob(LAYER, &layer)
    }

    /// Adds a document; returns its descriptor.
    fn json(&self, media_type: &str, content: &Value) -> Result<Value> {
        self.file("document", content)?;
        self.blob(media_type, &self.folder.join("document"))
    }

    /// Makes a file a blob; returns its descriptor.
    fn blob(&self, media_type: &str, file: &Path) -> Result<Value> {
        let sum = output(Command::new("sha256sum").arg("--").arg(file))?;
        let digest = sum.split(' ').next().context("sha256sum says nothing")?;
        let size = fs::metadata(file).with_context(|| format!("reading {}", file.display()))?.len();
        let place = self.folder.join("blobs/sha256").join(digest);
        fs::rename(file, &place).with_context(|| format!("making {}", place.display()))?;
        Ok(json!({ "mediaType": media_type, "digest": format!("sha256:{digest}"), "size": size }))
    }

    fn file(&self, name: &str, content: &Value) -> Result<()> {
        let path = self.folder.join(name);
        fs::write(&path, content.to_string()).with_context(|| format!("writing {}", path.display()))
    }
}

/// Where the blob of a descriptor is in the archive.
fn blob(descriptor: &Value) -> String {
    format!("blobs/{}", descriptor["digest"].as_str().unwrap_or_default().replace(':', "/"))
}

/// The name as containerd has it, which knows no short ones.
fn full_name(name: &str) -> String {
    if name.contains('/') { name.to_owned() } else { format!("docker.io/library/{name}") }
}

fn tag(name: &str) -> &str {
    name.rsplit_once(':').map_or("latest", |(_, tag)| tag)
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
