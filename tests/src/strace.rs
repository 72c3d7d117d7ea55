//! The agent's commands under strace: the calls that they make, and calls that are made to fail.

use std::fs;

use anyhow::{Context as _, Result};
use tempfile::TempDir;

/// Where strace writes the calls of a command.
#[derive(Debug)]
pub struct StraceOutput {
    folder: TempDir,
}

impl StraceOutput {
    /// A new file of calls.
    pub fn new() -> Result<Self> {
        Ok(Self { folder: TempDir::new().context("making a folder")? })
    }

    fn file(&self) -> String {
        self.folder.path().join("trace").display().to_string()
    }

    /// A starter for [`crate::agent::Agent::start_by`], with which a command writes each `call` that it makes.
    pub fn tracing(&self, call: &str) -> Vec<String> {
        let file = self.file();
        let arguments = ["strace", "--follow-forks", "--quiet=all", "--string-limit=4096", "--output", &file];
        arguments.into_iter().map(str::to_owned).chain([format!("--trace={call}")]).collect()
    }

    /// As [`StraceOutput::tracing`], and injects something into the call with this number on every thread.
    pub fn injecting(&self, (call, what): (&str, &str), number: usize) -> Vec<String> {
        // It is quicker, but strace then delivers no signals.
        let filter = what.starts_with("error").then(|| "--seccomp-bpf".to_owned());
        let inject = format!("--inject={call}:{what}:when={number}");
        self.tracing(call).into_iter().chain(filter).chain([inject]).collect()
    }

    /// What strace wrote about the last command.
    pub fn text(&self) -> Result<String> {
        fs::read_to_string(self.file()).context("reading what strace wrote")
    }

    /// The call of the last command into which something was injected, if there was one.
    pub fn injected(&self) -> Result<Option<String>> {
        Ok(self.text()?.lines().find(|line| line.contains("(INJECTED)")).map(str::to_owned))
    }
}
