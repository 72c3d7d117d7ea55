//! Wrong input is refused before anything changes, with an exit code and a helpful message.

use std::{path::Path, process::Command, thread};

use tests::{
    agent::Agent,
    testbed::{BpffsMount, Sandbox, cgroup},
};

/// Runs `attach` and checks that it is refused with this exit code and message, and that nothing has changed.
fn refused(agent: &Agent, args: &[&str], code: i32, words: &[&str]) {
    let mut command = agent.command("attach");
    command.args(args);
    check_refused(agent, &mut command, code, words);
}

fn check_refused(agent: &Agent, command: &mut Command, code: i32, words: &[&str]) {
    let output = command.output().expect("the agent starts");
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{command:?}: {text}");
    for word in words {
        assert!(text.contains(word), "{command:?} does not say {word:?}: {text}");
    }
    assert!(!agent.bpffs().join("intercept").exists(), "{command:?} left something in bpffs");
}

#[test]
fn options_that_do_not_hold() {
    let (agent, pod) = (Agent::new("options").expect("the agent"), Sandbox::new("options").expect("a pod"));
    let sandbox = [
        "--cgroup-path",
        pod.cgroup.path().to_str().expect("text"),
        "--netns",
        pod.netns.path().to_str().expect("text"),
    ];
    for (options, words) in [
        (&["-p", "0"][..], &["--envoy-port", "0"][..]),
        (&["-z", "70000"], &["--inbound-capture-port", "70000"]),
        (&["-i", "10.0.0.0/33"], &["--istio-service-cidr", "10.0.0.0/33"]),
        (&["-x", "*"], &["--istio-service-exclude-cidr", "*"]),
        (&["-m", "FOO"], &["FOO", "REDIRECT", "TPROXY"]),
        (&["-u", "nobody-of-this-name"], &["nobody-of-this-name"]),
        (&["-d", "80,http"], &["--istio-local-exclude-ports", "http"]),
        (&["--no-such-option"], &["--no-such-option"]),
    ] {
        refused(&agent, &[&sandbox[..], options].concat(), 2, words);
    }
}

#[test]
fn values_of_the_daemon_that_do_not_hold() {
    let agent = Agent::new("daemon-values").expect("the agent");
    for (options, words) in [
        (&["--mesh", "istoi"][..], &["istoi", "linkerd", "kuma", "consul"][..]),
        (&["--ipv6", "no"], &["no", "as-istio", "always"]),
        (&["--api-wait", "1s"], &["1s", "seconds from 0 to 10"]),
        (&["--api-wait", "60"], &["60", "seconds from 0 to 10"]),
        (&["--exclude-namespaces", "kube-system,Shop"], &["Shop", "lower-case"]),
    ] {
        let mut command = agent.command("daemon");
        command.args(options);
        check_refused(&agent, &mut command, 2, words);
    }
}

#[test]
fn cgroups_that_are_none() {
    let (agent, pod) = (Agent::new("cgroups").expect("the agent"), Sandbox::new("cgroups").expect("a pod"));
    let netns = pod.netns.path().to_str().expect("text");
    let root = cgroup::mount_point().expect("cgroup2");
    let file = pod.cgroup.path().join("cgroup.procs");
    let gone = pod.cgroup.path().join("gone");
    let mut cases = vec![
        (gone.as_path(), vec!["gone"]),
        (file.as_path(), vec!["cgroup.procs"]),
        (root.as_path(), vec!["root"]),
        (Path::new("/tmp"), vec!["/tmp", "cgroup"]),
    ];
    let v1 = Path::new("/sys/fs/cgroup/memory");
    if v1.is_dir() && root != Path::new("/sys/fs/cgroup") {
        cases.push((v1, vec!["version 1", root.to_str().expect("text")]));
    }
    for (path, words) in cases {
        refused(
            &agent,
            &["--cgroup-path", path.to_str().expect("text"), "--netns", netns, "-i", "*"],
            1,
            &words,
        );
    }
}

#[test]
fn namespaces_that_are_none() {
    let (agent, pod) = (Agent::new("netns").expect("the agent"), Sandbox::new("netns").expect("a pod"));
    let cgroup = pod.cgroup.path().to_str().expect("text");
    for (args, words) in [
        (&["--netns", "/etc/hostname"][..], &["/etc/hostname", "namespace"][..]),
        (&["--netns", "/proc/self/ns/mnt"], &["/proc/self/ns/mnt", "network"]),
        (&["--netns", "/no/such/path"], &["/no/such/path"]),
        (&["--netns", "/proc/self/ns/net"], &["/proc/self/ns/net"]),
        // The cgroup has no process whose namespace could be used.
        (&[], &["--netns"]),
    ] {
        refused(&agent, &[&["--cgroup-path", cgroup, "-i", "*"], args].concat(), 1, words);
    }
}

#[test]
fn without_privileges() {
    let (agent, pod) =
        (Agent::new("unprivileged").expect("the agent"), Sandbox::new("unprivileged").expect("a pod"));
    let inner = agent.for_pod("attach", &pod, &["-i", "*"]);
    // Root without CAP_NET_ADMIN. setpriv is on every system.
    let mut command = Command::new("setpriv");
    command
        .args(["--bounding-set", "-net_admin", "--inh-caps", "-all"])
        .arg(inner.get_program())
        .args(inner.get_args());
    check_refused(&agent, &mut command, 1, &["CAP_NET_ADMIN"]);
}

#[test]
fn without_a_bpffs() {
    let agent = Agent::on(BpffsMount::folder("unmounted").expect("a folder")).expect("the agent");
    let pod = Sandbox::new("unmounted").expect("a pod");
    // A thread and its children without the right to mount, as in a container by default.
    thread::scope(|scope| {
        let forbidden = scope.spawn(|| {
            forbid(libc::SYS_mount);
            let mount = format!("mount -t bpf bpf {}", agent.bpffs().display());
            check_refused(&agent, &mut agent.for_pod("attach", &pod, &["-i", "*"]), 1, &["bpffs", &mount]);
        });
        forbidden.join().expect("refused");
    });
    // With the right to mount, the agent mounts it.
    agent.attach(&pod, &["-i", "*"]).expect("attached");
    assert!(agent.bpffs().join("intercept").is_dir());
    agent.detach(&pod).expect("detached");

    let file = tempfile::NamedTempFile::new().expect("a file");
    let mut attach = Command::new(agent.program());
    attach.arg("attach").arg("--bpffs").arg(file.path());
    attach.arg("--cgroup-path").arg(pod.cgroup.path()).arg("--netns").arg(pod.netns.path());
    check_refused(&agent, &mut attach, 1, &[file.path().to_str().expect("text")]);
}

/// Makes a system call fail with EPERM for this thread and its children.
fn forbid(call: libc::c_long) {
    use seccompiler::{SeccompAction, SeccompFilter, TargetArch};
    let denied = SeccompAction::Errno(libc::EPERM.cast_unsigned());
    let arch = TargetArch::try_from(std::env::consts::ARCH).expect("an architecture that seccomp knows");
    let filter = SeccompFilter::new([(call, vec![])].into(), SeccompAction::Allow, denied, arch);
    let program: seccompiler::BpfProgram = filter.and_then(TryInto::try_into).expect("a filter");
    seccompiler::apply_filter(&program).expect("in force");
}
