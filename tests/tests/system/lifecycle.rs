//! Attach, attach again, replace, detach.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use tests::actor::{Dial, DialOutcome, OriginalDst};
use tests::agent::{Agent, INIT_FLAGS};
use tests::snapshot::{Snapshot, tree};
use tests::testbed::{Ids, Pod, PodSpec};

use crate::fixture::{SystemFixture, addr};

/// Two policies that differ in mode and lists for each flow of the load.
pub(crate) const ONE: [&str; 14] =
    ["-m", "REDIRECT", "-i", "*", "-b", "*", "-d", "8081", "-o", "81", "-u", "1337", "-g", "1337"];
pub(crate) const OTHER: [&str; 16] = [
    "-m",
    "TPROXY",
    "-i",
    "*",
    "-b",
    "*",
    "-d",
    "8082",
    "-o",
    "82",
    "-u",
    "1337",
    "-g",
    "1337",
    "-x",
    "203.0.113.0/24",
];

#[test]
fn the_same_again_changes_nothing() {
    let agent = Agent::new("again").expect("the agent");
    let fixture = SystemFixture::new(PodSpec::new("again"));
    assert!(agent.attach(&fixture.pod, &INIT_FLAGS).expect("attached").starts_with("attached"));
    assert_eq!(fixture.outbound("10.96.0.10:80"), "outbound");
    let before = (tree(agent.bpffs()).expect("a tree"), agent.pods().expect("a status"));
    assert_eq!(before.1[0].decisions.len(), 1, "{:#?}", before.1);
    let snapshot = Snapshot::of(&fixture.pod).expect("a snapshot");
    assert!(agent.attach(&fixture.pod, &INIT_FLAGS).expect("attached").starts_with("unchanged"));
    // The same options, written differently.
    let words = [
        "--envoy-port=15001",
        "--inbound-capture-port=15006",
        "--istio-inbound-ports=*",
        "--istio-local-exclude-ports=15020,15090,",
        "--istio-service-cidr=*",
        "--proxy-uid=1337",
    ];
    assert!(agent.attach(&fixture.pod, &words).expect("attached").starts_with("unchanged"));
    // Policy, links and counters. A new pin has a new inode.
    assert_eq!((tree(agent.bpffs()).expect("a tree"), agent.pods().expect("a status")), before);
    assert_eq!(snapshot.difference(&Snapshot::of(&fixture.pod).expect("a snapshot")), [""; 0]);
    agent.detach(&fixture.pod).expect("detached");
}

/// At any moment a connection is decided by one of the two policies.
#[test]
fn other_options_replace_it_without_a_gap() {
    let agent = Agent::new("replace").expect("the agent");
    let fixture = SystemFixture::new(PodSpec::new("replace"));
    agent.attach(&fixture.pod, &ONE).expect("attached");
    let first = agent.pods().expect("a status");
    let (stop, flows) = (AtomicBool::new(false), AtomicUsize::new(0));
    let hammer = |inbound: bool| {
        while !stop.load(Ordering::Relaxed) {
            let (actor, ids) =
                if inbound { (&fixture.world, Ids::ROOT) } else { (&fixture.inside, Ids::APP) };
            let to: &[&str] = if inbound {
                &["10.66.0.2:8080", "[fd66::2]:8080"]
            } else {
                &["10.96.0.10:80", "[fd96::10]:80", "10.96.0.10:81", "10.96.0.10:82"]
            };
            let dials = to.iter().map(|to| Dial::new(ids, addr(to))).collect();
            for (to, dialled) in to.iter().zip(actor.dial_all(dials).expect("dialled")) {
                let DialOutcome::Answered(answer) = &dialled.outcome else {
                    panic!("{to} after {} flows: {dialled:?}", flows.load(Ordering::Relaxed));
                };
                let allowed: &[&str] = match (inbound, addr(to).port()) {
                    (true, _) => &["inbound"],
                    (false, 80) => &["outbound"],
                    (false, _) => &["outbound", "world"],
                };
                assert!(allowed.contains(&answer.server.as_str()), "{to}: {dialled:?}");
                if answer.server != "world" {
                    assert_eq!(answer.original_dst, Some(OriginalDst::Addr(addr(to))), "{to}");
                }
                assert_eq!(dialled.peername, Some(addr(to)));
            }
            flows.fetch_add(to.len(), Ordering::Relaxed);
        }
    };
    std::thread::scope(|scope| {
        let hammers = [scope.spawn(|| hammer(false)), scope.spawn(|| hammer(true))];
        for round in 0..30 {
            let flags: &[&str] = if round % 2 == 0 { &OTHER } else { &ONE };
            assert!(agent.attach(&fixture.pod, flags).expect("attached").starts_with("replaced"));
            let (direct, captured) = if round % 2 == 0 { (82, 81) } else { (81, 82) };
            // Active when the agent has printed so.
            assert_eq!(fixture.outbound(&format!("10.96.0.10:{direct}")), "world", "round {round}");
            assert_eq!(fixture.outbound(&format!("10.96.0.10:{captured}")), "outbound", "round {round}");
        }
        stop.store(true, Ordering::Relaxed);
        for hammer in hammers {
            if let Err(panic) = hammer.join() {
                std::panic::resume_unwind(panic);
            }
        }
    });
    let flows = flows.into_inner();
    assert!(flows > 1000, "{flows} flows are too few to tell");
    let last = agent.pods().expect("a status");
    assert_ne!(first[0].policy, last[0].policy);
    assert_eq!(first[0].netns_cookie, last[0].netns_cookie);
    agent.detach(&fixture.pod).expect("detached");
}

#[test]
fn detach_leaves_everything_as_it_was() {
    for (label, flags) in [("redirect", &ONE[..]), ("tproxy", &OTHER[..])] {
        let agent = Agent::new(label).expect("the agent");
        let fixture = SystemFixture::new(PodSpec::new(label));
        let before = Snapshot::of(&fixture.pod).expect("a snapshot");
        let pins = tree(agent.bpffs()).expect("a tree");
        agent.attach(&fixture.pod, flags).expect("attached");
        let attached = before.difference(&Snapshot::of(&fixture.pod).expect("a snapshot"));
        // Makes the comparison below exact.
        for changed in ["CONNECT", "SK_LOOKUP", "::6/128"] {
            assert!(attached.iter().any(|line| line.contains(changed)), "{changed}: {attached:#?}");
        }
        let rules = attached.iter().any(|line| line.contains("fwmark"));
        assert_eq!(rules, label == "tproxy", "{attached:#?}");
        assert_eq!(fixture.outbound("10.96.0.10:80"), "outbound");

        agent.detach(&fixture.pod).expect("detached");
        assert_eq!(before.difference(&Snapshot::of(&fixture.pod).expect("a snapshot")), [""; 0], "{label}");
        assert_eq!(tree(agent.bpffs()).expect("a tree"), pins, "{label}");
        assert_eq!(fixture.outbound("10.96.0.10:80"), "world");
        assert_eq!(fixture.inbound("10.66.0.2:8080"), "app");
        // Detaching a pod that is not attached is an error.
        let error = agent.detach(&fixture.pod).expect_err("nothing is attached").to_string();
        assert!(error.contains("not attached"), "{error}");
    }
}

/// The agent does not remove what others have added to the namespace.
#[test]
fn what_was_there_before_stays() {
    let agent = Agent::new("before").expect("the agent");
    let pod = Pod::new(PodSpec::new("before")).expect("a pod");
    pod.netns.add_address("lo", "::6/128".parse().expect("an address")).expect("added");
    pod.netns.add_mark_rule(1337, 133).expect("a rule");
    pod.netns.sysctl("net/ipv4/tcp_fwmark_accept", "1").expect("set");
    let before = Snapshot::of(&pod).expect("a snapshot");
    agent.attach(&pod, &OTHER).expect("attached");
    agent.attach(&pod, &ONE).expect("attached");
    agent.detach(&pod).expect("detached");
    assert_eq!(before.difference(&Snapshot::of(&pod).expect("a snapshot")), [""; 0]);
}

#[test]
fn detach_all_takes_out_every_pod_also_those_that_are_gone() {
    let agent = Agent::new("all").expect("the agent");
    let pods: Vec<Pod> = (0..4).map(|n| Pod::new(PodSpec::new(&format!("all{n}"))).expect("a pod")).collect();
    let before: Vec<Snapshot> = pods.iter().map(|pod| Snapshot::of(pod).expect("a snapshot")).collect();
    let pins = tree(agent.bpffs()).expect("a tree");
    for (pod, flags) in pods.iter().zip([&ONE[..], &OTHER[..], &INIT_FLAGS[..], &ONE[..]]) {
        agent.attach(pod, flags).expect("attached");
    }
    assert_eq!(agent.pods().expect("a status").len(), 4);
    let mut pods = pods;
    drop(pods.pop());
    let said = agent.detach_all().expect("detached");
    assert!(said.lines().filter(|line| line.starts_with("detached")).count() >= 3, "{said}");
    for (pod, before) in pods.iter().zip(&before) {
        assert_eq!(before.difference(&Snapshot::of(pod).expect("a snapshot")), [""; 0]);
    }
    assert_eq!(tree(agent.bpffs()).expect("a tree"), pins);
    assert!(agent.detach_all().expect("a second time").contains("nothing"), "and says so");
}
