//! How long it takes to put one more pod in force, and to take it out.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use intercept_agent::daemon::protocol::{DaemonRequest, Response};
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

/// How a pod is put in force.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Way {
    /// By programs that are started for it.
    #[default]
    Command,
    /// By asking the agent's daemon on its socket, as the CNI plugin does.
    Daemon,
}

/// One pod put in force and taken out.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct InstallTiming {
    /// Together with the others of the round.
    pub round: usize,
    /// By what.
    pub mode: CaptureMode,
    /// With which flags.
    pub lists: Lists,
    /// How it was asked for.
    #[serde(default)]
    pub way: Way,
    /// From the start of the first program to the end of the last, or from question to answer.
    pub install: Duration,
    /// The same for taking it out.
    pub remove: Duration,
}

/// Puts fresh pods in force in random order. Another pod stays in force meanwhile, as on a node that is in use.
pub fn run(
    modes: &[CaptureMode],
    rounds: usize,
    pool: &WorkerPool,
    random: &mut StdRng,
    mut after_each: impl FnMut(),
) -> Result<Vec<InstallTiming>> {
    let mut cases: Vec<(CaptureMode, Lists, Way)> = Vec::new();
    for &mode in modes.iter().filter(|mode| mode.captures()) {
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
    // There is no DNS capture, which is what the file would be for.
    lists.options().arguments(Path::new("/dev/null"))
}

/// How long the answer took.
fn ask(daemon: &Daemon<'_>, question: &DaemonRequest) -> Result<Duration> {
    let begun = Instant::now();
    match daemon.ask(question)? {
        Response::Done(_) => Ok(begun.elapsed()),
        other => bail!("the daemon answered {other:?}"),
    }
}
