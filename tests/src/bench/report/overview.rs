//! The overview as SVG files for docs/benchmarks.md: the agent and explicit proxying, each compared with iptables-nft,
//! with one line per kind of work.

use super::BenchReport;
use super::plot::{PlotLine, file};
use crate::bench::mode::{CaptureMode, Cell, Lists, Path};
use crate::bench::statistics::Quartiles;
use crate::bench::summary::{Base, Ratio, Summary};

/// Selects one of the two figures of a ratio.
type FigureOf = fn(&Ratio) -> Quartiles;

/// Names and contents of the files. None if the report lacks a mode that is compared.
pub fn plots(report: &BenchReport) -> Vec<(&'static str, String)> {
    let figures: [(&str, &str, FigureOf); 2] = [
        ("rate.svg", "rate over iptables-nft: right is better", |ratio| ratio.rate),
        ("cpu.svg", "CPU time over iptables-nft: left is better", |ratio| ratio.cpu),
    ];
    let plots = figures.into_iter().map(|(name, title, figure)| (name, title, lines(report, figure)));
    plots
        .filter(|(_, _, lines)| !lines.is_empty())
        .map(|(name, title, lines)| (name, file(title, &lines)))
        .collect()
}

fn lines(report: &BenchReport, figure: FigureOf) -> Vec<PlotLine> {
    let line = |summary: &Summary| {
        let Cell { mode, path: Path::Both, lists: Lists::Injected, proxy } = summary.cell else {
            return None;
        };
        let own = match mode {
            CaptureMode::Agent => true,
            CaptureMode::Explicit => false,
            _ => return None,
        };
        let spread = figure(summary.over(Base::IptablesNft)?);
        Some(PlotLine { label: format!("{proxy} {}, {mode}", summary.work), spread, own })
    };
    report.summaries.iter().filter_map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::mode::ProxyKind;
    use crate::bench::work::Work;

    #[test]
    fn one_line_for_each_work_of_the_agent_and_of_explicit_proxying() {
        let even = Quartiles { median: 1.0, low: 1.0, high: 1.0, n: 1 };
        let summary = |mode, lists| Summary {
            suite: "s".into(),
            work: Work::Connect { clients: 8 },
            cell: Cell { mode, path: Path::Both, lists, proxy: ProxyKind::EnvoyTcp },
            rate: even,
            cpu: even,
            latency: None,
            others: 0.0,
            ratios: vec![Ratio { base: Base::IptablesNft, rate: even, cpu: even, p50: None, p99: None }],
        };
        let mut report: BenchReport =
            serde_json::from_value(serde_json::json!({
                "machine": { "processors": 1, "processor": "x", "memory": 1, "kernel": "1", "virtual_machine": true, "at": 0, "load": "" },
                "seed": 1, "quick": true, "notes": [], "summaries": [], "installed": [], "memory": [], "reach": [],
                "rows": [],
            }))
            .expect("a report");
        assert!(plots(&report).is_empty());
        report.summaries = vec![
            summary(CaptureMode::Agent, Lists::Injected),
            summary(CaptureMode::Explicit, Lists::Injected),
            summary(CaptureMode::Nft, Lists::Injected),
            summary(CaptureMode::Agent, Lists::Cidrs(10)),
        ];
        let files = plots(&report);
        assert_eq!(files.len(), 2);
        for (name, svg) in files {
            assert_eq!(svg.matches("<circle").count(), 2, "{name}: {svg}");
            assert!(svg.starts_with("<svg xmlns=") && svg.contains("envoy-tcp connect-8, agent"), "{svg}");
        }
    }
}
