//! The report as a self-contained HTML file.

use std::fmt::Write;

use super::BenchReport;
use super::plot::{PlotLine, escape, ratios};
use super::table;
use crate::bench::mode::CaptureMode;
use crate::bench::summary::{Base, Ratio, Summary};

const STYLE: &str = "
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
pre { overflow-x: auto; font-size: 12px; line-height: 1.35; }
figure { margin: 0 0 1.5rem; overflow-x: auto; }
";

/// The page.
pub fn page(report: &BenchReport) -> String {
    let mut html = String::new();
    write_page(report, &mut html).expect("a String takes any text");
    html
}

fn write_page(report: &BenchReport, html: &mut String) -> std::fmt::Result {
    write!(
        html,
        "<!doctype html>\n<html lang=\"en\"><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\
         <title>intercept beside iptables</title><style>{STYLE}{}</style>\n<h1>intercept beside iptables</h1>\n\
         <p>Ratios of pairs within a round: the dot is the median, the line the middle half. \
         Rates: right is better. CPU time and latency: left is better.</p>\n",
        super::plot::STYLE
    )?;
    let mut suites: Vec<&str> = Vec::new();
    for summary in &report.summaries {
        if !suites.contains(&summary.suite.as_str()) {
            suites.push(&summary.suite);
        }
    }
    for suite in suites {
        writeln!(html, "<h2>{}</h2>", escape(suite))?;
        let of_suite: Vec<&Summary> =
            report.summaries.iter().filter(|summary| summary.suite == suite).collect();
        let mut works = Vec::new();
        for summary in &of_suite {
            if !works.contains(&summary.work) {
                works.push(summary.work);
            }
        }
        for work in works {
            let of_work = of_suite.iter().copied().filter(|summary| summary.work == work);
            let of_work: Vec<&Summary> = of_work.collect();
            let rate = format!("{work}: {}/s over iptables-nft", work.unit());
            figure(html, &rate, &of_work, |ratio| Some(ratio.rate))?;
            figure(html, &format!("{work}: CPU over iptables-nft"), &of_work, |ratio| Some(ratio.cpu))?;
            if work.unit() == "requests" {
                figure(html, &format!("{work}: p99 latency over iptables-nft"), &of_work, |ratio| ratio.p99)?;
            }
        }
    }
    let times = report.install_times().into_iter().filter_map(|time| {
        Some(PlotLine { label: time.label(), spread: time.install_ratio?, own: time.mode.is_agent() })
    });
    let times: Vec<PlotLine> = times.collect();
    if !times.is_empty() {
        write!(html, "<h2>one more pod</h2>")?;
        writeln!(html, "<figure>{}</figure>", ratios("time to capture it, over iptables-nft", &times))?;
    }
    writeln!(html, "<h2>all figures</h2>\n<pre>{}</pre>\n</html>", escape(&table::tables(report)))
}

fn figure(
    html: &mut String,
    title: &str,
    summaries: &[&Summary],
    figure: impl Fn(&Ratio) -> Option<crate::bench::statistics::Quartiles>,
) -> std::fmt::Result {
    let lines =
        summaries.iter().filter(|summary| summary.cell.mode != CaptureMode::None).filter_map(|summary| {
            let spread = figure(summary.over(Base::IptablesNft)?)?;
            Some(PlotLine { label: table::label(summary.cell), spread, own: summary.cell.mode.is_agent() })
        });
    let lines: Vec<PlotLine> = lines.collect();
    if lines.is_empty() {
        return Ok(());
    }
    writeln!(html, "<figure>{}</figure>", ratios(title, &lines))
}
