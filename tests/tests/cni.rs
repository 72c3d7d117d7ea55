//! The CNI plugin by real calls, in every version that runtimes use, as the specification has them.

use std::{
    fs,
    io::Write as _,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use serde_json::{Value, json};
use tests::{
    actor::Actor,
    agent::Agent,
    api::INJECTED,
    daemon::{Daemon, answers, proxy, service},
    testbed::{Pod, PodSpec, cgroup, name},
};

const VERSIONS: [&str; 4] = ["0.3.1", "0.4.0", "1.0.0", "1.1.0"];
const STATUS: &str = "sidecar.istio.io/status";

/// A plugin in a folder as `cni install` fills it, whose name has spaces, and a daemon.
struct InstalledPlugin<'a> {
    folder: tempfile::TempDir,
    entry: Value,
    daemon: Daemon<'a>,
}

/// A pod that a runtime adds, and its application.
struct Added {
    id: &'static str,
    namespace: &'static str,
    pod: Pod,
    actor: Actor,
}

/// What the plugin has printed, and whether it succeeded.
#[derive(Debug, PartialEq)]
struct PluginOutput {
    done: bool,
    text: Value,
}

impl PluginOutput {
    fn nothing() -> Self {
        Self { done: true, text: Value::Null }
    }

    /// Asserts that it is an error of the specification with this code.
    fn assert_error(&self, version: &str, code: u32, what: &str) {
        assert!(!self.done && self.text["code"] == code, "{what}: {self:?}");
        assert_eq!(self.text["cniVersion"], version, "{what}");
        assert!(self.text["msg"].as_str().is_some_and(|msg| !msg.is_empty()), "{what}: {self:?}");
    }
}

/// The flags for the node's CNI folders in this one.
fn folders(folder: &Path) -> [String; 4] {
    let text = |path: &str| folder.join(path).to_str().expect("text").to_owned();
    ["--cni-conf-dir".to_owned(), text("net d"), "--cni-bin-dir".to_owned(), text("c n i/bin")]
}

/// The plugin's entry in the node's configuration.
fn read_entry(folder: &Path) -> Option<Value> {
    let list = fs::read(folder.join("net d/10 net.conflist")).expect("read");
    let list: Value = serde_json::from_slice(&list).expect("JSON");
    list["plugins"].as_array().expect("a list").get(1).cloned()
}

impl<'a> InstalledPlugin<'a> {
    fn new(agent: &'a Agent, more: &[&str]) -> Self {
        let folder = name::scratch("cni").expect("a folder");
        let (conf, bin) = (folder.path().join("net d"), folder.path().join("c n i/bin"));
        for made in [&conf, &bin] {
            fs::create_dir_all(made).expect("created");
        }
        let primary = json!({ "cniVersion": "1.0.0", "name": "net", "plugins": [{ "type": "bridge" }] });
        fs::write(conf.join("10 net.conflist"), primary.to_string()).expect("written");
        let folders = folders(folder.path());
        let folders = folders.each_ref().map(String::as_str);
        let daemon = Daemon::start(agent, &[&["--cni-keep"], &folders[..], more].concat()).expect("a daemon");
        let read = || read_entry(folder.path());
        daemon.wait("it is installed", |_| read().is_some()).expect("installed");
        Self { entry: read().expect("an entry"), folder, daemon }
    }

    fn binary(&self) -> PathBuf {
        self.folder.path().join("c n i/bin/intercept-cni")
    }

    fn new_pod(&self, id: &'static str, namespace: &'static str) -> Added {
        let pod = Pod::new(PodSpec::new("cni")).expect("a pod");
        symlink(pod.netns.path(), self.netns(id)).expect("linked");
        Added { id, namespace, actor: proxy(&pod), pod }
    }

    fn netns(&self, id: &str) -> PathBuf {
        self.folder.path().join(format!("net ns of {id}"))
    }

    /// Calls the plugin as a runtime does that speaks `version`.
    fn call(&self, command: &str, version: &str, added: &Added, more: &Value) -> PluginOutput {
        let mount = cgroup::mount_point().expect("cgroup2");
        let mut config = self.entry.clone();
        config["cniVersion"] = json!(version);
        config["name"] = json!("net");
        config["prevResult"] = previous(version);
        config["runtimeConfig"] = json!({
            "cgroupPath": added.pod.cgroup.path().strip_prefix(mount).expect("below it"),
            "io.kubernetes.cri.pod-annotations": { STATUS: INJECTED, "sidecar.istio.io/interceptionMode": "REDIRECT" },
        });
        for (name, value) in more.as_object().into_iter().flatten() {
            config[name] = value.clone();
        }
        self.call_with(command, config.to_string().as_bytes(), &self.variables(added))
    }

    fn variables(&self, added: &Added) -> Vec<(&'static str, String)> {
        let Added { id, namespace, .. } = added;
        vec![
            ("CNI_CONTAINERID", (*id).to_owned()),
            ("CNI_NETNS", self.netns(id).display().to_string()),
            ("CNI_IFNAME", "eth0".to_owned()),
            ("CNI_ARGS", format!("K8S_POD_NAMESPACE={namespace};K8S_POD_NAME={id};K8S_POD_UID=uid-{id}")),
            ("CNI_PATH", self.folder.path().join("c n i/bin").display().to_string()),
        ]
    }

    fn call_with(&self, command: &str, stdin: &[u8], variables: &[(&'static str, String)]) -> PluginOutput {
        let mut child = Command::new(self.binary())
            .env("CNI_COMMAND", command)
            .envs(variables.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("started");
        child.stdin.take().expect("piped").write_all(stdin).expect("written");
        let output = child.wait_with_output().expect("ended");
        let text = String::from_utf8(output.stdout).expect("text");
        let text = if text.is_empty() {
            Value::Null
        } else {
            serde_json::from_str(&text).unwrap_or_else(|error| panic!("{command}: {error}: {text:?}"))
        };
        PluginOutput { done: output.status.success(), text }
    }
}

impl Added {
    fn is_captured(&self) -> bool {
        answers(&self.actor, service()).as_deref() == Some("proxy")
    }
}

/// The result of the plugins before this one, with what versions have in common and what they have not.
fn previous(version: &str) -> Value {
    let mut result = json!({
        "cniVersion": version,
        "interfaces": [{ "name": "eth0", "mac": "0a:58:0a:58:00:05", "sandbox": "/a b" }],
        "ips": [{ "address": "10.66.0.2/24", "gateway": "10.66.0.1", "interface": 0 }],
        "routes": [{ "dst": "0.0.0.0/0" }],
        "dns": { "nameservers": ["10.96.0.10"] },
    });
    if version.starts_with("0.") {
        result["ips"][0]["version"] = json!("4");
    }
    if version == "1.1.0" {
        result["interfaces"][0]["mtu"] = json!(1400);
        result["routes"][0]["priority"] = json!(7);
    }
    result
}

#[test]
fn every_version_adds_checks_and_deletes() {
    let agent = Agent::new("d-cni").expect("the agent");
    let mut plugin = InstalledPlugin::new(&agent, &[]);
    let nothing = json!({});
    for version in VERSIONS {
        let added = plugin.new_pod("one", "shop");
        let never = plugin.new_pod("never", "shop");
        let call = |plugin: &InstalledPlugin<'_>, command| plugin.call(command, version, &added, &nothing);
        let told = plugin.call_with("VERSION", format!(r#"{{"cniVersion":"{version}"}}"#).as_bytes(), &[]);
        let spoken = told.text["supportedVersions"].as_array().expect("a list");
        assert!(told.done && spoken.contains(&json!(version)) && told.text["cniVersion"] == version);

        // A DEL without an ADD, and a CHECK of what is not there.
        assert_eq!(plugin.call("DEL", version, &never, &nothing), PluginOutput::nothing());
        call(&plugin, "CHECK").assert_error(version, 100, "CHECK before ADD");

        assert_eq!(call(&plugin, "ADD"), PluginOutput { done: true, text: previous(version) });
        assert!(added.is_captured(), "{version}");
        assert_eq!(call(&plugin, "CHECK"), PluginOutput::nothing());
        // A runtime may repeat it after it has lost the answer.
        assert_eq!(call(&plugin, "ADD"), PluginOutput { done: true, text: previous(version) });

        plugin.daemon.kill().expect("killed");
        call(&plugin, "CHECK").assert_error(version, 11, "CHECK without the daemon");
        call(&plugin, "STATUS").assert_error(version, 50, "STATUS without the daemon");
        assert!(added.is_captured(), "{version}");
        plugin.daemon.restart().expect("started");
        assert_eq!(call(&plugin, "CHECK"), PluginOutput::nothing());
        plugin.daemon.wait("it is ready", |_| call(&plugin, "STATUS").done).expect("ready");

        for time in ["first", "second"] {
            assert_eq!(call(&plugin, "DEL"), PluginOutput::nothing(), "{version}, the {time} DEL");
            assert!(!added.is_captured(), "{version}");
        }
        call(&plugin, "CHECK").assert_error(version, 100, "CHECK after DEL");
        // A runtime that has lost the namespace says so with an empty path, and with no result.
        let mut variables = plugin.variables(&added);
        variables.retain(|(name, _)| *name != "CNI_NETNS");
        let config = json!({ "cniVersion": version, "name": "net", "type": "intercept-cni", "socket": plugin.entry["socket"] });
        assert_eq!(
            plugin.call_with("DEL", config.to_string().as_bytes(), &variables),
            PluginOutput::nothing()
        );
        for id in ["one", "never"] {
            fs::remove_file(plugin.netns(id)).expect("removed");
        }
    }
    assert_eq!(agent.pods().expect("status"), []);
}

#[test]
fn without_the_daemon_del_succeeds_and_the_next_daemon_releases() {
    let agent = Agent::new("d-cni-del").expect("the agent");
    let mut plugin = InstalledPlugin::new(&agent, &[]);
    let added = plugin.new_pod("one", "shop");
    assert!(plugin.call("ADD", "1.0.0", &added, &json!({})).done);
    plugin.daemon.kill().expect("killed");
    assert_eq!(plugin.call("DEL", "1.0.0", &added, &json!({})), PluginOutput::nothing());
    drop(added);
    plugin.daemon.restart().expect("started");
    plugin.daemon.wait("it is released", |_| agent.pods().is_ok_and(|pods| pods.is_empty())).expect("gone");
}

#[test]
fn gc_releases_what_is_not_listed_and_nothing_of_others() {
    let agent = Agent::new("d-cni-gc").expect("the agent");
    let mut plugin = InstalledPlugin::new(&agent, &[]);
    let (kept, lost) = (plugin.new_pod("kept", "shop"), plugin.new_pod("lost", "shop"));
    for added in [&kept, &lost] {
        assert!(plugin.call("ADD", "1.1.0", added, &json!({})).done);
    }
    // A pod of the folder has no sandbox, so that no list of sandboxes speaks of it.
    let of_folder = Pod::new(PodSpec::new("folder")).expect("a pod");
    plugin.daemon.put("folder", &of_folder, &["-i", "*"]).expect("written");
    plugin.daemon.wait("all are captured", |_| agent.pods().is_ok_and(|pods| pods.len() == 3)).expect("all");
    let gc = |plugin: &InstalledPlugin<'_>, list: Value| {
        assert_eq!(plugin.call("GC", "1.1.0", &kept, &list), PluginOutput::nothing(), "{list}");
    };
    let of = |ids: &[&str]| {
        let list: Vec<_> = ids.iter().map(|id| json!({ "containerID": id, "ifname": "eth0" })).collect();
        json!({ "cni.dev/valid-attachments": list })
    };
    // Without a list, and with one that has more than this plugin knows.
    gc(&plugin, json!({}));
    gc(&plugin, of(&["lost", "of another plugin", "kept"]));
    assert!(kept.is_captured() && lost.is_captured());
    gc(&plugin, of(&["of another plugin", "kept"]));
    plugin.daemon.wait("it is released", |_| !lost.is_captured()).expect("released");
    assert!(kept.is_captured());
    assert_eq!(plugin.call("DEL", "1.1.0", &lost, &json!({})), PluginOutput::nothing());
    plugin.daemon.kill().expect("killed");
    gc(&plugin, of(&[]));
    assert!(kept.is_captured());
    plugin.daemon.restart().expect("started");
    gc(&plugin, of(&[]));
    plugin.daemon.wait("it is released", |_| !kept.is_captured()).expect("released");
    let pods = agent.pods().expect("status");
    assert!(pods.len() == 1 && pods[0].cgroup == of_folder.cgroup.path(), "{pods:?}");
}

#[test]
fn excluded_namespaces_are_left_alone() {
    let agent = Agent::new("d-cni-excluded").expect("the agent");
    let plugin = InstalledPlugin::new(&agent, &["--exclude-namespaces", "kube-system,quiet"]);
    for (namespace, captured) in [("shop", true), ("quiet", false), ("kube-system", false)] {
        let added = plugin.new_pod(namespace, namespace);
        for version in VERSIONS {
            let printed = plugin.call("ADD", version, &added, &json!({}));
            assert_eq!(printed, PluginOutput { done: true, text: previous(version) }, "{namespace}");
            assert_eq!(added.is_captured(), captured, "{namespace}");
            // What is left alone is as it should be.
            assert_eq!(
                plugin.call("CHECK", version, &added, &json!({})),
                PluginOutput::nothing(),
                "{namespace}"
            );
        }
        assert_eq!(plugin.call("DEL", "1.1.0", &added, &json!({})), PluginOutput::nothing());
    }
}

/// What `CNI_ARGS` say of a pod's namespace, the plugin knows without the daemon.
#[test]
fn excluded_namespaces_do_not_wait_for_the_daemon() {
    let agent = Agent::new("d-cni-alone").expect("the agent");
    let mut plugin = InstalledPlugin::new(&agent, &["--exclude-namespaces", "kube-system,quiet"]);
    plugin.daemon.kill().expect("killed");
    for (namespace, starts) in [("shop", false), ("quiet", true), ("kube-system", true), ("quieter", false)] {
        let added = plugin.new_pod(namespace, namespace);
        for version in VERSIONS {
            let printed = plugin.call("ADD", version, &added, &json!({}));
            if starts {
                let done = PluginOutput { done: true, text: previous(version) };
                assert_eq!(printed, done, "{namespace}");
            } else {
                printed.assert_error(version, 11, namespace);
            }
        }
    }
    // A daemon with another list writes its own.
    let folders = folders(plugin.folder.path());
    let folders = folders.each_ref().map(String::as_str);
    let other = [&["--cni-keep", "--exclude-namespaces", "shop"], &folders[..]].concat();
    let other = Daemon::start(&agent, &other).expect("a daemon");
    let list = || read_entry(plugin.folder.path()).expect("an entry")["excludeNamespaces"].clone();
    other.wait("the list is written", |_| list() == json!(["shop"])).expect("written");
}

#[test]
fn wrong_calls_get_an_error_and_change_nothing() {
    let agent = Agent::new("d-cni-wrong").expect("the agent");
    let plugin = InstalledPlugin::new(&agent, &[]);
    let added = plugin.new_pod("one", "shop");
    let all = plugin.variables(&added);
    let sound = |more: Value| {
        let mut config = plugin.entry.clone();
        config["cniVersion"] = json!("1.1.0");
        config["name"] = json!("net");
        config["prevResult"] = previous("1.1.0");
        for (name, value) in more.as_object().into_iter().flatten() {
            config[name] = value.clone();
        }
        config.to_string()
    };
    let newest = "1.1.0";
    for (what, command, stdin, version, code) in [
        ("broken JSON", "ADD", "{\"cniVersion\": \"1.0.0\", ".to_owned(), newest, 6),
        ("no JSON", "DEL", "net".to_owned(), newest, 6),
        ("nothing", "ADD", String::new(), newest, 6),
        ("a list in place of an object", "CHECK", "[]".to_owned(), newest, 6),
        ("a version that is a number", "ADD", sound(json!({ "cniVersion": 1 })), newest, 6),
        ("a socket that is a list", "STATUS", sound(json!({ "socket": [] })), newest, 6),
        ("a version of the past", "ADD", sound(json!({ "cniVersion": "0.2.0" })), "0.2.0", 1),
        ("a version of the future", "ADD", sound(json!({ "cniVersion": "2.0.0" })), "2.0.0", 1),
        ("no version, which is 0.2.0's", "ADD", r#"{"name":"net"}"#.to_owned(), "0.2.0", 1),
        ("another command", "UPDATE", sound(json!({})), newest, 4),
        ("no command", "", sound(json!({})), newest, 4),
        ("no result before it", "ADD", sound(json!({ "prevResult": null })), newest, 7),
    ] {
        plugin.call_with(command, stdin.as_bytes(), &all).assert_error(version, code, what);
    }
    for (command, name) in [
        ("ADD", "CNI_CONTAINERID"),
        ("ADD", "CNI_NETNS"),
        ("ADD", "CNI_IFNAME"),
        ("CHECK", "CNI_CONTAINERID"),
        ("CHECK", "CNI_NETNS"),
        ("DEL", "CNI_CONTAINERID"),
    ] {
        let mut variables = all.clone();
        variables.retain(|(own, _)| *own != name);
        let printed = plugin.call_with(command, sound(json!({})).as_bytes(), &variables);
        printed.assert_error(newest, 4, &format!("{command} without {name}"));
        assert!(printed.text["msg"].as_str().is_some_and(|msg| msg.contains(name)), "{printed:?}");
    }
    assert_eq!(agent.pods().expect("status"), []);
    assert!(!added.is_captured());
    // What it does not know is not its business.
    let more = json!({ "ipMasq": true, "capabilities": { "other": true }, "args": { "cni": {} } });
    assert!(plugin.call("ADD", "1.1.0", &added, &more).done);
    assert!(added.is_captured());
}
