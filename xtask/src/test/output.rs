//! Reads what `cargo test` prints.

use std::mem;

/// The number of passed and failed tests.
#[derive(Default, Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct TestTally {
    pub(super) passed: u32,
    pub(super) failed: u32,
}

/// A test that failed.
#[derive(Default, Clone, PartialEq, Eq, Debug)]
pub(super) struct FailedTest {
    /// What cargo calls the executable with the test, or the end or the beginning of it: `--test attach`, `-p xtask --bin`.
    pub(super) target: String,
    pub(super) name: String,
    /// Where it panicked, and the first line of the message.
    pub(super) panic: String,
}

/// The tests that `cargo test` has reported so far.
#[derive(Default)]
pub(super) struct TestOutput {
    pub(super) tally: TestTally,
    pub(super) failed: Vec<FailedTest>,
    /// The executables that cargo reports as failed at the end, such as `-p tests --test attach`. One that was killed is only
    /// here.
    pub(super) failed_targets: Vec<String>,
    target: String,
    /// The failures of this executable, of which the output is printed before the names.
    printed: Vec<FailedTest>,
    names: Vec<String>,
    part: OutputPart,
}

/// The part of the output that the next line belongs to.
#[derive(Default, Clone, Copy, PartialEq, Eq)]
enum OutputPart {
    #[default]
    Elsewhere,
    /// What a failed test has printed.
    Printed,
    /// The line after that with the place of a panic.
    Message,
    /// The names of failed tests, or what they have printed.
    Failures,
}

impl FailedTest {
    /// Whether it is of the executable that cargo calls so.
    pub(super) fn is_of(&self, target: &str) -> bool {
        target.ends_with(&self.target) || target.starts_with(&format!("{} ", self.target))
    }
}

impl TestOutput {
    /// Reads the next line of standard output or standard error.
    pub(super) fn read(&mut self, line: &str) {
        if let Some(running) = line.trim_start().strip_prefix("Running ") {
            self.target = target(running);
        } else if line == "failures:" {
            self.names.clear();
            self.part = OutputPart::Failures;
        } else if let Some(name) =
            line.strip_prefix("---- ").and_then(|rest| rest.strip_suffix(" stdout ----"))
        {
            self.printed.push(FailedTest {
                target: self.target.clone(),
                name: name.to_owned(),
                panic: String::new(),
            });
            self.part = OutputPart::Printed;
        } else if let Some(target) = line.strip_prefix("    `").and_then(|rest| rest.strip_suffix('`'))
            && target.starts_with("-p ")
        {
            self.failed_targets.push(target.to_owned());
        } else if let Some(counts) = line.strip_prefix("test result: ") {
            self.close(counts);
        } else if self.part == OutputPart::Failures {
            self.names.extend(line.strip_prefix("    ").map(str::to_owned));
        } else if let Some(last) = self.printed.last_mut() {
            if self.part == OutputPart::Message {
                last.panic = format!("{} {line}", last.panic);
                self.part = OutputPart::Elsewhere;
            } else if let Some((_, at)) = line.split_once("panicked at ")
                && self.part == OutputPart::Printed
            {
                at.clone_into(&mut last.panic);
                self.part = OutputPart::Message;
            }
        }
    }

    /// Reads "FAILED. 12 passed; 3 failed; ...", with which the tests of an executable end.
    fn close(&mut self, counts: &str) {
        let count = |word| {
            let part = counts.split(['.', ';']).find_map(|part| part.trim().strip_suffix(word))?;
            part.trim().parse::<u32>().ok()
        };
        self.tally.passed += count("passed").unwrap_or_default();
        self.tally.failed += count("failed").unwrap_or_default();
        let printed = mem::take(&mut self.printed);
        for name in mem::take(&mut self.names) {
            let silent = FailedTest { target: self.target.clone(), name: name.clone(), panic: String::new() };
            self.failed.push(printed.iter().find(|test| test.name == name).cloned().unwrap_or(silent));
        }
        self.part = OutputPart::Elsewhere;
    }
}

/// [`FailedTest::target`] of "tests/attach.rs (target/debug/deps/attach-0a)" or "unittests src/lib.rs (...)".
fn target(running: &str) -> String {
    let (path, executable) = running.split_once(" (").unwrap_or((running, ""));
    if let Some(path) = path.strip_prefix("unittests ") {
        let name = executable.rsplit('/').next().unwrap_or_default();
        let package = name.rsplit_once('-').map_or(name, |(package, _)| package).replace('_', "-");
        let kind = if path.ends_with("lib.rs") { "--lib" } else { "--bin" };
        return format!("-p {package} {kind}");
    }
    let path = path.strip_suffix("/main.rs").or(path.strip_suffix(".rs")).unwrap_or(path);
    format!("--test {}", path.rsplit('/').next().unwrap_or(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failed_tests_are_read_with_their_files_and_panics() {
        let printed = "   Compiling tests v0.1.0
     Running tests/attach.rs (target/debug/deps/attach-0a)

running 3 tests
test held ... ok
test lost ... 2026-11-28T18:00:00Z  INFO attached
FAILED
test result_of_nothing ... FAILED

failures:

---- lost stdout ----
killed in rename 1
thread 'lost' (71) panicked at tests/tests/attach.rs:10:5:
the connection is lost
    left: 1
thread 'other' (72) panicked at tests/tests/attach.rs:12:5:
another

failures:
    lost
    result_of_nothing

test result: FAILED. 12 passed; 2 failed; 1 ignored; 0 measured; 2 filtered out; finished in 0.10s

     Running unittests src/lib.rs (target/debug/deps/intercept_agent-1b)
test routes::passes ... ok
test routes::fails ... FAILED

failures:

---- routes::fails stdout ----

failures:
    routes::fails

test result: FAILED. 3 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s

error: 3 targets failed:
    `-p tests --test attach`
    `-p tests --test killed`
    `-p intercept-agent --lib`";
        let mut output = TestOutput::default();
        printed.lines().for_each(|line| output.read(line));
        assert_eq!(output.tally, TestTally { passed: 15, failed: 3 });
        let test = |target: &str, name: &str, panic: &str| FailedTest {
            target: target.into(),
            name: name.into(),
            panic: panic.into(),
        };
        let lost = test("--test attach", "lost", "tests/tests/attach.rs:10:5: the connection is lost");
        let silent = test("--test attach", "result_of_nothing", "");
        assert_eq!(output.failed, [lost, silent, test("-p intercept-agent --lib", "routes::fails", "")]);
        let targets = ["-p tests --test attach", "-p tests --test killed", "-p intercept-agent --lib"];
        assert_eq!(output.failed_targets, targets);
        assert!(output.failed[0].is_of("-p tests --test attach"));
        assert!(!output.failed[0].is_of("-p tests --test attach_again"));
        assert!(test("-p xtask --bin", "", "").is_of("-p xtask --bin xtask"));
        assert_eq!(target("tests/system/main.rs (target/debug/deps/system-0b)"), "--test system");
        assert_eq!(target("unittests src/main.rs (target/debug/deps/xtask-0c)"), "-p xtask --bin");
    }
}
