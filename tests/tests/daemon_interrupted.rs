//! The daemon is killed at the steps of a cut-over, there and back: the pod is captured by exactly one all the time, and the next
//! daemon finishes it or undoes it.

use std::{
    cell::{Cell, RefCell},
    collections::BTreeSet,
    fs,
    io::{BufRead as _, BufReader},
    process::{Child, Command, Stdio},
    time::Duration,
};

use intercept_agent::facade::daemon::{CutoverState, Response};
use serde_json::{Value, json};
use tempfile::TempDir;
use tests::{
    cutover::{CUTOVER, CutoverNode, LoadProxy, MODE, RulesFixture, WrappedTools},
    iptables::{Backend, IptablesOptions},
};

/// Where the daemon is killed.
#[derive(Clone, Copy, Debug)]
enum KillPoint {
    /// When the program of iptables with this number has been started and has done nothing yet.
    Program(usize),
    /// While both captures are active.
    Overlap,
    /// In the call that gives the record with this number its name.
    Record(usize),
}

/// After the programs, how often the daemon writes down how far it is.
const THERE: [KillPoint; 4] =
    [KillPoint::Overlap, KillPoint::Record(1), KillPoint::Record(2), KillPoint::Record(3)];
const BACK: [KillPoint; 3] = [KillPoint::Overlap, KillPoint::Record(1), KillPoint::Record(2)];

/// Programs of iptables that are counted, and of which one waits until it is killed.
struct CountedTools {
    tools: WrappedTools,
    folder: TempDir,
}

impl CountedTools {
    fn new() -> Self {
        Self { tools: WrappedTools::new(), folder: tempfile::tempdir().expect("a folder") }
    }

    /// Counts from now on, and has the program with this number wait.
    fn hold(&self, number: usize) {
        let folder = self.folder.path().display();
        self.release();
        fs::write(self.folder.path().join("hold"), "").expect("written");
        let commands = format!(
            "echo >> {folder}/started\n\
             if [ -e {folder}/hold ] && [ $(wc -l < {folder}/started) = {number} ]; then\n\
             touch {folder}/waits; while [ -e {folder}/hold ]; do sleep 0.02; done; exit 1; fi\n"
        );
        for action in ["save", "restore"] {
            self.tools.set(action, &commands);
        }
    }

    fn waits(&self) -> bool {
        self.folder.path().join("waits").exists()
    }

    /// No program waits any more.
    fn release(&self) {
        for file in ["hold", "started", "waits"] {
            drop(fs::remove_file(self.folder.path().join(file)));
        }
    }
}

/// strace, which kills a process.
struct Strace(Child);

impl Strace {
    /// Attaches to all threads of a process. It is killed in the call of this number of one of them.
    fn attach(pid: u32, call: &str, number: usize) -> Self {
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

    /// Whether all processes have ended to which it is attached.
    fn has_killed(&mut self) -> bool {
        self.0.try_wait().expect("waited for").is_some()
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

/// Changes the mode and kills the daemon on the way. Returns whether it came to the point before it was done.
fn kill(node: &mut CutoverNode<'_>, tools: &CountedTools, point: KillPoint, to: &str) -> bool {
    let is_done = |node: &CutoverNode<'_>| node.is_applied(to, (to == "enforce").then_some("out"));
    let done = Cell::new(false);
    let what = format!("the daemon comes to {point:?}");
    match point {
        KillPoint::Program(number) => {
            tools.hold(number);
            node.annotate(&annotations(to));
            node.wait(&what, |node| {
                done.set(is_done(node));
                tools.waits() || done.get()
            });
            done.set(!tools.waits());
        }
        KillPoint::Overlap => {
            node.annotate(&annotations(to));
            node.wait(&what, |node| node.is_applied(to, Some("in")));
        }
        KillPoint::Record(number) => {
            let strace = Strace::attach(node.daemon().pid().expect("it runs"), "rename", number);
            let strace = RefCell::new(strace);
            node.annotate(&annotations(to));
            node.wait(&what, |_| strace.borrow_mut().has_killed());
        }
    }
    node.watched.daemon.kill().expect("killed");
    tools.release();
    !done.get()
}

/// Kills the daemon at each point on the way from one mode to the other: first in every `step`-th program, until it needs no more.
/// Among the states in which it leaves the pod must be those in the midst of it, mode and rules.
fn kill_everywhere(
    (label, backend): (&str, Backend),
    (step, points): (usize, &[KillPoint]),
    [from, to]: [&str; 2],
    midst: &[(&str, Option<&str>)],
) {
    let fixture = RulesFixture::new(label, backend, &IptablesOptions::injected(), LoadProxy::Relays);
    let before = fixture.rules();
    let tools = CountedTools::new();
    let mut node = CutoverNode::new(&fixture, &annotations(from), Some(&tools.tools.path()), &[]);
    assert!(matches!(node.add(&annotations(from)), Response::Done(_)));
    let mut states = BTreeSet::new();
    let mut next = NextDaemon::Finishes;
    let mut programs = (1..).step_by(step).map(KillPoint::Program);
    let mut killed_in_programs = 0;
    let mut points = points.iter();
    let mut is_program = true;
    while let Some(point) = if is_program { programs.next() } else { points.next().copied() } {
        has_mode(&node, from, &before);
        let account = fixture.under_load(2, || {
            let came = kill(&mut node, &tools, point, to);
            is_program &= came;
            killed_in_programs += usize::from(is_program);
            let state = node.applied().expect("it is attached");
            let killed = if came { "killed in" } else { "done before" };
            println!("{killed} {point:?}: {state:?}; the next daemon {next:?}");
            states.insert(state);
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
    assert!(killed_in_programs * step >= 8, "killed in {killed_in_programs} programs only");
    for (mode, rules) in midst {
        let state = ((*mode).to_owned(), rules.map(str::to_owned));
        assert!(states.contains(&state), "{states:?}");
    }
}

#[test]
fn killed_on_the_way_there() {
    let midst =
        [("shadow", None), ("shadow", Some("in")), ("enforce", Some("in")), ("enforce", Some("changing"))];
    kill_everywhere(("d-kill-there", Backend::Nft), (3, &THERE), ["shadow", "enforce"], &midst);
}

#[test]
fn killed_on_the_way_back() {
    let midst = [("enforce", Some("out")), ("enforce", Some("changing")), ("shadow", Some("in"))];
    kill_everywhere(("d-kill-back", Backend::Legacy), (4, &BACK), ["enforce", "shadow"], &midst);
}
