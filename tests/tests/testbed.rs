//! The testbed: what it makes works, and nothing is left.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use tests::testbed::{Ids, Namespace, Pod, PodSpec, cgroup, sweep};

/// The neighbour answers connections to any address.
#[test]
fn the_outside_world_answers_on_any_address() {
    let pod = Pod::new(PodSpec::new("any-address").with_eth1()).expect("a pod");
    for (dst, src) in [
        ("198.51.100.7", "10.66.0.2"),
        ("10.66.0.1", "10.66.0.2"),
        ("172.20.1.2", "10.67.0.2"),
        ("2001:db8::7", "fd66::2"),
        ("fd20::7", "fd67::2"),
    ] {
        let dst: IpAddr = dst.parse().expect("address");
        let any = if dst.is_ipv6() { "[::]:80" } else { "0.0.0.0:80" };
        let listener = pod.neighbour().netns.run(|| TcpListener::bind(any)).expect("entered").expect("bound");
        let answered = std::thread::scope(|scope| {
            let server = scope.spawn(move || {
                let (mut stream, peer) = listener.accept().expect("a connection");
                stream.write_all(b"x").expect("written");
                (stream.local_addr().expect("local address"), peer)
            });
            let connected = pod.netns.run(|| {
                let to = SocketAddr::new(dst, 80);
                let mut stream = TcpStream::connect_timeout(&to, Duration::from_secs(3)).expect("connected");
                let mut byte = [0];
                stream.read_exact(&mut byte).expect("an answer");
            });
            connected.expect("entered");
            server.join().expect("the server")
        });
        assert_eq!(answered.0, SocketAddr::new(dst, 80));
        assert_eq!(answered.1.ip(), src.parse::<IpAddr>().expect("address"));
    }
}

#[test]
fn commands_run_in_the_pod_with_the_requested_ids() {
    let pod = Pod::new(PodSpec::new("commands")).expect("a pod");
    let output = pod
        .command_as("/bin/sh", Ids::PROXY)
        .expect("a command")
        .args(["-c", "id -u; id -G; cat /proc/self/cgroup; readlink /proc/self/ns/net"])
        .output()
        .expect("started");
    let text = String::from_utf8(output.stdout).expect("text");
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines[..2], ["1337", "1337"]);
    let below =
        pod.cgroup.path().strip_prefix(cgroup::mount_point().expect("cgroup2")).expect("below the mount");
    assert!(lines.contains(&format!("0::/{}", below.display()).as_str()), "{text}");
    let here = std::fs::read_link("/proc/self/ns/net").expect("a namespace");
    assert_ne!(lines.last(), here.to_str().as_ref(), "the command stayed outside");
}

#[test]
fn guards_leave_nothing_behind() {
    let (netns, group, pid) = {
        let pod = Pod::new(PodSpec::new("leaves-nothing").with_eth1()).expect("a pod");
        let sleeper = pod.command("/bin/sleep").expect("a command").arg("1000").spawn().expect("started");
        assert_eq!(pod.cgroup.processes().expect("processes"), [sleeper.id()]);
        let mine = sweep::leftovers(std::process::id()).expect("listed");
        assert!(mine.iter().any(|path| path == pod.netns.path()), "{mine:?}");
        (pod.netns.path().to_owned(), pod.cgroup.path().to_owned(), sleeper)
    };
    assert!(!netns.exists() && !group.exists());
    let status = { pid }.wait().expect("waited");
    assert!(!status.success(), "the sleeper was not killed: {status}");
}

/// The test runs again in a process that makes a pod and aborts.
#[test]
fn what_a_killed_run_left_is_swept() {
    if std::env::var_os("DIE_WITH_A_POD").is_some() {
        let pod = Pod::new(PodSpec::new("killed")).expect("a pod");
        drop(pod.command("/bin/sleep").expect("a command").arg("1000").spawn().expect("started"));
        std::process::abort();
    }
    let mut run = Command::new(std::env::current_exe().expect("this binary"))
        .args(["--exact", "what_a_killed_run_left_is_swept"])
        .env("DIE_WITH_A_POD", "1")
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .spawn()
        .expect("started");
    let pid = run.id();
    // Aborted rather than failed, so it had made its pod.
    assert_eq!(run.wait().expect("waited").signal(), Some(libc::SIGABRT));
    // The sweep of another test may come first; afterwards nothing may be left.
    sweep::sweep().expect("swept");
    assert_eq!(sweep::leftovers(pid).expect("listed"), Vec::<std::path::PathBuf>::new());
}

/// The test runs again in a mount namespace whose /run is empty, as on a machine that has just started.
#[test]
fn a_foreign_ip_netns_add_leaves_namespaces_usable() {
    const AGAIN: &str = "WITH_AN_EMPTY_RUN";
    if std::env::var_os(AGAIN).is_some() {
        let namespace = Namespace::new("foreign").expect("a namespace");
        let inode = |path: &Path| std::fs::metadata(path).expect("it is there").ino();
        let before = inode(namespace.path());
        let added =
            Command::new("ip").args(["netns", "add", "other"]).status().expect("iproute2 is installed");
        assert!(added.success());
        assert_eq!(inode(namespace.path()), before);
        let path = namespace.path().to_owned();
        drop(namespace);
        assert!(!path.exists());
        return;
    }
    let script = "mount -t tmpfs tmpfs /run && exec \"$0\" \"$@\"";
    let output = Command::new("unshare")
        .args(["--mount", "--propagation", "private", "sh", "-c", script])
        .arg(std::env::current_exe().expect("this binary"))
        .args(["--exact", "a_foreign_ip_netns_add_leaves_namespaces_usable", "--nocapture"])
        .env(AGAIN, "1")
        .output()
        .expect("started");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}
