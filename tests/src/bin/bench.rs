//! The benchmark; `cargo xtask bench` builds and runs it. Needs root, and leaves nothing behind.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail, ensure};
use clap::{Parser, ValueEnum};
use tests::bench::mode::CaptureMode;
use tests::bench::plan::{Plan, Section};
use tests::bench::pool::{WORKER, WorkerPool};
use tests::bench::report::BenchReport;
use tests::bench::report::table::tables;
use tests::bench::session::{SessionOutcome, perform};
use tests::bench::{check, interrupt, worker};
use tests::testbed::sweep::sweep;

/// Measure the cost of capturing a pod's traffic: this agent, iptables, nftables, explicit proxying and no proxy,
/// interleaved in one run.
#[derive(Parser)]
#[command(bin_name = "cargo xtask bench")]
struct BenchArguments {
    /// Measure a selection, in at most three minutes
    #[arg(long)]
    quick: bool,
    /// Only these modes [default: all]
    #[arg(long, value_enum, value_delimiter = ',')]
    modes: Vec<CaptureMode>,
    /// Only these parts [default: all; with --quick all but reach and acceleration]
    #[arg(long, value_enum, value_delimiter = ',')]
    work: Vec<Section>,
    /// Number of rounds [default: 3 to 20, by part]
    #[arg(long)]
    rounds: Option<usize>,
    /// Seed of the order [default: the time]
    #[arg(long)]
    seed: Option<u64>,
    /// Number of connections for the measurement of memory [default: 50000; with --quick 10000]
    #[arg(long)]
    connections: Option<usize>,
    /// Folder for report.html, report.md and report.json [default: target/bench]
    #[arg(long)]
    out: Option<PathBuf>,
    /// Another build of the agent, measured as the modes `baseline` and `baseline-accelerated`
    #[arg(long, value_name = "AGENT")]
    baseline: Option<PathBuf>,
    /// Write the tables and files again from the report.json of an earlier run, without measuring
    #[arg(long, value_name = "REPORT.JSON")]
    from: Option<PathBuf>,
    /// Only compare figures that do not depend on load with the limits in tests/bench-limits.json
    #[arg(long)]
    check: bool,
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let mut words = std::env::args().skip(1);
    if words.next().as_deref() == Some(WORKER) {
        let role = words.next().context("a worker needs a role")?;
        return worker::run(&serde_json::from_str(&role).context("understanding the role of a worker")?);
    }
    let arguments = BenchArguments::parse();
    if let Some(path) = &arguments.from {
        let text = std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
        let report: BenchReport =
            serde_json::from_str(&text).with_context(|| format!("understanding {}", path.display()))?;
        return show(&report, &arguments.out.map_or_else(default_folder, Ok)?);
    }
    ensure!(rustix::process::geteuid().is_root(), "making pods: not root; run with sudo -E");
    interrupt::watch()?;
    for path in sweep()? {
        eprintln!("removed {}, which a killed run left", path.display());
    }
    let pool = WorkerPool::new(arguments.baseline.clone())?;
    if arguments.check {
        return check::run(&pool);
    }
    measure(arguments, &pool)
}

fn measure(arguments: BenchArguments, pool: &WorkerPool) -> Result<()> {
    let quick = arguments.quick;
    let all = |section: &Section| !quick || !matches!(section, Section::Reach | Section::Acceleration);
    let mut plan = Plan {
        modes: arguments.modes,
        sections: arguments.work,
        quick,
        without_envoy: false,
        rounds: arguments.rounds,
    };
    if plan.modes.is_empty() {
        plan.modes = CaptureMode::value_variants().to_vec();
        plan.modes.retain(|mode| !mode.is_baseline() || arguments.baseline.is_some());
    }
    if plan.sections.is_empty() {
        plan.sections = Section::value_variants().iter().copied().filter(all).collect();
    }
    // In the order of the tables, without duplicates.
    plan.modes.sort_unstable();
    plan.modes.dedup();
    let time =
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |time| time.as_secs());
    let seed = arguments.seed.unwrap_or(time);
    let connections = arguments.connections.unwrap_or(if quick { 10_000 } else { 50_000 });
    let folder = arguments.out.map_or_else(default_folder, Ok)?;
    let SessionOutcome { report, failures } = perform(plan, connections, seed, pool, &folder)?;
    show(&report, &folder)?;
    interrupt::check()?;
    if !failures.is_empty() {
        bail!("{} parts failed: {:#}", failures.len(), failures[0]);
    }
    Ok(())
}

/// Prints the tables and writes the files.
fn show(report: &BenchReport, folder: &Path) -> Result<()> {
    print!("{}", tables(report));
    for path in report.write(folder)? {
        println!("{}", path.display());
    }
    Ok(())
}

/// `bench` in cargo's target folder, where this program is in `release` or `debug`.
fn default_folder() -> Result<PathBuf> {
    let here = std::env::current_exe().context("finding the running executable")?;
    Ok(here.ancestors().nth(2).context("the executable is not in cargo's folder")?.join("bench"))
}
