//! The agent under test, with a bpffs of its own.

use std::{
    ffi::OsStr,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use anyhow::{Context as _, Result, ensure};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use serde_json::Value;
use tempfile::TempDir;

use crate::{actor::binary, testbed::Place};

/// The flags of Istio's own init command.
pub const INIT_FLAGS: [&str; 16] = [
    "-p",
    "15001",
    "-z",
    "15006",
    "-u",
    "1337",
    "-m",
    "REDIRECT",
    "-i",
    "*",
    "-x",
    "",
    "-b",
    "*",
    "-d",
    "15090,15020",
];

/// The agent's binary and a bpffs that nobody else uses. What is attached when it is dropped is detached.
#[derive(Debug)]
pub struct Agent {
    binary: PathBuf,
    bpffs: TempDir,
}

impl Agent {
    /// Finds the binary (`INTERCEPT_AGENT`, or beside the test's own) and mounts the bpffs.
    pub fn new() -> Result<Self> {
        let binary = binary::locate("intercept-agent", "INTERCEPT_AGENT")?;
        let bpffs = TempDir::with_prefix("intercept-test-bpffs")?;
        mount("bpf", bpffs.path(), "bpf", MountFlags::empty(), None).context("mounting a bpffs")?;
        Ok(Self { binary, bpffs })
    }

    /// Where its bpffs is.
    pub fn bpffs(&self) -> &Path {
        self.bpffs.path()
    }

    /// A command of the agent.
    pub fn command<A: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = A>) -> Command {
        let mut command = Command::new(&self.binary);
        command.args(args).arg("--bpffs").arg(self.bpffs.path());
        command
    }

    /// The same for one pod.
    pub fn command_for<A: AsRef<OsStr>>(
        &self,
        subcommand: &str,
        place: &Place,
        args: impl IntoIterator<Item = A>,
    ) -> Command {
        let mut command = self.command([subcommand]);
        command.arg("--cgroup-path").arg(place.cgroup.path()).args(args);
        if subcommand == "attach" || subcommand == "run" {
            command.arg("--netns").arg(place.netns.path());
        }
        command
    }

    /// Captures a pod; what the agent said.
    pub fn attach(&self, place: &Place, args: &[&str]) -> Result<String> {
        said(&mut self.command_for("attach", place, args))
    }

    /// Ends the capture of a pod.
    pub fn detach(&self, place: &Place) -> Result<String> {
        said(&mut self.command_for("detach", place, [""; 0]))
    }

    /// `status --json`: one entry a pod.
    pub fn status(&self) -> Result<Vec<Value>> {
        Ok(serde_json::from_str(&said(&mut self.command(["status", "--json"]))?)?)
    }

    /// What the agent left in its bpffs; nothing when nothing is attached.
    pub fn left(&self) -> Vec<PathBuf> {
        let store = self.bpffs().join("intercept");
        if store.exists() { vec![store] } else { Vec::new() }
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let detached = said(&mut self.command(["detach", "--all"]));
        let unmounted = unmount(self.bpffs.path(), UnmountFlags::DETACH);
        if !std::thread::panicking() {
            detached.expect("detached");
            unmounted.expect("unmounted");
        }
    }
}

/// Runs a command that must succeed; its standard output.
pub fn said(command: &mut Command) -> Result<String> {
    let Output { status, stdout, stderr } =
        command.output().with_context(|| format!("starting {command:?}"))?;
    ensure!(status.success(), "{command:?}: {status}: {}", String::from_utf8_lossy(&stderr));
    Ok(String::from_utf8(stdout)?)
}
