use std::{
    io::Write as _,
    os::unix::fs::OpenOptionsExt as _,
    sync::atomic::{AtomicBool, Ordering},
    thread,
};

use super::*;

struct ConfigFolders {
    _dir: tempfile::TempDir,
    folders: Folders,
}

fn node(files: &[(&str, &str)]) -> ConfigFolders {
    let dir = tempfile::tempdir().expect("a folder");
    let folders = Folders { configurations: dir.path().join("net.d"), binaries: dir.path().join("bin") };
    fs::create_dir(&folders.configurations).expect("made");
    for (name, text) in files {
        fs::write(folders.configurations.join(name), text).expect("written");
    }
    ConfigFolders { _dir: dir, folders }
}

/// Returns the JSON of a file, usable or not, or else its text.
fn read(path: &Path) -> Value {
    let text = fs::read_to_string(path).expect("read");
    serde_json::from_str(&text).unwrap_or(Value::String(text))
}

impl ConfigFolders {
    fn path(&self, name: &str) -> PathBuf {
        self.folders.configurations.join(name)
    }

    fn install(&self, mode: Mode, entry: Value) -> Result<Installed, InstallError> {
        let binary = self.folders.configurations.with_file_name("agent");
        fs::write(&binary, "the agent").expect("written");
        Plugin { folders: self.folders.clone(), mode, entry, binary }.install()
    }

    /// Installs a chained plugin. Returns the file if it has changed.
    fn chain(&self, entry: Value) -> Result<Option<PathBuf>, InstallError> {
        let installed = self.install(Mode::Chained { file: None }, entry)?;
        Ok(installed.changed.then_some(installed.path))
    }

    fn files(&self) -> Vec<(String, Value)> {
        let mut files: Vec<_> = fs::read_dir(&self.folders.configurations)
            .expect("listed")
            .flatten()
            .map(|entry| (entry.file_name().into_string().expect("a name"), read(&entry.path())))
            .collect();
        files.sort_by(|a, b| a.0.cmp(&b.0));
        files
    }
}

const LIST: &str =
    r#"{"cniVersion": "1.0.0", "name": "net", "plugins": [{"type": "bridge"}, {"type": "portmap"}]}"#;

fn ours() -> Value {
    PluginEntry {
        socket: Path::new("/run/s.sock"),
        select: "sidecar",
        mesh: Mesh::Istio,
        exclude_namespaces: &BTreeSet::new(),
        arguments: &[],
    }
    .json()
}

#[test]
fn installed_last_once_and_taken_out_again() {
    let node = node(&[("10-net.conflist", LIST), ("99-loopback.conf", r#"{"type": "loopback"}"#)]);
    let before = node.files();
    let path = node.folders.configurations.join("10-net.conflist");
    assert_eq!(node.chain(ours()).expect("installed"), Some(path.clone()));
    let types: Vec<Value> =
        read(&path)["plugins"].as_array().expect("a list").iter().map(|p| p["type"].clone()).collect();
    assert_eq!(types, ["bridge", "portmap", PLUGIN]);
    assert!(node.folders.binaries.join(PLUGIN).exists());

    let written = fs::metadata(&path).expect("there").modified().expect("a time");
    assert_eq!(node.chain(ours()).expect("again"), None);
    assert_eq!(fs::metadata(&path).expect("there").modified().expect("a time"), written);

    // Another entry replaces the plugin's own.
    let other = PluginEntry {
        socket: Path::new("/run/other.sock"),
        select: "all",
        mesh: Mesh::Kuma,
        exclude_namespaces: &["kube-system".to_owned()].into(),
        arguments: &["-b".into(), "*".into()],
    }
    .json();
    node.chain(other.clone()).expect("replaced");
    let plugins = read(&path)["plugins"].as_array().expect("a list").clone();
    assert_eq!((plugins.len(), plugins.last()), (3, Some(&other)));

    let changed = uninstall(&node.folders).expect("uninstalled");
    assert_eq!(changed, [path, node.folders.binaries.join(PLUGIN)]);
    assert_eq!(node.files(), before);
    assert_eq!(uninstall(&node.folders).expect("again"), Vec::<PathBuf>::new());
}

/// Installs the plugin. `meanwhile` happens when the binary is read: after the configuration has been read and before it is written.
fn while_it_installs(
    node: &ConfigFolders,
    meanwhile: impl FnOnce() + Send,
) -> Result<Installed, InstallError> {
    let binary = node.folders.configurations.with_file_name("pipe");
    let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
    rustix::fs::mknodat(rustix::fs::CWD, &binary, rustix::fs::FileType::Fifo, mode, 0).expect("a pipe");
    let plugin = Plugin {
        folders: node.folders.clone(),
        mode: Mode::Chained { file: None },
        entry: ours(),
        binary: binary.clone(),
    };
    let is_done = AtomicBool::new(false);
    thread::scope(|scope| {
        let feeder = || {
            let mut meanwhile = Some(meanwhile);
            while !is_done.load(Ordering::Relaxed) {
                // Without a reader it cannot be opened.
                let opened = fs::OpenOptions::new().write(true).custom_flags(libc::O_NONBLOCK).open(&binary);
                if let Ok(mut writer) = opened {
                    if let Some(meanwhile) = meanwhile.take() {
                        meanwhile();
                    }
                    // The reader may have gone.
                    drop(writer.write_all(b"the agent"));
                }
                thread::yield_now();
            }
        };
        scope.spawn(feeder);
        let installed = plugin.install();
        is_done.store(true, Ordering::Relaxed);
        installed
    })
}

#[test]
fn what_another_program_writes_meanwhile_is_kept() {
    let node = node(&[("10-net.conflist", LIST)]);
    let newer = LIST.replace("portmap", "bandwidth");
    let path = node.path("10-net.conflist");
    let installed = while_it_installs(&node, || fs::write(&path, &newer).expect("written"));
    assert_eq!(installed.expect("installed"), Installed { path: path.clone(), changed: true });
    let types = |path: &Path| -> Vec<Value> {
        read(path)["plugins"].as_array().expect("a list").iter().map(|p| p["type"].clone()).collect()
    };
    assert_eq!(types(&path), ["bridge", "bandwidth", PLUGIN]);
    assert_eq!(node.files().len(), 1, "nothing is left beside it");

    // The configuration that is used is another one now.
    let node = self::node(&[("10-net.conf", r#"{"name": "net", "type": "bridge"}"#)]);
    let (old, new) = (node.path("10-net.conf"), node.path("05-other.conflist"));
    let installed = while_it_installs(&node, || {
        fs::write(&new, &newer).expect("written");
        fs::remove_file(&old).expect("removed");
    });
    assert_eq!(installed.expect("installed").path, new);
    assert_eq!(types(&new), ["bridge", "bandwidth", PLUGIN]);
    assert_eq!(node.files().len(), 1);
}

#[test]
fn what_a_killed_agent_has_left_is_removed() {
    let node = node(&[("10-net.conflist", LIST)]);
    fs::create_dir(&node.folders.binaries).expect("made");
    // No process has such a number.
    let of_killed = [
        node.path(".10-net.conflist.intercept-4194305"),
        node.folders.binaries.join(".intercept-cni.intercept-4194305"),
    ];
    let of_others = [
        node.path(&format!(".20-net.conflist.intercept-{}", std::process::id())),
        node.path(".10-net.conflist.intercept-new"),
        node.path("10-net.intercept-4194305"),
    ];
    let write_all = || {
        for path in of_killed.iter().chain(&of_others) {
            fs::write(path, "half").expect("written");
        }
    };
    let check = || {
        assert!(!of_killed.iter().any(|path| path.exists()));
        assert!(of_others.iter().all(|path| path.exists()));
    };
    write_all();
    node.chain(ours()).expect("installed");
    check();
    write_all();
    uninstall(&node.folders).expect("uninstalled");
    check();
}

#[test]
fn a_single_configuration_becomes_a_list_and_comes_back() {
    let node =
        node(&[("10-net.conf", r#"{"cniVersion": "0.3.1", "name": "net", "type": "bridge", "mtu": 1400}"#)]);
    let before = node.files();
    let path = node.chain(ours()).expect("installed").expect("changed");
    assert_eq!(path, node.folders.configurations.join("10-net.conflist"));
    assert_eq!(
        read(&path),
        json!({"cniVersion": "0.3.1", "name": "net", "plugins": [{"type": "bridge", "mtu": 1400}, ours()]})
    );
    assert_eq!(node.chain(ours()).expect("again"), None);
    uninstall(&node.folders).expect("uninstalled");
    assert_eq!(node.files(), before);
}

#[test]
fn what_cannot_be_chained_is_refused_and_untouched() {
    let old = r#"{"cniVersion": "0.2.0", "name": "n", "plugins": [{"type": "bridge"}]}"#;
    for (files, why) in [
        (vec![], "there is no usable configuration yet"),
        (vec![("10-net.conflist", old)], "0.2.0"),
        (vec![("10-net.conf", r#"{"name": "n"}"#)], "10-net.conf: it is neither a list"),
        (
            vec![("10-net.conflist", r#"{"name": "n", "plugins": []}"#)],
            "10-net.conflist: it is neither a list",
        ),
        (
            vec![("10-net.conflist", "{ broken")],
            "10-net.conflist: it is not valid JSON; correct or remove it",
        ),
        (vec![("00-multus.conf", r#"{"type": "multus"}"#), ("10-net.conflist", LIST)], "--cni-conf-name"),
        (
            vec![
                (
                    "00-multus.conf",
                    r#"{"type": "multus-shim", "clusterNetwork": "/etc/cni/net.d/10-net.conf"}"#,
                ),
                ("10-net.conf", r#"{"type": "bridge", "name": "net"}"#),
            ],
            "convert it to a .conflist",
        ),
    ] {
        let node = node(&files);
        let before = node.files();
        let error = node.chain(ours()).expect_err(why).to_string();
        assert!(error.contains(why), "{error}");
        assert_eq!(node.files(), before);
        assert!(!node.folders.binaries.exists(), "{why}");
    }
}

#[test]
fn the_first_file_that_a_runtime_can_use_is_taken() {
    let node = node(&[
        ("00-empty.conflist", r#"{"name": "n", "plugins": []}"#),
        ("00-nameless.conflist", r#"{"plugins": [{"type": "bridge"}]}"#),
        ("00-typeless.conflist", r#"{"name": "n", "plugins": [{"type": "bridge"}, {"name": "m"}]}"#),
        ("01-broken.conflist", "{"),
        ("01-comment.conflist", &format!("// the cluster's network\n{LIST}")),
        ("02-list.conf", LIST),
        (".03-hidden.conflist.tmp", LIST),
        ("04-net.json", r#"{"cniVersion": "1.1.0", "name": "net", "type": "bridge"}"#),
        ("05-later.conflist", LIST),
    ]);
    let before = node.files();
    assert_eq!(node.chain(ours()).expect("installed"), Some(node.path("04-net.conflist")));
    assert!(!node.path("04-net.json").exists());
    assert_eq!(node.chain(ours()).expect("again"), None);
    uninstall(&node.folders).expect("uninstalled");
    assert_eq!(node.files(), before);
}

#[test]
fn what_the_plugin_does_not_know_stays_as_it_is() {
    let text = r#"{"vendor": {"b": [1, 2.5, null], "a": "\u00e9"}, "cniVersion": "1.1.0", "disableCheck": "true", "name": "net",
        "plugins": [{"type": "calico", "ipam": {"type": "host-local"}, "x-y": 18446744073709551615}, {"type": "bandwidth",
        "capabilities": {"bandwidth": true}}], "zone": false}"#;
    let node = node(&[("10-net.conflist", text)]);
    let path = node.chain(ours()).expect("installed").expect("changed");
    let mut expected: Value = serde_json::from_str(text).expect("JSON");
    expected["plugins"].as_array_mut().expect("a list").push(ours());
    // The order of the fields stays too.
    assert_eq!(read(&path).to_string(), expected.to_string());
    uninstall(&node.folders).expect("uninstalled");
    assert_eq!(read(&path).to_string(), serde_json::from_str::<Value>(text).expect("JSON").to_string());
}

#[test]
fn the_file_that_is_named_is_taken() {
    let node = node(&[("10-net.conflist", LIST), ("20-other.conf", r#"{"name": "o", "type": "bridge"}"#)]);
    let named = |name: &str| Mode::Chained { file: Some(name.to_owned()) };
    let other = node.install(named("20-other.conf"), ours()).expect("installed");
    assert_eq!(other, Installed { path: node.path("20-other.conflist"), changed: true });
    assert_eq!(read(&node.path("10-net.conflist")), serde_json::from_str::<Value>(LIST).expect("JSON"));
    // The file has become a list meanwhile.
    let again = node.install(named("20-other.conf"), ours()).expect("again");
    assert_eq!(again, Installed { changed: false, ..other });
    let error = node.install(named("30-none.conflist"), ours()).expect_err("absent").to_string();
    assert!(error.contains("30-none.conflist"), "{error}");
}

#[test]
fn versions_that_a_list_offers_are_all_looked_at() {
    for (versions, spoken) in [
        (r#""cniVersion": "9.0.0", "cniVersions": ["9.0.0", "1.1.0"]"#, true),
        (r#""cniVersion": "9.0.0", "cniVersions": ["9.0.0"]"#, false),
        (r#""cniVersions": ["1.0.0", "1.1.0"]"#, true),
        (r#""cniVersion": "1.1.0""#, true),
        (r#""disableGC": true"#, true),
    ] {
        let list = format!(r#"{{{versions}, "name": "net", "plugins": [{{"type": "bridge"}}]}}"#);
        let node = node(&[("10-net.conflist", &list)]);
        assert_eq!(node.chain(ours()).is_ok(), spoken, "{versions}");
    }
}

#[test]
fn what_multus_delegates_to_is_chained() {
    let types = |list: &Value| -> Vec<String> {
        let plugins = list["plugins"].as_array().expect("a list").iter();
        plugins.map(|plugin| plugin["type"].as_str().expect("a type").to_owned()).collect()
    };
    let chained = ["bridge", "portmap", PLUGIN];

    // Multus reads the file that its configuration names.
    let thick = r#"{"type": "multus-shim", "name": "multus", "clusterNetwork": "/host/etc/cni/net.d/10-net.conflist"}"#;
    let node = self::node(&[("00-multus.conf", thick), ("10-net.conflist", LIST)]);
    let before = node.files();
    assert_eq!(node.chain(ours()).expect("installed"), Some(node.path("10-net.conflist")));
    assert_eq!(types(&read(&node.path("10-net.conflist"))), chained);
    uninstall(&node.folders).expect("uninstalled");
    assert_eq!(node.files(), before);

    // Multus has a copy, which it updates when the file changes.
    let thin = format!(r#"{{"type": "multus", "name": "multus", "delegates": [{LIST}]}}"#);
    let node = self::node(&[("00-multus.conf", &thin), ("10-net.conflist", LIST)]);
    let before = node.files();
    assert_eq!(node.chain(ours()).expect("installed"), Some(node.path("00-multus.conf")));
    assert_eq!(types(&read(&node.path("00-multus.conf"))["delegates"][0]), chained);
    assert_eq!(types(&read(&node.path("10-net.conflist"))), chained);
    assert_eq!(node.chain(ours()).expect("again"), None);
    uninstall(&node.folders).expect("uninstalled");
    assert_eq!(node.files(), before);

    // A copy of a single plugin without a file.
    let thin = r#"{"type": "multus", "name": "multus", "delegates": [{"name": "net", "cniVersion": "1.0.0", "type": "bridge"}]}"#;
    let node = self::node(&[("00-multus.conf", thin)]);
    assert_eq!(node.chain(ours()).expect("installed"), Some(node.path("00-multus.conf")));
    assert_eq!(types(&read(&node.path("00-multus.conf"))["delegates"][0]), ["bridge", PLUGIN]);
}

#[test]
fn it_can_stand_alone() {
    let node = node(&[("10-net.conflist", LIST)]);
    let before = node.files();
    let mode = || Mode::Standalone { network: "istio-cni".to_owned() };
    let installed = node.install(mode(), ours()).expect("installed");
    assert!(installed.changed);
    let content = read(&installed.path);
    assert_eq!(
        (&content["name"], &content["type"], &content["standalone"]),
        (&json!("istio-cni"), &json!(PLUGIN), &json!(true))
    );
    assert!(!node.install(mode(), ours()).expect("again").changed);
    assert!(node.folders.binaries.join(PLUGIN).exists());
    // The file is not used as the node's network.
    assert_eq!(node.chain(ours()).expect("installed"), Some(node.path("10-net.conflist")));
    uninstall(&node.folders).expect("uninstalled");
    assert_eq!(node.files(), before);
}

#[test]
fn a_configuration_that_its_owner_wrote_again_stays() {
    let single =
        |mtu: u32| format!(r#"{{"cniVersion": "1.0.0", "name": "net", "type": "bridge", "mtu": {mtu}}}"#);
    let node = node(&[("10-net.conf", &single(1400))]);
    node.chain(ours()).expect("installed");
    fs::write(node.path("10-net.conf"), single(1500)).expect("written again");
    assert_eq!(node.chain(ours()).expect("installed"), Some(node.path("10-net.conflist")));
    assert_eq!(read(&node.path("10-net.conflist"))["plugins"][0]["mtu"], 1500);
    fs::write(node.path("10-net.conf"), single(1600)).expect("written again");
    uninstall(&node.folders).expect("uninstalled");
    assert_eq!(node.files().len(), 1);
    assert_eq!(read(&node.path("10-net.conf"))["mtu"], 1600);
}
