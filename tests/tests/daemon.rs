//! The daemon with real pods: it applies what its folder and its socket ask for, and nothing else.

use std::{
    fs,
    net::{IpAddr, SocketAddr},
    os::unix::fs::PermissionsExt as _,
    process::Command,
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    time::{Duration, Instant},
};

use intercept_agent::facade::daemon::{
    Add, CaptureArgs, DaemonRequest, PodState, Response, SandboxInfo, Select,
};
use serde_json::{Value, json};
use tests::{
    actor::{Bind, Listen, Transport},
    agent::Agent,
    daemon::{Daemon, OUTBOUND, answers, call_plugin, free_address, get, proxy, service},
    status::StatusEntry,
    testbed::{Ids, Pod, PodSpec, Sandbox},
};

#[test]
fn pods_of_the_folder_are_captured_changed_and_released() {
    let agent = Agent::new("d-folder").expect("the agent");
    let daemon = Daemon::start(&agent, &[]).expect("a daemon");
    let pod = Pod::new(PodSpec::new("folder")).expect("a pod");
    let actor = proxy(&pod);
    daemon.put("a", &pod, &OUTBOUND).expect("put");
    daemon.wait_for("a", PodState::Captured).expect("captured");
    assert_eq!(answers(&actor, service()).as_deref(), Some("proxy"));

    // After a wrong change the old policy stays active.
    daemon.put("a", &pod, &["-i", "nonsense"]).expect("put");
    let report = daemon.wait_for("a", PodState::Failed).expect("failed");
    let problem = report.failure.expect("a problem");
    assert!(problem.cause == "options" && problem.text.contains("nonsense"), "{problem:?}");
    assert_eq!(answers(&actor, service()).as_deref(), Some("proxy"));

    daemon.put("a", &pod, &["-i", "*", "-x", "10.96.0.0/16", "-u", "1337"]).expect("put");
    daemon.wait_for("a", PodState::Captured).expect("captured");
    assert_ne!(answers(&actor, service()).as_deref(), Some("proxy"));

    daemon.remove("a").expect("removed");
    daemon.wait("released", |daemon| daemon.reports().is_ok_and(|all| all.is_empty())).expect("released");
    assert_eq!(agent.pods().expect("status"), []);
    // A command beside the daemon does not take its programs away.
    agent.attach(&pod, &OUTBOUND).expect("attached");
    agent.detach(&pod).expect("detached");
    assert!(agent.store().join("maps").is_dir());
    daemon.put("a", &pod, &OUTBOUND).expect("put");
    daemon.wait_for("a", PodState::Captured).expect("captured again");
}

#[test]
fn a_broken_pod_harms_no_other_and_heals() {
    let agent = Agent::new("d-broken").expect("the agent");
    let daemon = Daemon::start(&agent, &[]).expect("a daemon");
    let sandbox = Sandbox::new("good").expect("a place");
    daemon.put_text("unreadable", "{").expect("put");
    daemon.put_text("host", r#"{"cgroup": "/sys/fs/cgroup", "netns": "/proc/1/ns/net"}"#).expect("put");
    let late =
        fs::canonicalize(sandbox.cgroup.path().parent().expect("a parent")).expect("a path").join("late");
    let text = json!({"cgroup": late, "netns": sandbox.netns.path(), "arguments": OUTBOUND});
    daemon.put_text("late", &text.to_string()).expect("put");
    for (name, cause) in [("unreadable", "options"), ("host", "cgroup"), ("late", "cgroup")] {
        let report = daemon.wait_for(name, PodState::Failed).expect(name);
        assert_eq!(report.failure.expect("a problem").cause, cause, "{name}");
    }
    daemon
        .wait("tried again", |d| d.report("late").is_ok_and(|r| r.is_some_and(|r| r.failures > 2)))
        .expect("retried");
    fs::create_dir(&late).expect("made");
    let healed = daemon.wait_for("late", PodState::Captured);
    daemon.remove("late").expect("removed");
    daemon.wait("gone", |d| d.report("late").is_ok_and(|r| r.is_none())).expect("gone");
    fs::remove_dir(&late).expect("removed");
    healed.expect("captured when its cgroup came");
    daemon.put("good", &sandbox, &OUTBOUND).expect("put");
    daemon.wait_for("good", PodState::Captured).expect("captured");
    assert!(daemon.report("unreadable").expect("asked").is_some());
}

#[test]
fn a_removed_pod_is_released_within_a_second() {
    let agent = Agent::new("d-gone").expect("the agent");
    let mut daemon = Daemon::start(&agent, &[]).expect("a daemon");
    let sandbox = Sandbox::new("gone").expect("a place");
    daemon.put("a", &sandbox, &OUTBOUND).expect("put");
    assert!(daemon.wait_for("a", PodState::Captured).expect("captured").followed);
    daemon.remove("a").expect("removed");
    daemon.put("b", &sandbox, &OUTBOUND).expect("put");
    daemon.wait_for("b", PodState::Captured).expect("captured under its other name");
    let emptied = |daemon: &Daemon<'_>| {
        let gone = Instant::now();
        daemon.wait("no state", |_| agent.pods().is_ok_and(|pods| pods.is_empty())).expect("gone");
        let took = gone.elapsed();
        assert!(took < Duration::from_secs(1), "{took:?}");
    };
    drop(sandbox);
    emptied(&daemon);
    // The file still asks for it.
    let cause = |daemon: &Daemon<'_>| daemon.report("b").ok()??.failure.map(|problem| problem.cause);
    daemon.wait("it is told why", |daemon| cause(daemon).as_deref() == Some("cgroup")).expect("failed");

    let sandbox = Sandbox::new("gone-meanwhile").expect("a place");
    daemon.put("c", &sandbox, &OUTBOUND).expect("put");
    daemon.wait_for("c", PodState::Captured).expect("captured");
    daemon.kill().expect("killed");
    drop(sandbox);
    daemon.restart().expect("started");
    // The kernel releases the links of a cgroup some time after the cgroup is removed.
    emptied(&daemon);
}

#[test]
fn killed_under_load_no_connection_fails_or_passes_by() {
    let agent = Agent::new("d-killed").expect("the agent");
    let mut daemon = Daemon::start(&agent, &[]).expect("a daemon");
    let pod = Pod::new(PodSpec::new("killed")).expect("a pod");
    let actor = proxy(&pod);
    let other = Sandbox::new("unwanted").expect("a place");
    daemon.put("a", &pod, &OUTBOUND).expect("put");
    daemon.put("b", &other, &OUTBOUND).expect("put");
    for name in ["a", "b"] {
        daemon.wait_for(name, PodState::Captured).expect(name);
    }
    let (stop, dialled) = (AtomicBool::new(false), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        let client = scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                assert_eq!(
                    answers(&actor, service()).as_deref(),
                    Some("proxy"),
                    "a connection went elsewhere"
                );
                dialled.fetch_add(1, Ordering::Relaxed);
            }
        });
        for _ in 0..3 {
            daemon.kill().expect("killed");
            daemon.restart().expect("started");
            daemon.wait_for("a", PodState::Captured).expect("taken over");
        }
        daemon.kill().expect("killed");
        daemon.remove("b").expect("removed");
        daemon.restart().expect("started");
        stop.store(true, Ordering::Relaxed);
        if let Err(panic) = client.join() {
            std::panic::resume_unwind(panic);
        }
    });
    assert!(dialled.load(Ordering::Relaxed) > 20, "too few connections to tell");
    // The file was removed while no daemon ran.
    daemon.wait("b is released", |d| d.report("b").is_ok_and(|report| report.is_none())).expect("released");
    let pods = agent.pods().expect("status");
    assert_eq!(pods.len(), 1, "{pods:#?}");
    assert_eq!(pods[0].cgroup, pod.cgroup.path());
}

#[test]
fn ended_by_sigterm_pods_stay_captured() {
    let agent = Agent::new("d-term").expect("the agent");
    let mut daemon = Daemon::start(&agent, &[]).expect("a daemon");
    let pod = Pod::new(PodSpec::new("term")).expect("a pod");
    let actor = proxy(&pod);
    daemon.put("a", &pod, &OUTBOUND).expect("put");
    daemon.wait_for("a", PodState::Captured).expect("captured");
    let before = agent.pods().expect("status");
    assert!(daemon.terminate().expect("ended").success());
    assert_eq!(answers(&actor, service()).as_deref(), Some("proxy"));
    // A command must not take its programs for leftovers.
    let other = Sandbox::new("term-other").expect("a place");
    agent.attach(&other, &OUTBOUND).expect("attached");
    agent.detach(&other).expect("detached");
    assert_eq!(answers(&actor, service()).as_deref(), Some("proxy"));
    daemon.restart().expect("started");
    daemon.wait_for("a", PodState::Captured).expect("taken over");
    let after = agent.pods().expect("status");
    assert_eq!((after[0].netns_cookie, after.len()), (before[0].netns_cookie, 1), "{after:#?}");
}

#[test]
fn a_failed_release_is_retried() {
    use rustix::mount::{MountFlags, mount_remount};
    let agent = Agent::new("d-release").expect("the agent");
    let daemon = Daemon::start(&agent, &[]).expect("a daemon");
    let sandbox = Sandbox::new("release").expect("a place");
    daemon.put("a", &sandbox, &OUTBOUND).expect("put");
    daemon.wait_for("a", PodState::Captured).expect("captured");
    // Its links cannot be removed.
    mount_remount(agent.bpffs(), MountFlags::RDONLY, c"").expect("made read-only");
    daemon.remove("a").expect("removed");
    let report = daemon.wait_for("a", PodState::Failed).expect("failed");
    let problem = report.failure.expect("a problem");
    assert!(problem.text.contains("Read-only file system"), "{problem:?}");
    drop(sandbox);
    mount_remount(agent.bpffs(), MountFlags::empty(), c"").expect("made writable");
    daemon
        .wait("it is forgotten", |daemon| daemon.reports().is_ok_and(|all| all.is_empty()))
        .expect("released");
    assert_eq!(agent.pods().expect("status"), []);
}

#[test]
fn one_daemon_keeps_a_store() {
    let agent = Agent::new("d-one").expect("the agent");
    let mut daemon = Daemon::start(&agent, &[]).expect("a daemon");
    let sandbox = Sandbox::new("one").expect("a place");
    daemon.put("a", &sandbox, &OUTBOUND).expect("put");
    daemon.wait_for("a", PodState::Captured).expect("captured");
    // With its own socket, so that only the store can prevent the start.
    let other = |arguments: &[&str]| {
        let mut other = agent.command("daemon");
        other.arg("--socket").arg(daemon.folder().join("other.sock")).args(arguments);
        other.output().expect("started")
    };
    let output = other(&[]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && said.contains("another daemon keeps the pods of"), "{said}");
    assert_eq!(agent.pods().expect("status").len(), 1, "it released nothing");
    // Commands work beside the daemon, and the next daemon after it.
    agent.attach(&Sandbox::new("one-more").expect("a place"), &OUTBOUND).expect("attached");
    daemon.kill().expect("killed");
    daemon.restart().expect("started");
    daemon.wait_for("a", PodState::Captured).expect("taken over");
}

#[test]
fn state_of_others_is_refused() {
    let agent = Agent::new("d-foreign").expect("the agent");
    let root = agent.bpffs().join("intercept");
    fs::set_permissions(agent.bpffs(), fs::Permissions::from_mode(0o1777))
        .expect("opened, as many nodes have it");
    fs::create_dir(&root).expect("created");
    std::os::unix::fs::chown(&root, Some(65534), None).expect("given away");
    let sandbox = Sandbox::new("foreign").expect("a place");
    let refused = agent.attach(&sandbox, &OUTBOUND).expect_err("refused").to_string();
    assert!(refused.contains("belongs to user 65534"), "{refused}");
    std::os::unix::fs::chown(&root, Some(0), None).expect("taken back");
    fs::set_permissions(&root, fs::Permissions::from_mode(0o777)).expect("opened");
    let refused = agent.attach(&sandbox, &OUTBOUND).expect_err("refused").to_string();
    assert!(refused.contains("lets others than root write"), "{refused}");
    fs::remove_dir(&root).expect("removed");
    agent.attach(&sandbox, &OUTBOUND).expect("attached");
    let mode = |path: &std::path::Path| fs::metadata(path).expect("there").permissions().mode() & 0o777;
    assert_eq!((mode(&root), mode(&agent.store())), (0o700, 0o700));
}

#[test]
fn folders_that_others_can_change_are_refused_at_the_start() {
    let agent = Agent::new("d-unsafe").expect("the agent");
    let folder = tests::testbed::name::scratch("unsafe").expect("a folder");
    let refused = |arguments: &[&std::path::Path]| {
        let mut daemon = agent.command("daemon");
        let output = daemon.arg("--socket").args(arguments).output().expect("started");
        assert!(!output.status.success());
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    let (safe, open) = (folder.path().join("safe"), folder.path().join("open"));
    fs::create_dir(&safe).expect("created");
    fs::create_dir(&open).expect("created");
    fs::set_permissions(&open, fs::Permissions::from_mode(0o777)).expect("opened");
    let said = refused(&[&open.join("a.sock")]);
    assert!(said.contains("open: its mode 0777 lets others"), "{said}");
    let said = refused(&[&safe.join("a.sock"), "--pods-dir".as_ref(), &open]);
    assert!(said.contains("open: its mode 0777 lets others"), "{said}");
    // A symbolic link instead of the lock file is neither followed nor truncated.
    let target = folder.path().join("target");
    fs::write(&target, "precious").expect("written");
    std::os::unix::fs::symlink(&target, safe.join("b.lock")).expect("linked");
    let said = refused(&[&safe.join("b.sock")]);
    assert!(said.contains("b.lock: it is not a regular file"), "{said}");
    assert_eq!(fs::read_to_string(&target).expect("read"), "precious");
}

#[test]
fn addresses_are_followed() {
    let agent = Agent::new("d-followed").expect("the agent");
    let daemon = Daemon::start(&agent, &[]).expect("a daemon");
    let pod = Pod::new(PodSpec::new("followed")).expect("a pod");
    let actor = proxy(&pod);
    let bind = Bind::new(Ids::APP, SocketAddr::new(IpAddr::from([0, 0, 0, 0]), 80));
    actor.listen(Listen { name: "app".into(), transport: Transport::Tcp, bind }).expect("an app");
    daemon.put("a", &pod, &OUTBOUND).expect("put");
    daemon.wait_for("a", PodState::Captured).expect("captured");
    let own = SocketAddr::from(([10, 66, 0, 77], 80));
    assert_eq!(answers(&actor, own).as_deref(), Some("proxy"), "not the pod's own yet");
    pod.netns.add_address("eth0", "10.66.0.77/24".parse().expect("a network")).expect("added");
    daemon
        .wait("its own address is left alone", |_| answers(&actor, own).as_deref() == Some("app"))
        .expect("followed");
}

fn add(sandbox: &Sandbox, id: &str) -> Add {
    let cgroup = sandbox.cgroup.path().strip_prefix(tests::testbed::cgroup::mount_point().expect("cgroup2"));
    Add {
        pod: SandboxInfo {
            sandbox: id.into(),
            uid: Some("uid-1".into()),
            namespace: "shop".into(),
            name: "cart".into(),
        },
        netns: sandbox.netns.path().to_owned(),
        cgroup: Some(cgroup.expect("below the mount").display().to_string()),
        annotations: None,
        addresses: Vec::new(),
        select: Select::All,
        given: CaptureArgs { arguments: OUTBOUND.map(str::to_owned).to_vec(), ..CaptureArgs::default() },
    }
}

#[test]
fn a_pod_of_the_socket_is_captured_before_the_answer() {
    let agent = Agent::new("d-socket").expect("the agent");
    let mut daemon = Daemon::start(&agent, &[]).expect("a daemon");
    let pod = Pod::new(PodSpec::new("socket")).expect("a pod");
    let actor = proxy(&pod);
    let ask = |daemon: &Daemon<'_>, request| daemon.ask(&request).expect("an answer");
    let done = |word: &str| Response::Done(word.into());
    let sandbox = add(&pod, "s1").pod;
    assert_eq!(ask(&daemon, DaemonRequest::Add(Box::new(add(&pod, "s1")))), done("captured"));
    assert_eq!(answers(&actor, service()).as_deref(), Some("proxy"));
    assert_eq!(ask(&daemon, DaemonRequest::Check(sandbox.clone())), done("captured"));
    // A late DEL of an earlier sandbox, and a DEL of an unknown one.
    let before = SandboxInfo { sandbox: "s0".into(), ..sandbox.clone() };
    assert_eq!(ask(&daemon, DaemonRequest::Delete(before)), done("absent"));
    assert_eq!(answers(&actor, service()).as_deref(), Some("proxy"));

    // The next daemon knows its origin.
    daemon.kill().expect("killed");
    daemon.restart().expect("started");
    assert_eq!(daemon.reports().expect("reports")[0].name, "shop/cart");
    assert_eq!(ask(&daemon, DaemonRequest::Delete(sandbox.clone())), done("released"));
    assert_eq!(agent.pods().expect("status"), []);
    assert!(
        matches!(ask(&daemon, DaemonRequest::Check(sandbox)), Response::Failed(problem) if problem.cause == "absent")
    );

    let marked = |annotations: &[(&str, &str)]| {
        let annotations = annotations.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        DaemonRequest::Add(Box::new(Add {
            annotations: Some(annotations),
            select: Select::Sidecar,
            ..add(&pod, "s2")
        }))
    };
    assert_eq!(ask(&daemon, marked(&[])), done("no_sidecar"));
    let status = (
        "sidecar.istio.io/status",
        r#"{"initContainers":["istio-validation"],"containers":["istio-proxy"]}"#,
    );
    let wrong = marked(&[status, ("traffic.sidecar.istio.io/includeInboundPorts", "http")]);
    match ask(&daemon, wrong) {
        Response::Failed(problem) => assert!(problem.text.contains("includeInboundPorts"), "{problem:?}"),
        other => panic!("{other:?}"),
    }
    assert_eq!(ask(&daemon, marked(&[status])), done("captured"));
    let pods = agent.pods().expect("status");
    assert_eq!((pods.len(), &pods[0].acceleration), (1, &None));

    // A pod says itself whether its connections are joined, whatever the default of the node is.
    for (value, default, state) in [("true", None, Some("on")), ("false", Some("--accelerate"), None)] {
        let DaemonRequest::Add(mut add) = marked(&[status, ("intercept/accelerate", value)]) else {
            unreachable!("it is an ADD")
        };
        add.given.arguments.extend(default.map(str::to_owned));
        let answer = ask(&daemon, DaemonRequest::Add(add));
        assert!(matches!(answer, Response::Done(_)), "{answer:?}");
        let is =
            |pods: &[StatusEntry]| pods[0].acceleration.as_ref().map(|found| found.state.as_str()) == state;
        daemon.wait(value, |_| agent.pods().is_ok_and(|pods| is(&pods))).expect("as annotated");
    }
}

#[test]
fn the_plugin_captures_and_releases_a_pod() {
    let agent = Agent::new("d-plugin").expect("the agent");
    let probes = free_address();
    let daemon = Daemon::start(&agent, &["--metrics-address", &probes.to_string()]).expect("a daemon");
    let sandbox = Sandbox::new("plugin").expect("a place");
    let (conf, bin) = (daemon.folder().join("net.d"), daemon.folder().join("bin"));
    fs::create_dir(&conf).expect("made");
    let list = json!({"cniVersion": "1.0.0", "name": "net", "plugins": [{"type": "bridge"}]});
    fs::write(conf.join("10-net.conflist"), list.to_string()).expect("written");
    let mut install = Command::new(agent.program());
    install
        .args(["cni", "install", "--select", "all", "--cni-conf-dir"])
        .arg(&conf)
        .arg("--cni-bin-dir")
        .arg(&bin);
    install.arg("--socket").arg(daemon.socket()).arg("--").args(OUTBOUND);
    assert!(install.status().expect("started").success());
    let installed: Value =
        serde_json::from_str(&fs::read_to_string(conf.join("10-net.conflist")).expect("read")).expect("JSON");

    // The configuration that a runtime passes: the entry, with the fields of the list.
    let mut config = installed["plugins"][1].clone();
    let previous =
        json!({"cniVersion": "1.0.0", "interfaces": [], "ips": [{"address": "10.1.0.5/24"}], "dns": {}});
    config["cniVersion"] = json!("1.0.0");
    config["name"] = json!("net");
    config["prevResult"] = previous.clone();
    config["runtimeConfig"] = json!({"cgroupPath": add(&sandbox, "s").cgroup});
    let call = |command: &str| call_plugin(&bin, command, &config, &sandbox, ("1", "eth0"));
    let (ok, printed) = call("ADD");
    assert!(ok, "{printed}");
    assert_eq!(serde_json::from_str::<Value>(&printed).expect("JSON"), previous);
    assert_eq!(agent.pods().expect("status").len(), 1);
    assert_eq!(call("CHECK"), (true, String::new()));
    assert_eq!(call("DEL"), (true, String::new()));
    assert_eq!(agent.pods().expect("status"), []);
    assert_eq!(call("DEL"), (true, String::new()), "again");
    let (ok, printed) = call("CHECK");
    let error: Value = serde_json::from_str(&printed).expect("JSON");
    assert!(!ok && error["code"] == 100, "{printed}");

    // Everything is removed, including captures.
    assert!(call("ADD").0);
    let mut cleanup = agent.command("cleanup");
    cleanup
        .arg("--cni-conf-dir")
        .arg(&conf)
        .arg("--cni-bin-dir")
        .arg(&bin)
        .arg("--socket")
        .arg(daemon.socket());
    assert!(cleanup.status().expect("started").success());
    assert!(!agent.bpffs().join("intercept").exists());
    assert_eq!(fs::read_dir(&bin).expect("listed").count(), 0);
    let left: Value =
        serde_json::from_str(&fs::read_to_string(conf.join("10-net.conflist")).expect("read")).expect("JSON");
    assert_eq!(left, list);
    assert!(
        matches!(daemon.ask(&DaemonRequest::Add(Box::new(add(&sandbox, "s")))), Ok(Response::Failed(_))),
        "it stays away"
    );
    // Nor does a probe bring anything back.
    assert_eq!(get(probes, "/readyz").0, 503);
    assert!(!agent.bpffs().join("intercept").exists());
}

#[test]
fn the_socket_is_roots_alone() {
    let agent = Agent::new("d-roots").expect("the agent");
    let daemon = Daemon::start(&agent, &[]).expect("a daemon");
    let mode = |path: &std::path::Path| fs::metadata(path).expect("there").permissions().mode() & 0o777;
    assert_eq!(mode(&daemon.socket()), 0o600);
    // Other users are refused even if the mode of the socket allows them.
    for (path, bits) in [(daemon.folder().to_owned(), 0o755), (daemon.socket(), 0o666)] {
        fs::set_permissions(path, fs::Permissions::from_mode(bits)).expect("opened");
    }
    let response = std::thread::scope(|scope| {
        let as_nobody = scope.spawn(|| {
            rustix::thread::set_thread_uid(rustix::fs::Uid::from_raw(65534))
                .expect("this thread becomes nobody");
            daemon.ask(&DaemonRequest::Leave)
        });
        as_nobody.join().expect("no panic")
    });
    assert!(
        matches!(&response, Ok(Response::Failed(problem)) if problem.cause == "forbidden"),
        "{response:?}"
    );
}
