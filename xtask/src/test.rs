//! All checks, the quick ones first.

use std::{
    io::{self, BufRead, BufReader},
    path::Path,
    time::Instant,
};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;

mod output;

use self::output::{FailedTest, TestOutput, TestTally};
use crate::{build, run, setup, setup::Group, sweep, tidy};

/// If more integration tests fail, none is run again: then it is not the machine.
const MOST_AGAIN: usize = 3;

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
    failures: Vec<FailedTest>,
    /// Those that passed when they were run again.
    flaky: Vec<FailedTest>,
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
        report.step("unit tests", |report| {
            let tested = cargo_test(&agent, arguments, &["--workspace", "--exclude", "tests"], &[])?;
            report.add(tested)
        });
    }
    report.step("integration tests", |report| {
        let file = arguments.file.as_ref().map(|file| ["--test", file]);
        let mut selection = vec!["--package", "tests"];
        selection.extend(file.iter().flatten());
        // One at a time, because they share the machine's network stack and bpffs.
        let mut tested = cargo_test(&agent, arguments, &selection, &["--test-threads=1"])?;
        report.flaky = again(&agent, &mut tested)?;
        report.add(tested)
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
    fn step(&mut self, name: &str, step: impl FnOnce(&mut Self) -> Result<()>) {
        eprintln!("== {name}");
        let start = Instant::now();
        let result = step(self);
        if let Err(error) = &result {
            eprintln!("error: {error:#}");
        }
        self.failed |= result.is_err();
        let word = if result.is_ok() { "ok" } else { "FAILED" };
        self.lines.push(format!("{word:6}  {name} ({} s)", start.elapsed().as_secs()));
    }

    /// Adds the tests of a `cargo test`, which must have passed.
    fn add(&mut self, tested: Tested) -> Result<()> {
        self.tests.passed += tested.output.tally.passed;
        self.tests.failed += tested.output.tally.failed;
        self.failures.extend(tested.output.failed);
        tested.result
    }

    fn close(self) -> Result<()> {
        println!("\n{}", self.lines.join("\n"));
        for (heading, tests) in [
            ("failed", &self.failures),
            (
                "failed, and passed when it was run again alone: a fault of the test or of the agent",
                &self.flaky,
            ),
        ] {
            for FailedTest { file, name, panic } in tests {
                println!("\n{heading}:\n    {file} {name}: {panic}");
            }
        }
        println!("\n{} passed, {} failed", self.tests.passed, self.tests.failed);
        if self.failed {
            bail!("testing: not everything passed");
        }
        ensure!(self.tests.passed > 0, "testing: no test ran");
        Ok(())
    }
}

/// What a `cargo test` has reported, and whether everything passed.
struct Tested {
    output: TestOutput,
    result: Result<()>,
}

/// Runs `cargo test` and prints its output.
fn cargo_test(agent: &Path, arguments: &TestArgs, selection: &[&str], options: &[&str]) -> Result<Tested> {
    let mut cargo = run::cargo("test");
    cargo.arg("--no-fail-fast").args(selection).args(&arguments.filter).arg("--").args(options);
    // One pipe for both, because cargo names the file on standard error.
    let (reader, writer) = io::pipe().context("creating a pipe")?;
    let second = writer.try_clone().context("copying a descriptor")?;
    let mut child = {
        let command = build::with_parts(&mut cargo, agent)?;
        command.stdout(writer).stderr(second).spawn().context("starting cargo test")?
    };
    // It has the ends of the pipe for writing, and the reader would wait for them.
    drop(cargo);
    let mut output = TestOutput::default();
    for line in BufReader::new(reader).lines() {
        let line = line.context("reading what cargo test prints")?;
        println!("{line}");
        output.read(&line);
    }
    let status = child.wait().context("waiting for cargo test")?;
    let passed = status.success();
    let result =
        passed.then_some(()).with_context(|| format!("cargo test {}: {status}", selection.join(" ")));
    Ok(Tested { output, result })
}

/// Runs a few failed tests again, each alone, and returns those that pass. These tests make thousands of real connections, on
/// machines that may stand still for seconds. A test that passes only now does not fail the run, but it is reported.
fn again(agent: &Path, tested: &mut Tested) -> Result<Vec<FailedTest>> {
    let TestOutput { tally, failed, failed_files, .. } = &mut tested.output;
    let is_named = |file: &String| failed.iter().any(|test| test.file == *file);
    if failed_files.is_empty() || failed.len() > MOST_AGAIN || !failed_files.iter().all(is_named) {
        return Ok(Vec::new());
    }
    let mut flaky = Vec::new();
    for test in failed.clone() {
        eprintln!("== again: {} {}", test.file, test.name);
        let exactly = TestArgs { filter: Some(test.name.clone()), file: None };
        let selection = ["--package", "tests", "--test", &test.file];
        let second = cargo_test(agent, &exactly, &selection, &["--exact", "--test-threads=1"])?;
        if second.result.is_ok() && second.output.tally == (TestTally { passed: 1, failed: 0 }) {
            failed.retain(|failed| *failed != test);
            tally.passed += 1;
            tally.failed -= 1;
            flaky.push(test);
        }
    }
    if failed.is_empty() {
        tested.result = Ok(());
    }
    Ok(flaky)
}
