//! A failure leaves the state unchanged. In attach, replace and detach, each system call that changes or reads the kernel's
//! state is made to fail, one at a time, and each runs out of descriptors at every place. The whole state is compared with
//! the state before.

use std::{
    os::fd::AsFd as _,
    path::{Path, PathBuf},
    process::Output,
    time::{Duration, Instant},
};

use aya::maps::MapData;
use intercept_agent::facade::{maps::Maps, sys};
use intercept_common::{
    NetnsCookie,
    layout::{ListenerKey, MemberKey, PodPolicy, Proxy},
    names,
};
use tests::{
    actor::{Actor, Bind, Listen, Transport},
    agent::{Agent, finish},
    snapshot::{Snapshot, tree},
    strace::StraceOutput,
    testbed::{Ids, Pod, PodSpec},
};

/// Two policies with entries in every map, which change the namespace in different ways.
const ONE: [&str; 10] = ["-u", "1337", "-m", "REDIRECT", "-i", "*", "-b", "80,81", "-o", "22"];
const OTHER: [&str; 12] =
    ["-u", "1337", "-m", "TPROXY", "-i", "10.0.0.0/8", "-x", "10.1.0.0/16", "-b", "*", "-d", "82"];
/// System calls that read or change state: maps, links and pins; netlink; folders of pins.
const CALLS: [&str; 3] = ["bpf", "sendto", "mkdir"];
/// Descriptors that every process has.
const STANDARD: usize = 3;

/// The agent with the tested pod and a second one, so that the programs stay loaded.
struct FaultsFixture {
    agent: Agent,
    pod: Pod,
    _inside: Actor,
    _beside: Pod,
    strace: StraceOutput,
}

/// Everything that is pinned, in maps, or in the pod's namespace.
#[derive(PartialEq)]
struct KernelState {
    namespace: Snapshot,
    pins: Vec<(PathBuf, u64)>,
    policies: Vec<(NetnsCookie, PodPolicy)>,
    lists: Vec<(Vec<u8>, Vec<u8>)>,
    listeners: Vec<ListenerKey>,
    proxies: Vec<(u32, Proxy)>,
}

fn entries<K: bytemuck::Pod, V: bytemuck::Pod>(maps: &Path, name: &str) -> Vec<(K, V)> {
    let map = MapData::from_pin(maps.join(name)).expect("a map");
    sys::entries(map.fd().as_fd()).expect("entries")
}

impl KernelState {
    fn of(fixture: &FaultsFixture) -> Self {
        let maps = fixture.agent.store().join("maps");
        let mut lists = Vec::new();
        for (key, value) in entries::<[u8; 24], [u8; 20]>(&maps, names::DESTINATIONS) {
            lists.push((key.to_vec(), value.to_vec()));
        }
        for (key, value) in entries::<[u8; 12], u32>(&maps, names::PORTS) {
            lists.push((key.to_vec(), value.to_ne_bytes().to_vec()));
        }
        for name in [names::GROUPS, names::INTERFACES] {
            for (key, value) in entries::<MemberKey, u32>(&maps, name) {
                lists.push((bytemuck::bytes_of(&key).to_vec(), value.to_ne_bytes().to_vec()));
            }
        }
        lists.sort();
        let tables = Maps::open(&maps).expect("maps");
        let mut policies = tables.policies().expect("policies");
        policies.sort_by_key(|(cookie, _)| *cookie);
        let mut listeners: Vec<ListenerKey> =
            policies.iter().flat_map(|(cookie, _)| tables.listeners(*cookie).expect("listeners")).collect();
        listeners.sort_by_key(|key| (key.netns, key.port, key.family, key.slot));
        Self {
            namespace: Snapshot::of(&fixture.pod).expect("a snapshot"),
            pins: tree(fixture.agent.bpffs()).expect("a tree"),
            policies,
            lists,
            listeners,
            proxies: entries::<u32, Proxy>(&maps, names::PROXY_STATE),
        }
    }

    /// The state once it is `expected`, or after five seconds. If detaching a link fails and its pin is removed, the kernel
    /// frees it after an RCU grace period.
    fn awaited(fixture: &FaultsFixture, expected: &Self) -> Self {
        let deadline = Instant::now() + Duration::from_secs(5);
        loop {
            let state = Self::of(fixture);
            if state == *expected || Instant::now() > deadline {
                return state;
            }
            std::thread::yield_now();
        }
    }

    #[track_caller]
    fn assert_is(&self, before: &Self, when: &str) {
        assert_eq!(before.namespace.difference(&self.namespace), [""; 0], "{when}");
        let only = |these: &Self, those: &Self| -> Vec<_> {
            these.pins.iter().filter(|pin| !those.pins.contains(pin)).map(|(path, _)| path.clone()).collect()
        };
        assert_eq!((only(before, self), only(self, before)), (vec![], vec![]), "{when}: pins");
        assert_eq!(self.policies, before.policies, "{when}");
        assert_eq!(self.lists.len(), before.lists.len(), "{when}");
        assert_eq!(self.listeners, before.listeners, "{when}");
        assert!(*self == *before, "{when}: lists or proxies differ");
    }

    /// The state without what differs from one attach to the next: ids of policies and names of records.
    fn shape(&self) -> (&Snapshot, usize, Vec<u32>, usize, usize) {
        let flags = self.policies.iter().map(|(_, policy)| policy.flags).collect();
        (&self.namespace, self.pins.len(), flags, self.lists.len(), self.listeners.len())
    }
}

impl FaultsFixture {
    fn new(label: &str) -> Self {
        let agent = Agent::new(label).expect("the agent");
        let (pod, beside) =
            (Pod::new(PodSpec::new(label)).expect("a pod"), Pod::new(PodSpec::new("beside")).expect("a pod"));
        let inside = Actor::start(&pod).expect("an actor");
        for port in [15001, 15006] {
            let bind = Bind::new(Ids::PROXY, ([0, 0, 0, 0], port).into());
            let listen = Listen { name: port.to_string(), transport: Transport::Tcp, bind };
            inside.listen(listen).expect("a listener");
        }
        agent.attach(&beside, &ONE).expect("attached");
        Self { agent, pod, _inside: inside, _beside: beside, strace: StraceOutput::new().expect("a folder") }
    }

    /// Runs a command under strace, which injects something into the call with this number on every thread.
    fn inject(
        &mut self,
        (call, what): (&str, &str),
        number: usize,
        (subcommand, flags): (&str, &[&str]),
    ) -> Output {
        self.agent.start_by(self.strace.injecting((call, what), number));
        let output = finish(&mut self.agent.for_pod(subcommand, &self.pod, flags)).expect("strace starts");
        self.agent.start_by(Vec::new());
        output
    }

    /// Runs a command with a failure in the call with this number on every thread. `None` if there are fewer calls.
    fn fail(&mut self, call: &str, number: usize, subcommand: &str, flags: &[&str]) -> Option<Output> {
        let output = self.inject((call, "error=ENOMEM"), number, (subcommand, flags));
        let injected = self.strace.injected().expect("a trace").is_some();
        assert!(injected || output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        injected.then_some(output)
    }

    /// Runs a command that may have so many descriptors.
    fn limit(&mut self, descriptors: usize, (subcommand, flags): (&str, &[&str])) -> Output {
        self.agent.start_by(vec!["prlimit".to_owned(), format!("--nofile={descriptors}")]);
        let output = finish(&mut self.agent.for_pod(subcommand, &self.pod, flags)).expect("prlimit starts");
        self.agent.start_by(Vec::new());
        output
    }

    /// Makes each call of a command fail in turn. `reset` establishes the initial state, and `check` examines the result.
    fn try_all(
        &mut self,
        (subcommand, flags): (&str, &[&str]),
        reset: impl Fn(&Self),
        check: impl Fn(&Self, &KernelState, &Output, &str),
    ) {
        for call in CALLS {
            reset(self);
            let mut before = KernelState::of(self);
            let mut tried = 0;
            while let Some(output) = self.fail(call, tried + 1, subcommand, flags) {
                tried += 1;
                let error = String::from_utf8_lossy(&output.stderr).into_owned();
                check(self, &before, &output, &format!("{subcommand} with {call} {tried} failed ({error})"));
                if output.status.success() {
                    reset(self);
                    before = KernelState::of(self);
                }
            }
            assert!(call != "bpf" || tried > 30, "{subcommand} made {tried} calls of bpf only");
        }
        reset(self);
        let mut before = KernelState::of(self);
        for descriptors in STANDARD.. {
            let output = self.limit(descriptors, (subcommand, flags));
            let error = String::from_utf8_lossy(&output.stderr).into_owned();
            if output.status.success() && error.is_empty() {
                assert!(descriptors > STANDARD + 5, "{subcommand} did with {descriptors} descriptors");
                break;
            }
            let when = format!("{subcommand} with {descriptors} descriptors ({error})");
            assert!(output.status.success() || error.contains("rror 24"), "{when} is not told why");
            check(self, &before, &output, &when);
            if output.status.success() {
                reset(self);
                before = KernelState::of(self);
            }
        }
    }

    fn attach(&self, flags: &[&str]) -> String {
        self.agent.attach(&self.pod, flags).expect("attached")
    }

    /// Detaches the pod if it is attached.
    fn detach(&self) {
        let output = finish(&mut self.agent.for_pod("detach", &self.pod, &[])).expect("started");
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() || error.contains("not attached"), "{error}");
    }
}

#[test]
fn a_failed_attach_changes_nothing() {
    let mut fixture = FaultsFixture::new("attach");
    let clean = KernelState::of(&fixture);
    fixture.attach(&ONE);
    let attached = KernelState::of(&fixture);
    fixture.try_all(("attach", &ONE), FaultsFixture::detach, |fixture, before, output, when| {
        if output.status.success() {
            // The attach is complete, or the next one completes it.
            let again = fixture.attach(&ONE);
            assert!(again.starts_with("unchanged"), "{when}: {again}");
            assert_eq!(KernelState::of(fixture).shape(), attached.shape(), "{when}");
            fixture.detach();
        }
        KernelState::of(fixture).assert_is(before, when);
        before.assert_is(&clean, when);
    });
}

#[test]
fn a_failed_replacement_keeps_the_old_policy() {
    let mut fixture = FaultsFixture::new("replace");
    fixture.attach(&ONE);
    fixture.attach(&OTHER);
    let replaced = KernelState::of(&fixture);
    fixture.try_all(
        ("attach", &OTHER),
        |fixture| _ = fixture.attach(&ONE),
        |fixture, before, output, when| {
            if output.status.success() {
                // The next call completes what is missing.
                let again = fixture.attach(&OTHER);
                assert!(again.starts_with("unchanged"), "{when}: {again}");
                assert_eq!(KernelState::of(fixture).shape(), replaced.shape(), "{when}");
            } else {
                KernelState::of(fixture).assert_is(before, when);
            }
        },
    );
}

#[test]
fn a_failed_detach_is_finished_by_the_next() {
    let mut fixture = FaultsFixture::new("detach");
    let clean = KernelState::of(&fixture);
    fixture.try_all(
        ("detach", &[]),
        |fixture| _ = fixture.attach(&OTHER),
        |fixture, _, _, when| {
            fixture.detach();
            KernelState::awaited(fixture, &clean).assert_is(&clean, when);
            fixture.attach(&OTHER);
        },
    );
}

/// Wherever an agent is killed, `status` works afterwards, and the next attach or detach cleans up.
#[test]
fn a_killed_agent_does_not_affect_the_next() {
    let mut fixture = FaultsFixture::new("kill");
    let clean = KernelState::of(&fixture);
    for flags in [&ONE[..], &OTHER] {
        let mut number = 1;
        while !fixture.inject(("bpf", "signal=KILL"), number, ("attach", flags)).status.success() {
            fixture.agent.status().expect("a status");
            let when = format!("attach {flags:?} killed at {number}");
            if number % 2 == 0 {
                fixture.attach(flags);
            }
            fixture.detach();
            KernelState::of(&fixture).assert_is(&clean, &when);
            number += 7;
        }
        assert!(number > 40, "{number} calls of bpf only");
        fixture.detach();
    }
}

/// Wherever a detach is killed, `detach --all` finishes it.
#[test]
fn a_killed_detach_is_finished_by_detach_all() {
    let mut fixture = FaultsFixture::new("half");
    let clean = Snapshot::of(&fixture.pod).expect("a snapshot");
    for call in ["bpf", "sendto"] {
        let mut number = 1;
        fixture.attach(&OTHER);
        while !fixture.inject((call, "signal=KILL"), number, ("detach", &[])).status.success() {
            let when = format!("detach killed at {call} {number}");
            fixture.agent.detach_all().expect("detached");
            let after = Snapshot::of(&fixture.pod).expect("a snapshot");
            assert_eq!(clean.difference(&after), [""; 0], "{when}");
            assert!(!fixture.agent.bpffs().join("intercept").exists(), "{when}: the store is left");
            number += 5;
            fixture.attach(&OTHER);
        }
        assert!(number > 5, "no call of {call}");
    }
}

/// As above, for the first agent of a node, which loads the programs.
#[test]
fn an_agent_killed_in_the_first_load_does_not_affect_the_next() {
    let mut fixture = FaultsFixture::new("first");
    fixture.agent.detach_all().expect("detached");
    let clean = tree(fixture.agent.bpffs()).expect("a tree");
    let namespace = Snapshot::of(&fixture.pod).expect("a snapshot");
    let mut number = 1;
    while !fixture.inject(("bpf", "signal=KILL"), number, ("attach", &ONE)).status.success() {
        assert_eq!(fixture.agent.pods().expect("a status").len(), 0, "killed at {number}");
        if number % 2 == 0 {
            fixture.attach(&ONE);
        }
        fixture.agent.detach_all().expect("detached");
        assert_eq!(tree(fixture.agent.bpffs()).expect("a tree"), clean, "killed at {number}");
        let after = Snapshot::of(&fixture.pod).expect("a snapshot");
        assert_eq!(namespace.difference(&after), [""; 0], "killed at {number}");
        number += 29;
    }
    assert!(number > 100, "{number} calls of bpf only");
}

/// As above, for a first agent that may have few descriptors: what it made it removes itself.
#[test]
fn a_first_attach_without_descriptors_leaves_nothing() {
    let mut fixture = FaultsFixture::new("few");
    fixture.agent.detach_all().expect("detached");
    let clean = tree(fixture.agent.bpffs()).expect("a tree");
    let namespace = Snapshot::of(&fixture.pod).expect("a snapshot");
    for descriptors in STANDARD.. {
        let output = fixture.limit(descriptors, ("attach", &ONE));
        let error = String::from_utf8_lossy(&output.stderr);
        let when = format!("with {descriptors} descriptors ({error})");
        if output.status.success() {
            assert!(error.is_empty() && descriptors > STANDARD + 5, "{when}");
            break;
        }
        assert!(error.contains("rror 24"), "{when} is not told why");
        assert_eq!(tree(fixture.agent.bpffs()).expect("a tree"), clean, "{when}");
        let after = Snapshot::of(&fixture.pod).expect("a snapshot");
        assert_eq!(namespace.difference(&after), [""; 0], "{when}");
    }
    fixture.attach(&ONE);
}
