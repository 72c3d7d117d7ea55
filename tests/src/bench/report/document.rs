//! The report as Markdown, for docs/benchmarks.md. Only ratios, because absolute figures depend on the machine.

use std::collections::BTreeSet;
use std::fmt::Write;

use super::goals::goals;
use super::{BenchReport, table};
use crate::bench::mode::CaptureMode;
use crate::bench::programs::Programs;
use crate::bench::statistics::Quartiles;
use crate::bench::summary::{Base, Ratio, Summary};

/// All sections.
pub fn document(report: &BenchReport) -> String {
    let mut text = String::new();
    write_document(report, &mut text).expect("a String takes any text");
    text
}

fn write_document(report: &BenchReport, text: &mut String) -> std::fmt::Result {
    let machine = &report.machine;
    let kind = if machine.virtual_machine { " (virtual)" } else { "" };
    let others = Quartiles::of(report.summaries.iter().map(|summary| summary.others));
    writeln!(
        text,
        "{} processors {}{kind}, {} GiB, Linux {}; seed {}. Other processes used {:.0} % of the machine meanwhile.",
        machine.processors,
        machine.processor,
        machine.memory / 1024,
        machine.kernel,
        report.seed,
        others.map_or(0.0, |others| others.median * 100.0)
    )?;
    for note in &report.notes {
        writeln!(text, "Not measured: {note}.")?;
    }
    let mut done = BTreeSet::new();
    for summary in &report.summaries {
        if done.insert(&summary.suite) {
            let of_suite: Vec<&Summary> =
                report.summaries.iter().filter(|other| other.suite == summary.suite).collect();
            suite(&of_suite, text)?;
        }
    }
    let goals = goals(report);
    if !goals.is_empty() {
        writeln!(text, "\n### Joined connections\n\nRatios to the agent without them.\n\n{goals}")?;
    }
    install(report, text)?;
    programs("The programs", &report.programs, text)?;
    programs("The programs in shadow mode", &report.programs_in_shadow, text)?;
    crowds(report, text)
}

fn suite(summaries: &[&Summary], text: &mut String) -> std::fmt::Result {
    let Some(first) = summaries.first() else { return Ok(()) };
    let rounds = summaries.iter().map(|summary| summary.rate.n).max().unwrap_or(0);
    writeln!(text, "\n### {}\n\n{rounds} rounds; in brackets the middle half.\n", capital(&first.suite))?;
    writeln!(
        text,
        "| work | mode | rate / iptables-nft | rate / explicit | CPU / iptables-nft | CPU / explicit | p50, p99 / iptables-nft |"
    )?;
    writeln!(text, "|---|---|---|---|---|---|---|")?;
    for summary in summaries.iter().filter(|summary| summary.cell.mode != CaptureMode::IptablesNft) {
        let [iptables, explicit] = [Base::IptablesNft, Base::Explicit].map(|base| summary.over(base));
        let plain = |ratio: Option<&Ratio>, figure: fn(&Ratio) -> Quartiles| {
            ratio.map_or(String::new(), |ratio| format!("{:.2}", figure(ratio).median))
        };
        let tails =
            iptables.and_then(|ratio| Some(format!("{:.2}, {:.2}", ratio.p50?.median, ratio.p99?.median)));
        writeln!(
            text,
            "| {} | {} | {} | {} | {} | {} | {} |",
            summary.work,
            table::label(summary.cell),
            iptables.map_or(String::new(), |ratio| table::with_spread(ratio.rate)),
            plain(explicit, |ratio| ratio.rate),
            plain(iptables, |ratio| ratio.cpu),
            plain(explicit, |ratio| ratio.cpu),
            tails.unwrap_or_default()
        )?;
    }
    if summaries.iter().any(|summary| summary.over(Base::NoLists).is_some()) {
        writeln!(
            text,
            "\nNew connections/s, of the same mode without lists:\n\n| lists | mode | ratio |\n|---|---|---|"
        )?;
        for summary in summaries {
            if let Some(own) = summary.over(Base::NoLists) {
                let cell = summary.cell;
                writeln!(text, "| {} | {} | {} |", cell.lists, cell.mode, table::with_spread(own.rate))?;
            }
        }
    }
    Ok(())
}

fn capital(text: &str) -> String {
    let mut letters = text.chars();
    letters.next().map_or(String::new(), |first| first.to_uppercase().chain(letters).collect())
}

fn install(report: &BenchReport, text: &mut String) -> std::fmt::Result {
    let times = report.install_times();
    if times.is_empty() {
        return Ok(());
    }
    writeln!(
        text,
        "\n### One more pod\n\n| mode and flags | capture / iptables-nft | release / iptables-nft |\n|---|---|---|"
    )?;
    for time in times.iter().filter(|time| time.mode != CaptureMode::IptablesNft) {
        let shown = |ratio: Option<Quartiles>| ratio.map_or(String::new(), table::with_spread);
        let (install, remove) = (shown(time.install_ratio), shown(time.remove_ratio));
        writeln!(text, "| {} | {install} | {remove} |", time.label())?;
    }
    Ok(())
}

fn programs(title: &str, programs: &Programs, text: &mut String) -> std::fmt::Result {
    if programs.figures.is_empty() {
        return Ok(());
    }
    writeln!(
        text,
        "\n### {title}\n\nFor one connection of a client through both pods, which is three connections.\n"
    )?;
    writeln!(text, "| program | instructions as verified | runs | ns a run | us |\n|---|---|---|---|---|")?;
    for program in &programs.figures {
        let (name, us) = (&program.name, program.microseconds());
        writeln!(
            text,
            "| {name} | {} | {:.1} | {:.0} | {us:.2} |",
            program.verified, program.runs, program.nanoseconds
        )?;
    }
    let empty = programs.empty;
    writeln!(text, "| all | | | | {:.2} |", programs.microseconds())?;
    writeln!(text, "| of which the measuring | | | {empty:.0} | {:.2} |", programs.measuring())
}

fn crowds(report: &BenchReport, text: &mut String) -> std::fmt::Result {
    let memory = report.memory_per_connection();
    if let Some(crowd) = report.memory.first() {
        writeln!(
            text,
            "\n### Kernel memory\n\nBytes for one of {} connections through the client's pod.\n",
            crowd.wanted
        )?;
        writeln!(
            text,
            "| mode | beyond explicit, all | slab of conntrack | maps, as accounted |\n|---|---|---|---|"
        )?;
        for mode in memory.iter().filter(|mode| mode.mode.captures()) {
            let beyond = mode.beyond_explicit.map_or(String::new(), table::with_spread_of_bytes);
            writeln!(
                text,
                "| {} | {beyond} | {:.0} | {:.0} |",
                mode.mode,
                mode.conntrack.max(0.0),
                mode.maps
            )?;
        }
    }
    if let Some(crowd) = report.reach.first() {
        writeln!(
            text,
            "\n### Reach\n\nConnections of one address to three destinations, {} wanted.\n",
            crowd.wanted
        )?;
        writeln!(text, "| mode | open | failed |\n|---|---|---|")?;
        for crowd in &report.reach {
            writeln!(text, "| {} | {} | {} |", crowd.mode, crowd.held.open, crowd.held.failures)?;
        }
    }
    Ok(())
}
