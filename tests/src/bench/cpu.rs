//! CPU time of traffic.
//!
//! This is the time of the pods' cgroups and of ksoftirqd. Without IRQ_TIME_ACCOUNTING the cgroups' time includes the soft
//! interrupts of the network, because veth and lo work in the context of the sender. With IRQ_TIME_ACCOUNTING soft
//! interrupts belong to no process, and those of the machine are added. The time of other work on the machine is not
//! counted, but reported.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

/// Reads CPU times.
#[derive(Debug)]
pub struct Meter {
    stats: Vec<PathBuf>,
    ksoftirqd: Vec<PathBuf>,
    irq_apart: bool,
}

/// CPU times since some beginning, in seconds.
#[derive(Debug, Clone, Copy)]
pub struct Sample {
    pods: f64,
    ksoftirqd: f64,
    softirq: f64,
    machine: f64,
}

/// CPU time between two samples, in seconds.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub struct Spent {
    /// In the pods' cgroups and in soft interrupts: what counts.
    pub ours: f64,
    /// On the whole machine.
    pub machine: f64,
}

/// Clock ticks per second in /proc/stat.
const TICKS: f64 = 100.0;

impl Meter {
    /// For these cgroups.
    pub fn new(pods: &[PathBuf]) -> Result<Self> {
        let mut ksoftirqd = Vec::new();
        for entry in fs::read_dir("/proc").context("listing /proc")?.flatten() {
            let name = fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
            if name.starts_with("ksoftirqd/") {
                ksoftirqd.push(entry.path().join("schedstat"));
            }
        }
        let stats = pods.iter().map(|pod| pod.join("cpu.stat")).collect();
        Ok(Self { stats, ksoftirqd, irq_apart: irq_time_is_apart() })
    }

    /// The times now.
    pub fn read(&self) -> Result<Sample> {
        let mut pods = 0.0;
        for path in &self.stats {
            let text = fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
            let usage = text.lines().find_map(|line| line.strip_prefix("usage_usec "));
            let usage = usage.with_context(|| format!("{} has no usage_usec", path.display()))?;
            pods += usage.trim().parse::<f64>()? / 1e6;
        }
        let mut ksoftirqd = 0.0;
        for path in &self.ksoftirqd {
            // Without CONFIG_SCHED_INFO there is no such file.
            let text = fs::read_to_string(path).unwrap_or_default();
            ksoftirqd += text.split(' ').next().and_then(|run| run.parse::<f64>().ok()).unwrap_or(0.0) / 1e9;
        }
        let stat = fs::read_to_string("/proc/stat").context("reading /proc/stat")?;
        let total = stat.lines().next().context("/proc/stat is empty")?;
        let ticks: Vec<f64> = total.split_whitespace().skip(1).filter_map(|word| word.parse().ok()).collect();
        // user nice system idle iowait irq softirq steal
        let [user, nice, system, _, _, irq, softirq] = ticks[..7] else {
            anyhow::bail!("/proc/stat has {} columns", ticks.len())
        };
        let softirq_seconds = if self.irq_apart { softirq / TICKS } else { 0.0 };
        let machine = (user + nice + system + irq + softirq) / TICKS;
        Ok(Sample { pods, ksoftirqd, softirq: softirq_seconds, machine })
    }
}

impl Sample {
    /// What was spent since an earlier sample.
    pub fn since(&self, earlier: &Self) -> Spent {
        let ours = |sample: &Self| sample.pods + sample.ksoftirqd + sample.softirq;
        Spent { ours: ours(self) - ours(earlier), machine: self.machine - earlier.machine }
    }
}

/// Whether the kernel was built with IRQ_TIME_ACCOUNTING, as far as its configuration can be read.
fn irq_time_is_apart() -> bool {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let config = fs::read_to_string(format!("/boot/config-{}", release.trim())).unwrap_or_default();
    config.lines().any(|line| line == "CONFIG_IRQ_TIME_ACCOUNTING=y")
}
