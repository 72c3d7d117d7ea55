//! Captures and releases a pod in each mode.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::agent::BenchAgent;
use super::mode::CaptureMode;
use super::nft;
use super::pool::WorkerPool;
use crate::iptables::{IpFamily, IptablesOptions, chains::rules, restore::restore_input};
use crate::testbed::Sandbox;

/// Empties the only table that REDIRECT mode uses. Quicker than removing rule by rule, as istio-iptables does.
const EMPTY: &str = "*nat\n:PREROUTING ACCEPT\n:OUTPUT ACCEPT\nCOMMIT\n";

/// The capture of a pod, prepared first, so that only the programs are timed. Dropping it releases the pod.
#[derive(Debug)]
pub struct TimedCapture<'a> {
    sandbox: &'a Sandbox,
    install: Vec<CaptureCommand>,
    remove: Vec<CaptureCommand>,
    in_force: bool,
}

/// A program with its arguments and input.
#[derive(Debug)]
struct CaptureCommand {
    program: PathBuf,
    arguments: Vec<String>,
    input: String,
    /// Whether the program runs in the pod's namespace.
    inside: bool,
}

/// To capture, and to release.
type CaptureCommands = (Vec<CaptureCommand>, Vec<CaptureCommand>);

impl<'a> TimedCapture<'a> {
    /// Prepares the capture of a pod with these options. Modes without capture have no commands.
    pub fn prepare(
        mode: CaptureMode,
        options: &IptablesOptions,
        sandbox: &'a Sandbox,
        pool: &WorkerPool,
    ) -> Result<Self> {
        let step = |program: &str, arguments: &[&str], input: String| CaptureCommand {
            program: program.into(),
            arguments: arguments.iter().map(ToString::to_string).collect(),
            input,
            inside: true,
        };
        let restore = |backend: &str, family: IpFamily, input: String| {
            let program = if family == IpFamily::V4 { "iptables" } else { "ip6tables" };
            step(&format!("{program}-{backend}-restore"), &["--noflush"], input)
        };
        let both = [IpFamily::V4, IpFamily::V6];
        let by_iptables = |backend: &str| -> CaptureCommands {
            let install = both.map(|family| restore(backend, family, restore_input(&rules(options, family))));
            let remove = both.map(|family| CaptureCommand {
                // Without --noflush, other chains and rules are removed.
                arguments: Vec::new(),
                ..restore(backend, family, EMPTY.into())
            });
            (install.into(), remove.into())
        };
        let by_agent = |agent, flags: &[&str]| attach_and_detach(agent, options, sandbox, flags);
        let (install, remove) = match mode {
            CaptureMode::None | CaptureMode::Explicit => (Vec::new(), Vec::new()),
            CaptureMode::IptablesNft => by_iptables("nft"),
            CaptureMode::IptablesLegacy => by_iptables("legacy"),
            CaptureMode::Nft => (
                vec![step("nft", &["-f", "-"], nft::ruleset(options))],
                vec![step("nft", &["-f", "-"], nft::REMOVAL.into())],
            ),
            CaptureMode::Baseline | CaptureMode::Agent => by_agent(pool.agent_of(mode)?, &[])?,
            // This program is the proxy if Envoy is not.
            CaptureMode::BaselineAccelerated | CaptureMode::Accelerated => {
                by_agent(pool.agent_of(mode)?, &["--accelerate", "--accelerate-proxies", "bench,envoy"])?
            }
            CaptureMode::Shadowed => {
                let (mut install, mut remove) = by_iptables("nft");
                let (attach, detach) = by_agent(pool.agent()?, &["--shadow"])?;
                install.extend(attach);
                remove.splice(0..0, detach);
                (install, remove)
            }
        };
        Ok(Self { sandbox, install, remove, in_force: false })
    }

    /// Captures the pod. Returns how long that took.
    pub fn install(&mut self) -> Result<Duration> {
        self.in_force = true;
        perform(&self.install, self.sandbox)
    }

    /// Releases the pod. Returns how long that took.
    pub fn remove(&mut self) -> Result<Duration> {
        self.in_force = false;
        perform(&self.remove, self.sandbox)
    }
}

impl Drop for TimedCapture<'_> {
    fn drop(&mut self) {
        if self.in_force
            && let Err(error) = self.remove()
        {
            eprintln!("releasing {}: {error:#}", self.sandbox.netns.name());
        }
    }
}

fn attach_and_detach(
    agent: &BenchAgent,
    options: &IptablesOptions,
    sandbox: &Sandbox,
    flags: &[&str],
) -> Result<CaptureCommands> {
    let cgroup = ["--cgroup-path".to_owned(), utf8(sandbox.cgroup.path())?];
    let mut attach = agent.arguments("attach");
    attach.extend(cgroup.clone());
    attach.extend(["--netns".to_owned(), utf8(sandbox.netns.path())?]);
    attach.extend(flags.iter().map(ToString::to_string));
    // The file is only used for DNS capture.
    attach.extend(options.arguments(Path::new("/dev/null")));
    let mut detach = agent.arguments("detach");
    detach.extend(cgroup);
    let run = |arguments| CaptureCommand {
        program: agent.program().to_owned(),
        arguments,
        input: String::new(),
        inside: false,
    };
    Ok((vec![run(attach)], vec![run(detach)]))
}

fn utf8(path: &Path) -> Result<String> {
    Ok(path.to_str().with_context(|| format!("{} is not UTF-8", path.display()))?.to_owned())
}

fn perform(steps: &[CaptureCommand], sandbox: &Sandbox) -> Result<Duration> {
    let mut commands = Vec::new();
    for step in steps {
        let mut command =
            if step.inside { sandbox.command(&step.program)? } else { Command::new(&step.program) };
        command.args(&step.arguments).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
        commands.push((command, step));
    }
    let begun = Instant::now();
    for (command, step) in &mut commands {
        let name = step.program.display();
        let mut child =
            command.spawn().with_context(|| format!("starting {name}; is its package installed?"))?;
        // A program that fails at once may not read all input. Its own error is more useful than this one.
        let written = child.stdin.take().context("no standard input")?.write_all(step.input.as_bytes());
        let output = child.wait_with_output()?;
        if !output.status.success() {
            bail!("{name} refused ({}): {}", output.status, String::from_utf8_lossy(&output.stderr).trim());
        }
        written.with_context(|| format!("writing to {name}"))?;
    }
    Ok(begun.elapsed())
}
