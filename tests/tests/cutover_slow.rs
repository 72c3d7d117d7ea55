//! A program of iptables that does not end is killed after 15 seconds, with all that it has started, and the pod stays captured.

use std::{
    fs,
    process::Output,
    time::{Duration, Instant},
};

use intercept_agent::facade::daemon::CutoverState;
use serde_json::json;
use tests::{
    agent::finish,
    cutover::{CUTOVER, CutoverNode, LoadProxy, MODE, RulesFixture, RulesPod, WrappedTools},
    iptables::{Backend, IptablesOptions},
};

/// The limit, in seconds.
const LIMIT: u64 = 15;

fn fixture(label: &str) -> RulesFixture {
    RulesFixture::new(label, Backend::Nft, &IptablesOptions::injected(), LoadProxy::Relays)
}

/// Asserts that no process sleeps for this long any more. A process that was killed with its group may end a moment later.
#[track_caller]
fn assert_ended(seconds: &str) {
    let started = Instant::now();
    while sleepers(seconds) > 0 {
        assert!(started.elapsed() < Duration::from_secs(5), "a program of iptables goes on");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// How many processes sleep for this long.
fn sleepers(seconds: &str) -> usize {
    let processes = fs::read_dir("/proc").expect("listed").filter_map(Result::ok);
    let lines = processes.filter_map(|process| fs::read(process.path().join("cmdline")).ok());
    lines.filter(|line| *line == format!("sleep\0{seconds}\0").into_bytes()).count()
}

/// Runs `cutover` with these programs. Returns also how long it took.
fn cutover(fixture: &RulesFixture, tools: &WrappedTools, flags: &[&str]) -> (Output, Duration) {
    let started = Instant::now();
    let mut command = fixture.agent.command("cutover");
    command.arg("--cgroup-path").arg(fixture.pod.cgroup.path()).args(flags).env("PATH", tools.path());
    let output = finish(&mut command).expect("started");
    (output, started.elapsed())
}

#[track_caller]
fn assert_killed((output, took): &(Output, Duration), program: &str, sleep: &str) {
    let said = String::from_utf8_lossy(&output.stderr);
    let what = format!("{program} in ");
    let killed = format!("took longer than {LIMIT}s and was killed");
    assert!(!output.status.success() && said.contains(&what) && said.contains(&killed), "{said}");
    assert!(*took >= Duration::from_secs(LIMIT) && *took < Duration::from_secs(LIMIT * 2), "{took:?}");
    assert_ended(sleep);
}

#[test]
fn the_command_says_so_and_is_finished_later() {
    let fixture = fixture("cut-slow");
    let before = fixture.rules();
    let cart = RulesPod::cart(&fixture);
    fixture.shadow(&[]);
    let tools = WrappedTools::new();
    tools.set("save", "sleep 3601");
    let killed = cutover(&fixture, &tools, &["--force"]);
    assert_killed(&killed, "iptables-nft-save", "3601");
    tools.reset("save");
    assert_eq!(fixture.rules(), before);
    assert_eq!(fixture.agent.pods().expect("a status")[0].mode, "shadow");
    cart.captured_once();

    // While both are active.
    tools.set("restore", "case \"$INPUT\" in *'-D OUTPUT'*) sleep 3602;; esac");
    let killed = cutover(&fixture, &tools, &["--force"]);
    assert_killed(&killed, "iptables-nft-restore", "3602");
    tools.reset("restore");
    let pods = fixture.agent.pods().expect("a status");
    let rules = pods[0].cutover.as_ref().map(|cutover| cutover.rules.as_str());
    assert_eq!((pods[0].mode.as_str(), rules), ("enforce", Some("changing")));
    cart.captured_once();
    let (output, _) = cutover(&fixture, &tools, &[]);
    assert!(output.status.success(), "{output:?}");
    cart.captured_once();

    tools.set("restore", "sleep 3603");
    let killed = cutover(&fixture, &tools, &["--back"]);
    assert_killed(&killed, "iptables-nft-restore", "3603");
    tools.reset("restore");
    cart.captured_once();
    let (output, _) = cutover(&fixture, &tools, &["--back"]);
    assert!(output.status.success(), "{output:?}");
    assert_eq!(fixture.rules(), before);
    cart.captured_once();
}

/// A program that is slow must not change the rules after its agent was killed, while another goes back.
#[test]
fn it_ends_with_the_agent() {
    let fixture = fixture("cut-slow-kill");
    let before = fixture.rules();
    fixture.shadow(&[]);
    let (tools, folder) = (WrappedTools::new(), tempfile::tempdir().expect("a folder"));
    let (hold, waits) = (folder.path().join("hold"), folder.path().join("waits"));
    fs::write(&hold, "").expect("written");
    let loops = format!("touch {}; while [ -e {} ]; do sleep 0.02; done", waits.display(), hold.display());
    tools.set("restore", &format!("case \"$INPUT\" in *'-D OUTPUT'*) {loops};; esac"));
    let mut command = fixture.agent.command("cutover");
    command.arg("--cgroup-path").arg(fixture.pod.cgroup.path()).arg("--force").env("PATH", tools.path());
    let mut child = command.spawn().expect("started");
    let await_that = |what: &str, so: &dyn Fn() -> bool| {
        let started = Instant::now();
        while !so() {
            assert!(started.elapsed() < Duration::from_secs(20), "{what}");
            std::thread::sleep(Duration::from_millis(10));
        }
    };
    await_that("it removes the rules", &|| waits.exists());
    child.kill().and_then(|()| child.wait()).expect("killed");
    std::thread::scope(|scope| {
        let back = scope.spawn(|| fixture.cut(&["--back"]));
        // The rules are in, and their guards, which the late program would take out as well.
        await_that("both capture", &|| fixture.agent.pods().expect("a status")[0].mode == "shadow");
        fs::remove_file(&hold).expect("removed");
        back.join().expect("it goes back");
    });
    assert_eq!(fixture.rules(), before);
    RulesPod::cart(&fixture).captured_once();
}

#[test]
fn the_daemon_says_so_and_goes_on() {
    let fixture = fixture("d-cut-slow");
    let before = fixture.rules();
    let tools = WrappedTools::new();
    tools.set("save", "sleep 3604");
    let forced = json!({ MODE: "enforce", CUTOVER: "force" });
    let mut node = CutoverNode::new(&fixture, &forced, Some(&tools.path()), &[]);
    node.add(&forced);
    node.wait("it begins", |_| sleepers("3604") == 1);
    let began = Instant::now();
    let mut slowest = Duration::ZERO;
    while node.progress().is_none_or(|progress| progress.state != CutoverState::Refused) {
        assert!(began.elapsed() < Duration::from_secs(2 * LIMIT), "{:?}", node.report());
        let asked = Instant::now();
        node.report().expect("a report");
        slowest = slowest.max(asked.elapsed());
        std::thread::sleep(Duration::from_millis(50));
    }
    assert!(began.elapsed() > Duration::from_secs(LIMIT - 1), "{:?}", began.elapsed());
    println!("the slowest answer meanwhile took {slowest:?}");
    assert!(slowest < Duration::from_secs(2), "{slowest:?}");
    assert_ended("3604");
    node.wait("an event", |node| !node.notes("NotCutOver").is_empty());
    let notes = node.notes("NotCutOver");
    assert!(notes[0].contains(&format!("took longer than {LIMIT}s and was killed")), "{notes:?}");
    assert!(node.is_applied("shadow", None));
    assert_eq!(fixture.rules(), before);
    node.captured_once();
    // It would be tried again after ten times as long.
    tools.reset("save");
    node.watched.restart_with(&[]).expect("started");
    node.has_progress(CutoverState::CutOver);
    node.captured_once();
}
