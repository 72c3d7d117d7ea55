//! Putting the plugin into a node's configuration, and taking it out.
//!
//! Each file is replaced by a rename: the runtime sees the old one or the new one.

use std::{
    fs,
    io::{self, BufReader, Read},
    os::unix::fs::{MetadataExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
};

use serde_json::{Value, json};

use super::{
    PLUGIN, VERSIONS,
    chain::{self, ConfFile, Inserted},
};

/// Kept beside a configuration of one plugin, which becomes a list while ours is in it.
const SAVED: &str = "before-intercept";
/// The file of a plugin that is not chained. The last by name, so that no runtime takes it for the node's network.
const STANDALONE: &str = "zzz-intercept-cni.conf";

/// This process's own binary, which is also the plugin.
pub const OWN_BINARY: &str = "/proc/self/exe";

/// Where a node has its CNI files.
#[derive(Clone, Debug)]
pub struct Folders {
    /// Configurations, /etc/cni/net.d.
    pub configurations: PathBuf,
    /// Plugins, /opt/cni/bin.
    pub binaries: PathBuf,
}

/// How the plugin comes to be called.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Mode {
    /// By the runtime, after the plugins that make the pod's network.
    Chained {
        /// The file of this name rather than the one that the runtime takes.
        file: Option<String>,
    },
    /// By Multus, for pods that name this network: in a file of its own.
    Standalone {
        /// The network's name.
        network: String,
    },
}

/// The plugin, as it is to be installed.
#[derive(Clone, Debug)]
pub struct Plugin {
    /// Where.
    pub folders: Folders,
    /// How it comes to be called.
    pub mode: Mode,
    /// Its entry, of [`entry`].
    pub entry: Value,
    /// What is copied: [`OWN_BINARY`].
    pub binary: PathBuf,
}

/// What [`Plugin::install`] did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Installed {
    /// The file that has the plugin.
    pub path: PathBuf,
    /// Whether a configuration was changed.
    pub changed: bool,
}

/// A step failed. What was there before still is.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "each is its text")]
pub enum InstallError {
    #[error("{action} {path}")]
    File { action: &'static str, path: String, source: io::Error },
    #[error("reading {path}: it is no JSON; mend or remove it")]
    Json { path: String, source: serde_json::Error },
    #[error("reading {path}: it is neither a list of plugins nor the configuration of one")]
    Shape { path: String },
    #[error(
        "looking for the node's CNI configuration in {folder}: there is none that a runtime could use yet; install when \
         the node's network plugin has written its own{broken}"
    )]
    NoConfiguration { folder: String, broken: String },
    #[error(
        "{path} is Multus's, and no file in its folder is what it delegates to; name the file of the cluster's network \
         with --cni-conf-name"
    )]
    NoDelegate { path: String },
    #[error(
        "{path} is the configuration of one plugin, which Multus reads by this name: make it a .conflist"
    )]
    SingleDelegate { path: String },
    #[error(
        "{path} is of CNI version {version}, which does not chain plugins as {newest} does; it must be one of {all}",
        newest = VERSIONS[VERSIONS.len() - 1], all = VERSIONS.join(", ")
    )]
    Version { path: String, version: String },
}

fn at<'a>(action: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> InstallError + use<'a> {
    move |source| InstallError::File { action, path: path.display().to_string(), source }
}

impl Plugin {
    /// Copy this binary, and have the configuration name it. Changes nothing that is as it should be.
    pub fn install(&self) -> Result<Installed, InstallError> {
        match &self.mode {
            Mode::Chained { file } => self.chain(file.as_deref()),
            Mode::Standalone { network } => self.stand_alone(network),
        }
    }

    fn chain(&self, named: Option<&str>) -> Result<Installed, InstallError> {
        let folder = &self.folders.configurations;
        let converted = named.map(|name| Path::new(name).with_extension("conflist"));
        // A named file of one plugin became a list.
        let named = match (named, &converted) {
            (Some(name), Some(list)) if !folder.join(name).exists() && folder.join(list).exists() => {
                list.to_str()
            }
            _ => named,
        };
        let mut edits = Vec::new();
        for (mut file, place) in chain::targets(folder, named)? {
            let inserted = file.insert(place, &self.entry)?;
            edits.push((file, inserted));
        }
        // The binary first: a configuration that names what is not there would stop every pod.
        copy_binary(&self.binary, &self.folders.binaries)?;
        let mut installed = None;
        for (file, inserted) in edits {
            let one = Installed { changed: inserted != Inserted::Unchanged, path: file.path.clone() };
            let one = match inserted {
                Inserted::IntoNewList
                    if file.path.extension().is_some_and(|kind| kind != "conflist") && !is_multus(&file) =>
                {
                    let target = file.path.with_extension("conflist");
                    write(&target, &file.content)?;
                    fs::rename(&file.path, saved(&file.path)).map_err(at("setting aside", &file.path))?;
                    Installed { path: target, ..one }
                }
                Inserted::IntoNewList | Inserted::IntoList => {
                    write(&file.path, &file.content)?;
                    one
                }
                Inserted::Unchanged => one,
            };
            let first = installed.get_or_insert_with(|| one.clone());
            first.changed |= one.changed;
        }
        Ok(installed.expect("there is a target, or an error"))
    }

    fn stand_alone(&self, network: &str) -> Result<Installed, InstallError> {
        let path = self.folders.configurations.join(STANDALONE);
        let mut content = json!({ "cniVersion": "0.3.1", "name": network, "standalone": true });
        if let (Some(content), Some(entry)) = (content.as_object_mut(), self.entry.as_object()) {
            content.extend(entry.clone());
        }
        copy_binary(&self.binary, &self.folders.binaries)?;
        let changed = ConfFile::read(&path).map_or(true, |file| file.content != content);
        if changed {
            write(&path, &content)?;
        }
        Ok(Installed { path, changed })
    }
}

/// Take the plugin out of every list, and its binary away. Goes on after a failure. Says which files were changed.
pub fn uninstall(folders: &Folders) -> Result<Vec<PathBuf>, InstallError> {
    let mut changed = Vec::new();
    let mut failed = None;
    for path in chain::configurations(&folders.configurations)? {
        match take_out(&path) {
            Ok(true) => changed.push(path),
            Ok(false) => {}
            Err(error) => failed = Some(error),
        }
    }
    if let Some(error) = failed {
        // The binary stays while a list may name it.
        return Err(error);
    }
    let binary = folders.binaries.join(PLUGIN);
    match fs::remove_file(&binary) {
        Ok(()) => changed.push(binary),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(at("removing", &binary)(error)),
    }
    Ok(changed)
}

fn take_out(path: &Path) -> Result<bool, InstallError> {
    let Ok(mut file) = ConfFile::read(path) else { return Ok(false) };
    if file.is_standalone() {
        fs::remove_file(path).map_err(at("removing", path))?;
        return Ok(true);
    }
    if !file.take_out() {
        return Ok(false);
    }
    let originals = ["conf", "json"].map(|kind| path.with_extension(kind));
    match originals.iter().find(|single| saved(single).exists()) {
        // Written again by its owner meanwhile: what was set aside is older.
        Some(single) if single.exists() => {
            fs::remove_file(saved(single)).map_err(at("removing", &saved(single)))?;
            fs::remove_file(path).map_err(at("removing", path))?;
        }
        Some(single) => {
            fs::rename(saved(single), single).map_err(at("restoring", single))?;
            fs::remove_file(path).map_err(at("removing", path))?;
        }
        None => write(path, &file.content)?,
    }
    Ok(true)
}

/// The plugin's entry in a list.
pub fn entry(socket: &Path, select: &str, arguments: &[String]) -> Value {
    let mut entry = json!({
        "type": PLUGIN,
        "socket": socket,
        "select": select,
        "capabilities": { "io.kubernetes.cri.pod-annotations": true, "cgroupPath": true },
    });
    if !arguments.is_empty() {
        entry["arguments"] = json!(arguments);
    }
    entry
}

fn is_multus(file: &ConfFile) -> bool {
    file.content.get("delegates").is_some()
}

fn saved(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".");
    name.push(SAVED);
    name.into()
}

fn write(path: &Path, content: &Value) -> Result<(), InstallError> {
    let mut text = serde_json::to_vec_pretty(content).expect("JSON that was read");
    text.push(b'\n');
    let mode = fs::metadata(path).ok().map(|metadata| metadata.permissions());
    replace(path, &mut text.as_slice(), mode)
}

fn copy_binary(own: &Path, folder: &Path) -> Result<(), InstallError> {
    let target = folder.join(PLUGIN);
    let open = |path| fs::File::open(path).map_err(at("reading", path));
    let mut source = open(own)?;
    if let Ok(there) = fs::File::open(&target)
        && is_executable(&there)
        && same(&source, &there).map_err(at("reading", &target))?
    {
        return Ok(());
    }
    fs::create_dir_all(folder).map_err(at("creating folder", folder))?;
    source = open(own)?;
    replace(&target, &mut source, Some(fs::Permissions::from_mode(0o755)))
}

fn is_executable(file: &fs::File) -> bool {
    file.metadata().is_ok_and(|metadata| metadata.is_file() && metadata.mode() & 0o111 == 0o111)
}

/// Whether two files have the same content, without holding them in memory.
fn same(a: &fs::File, b: &fs::File) -> io::Result<bool> {
    if a.metadata()?.len() != b.metadata()?.len() {
        return Ok(false);
    }
    let (mut a, mut b) = (BufReader::with_capacity(1 << 16, a), BufReader::with_capacity(1 << 16, b));
    let (mut left, mut right) = (vec![0; 1 << 16], vec![0; 1 << 16]);
    loop {
        let read = a.read(&mut left)?;
        if read == 0 {
            return Ok(true);
        }
        match b.read_exact(&mut right[..read]) {
            Ok(()) if left[..read] == right[..read] => {}
            Ok(()) => return Ok(false),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(false),
            Err(error) => return Err(error),
        }
    }
}

/// Write beside, then rename. The name does not count as a configuration's.
fn replace(path: &Path, content: &mut impl Read, mode: Option<fs::Permissions>) -> Result<(), InstallError> {
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let beside = path.with_file_name(format!(".{name}.intercept-{}", std::process::id()));
    let written = || {
        let mut file = fs::File::create(&beside)?;
        io::copy(content, &mut file)?;
        if let Some(mode) = mode {
            fs::set_permissions(&beside, mode)?;
        }
        file.sync_all()?;
        fs::rename(&beside, path)
    };
    written().map_err(|error| {
        drop(fs::remove_file(&beside));
        at("writing", path)(error)
    })
}

#[cfg(test)]
mod tests;
