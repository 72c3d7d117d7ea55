//! The gain of joined connections beside its goals, as Markdown, printed and for docs/acceleration.md.

use std::fmt::Write;

use super::{BenchReport, table};
use crate::bench::goals::Goal;
use crate::bench::mode::CaptureMode;
use crate::bench::statistics::Quartiles;
use crate::bench::summary::{Base, Ratio};

/// The table; empty if none of its works was measured.
pub fn goals(report: &BenchReport) -> String {
    let mut text = String::new();
    for summary in report.summaries.iter().filter(|summary| summary.cell.mode == CaptureMode::Accelerated) {
        let goal = Goal::of(&summary.suite, summary.work);
        if let (Some(goal), Some(ratio)) = (goal, summary.over(Base::Agent)) {
            write_row(goal, ratio, &mut text).expect("a String takes any text");
        }
    }
    if text.is_empty() {
        return text;
    }
    format!(
        "| | work | rate | p50 | CPU for a unit | goals |\n\
         |---|---|---|---|---|---|\n{text}"
    )
}

fn write_row(goal: &Goal, ratio: &Ratio, text: &mut String) -> std::fmt::Result {
    let shown = |figure: Option<Quartiles>| figure.map_or(String::new(), table::with_spread);
    write!(
        text,
        "| {} | {} | {} | {} | {} | ",
        goal.suite.title,
        goal.work,
        shown(Some(ratio.rate)),
        shown(ratio.p50),
        shown(Some(ratio.cpu))
    )?;
    let verdict = |reached| if reached { "reached" } else { "**missed**" };
    let rate = goal.rate.map(|goal| {
        let reached = ratio.rate.median >= goal;
        format!("rate at least {goal:.2}: {}", verdict(reached))
    });
    let at_most = |what: &str, goal: Option<f64>, found: Option<Quartiles>| {
        let (goal, found) = (goal?, found?);
        Some(format!("{what} at most {goal:.2}: {}", verdict(found.median <= goal)))
    };
    let judged = [rate, at_most("p50", goal.p50, ratio.p50), at_most("CPU", goal.cpu, Some(ratio.cpu))];
    let judged: Vec<String> = judged.into_iter().flatten().collect();
    writeln!(text, "{} |", judged.join("; "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::goals;

    fn even(median: f64) -> Quartiles {
        Quartiles { median, low: median, high: median, n: 1 }
    }

    #[test]
    fn each_figure_is_judged_by_its_own_direction() {
        let goal = &goals::ALL[4];
        assert_eq!((goal.rate, goal.cpu), (Some(1.15), Some(0.88)));
        let row = |rate, cpu| {
            let ratio = Ratio { base: Base::Agent, rate: even(rate), cpu: even(cpu), p50: None, p99: None };
            let mut text = String::new();
            write_row(goal, &ratio, &mut text).expect("a String takes any text");
            text
        };
        assert!(!row(1.2, 0.8).contains("missed"));
        assert!(row(1.1, 0.8).contains("rate at least 1.15: **missed**"));
        assert!(row(1.2, 0.9).contains("CPU at most 0.88: **missed**"));
    }

    #[test]
    fn titles_and_works_are_unique() {
        for goal in &goals::ALL {
            let found = Goal::of(goal.suite.title, goal.work).expect("it is one of them");
            assert_eq!((found.rate, found.p50, found.cpu), (goal.rate, goal.p50, goal.cpu));
        }
    }
}
