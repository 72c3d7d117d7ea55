//! All checks, the quick ones first.

use std::{
    io::{BufRead, BufReader},
    path::Path,
    process::{Command, Stdio},
    time::Instant,
};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;

use crate::{build, run, setup, setup::Group, sweep, tidy};

#[derive(Args)]
pub(crate) struct TestArgs {
    /// Run only tests whose name contains this
    filter: Option<String>,
    /// Run only the integration tests in this file of tests/tests (without .rs)
    #[arg(long)]
    file: Option<String>,
}

/// The performed steps, and their tests.
#[derive(Default)]
struct TestReport {
    lines: Vec<String>,
    failed: bool,
    tests: TestTally,
}

/// The number of passed and failed tests.
#[derive(Default, Clone, Copy, PartialEq, Eq, Debug)]
struct TestTally {
    passed: u32,
    failed: u32,
}

/// Performs the checks. With a filter or a file, only the tests.
pub(crate) fn test(arguments: &TestArgs) -> Result<()> {
    setup::setup(&Group::FOR_TESTS)?;
    let agent = build::agent()?;
    let before = sweep::present();

    let mut report = TestReport::default();
    if arguments.filter.is_none() && arguments.file.is_none() {
        report.step("formatting", |_| run::shown(run::cargo("fmt").args(["--all", "--check"])));
        report.step("structure", |_| tidy::tidy());
        report.step("lints", |_| {
            let mut clippy = run::cargo("clippy");
            run::shown(clippy.args(["--workspace", "--all-targets", "--", "--deny", "warnings"]))
        });
    }
    if arguments.file.is_none() {
        report.step("unit tests", |tally| {
            cargo_test(&agent, arguments, &["--workspace", "--exclude", "tests"], &[], tally)
        });
    }
    report.step("integration tests", |tally| {
        let file = arguments.file.as_ref().map(|file| ["--test", file]);
        let mut selection = vec!["--package", "tests"];
        selection.extend(file.iter().flatten());
        // One at a time, because they share the machine's network stack and bpffs.
        cargo_test(&agent, arguments, &selection, &["--test-threads=1"], tally)
    });
    report.step("nothing is left behind", |_| sweep::nothing_new(&before));
    report.close()
}

/// Runs the ignored tests of a file, with variables for the paths of the parts that they need.
pub(crate) fn needing(file: &str, parts: &[(&str, &Path)]) -> Result<()> {
    let agent = build::agent()?;
    let before = sweep::present();
    let mut test = run::cargo("test");
    test.args(["--package", "tests", "--test", file, "--", "--ignored", "--test-threads=1"]);
    let tested = run::shown(build::with_parts(test.envs(parts.iter().copied()), &agent)?);
    let left = sweep::nothing_new(&before);
    tested?;
    left
}

impl TestReport {
    /// Performs a step. Later steps run even if it fails.
    fn step(&mut self, name: &str, step: impl FnOnce(&mut TestTally) -> Result<()>) {
        eprintln!("== {name}");
        let start = Instant::now();
        let result = step(&mut self.tests);
        if let Err(error) = &result {
            eprintln!("error: {error:#}");
        }
        self.failed |= result.is_err();
        let word = if result.is_ok() { "ok" } else { "FAILED" };
        self.lines.push(format!("{word:6}  {name} ({} s)", start.elapsed().as_secs()));
    }

    fn close(self) -> Result<()> {
        println!("\n{}", self.lines.join("\n"));
        println!("\n{} passed, {} failed", self.tests.passed, self.tests.failed);
        if self.failed {
            bail!("testing: not everything passed");
        }
        ensure!(self.tests.passed > 0, "testing: no test ran");
        Ok(())
    }
}

/// Runs `cargo test`, prints its output, and counts tests.
fn cargo_test(
    agent: &Path,
    arguments: &TestArgs,
    selection: &[&str],
    options: &[&str],
    tally: &mut TestTally,
) -> Result<()> {
    let mut cargo = run::cargo("test");
    cargo.arg("--no-fail-fast").args(selection).args(&arguments.filter).arg("--").args(options);
    let command: &mut Command = build::with_parts(&mut cargo, agent)?.stdout(Stdio::piped());
    let mut child = command.spawn().context("starting cargo test")?;
    for line in BufReader::new(child.stdout.take().context("cargo test has no output")?).lines() {
        let line = line.context("reading what cargo test prints")?;
        println!("{line}");
        if let Some(more) = TestTally::read(&line) {
            tally.passed += more.passed;
            tally.failed += more.failed;
        }
    }
    let status = child.wait().context("waiting for cargo test")?;
    ensure!(status.success(), "cargo test {}: {status}", selection.join(" "));
    Ok(())
}

impl TestTally {
    /// From "test result: ok. 3 passed; 0 failed; ...".
    fn read(line: &str) -> Option<Self> {
        let (_, counts) = line.strip_prefix("test result: ")?.split_once(". ")?;
        let count = |word| {
            let part = counts.split(';').find_map(|part| part.trim().strip_suffix(word))?;
            part.trim().parse().ok()
        };
        Some(Self { passed: count("passed")?, failed: count("failed")? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_read_from_the_closing_line() {
        let line = "test result: FAILED. 12 passed; 3 failed; 1 ignored; 0 measured; 2 filtered out; finished in 0.10s";
        assert_eq!(TestTally::read(line), Some(TestTally { passed: 12, failed: 3 }));
        assert_eq!(TestTally::read("test passes ... ok"), None);
    }
}
