//! Summarises measurements: medians, and ratios of pairs within a round.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::mode::{CaptureMode, Cell, Lists};
use super::rounds::RoundRow;
use super::statistics::Quartiles;
use super::work::Work;

/// All rounds of one cell and work.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Summary {
    /// The suite's title.
    pub suite: String,
    /// The work.
    pub work: Work,
    /// The cell.
    pub cell: Cell,
    /// Units of the work per second.
    pub rate: Quartiles,
    /// Microseconds of CPU time per unit.
    pub cpu: Quartiles,
    /// Latency of a unit in microseconds: median, 99th and 99.9th percentile.
    pub latency: Option<[Quartiles; 3]>,
    /// Share of the machine's CPU time that other processes used meanwhile.
    pub others: f64,
    /// Ratios to other cells.
    pub ratios: Vec<Ratio>,
}

/// One cell compared with another.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Ratio {
    /// What it is compared with.
    pub base: Base,
    /// Ratio of rates: more is better.
    pub rate: Quartiles,
    /// Ratio of CPU time per unit: less is better.
    pub cpu: Quartiles,
    /// Ratio of median latencies: less is better.
    pub p50: Option<Quartiles>,
    /// Ratio of 99th percentiles of latency: less is better.
    pub p99: Option<Quartiles>,
}

/// What a cell is compared with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Base {
    /// The same with iptables-nft.
    IptablesNft,
    /// The same with explicit proxying.
    Explicit,
    /// The same mode without long lists.
    NoLists,
    /// The same with the other build of the agent.
    Baseline,
    /// The same without joined connections.
    Agent,
}

impl Base {
    /// All of them.
    pub const ALL: [Self; 5] =
        [Self::IptablesNft, Self::Explicit, Self::NoLists, Self::Baseline, Self::Agent];

    fn of(self, cell: Cell) -> Option<Cell> {
        let base = match self {
            Self::IptablesNft => cell.by(CaptureMode::IptablesNft),
            Self::Explicit => Cell { lists: Lists::Injected, ..cell.by(CaptureMode::Explicit) },
            Self::NoLists if cell.lists != Lists::Injected => Cell { lists: Lists::Injected, ..cell },
            Self::NoLists => return None,
            Self::Baseline if cell.mode == CaptureMode::Agent => cell.by(CaptureMode::Baseline),
            Self::Baseline if cell.mode == CaptureMode::Accelerated => {
                cell.by(CaptureMode::BaselineAccelerated)
            }
            Self::Baseline => return None,
            Self::Agent if cell.mode.is_accelerated() => cell.by(CaptureMode::Agent),
            Self::Agent => return None,
        };
        Some(base)
    }
}

#[expect(clippy::cast_precision_loss, reason = "counts of seconds fit")]
fn rate(row: &RoundRow) -> f64 {
    row.measured.operations as f64 / row.work.per_unit() / row.measured.seconds
}

#[expect(clippy::cast_precision_loss, reason = "counts of seconds fit")]
fn cpu(row: &RoundRow) -> f64 {
    row.measured.cpu.ours * 1e6 / (row.measured.operations as f64 / row.work.per_unit())
}

/// Summaries, in the order in which suites, works and cells were first measured.
pub fn summarize(rows: &[RoundRow], processors: usize) -> Vec<Summary> {
    let mut order: Vec<(&str, Work, Cell)> = Vec::new();
    let mut by_round: BTreeMap<(&str, Work, Cell, usize), &RoundRow> = BTreeMap::new();
    for row in rows {
        by_round.insert((&row.suite, row.work, row.cell, row.round), row);
        if !order.contains(&(&row.suite, row.work, row.cell)) {
            order.push((&row.suite, row.work, row.cell));
        }
    }
    // The first round was in random order.
    let position = |suite: &str| rows.iter().position(|row| row.suite == suite);
    order.sort_by_key(|(suite, work, cell)| (position(suite), *work, cell.path, cell.lists, cell.mode));
    let summarize = |(suite, work, cell): (&str, Work, Cell)| {
        let of = |cell: Cell| -> BTreeMap<usize, &RoundRow> {
            let all = by_round.iter().filter(move |((s, w, c, _), _)| (*s, *w, *c) == (suite, work, cell));
            all.map(|((_, _, _, round), row)| (*round, *row)).collect()
        };
        let own = of(cell);
        let spread = |figure: &dyn Fn(&RoundRow) -> Option<f64>| {
            Quartiles::of(own.values().filter_map(|row| figure(row)))
        };
        let latency = [0, 1, 2].map(|which| spread(&|row| latency_of(row, which)));
        let ratios = Base::ALL.into_iter().filter_map(|base| {
            let others = of(base.of(cell)?);
            let pairs = |figure: &dyn Fn(&RoundRow) -> Option<f64>| {
                Quartiles::of(
                    own.iter().filter_map(|(round, row)| Some(figure(row)? / figure(others.get(round)?)?)),
                )
            };
            Some(Ratio {
                base,
                rate: pairs(&|row| Some(rate(row)))?,
                cpu: pairs(&|row| Some(cpu(row)))?,
                p50: pairs(&|row| latency_of(row, 0)),
                p99: pairs(&|row| latency_of(row, 1)),
            })
        });
        let others = spread(&|row| {
            let whole = row.measured.seconds * processors_as_float(processors);
            Some(((row.measured.cpu.machine - row.measured.cpu.ours) / whole).clamp(0.0, 1.0))
        });
        Some(Summary {
            suite: suite.into(),
            work,
            cell,
            rate: spread(&|row| Some(rate(row)))?,
            cpu: spread(&|row| Some(cpu(row)))?,
            latency: match latency {
                [Some(p50), Some(p99), Some(p999)] => Some([p50, p99, p999]),
                _ => None,
            },
            others: others?.median,
            ratios: ratios.collect(),
        })
    };
    order.into_iter().filter_map(summarize).collect()
}

fn latency_of(row: &RoundRow, which: usize) -> Option<f64> {
    let latency = row.measured.latency?;
    Some(f64::from([latency.p50, latency.p99, latency.p999][which]) / 1000.0)
}

#[expect(clippy::cast_precision_loss, reason = "no machine has so many")]
fn processors_as_float(processors: usize) -> f64 {
    processors as f64
}

impl Summary {
    /// The ratio to one of the bases, if both were measured.
    pub fn over(&self, base: Base) -> Option<&Ratio> {
        self.ratios.iter().find(|ratio| ratio.base == base)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::cpu::Spent;
    use crate::bench::worker::Measured;

    #[test]
    fn ratios_are_of_pairs_within_a_round() {
        let row = |mode, round, operations| RoundRow {
            suite: "s".into(),
            round,
            work: Work::Connect { clients: 1 },
            cell: Cell::plain(mode),
            measured: Measured {
                seconds: 1.0,
                operations,
                failures: 0,
                latency: None,
                cpu: Spent { ours: 1.0, machine: 1.0 },
            },
        };
        // The machine was ten times slower in round 1, for both; a round without its pair does not count.
        let rows = [
            row(CaptureMode::Agent, 0, 200),
            row(CaptureMode::IptablesNft, 0, 100),
            row(CaptureMode::IptablesNft, 1, 10),
            row(CaptureMode::Agent, 1, 20),
            row(CaptureMode::Agent, 2, 9999),
        ];
        let summaries = summarize(&rows, 1);
        let agent = summaries
            .iter()
            .find(|summary| summary.cell.mode == CaptureMode::Agent)
            .expect("it was measured");
        let ratio = agent.over(Base::IptablesNft).expect("both were measured");
        assert_eq!((ratio.rate.median, ratio.rate.n), (2.0, 2));
        assert_eq!(ratio.cpu.median, 0.5);
        assert!(agent.over(Base::Explicit).is_none());
        assert!(agent.over(Base::NoLists).is_none());
    }
}
