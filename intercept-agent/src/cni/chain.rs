//! Selects the node's effective CNI configuration and edits the plugin's entry in it.
//!
//! A runtime (containerd, CRI-O) uses the first valid file by name, so the entry must be in that file. If it is
//! Multus's, the entry must be in the configuration that Multus delegates to.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use serde_json::{Value, json};

use super::{PLUGIN, VERSIONS, install::InstallError};

/// Plugin types of Multus, by method of installation.
const MULTUS: [&str; 3] = ["multus", "multus-shim", "multus-cni"];
/// Longer than any configuration.
const MAX_FILE: u64 = 1 << 20;

/// A configuration file.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct ConfFile {
    pub(super) path: PathBuf,
    pub(super) content: Value,
    /// The text that was read.
    text: Vec<u8>,
}

/// The position of the entry in a configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum EntryPosition {
    /// In the file's list of plugins, which is created if necessary.
    File,
    /// In the first delegate of Multus.
    Delegate,
}

/// What an insertion changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Inserted {
    /// Nothing: the entry was present.
    Unchanged,
    /// The entry was inserted into the list.
    IntoList,
    /// The configuration of a single plugin became a list.
    IntoNewList,
}

/// Returns the files in a folder that may be configurations, in the order of the runtimes.
pub(super) fn configurations(folder: &Path) -> Result<Vec<PathBuf>, InstallError> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(source) => {
            let path = folder.display().to_string();
            return Err(InstallError::File { action: "listing", path, source });
        }
    };
    let counts = |path: &PathBuf| {
        path.extension().is_some_and(|kind| kind == "conf" || kind == "conflist" || kind == "json")
    };
    let mut paths: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).filter(counts).collect();
    paths.sort();
    Ok(paths)
}

impl ConfFile {
    /// Reads a configuration that a runtime can use.
    pub(super) fn read(path: &Path) -> Result<Self, InstallError> {
        let shown = || path.display().to_string();
        let at = |source| InstallError::File { action: "reading", path: shown(), source };
        let metadata = fs::metadata(path).map_err(at)?;
        if !metadata.is_file() || metadata.len() > MAX_FILE {
            return Err(InstallError::Shape { path: shown() });
        }
        let text = fs::read(path).map_err(at)?;
        let content: Value =
            serde_json::from_slice(&text).map_err(|source| InstallError::Json { path: shown(), source })?;
        let is_list = path.extension().is_some_and(|kind| kind == "conflist");
        let valid = match is_list {
            // Runtimes refuse a list without a name, and a plugin without a type.
            true => {
                let plugins = content.get("plugins").and_then(Value::as_array);
                content.get("name").and_then(Value::as_str).is_some_and(|name| !name.is_empty())
                    && plugins.is_some_and(|list| !list.is_empty() && list.iter().all(|p| kind(p).is_some()))
            }
            false => kind(&content).is_some(),
        };
        if valid {
            Ok(Self { path: path.to_owned(), content, text })
        } else {
            Err(InstallError::Shape { path: shown() })
        }
    }

    /// Fails if another program has written the file since it was read.
    pub(super) fn check_unchanged(&self) -> Result<(), InstallError> {
        match fs::read(&self.path) {
            Ok(text) if text == self.text => Ok(()),
            _ => Err(InstallError::Changed { path: self.path.display().to_string() }),
        }
    }

    /// Inserts `entry` at its position. An identical entry stays where it is unless it is first, because plugins that
    /// are appended after it do no harm.
    pub(super) fn insert(&mut self, place: EntryPosition, entry: &Value) -> Result<Inserted, InstallError> {
        let shown = self.path.display().to_string();
        let target = match place {
            EntryPosition::File => &mut self.content,
            EntryPosition::Delegate => {
                let delegate = self.content.get_mut("delegates").and_then(|list| list.get_mut(0));
                delegate.ok_or_else(|| InstallError::Shape { path: shown.clone() })?
            }
        };
        let single = target.get("plugins").is_none();
        if single {
            *target = list_of(&shown, target.take())?;
        }
        if !speaks(target) {
            let version = target.get("cniVersion").cloned().unwrap_or_default();
            return Err(InstallError::Version { path: shown, version: version.to_string() });
        }
        let plugins = target.get_mut("plugins").and_then(Value::as_array_mut);
        let plugins = plugins.ok_or(InstallError::Shape { path: shown })?;
        if plugins.iter().skip(1).any(|plugin| plugin == entry)
            && plugins.iter().filter(|plugin| is_ours(plugin)).count() == 1
        {
            return Ok(Inserted::Unchanged);
        }
        plugins.retain(|plugin| !is_ours(plugin));
        plugins.push(entry.clone());
        Ok(if single { Inserted::IntoNewList } else { Inserted::IntoList })
    }

    /// Removes the plugin's entries, including those in delegates of Multus. False if there are none.
    pub(super) fn take_out(&mut self) -> bool {
        let mut found = take_out_of(&mut self.content);
        for delegate in self.content.get_mut("delegates").and_then(Value::as_array_mut).into_iter().flatten()
        {
            found |= take_out_of(delegate);
        }
        found
    }

    /// Whether the file configures only this plugin.
    pub(super) fn is_standalone(&self) -> bool {
        is_ours(&self.content)
    }
}

/// Returns the files that need the entry, and its position in each. The first is the one that the runtime reads.
pub(super) fn targets(
    folder: &Path,
    named: Option<&str>,
) -> Result<Vec<(ConfFile, EntryPosition)>, InstallError> {
    let (valid, broken) = match named {
        Some(name) => (vec![ConfFile::read(&folder.join(name))?], Vec::new()),
        None => all(folder)?,
    };
    let Some(first) = valid.first() else {
        return Err(InstallError::NoConfiguration {
            folder: folder.display().to_string(),
            broken: told(&broken),
        });
    };
    if !kind(&first.content).is_some_and(|kind| MULTUS.contains(&kind)) {
        return Ok(vec![(first.clone(), EntryPosition::File)]);
    }
    let multus = first.clone();
    let others = || Ok::<_, InstallError>(all(folder)?.0.into_iter().filter(|file| file.path != multus.path));
    let network = |name: &Value| {
        let named = move |file: &ConfFile| {
            file.content.get("name") == Some(name)
                || name.as_str().is_some_and(|name| {
                    name.starts_with('/') && file.path.file_name() == Path::new(name).file_name()
                })
        };
        Ok::<_, InstallError>(others()?.find(named))
    };
    let mut targets = Vec::new();
    // Multus rewrites its own file from the one that it has copied the delegate from.
    let source = match (multus.content.get("clusterNetwork"), delegate(&multus.content)) {
        (Some(name), _) => match network(name)? {
            Some(file) if file.content.get("plugins").is_none() => {
                return Err(InstallError::SingleDelegate { path: file.path.display().to_string() });
            }
            file => file,
        },
        (None, Some(delegate)) => {
            targets.push((multus.clone(), EntryPosition::Delegate));
            delegate.get("name").map(network).transpose()?.flatten()
        }
        (None, None) => None,
    };
    targets.extend(source.map(|file| (file, EntryPosition::File)));
    if targets.is_empty() {
        return Err(InstallError::NoDelegate { path: multus.path.display().to_string() });
    }
    Ok(targets)
}

/// Returns the files that a runtime can use, in its order and without the plugin's own, and why the others cannot be
/// used.
fn all(folder: &Path) -> Result<(Vec<ConfFile>, Vec<InstallError>), InstallError> {
    let (mut valid, mut broken) = (Vec::new(), Vec::new());
    for path in configurations(folder)? {
        match ConfFile::read(&path) {
            Ok(file) if file.is_standalone() => {}
            Ok(file) => valid.push(file),
            Err(error) => broken.push(error),
        }
    }
    Ok((valid, broken))
}

fn told(broken: &[InstallError]) -> String {
    let text = |error: &InstallError| match std::error::Error::source(error) {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    };
    broken.iter().map(|error| format!("; {}", text(error))).collect()
}

fn kind(content: &Value) -> Option<&str> {
    content.get("type").and_then(Value::as_str).filter(|kind| !kind.is_empty())
}

fn delegate(multus: &Value) -> Option<&Value> {
    multus.get("delegates").and_then(|list| list.get(0)).filter(|delegate| delegate.is_object())
}

fn is_ours(plugin: &Value) -> bool {
    kind(plugin) == Some(PLUGIN)
}

/// Whether one of the versions in a list is supported.
fn speaks(list: &Value) -> bool {
    let offered = list.get("cniVersions").and_then(Value::as_array).into_iter().flatten();
    let mut offered = offered.chain(list.get("cniVersion")).filter_map(Value::as_str).peekable();
    offered.peek().is_none() || offered.any(|version| VERSIONS.contains(&version))
}

fn take_out_of(list: &mut Value) -> bool {
    let Some(plugins) = list.get_mut("plugins").and_then(Value::as_array_mut) else { return false };
    let before = plugins.len();
    plugins.retain(|plugin| !is_ours(plugin));
    plugins.len() != before
}

/// Returns a list with one plugin. The plugin's name and version become those of the list.
fn list_of(path: &str, mut plugin: Value) -> Result<Value, InstallError> {
    let shape = || InstallError::Shape { path: path.to_owned() };
    let fields = plugin.as_object_mut().ok_or_else(shape)?;
    if !fields.contains_key("type") {
        return Err(shape());
    }
    let name = fields.remove("name").unwrap_or_else(|| json!("k8s-pod-network"));
    let version = fields.remove("cniVersion").unwrap_or_else(|| json!("0.3.1"));
    Ok(json!({ "cniVersion": version, "name": name, "plugins": [plugin] }))
}
