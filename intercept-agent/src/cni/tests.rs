use std::os::unix::net::UnixListener;

use super::*;
use crate::daemon::{protocol, report::PodFailure};

const PREVIOUS: &str = r#"{"cniVersion":"1.0.0","interfaces":[{"name":"eth0","sandbox":"/n"}],"ips":[{"address":"10.1.0.5/24"}]}"#;

fn call(command: &str, config: &str) -> Call {
    let environment = [
        ("CNI_COMMAND", command),
        ("CNI_CONTAINERID", "sandbox-1"),
        ("CNI_NETNS", "/run/netns/n"),
        ("CNI_IFNAME", "eth0"),
        ("CNI_ARGS", "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=cart-0;K8S_POD_UID=uid-1"),
    ];
    let environment = environment.map(|(name, value)| (name.to_owned(), value.to_owned())).into();
    Call { environment, stdin: config.as_bytes().to_owned() }
}

fn config(socket: &Path, more: &str) -> String {
    format!(
        r#"{{"cniVersion":"1.0.0","name":"net","type":"intercept-cni","socket":{socket:?},"prevResult":{PREVIOUS}{more}}}"#
    )
}

fn error(printed: Printed) -> (u64, String) {
    let error = printed.expect_err("an error");
    (error["code"].as_u64().expect("a code"), error["msg"].as_str().expect("a text").to_owned())
}

/// Starts a daemon that gives one answer. Returns the request that it received.
fn answering(folder: &Path, answer: Response) -> (PathBuf, std::thread::JoinHandle<DaemonRequest>) {
    use std::io::{BufRead as _, Write as _};
    let path = folder.join("s.sock");
    let listener = UnixListener::bind(&path).expect("bound");
    let thread = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().expect("a connection");
        let mut line = String::new();
        std::io::BufReader::new(&stream).read_line(&mut line).expect("a line");
        let answer = serde_json::to_string(&answer).expect("json");
        stream.write_all(format!("{answer}\n").as_bytes()).expect("written");
        serde_json::from_str(&line).expect("a request")
    });
    (path, thread)
}

#[test]
fn add_asks_for_the_pod_and_passes_the_result_on() {
    let folder = tempfile::tempdir().expect("a folder");
    let (socket, daemon) = answering(folder.path(), Response::Done("captured".into()));
    let more = r#","arguments":["-m","TPROXY"],"runtimeConfig":{"cgroupPath":"/kubepods/poduid-1",
        "io.kubernetes.cri.pod-annotations":{"sidecar.istio.io/status":"{}"}}"#;
    let printed = call("ADD", &config(&socket, more)).perform().expect("done").expect("a result");
    assert_eq!(printed, serde_json::from_str::<Value>(PREVIOUS).expect("json"));
    let DaemonRequest::Add(add) = daemon.join().expect("answered") else { panic!("another request") };
    assert_eq!(
        *add,
        Add {
            pod: SandboxInfo {
                sandbox: "sandbox-1".into(),
                uid: Some("uid-1".into()),
                namespace: "shop".into(),
                name: "cart-0".into()
            },
            netns: "/run/netns/n".into(),
            cgroup: Some("/kubepods/poduid-1".into()),
            annotations: Some([("sidecar.istio.io/status".to_owned(), "{}".to_owned())].into()),
            addresses: vec![[10, 1, 0, 5].into()],
            select: protocol::Select::Sidecar,
            given: crate::daemon::desired::CaptureArgs {
                arguments: vec!["-m".into(), "TPROXY".into()],
                ..Default::default()
            },
        }
    );
}

#[test]
fn annotations_that_nobody_reads_are_not_sent() {
    let folder = tempfile::tempdir().expect("a folder");
    let (socket, daemon) = answering(folder.path(), Response::Done("no_sidecar".into()));
    let read = [
        "sidecar.istio.io/status",
        "traffic.sidecar.istio.io/includeInboundPorts",
        "istio.io/reroute-virtual-interfaces",
        "config.linkerd.io/skip-subnets",
        "traffic.kuma.io/exclude-inbound-ports",
        "consul.hashicorp.com/redirect-traffic-config",
        "intercept/open-without-proxy",
    ];
    let other = [
        "example.com/note",
        "notistio.io/x",
        "istio.io.example.com/x",
        "intercept",
        "kubernetes.io/config.hash",
    ];
    let mut annotations: BTreeMap<&str, String> = read.map(|name| (name, "x".to_owned())).into();
    annotations.extend(other.map(|name| (name, "\u{1}".repeat(50_000))));
    let passed = json!({ "io.kubernetes.cri.pod-annotations": annotations });
    call("ADD", &config(&socket, &format!(r#","runtimeConfig":{passed}"#))).perform().expect("done");
    let DaemonRequest::Add(add) = daemon.join().expect("answered") else { panic!("another request") };
    let sent: Vec<String> = add.annotations.expect("told").into_keys().collect();
    let mut expected = read.map(str::to_owned);
    expected.sort();
    assert_eq!(sent, expected);
}

#[test]
fn input_that_is_not_text_gets_the_specifications_error() {
    let sound = config(Path::new("/nonexistent/agent.sock"), "").into_bytes();
    let broken = |stdin: Vec<u8>| error(Call { stdin, ..call("ADD", "") }.perform());
    for stdin in
        [vec![0xff, 0xfe, 0], [b"\xff", &sound[..]].concat(), [&sound[..20], b"\x80", &sound[20..]].concat()]
    {
        assert_eq!(broken(stdin).0, 6);
    }
    let (code, msg) = broken(vec![b' '; usize::try_from(MAX_STDIN).expect("fits") + 1]);
    assert!(code == 6 && msg.contains("longer than 4194304 bytes"), "{code} {msg}");
}

#[test]
fn a_pod_that_is_not_captured_fails_add_with_the_daemons_words() {
    let folder = tempfile::tempdir().expect("a folder");
    let problem = PodFailure { cause: "options".into(), text: "annotation x: no".into() };
    let (socket, daemon) = answering(folder.path(), Response::Failed(problem));
    let printed = call("ADD", &config(&socket, "")).perform();
    assert_eq!(error(printed), (100, "capturing the pod: annotation x: no".into()));
    daemon.join().expect("answered");
}

#[test]
fn without_a_daemon_only_pods_that_bear_the_mark_wait_for_it() {
    let nowhere = Path::new("/nonexistent/agent.sock");
    let with = |annotations: &str| {
        config(nowhere, &format!(r#","runtimeConfig":{{"io.kubernetes.cri.pod-annotations":{annotations}}}"#))
    };
    let (code, msg) = error(call("ADD", &with(r#"{"sidecar.istio.io/status":"{}"}"#)).perform());
    assert!(code == 11 && msg.contains("/nonexistent/agent.sock") && msg.contains("daemon"), "{code} {msg}");
    assert!(call("ADD", &with("{}")).perform().is_ok());
    // A pod without annotations, in containerd's notation.
    assert!(call("ADD", &with("null")).perform().is_ok());
    // The runtime passes no annotations, so plain pods must start.
    assert!(call("ADD", &config(nowhere, "")).perform().is_ok());
    // The mark is that of the daemon's mesh.
    for (mesh, mark) in [
        ("istio", r#"{"sidecar.istio.io/status":"{}"}"#),
        ("linkerd", r#"{"linkerd.io/proxy-version":"edge-26.1.1"}"#),
        ("kuma", r#"{"kuma.io/sidecar-injected":"true"}"#),
        ("consul", r#"{"consul.hashicorp.com/redirect-traffic-config":"{}"}"#),
    ] {
        for own in ["istio", "linkerd", "kuma", "consul"] {
            let more =
                format!(r#","mesh":"{own}","runtimeConfig":{{"io.kubernetes.cri.pod-annotations":{mark}}}"#);
            let waits = call("ADD", &config(nowhere, &more)).perform().is_err();
            assert_eq!(waits, own == mesh, "a pod of {mesh} with --mesh {own}");
        }
    }
    assert_eq!(call("DEL", &config(nowhere, "")).perform(), Ok(None));
    assert_eq!(error(call("CHECK", &config(nowhere, "")).perform()).0, 11);
}

#[test]
fn wrong_calls_are_answered_with_the_specifications_codes() {
    let nowhere = Path::new("/nonexistent/agent.sock");
    let sound = config(nowhere, "");
    assert_eq!(error(call("ADD", "{").perform()).0, 6);
    assert_eq!(error(call("ADD", &sound.replacen("1.0.0", "0.1.0", 1)).perform()).0, 1);
    assert_eq!(error(call("LIST", &sound).perform()).0, 4);
    for name in ["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"] {
        let mut call = call("ADD", &sound);
        call.environment.remove(name);
        let (code, msg) = error(call.perform());
        assert!(code == 4 && msg.contains(name), "{code} {msg}");
    }
    let unchained = r#"{"cniVersion":"1.0.0","name":"net","type":"intercept-cni"}"#;
    let (code, msg) = error(call("ADD", unchained).perform());
    assert!(code == 7 && msg.contains("prevResult"), "{code} {msg}");
}

#[test]
fn version_tells_what_is_spoken() {
    for stdin in ["", r#"{"cniVersion":"1.0.0"}"#] {
        let printed = call("VERSION", stdin).perform().expect("done").expect("a result");
        assert_eq!(printed["supportedVersions"], json!(["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"]));
    }
}

#[test]
fn a_network_of_its_own_needs_no_result_before_it() {
    let folder = tempfile::tempdir().expect("a folder");
    for version in VERSIONS {
        let (socket, daemon) = answering(folder.path(), Response::Done("captured".into()));
        let alone = json!({
            "cniVersion": version, "name": "istio-cni", "type": "intercept-cni", "socket": socket, "standalone": true,
        });
        let printed = call("ADD", &alone.to_string()).perform().expect("done");
        assert_eq!(printed, Some(json!({ "cniVersion": version })));
        assert!(matches!(daemon.join().expect("answered"), DaemonRequest::Add(_)));
        std::fs::remove_file(socket).expect("removed");
    }
}

#[test]
fn status_says_whether_a_pod_would_be_captured() {
    let folder = tempfile::tempdir().expect("a folder");
    let (socket, daemon) = answering(folder.path(), Response::Done("ready".into()));
    assert_eq!(call("STATUS", &config(&socket, "")).perform(), Ok(None));
    assert_eq!(daemon.join().expect("answered"), DaemonRequest::Ready);
    std::fs::remove_file(&socket).expect("removed");
    let problem = PodFailure { cause: "not_ready".into(), text: "reading the applied pods".into() };
    let (socket, daemon) = answering(folder.path(), Response::Failed(problem));
    let (code, msg) = error(call("STATUS", &config(&socket, "")).perform());
    assert!(code == 50 && msg.ends_with("reading the applied pods"), "{code} {msg}");
    daemon.join().expect("answered");
    let (code, msg) = error(call("STATUS", &config(Path::new("/nonexistent/agent.sock"), "")).perform());
    assert!(code == 50 && msg.contains("that `intercept-agent daemon` is running"), "{code} {msg}");
}

#[test]
fn gc_tells_which_sandboxes_there_are() {
    let folder = tempfile::tempdir().expect("a folder");
    let valid = r#","cni.dev/valid-attachments":[{"containerID":"a","ifname":"eth0"},{"containerID":"b","ifname":"eth0"}]"#;
    let (socket, daemon) = answering(folder.path(), Response::Done("0 released".into()));
    assert_eq!(call("GC", &config(&socket, valid)).perform(), Ok(None));
    assert_eq!(
        daemon.join().expect("answered"),
        DaemonRequest::Collect { valid: vec!["a".into(), "b".into()] }
    );
    // The daemon is not asked if the list does not cover all sandboxes, or is missing.
    for more in [r#","standalone":true"#, ""] {
        let valid = if more.is_empty() { "" } else { valid };
        let nowhere = config(Path::new("/nonexistent/agent.sock"), &format!("{valid}{more}"));
        assert_eq!(call("GC", &nowhere).perform(), Ok(None));
    }
}
