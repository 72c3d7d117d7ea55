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
const LAYER: &str = "application/vnd.oci.image.layer.v1.tar+gzip";

/// The image's files for an architecture.
pub(crate) struct Platform<'a> {
    /// As image formats call it: "amd64".
    pub(crate) architecture: &'a str,
    /// The folder with the files.
    pub(crate) root: &'a Path,
}

/// How the layer is compressed: 9 for what is sent often, 1 for what is read once.
#[derive(Clone, Copy)]
pub(crate) struct GzipLevel(pub(crate) u8);

/// Write the image of this name; `config` is what Dockerfiles set. Returns its digest, by which registries know it. The
/// same files give the same image.
pub(crate) fn write(
    platforms: &[Platform<'_>],
    config: &Value,
    name: &str,
    level: GzipLevel,
    to: &Path,
) -> Result<String> {
    let parts = to.with_extension("parts");
    // Of a run that was killed.
    drop(fs::remove_dir_all(&parts));
    let layout = Layout { folder: &parts, level };
    fs::create_dir_all(parts.join("blobs/sha256")).with_context(|| format!("making {}", parts.display()))?;

    let mut manifests = Vec::new();
    let mut compatible = None;
    for platform in platforms {
        let (layer, contents) = layout.layer(platform.root)?;
        let config = layout.json(
            CONFIG,
            &json!({
                "architecture": platform.architecture,
                "os": "linux",
                "config": config,
                "rootfs": { "type": "layers", "diff_ids": [contents] },
            }),
        )?;
        let manifest =
            json!({ "schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": [layer] });
        let mut manifest = layout.json(MANIFEST, &manifest)?;
        manifest["platform"] = json!({ "architecture": platform.architecture, "os": "linux" });
        manifests.push(manifest);
        let of_docker = json!([{ "Config": blob(&config), "RepoTags": [name], "Layers": [blob(&layer)] }]);
        compatible.get_or_insert(of_docker);
    }
    let compatible = compatible.context("an image for no architecture")?;
    let mut image =
        layout.json(INDEX, &json!({ "schemaVersion": 2, "mediaType": INDEX, "manifests": manifests }))?;
    image["annotations"] = json!({ "io.containerd.image.name": full_name(name), "org.opencontainers.image.ref.name": tag(name) });
    layout.file("index.json", &json!({ "schemaVersion": 2, "mediaType": INDEX, "manifests": [image] }))?;
    layout.file("oci-layout", &json!({ "imageLayoutVersion": "1.0.0" }))?;
    layout.file("manifest.json", &compatible)?;
    tar(&parts, to)?;
    fs::remove_dir_all(&parts).with_context(|| format!("removing {}", parts.display()))?;
    Ok(image["digest"].as_str().unwrap_or_default().to_owned())
}

/// A folder with blobs by digest.
struct Layout<'a> {
    folder: &'a Path,
    level: GzipLevel,
}

impl Layout<'_> {
    /// Adds a folder as a layer; returns its descriptor, and the digest of what is compressed in it.
    fn layer(&self, root: &Path) -> Result<(Value, String)> {
        let layer = self.folder.join("layer");
        tar(root, &layer)?;
        let contents = digest(&layer)?;
        let level = format!("-{}", self.level.0);
        output(Command::new("gzip").args(["-n", &level, "--suffix", ".gz"]).arg(&layer))?;
        Ok((self.blob(LAYER, &layer.with_extension("gz"))?, contents))
    }

    /// Adds a document; returns its descriptor.
    fn json(&self, media_type: &str, content: &Value) -> Result<Value> {
        self.file("document", content)?;
        self.blob(media_type, &self.folder.join("document"))
    }

    /// Makes a file a blob; returns its descriptor.
    fn blob(&self, media_type: &str, file: &Path) -> Result<Value> {
        let size = fs::metadata(file).with_context(|| format!("reading {}", file.display()))?.len();
        let descriptor = json!({ "mediaType": media_type, "digest": digest(file)?, "size": size });
        let place = self.folder.join(blob(&descriptor));
        fs::rename(file, &place).with_context(|| format!("making {}", place.display()))?;
        Ok(descriptor)
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
    match name.split_once('/') {
        None => format!("docker.io/library/{name}"),
        Some((registry, _)) if registry.contains(['.', ':']) || registry == "localhost" => name.to_owned(),
        Some(_) => format!("docker.io/{name}"),
    }
}

fn digest(file: &Path) -> Result<String> {
    let sum = output(Command::new("sha256sum").arg("--").arg(file))?;
    let sum = sum.split(' ').next().context("sha256sum says nothing")?;
    Ok(format!("sha256:{sum}"))
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
