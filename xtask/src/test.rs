//! All checks, the quick ones first.

use std::{
    ffi::OsStr,
    io::{self, BufRead, BufReader},
    path::Path,
    time::Instant,
};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;

mod output;

use self::output::{FailedTest, TestOutput, TestTally};
use crate::{build, run, setup, setup::Group, sweep, tidy, workspace};

/// Files of tests that run three at a time: they mostly wait, have pods and agents of their own, and measure nothing.
const SIDE_BY_SIDE: [&str; 14] = [
    "cutover_interrupted",
    "cutover_removed",
    "cutover_slow",
    "daemon_cutover",
    "daemon_interrupted",
    "daemon_proofs",
    "daemon_workloads",
    "differential",
    "faults",
    "gone",
    "join_checks",
    "shadow",
    "socket_variants",
    "sockets",
];

/// If more tests of a step fail, none is run again: then it is not the machine.
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
            run::shown(clippy.args([build::SELECTION, "--all-targets", "--", "--deny", "warnings"]))
        });
    }
    if arguments.file.is_none() {
        report.step("unit tests", |report| {
            let mut tested = cargo_test(&agent, arguments, &unit_tests()?, &[])?;
            tested.add(cargo_test(&agent, arguments, &["--doc"], &[])?);
            report.flaky.extend(again(&agent, &mut tested)?);
            report.add(tested)
        });
    }
    report.step("integration tests", |report| {
        let all = || workspace::sources(Path::new("tests/tests"));
        let files = arguments.file.clone().map_or_else(all, |file| Ok(vec![file]))?;
        let (side_by_side, others): (Vec<_>, _) =
            files.into_iter().partition(|file| SIDE_BY_SIDE.contains(&file.as_str()));
        let mut tested = Tested { output: TestOutput::default(), result: Ok(()) };
        // Otherwise one at a time, because they measure, and share the machine's network stack and bpffs.
        for (files, threads) in [(side_by_side, "--test-threads=3"), (others, "--test-threads=1")] {
            if !files.is_empty() {
                let targets: Vec<_> = files.iter().flat_map(|file| ["--test", file]).collect();
                tested.add(cargo_test(&agent, arguments, &targets, &[threads])?);
            }
        }
        report.flaky.extend(again(&agent, &mut tested)?);
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
    test.args([build::SELECTION, "--test", file, "--", "--ignored", "--test-threads=1"]);
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
            for FailedTest { target, name, panic } in tests {
                println!("\n{heading}:\n    {target} {name}: {panic}");
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

impl Tested {
    /// Adds what another `cargo test` has reported.
    fn add(&mut self, other: Self) {
        let Self { output, result } = other;
        self.output.tally.passed += output.tally.passed;
        self.output.tally.failed += output.tally.failed;
        self.output.failed.extend(output.failed);
        self.output.failed_targets.extend(output.failed_targets);
        if self.result.is_ok() {
            self.result = result;
        }
    }
}

/// Selects all tests but those in `tests/tests`.
fn unit_tests() -> Result<Vec<String>> {
    let mut targets = build::programs()?;
    targets.extend(["--lib", "--bin", "xtask"].map(str::to_owned));
    for package in ["intercept-agent", "intercept-common", "xtask"] {
        let folder = Path::new(package).join("tests");
        if workspace::root().join(&folder).is_dir() {
            let files = workspace::sources(&folder)?;
            targets.extend(files.into_iter().flat_map(|file| ["--test".to_owned(), file]));
        }
    }
    Ok(targets)
}

/// Runs `cargo test` and prints its output. `targets` are of any package.
fn cargo_test(
    agent: &Path,
    arguments: &TestArgs,
    targets: &[impl AsRef<OsStr>],
    options: &[&str],
) -> Result<Tested> {
    let mut cargo = run::cargo("test");
    cargo.args([build::SELECTION, "--no-fail-fast"]).args(targets).args(&arguments.filter);
    cargo.arg("--").args(options);
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
    let result = passed.then_some(()).with_context(|| format!("cargo test: {status}"));
    Ok(Tested { output, result })
}

/// Runs a few failed tests again, each alone, and returns those that pass. These tests make thousands of real connections, on
/// machines that may stand still for seconds. A test that passes only now does not fail the run, but it is reported.
fn again(agent: &Path, tested: &mut Tested) -> Result<Vec<FailedTest>> {
    let TestOutput { tally, failed, failed_targets, .. } = &mut tested.output;
    // An executable that was killed has not said what failed.
    let is_named = |target: &String| failed.iter().any(|test| test.is_of(target));
    if failed_targets.is_empty() || failed.len() > MOST_AGAIN || !failed_targets.iter().all(is_named) {
        return Ok(Vec::new());
    }
    let mut flaky = Vec::new();
    for test in failed.clone() {
        let Some(target) = failed_targets.iter().find(|target| test.is_of(target)) else {
            continue;
        };
        eprintln!("== again: {target} {}", test.name);
        let exactly = TestArgs { filter: Some(test.name.clone()), file: None };
        // Without `-p PACKAGE`, which would build dependencies with other features.
        let targets: Vec<&str> = target.split(' ').skip(2).collect();
        let second = cargo_test(agent, &exactly, &targets, &["--exact", "--test-threads=1"])?;
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
