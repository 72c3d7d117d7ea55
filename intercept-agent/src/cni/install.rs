//! Installs the plugin in a node's CNI configuration, and removes it.
//!
//! Files are replaced by rename, so that the runtime reads either the old or the new version.

use std::{
    collections::BTreeSet,
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
use crate::daemon::mesh::Mesh;

/// Suffix of the copy of a single plugin's configuration, which is a list while the plugin is installed.
const SAVED: &str = "before-intercept";
/// File name of a plugin that is not chained. It sorts last, so that no runtime uses it as the node's network.
const STANDALONE: &str = "zzz-intercept-cni.conf";
/// What precedes the number of the process in the names of temporary files.
const TEMPORARY: &str = ".intercept-";
/// How often an edit is started again if others write the file meanwhile.
const ATTEMPTS: usize = 8;

/// This process's binary, which is also the plugin.
pub const OWN_BINARY: &str = "/proc/self/exe";

/// The node's CNI directories.
#[derive(Clone, Debug)]
pub struct Folders {
    /// Directory of configurations, /etc/cni/net.d.
    pub configurations: PathBuf,
    /// Directory of plugins, /opt/cni/bin.
    pub binaries: PathBuf,
}

/// How the plugin is called.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Mode {
    /// By the runtime, after the plugins that create the pod's network.
    Chained {
        /// Name of the file to edit instead of the one that the runtime uses.
        file: Option<String>,
    },
    /// By Multus, for pods that name this network, which has a file of its own.
    Standalone {
        /// Name of the network.
        network: String,
    },
}

/// The plugin and how it is installed.
#[derive(Clone, Debug)]
pub struct Plugin {
    /// Where it is installed.
    pub folders: Folders,
    /// How it is called.
    pub mode: Mode,
    /// Its entry, from [`PluginEntry::json`].
    pub entry: Value,
    /// The file to copy: [`OWN_BINARY`].
    pub binary: PathBuf,
}

/// The result of [`Plugin::install`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Installed {
    /// The file with the plugin's entry.
    pub path: PathBuf,
    /// Whether a configuration has changed.
    pub changed: bool,
}

/// Why the plugin cannot be installed or removed. The previous configuration is still in place.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "each is its text")]
pub enum InstallError {
    #[error("{action} {path}")]
    File { action: &'static str, path: String, source: io::Error },
    #[error("reading {path}: it is not valid JSON; correct or remove it")]
    Json { path: String, source: serde_json::Error },
    #[error("reading {path}: it is neither a list of plugins nor the configuration of one")]
    Shape { path: String },
    #[error(
        "looking for the node's CNI configuration in {folder}: there is no usable configuration yet; install when \
         the node's network plugin has written its own{broken}"
    )]
    NoConfiguration { folder: String, broken: String },
    #[error(
        "{path} is Multus's, and no file in its folder is the network that it delegates to; name the file of the cluster's network \
         with --cni-conf-name"
    )]
    NoDelegate { path: String },
    #[error(
        "{path} is the configuration of a single plugin, which Multus reads by this name: convert it to a .conflist"
    )]
    SingleDelegate { path: String },
    #[error(
        "{path} is of CNI version {version}, which does not chain plugins as {newest} does; it must be one of {all}",
        newest = VERSIONS[VERSIONS.len() - 1], all = VERSIONS.join(", ")
    )]
    Version { path: String, version: String },
    #[error(
        "another program has written {path} while the plugin was added to it or removed from it; try again"
    )]
    Changed { path: String },
}

fn at<'a>(action: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> InstallError + use<'a> {
    move |source| InstallError::File { action, path: path.display().to_string(), source }
}

impl Plugin {
    /// Copies this binary and adds the plugin to the configuration. Files that are up to date are not changed.
    pub fn install(&self) -> Result<Installed, InstallError> {
        remove_leftovers(&self.folders);
        match &self.mode {
            Mode::Chained { file } => unless_changed(|| self.chain(file.as_deref())),
            Mode::Standalone { network } => self.stand_alone(network),
        }
    }

    fn chain(&self, named: Option<&str>) -> Result<Installed, InstallError> {
        let folder = &self.folders.configurations;
        let converted = named.map(|name| Path::new(name).with_extension("conflist"));
        // A named file of a single plugin has become a list.
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
        // The binary comes first: a configuration with a missing plugin would keep every pod from starting.
        copy_binary(&self.binary, &self.folders.binaries)?;
        let mut installed = None;
        for (file, inserted) in edits {
            let one = Installed { changed: inserted != Inserted::Unchanged, path: file.path.clone() };
            let one = match inserted {
                Inserted::IntoNewList
                    if file.path.extension().is_some_and(|kind| kind != "conflist") && !is_multus(&file) =>
                {
                    let target = file.path.with_extension("conflist");
                    write(&target, &file.content, || file.check_unchanged())?;
                    fs::rename(&file.path, saved(&file.path)).map_err(at("renaming", &file.path))?;
                    Installed { path: target, ..one }
                }
                Inserted::IntoNewList | Inserted::IntoList => {
                    write(&file.path, &file.content, || file.check_unchanged())?;
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
            write(&path, &content, || Ok(()))?;
        }
        Ok(Installed { path, changed })
    }
}

/// Removes the plugin from all lists, and its binary. Continues after a failure. Returns the changed files.
pub fn uninstall(folders: &Folders) -> Result<Vec<PathBuf>, InstallError> {
    remove_leftovers(folders);
    let mut changed = Vec::new();
    let mut failed = None;
    for path in chain::configurations(&folders.configurations)? {
        match unless_changed(|| take_out(&path)) {
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

/// Does an edit again that another program has disturbed.
fn unless_changed<T>(mut edit: impl FnMut() -> Result<T, InstallError>) -> Result<T, InstallError> {
    for _ in 1..ATTEMPTS {
        match edit() {
            Err(InstallError::Changed { .. }) => {}
            done => return done,
        }
    }
    edit()
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
        // The owner has written the file again meanwhile, so the saved copy is outdated.
        Some(single) if single.exists() => {
            fs::remove_file(saved(single)).map_err(at("removing", &saved(single)))?;
            fs::remove_file(path).map_err(at("removing", path))?;
        }
        Some(single) => {
            fs::rename(saved(single), single).map_err(at("restoring", single))?;
            fs::remove_file(path).map_err(at("removing", path))?;
        }
        None => write(path, &file.content, || file.check_unchanged())?,
    }
    Ok(true)
}

/// The plugin's entry in a list: what it knows without the daemon.
#[derive(Clone, Copy, Debug)]
pub struct PluginEntry<'a> {
    /// Path of the daemon's socket.
    pub socket: &'a Path,
    /// Which pods are captured, as in the configuration.
    pub select: &'a str,
    /// The mesh whose sidecars are captured.
    pub mesh: Mesh,
    /// Namespaces whose pods are ignored.
    pub exclude_namespaces: &'a BTreeSet<String>,
    /// Arguments for every pod, as for `attach`.
    pub arguments: &'a [String],
}

impl PluginEntry<'_> {
    /// Returns the entry as it is written.
    pub fn json(&self) -> Value {
        let mut entry = json!({
            "type": PLUGIN,
            "socket": self.socket,
            "select": self.select,
            "capabilities": { "io.kubernetes.cri.pod-annotations": true, "cgroupPath": true },
        });
        if self.mesh != Mesh::default() {
            entry["mesh"] = json!(self.mesh.as_str());
        }
        if !self.exclude_namespaces.is_empty() {
            entry["excludeNamespaces"] = json!(self.exclude_namespaces);
        }
        if !self.arguments.is_empty() {
            entry["arguments"] = json!(self.arguments);
        }
        entry
    }
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

/// Writes a configuration, unless `check` fails.
fn write(
    path: &Path,
    content: &Value,
    check: impl FnOnce() -> Result<(), InstallError>,
) -> Result<(), InstallError> {
    let mut text = serde_json::to_vec_pretty(content).expect("JSON that was read");
    text.push(b'\n');
    let mode = fs::metadata(path).ok().map(|metadata| metadata.permissions());
    replace(path, &mut text.as_slice(), mode, check)
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
    replace(&target, &mut source, Some(fs::Permissions::from_mode(0o755)), || Ok(()))
}

fn is_executable(file: &fs::File) -> bool {
    file.metadata().is_ok_and(|metadata| metadata.is_file() && metadata.mode() & 0o111 == 0o111)
}

/// Whether two files have the same content. They are not loaded into memory.
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

/// Writes a temporary file, whose name is not that of a configuration, and renames it if `check` succeeds then.
fn replace(
    path: &Path,
    content: &mut impl Read,
    mode: Option<fs::Permissions>,
    check: impl FnOnce() -> Result<(), InstallError>,
) -> Result<(), InstallError> {
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let beside = path.with_file_name(format!(".{name}{TEMPORARY}{}", std::process::id()));
    let written = || {
        let mut file = fs::File::create(&beside)?;
        io::copy(content, &mut file)?;
        if let Some(mode) = mode {
            fs::set_permissions(&beside, mode)?;
        }
        file.sync_all()
    };
    let replaced = written()
        .map_err(at("writing", path))
        .and_then(|()| check())
        .and_then(|()| fs::rename(&beside, path).map_err(at("writing", path)));
    replaced.inspect_err(|_| drop(fs::remove_file(&beside)))
}

/// Removes the temporary files of processes that were killed while they wrote.
fn remove_leftovers(folders: &Folders) {
    let is_leftover = |name: &str| {
        let process = name.strip_prefix('.').and_then(|name| name.rsplit_once(TEMPORARY));
        let process = process.and_then(|(_, process)| process.parse::<u32>().ok());
        process.is_some_and(|process| !Path::new(&format!("/proc/{process}")).exists())
    };
    for folder in [&folders.configurations, &folders.binaries] {
        let entries = fs::read_dir(folder).into_iter().flatten().flatten();
        for entry in entries.filter(|entry| entry.file_name().to_str().is_some_and(is_leftover)) {
            // It is only in the way of the disk's space.
            drop(fs::remove_file(entry.path()));
        }
    }
}

#[cfg(test)]
mod tests;
