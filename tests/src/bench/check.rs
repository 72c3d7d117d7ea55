//! The regression check: figures with little enough noise to have limits.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rand::SeedableRng as _;
use rand::rngs::StdRng;
use serde::Deserialize;

use super::install::{self, Way};
use super::memory::{Trial, crowd};
use super::mode::{CaptureMode, Cell, Lists};
use super::plan::Suite;
use super::pool::WorkerPool;
use super::progress::Progress;
use super::report::InstallTimes;
use super::statistics::Quartiles;
use super::summary::{Base, summarize};
use super::topology::Topology;
use super::work::Work;
use super::worker::Timing;
use super::{programs, rounds};

/// The limits. The file says how to change them.
const LIMITS: &str = include_str!("../../bench-limits.json");

/// The number of connections for which the memory of the maps is read.
const CONNECTIONS: usize = 2000;

/// Rounds in which shadow mode is compared with enforce mode.
const SHADOW_ROUNDS: usize = 5;
/// The number of pods that are captured in each way.
const CAPTURES: usize = 15;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct BenchLimits {
    #[expect(dead_code, reason = "it is for people")]
    about: Vec<String>,
    /// The maximum number of verified instructions by program.
    verified_instructions: BTreeMap<String, u32>,
    /// The maximum bytes of the agent's maps for each redirected connection.
    map_bytes_per_connection: f64,
    /// The maximum time of all programs for a connection in shadow mode, as a ratio to enforce mode.
    shadow_time_at_most: f64,
    /// The maximum time in which the daemon captures a pod, as a ratio to the restore of iptables-nft.
    attach_time_at_most: f64,
    /// Limits of ratios between modes, of medians in one run.
    ratios: Vec<RatioLimit>,
}

/// A limit of the agent relative to another mode.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RatioLimit {
    work: Work,
    over: Base,
    /// The minimum ratio of rates.
    rate_at_least: f64,
    /// The maximum ratio of CPU time for a unit.
    cpu_at_most: f64,
}

/// The time of all programs for a connection in shadow mode, as a ratio to enforce mode: the median of rounds that measure both.
fn shadow_ratio(pool: &WorkerPool) -> Result<f64> {
    let time = |mode| programs::run(mode, programs::TIMING, pool).map(|programs| programs.microseconds());
    let round = || Ok(time(CaptureMode::Shadowed)? / time(CaptureMode::Agent)?);
    let ratios = (0..SHADOW_ROUNDS).map(|_| round()).collect::<Result<Vec<f64>>>()?;
    Ok(Quartiles::of(ratios).context("no round was measured")?.median)
}

/// Measures the figures and prints them with their limits. Exceeding a limit is an error.
pub fn run(pool: &WorkerPool) -> Result<()> {
    let limits: BenchLimits = serde_json::from_str(LIMITS).context("reading bench-limits.json")?;
    let mut exceeded = Vec::new();
    let mut judge = |what: String, found: f64, good: bool, limit: String| {
        println!("{:4} {what:<48} {found:>10.2}   {limit}", if good { "ok" } else { "BAD" });
        if !good {
            exceeded.push(what);
        }
    };
    for (program, found) in programs::instructions(pool)? {
        let limit = limits.verified_instructions.get(&program).copied();
        let shown = limit.map_or("has no limit yet".into(), |limit| format!("at most {limit}"));
        let good = limit.is_some_and(|limit| found <= limit);
        judge(format!("instructions of {program}"), found.into(), good, shown);
    }
    let (ratio, limit) = (shadow_ratio(pool)?, limits.shadow_time_at_most);
    judge(
        "time of the programs in shadow mode".into(),
        ratio,
        ratio <= limit,
        format!("at most {limit} of enforced"),
    );
    let (ratio, limit) = (attach_time(pool)?, limits.attach_time_at_most);
    judge(
        "time to capture a pod by the daemon".into(),
        ratio,
        ratio <= limit,
        format!("at most {limit} of iptables-nft"),
    );
    let crowd = crowd(CaptureMode::Agent, Trial::Memory, CONNECTIONS, Duration::from_secs(30), pool)?;
    ensure!(
        crowd.held.open == CONNECTIONS,
        "only {} of {CONNECTIONS} connections came about",
        crowd.held.open
    );
    #[expect(clippy::cast_precision_loss, reason = "bytes of a few maps fit")]
    let bytes = crowd.maps as f64 / CONNECTIONS as f64;
    let limit = limits.map_bytes_per_connection;
    judge("bytes of maps for a connection".into(), bytes, bytes <= limit, format!("at most {limit}"));
    let suite = Suite {
        title: "check",
        topology: Topology::Veth,
        cells: [CaptureMode::Explicit, CaptureMode::IptablesNft, CaptureMode::Agent].map(Cell::plain).into(),
        works: limits.ratios.iter().map(|limit| limit.work).collect(),
        rounds: 9,
        timing: Timing { warm_up: Duration::from_millis(50), measure: Duration::from_millis(250) },
    };
    let mut progress = Progress::new(suite.seconds());
    let rows = rounds::run(&suite, pool, &mut StdRng::seed_from_u64(0), &mut progress)?;
    progress.finish();
    let summaries = summarize(&rows, 1);
    for RatioLimit { work, over, rate_at_least, cpu_at_most } in limits.ratios {
        let agent =
            summaries.iter().find(|summary| (summary.cell.mode, summary.work) == (CaptureMode::Agent, work));
        let ratio =
            agent.and_then(|agent| agent.over(over)).with_context(|| format!("{work} has no ratio"))?;
        let (rate, cpu) = (ratio.rate.median, ratio.cpu.median);
        judge(
            format!("rate of {work} over {over:?}"),
            rate,
            rate >= rate_at_least,
            format!("at least {rate_at_least}"),
        );
        judge(
            format!("CPU of {work} over {over:?}"),
            cpu,
            cpu <= cpu_at_most,
            format!("at most {cpu_at_most}"),
        );
    }
    ensure!(
        exceeded.is_empty(),
        "beyond the limits of tests/bench-limits.json: {}; that file says what to do",
        exceeded.join(", ")
    );
    Ok(())
}

/// The median time in which the daemon captures a pod, as a ratio to the restore of iptables-nft in the same round.
fn attach_time(pool: &WorkerPool) -> Result<f64> {
    let modes = [CaptureMode::IptablesNft, CaptureMode::Agent];
    let mut random = StdRng::seed_from_u64(0);
    let timed = install::run(&modes, &[Lists::Injected], CAPTURES, pool, &mut random, || {})?;
    let times = InstallTimes::of(&timed);
    let daemon = times.iter().find(|times| times.way == Way::Daemon).and_then(|times| times.install_ratio);
    Ok(daemon.context("the daemon has captured no pod")?.median)
}
