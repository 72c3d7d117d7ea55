//! Runs the parts of a plan, one after the other.

use std::path::Path;
use std::time::Duration;

use anyhow::Result;
use rand::SeedableRng;
use rand::rngs::StdRng;

use super::machine::Machine;
use super::memory::{Crowd, Trial, crowd};
use super::mode::{CaptureMode, ProxyKind};
use super::plan::{Plan, Section, Suite};
use super::pool::WorkerPool;
use super::programs::Programs;
use super::progress::Progress;
use super::report::BenchReport;
use super::summary::summarize;
use super::{envoy, install, interrupt, programs, rounds};

/// Connections that one pod opens to three destinations.
const REACH: usize = 80_000;

/// Time limit for them in seconds. The search for a free port takes a millisecond when most are taken.
const REACH_LIMIT: f64 = 240.0;

/// Planned seconds of parts that do not consist of rounds.
const INSTALL: f64 = 0.25;
const PROGRAMS: f64 = 3.0;

/// The results of a run, and what failed.
#[derive(Debug)]
pub struct SessionOutcome {
    /// What was measured.
    pub report: BenchReport,
    /// Parts that failed; the report has the others.
    pub failures: Vec<anyhow::Error>,
}

/// Measures everything in the plan. After a failed part the others are still measured, but not after an interruption.
/// The files in `folder` are written after each part, so that a run that ends early leaves its results so far.
pub fn perform(
    mut plan: Plan,
    connections: usize,
    seed: u64,
    pool: &WorkerPool,
    folder: &Path,
) -> Result<SessionOutcome> {
    let mut notes = Vec::new();
    adapt(&mut plan, pool, &mut notes)?;
    let report = BenchReport {
        machine: Machine::here(),
        seed,
        quick: plan.quick,
        notes,
        summaries: Vec::new(),
        installed: Vec::new(),
        programs: Programs::default(),
        programs_in_shadow: Programs::default(),
        memory: Vec::new(),
        reach: Vec::new(),
        rows: Vec::new(),
    };
    let mut run = SessionRun {
        pool,
        folder,
        random: StdRng::seed_from_u64(seed),
        progress: Progress::new(planned(&plan, connections)),
        report,
        failures: Vec::new(),
    };
    for suite in plan.suites() {
        run.attempt(|run| run.rounds(&suite));
    }
    if plan.has(Section::Install) {
        run.attempt(|run| run.install(&plan));
    }
    for mode in [CaptureMode::Agent, CaptureMode::Shadowed] {
        if plan.has(Section::Programs) && plan.modes.contains(&mode) {
            run.attempt(|run| run.programs(mode));
        }
    }
    if plan.has(Section::Memory) {
        for round in 0..memory_rounds(&plan) {
            for mode in plan.crowded() {
                run.attempt(|run| run.memory(mode, round, connections));
            }
        }
    }
    if plan.has(Section::Reach) {
        for mode in plan.crowded().into_iter().filter(|mode| *mode != CaptureMode::Explicit) {
            run.attempt(|run| run.reach(mode));
        }
    }
    run.progress.finish();
    Ok(SessionOutcome { report: run.report, failures: run.failures })
}

struct SessionRun<'a> {
    pool: &'a WorkerPool,
    folder: &'a Path,
    random: StdRng,
    progress: Progress,
    report: BenchReport,
    failures: Vec<anyhow::Error>,
}

impl SessionRun<'_> {
    /// Runs a part, unless the run was interrupted, and writes the results so far.
    fn attempt(&mut self, part: impl FnOnce(&mut Self) -> Result<()>) {
        if interrupt::asked() {
            return;
        }
        if let Err(error) = part(self).and_then(|()| self.report.write(self.folder).map(drop)) {
            eprintln!("\n{error:#}");
            self.failures.push(error);
        }
    }

    fn rounds(&mut self, suite: &Suite) -> Result<()> {
        let rows = rounds::run(suite, self.pool, &mut self.random, &mut self.progress)?;
        self.report.rows.extend(rows);
        self.report.summaries = summarize(&self.report.rows, self.report.machine.processors);
        Ok(())
    }

    fn install(&mut self, plan: &Plan) -> Result<()> {
        self.progress.at("capturing pods");
        let progress = &mut self.progress;
        let after_each = || progress.advance(INSTALL);
        self.report.installed = install::run(
            &plan.modes,
            &install::LISTS,
            plan.rounds(5, 20),
            self.pool,
            &mut self.random,
            after_each,
        )?;
        Ok(())
    }

    fn programs(&mut self, mode: CaptureMode) -> Result<()> {
        self.progress.at(&format!("timing the programs: {mode}"));
        let found = programs::run(mode, programs::TIMING, self.pool)?;
        match mode {
            CaptureMode::Shadowed => self.report.programs_in_shadow = found,
            _ => self.report.programs = found,
        }
        self.progress.advance(PROGRAMS);
        Ok(())
    }

    fn memory(&mut self, mode: CaptureMode, round: usize, connections: usize) -> Result<()> {
        self.progress.at(&format!("memory, round {}: {mode}", round + 1));
        let limit = Duration::from_secs_f64(crowd_seconds(connections) * 4.0);
        let crowd = crowd(mode, Trial::Memory, connections, limit, self.pool)?;
        self.report.memory.push(Crowd { round, ..crowd });
        self.progress.advance(crowd_seconds(connections));
        Ok(())
    }

    fn reach(&mut self, mode: CaptureMode) -> Result<()> {
        self.progress.at(&format!("reach: {mode}"));
        let limit = Duration::from_secs_f64(REACH_LIMIT);
        self.report.reach.push(crowd(mode, Trial::Reach, REACH, limit, self.pool)?);
        self.progress.advance(REACH_LIMIT);
        Ok(())
    }
}

/// Leaves out what cannot be measured here, and reports that.
fn adapt(plan: &mut Plan, pool: &WorkerPool, notes: &mut Vec<String>) -> Result<()> {
    for mode in [CaptureMode::BaselineAccelerated, CaptureMode::Accelerated] {
        if plan.modes.contains(&mode)
            && let Some(why) = pool.agent_of(mode)?.refuses_to_accelerate()?
        {
            plan.modes.retain(|other| *other != mode);
            notes.push(format!("{mode}: left out. {why}"));
        }
    }
    let wants_envoy = [Section::EnvoyTcp, Section::EnvoyHttp, Section::Acceleration]
        .into_iter()
        .any(|section| plan.has(section));
    if wants_envoy && let Err(error) = envoy::program() {
        plan.without_envoy = true;
        plan.sections.retain(|section| !matches!(section, Section::EnvoyTcp | Section::EnvoyHttp));
        notes.push(format!("{} and {}: left out. {error}", ProxyKind::EnvoyTcp, ProxyKind::EnvoyHttp));
    }
    Ok(())
}

fn memory_rounds(plan: &Plan) -> usize {
    plan.choose(1, 3)
}

/// Planned seconds for a number of connections, with the time to settle.
#[expect(clippy::cast_precision_loss, reason = "counts of connections fit")]
fn crowd_seconds(connections: usize) -> f64 {
    3.0 + connections as f64 / 3000.0
}

#[expect(clippy::cast_precision_loss, reason = "counts of rounds fit")]
fn planned(plan: &Plan, connections: usize) -> f64 {
    let mut seconds: f64 = plan.suites().iter().map(Suite::seconds).sum();
    if plan.has(Section::Install) {
        let captured = plan.modes.iter().filter(|mode| mode.captures()).count();
        let is_daemon = |mode: &&CaptureMode| matches!(mode, CaptureMode::Agent | CaptureMode::Baseline);
        let ways = captured + plan.modes.iter().filter(is_daemon).count();
        seconds += (ways * 2 * plan.rounds(5, 20)) as f64 * INSTALL;
    }
    if plan.has(Section::Programs) {
        seconds += PROGRAMS;
    }
    let crowded = plan.crowded().len();
    if plan.has(Section::Memory) {
        seconds += (crowded * memory_rounds(plan)) as f64 * crowd_seconds(connections);
    }
    if plan.has(Section::Reach) {
        seconds += crowded.saturating_sub(1) as f64 * REACH_LIMIT;
    }
    seconds
}
