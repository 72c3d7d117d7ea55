//! The ways to capture a pod.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use anyhow::{Context, Result, bail};

use crate::actor::binary;
use crate::iptables::{self, Backend, IptablesOptions};
use crate::testbed::Pod;

/// The variable with the path of the agent.
pub const AGENT: &str = "INTERCEPT_AGENT";

/// What captures a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Capture {
    /// Real iptables.
    Iptables(Backend),
    /// This agent.
    Agent(PathBuf),
    /// Real iptables, beside this agent in shadow mode.
    Shadowed(Backend, PathBuf),
    /// This agent in shadow mode, and nothing that captures.
    ShadowAlone(PathBuf),
    /// Nothing.
    Nothing,
}

/// An active capture.
#[derive(Debug)]
pub struct ActiveCapture<'a> {
    agent: Option<(&'a Path, PathBuf)>,
}

impl Capture {
    /// The agent at the path in [`AGENT`], else where [`binary::locate`] finds it.
    pub fn agent() -> Result<Self> {
        binary::locate("intercept-agent", AGENT).map(Self::Agent)
    }

    /// Captures a pod.
    pub fn start(&self, options: &IptablesOptions, pod: &Pod) -> Result<ActiveCapture<'_>> {
        match self {
            Self::Iptables(backend) => {
                iptables::apply(options, pod, *backend)?;
                Ok(ActiveCapture { agent: None })
            }
            Self::Shadowed(backend, agent) => {
                iptables::apply(options, pod, *backend)?;
                attach(agent, options, pod, &["--shadow"])
            }
            Self::ShadowAlone(agent) => attach(agent, options, pod, &["--shadow"]),
            Self::Agent(agent) => attach(agent, options, pod, &[]),
            Self::Nothing => Ok(ActiveCapture { agent: None }),
        }
    }
}

fn attach<'a>(
    agent: &'a Path,
    options: &IptablesOptions,
    pod: &Pod,
    more: &[&str],
) -> Result<ActiveCapture<'a>> {
    let mut resolv_conf = tempfile::NamedTempFile::new()?;
    resolv_conf.write_all(options.resolv_conf().as_bytes())?;
    let mut command = Command::new(agent);
    command.arg("attach").arg("--cgroup-path").arg(pod.cgroup.path());
    command.arg("--netns").arg(pod.netns.path());
    command.args(options.arguments(resolv_conf.path())).args(more).envs(options.environment());
    run(&mut command)?;
    Ok(ActiveCapture { agent: Some((agent, pod.cgroup.path().to_owned())) })
}

impl ActiveCapture<'_> {
    /// Ends the capture. The rules of iptables go with the namespace.
    pub fn stop(mut self) -> Result<()> {
        self.detach()
    }

    fn detach(&mut self) -> Result<()> {
        let Some((agent, cgroup)) = self.agent.take() else { return Ok(()) };
        run(Command::new(agent).arg("detach").arg("--cgroup-path").arg(cgroup))
    }
}

impl Drop for ActiveCapture<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.detach() {
            eprintln!("{error:#}");
        }
    }
}

fn run(command: &mut Command) -> Result<()> {
    let Output { status, stderr, .. } = command.output().with_context(|| format!("starting {command:?}"))?;
    if !status.success() {
        bail!("{command:?}: {status}: {}", String::from_utf8_lossy(&stderr));
    }
    Ok(())
}
