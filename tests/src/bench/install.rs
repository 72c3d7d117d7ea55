//! Measures the time to capture one more pod, and to release it.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use intercept_agent::facade::daemon::{DaemonRequest, Response};
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use serde::{Deserialize, Serialize};

use super::capture::TimedCapture;
use super::interrupt;
use super::mode::{CaptureMode, Lists};
use super::pool::WorkerPool;
use crate::agent::Agent;
use crate::daemon::{Daemon, add, delete};
use crate::testbed::Sandbox;

/// How a pod is captured.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Way {
    /// By starting the programs.
    #[default]
    Command,
    /// By a request to the agent's daemon, as from the CNI plugin.
    Daemon,
}

/// The times to capture and release a pod.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct InstallTiming {
    /// The round.
    pub round: usize,
    /// The mode.
    pub mode: CaptureMode,
    /// The flags.
    pub lists: Lists,
    /// The way.
    #[serde(default)]
    pub way: Way,
    /// The time to capture: from the start of the first program to the end of the last, or from request to response.
    pub install: Duration,
    /// The time to release.
    pub remove: Duration,
}

/// Captures new pods in random order while another pod stays captured, as on a node in use.
pub fn run(
    modes: &[CaptureMode],
    rounds: usize,
    pool: &WorkerPool,
    random: &mut StdRng,
    mut after_each: impl FnMut(),
) -> Result<Vec<InstallTiming>> {
    let mut cases: Vec<(CaptureMode, Lists, Way)> = Vec::new();
    for &mode in modes.iter().filter(|mode| mode.captures() && **mode != CaptureMode::Shadowed) {
        cases.extend([Lists::Injected, Lists::Cidrs(10_000)].map(|lists| (mode, lists, Way::Command)));
    }
    let neighbours = cases.iter().map(|_| Sandbox::new("neighbour")).collect::<Result<Vec<_>>>()?;
    let mut captures = Vec::new();
    for (&(mode, ..), sandbox) in cases.iter().zip(&neighbours).step_by(2) {
        let mut capture = TimedCapture::prepare(mode, &Lists::Injected.options(), sandbox, pool)?;
        capture.install()?;
        captures.push(capture);
    }
    let agent = modes.contains(&CaptureMode::Agent).then(|| Agent::new("bench")).transpose()?;
    let daemon = agent.as_ref().map(|agent| Daemon::start(agent, &[])).transpose()?;
    let near_daemon = Sandbox::new("neighbour")?;
    if let Some(daemon) = &daemon {
        ask(daemon, &add(&near_daemon, "neighbour", arguments(Lists::Injected))?)?;
        cases.extend(
            [Lists::Injected, Lists::Cidrs(10_000)].map(|lists| (CaptureMode::Agent, lists, Way::Daemon)),
        );
    }
    let mut installed = Vec::new();
    for round in 0..rounds {
        cases.shuffle(random);
        for &(mode, lists, way) in &cases {
            interrupt::check()?;
            let sandbox = Sandbox::new(&mode.to_string())?;
            let (install, remove) = match (way, &daemon) {
                (Way::Daemon, Some(daemon)) => {
                    let uid = format!("{lists}-{round}");
                    let question = add(&sandbox, &uid, arguments(lists))?;
                    (ask(daemon, &question)?, ask(daemon, &delete(&uid))?)
                }
                _ => {
                    let mut capture = TimedCapture::prepare(mode, &lists.options(), &sandbox, pool)?;
                    (capture.install()?, capture.remove()?)
                }
            };
            installed.push(InstallTiming { round, mode, lists, way, install, remove });
            after_each();
        }
    }
    Ok(installed)
}

fn arguments(lists: Lists) -> Vec<String> {
    // The file is only used for DNS capture.
    lists.options().arguments(Path::new("/dev/null"))
}

/// Sends a request and returns the time until the response.
fn ask(daemon: &Daemon<'_>, question: &DaemonRequest) -> Result<Duration> {
    let begun = Instant::now();
    match daemon.ask(question)? {
        Response::Done(_) => Ok(begun.elapsed()),
        other => bail!("the daemon answered {other:?}"),
    }
}
