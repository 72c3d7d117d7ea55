//! Finds and removes what killed or failed runs left on the machine.

use std::{
    env, fmt, fs, io,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use rustix::mount::{UnmountFlags, unmount};
use rustix::process::{Pid, Signal, kill_process, test_kill_process};

use crate::workspace;

/// The prefix of all names that tests and the demo make. The maker follows: its pid, or `PID-NAMESPACE` if it is not of the
/// first PID namespace.
const PREFIX: &str = "intercept-test.";

const NAMESPACES: &str = "/run/netns";
/// The folder with the bpffs mounts of tests.
const MOUNTS: &str = "/run";
/// The pins of an installed agent.
const AGENT_PINS: &str = "/sys/fs/bpf/intercept";

/// A leftover.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Leftover {
    Process(Pid, PathBuf),
    Namespace(PathBuf),
    Cgroup(PathBuf),
    Pins(PathBuf),
    Folder(PathBuf),
}

/// Removes everything that [`leftovers`] finds, as far as possible.
pub(crate) fn sweep() -> Result<()> {
    let mut failed = 0;
    for left in leftovers() {
        match left.remove() {
            Ok(()) => println!("removed {left}"),
            Err(error) => {
                failed += 1;
                eprintln!("removing {left}: {error}");
            }
        }
    }
    ensure!(failed == 0, "sweeping: {failed} could not be removed");
    Ok(())
}

/// The objects of dead processes. Excludes objects of running tests and demos, and of an agent that is installed on this
/// machine.
pub(crate) fn leftovers() -> Vec<Leftover> {
    let mut found: Vec<_> = orphans();
    found.extend(abandoned(Path::new(NAMESPACES)).map(Leftover::Namespace));
    found.extend(cgroup2().iter().flat_map(|mount| abandoned(mount)).map(Leftover::Cgroup));
    found.extend(abandoned(Path::new(MOUNTS)).map(Leftover::Pins));
    found.extend(abandoned(&env::temp_dir()).map(Leftover::Folder));
    found
}

/// The objects of all processes, including an installed agent, to compare before and after.
pub(crate) fn present() -> Vec<Leftover> {
    let mut found = leftovers();
    found.push(Leftover::Pins(AGENT_PINS.into()));
    found.retain(|left| !matches!(left, Leftover::Pins(path) if !path.exists()));
    found
}

/// Checks that no object is new.
pub(crate) fn nothing_new(before: &[Leftover]) -> Result<()> {
    let mut left = present();
    left.retain(|item| !before.contains(item));
    let list: Vec<_> = left.iter().map(ToString::to_string).collect();
    ensure!(left.is_empty(), "left behind: {}; `cargo xtask clean` removes it", list.join(", "));
    Ok(())
}

impl Leftover {
    fn remove(&self) -> io::Result<()> {
        match self {
            Self::Process(pid, _) => Ok(kill_process(*pid, Signal::KILL)?),
            Self::Namespace(path) => {
                unmounted(path)?;
                fs::remove_file(path)
            }
            Self::Cgroup(path) => remove_cgroup(path),
            Self::Pins(path) => {
                unmounted(path)?;
                fs::remove_dir_all(path)
            }
            Self::Folder(path) => fs::remove_dir_all(path),
        }
    }
}

impl fmt::Display for Leftover {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Process(pid, program) => write!(f, "process {pid} ({})", program.display()),
            Self::Namespace(path) => write!(f, "network namespace {}", path.display()),
            Self::Cgroup(path) => write!(f, "cgroup {}", path.display()),
            Self::Pins(path) => write!(f, "pins {}", path.display()),
            Self::Folder(path) => write!(f, "folder {}", path.display()),
        }
    }
}

/// The entries of a folder that a dead process made.
fn abandoned(folder: &Path) -> impl Iterator<Item = PathBuf> + use<> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).filter(|path| {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        maker(name).is_some_and(LeftoverMaker::has_ended)
    })
}

/// The process that made an object, by its pid and the inode of its PID namespace.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct LeftoverMaker {
    pid: Pid,
    namespace: u64,
}

impl LeftoverMaker {
    /// The inode of the first PID namespace, which the kernel never changes (`PROC_PID_INIT_INO`).
    const FIRST: u64 = 0xEFFF_FFFC;

    /// Processes of another PID namespace have ended once it has none, which only the first PID namespace sees.
    fn has_ended(self) -> bool {
        let own = pid_namespace(Path::new("/proc/self"));
        if own == Some(self.namespace) {
            return test_kill_process(self.pid) == Err(rustix::io::Errno::SRCH);
        }
        let mut processes = fs::read_dir("/proc").into_iter().flatten().flatten();
        own == Some(Self::FIRST)
            && !processes.any(|process| pid_namespace(&process.path()) == Some(self.namespace))
    }
}

/// The inode of a process's PID namespace.
fn pid_namespace(process: &Path) -> Option<u64> {
    let link = fs::read_link(process.join("ns/pid")).ok()?;
    link.to_str()?.strip_prefix("pid:[")?.strip_suffix(']')?.parse().ok()
}

fn maker(name: &str) -> Option<LeftoverMaker> {
    let maker = name.strip_prefix(PREFIX)?.split('.').next()?;
    let (pid, namespace) = match maker.split_once('-') {
        Some((pid, namespace)) => (pid, namespace.parse().ok()?),
        None => (maker, LeftoverMaker::FIRST),
    };
    Some(LeftoverMaker { pid: Pid::from_raw(pid.parse().ok()?)?, namespace })
}

/// Processes of this workspace whose parent has exited.
fn orphans() -> Vec<Leftover> {
    let built = workspace::target();
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    processes
        .filter_map(|entry| {
            let pid = entry.file_name().to_str()?.parse().ok()?;
            let program = fs::read_link(entry.path().join("exe")).ok()?;
            let orphan = program.starts_with(&built) && parent(&entry.path())? == 1;
            orphan.then_some(Leftover::Process(Pid::from_raw(pid)?, program))
        })
        .collect()
}

fn parent(process: &Path) -> Option<u32> {
    let stat = fs::read_to_string(process.join("stat")).ok()?;
    // "PID (NAME) STATE PPID ...", where the name may have spaces and parentheses.
    stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()
}

fn cgroup2() -> Option<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").ok()?;
    let mount = mounts.lines().find(|line| line.split(' ').nth(2) == Some("cgroup2"))?;
    mount.split(' ').nth(1).map(PathBuf::from)
}

/// Unmounts everything at the path.
fn unmounted(path: &Path) -> io::Result<()> {
    match unmount(path, UnmountFlags::DETACH) {
        Err(rustix::io::Errno::INVAL) => Ok(()),
        done => Ok(done?),
    }
}

fn remove_cgroup(path: &Path) -> io::Result<()> {
    let deadline = Instant::now() + Duration::from_secs(5);
    // Before Linux 5.14 there is no cgroup.kill; a cgroup with processes then stays, and is reported.
    drop(fs::write(path.join("cgroup.kill"), "1"));
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_cgroup(&entry.path())?;
        }
    }
    loop {
        match fs::remove_dir(path) {
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy && Instant::now() < deadline => {
                std::thread::yield_now();
            }
            done => return done,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::process;

    use super::*;

    #[test]
    fn names_lead_to_their_maker() {
        let pid = Pid::from_raw(17).expect("not 0");
        let first = Some(LeftoverMaker { pid, namespace: LeftoverMaker::FIRST });
        assert_eq!(maker(&format!("{PREFIX}17.0.label")), first);
        assert_eq!(maker(&format!("{PREFIX}17")), first);
        assert_eq!(
            maker(&format!("{PREFIX}17-4026532200.0.x")),
            Some(LeftoverMaker { pid, namespace: 4_026_532_200 })
        );
        assert_eq!(maker("intercept-test.x.0"), None);
        assert_eq!(maker("other.1.0"), None);
    }

    #[test]
    fn only_what_dead_makers_left_is_abandoned() {
        let folder = env::temp_dir().join(format!("sweep.{}", process::id()));
        let own = pid_namespace(Path::new("/proc/self")).expect("read");
        let make = |pid: u32, namespace: u64| {
            let path = folder.join(format!("{PREFIX}{pid}-{namespace}.0.x"));
            fs::create_dir_all(&path).expect("made");
            path
        };
        make(process::id(), own);
        let mut dead = process::Command::new("true").spawn().expect("started");
        dead.wait().expect("waited");
        let mut expected = vec![make(dead.id(), own)];
        // No PID namespace has this inode.
        let of_ended_namespace = make(1, 1);
        if own == LeftoverMaker::FIRST {
            expected.push(of_ended_namespace);
        }
        expected.sort();
        let mut found: Vec<_> = abandoned(&folder).collect();
        found.sort();
        fs::remove_dir_all(&folder).expect("removed");
        assert_eq!(found, expected);
    }
}
