use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};

use rustix::net::{SocketFlags, SocketType, ipproto, socket_with};

use std::time::{Duration, Instant};

use rustix::net::AddressFamily;

use super::{
    descriptors::TOO_MANY,
    diag::{listed, read},
    *,
};
use intercept_common::Family;

use crate::testing::{TestCgroup, new_netns};

const PROXY: u16 = 15001;
const INBOUND: u16 = 15006;

/// A namespace with the loopback interface up.
fn network() -> Netns {
    let netns = new_netns();
    let up = || Command::new("ip").args(["link", "set", "lo", "up"]).status().unwrap();
    assert!(netns.run(up).unwrap().success());
    netns
}

/// Listens with SO_REUSEPORT; without IPv4 where that is an option.
fn listen(address: &str) -> OwnedFd {
    let address: SocketAddr = address.parse().unwrap();
    let family = if address.is_ipv6() { AddressFamily::INET6 } else { AddressFamily::INET };
    let fd = socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC, Some(ipproto::TCP)).unwrap();
    rustix::net::sockopt::set_socket_reuseport(&fd, true).unwrap();
    if address.is_ipv6() {
        rustix::net::sockopt::set_ipv6_v6only(&fd, true).unwrap();
    }
    rustix::net::bind(&fd, &address).unwrap();
    rustix::net::listen(&fd, 16).unwrap();
    fd
}

/// A process that will have the two sockets, and nothing else will.
fn holder(one: OwnedFd, other: OwnedFd) -> Command {
    let mut command = Command::new("sleep");
    command.arg("600").stdin(Stdio::null()).stdout(Stdio::from(one)).stderr(Stdio::from(other));
    command
}

fn shown(found: &FoundListeners) -> Vec<(u8, String)> {
    let show = |l: &Listener| (l.family.version(), SocketAddr::new(l.addr, l.port).to_string());
    let mut shown: Vec<_> = found.listeners.iter().map(show).collect();
    shown.sort();
    shown
}

#[test]
fn listeners_of_the_pod_are_shared() {
    let (netns, mut test) = (network(), TestCgroup::new());
    let mut hold = |one: &str, other: &str| {
        netns.run(|| test.spawn("proxy", &mut holder(listen(one), listen(other)))).unwrap();
    };
    hold("0.0.0.0:15001", "[::]:15001");
    // A group of two, and a port that nobody asks for.
    hold("127.0.0.1:15006", "127.0.0.1:15006");
    hold("0.0.0.0:15090", "[::1]:15006");
    let found = find(&netns, &[&test.cgroup], &[PROXY, INBOUND]).unwrap();
    assert_eq!(
        shown(&found),
        [
            (4, "0.0.0.0:15001".to_owned()),
            (4, "127.0.0.1:15006".to_owned()),
            (4, "127.0.0.1:15006".to_owned()),
            (6, "[::1]:15006".to_owned()),
            (6, "[::]:15001".to_owned()),
        ]
    );
    assert!(found.missed.is_empty(), "{found:?}");

    // The very socket: what comes in for it can be accepted here.
    let listener = found.listeners.into_iter().find(|l| l.family == Family::V4 && l.port == PROXY).unwrap();
    let dialled = netns.run(|| TcpStream::connect("127.0.0.1:15001").unwrap()).unwrap();
    let (_accepted, peer) = TcpListener::from(listener.fd).accept().unwrap();
    assert_eq!(peer, dialled.local_addr().unwrap());
}

#[test]
fn a_process_outside_the_cgroup_but_in_the_namespace_is_asked_too() {
    struct Killed(Child);
    impl Drop for Killed {
        fn drop(&mut self) {
            _ = self.0.kill();
            _ = self.0.wait();
        }
    }
    let (netns, test) = (network(), TestCgroup::new());
    let spawn = || holder(listen("0.0.0.0:15001"), listen("[::]:15006")).spawn().unwrap();
    let _process = Killed(netns.run(spawn).unwrap());
    let found = find(&netns, &[&test.cgroup], &[PROXY]).unwrap();
    assert_eq!(shown(&found), [(4, "0.0.0.0:15001".to_owned())]);
}

#[test]
fn a_listener_that_nobody_seen_has_is_reported() {
    let (netns, test) = (network(), TestCgroup::new());
    // This process has it, and is not in the namespace.
    let _listener = netns.run(|| listen("127.0.0.1:15001")).unwrap();
    let found = find(&netns, &[&test.cgroup], &[PROXY]).unwrap();
    assert!(found.listeners.is_empty(), "{found:?}");
    let [missed] = found.missed.as_slice() else { panic!("{found:?}") };
    assert_eq!(missed.address, "127.0.0.1:15001".parse().unwrap());
    assert!(missed.cause.is_none(), "{missed:?}");
}

#[test]
fn both_lists_of_the_kernel_say_the_same() {
    let netns = network();
    let _listeners = netns.run(|| ["0.0.0.0:15001", "[::]:15001", "[::1]:7"].map(listen)).unwrap();
    let sorted = |mut list: Vec<_>| {
        list.sort_unstable();
        list
    };
    let listed = sorted(listed(&netns).unwrap().unwrap());
    assert_eq!(listed.len(), 3);
    assert_eq!(listed, sorted(netns.run(read).unwrap().unwrap()));
}

#[test]
fn a_process_with_many_descriptors_hides_no_other_and_is_given_up() {
    let (netns, mut test) = (network(), TestCgroup::new());
    // Processes with as many descriptors as the limit allows; the last has the listener after all others.
    let script = "import os, socket, sys, time
l = socket.socket()
if sys.argv[2] == 'listen': l.bind(('127.0.0.1', 15001)); l.listen()
while True:
    try: last = os.dup(0)
    except OSError: break
os.dup2(l.fileno(), last); l.close(); os.close(last - 1)
open(sys.argv[1] + sys.argv[2], 'w'); time.sleep(600)";
    let folder = tempfile::tempdir().unwrap();
    for number in 0..9 {
        let role = if number == 8 { "listen".to_owned() } else { number.to_string() };
        let mut python = Command::new("python3");
        python.args(["-c", script]).arg(format!("{}/", folder.path().display())).arg(&role);
        netns.run(|| test.spawn("app", &mut python)).unwrap();
        let deadline = Instant::now() + Duration::from_secs(60);
        while !folder.path().join(&role).exists() {
            assert!(Instant::now() < deadline, "the process opens its descriptors");
            std::thread::yield_now();
        }
    }
    netns.run(|| test.spawn("proxy", &mut holder(listen("0.0.0.0:15006"), listen("[::]:15006")))).unwrap();
    let started = Instant::now();
    let found = find(&netns, &[&test.cgroup], &[PROXY, INBOUND]).unwrap();
    assert_eq!(found.listeners.len(), 2, "{found:?}");
    let [missed] = found.missed.as_slice() else { panic!("{found:?}") };
    assert_eq!(missed.address.port(), PROXY);
    assert!(missed.cause.as_ref().is_some_and(|cause| cause.to_string() == TOO_MANY), "{missed:?}");
    assert!(started.elapsed() < Duration::from_secs(2), "{:?}", started.elapsed());
}

#[test]
fn nothing_is_found_where_nothing_listens() {
    let (netns, test) = (network(), TestCgroup::new());
    let found = find(&netns, &[&test.cgroup], &[PROXY, INBOUND]).unwrap();
    assert!(found.listeners.is_empty() && found.missed.is_empty(), "{found:?}");
}
