//! Putting the plugin into a node's configuration, and taking it out.
//!
//! The runtime takes the first file of the folder by name, so that is the one changed. Each file is replaced by a
//! rename: the runtime sees the old one or the new one.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use serde_json::{Value, json};

use super::{PLUGIN, VERSIONS};

/// Kept beside a configuration of one plugin, which becomes a list while ours is in it.
const SAVED: &str = "before-intercept";

/// Where a node has its CNI files.
#[derive(Clone, Debug)]
pub struct Folders {
    /// Configurations, /etc/cni/net.d.
    pub configurations: PathBuf,
    /// Plugins, /opt/cni/bin.
    pub binaries: PathBuf,
}

/// A step failed. What was there before still is.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "each is its text")]
pub enum InstallError {
    #[error("{action} {path}")]
    File { action: &'static str, path: String, source: io::Error },
    #[error("reading {path}: it is no JSON")]
    Json { path: String, source: serde_json::Error },
    #[error("reading {path}: it is neither a list of plugins nor the configuration of one")]
    Shape { path: String },
    #[error(
        "looking for the node's CNI configuration in {0}: there is none yet; install when the node's network plugin has \
         written its own"
    )]
    NoConfiguration(String),
    #[error("{path} is of CNI version {version}, which does not chain plugins as {newest} does; it must be one of {all}", newest = VERSIONS[3], all = VERSIONS.join(", "))]
    Version { path: String, version: String },
}

fn at<'a>(action: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> InstallError + use<'a> {
    move |source| InstallError::File { action, path: path.display().to_string(), source }
}

/// Copy this binary, and put `entry` last in the list of plugins. Says which file was changed; none if all was there.
pub fn install(folders: &Folders, entry: &Value) -> Result<Option<PathBuf>, InstallError> {
    let chosen = first(&folders.configurations)?;
    let path =
        chosen.ok_or_else(|| InstallError::NoConfiguration(folders.configurations.display().to_string()))?;
    let mut list = read(&path)?;
    let single = list.get("plugins").is_none();
    if single {
        list = list_of(&path, list)?;
    }
    if let Some(version) = list.get("cniVersion").and_then(Value::as_str).filter(|v| !VERSIONS.contains(v)) {
        return Err(InstallError::Version { path: path.display().to_string(), version: version.to_owned() });
    }
    let plugins = plugins(&path, &mut list)?;
    if plugins.last() == Some(entry) {
        copy_binary(&folders.binaries)?;
        return Ok(None);
    }
    plugins.retain(|plugin| !is_ours(plugin));
    plugins.push(entry.clone());
    // The binary first: a configuration that names what is not there would stop every pod.
    copy_binary(&folders.binaries)?;
    if single {
        let target = path.with_extension("conflist");
        write(&target, &list)?;
        let saved = saved(&path);
        fs::rename(&path, &saved).map_err(at("setting aside", &path))?;
        return Ok(Some(target));
    }
    write(&path, &list)?;
    Ok(Some(path))
}

/// Take the plugin out of every list, and its binary away. Goes on after a failure. Says which files were changed.
pub fn uninstall(folders: &Folders) -> Result<Vec<PathBuf>, InstallError> {
    let mut changed = Vec::new();
    let mut failed = None;
    for path in configurations(&folders.configurations)? {
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
    let Ok(mut list) = read(path) else { return Ok(false) };
    let Some(plugins) = list.get_mut("plugins").and_then(Value::as_array_mut) else { return Ok(false) };
    let before = plugins.len();
    plugins.retain(|plugin| !is_ours(plugin));
    if plugins.len() == before {
        return Ok(false);
    }
    let single = path.with_extension("conf");
    let saved = saved(&single);
    if saved.exists() {
        fs::rename(&saved, &single).map_err(at("restoring", &single))?;
        fs::remove_file(path).map_err(at("removing", path))?;
    } else {
        write(path, &list)?;
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

fn is_ours(plugin: &Value) -> bool {
    plugin.get("type").and_then(Value::as_str) == Some(PLUGIN)
}

fn saved(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".");
    name.push(SAVED);
    name.into()
}

fn configurations(folder: &Path) -> Result<Vec<PathBuf>, InstallError> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(at("listing", folder)(error)),
    };
    let counts = |path: &PathBuf| {
        path.extension().is_some_and(|kind| kind == "conf" || kind == "conflist" || kind == "json")
    };
    let mut paths: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).filter(counts).collect();
    paths.sort();
    Ok(paths)
}

/// As the runtime chooses: the first by name that can be read.
fn first(folder: &Path) -> Result<Option<PathBuf>, InstallError> {
    Ok(configurations(folder)?.into_iter().find(|path| read(path).is_ok()))
}

fn read(path: &Path) -> Result<Value, InstallError> {
    let text = fs::read_to_string(path).map_err(at("reading", path))?;
    serde_json::from_str(&text)
        .map_err(|source| InstallError::Json { path: path.display().to_string(), source })
}

fn plugins<'a>(path: &Path, list: &'a mut Value) -> Result<&'a mut Vec<Value>, InstallError> {
    let plugins = list.get_mut("plugins").and_then(Value::as_array_mut);
    plugins.ok_or_else(|| InstallError::Shape { path: path.display().to_string() })
}

/// A list with one plugin, which gives its name and version to the list.
fn list_of(path: &Path, mut plugin: Value) -> Result<Value, InstallError> {
    let shape = || InstallError::Shape { path: path.display().to_string() };
    let fields = plugin.as_object_mut().ok_or_else(shape)?;
    if !fields.contains_key("type") {
        return Err(shape());
    }
    let name = fields.remove("name").unwrap_or_else(|| json!("k8s-pod-network"));
    let version = fields.remove("cniVersion").unwrap_or_else(|| json!("0.3.1"));
    Ok(json!({ "cniVersion": version, "name": name, "plugins": [plugin] }))
}

fn write(path: &Path, list: &Value) -> Result<(), InstallError> {
    let mut text = serde_json::to_vec_pretty(list).expect("JSON that was read");
    text.push(b'\n');
    let mode = fs::metadata(path).ok().map(|metadata| metadata.permissions());
    replace(path, &text, mode)
}

fn copy_binary(folder: &Path) -> Result<(), InstallError> {
    let own = Path::new("/proc/self/exe");
    let bytes = fs::read(own).map_err(at("reading", own))?;
    let target = folder.join(PLUGIN);
    if fs::read(&target).is_ok_and(|there| there == bytes) {
        return Ok(());
    }
    fs::create_dir_all(folder).map_err(at("making folder", folder))?;
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    replace(&target, &bytes, Some(mode))
}

/// Write beside, then rename. The name does not count as a configuration's.
fn replace(path: &Path, bytes: &[u8], mode: Option<fs::Permissions>) -> Result<(), InstallError> {
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let beside = path.with_file_name(format!(".{name}.intercept-{}", std::process::id()));
    let written = || {
        fs::write(&beside, bytes)?;
        if let Some(mode) = mode {
            fs::set_permissions(&beside, mode)?;
        }
        fs::File::open(&beside)?.sync_all()?;
        fs::rename(&beside, path)
    };
    written().map_err(|error| {
        drop(fs::remove_file(&beside));
        at("writing", path)(error)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Node {
        _dir: tempfile::TempDir,
        folders: Folders,
    }

    fn node(files: &[(&str, &str)]) -> Node {
        let dir = tempfile::tempdir().expect("a folder");
        let folders = Folders { configurations: dir.path().join("net.d"), binaries: dir.path().join("bin") };
        fs::create_dir(&folders.configurations).expect("made");
        for (name, text) in files {
            fs::write(folders.configurations.join(name), text).expect("written");
        }
        Node { _dir: dir, folders }
    }

    impl Node {
        fn files(&self) -> Vec<(String, Value)> {
            let mut files: Vec<_> = fs::read_dir(&self.folders.configurations)
                .expect("listed")
                .flatten()
                .map(|entry| {
                    (entry.file_name().into_string().expect("a name"), read(&entry.path()).expect("JSON"))
                })
                .collect();
            files.sort_by(|a, b| a.0.cmp(&b.0));
            files
        }
    }

    const LIST: &str =
        r#"{"cniVersion": "1.0.0", "name": "net", "plugins": [{"type": "bridge"}, {"type": "portmap"}]}"#;

    fn ours() -> Value {
        entry(Path::new("/run/s.sock"), "sidecar", &[])
    }

    #[test]
    fn installed_last_once_and_taken_out_again() {
        let node = node(&[("10-net.conflist", LIST), ("99-loopback.conf", r#"{"type": "loopback"}"#)]);
        let before = node.files();
        let path = node.folders.configurations.join("10-net.conflist");
        assert_eq!(install(&node.folders, &ours()).expect("installed"), Some(path.clone()));
        let types: Vec<Value> = read(&path).expect("JSON")["plugins"]
            .as_array()
            .expect("a list")
            .iter()
            .map(|p| p["type"].clone())
            .collect();
        assert_eq!(types, ["bridge", "portmap", PLUGIN]);
        assert!(node.folders.binaries.join(PLUGIN).exists());

        let written = fs::metadata(&path).expect("there").modified().expect("a time");
        assert_eq!(install(&node.folders, &ours()).expect("again"), None);
        assert_eq!(fs::metadata(&path).expect("there").modified().expect("a time"), written);

        // Another configuration replaces ours rather than joining it.
        let other = entry(Path::new("/run/other.sock"), "all", &["-b".into(), "*".into()]);
        install(&node.folders, &other).expect("replaced");
        let plugins = read(&path).expect("JSON")["plugins"].as_array().expect("a list").clone();
        assert_eq!((plugins.len(), plugins.last()), (3, Some(&other)));

        let changed = uninstall(&node.folders).expect("uninstalled");
        assert_eq!(changed, [path, node.folders.binaries.join(PLUGIN)]);
        assert_eq!(node.files(), before);
        assert_eq!(uninstall(&node.folders).expect("again"), Vec::<PathBuf>::new());
    }

    #[test]
    fn a_single_configuration_becomes_a_list_and_comes_back() {
        let node = node(&[(
            "10-net.conf",
            r#"{"cniVersion": "0.3.1", "name": "net", "type": "bridge", "mtu": 1400}"#,
        )]);
        let before = node.files();
        let path = install(&node.folders, &ours()).expect("installed").expect("changed");
        assert_eq!(path, node.folders.configurations.join("10-net.conflist"));
        assert_eq!(
            read(&path).expect("JSON"),
            json!({"cniVersion": "0.3.1", "name": "net", "plugins": [{"type": "bridge", "mtu": 1400}, ours()]})
        );
        assert_eq!(install(&node.folders, &ours()).expect("again"), None);
        uninstall(&node.folders).expect("uninstalled");
        assert_eq!(node.files(), before);
    }

    #[test]
    fn what_cannot_be_chained_is_refused_and_untouched() {
        for (files, why) in [
            (vec![], "there is none yet"),
            (vec![("10-net.conflist", r#"{"cniVersion": "0.2.0", "name": "n", "plugins": []}"#)], "0.2.0"),
            (vec![("10-net.conf", r#"{"name": "n"}"#)], "neither a list"),
        ] {
            let node = node(&files);
            let before = node.files();
            let error = install(&node.folders, &ours()).expect_err(why).to_string();
            assert!(error.contains(why), "{error}");
            assert_eq!(node.files(), before);
            assert!(!node.folders.binaries.exists(), "{why}");
        }
    }
}
