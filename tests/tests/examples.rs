//! Captures real pods with the files in examples/ and the flags in docs/other-meshes.md.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use intercept_agent::facade::{
    cni::install::{Folders, Mode, Plugin, PluginEntry},
    daemon::{DEFAULT_SOCKET, Mesh, PodState},
};
use serde_json::{Value, json};
use tests::{
    agent::{Agent, succeed},
    daemon::Daemon,
    envoy,
    testbed::Sandbox,
};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn read(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

fn json_of(path: &str) -> Value {
    serde_json::from_str(&read(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

#[test]
fn a_daemon_captures_pods_by_the_files() {
    let agent = Agent::new("examples").expect("the agent");
    let daemon = Daemon::start(&agent, &[]).expect("a daemon");
    let files: Vec<_> = fs::read_dir(root().join("examples/pods")).expect("listed").flatten().collect();
    assert!(files.len() >= 5, "{files:?}");
    let mut places = Vec::new();
    for (number, file) in files.iter().enumerate() {
        let name = file.file_name().into_string().expect("a name");
        let mut pod = json_of(&format!("examples/pods/{name}"));
        let sandbox = Sandbox::new(&format!("example-{number}")).expect("a place");
        for (field, path) in [("cgroup", sandbox.cgroup.path()), ("netns", sandbox.netns.path())] {
            assert!(pod[field].is_string(), "{name} has no {field}");
            pod[field] = json!(path);
        }
        places.push(sandbox);
        let name = name.strip_suffix(".json").expect("a JSON file");
        daemon.put_text(name, &pod.to_string()).expect("put");
        let report = daemon.wait_for(name, PodState::Captured);
        report.unwrap_or_else(|error| panic!("{name}: {error:#}"));
    }
    assert_eq!(agent.pods().expect("status").len(), files.len());
}

#[test]
fn the_document_of_other_meshes_has_the_flags_of_the_files() {
    let document = read("docs/other-meshes.md");
    for mesh in ["Linkerd", "Kuma", "Consul"] {
        let row = document.lines().find(|line| line.starts_with(&format!("| {mesh} | `-p")));
        let row = row.unwrap_or_else(|| panic!("there is no row of {mesh}"));
        let flags = row.split('`').nth(1).expect("flags").replace('\'', "");
        let pod = json_of(&format!("examples/pods/{}.json", mesh.to_lowercase()));
        let arguments = pod["arguments"].as_array().expect("a list");
        let arguments: Vec<_> = arguments.iter().map(|argument| argument.as_str().expect("text")).collect();
        assert_eq!(flags.split(' ').collect::<Vec<_>>(), arguments, "{mesh}");
    }
}

#[test]
fn the_conflist_is_as_the_agent_leaves_it() {
    let example = json_of("examples/10-bridge.conflist");
    let folder = tempfile::tempdir().expect("a folder");
    let folders =
        Folders { configurations: folder.path().join("net.d"), binaries: folder.path().join("bin") };
    fs::create_dir(&folders.configurations).expect("made");
    let path = folders.configurations.join("10-bridge.conflist");
    let mut before = example.clone();
    before["plugins"].as_array_mut().expect("a list").pop().expect("the plugin");
    fs::write(&path, before.to_string()).expect("written");
    let entry = PluginEntry {
        socket: Path::new(DEFAULT_SOCKET),
        select: "sidecar",
        mesh: Mesh::Istio,
        exclude_namespaces: &["kube-system".to_owned()].into(),
        arguments: &[],
    }
    .json();
    let binary = std::env::current_exe().expect("this program");
    let plugin = Plugin { folders, mode: Mode::Chained { file: None }, entry, binary };
    assert_eq!(plugin.install().expect("installed").path, path);
    let after: Value = serde_json::from_str(&fs::read_to_string(path).expect("read")).expect("JSON");
    assert_eq!(after, example);
}

#[test]
fn envoy_takes_its_configuration() {
    let mut validate = Command::new(envoy::program().expect("Envoy: `cargo xtask setup envoy` gets it"));
    validate.args(["--mode", "validate", "--log-level", "error", "--config-path"]);
    succeed({
        validate.arg(root().join("examples/envoy.yaml"));
        validate
    })
    .expect("valid");
}
