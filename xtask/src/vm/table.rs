//! The table of kernels in the documentation, which the runs write themselves.

use std::{collections::BTreeMap, fs};

use anyhow::{Context as _, Result};

use super::{
    kernel::{Kernel, Series},
    machine::VmStep,
};
use crate::{architecture::Architecture, workspace};

const PAGE: &str = "docs/compatibility.md";
const BEGIN: &str = "<!-- kernels: written by `cargo xtask vm` -->\n";
const END: &str = "<!-- end of kernels -->\n";
const HEAD: &str = "\
| Linux | architecture | release | `check` | demo | cases | `--accelerate` |
|---|---|---|---|---|---|---|
";

/// What came of one machine.
pub(super) struct KernelRow {
    series: Series,
    architecture: Architecture,
    cells: [String; 5],
}

impl KernelRow {
    pub(super) fn of(kernel: &Kernel, steps: &[VmStep]) -> Self {
        let step = |name: &str| steps.iter().find(|step| step.name == name);
        let cell = |name: &str| match step(name) {
            Some(VmStep { status: Some(0), last, .. }) => last.clone(),
            Some(_) => "FAILED".to_owned(),
            None => "-".to_owned(),
        };
        // What is missing is what is of interest. `check` itself says what is lost with it.
        let check = step("check")
            .map_or_else(|| "-".to_owned(), |step| without_parentheses(&step.last.replace("error: ", "")));
        let demo = if step("refusal").is_some() { cell("refusal") } else { cell("demo") };
        let cells = [cell("kernel"), check, demo, cell("cases"), cell("joined")];
        Self { series: kernel.series, architecture: kernel.architecture, cells }
    }

    fn line(&self) -> String {
        let cells = self.cells.each_ref().map(|cell| cell.replace('|', "\\|"));
        format!("| {} | {} | {} |\n", self.series, self.architecture.as_str(), cells.join(" | "))
    }
}

/// Writes the rows in place of those of the same kernels.
pub(super) fn update(rows: &[KernelRow]) -> Result<()> {
    let path = workspace::root().join(PAGE);
    let page = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
    let new = updated(&page, rows).with_context(|| {
        format!("{PAGE} has no lines {:?} and {:?} for the table of kernels", BEGIN.trim(), END.trim())
    })?;
    if new != page {
        fs::write(&path, new).with_context(|| format!("writing {}", path.display()))?;
    }
    Ok(())
}

fn updated(page: &str, rows: &[KernelRow]) -> Option<String> {
    let (before, rest) = page.split_once(BEGIN)?;
    let (table, after) = rest.split_once(END)?;
    let mut lines: BTreeMap<(Series, Architecture), String> =
        table.lines().filter_map(|line| Some((key(line)?, with_all_columns(line)))).collect();
    lines.extend(rows.iter().map(|row| ((row.series, row.architecture), row.line())));
    let lines: String = lines.into_values().collect();
    Some(format!("{before}{BEGIN}{HEAD}{lines}{END}{after}"))
}

/// A sentence without what it has in parentheses.
fn without_parentheses(text: &str) -> String {
    let mut depth = 0_usize;
    let mut kept = String::new();
    for character in text.chars() {
        match character {
            '(' => {
                depth += 1;
                kept.truncate(kept.trim_end().len());
            }
            ')' => depth = depth.saturating_sub(1),
            other if depth == 0 => kept.push(other),
            _ => {}
        }
    }
    kept
}

/// A row, which may have been written before the table had all its columns.
fn with_all_columns(line: &str) -> String {
    // A bar in a cell has a backslash before it.
    let bars = |line: &str| line.matches('|').count() - line.matches("\\|").count();
    let columns = HEAD.lines().next().map_or(0, bars);
    format!("{line}{}\n", " - |".repeat(columns.saturating_sub(bars(line))))
}

/// The first two cells of a row.
fn key(line: &str) -> Option<(Series, Architecture)> {
    let mut cells = line.split('|').map(str::trim).skip(1);
    let series = cells.next()?.parse().ok()?;
    Some((series, <Architecture as clap::ValueEnum>::from_str(cells.next()?, false).ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(series: &str, architecture: Architecture, demo: &str) -> KernelRow {
        let cells = ["release", "all there", demo, "7 of 7", "joined"].map(str::to_owned);
        KernelRow { series: series.parse().expect("a series"), architecture, cells }
    }

    #[test]
    fn rows_replace_those_of_the_same_kernel_and_stay_in_order() {
        let page = format!("# Title\n{BEGIN}{END}after\n");
        let first = [row("6.12", Architecture::Amd64, "old"), row("6.1", Architecture::Arm64, "arm")];
        let page = updated(&page, &first).expect("a page");
        let page = updated(
            &page,
            &[row("6.12", Architecture::Amd64, "new"), row("6.1", Architecture::Amd64, "x86")],
        )
        .expect("a page");
        let demos: Vec<_> = page.lines().filter_map(|line| line.split('|').nth(5)).map(str::trim).collect();
        assert_eq!(demos, ["demo", "---", "x86", "arm", "new"]);
        assert!(page.starts_with("# Title\n") && page.ends_with("after\n"), "{page}");
    }

    #[test]
    fn rows_that_were_written_before_a_column_was_added_get_it() {
        let old = "| 6.12 | arm64 | 6.12.1 | a \\| b | 15 of 15 flows | 6 of 6 |\n";
        let page = format!("{BEGIN}{old}{END}");
        let page = updated(&page, &[row("6.1", Architecture::Amd64, "x86")]).expect("a page");
        let line = page.lines().find(|line| line.contains("arm64")).expect("the row");
        assert_eq!(line, "| 6.12 | arm64 | 6.12.1 | a \\| b | 15 of 15 flows | 6 of 6 | - |");
        assert_eq!(updated(&page, &[]), Some(page), "a row with all columns was changed");
    }

    #[test]
    fn a_row_says_what_is_missing_and_not_what_it_is_for() {
        let text = "this kernel lacks helper a (x is lost; y (Z)), option B (w)";
        assert_eq!(without_parentheses(text), "this kernel lacks helper a, option B");
        assert_eq!(without_parentheses("captures, with every option"), "captures, with every option");
    }

    #[test]
    fn a_page_without_a_place_for_it_is_left() {
        assert!(updated("# Title\n", &[]).is_none());
    }
}
