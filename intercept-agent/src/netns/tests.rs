use std::process::Command;

use super::*;
use crate::testing::{TestCgroup, new_netns};

/// Starts a process in `netns` and in the cgroup.
fn idle(netns: &Netns, cgroup: &mut TestCgroup, below: &str) -> Pid {
    netns.run(|| cgroup.spawn(below, Command::new("sleep").arg("600"))).expect("entering")
}

#[test]
fn what_is_no_network_namespace_is_refused() {
    for path in ["/proc/self/ns/mnt", "/proc/self/ns/user", "/dev/null", "/proc", "/"] {
        let error = Netns::open(path).unwrap_err();
        assert!(matches!(error, NetnsError::NotNetns { .. }), "{path}: {error:?}");
        assert!(error.to_string().starts_with(path), "{error}");
    }
    let error = Netns::open("/run/netns/no-such-namespace").unwrap_err();
    assert!(matches!(error, NetnsError::Open { .. }), "{error:?}");
}

#[test]
fn the_nodes_own_namespace_is_refused() {
    let own = fs::metadata("/proc/self/ns/net").unwrap().ino();
    let error = Netns::open("/proc/self/ns/net").unwrap_err();
    assert!(matches!(error, NetnsError::Host { .. }), "{error:?}");
    // An init container may name its own namespace, unless that is the node's.
    if own == FIRST_INODE {
        let error = Netns::own().unwrap_err();
        assert!(matches!(error, NetnsError::Host { whose: Whose::Node, .. }), "{error:?}");
    }
}

#[test]
fn an_own_namespace_apart_from_the_nodes_is_accepted_where_asked_for() {
    let netns = new_netns();
    let inside = netns.run(|| (Netns::own(), Netns::open("/proc/thread-self/ns/net"))).unwrap();
    assert_eq!(inside.0.unwrap().inode(), netns.inode());
    assert!(matches!(inside.1, Err(NetnsError::Host { whose: Whose::Own, .. })), "{:?}", inside.1);
}

#[test]
fn work_runs_inside_and_the_caller_stays_outside() {
    let netns = new_netns();
    let inode = || fs::metadata("/proc/thread-self/ns/net").unwrap().ino();
    let before = inode();
    assert_eq!(netns.run(inode).unwrap(), netns.inode());
    assert_eq!(inode(), before);
    assert_ne!(netns.inode(), before);
}

#[test]
fn a_visit_within_a_visit_returns_to_the_first() {
    let (one, other) = (new_netns(), new_netns());
    let inode = || fs::metadata("/proc/thread-self/ns/net").unwrap().ino();
    let before = inode();
    let (outer, same, elsewhere, after) =
        one.run(|| (inode(), one.run(inode).unwrap(), other.run(inode).unwrap(), inode())).unwrap();
    assert_eq!([outer, same, after], [one.inode(); 3]);
    assert_eq!(elsewhere, other.inode());
    assert_eq!(inode(), before);
}

#[test]
fn cookies_tell_namespaces_apart() {
    let (one, other) = (new_netns(), new_netns());
    assert_ne!(one.cookie(), other.cookie());
    assert_ne!(one.cookie(), cookie().unwrap());
    assert_eq!(one.run(cookie).unwrap().unwrap(), one.cookie());
}

#[test]
fn a_panic_inside_reaches_the_caller_outside() {
    let inode = || fs::metadata("/proc/thread-self/ns/net").unwrap().ino();
    let (netns, before) = (new_netns(), inode());
    let panicked =
        std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| netns.run(|| panic!("from inside"))));
    assert!(panicked.is_err());
    assert_eq!(inode(), before);
    // The thread does not take itself for inside.
    assert_eq!(netns.run(inode).unwrap(), netns.inode());
}

#[test]
fn a_cgroup_leads_to_the_namespace_of_its_processes() {
    let (mut test, netns) = (TestCgroup::new(), new_netns());
    let error = Netns::of_cgroup(&test.cgroup).unwrap_err();
    assert!(matches!(error, NetnsError::NoProcess { .. }), "{error:?}");
    assert!(error.to_string().contains("--netns"), "{error}");

    let pid = idle(&netns, &mut test, "sandbox");
    idle(&netns, &mut test, "app");
    let found = Netns::of_cgroup(&test.cgroup).unwrap();
    assert_eq!((found.inode(), found.cookie()), (netns.inode(), netns.cookie()));
    assert!(netns.holds(pid));
    assert_eq!(Netns::of_process(pid).unwrap().inode(), netns.inode());

    let other = new_netns();
    let elsewhere = idle(&other, &mut test, "app");
    assert!(!netns.holds(elsewhere));
    let error = Netns::of_cgroup(&test.cgroup).unwrap_err();
    assert!(matches!(&error, NetnsError::Several { found, .. } if found.len() == 2), "{error:?}");
    assert!(error.to_string().contains("--netns"), "{error}");
}

#[test]
fn what_a_process_unshares_is_not_the_pods() {
    let (mut test, sandbox, other) = (TestCgroup::new(), new_netns(), new_netns());
    idle(&sandbox, &mut test, "sandbox");
    // Start times have a resolution of a hundredth of a second.
    let first = started(test.cgroup.processes().unwrap()[0]).unwrap();
    let mut last = first;
    while last == first {
        last = started(idle(&other, &mut test, "app")).unwrap();
    }
    let found = |known| Netns::of_sandbox(&test.cgroup, known).unwrap().inode();
    assert_eq!(found(None), sandbox.inode());
    assert_eq!(found(Some(sandbox.inode())), sandbox.inode());
    // The namespace known to be the pod's stays it, even if another process is older,
    assert_eq!(found(Some(other.inode())), other.inode());
    // until no process is in it.
    assert_eq!(found(Some(1)), sandbox.inode());
}

#[test]
fn a_cgroup_of_the_nodes_network_is_refused() {
    let mut test = TestCgroup::new();
    test.idle("app");
    let error = Netns::of_cgroup(&test.cgroup).unwrap_err();
    assert!(matches!(error, NetnsError::Host { .. }), "{error:?}");
}
