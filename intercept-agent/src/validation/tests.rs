//! Without attached programs the check must fail and say why. Rules of iptables show that it can pass.

use std::fs;
use std::net::{SocketAddr, TcpListener};
use std::process::Command;
use std::time::Instant;

use super::*;
use crate::testing::{TestCgroup, new_netns};

const PROBE: Probe = Probe {
    proxy_port: 15001,
    inbound_port: 15006,
    probe_port: 15002,
    timeout: Duration::from_millis(300),
    uid: 1337,
    gid: 1337,
};

fn run(netns: &Netns, lines: &[&str]) {
    let run = || {
        for line in lines {
            let mut words = line.split(' ');
            let output =
                Command::new(words.next().unwrap()).args(words).output().expect("the tool is installed");
            assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
        }
    };
    netns.run(run).expect("entering");
}

/// A dual-stack namespace, as it is once interception is set up.
fn network() -> Netns {
    let netns = new_netns();
    run(&netns, &["ip link set lo up", "ip -6 addr add ::6/128 dev lo"]);
    netns
}

#[test]
fn without_interception_it_fails_and_says_what_was_seen() {
    let (netns, test) = (network(), TestCgroup::new());
    let start = Instant::now();
    let error = validate(&netns, &test.cgroup, &PROBE).unwrap_err();
    let took = start.elapsed();
    let refused = ListenerFate::Refused(Errno::CONNREFUSED);
    assert!(matches!(&error, ValidationError::Failed { seen, .. } if *seen == refused), "{error:?}");
    assert!(error.to_string().contains("127.0.0.1 to 127.0.0.6:15002: the connection failed"), "{error}");
    assert!(took >= PROBE.timeout && took < PROBE.timeout * 10, "took {took:?}");
    assert_eq!(test.cgroup.processes().unwrap(), []);
    assert_eq!(fs::read_dir(test.cgroup.path()).unwrap().flatten().filter(|e| e.path().is_dir()).count(), 0);
}

#[test]
fn without_a_loopback_interface_it_fails() {
    let (netns, test) = (new_netns(), TestCgroup::new());
    let error = validate(&netns, &test.cgroup, &PROBE).unwrap_err();
    assert!(matches!(error, ValidationError::Failed { seen: ListenerFate::Refused(_), .. }), "{error:?}");
}

#[test]
fn something_else_that_listens_is_not_taken_for_the_proxy() {
    let (netns, test) = (network(), TestCgroup::new());
    let _listener = netns.run(|| TcpListener::bind("127.0.0.6:15002").unwrap()).unwrap();
    let error = validate(&netns, &test.cgroup, &PROBE).unwrap_err();
    assert!(matches!(error, ValidationError::Failed { seen: ListenerFate::Elsewhere, .. }), "{error:?}");
}

#[test]
fn ports_in_use_are_reported_as_such() {
    let (netns, test) = (network(), TestCgroup::new());
    let bind = |port: u16| TcpListener::bind(SocketAddr::from(([0, 0, 0, 0], port))).unwrap();
    let _listeners = netns.run(|| [bind(15001), bind(15006)]).unwrap();
    let error = validate(&netns, &test.cgroup, &PROBE).unwrap_err();
    let in_use = |source: &io::Error| source.kind() == io::ErrorKind::AddrInUse;
    assert!(matches!(&error, ValidationError::Listen { source, .. } if in_use(source)), "{error:?}");
}

#[test]
fn with_iptables_it_passes_as_the_proxys_user_only() {
    let (netns, test) = (network(), TestCgroup::new());
    let rule = "-w -t nat -A OUTPUT -o lo -p tcp --dport 15002 -m owner --uid-owner 1337 --gid-owner 1337 -j REDIRECT --to-ports 15006";
    run(&netns, &[&format!("iptables {rule}")]);
    let error = validate(&netns, &test.cgroup, &PROBE).unwrap_err();
    let v6 = |from: &IpAddr| from.is_ipv6();
    assert!(matches!(&error, ValidationError::Failed { from, .. } if v6(from)), "{error:?}");
    assert!(error.to_string().contains("::1 to [::6]:15002"), "{error}");

    run(&netns, &[&format!("ip6tables {rule}")]);
    let validated = validate(&netns, &test.cgroup, &PROBE).unwrap();
    assert_eq!(validated, Validated { v4: 15006, v6: Some(15006) });

    let other = Probe { uid: 1338, ..PROBE };
    assert!(validate(&netns, &test.cgroup, &other).is_err());

    run(&netns, &["ip -6 addr del ::6/128 dev lo"]);
    assert_eq!(validate(&netns, &test.cgroup, &PROBE).unwrap(), Validated { v4: 15006, v6: None });
}

#[test]
fn the_process_of_the_check_is_in_a_cgroup_below_the_pods() {
    let (netns, test) = (network(), TestCgroup::new());
    let patient = Probe { timeout: Duration::from_secs(2), ..PROBE };
    std::thread::scope(|scope| {
        let check = scope.spawn(|| validate(&netns, &test.cgroup, &patient));
        let deadline = Instant::now() + Duration::from_secs(2);
        while test.cgroup.processes().unwrap().is_empty() {
            assert!(Instant::now() < deadline, "the process joins the cgroup");
            std::thread::yield_now();
        }
        assert!(check.join().unwrap().is_err());
    });
}

#[test]
fn outcomes_cross_the_pipe_unchanged() {
    // Each variant has its own encoding, or the decoded values would differ.
    for outcome in [
        ProbeOutcome::Passed(15006),
        ProbeOutcome::Absent,
        ProbeOutcome::Failed(ListenerFate::Refused(Errno::CONNREFUSED)),
        ProbeOutcome::Failed(ListenerFate::Elsewhere),
        ProbeOutcome::Failed(ListenerFate::Nothing),
        ProbeOutcome::Failed(ListenerFate::NoOriginal(15001, Errno::NOENT)),
        ProbeOutcome::Failed(ListenerFate::OtherPort(15001, 80)),
        ProbeOutcome::Listen(Errno::ADDRINUSE),
        ProbeOutcome::Setup(probe::ProbeStep::User, Errno::PERM),
    ] {
        assert_eq!(ProbeOutcome::decode(&outcome.encode()), Some(outcome));
    }
    assert_eq!(ProbeOutcome::decode(&[]), None);
}
