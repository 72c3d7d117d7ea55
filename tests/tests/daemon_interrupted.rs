//! The daemon is killed at the steps of a cut-over, there and back: the pod is captured by exactly one all the time, and the next
//! daemon finishes it or undoes it.

use std::{
    collections::BTreeSet,
    io::{BufRead as _, BufReader},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use intercept_agent::facade::daemon::{CutoverState, Response};
use serde_json::{Value, json};
use tests::{
    cutover::{CUTOVER, CutoverNode, LoadProxy, MODE, RulesFixture},
    iptables::{Backend, IptablesOptions},
};

/// A system call of the daemon in which it is killed: the call of this number in each thread.
type KillPoint = (&'static str, usize);

/// What saves the rules, each entry of the namespace and each return from it (each program of iptables is started there), what
/// changes maps and pins, and the wait while both captures are active.
const THERE: [KillPoint; 8] = [
    ("rename", 1),
    ("rename", 2),
    ("clock_nanosleep", 1),
    ("rename", 3),
    ("setns", 9),
    ("setns", 14),
    ("setns", 19),
    ("bpf", 45),
];
const BACK: [KillPoint; 7] = [
    ("rename", 1),
    ("rename", 2),
    ("clock_nanosleep", 1),
    ("setns", 3),
    ("setns", 8),
    ("setns", 13),
    ("bpf", 25),
];

/// strace, which kills a process.
struct Strace(Child);

impl Strace {
    /// Attaches to all threads of a process.
    fn attach(pid: u32, (call, number): KillPoint) -> Self {
        let inject = format!("--inject={call}:signal=KILL:when={number}");
        let mut command = Command::new("strace");
        command.args(["--follow-forks", "--output", "/dev/null", &format!("--trace={call}"), &inject]);
        command.args(["--attach", &pid.to_string()]).stdin(Stdio::null()).stderr(Stdio::piped());
        let mut strace = Self(command.spawn().expect("strace"));
        let mut lines = BufReader::new(strace.0.stderr.take().expect("piped")).lines();
        let attached = lines.find(|line| line.as_ref().is_ok_and(|line| line.contains("attached")));
        assert!(attached.is_some(), "strace is not attached");
        // It must not wait for a reader of what it says later.
        std::thread::spawn(move || lines.for_each(drop));
        strace
    }

    /// Waits until all processes have ended to which it is attached.
    #[track_caller]
    fn has_killed(&mut self, point: KillPoint) {
        let deadline = Instant::now() + Duration::from_secs(40);
        while self.0.try_wait().expect("waited for").is_none() {
            assert!(Instant::now() < deadline, "the daemon does not come to {point:?}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Strace {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

/// What the next daemon does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum NextDaemon {
    Finishes,
    Undoes,
}

fn annotations(mode: &str) -> Value {
    json!({ MODE: mode, CUTOVER: "force" })
}

/// Waits until the pod is as its annotation says.
#[track_caller]
fn has_mode(node: &CutoverNode<'_>, mode: &str, before: &str) {
    if mode == "enforce" {
        node.has_progress(CutoverState::CutOver);
        assert!(node.is_applied("enforce", Some("out")), "{:?}", node.applied());
    } else {
        node.wait("back", |node| node.is_applied("shadow", None));
        assert_eq!(node.cart().fixture.rules(), before);
    }
}

/// Kills the daemon at each point on the way from one mode to the other. Among the states in which it leaves the pod must be those
/// in the midst of it, mode and rules.
fn kill_everywhere(
    (label, backend): (&str, Backend),
    points: &[KillPoint],
    [from, to]: [&str; 2],
    midst: &[(&str, &str)],
) {
    let fixture = RulesFixture::new(label, backend, &IptablesOptions::injected(), LoadProxy::Relays);
    let before = fixture.rules();
    let mut node = CutoverNode::new(&fixture, &annotations(from), None, &[]);
    assert!(matches!(node.add(&annotations(from)), Response::Done(_)));
    let mut states = BTreeSet::new();
    let mut next = NextDaemon::Finishes;
    for point in points {
        has_mode(&node, from, &before);
        let account = fixture.under_load(2, || {
            let mut strace = Strace::attach(node.daemon().pid().expect("it runs"), *point);
            node.annotate(&annotations(to));
            strace.has_killed(*point);
            let (mode, rules) = node.applied().expect("it is attached");
            println!("killed in {point:?}: {mode}, rules {rules:?}; the next daemon {next:?}");
            states.insert((mode, rules));
            // Without a daemon.
            std::thread::sleep(Duration::from_millis(300));
            let mode = if next == NextDaemon::Finishes { to } else { from };
            node.watched.api.shared().pods[0] = node.cart().object(&annotations(mode));
            node.watched.restart_with(&[]).expect("started");
            has_mode(&node, mode, &before);
        });
        account.assert_each_captured_once(fixture.relayed(account.count()));
        node.captured_once();
        if next == NextDaemon::Finishes {
            node.annotate(&annotations(from));
        }
        next = if next == NextDaemon::Finishes { NextDaemon::Undoes } else { NextDaemon::Finishes };
    }
    has_mode(&node, from, &before);
    for (mode, rules) in midst {
        assert!(states.contains(&((*mode).to_owned(), Some((*rules).to_owned()))), "{states:?}");
    }
}

#[test]
fn killed_on_the_way_there() {
    let midst = [("shadow", "in"), ("enforce", "in"), ("enforce", "changing")];
    kill_everywhere(("d-kill-there", Backend::Nft), &THERE, ["shadow", "enforce"], &midst);
}

#[test]
fn killed_on_the_way_back() {
    let midst = [("enforce", "changing"), ("shadow", "in")];
    kill_everywhere(("d-kill-back", Backend::Legacy), &BACK, ["enforce", "shadow"], &midst);
}
