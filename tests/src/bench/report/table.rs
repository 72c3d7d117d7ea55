//! The report as text.

use std::fmt::Write;

use super::BenchReport;
use super::goals::goals;
use crate::bench::memory::Crowd;
use crate::bench::mode::Cell;
use crate::bench::mode::{Lists, Path};
use crate::bench::programs::Programs;
use crate::bench::statistics::Quartiles;
use crate::bench::summary::{Base, Summary};

/// All tables.
pub fn tables(report: &BenchReport) -> String {
    let mut text = String::new();
    write_all(report, &mut text).expect("a String takes any text");
    text
}

fn write_all(report: &BenchReport, text: &mut String) -> std::fmt::Result {
    let machine = &report.machine;
    let kind = if machine.virtual_machine { ", virtual" } else { "" };
    writeln!(
        text,
        "{} x {}{kind}, {} MiB, Linux {}; seed {}",
        machine.processors, machine.processor, machine.memory, machine.kernel, report.seed
    )?;
    for note in &report.notes {
        writeln!(text, "note: {note}")?;
    }
    rounds(&report.summaries, text)?;
    let goals = goals(report);
    if !goals.is_empty() {
        writeln!(text, "\njoined connections: ratios to the agent without them\n{goals}")?;
    }
    install(report, text)?;
    programs("programs", &report.programs, text)?;
    programs("programs in shadow mode", &report.programs_in_shadow, text)?;
    memory(report, text)?;
    reach(&report.reach, text)
}

fn rounds(summaries: &[Summary], text: &mut String) -> std::fmt::Result {
    let mut suite = "";
    let mut work = None;
    for summary in summaries {
        if summary.suite != suite {
            suite = &summary.suite;
            work = None;
            writeln!(text, "\n{suite}: medians (ratios: of pairs within a round, with the middle half)")?;
        }
        if work != Some(summary.work) {
            work = Some(summary.work);
            writeln!(
                text,
                "{:<30} {:>10} {:>18} {:>6} {:>9} {:>6} {:>6} {:>8} {:>8} {:>8}",
                summary.work,
                format!("{}/s", summary.work.unit()),
                "x iptables-nft",
                "x expl",
                "CPU us",
                "x ipt",
                "x expl",
                "p50 us",
                "p99",
                "p99.9"
            )?;
        }
        let [iptables, explicit] = [Base::IptablesNft, Base::Explicit].map(|base| summary.over(base));
        let own = summary.over(Base::NoLists);
        let latency =
            |which: usize| summary.latency.map_or("".into(), |all| format!("{:.0}", all[which].median));
        write!(
            text,
            "  {:<28} {:>10.0} {:>18} {:>6} {:>9.2} {:>6} {:>6} {:>8} {:>8} {:>8}",
            label(summary.cell),
            summary.rate.median,
            iptables.map_or(String::new(), |ratio| with_spread(ratio.rate)),
            explicit.map_or(String::new(), |ratio| format!("{:.2}", ratio.rate.median)),
            summary.cpu.median,
            iptables.map_or(String::new(), |ratio| format!("{:.2}", ratio.cpu.median)),
            explicit.map_or(String::new(), |ratio| format!("{:.2}", ratio.cpu.median)),
            latency(0),
            latency(1),
            latency(2)
        )?;
        if let Some(own) = own {
            write!(text, "  {} of its own without lists", with_spread(own.rate))?;
        }
        if let Some(before) = summary.over(Base::Baseline) {
            write!(text, "  x baseline: {}, CPU {}", with_spread(before.rate), with_spread(before.cpu))?;
        }
        writeln!(text)?;
    }
    if let Some(others) = Quartiles::of(summaries.iter().map(|summary| summary.others)) {
        writeln!(text, "\nOther processes used {:.0} % of the machine meanwhile.", others.median * 100.0)?;
    }
    Ok(())
}

/// The label of a cell among the others of its suite.
pub(super) fn label(cell: Cell) -> String {
    let mut label = cell.mode.to_string();
    if cell.path != Path::Both {
        write!(label, ", {}", cell.path).expect("a String takes any text");
    }
    if cell.lists != Lists::Injected {
        write!(label, ", {}", cell.lists).expect("a String takes any text");
    }
    label
}

/// "1.07 [1.01 1.13]".
pub(super) fn with_spread(spread: Quartiles) -> String {
    format!("{:.2} [{:.2} {:.2}]", spread.median, spread.low, spread.high)
}

/// "504 [480 551]".
pub(super) fn with_spread_of_bytes(spread: Quartiles) -> String {
    format!("{:.0} [{:.0} {:.0}]", spread.median, spread.low, spread.high)
}

fn install(report: &BenchReport, text: &mut String) -> std::fmt::Result {
    let times = report.install_times();
    if times.is_empty() {
        return Ok(());
    }
    writeln!(
        text,
        "\none more pod: medians, from the start of the first program to the end of the last (daemon: from question to answer)"
    )?;
    writeln!(
        text,
        "  {:<28} {:>10} {:>18} {:>10} {:>18}",
        "", "install ms", "x iptables-nft", "remove ms", "x iptables-nft"
    )?;
    for time in times {
        writeln!(
            text,
            "  {:<28} {:>10.2} {:>18} {:>10.2} {:>18}",
            time.label(),
            time.install.median,
            time.install_ratio.map_or(String::new(), with_spread),
            time.remove.median,
            time.remove_ratio.map_or(String::new(), with_spread)
        )?;
    }
    Ok(())
}

fn programs(title: &str, programs: &Programs, text: &mut String) -> std::fmt::Result {
    if programs.figures.is_empty() {
        return Ok(());
    }
    writeln!(text, "\n{title}, for one connection of a client through both pods (three connections)")?;
    writeln!(text, "  {:<16} {:>10} {:>8} {:>8} {:>8}", "", "verified", "runs", "ns/run", "us")?;
    for program in &programs.figures {
        writeln!(
            text,
            "  {:<16} {:>10} {:>8.2} {:>8.0} {:>8.2}",
            program.name,
            program.verified,
            program.runs,
            program.nanoseconds,
            program.microseconds()
        )?;
    }
    let all = programs;
    writeln!(text, "  {:<16} {:>10} {:>8} {:>8} {:>8.2}", "all", "", "", "", all.microseconds())?;
    writeln!(text, "  {:<27} {:>8} {:>8.0} {:>8.2}", "of which the measuring", "", all.empty, all.measuring())
}

fn memory(report: &BenchReport, text: &mut String) -> std::fmt::Result {
    let per_connection = report.memory_per_connection();
    let Some(first) = report.memory.first() else { return Ok(()) };
    writeln!(text, "\nkernel memory of one of {} connections through the client's pod, bytes", first.wanted)?;
    writeln!(
        text,
        "  {:<28} {:>10} {:>16} {:>16} {:>10}",
        "", "all", "beyond explicit", "conntrack slab", "maps"
    )?;
    for mode in per_connection {
        writeln!(
            text,
            "  {:<28} {:>10.0} {:>16} {:>16.0} {:>10.0}",
            mode.mode,
            mode.kernel,
            mode.beyond_explicit.map_or(String::new(), with_spread_of_bytes),
            mode.conntrack,
            mode.maps
        )?;
    }
    Ok(())
}

fn reach(crowds: &[Crowd], text: &mut String) -> std::fmt::Result {
    let Some(first) = crowds.first() else { return Ok(()) };
    writeln!(text, "\nconnections of one pod to three destinations, of {} wanted", first.wanted)?;
    for crowd in crowds {
        let why = crowd.held.errno.map_or(String::new(), |errno| {
            format!(", the last for: {}", std::io::Error::from_raw_os_error(errno))
        });
        writeln!(
            text,
            "  {:<28} {:>10} open after {:.0} s; {} failed{why}",
            crowd.mode, crowd.held.open, crowd.held.seconds, crowd.held.failures
        )?;
    }
    Ok(())
}
