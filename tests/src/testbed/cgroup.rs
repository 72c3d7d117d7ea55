//! A cgroup that lives as long as its guard. Dropping the guard kills the processes in it.

use std::fs;
use std::io::{self, ErrorKind, Write as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::{complain, name};

/// A cgroup of the version 2 hierarchy, below `intercept-test.MAKER`.
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
    /// Whether the last cgroup in it removes the folder around it.
    with_parent: bool,
}

impl Cgroup {
    /// A new, empty cgroup.
    pub fn new(label: &str) -> Result<Self> {
        let parent = format!("{}{}", name::PREFIX, name::Maker::this());
        let path = mount_point()?.join(parent).join(name::fresh(label));
        let deadline = Instant::now() + Duration::from_secs(5);
        loop {
            // Another guard's drop may remove the parent folder between its creation and ours.
            match fs::create_dir_all(&path) {
                Err(error) if error.kind() == ErrorKind::NotFound && Instant::now() < deadline => {}
                made => {
                    made.with_context(|| format!("making the cgroup {} (needs root)", path.display()))?;
                    return Ok(Self { path, with_parent: true });
                }
            }
        }
    }

    /// A new, empty cgroup with this path, below an existing one.
    pub fn at(path: PathBuf) -> Result<Self> {
        fs::create_dir(&path)
            .with_context(|| format!("making the cgroup {} (needs root)", path.display()))?;
        Ok(Self { path, with_parent: false })
    }

    /// The folder, for `--cgroup-path`.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Moves a process into the cgroup.
    pub fn add(&self, pid: u32) -> Result<()> {
        fs::write(self.path.join("cgroup.procs"), pid.to_string())
            .with_context(|| format!("moving process {pid} to {}", self.path.display()))
    }

    /// The processes in the cgroup itself.
    pub fn processes(&self) -> Result<Vec<u32>> {
        Ok(processes(&self.path)?)
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        if let Err(error) = remove(&self.path) {
            complain(&format_args!("removing the cgroup {}: {error}", self.path.display()));
        }
        if let Some(parent) = self.path.parent().filter(|_| self.with_parent) {
            // Only the last guard succeeds; the others get "directory not empty".
            drop(fs::remove_dir(parent));
        }
    }
}

/// Where the version 2 hierarchy is mounted: /sys/fs/cgroup, or below it on a hybrid system.
pub fn mount_point() -> Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").context("reading /proc/self/mountinfo")?;
    for line in mounts.lines() {
        // "36 35 98:0 ROOT MOUNTPOINT OPTIONS [OPTIONAL..] - TYPE SOURCE OPTIONS"
        let Some((before, after)) = line.split_once(" - ") else { continue };
        if after.split(' ').next() == Some("cgroup2")
            && let Some(at) = before.split(' ').nth(4)
        {
            return Ok(PathBuf::from(at));
        }
    }
    bail!("no cgroup2 mount in /proc/self/mountinfo; mount one with: mount -t cgroup2 none /sys/fs/cgroup");
}

/// Kills the processes in `path` and below, and removes the folders.
pub(super) fn remove(path: &Path) -> io::Result<()> {
    kill(path)?;
    let deadline = Instant::now() + Duration::from_secs(5);
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove(&entry.path())?;
        }
    }
    loop {
        // Busy until the last killed process has been reaped.
        match fs::remove_dir(path) {
            Err(error) if error.kind() == ErrorKind::ResourceBusy && Instant::now() < deadline => {
                std::thread::yield_now();
            }
            done => return done,
        }
    }
}

fn kill(path: &Path) -> io::Result<()> {
    // Without O_CREAT: cgroupfs would answer EACCES where the file is missing.
    let file = fs::OpenOptions::new().write(true).open(path.join("cgroup.kill"));
    match file.and_then(|mut file| file.write_all(b"1")) {
        // Before Linux 5.14 there is no cgroup.kill.
        Err(error) if error.kind() == ErrorKind::NotFound => {
            for pid in processes(path)? {
                if let Some(pid) = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw) {
                    // The process may have exited.
                    let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
                }
            }
            Ok(())
        }
        done => done,
    }
}

fn processes(path: &Path) -> io::Result<Vec<u32>> {
    Ok(fs::read_to_string(path.join("cgroup.procs"))?.lines().filter_map(|line| line.parse().ok()).collect())
}
