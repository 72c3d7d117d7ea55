//! Runs a suite: every round has all works, and every work all cells, in random order.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use serde::{Deserialize, Serialize};

use super::mode::Cell;
use super::plan::Suite;
use super::pool::WorkerPool;
use super::progress::Progress;
use super::rig::{Rig, RigPods, Size};
use super::work::Work;
use super::worker::{Measured, Timing};
use super::{interrupt, wrk};

/// One measurement.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct RoundRow {
    /// The suite's title.
    pub suite: String,
    /// Measurements of one suite, work and round belong together.
    pub round: usize,
    /// The work.
    pub work: Work,
    /// The cell: mode, path and lists.
    pub cell: Cell,
    /// The result.
    pub measured: Measured,
}

/// A suite that takes this many times its planned duration stops early.
const OVERDUE: f64 = 2.5;

/// Runs a suite. If it takes much too long, the result is the complete rounds, at least one.
pub fn run(
    suite: &Suite,
    pool: &WorkerPool,
    random: &mut StdRng,
    progress: &mut Progress,
) -> Result<Vec<RoundRow>> {
    progress.at(&format!("{}: setting up", suite.title));
    let begun = Instant::now();
    let limit = Duration::from_secs_f64(suite.seconds() * OVERDUE + 10.0);
    let labels = suite.cells.iter().map(|cell| cell.mode.to_string());
    let pods = labels.map(|label| RigPods::connected(&label, suite.topology)).collect::<Result<Vec<_>>>()?;
    let rigs = suite.cells.iter().zip(&pods).map(|(&cell, pods)| {
        interrupt::check()?;
        Rig::build(cell, Size::ONE, pods, pool)
    });
    let mut rigs = rigs.collect::<Result<Vec<_>>>()?;
    let mut rows = Vec::new();
    let share = suite.seconds() / (suite.rounds * suite.works.len() * suite.cells.len()) as f64;
    for round in 0..suite.rounds {
        if round > 0 && begun.elapsed() > limit {
            eprintln!(
                "\n{}: this takes too long; stopped after {round} of {} rounds",
                suite.title, suite.rounds
            );
            break;
        }
        for &work in &suite.works {
            let mut order: Vec<usize> = (0..rigs.len()).collect();
            order.shuffle(random);
            for index in order {
                let rig = &mut rigs[index];
                let cell = rig.cell();
                progress.at(&format!(
                    "{}, round {} of {}: {work}, {}",
                    suite.title,
                    round + 1,
                    suite.rounds,
                    cell.mode
                ));
                let measured = measure(rig, work, suite.timing)?;
                rows.push(RoundRow { suite: suite.title.into(), round, work, cell, measured });
                progress.advance(share);
            }
        }
    }
    Ok(rows)
}

/// One measurement.
pub fn measure(rig: &mut Rig<'_>, work: Work, timing: Timing) -> Result<Measured> {
    let to = *rig.destinations().first().context("no destination")?;
    match (work.job(to, timing), work) {
        (Some(job), _) => rig.measure(&job, timing),
        (None, Work::Http { connections }) => wrk::measure(rig, to, connections, timing),
        (None, _) => unreachable!("only HTTP has another client"),
    }
}
