//! The measured agent, on a bpffs that neither an installed agent nor another run uses.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use crate::status::{StatusEntry, count_of};
use crate::testbed::{Sandbox, name};

/// The variable with the path of the agent.
pub const VARIABLE: &str = "INTERCEPT_AGENT";

/// Where the mount is. Not below a bpffs: names there may not contain dots.
const FOLDER: &str = "/run";

/// The agent and its bpffs. Dropping it unmounts that, and with it goes every link that is still pinned there.
#[derive(Debug)]
pub struct BenchAgent {
    program: PathBuf,
    bpffs: PathBuf,
}

impl BenchAgent {
    /// The agent of this build, with an empty bpffs.
    pub fn new() -> Result<Self> {
        Self::of(locate()?)
    }

    /// An agent, with an empty bpffs.
    pub fn of(program: PathBuf) -> Result<Self> {
        sweep()?;
        let bpffs = Path::new(FOLDER).join(name::fresh("bpf"));
        fs::create_dir(&bpffs).with_context(|| format!("making {}", bpffs.display()))?;
        let agent = Self { program, bpffs };
        mount("bpf", &agent.bpffs, "bpf", MountFlags::empty(), Some(c"mode=0700"))
            .with_context(|| format!("mounting a bpffs at {}", agent.bpffs.display()))?;
        Ok(agent)
    }

    /// A subcommand, on the benchmark's bpffs.
    pub fn arguments(&self, subcommand: &str) -> Vec<String> {
        vec![subcommand.into(), "--bpffs".into(), self.bpffs.display().to_string()]
    }

    /// The binary.
    pub fn program(&self) -> &Path {
        &self.program
    }

    /// The pins of the programs that all pods share: those in folders called `programs-...`.
    pub fn pinned_programs(&self) -> Result<Vec<PathBuf>> {
        let mut found = Vec::new();
        let mut folders = vec![self.bpffs.clone()];
        while let Some(folder) = folders.pop() {
            let name = folder.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            let programs = name.starts_with("programs");
            for entry in fs::read_dir(&folder).with_context(|| format!("listing {}", folder.display()))? {
                let entry = entry?;
                if entry.file_type()?.is_dir() {
                    folders.push(entry.path());
                } else if programs {
                    found.push(entry.path());
                }
            }
        }
        Ok(found)
    }

    /// Why the agent cannot join connections. `None` if it can. Tested with a pod.
    pub fn refuses_to_accelerate(&self) -> Result<Option<String>> {
        let pod = Sandbox::new("accelerate")?;
        let run = |subcommand: &str, options: &[&OsStr]| {
            Command::new(&self.program)
                .args(self.arguments(subcommand))
                .arg("--cgroup-path")
                .arg(pod.cgroup.path())
                .args(options)
                .output()
                .with_context(|| format!("starting {}", self.program.display()))
        };
        let attach =
            run("attach", &["--netns".as_ref(), pod.netns.path().as_os_str(), "--accelerate".as_ref()])?;
        if !attach.status.success() {
            let said = String::from_utf8_lossy(&attach.stderr);
            let why = said.lines().find(|line| line.starts_with("error")).unwrap_or("it does not say why");
            return Ok(Some(why.to_owned()));
        }
        let detach = run("detach", &[])?;
        ensure!(detach.status.success(), "detaching: {}", String::from_utf8_lossy(&detach.stderr));
        Ok(None)
    }
}

impl BenchAgent {
    /// Counted ends of joined connections in a captured pod.
    pub fn joined(&self, pod: &Sandbox) -> Result<u64> {
        let output = Command::new(&self.program)
            .args(self.arguments("status"))
            .args(["--json".as_ref(), "--cgroup-path".as_ref(), pod.cgroup.path().as_os_str()])
            .output()
            .with_context(|| format!("starting {}", self.program.display()))?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "status: {said}");
        let pods: Vec<StatusEntry> = serde_json::from_slice(&output.stdout).context("reading status")?;
        let acceleration = pods.into_iter().next().and_then(|pod| pod.acceleration);
        let acceleration = acceleration.context("status has no joined connections")?;
        Ok(count_of(&acceleration.connections, "joined"))
    }
}

impl Drop for BenchAgent {
    fn drop(&mut self) {
        if let Err(error) = remove(&self.bpffs) {
            eprintln!("removing the bpffs {}: {error}", self.bpffs.display());
        }
    }
}

/// The path of the agent: that in [`VARIABLE`], or next to the running executable.
fn locate() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os(VARIABLE) {
        return Ok(path.into());
    }
    let here = std::env::current_exe().context("finding the running executable")?;
    let folders = here.ancestors().skip(1).take(2);
    let found = folders.map(|folder| folder.join("intercept-agent")).find(|path| path.is_file());
    found.with_context(|| {
        let here = here.display();
        format!("no agent beside {here}: build it with cargo build -p intercept-agent, or set {VARIABLE}")
    })
}

/// Removes the bpffs of runs that were killed.
fn sweep() -> Result<()> {
    for entry in fs::read_dir(FOLDER).with_context(|| format!("listing {FOLDER}"))?.flatten() {
        let Some(maker) = entry.file_name().to_str().and_then(name::maker) else { continue };
        if !maker.is_alive() {
            let path = entry.path();
            remove(&path).with_context(|| format!("removing the bpffs {}", path.display()))?;
        }
    }
    Ok(())
}

fn remove(path: &Path) -> std::io::Result<()> {
    match unmount(path, UnmountFlags::DETACH) {
        // The process that made the folder ended before the mount.
        Ok(()) | Err(rustix::io::Errno::INVAL) => fs::remove_dir(path),
        Err(error) => Err(error.into()),
    }
}
