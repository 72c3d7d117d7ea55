//! The kernel's statistics of the agent's programs: verified instructions, runs, and nanoseconds per run.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::fd::AsFd as _;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use aya::programs::{ProgramInfo, loaded_programs};
use aya::sys::{Stats, enable_stats};
use aya_obj::generated::bpf_attach_type;
use intercept_agent::facade::sys;
use serde::{Deserialize, Serialize};

use super::mode::{CaptureMode, Cell};
use super::pool::WorkerPool;
use super::rig::{Rig, RigPods, Size};
use super::rounds::measure;
use super::work::Work;
use super::worker::Timing;
use crate::bpf;

/// One program, or all instances of one.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Figures {
    /// Its name in the kernel.
    pub name: String,
    /// Instructions that the verifier has walked: the size of the program's paths rather than of its code.
    pub verified: u32,
    /// Runs for one connection of a client, with both pods captured: three connections in all.
    pub runs: f64,
    /// Nanoseconds per run, including the kernel's measurement.
    pub nanoseconds: f64,
}

impl Figures {
    /// Microseconds for one connection of a client.
    pub fn microseconds(&self) -> f64 {
        self.runs * self.nanoseconds / 1000.0
    }
}

#[derive(Debug, Clone, Copy, Default)]
struct Count {
    verified: u32,
    runs: u64,
    nanoseconds: u128,
}

impl Count {
    fn add(&mut self, info: &ProgramInfo) {
        self.verified = self.verified.max(info.verified_instruction_count().unwrap_or(0));
        self.runs += info.run_count();
        self.nanoseconds += info.run_time().as_nanos();
    }

    #[expect(clippy::cast_precision_loss, reason = "counts of seconds fit")]
    fn nanoseconds_a_run(&self, earlier: Self) -> f64 {
        (self.nanoseconds - earlier.nanoseconds) as f64 / (self.runs - earlier.runs).max(1) as f64
    }
}

/// Long enough for some thousand connections.
pub const TIMING: Timing = Timing { warm_up: Duration::from_millis(200), measure: Duration::from_secs(1) };

/// The results of a run.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Programs {
    /// The agent's programs.
    pub figures: Vec<Figures>,
    /// Nanoseconds per run of a program that returns at once, attached beside them: the part of every run that is the
    /// kernel's measurement.
    pub empty: f64,
}

impl Programs {
    /// Microseconds of all for one connection of a client.
    pub fn microseconds(&self) -> f64 {
        self.figures.iter().map(Figures::microseconds).sum()
    }

    /// The part of it that an empty program would take with as many runs.
    pub fn measuring(&self) -> f64 {
        self.figures.iter().map(|figures| figures.runs * self.empty / 1000.0).sum()
    }
}

/// Measures new connections in a mode of the agent with the kernel's statistics on. They slow everything, so rates are not
/// measured.
pub fn run(mode: CaptureMode, timing: Timing, pool: &WorkerPool) -> Result<Programs> {
    let pods = RigPods::new("programs")?;
    let mut rig = Rig::build(Cell::plain(mode), Size::ONE, &pods, pool)?;
    let empty = bpf::load_empty().context("loading an empty program")?;
    let cgroup = File::open(pods.client.cgroup.path()).context("opening the client's cgroup")?;
    let link = sys::link_create(empty.as_fd(), cgroup.as_fd(), bpf_attach_type::BPF_CGROUP_SOCK_OPS)
        .context("attaching an empty program")?;
    let empty = sys::link_info(link.as_fd()).context("reading the empty program's id")?.program;
    let _on = enable_stats(Stats::RunTime).context("turning the kernel's statistics of programs on")?;
    let work = Work::Connect { clients: 8 };
    // The first run gives the scale, the second one the difference of two counts, without a warm-up, which only one of
    // the counts would include.
    measure(&mut rig, work, timing)?;
    let timing = Timing { warm_up: Duration::ZERO, ..timing };
    let (before, empty_before) = (counts(pool)?, count_of(empty)?);
    let connections = measure(&mut rig, work, timing)?.operations;
    let (after, empty_after) = (counts(pool)?, count_of(empty)?);
    #[expect(clippy::cast_precision_loss, reason = "counts of seconds fit")]
    let figures = after.iter().map(|(name, now)| {
        let earlier = before.get(name).copied().unwrap_or_default();
        Figures {
            name: name.clone(),
            verified: now.verified,
            runs: (now.runs - earlier.runs) as f64 / connections as f64,
            nanoseconds: now.nanoseconds_a_run(earlier),
        }
    });
    Ok(Programs { figures: figures.collect(), empty: empty_after.nanoseconds_a_run(empty_before) })
}

fn count_of(program: u32) -> Result<Count> {
    let info = loaded_programs().flatten().find(|info| info.id() == program).context("it is not loaded")?;
    let mut count = Count::default();
    count.add(&info);
    Ok(count)
}

/// Verified instructions of each program, the same in every run.
pub fn instructions(pool: &WorkerPool) -> Result<BTreeMap<String, u32>> {
    let pods = RigPods::new("programs")?;
    let _rig = Rig::build(Cell::plain(CaptureMode::Agent), Size::ONE, &pods, pool)?;
    Ok(counts(pool)?.into_iter().map(|(name, count)| (name, count.verified)).collect())
}

fn counts(pool: &WorkerPool) -> Result<BTreeMap<String, Count>> {
    let mut counts: BTreeMap<String, Count> = BTreeMap::new();
    for info in loaded(pool)? {
        let name = info.name_as_str().unwrap_or_default().to_owned();
        counts.entry(name).or_default().add(&info);
    }
    ensure!(!counts.is_empty(), "the agent has no program");
    Ok(counts)
}

/// The agent's programs: those that share a map with the pinned ones. The instances of pods are not pinned, and other
/// agents on this machine have maps of their own.
fn loaded(pool: &WorkerPool) -> Result<Vec<ProgramInfo>> {
    let maps = maps(pool)?;
    let mut found = Vec::new();
    // Programs of other agents may vanish meanwhile.
    for info in loaded_programs().flatten() {
        if info.map_ids().ok().flatten().is_some_and(|ids| ids.iter().any(|id| maps.contains(id))) {
            found.push(info);
        }
    }
    Ok(found)
}

/// The ids of the maps that the agent's pinned programs use.
pub(super) fn maps(pool: &WorkerPool) -> Result<BTreeSet<u32>> {
    let mut maps = BTreeSet::new();
    for pin in pool.agent()?.pinned_programs()? {
        let info = ProgramInfo::from_pin(&pin).with_context(|| format!("looking at {}", pin.display()))?;
        maps.extend(info.map_ids()?.unwrap_or_default());
    }
    Ok(maps)
}
