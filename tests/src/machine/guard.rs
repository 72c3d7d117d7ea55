//! `--confirm`, and `run`.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    net::SocketAddr,
    process::{Child, ChildStdout, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use rustix::process::{Pid, Signal, kill_process};

use super::{APP, CapturedMachine, ExpectedPath, FIRST, SERVICE, Unit, difference, flow, service};
use crate::{
    agent::succeed,
    deadline::scaled,
    testbed::{Ids, Namespace},
};

struct Guarded<'a> {
    machine: &'a CapturedMachine,
    app: Unit,
    envoy: Unit,
}

impl<'a> Guarded<'a> {
    fn new(machine: &'a CapturedMachine) -> Result<Self> {
        Ok(Self { machine, app: machine.unit("app", &[APP])?, envoy: machine.proxy("envoy", FIRST)? })
    }

    fn calls(&self, what: &str, captured: bool) -> Result<()> {
        for v6 in [false, true] {
            let to = SocketAddr::new(service(v6), SERVICE);
            let way =
                if captured { ExpectedPath::Proxy(&self.envoy, "outbound") } else { ExpectedPath::Direct };
            flow(what, &self.app.actor, Ids::APP, to, "world", way, &[&self.envoy])?;
        }
        Ok(())
    }

    fn state(&self) -> Result<Vec<String>> {
        self.machine.state(&[&self.app, &self.envoy])
    }
}

pub(super) fn confirm(machine: &CapturedMachine) -> Result<()> {
    let guarded = Guarded::new(machine)?;
    let units = [&guarded.app, &guarded.envoy];
    let before = guarded.state()?;
    // What is done before it expires must take a small part of the time.
    let start = Instant::now();
    guarded.calls("before it is captured", false)?;
    succeed(machine.agent_sweep())?;
    let seconds = machine.confirm_seconds + 4 * start.elapsed().as_secs();
    let (time, seconds) = (Duration::from_secs(seconds), seconds.to_string());

    // It expires, although the command is killed as soon as it has spoken.
    let mut command = machine.attach(&units, FIRST, &["-b", "*", "--confirm", &seconds]);
    let mut child = command.stdout(Stdio::piped()).spawn().context("starting attach")?;
    let mut said = String::new();
    BufReader::new(child.stdout.take().context("no output")?).read_line(&mut said)?;
    drop(child.kill());
    drop(child.wait());
    let start = Instant::now();
    ensure!(said.starts_with("attached"), "{said}");
    guarded.calls("before it expires", true)?;
    ensure!(start.elapsed() < time, "too slow to see it captured");
    restored(&guarded, &before, 3 * time + scaled(Duration::from_secs(10)))?;
    guarded.calls("after it expired", false)?;

    // Without the process that takes it off, the programs themselves ignore it, and the next command removes it.
    succeed(machine.attach(&units, FIRST, &["-b", "*", "--confirm", &seconds]))?;
    kill_guards()?;
    guarded.calls("before it expires without a guard", true)?;
    thread::sleep(time);
    ensure!(guarded.state()? != before, "something took it off though its guard was killed");
    guarded.calls("after it expired without a guard", false)?;
    succeed(machine.agent_sweep())?;
    let left = difference(&before, &guarded.state()?);
    ensure!(left.is_empty(), "an expired capture leaves: {left:#?}");

    // Confirmed, it stays.
    succeed(machine.attach(&units, FIRST, &["-b", "*", "--confirm", &seconds]))?;
    let said = succeed(machine.agent.command("confirm"))?;
    ensure!(said.starts_with("confirmed"), "{said}");
    thread::sleep(time + Duration::from_secs(1));
    guarded.calls("after it was confirmed", true)?;
    succeed(machine.command("detach", &[&guarded.app], &["--machine"]))?;
    let left = difference(&before, &guarded.state()?);
    ensure!(left.is_empty(), "detach leaves: {left:#?}");
    Ok(())
}

/// Waits until the machine is as it was.
fn restored(guarded: &Guarded<'_>, before: &[String], limit: Duration) -> Result<()> {
    let until = Instant::now() + limit;
    loop {
        let left = difference(before, &guarded.state()?);
        if left.is_empty() {
            return Ok(());
        }
        ensure!(Instant::now() < until, "not taken off: {left:#?}");
        thread::sleep(Duration::from_millis(100));
    }
}

/// Kills the guards that this machine's agent has started.
fn kill_guards() -> Result<()> {
    let mut killed = 0;
    for entry in fs::read_dir("/proc")?.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let mut words = line.split(|byte| *byte == 0);
        let is_agent = words.next().is_some_and(|name| name.ends_with(b"intercept-agent"));
        if is_agent && words.next() == Some(b"guard") {
            kill_process(Pid::from_raw(pid).context("a pid")?, Signal::KILL)?;
            killed += 1;
        }
    }
    ensure!(killed > 0, "no guard runs");
    Ok(())
}

/// Starts `run` for these units, and waits until they are captured. Its output must stay open.
fn running(
    machine: &CapturedMachine,
    units: &[&Unit],
    stderr: Stdio,
) -> Result<(Child, BufReader<ChildStdout>)> {
    let flags = ["--machine", "-u", "1337", "-g", "1337", "-i", "*", "-b", "*"];
    let mut child = machine.command("run", units, &flags).stdout(Stdio::piped()).stderr(stderr).spawn()?;
    let mut output = BufReader::new(child.stdout.take().context("no output")?);
    let mut said = String::new();
    output.read_line(&mut said)?;
    ensure!(said.starts_with("attached"), "{said}");
    Ok((child, output))
}

/// `run` releases the machine when it is told to end.
pub(super) fn run(machine: &CapturedMachine) -> Result<()> {
    let guarded = Guarded::new(machine)?;
    let before = guarded.state()?;
    let units = [&guarded.app, &guarded.envoy];
    let (mut child, _output) = running(machine, &units, Stdio::inherit())?;
    guarded.calls("while it runs", true)?;
    kill_process(Pid::from_child(&child), Signal::TERM)?;
    ensure!(child.wait()?.success(), "run failed");
    let left = difference(&before, &guarded.state()?);
    ensure!(left.is_empty(), "run leaves: {left:#?}");
    guarded.calls("after it ended", false)
}

/// Options by which an attach replaces those of `run`, as `systemctl reload` does, stay when addresses change.
pub(super) fn run_keeps_options(machine: &CapturedMachine) -> Result<()> {
    let guarded = Guarded::new(machine)?;
    let before = guarded.state()?;
    let units = [&guarded.app, &guarded.envoy];
    let (mut child, _output) = running(machine, &units, Stdio::piped())?;
    guarded.calls("before options are replaced", true)?;

    let excluded = [false, true].map(|v6| service(v6).to_string()).join(",");
    succeed(machine.attach(&units, FIRST, &["-b", "*", "-x", &excluded]))?;
    guarded.calls("after options were replaced", false)?;
    let mut log = BufReader::new(child.stderr.take().context("no log")?).lines();
    let mut applied = || -> Result<()> {
        let line = log.find(|line| line.as_ref().map_or(true, |line| line.contains("applied a change")));
        line.context("run ended without applying a change")?.context("reading its log").map(drop)
    };
    let (netns, address) = (Namespace::of_machine()?, "10.97.0.1/32".parse()?);
    netns.add_address("lo", address)?;
    applied()?;
    guarded.calls("after an address was added", false)?;
    netns.delete_address("lo", address)?;
    applied()?;
    guarded.calls("after an address was deleted", false)?;

    kill_process(Pid::from_child(&child), Signal::TERM)?;
    ensure!(child.wait()?.success(), "run failed");
    let left = difference(&before, &guarded.state()?);
    ensure!(left.is_empty(), "run leaves: {left:#?}");
    Ok(())
}

/// `run` says which of its cgroups is gone, goes on with the others, and ends with the last.
pub(super) fn run_ends(machine: &CapturedMachine) -> Result<()> {
    let before = machine.state(&[])?;
    let guarded = Guarded::new(machine)?;
    let other = machine.unit("other", &[])?;
    let units = [&guarded.app, &guarded.envoy, &other];
    let (mut child, _output) = running(machine, &units, Stdio::piped())?;

    let mut log = BufReader::new(child.stderr.take().context("no log")?).lines();
    let path = other.sandbox.cgroup.path().display().to_string();
    drop(other);
    let mut said = |texts: &[&str]| -> Result<String> {
        let is_it = |line: &String| texts.iter().any(|text| line.contains(text));
        let line = log.find(|line| line.as_ref().map_or(true, is_it));
        line.with_context(|| format!("run ended without a line of {texts:?}"))?.context("reading its log")
    };
    let line = said(&["is gone"])?;
    ensure!(line.contains(&path), "{line}");
    guarded.calls("with the cgroups that are left", true)?;
    let (netns, address) = (Namespace::of_machine()?, "10.97.0.1/32".parse()?);
    netns.add_address("lo", address)?;
    let line = said(&["applied a change", "stays active"])?;
    ensure!(line.contains("applied a change of addresses"), "{line}");
    netns.delete_address("lo", address)?;
    said(&["applied a change"])?;
    drop(guarded);
    let last = log.last().context("run said nothing of its end")??;
    ensure!(last.contains("is gone, and its capture with it"), "{last}");
    ensure!(child.wait()?.code() == Some(1), "run did not fail");
    let left = difference(&before, &machine.state(&[])?);
    ensure!(left.is_empty(), "run leaves: {left:#?}");
    Ok(())
}

impl CapturedMachine {
    /// A command that finds what is left: here it detaches all, of which there is none.
    fn agent_sweep(&self) -> std::process::Command {
        let mut command = self.agent.command("detach");
        command.arg("--all");
        command
    }
}
