//! The results of a run, and their forms: a table, JSON, a page, and a chapter for the documentation.

pub mod document;
pub mod goals;
pub mod overview;
pub mod page;
pub mod plot;
pub mod table;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::install::{InstallTiming, Way};
use super::machine::Machine;
use super::memory::Crowd;
use super::mode::{CaptureMode, Lists};
use super::programs::Programs;
use super::rounds::RoundRow;
use super::statistics::Quartiles;
use super::summary::Summary;

/// A run.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct BenchReport {
    /// The machine.
    pub machine: Machine,
    /// Seed of the random order.
    pub seed: u64,
    /// Whether only a selection was measured.
    pub quick: bool,
    /// What was left out, and why.
    pub notes: Vec<String>,
    /// Summaries of the rounds.
    pub summaries: Vec<Summary>,
    /// The times to capture and release pods.
    pub installed: Vec<InstallTiming>,
    /// The agent's programs.
    #[serde(default)]
    pub programs: Programs,
    /// The same in shadow mode beside iptables.
    #[serde(default)]
    pub programs_in_shadow: Programs,
    /// Memory of connections.
    pub memory: Vec<Crowd>,
    /// The largest number of connections of one pod.
    pub reach: Vec<Crowd>,
    /// Every measurement.
    pub rows: Vec<RoundRow>,
}

/// Times of one mode with the same flags.
#[derive(Debug, Clone, Copy)]
pub struct InstallTimes {
    /// The mode.
    pub mode: CaptureMode,
    /// The kind of request.
    pub way: Way,
    /// The flags.
    pub lists: Lists,
    /// Milliseconds to capture a pod.
    pub install: Quartiles,
    /// Milliseconds to release it.
    pub remove: Quartiles,
    /// Ratio of the time to capture to that of iptables-nft, with the same flags in the same round.
    pub install_ratio: Option<Quartiles>,
    /// The same for the time to release.
    pub remove_ratio: Option<Quartiles>,
}

impl InstallTimes {
    /// Summarises measurements, by flags and mode.
    pub fn of(installed: &[InstallTiming]) -> Vec<Self> {
        let mut keys: Vec<(Lists, CaptureMode, Way)> =
            installed.iter().map(|one| (one.lists, one.mode, one.way)).collect();
        keys.sort_unstable();
        keys.dedup();
        let times = |(lists, mode, way): (Lists, CaptureMode, Way)| {
            let of = |mode: CaptureMode, way: Way| {
                installed.iter().filter(move |one| (one.lists, one.mode, one.way) == (lists, mode, way))
            };
            let milliseconds = |time: std::time::Duration| time.as_secs_f64() * 1000.0;
            let ratio = |figure: fn(&InstallTiming) -> std::time::Duration| {
                Quartiles::of(of(mode, way).filter_map(|one| {
                    let base =
                        of(CaptureMode::IptablesNft, Way::Command).find(|base| base.round == one.round)?;
                    Some(figure(one).as_secs_f64() / figure(base).as_secs_f64())
                }))
            };
            Some(Self {
                mode,
                way,
                lists,
                install: Quartiles::of(of(mode, way).map(|one| milliseconds(one.install)))?,
                remove: Quartiles::of(of(mode, way).map(|one| milliseconds(one.remove)))?,
                install_ratio: ratio(|one| one.install),
                remove_ratio: ratio(|one| one.remove),
            })
        };
        keys.into_iter().filter_map(times).collect()
    }

    /// Its label among the others.
    fn label(&self) -> String {
        match self.way {
            Way::Command => format!("{}, {}", self.mode, self.lists),
            Way::Daemon => format!("{} by its daemon, {}", self.mode, self.lists),
        }
    }
}

/// Kernel memory of one connection of a client, in one mode.
#[derive(Debug, Clone, Copy)]
pub struct MemoryPerConnection {
    /// The mode.
    pub mode: CaptureMode,
    /// Bytes, sockets included.
    pub kernel: f64,
    /// Bytes beyond those of explicit proxying in the same round, which has the same sockets.
    pub beyond_explicit: Option<Quartiles>,
    /// Bytes in connection tracking's slab.
    pub conntrack: f64,
    /// Bytes that the kernel accounts to the agent's maps.
    pub maps: f64,
}

impl BenchReport {
    /// Writes the files; returns where they are.
    pub fn write(&self, folder: &Path) -> Result<Vec<PathBuf>> {
        fs::create_dir_all(folder).with_context(|| format!("making {}", folder.display()))?;
        let mut files = vec![
            ("report.html", page::page(self)),
            ("report.md", document::document(self)),
            ("report.json", serde_json::to_string_pretty(self)?),
        ];
        files.extend(overview::plots(self));
        let write = |(name, text)| {
            let path = folder.join(name);
            fs::write(&path, text).with_context(|| format!("writing {}", path.display()))?;
            Ok(path)
        };
        files.into_iter().map(write).collect()
    }

    /// The times to capture a pod, by flags and mode.
    pub fn install_times(&self) -> Vec<InstallTimes> {
        InstallTimes::of(&self.installed)
    }

    /// Kernel memory by mode: medians.
    pub fn memory_per_connection(&self) -> Vec<MemoryPerConnection> {
        let bytes = |crowd: &Crowd| each_of(crowd, |crowd| crowd.kernel);
        let median = |mode: CaptureMode, figure| {
            let all = self.memory.iter().filter(|crowd| crowd.mode == mode);
            Quartiles::of(all.filter_map(|crowd| each_of(crowd, figure))).map(|spread| spread.median)
        };
        let mut modes: Vec<CaptureMode> = self.memory.iter().map(|crowd| crowd.mode).collect();
        modes.sort_unstable();
        modes.dedup();
        let of = |mode: CaptureMode| {
            let own = self.memory.iter().filter(|crowd| crowd.mode == mode && mode.captures());
            let pairs = own.filter_map(|own| {
                let same = |crowd: &&Crowd| (crowd.mode, crowd.round) == (CaptureMode::Explicit, own.round);
                Some(bytes(own)? - bytes(self.memory.iter().find(same)?)?)
            });
            Some(MemoryPerConnection {
                mode,
                kernel: median(mode, |crowd| crowd.kernel)?,
                beyond_explicit: Quartiles::of(pairs),
                conntrack: median(mode, |crowd| crowd.conntrack)?,
                maps: median(mode, |crowd| crowd.maps)?,
            })
        };
        modes.into_iter().filter_map(of).collect()
    }
}

/// A figure of a crowd, per connection.
#[expect(clippy::cast_precision_loss, reason = "bytes of a machine's memory fit")]
fn each_of(crowd: &Crowd, figure: fn(&Crowd) -> i64) -> Option<f64> {
    (crowd.held.open > 0).then(|| figure(crowd) as f64 / crowd.held.open as f64)
}
