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
    /// The file of tests/tests without `.rs`, or empty for a unit test.
    pub(super) file: String,
    pub(super) name: String,
    /// Where it panicked, and the first line of the message.
    pub(super) panic: String,
}

/// The tests that `cargo test` has reported so far.
#[derive(Default)]
pub(super) struct TestOutput {
    pub(super) tally: TestTally,
    pub(super) failed: Vec<FailedTest>,
    /// The files that cargo reports as failed at the end. A file whose process was killed is only here.
    pub(super) failed_files: Vec<String>,
    file: String,
    /// The failures of this file, of which the output is printed before the names.
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

impl TestOutput {
    /// Reads the next line of standard output or standard error.
    pub(super) fn read(&mut self, line: &str) {
        if let Some(running) = line.trim_start().strip_prefix("Running ") {
            let path = running.split(' ').next().unwrap_or_default();
            self.file = path
                .strip_prefix("tests/")
                .and_then(|file| file.strip_suffix(".rs"))
                .unwrap_or_default()
                .to_owned();
        } else if line == "failures:" {
            self.names.clear();
            self.part = OutputPart::Failures;
        } else if let Some(name) =
            line.strip_prefix("---- ").and_then(|rest| rest.strip_suffix(" stdout ----"))
        {
            self.printed.push(FailedTest {
                file: self.file.clone(),
                name: name.to_owned(),
                panic: String::new(),
            });
            self.part = OutputPart::Printed;
        } else if let Some(target) = line.strip_prefix("    `-p ").and_then(|rest| rest.strip_suffix('`')) {
            let file = target.split_once(" --test ").map_or(target, |(_, file)| file);
            self.failed_files.push(file.to_owned());
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

    /// Reads "FAILED. 12 passed; 3 failed; ...", with which the tests of a file end.
    fn close(&mut self, counts: &str) {
        let count = |word| {
            let part = counts.split(['.', ';']).find_map(|part| part.trim().strip_suffix(word))?;
            part.trim().parse::<u32>().ok()
        };
        self.tally.passed += count("passed").unwrap_or_default();
        self.tally.failed += count("failed").unwrap_or_default();
        let printed = mem::take(&mut self.printed);
        for name in mem::take(&mut self.names) {
            let silent = FailedTest { file: self.file.clone(), name: name.clone(), panic: String::new() };
            self.failed.push(printed.iter().find(|test| test.name == name).cloned().unwrap_or(silent));
        }
        self.part = OutputPart::Elsewhere;
    }
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

     Running unittests src/lib.rs (target/debug/deps/tests-1b)
test passes ... ok
test result: ok. 3 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s

error: 3 targets failed:
    `-p tests --test attach`
    `-p tests --test killed`
    `-p tests --lib`";
        let mut output = TestOutput::default();
        printed.lines().for_each(|line| output.read(line));
        assert_eq!(output.tally, TestTally { passed: 15, failed: 2 });
        let test = |name: &str, panic: &str| FailedTest {
            file: "attach".into(),
            name: name.into(),
            panic: panic.into(),
        };
        let lost = test("lost", "tests/tests/attach.rs:10:5: the connection is lost");
        assert_eq!(output.failed, [lost, test("result_of_nothing", "")]);
        assert_eq!(output.failed_files, ["attach", "killed", "tests --lib"]);
    }
}
