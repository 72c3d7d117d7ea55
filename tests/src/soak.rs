//! A node on which all goes wrong at once, at random by a seed, for as long as wanted: pods come and go, options change,
//! daemon and commands are killed, hostile pods do what they can. Meanwhile every connection of well-behaved pods is
//! checked at both ends, and at the end nothing may be left.

pub mod admission;
pub mod churn;
pub mod dice;
pub mod faults;
pub mod growth;
pub mod held;
pub mod hostile;
pub mod ledger;
pub mod node;
pub mod residue;
pub mod steady;

use std::{
    io::{Read as _, Write as _},
    net::TcpStream,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};

use self::{
    admission::{Admissions, LIMIT},
    dice::Dice,
    faults::Steady,
    growth::Growth,
    held::HeldPod,
    ledger::{Kind, Ledger},
    node::SoakNode,
    residue::{Process, Residue},
    steady::{SteadyPod, World},
};
use crate::{agent::Agent, snapshot::Snapshot, testbed::Pod};

/// How often progress is printed.
const PROGRESS: Duration = Duration::from_secs(30);
/// How often the daemon's memory is looked at.
const SAMPLE: Duration = Duration::from_secs(5);
/// How long everything may take to settle when the disturbances have ended.
const SETTLED: Duration = Duration::from_secs(60);
/// The priority of the agent, and of the runtime whose ADD is measured.
const PRIORITY: i32 = -20;
/// As long as the kubelet waits for a probe's answer.
const PROBE: Duration = Duration::from_secs(1);

/// What to do.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// For how long.
    pub duration: Duration,
    /// What decides all choices.
    pub seed: u64,
}

/// Soaks; fails with what went wrong.
pub fn soak(options: Options) -> Result<()> {
    let ledger = Ledger::new();
    println!("soak: seed {}, {} s", options.seed, options.duration.as_secs());
    let mut agent = Agent::new("soak")?;
    // What else this machine does is not what is measured.
    agent.start_by(vec!["nice".into(), "-n".into(), PRIORITY.to_string()]);
    let admissions = Admissions::default();
    perform(&agent, options, &admissions, &ledger)?;
    if agent.bpffs().join("intercept").exists() {
        ledger.find(Kind::Left, &"the agent's folder after detach --all");
    }
    println!("soak: {}", ledger.summary());
    if let (Some(adds), Some(starts)) = (admissions.adds(), admissions.starts()) {
        println!("soak: ADD of a plain pod: {adds}; the plugin alone: {starts}");
        if adds.p99 > LIMIT {
            ledger.find(Kind::Slow, &format_args!("ADD of a plain pod: {adds}"));
        }
    }
    let findings = ledger.findings();
    ensure!(findings.is_empty(), "seed {}:\n  {}", options.seed, findings.join("\n  "));
    Ok(())
}

fn perform(agent: &Agent, options: Options, admissions: &Admissions, ledger: &Ledger) -> Result<()> {
    let world = World::new()?;
    let node = SoakNode::new(agent)?;
    let object = node.api_pod("by-api", "00000000-0000-4000-8000-000000000001".into())?;
    let folder = SteadyPod::new("by-folder", &world, None)?;
    let api = SteadyPod::new("by-api", &world, Some(&object))?;
    let command = SteadyPod::new("by-command", &world, None)?;
    let mut steady = Steady { folder: &folder, api: &api, command: &command, object };
    let pods = [folder.pod(), api.pod(), command.pod()];
    let before = snapshots(&pods)?;
    steady.capture(&node)?;
    let mut held = HeldPod::new(&node, &world)?;
    let baseline = Residue::of(&node, &world)?;
    let mut growth = Growth::default();
    let victim = steady.object.uid().to_owned();
    std::thread::scope(|scope| {
        let dice = |thread| Dice::new(options.seed, thread);
        let (node, world, victim) = (&node, &world, victim.as_str());
        for (thread, pod) in [&folder, &api, &command].into_iter().enumerate() {
            let mut dice = dice(10 + u64::try_from(thread).unwrap_or_default());
            spawn(scope, ledger, move || connect(pod, world, &mut dice, ledger));
        }
        spawn(scope, ledger, || held.check(ledger));
        spawn(scope, ledger, move || admissions.measure(node, dice(2), ledger));
        for thread in [3, 4] {
            spawn(scope, ledger, move || churn::churn(node, world, thread, dice(thread.into()), ledger));
        }
        for thread in [5, 6] {
            let dice = dice(thread.into());
            spawn(scope, ledger, move || hostile::harm(node, world, thread, dice, victim, ledger));
        }
        let (half, steady) = (options.duration / 2, &mut steady);
        spawn(scope, ledger, move || faults::disturb(node, steady, dice(7), half, ledger));
        spawn(scope, ledger, || probe(node, ledger));
        watch(node, options, admissions, &mut growth, ledger);
        ledger.stop();
    });
    growth.judge(ledger);
    steady.restore(&node)?;
    settle(&node, &world, &baseline, ledger)?;
    finish(&node, &steady, &held, &pods, &before, ledger)
}

/// A thread whose failure is a finding of its own, and ends the run.
fn spawn<'scope, 'env>(
    scope: &'scope std::thread::Scope<'scope, 'env>,
    ledger: &'env Ledger,
    work: impl FnOnce() -> Result<()> + Send + 'scope,
) {
    scope.spawn(move || {
        let worked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
        let error = match worked {
            Ok(Ok(())) => return,
            Ok(Err(error)) => format!("{error:#}"),
            Err(_) => "a panic; see above".to_owned(),
        };
        ledger.find(Kind::Harness, &error);
        ledger.stop();
    });
}

fn connect(pod: &SteadyPod, world: &World, dice: &mut Dice, ledger: &Ledger) -> Result<()> {
    while !ledger.stopped() {
        pod.connect(world, dice, ledger)?;
        std::thread::sleep(dice.millis(0..20));
    }
    Ok(())
}

/// Whether the kubelet would leave the daemon alone.
fn probe(node: &SoakNode<'_>, ledger: &Ledger) -> Result<()> {
    while !ledger.stopped() {
        let before = node.absences();
        let started = Instant::now();
        let answer = healthz(node);
        let took = started.elapsed();
        if before.is_multiple_of(2) && node.absences() == before && (answer.is_err() || took > PROBE) {
            ledger.find(Kind::Slow, &format_args!("/healthz after {took:?}: {answer:?}"));
        }
        ledger.pause(Duration::from_millis(500));
    }
    Ok(())
}

fn healthz(node: &SoakNode<'_>) -> Result<()> {
    let mut stream = TcpStream::connect(node.metrics())?;
    stream.set_read_timeout(Some(PROBE * 10))?;
    stream.write_all(b"GET /healthz HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    ensure!(text.starts_with("HTTP/1.1 200"), "{text}");
    Ok(())
}

/// Prints progress, and samples the daemon in the second half of the run, until that ends.
fn watch(
    node: &SoakNode<'_>,
    options: Options,
    admissions: &Admissions,
    growth: &mut Growth,
    ledger: &Ledger,
) {
    let mut next = PROGRESS;
    while ledger.elapsed() < options.duration && !ledger.stopped() {
        ledger.pause(SAMPLE.min(options.duration.saturating_sub(ledger.elapsed())));
        let process = Process::of(node).ok();
        if ledger.elapsed() > options.duration / 2 {
            process.iter().cloned().for_each(|process| growth.sample(process));
        }
        if ledger.elapsed() < next {
            continue;
        }
        next += PROGRESS;
        println!("soak: {} s: {}", ledger.elapsed().as_secs(), ledger.summary());
        if let (Some(adds), Some(process)) = (admissions.adds(), process) {
            println!(
                "soak: ADD {adds}; the daemon has {} KiB and {} descriptors",
                process.rss,
                process.open()
            );
        }
    }
    if let Some((least, most)) = growth.range() {
        println!("soak: the daemon had {least} to {most} KiB in the second half");
    }
}

/// Waits until there is as much of everything as at the beginning.
fn settle(node: &SoakNode<'_>, world: &World, baseline: &Residue, ledger: &Ledger) -> Result<()> {
    let deadline = Instant::now() + SETTLED;
    loop {
        // Between two looks something may go.
        let difference = Residue::of(node, world).map(|residue| baseline.difference(&residue));
        if difference.as_ref().is_ok_and(Vec::is_empty) {
            return Ok(());
        }
        if Instant::now() > deadline {
            for what in difference? {
                ledger.find(Kind::Left, &what);
            }
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// Compares the daemon with a fresh one, then has all released and compares the pods with what they were.
fn finish(
    node: &SoakNode<'_>,
    steady: &Steady<'_>,
    held: &HeldPod,
    pods: &[&Pod],
    before: &[Snapshot],
    ledger: &Ledger,
) -> Result<()> {
    steady.exercise(node)?;
    let old = Process::of(node)?;
    node.kill_daemon(Duration::ZERO)?;
    steady.exercise(node)?;
    Growth::compare(&old, &Process::of(node)?, ledger);
    held.release(node)?;
    node.tell("DELETED", &steady.object);
    node.daemon().remove(faults::FILE)?;
    // Killed in the middle of that; a command does the rest.
    node.end_daemon()?;
    node.agent().detach_all().context("detaching all")?;
    for (before, after) in before.iter().zip(snapshots(pods)?) {
        for what in before.difference(&after) {
            ledger.find(Kind::Left, &what);
        }
    }
    Ok(())
}

fn snapshots(pods: &[&Pod]) -> Result<Vec<Snapshot>> {
    pods.iter().map(|pod| Snapshot::of(pod)).collect()
}
