//! Fixtures of the unit tests: cgroups and network namespaces. They need root.

use std::{
    fs, io,
    path::Path,
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
};

use rustix::process::Pid;

use crate::{
    cgroup::{CgroupDir, mounts},
    netns::Netns,
};

/// A new network namespace, in which the loopback interface is down.
pub(crate) fn new_netns() -> Netns {
    Netns::fresh().expect("root makes namespaces")
}

/// A new cgroup. Dropping it kills its processes and removes it.
pub(crate) struct TestCgroup {
    pub(crate) cgroup: CgroupDir,
    children: Vec<Child>,
}

impl TestCgroup {
    pub(crate) fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let mount = mounts().into_iter().next().expect("cgroup2 is mounted");
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        // A name that `cargo xtask clean` knows.
        let path = mount.join(format!("intercept-test.{}.unit-{number}", std::process::id()));
        fs::create_dir(&path).expect("root creates cgroups");
        Self { cgroup: CgroupDir::open(path).expect("a fresh cgroup"), children: Vec::new() }
    }

    /// Starts `command` and moves it into the cgroup `below` this one.
    pub(crate) fn spawn(&mut self, below: &str, command: &mut Command) -> Pid {
        let folder = self.cgroup.path().join(below);
        fs::create_dir_all(&folder).expect("a cgroup below");
        let child = command.stdin(Stdio::null()).spawn().expect("the command starts");
        let pid = Pid::from_child(&child);
        self.children.push(child);
        fs::write(folder.join("cgroup.procs"), pid.to_string()).expect("moving a process");
        pid
    }

    /// Starts a process that sleeps.
    pub(crate) fn idle(&mut self, below: &str) -> Pid {
        self.spawn(below, Command::new("sleep").arg("600"))
    }

    /// Kills the processes that the fixture started.
    pub(crate) fn kill_all(&mut self) {
        for mut child in self.children.drain(..) {
            _ = child.kill();
            _ = child.wait();
        }
    }
}

impl Drop for TestCgroup {
    fn drop(&mut self) {
        self.kill_all();
        let removed = remove(self.cgroup.path());
        if !std::thread::panicking() {
            removed.expect("the test left nothing in its cgroup");
        }
    }
}

/// Removes a cgroup with those below it.
fn remove(cgroup: &Path) -> io::Result<()> {
    for entry in fs::read_dir(cgroup)?.flatten().filter(|entry| entry.path().is_dir()) {
        remove(&entry.path())?;
    }
    fs::remove_dir(cgroup)
}
