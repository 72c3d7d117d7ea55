//! Measures the time to capture one more pod, and to release it.

use std::collections::BTreeMap;
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

/// The flags with which pods are captured.
pub const LISTS: [Lists; 2] = [Lists::Injected, Lists::Cidrs(10_000)];

/// Captures new pods in random order, with each of these flags, while another pod stays captured, as on a node in use.
pub fn run(
    modes: &[CaptureMode],
    lists: &[Lists],
    rounds: usize,
    pool: &WorkerPool,
    random: &mut StdRng,
    mut after_each: impl FnMut(),
) -> Result<Vec<InstallTiming>> {
    let other = [CaptureMode::Shadowed, CaptureMode::BaselineAccelerated];
    let modes: Vec<_> =
        modes.iter().copied().filter(|mode| mode.captures() && !other.contains(mode)).collect();
    let neighbours = modes.iter().map(|_| Sandbox::new("neighbour")).collect::<Result<Vec<_>>>()?;
    let mut cases: Vec<(CaptureMode, Lists, Way)> = Vec::new();
    let mut captures = Vec::new();
    for (&mode, sandbox) in modes.iter().zip(&neighbours) {
        let mut capture = TimedCapture::prepare(mode, &Lists::Injected.options(), sandbox, pool)?;
        capture.install()?;
        captures.push(capture);
        cases.extend(lists.iter().map(|lists| (mode, *lists, Way::Command)));
    }
    let mut agents = BTreeMap::new();
    for &mode in &modes {
        let program = match mode {
            CaptureMode::Agent => pool.agent()?.program(),
            CaptureMode::Baseline => pool.baseline()?.program(),
            _ => continue,
        };
        agents.insert(mode, Agent::of_build(program.to_owned(), "bench")?);
    }
    let near_daemons = agents.iter().map(|_| Sandbox::new("neighbour")).collect::<Result<Vec<_>>>()?;
    let mut daemons = BTreeMap::new();
    for ((&mode, agent), sandbox) in agents.iter().zip(&near_daemons) {
        let daemon = Daemon::start(agent, &[])?;
        ask(&daemon, &add(sandbox, "neighbour", arguments(Lists::Injected))?)?;
        daemons.insert(mode, daemon);
        cases.extend(lists.iter().map(|lists| (mode, *lists, Way::Daemon)));
    }
    let mut installed = Vec::new();
    for round in 0..rounds {
        cases.shuffle(random);
        for &(mode, lists, way) in &cases {
            interrupt::check()?;
            let sandbox = Sandbox::new(&mode.to_string())?;
            let (install, remove) = match (way, daemons.get(&mode)) {
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
