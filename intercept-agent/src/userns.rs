//! User and group ids in the pod's user namespace, and their values in the initial one.
//!
//! Options name ids as the pod sees them. The programs see those of the initial user namespace.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::sync::OnceLock;

use rustix::io::Errno;
use rustix::pipe::PipeFlags;
use rustix::process::{Pid, WaitOptions};

use crate::cgroup::{CgroupDir, CgroupError};
use crate::netns::{Netns, NetnsError};
use crate::pod_process::close_others;

/// The id maps of a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IdMaps {
    /// User ids.
    pub users: IdMap,
    /// Group ids.
    pub groups: IdMap,
}

/// The map of one kind of id.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IdMap(Vec<Extent>);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Extent {
    inside: u32,
    outside: u32,
    count: u32,
}

/// Why the id maps of a pod cannot be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum IdMapError {
    /// A map cannot be read.
    #[error("reading {path}; check that this process has access to the pod's processes")]
    Read {
        /// The file.
        path: String,
        /// The error from the kernel.
        source: io::Error,
    },
    /// A map does not have the format of user_namespaces(7).
    #[error("{path} has the line `{line}`, which is not three numbers; is this Linux?")]
    Form {
        /// The file.
        path: String,
        /// The line.
        line: String,
    },
    /// The user namespace cannot be entered.
    #[error("entering the pod's user namespace to read its ids; this needs CAP_SYS_ADMIN")]
    Enter(#[source] io::Error),
    /// The owner of the network namespace cannot be read.
    #[error(transparent)]
    Netns(#[from] NetnsError),
    /// The cgroup cannot be read.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
}

impl IdMaps {
    /// The maps of the initial user namespace: every id maps to itself.
    pub fn identity() -> Self {
        Self { users: IdMap::identity(), groups: IdMap::identity() }
    }

    /// Reads the maps of process `pid`.
    pub fn of_process(pid: Pid) -> Result<Self, IdMapError> {
        let read = |file: &str| {
            let path = format!("/proc/{pid}/{file}");
            match fs::read_to_string(&path) {
                Ok(text) => IdMap::parse(&text).map_err(|line| IdMapError::Form { path, line }),
                Err(source) => Err(IdMapError::Read { path, source }),
            }
        };
        Ok(Self { users: read("uid_map")?, groups: read("gid_map")? })
    }

    /// Reads the maps of the user namespace that owns the pod's network namespace, which exists before the pod's first
    /// process. If it is this process's own user namespace, reads those of [`IdMaps::of_cgroup`] instead.
    pub fn of_pod(netns: &Netns, cgroup: &CgroupDir) -> Result<Self, IdMapError> {
        let owner = netns.owner()?;
        let inode = rustix::fs::fstat(&owner).map_err(io::Error::from).map_err(IdMapError::Enter)?.st_ino;
        if own_inode() == Some(inode) {
            return Self::of_cgroup(cgroup);
        }
        let is_in_it = |pid: &Pid| {
            fs::metadata(format!("/proc/{pid}/ns/user")).is_ok_and(|namespace| namespace.ino() == inode)
        };
        let inside = cgroup.processes().ok().and_then(|pids| pids.into_iter().find(is_in_it));
        match inside.map(Self::of_process) {
            Some(Ok(maps)) => Ok(maps),
            // No process is in it, or the process has exited.
            _ => of_namespace(owner.as_fd()),
        }
    }

    /// Reads the maps of the processes in `cgroup`. Of several, the map that covers most ids is the pod's, because a
    /// process may have created a narrower namespace below it. [`IdMaps::identity`] if there is no process.
    pub fn of_cgroup(cgroup: &CgroupDir) -> Result<Self, IdMapError> {
        let mut widest: Option<Self> = None;
        for pid in cgroup.processes()? {
            let maps = match Self::of_process(pid) {
                Ok(maps) => maps,
                Err(IdMapError::Read { source, .. }) if gone(&source) => continue,
                Err(error) => return Err(error),
            };
            if widest.as_ref().is_none_or(|best| maps.users.size() > best.users.size()) {
                widest = Some(maps);
            }
        }
        Ok(widest.unwrap_or_else(Self::identity))
    }
}

/// The inode of this process's user namespace, which it does not leave.
fn own_inode() -> Option<u64> {
    static OWN: OnceLock<Option<u64>> = OnceLock::new();
    *OWN.get_or_init(|| fs::metadata("/proc/self/ns/user").ok().map(|own| own.ino()))
}

impl IdMap {
    fn identity() -> Self {
        Self(vec![Extent { inside: 0, outside: 0, count: u32::MAX }])
    }

    /// Parses the format of user_namespaces(7). The error is the malformed line.
    fn parse(text: &str) -> Result<Self, String> {
        let extent = |line: &str| {
            let mut numbers = line.split_ascii_whitespace().map(str::parse);
            match (numbers.next(), numbers.next(), numbers.next(), numbers.next()) {
                (Some(Ok(inside)), Some(Ok(outside)), Some(Ok(count)), None) => {
                    Ok(Extent { inside, outside, count })
                }
                _ => Err(line.to_owned()),
            }
        };
        text.lines().map(extent).collect::<Result<_, _>>().map(Self)
    }

    /// Returns the id in the initial user namespace. `None` if `inside` has no mapping.
    pub fn outside(&self, inside: u32) -> Option<u32> {
        self.0.iter().find_map(|extent| {
            let offset = inside.checked_sub(extent.inside)?;
            if offset < extent.count { extent.outside.checked_add(offset) } else { None }
        })
    }

    fn size(&self) -> u64 {
        self.0.iter().map(|extent| u64::from(extent.count)).sum()
    }
}

/// Reads the maps of a user namespace that may have no process, with a child process that enters it meanwhile.
fn of_namespace(namespace: BorrowedFd<'_>) -> Result<IdMaps, IdMapError> {
    let pipe =
        || rustix::pipe::pipe_with(PipeFlags::CLOEXEC).map_err(io::Error::from).map_err(IdMapError::Enter);
    let (entered, enters) = pipe()?;
    let (released, release) = pipe()?;
    // SAFETY: the child only makes system calls. It neither allocates nor locks, and ends with _exit.
    let child = unsafe {
        match libc::fork() {
            0 => {
                // So that the read below ends when the parent closes its end or dies. Two children that are started at
                // the same time would each hold the end that the other waits on.
                let error = match close_others([namespace, enters.as_fd(), released.as_fd()]) {
                    Err(error) => error.raw_os_error(),
                    Ok(()) if libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWUSER) == 0 => 0,
                    Ok(()) => *libc::__errno_location(),
                };
                let answer = error.to_ne_bytes();
                libc::write(enters.as_raw_fd(), answer.as_ptr().cast(), answer.len());
                let mut end = [0_u8; 1];
                libc::read(released.as_raw_fd(), end.as_mut_ptr().cast(), 1);
                libc::_exit(0)
            }
            child => child,
        }
    };
    let child = Pid::from_raw(child).ok_or_else(io::Error::last_os_error).map_err(IdMapError::Enter)?;
    drop(enters);
    let mut answer = [0; 4];
    let maps = match rustix::io::read(&entered, &mut answer) {
        Ok(4) if answer == [0; 4] => IdMaps::of_process(child),
        Ok(4) => Err(IdMapError::Enter(io::Error::from_raw_os_error(i32::from_ne_bytes(answer)))),
        Ok(_) => Err(IdMapError::Enter(io::ErrorKind::UnexpectedEof.into())),
        Err(error) => Err(IdMapError::Enter(error.into())),
    };
    drop(release);
    while matches!(rustix::process::waitpid(Some(child), WaitOptions::empty()), Err(Errno::INTR)) {}
    maps
}

fn gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESRCH))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::process::Command;
    use std::sync::{Arc, mpsc};
    use std::thread;
    use std::time::{Duration, Instant};

    use super::*;
    use crate::testing::TestCgroup;

    #[test]
    fn ids_translate_by_the_extent_that_holds_them() {
        let map =
            IdMap::parse("         0     100000      65536\n     70000       5000         10\n").unwrap();
        for (inside, outside) in [
            (0, Some(100_000)),
            (1337, Some(101_337)),
            (65_535, Some(165_535)),
            (65_536, None),
            (69_999, None),
            (70_000, Some(5000)),
            (70_009, Some(5009)),
            (70_010, None),
            (u32::MAX, None),
        ] {
            assert_eq!(map.outside(inside), outside, "{inside}");
        }
    }

    #[test]
    fn a_malformed_map_is_refused() {
        for line in ["0 0", "0 0 1 1", "a 0 1", "0 -1 1", ""] {
            assert_eq!(IdMap::parse(&format!("{line}\n")).unwrap_err(), line);
        }
    }

    #[test]
    fn without_a_user_namespace_ids_stay_what_they_are() {
        let own = Pid::from_raw(std::process::id().cast_signed()).unwrap();
        assert_eq!(IdMaps::of_process(own).unwrap(), IdMaps::identity());
        assert_eq!(IdMaps::identity().groups.outside(1337), Some(1337));
        assert_eq!(IdMaps::of_cgroup(&TestCgroup::new().cgroup).unwrap(), IdMaps::identity());
    }

    /// The network namespace of a process that is started in a cgroup and in a user namespace of its own.
    fn netns_of_other_users(test: &mut TestCgroup) -> Netns {
        let pid = test.spawn("app", Command::new("unshare").args(["--user", "--net", "sleep", "600"]));
        let own = ["user", "net"].map(|kind| fs::read_link(format!("/proc/self/ns/{kind}")).unwrap());
        let deadline = Instant::now() + Duration::from_secs(30);
        while own
            .iter()
            .zip(["user", "net"])
            .any(|(own, kind)| fs::read_link(format!("/proc/{pid}/ns/{kind}")).unwrap() == *own)
        {
            assert!(Instant::now() < deadline, "the process makes its namespaces");
            thread::yield_now();
        }
        fs::write(format!("/proc/{pid}/uid_map"), "0 100000 65536").unwrap();
        fs::write(format!("/proc/{pid}/gid_map"), "0 200000 65536").unwrap();
        Netns::of_process(pid).unwrap()
    }

    #[test]
    fn the_owner_of_the_network_namespace_tells_before_anything_runs() {
        let mut test = TestCgroup::new();
        let netns = netns_of_other_users(&mut test);
        let running = IdMaps::of_pod(&netns, &test.cgroup).unwrap();
        assert_eq!(running.users.outside(1337), Some(101_337));
        assert_eq!(running.groups.outside(1337), Some(201_337));

        test.kill_all();
        assert_eq!(test.cgroup.processes().unwrap(), []);
        assert_eq!(IdMaps::of_pod(&netns, &test.cgroup).unwrap(), running);
        // A process in the cgroup with the node's user namespace has no effect.
        test.idle("app");
        assert_eq!(IdMaps::of_pod(&netns, &test.cgroup).unwrap(), running);
    }

    #[test]
    fn pods_without_processes_are_read_at_the_same_time() {
        const PODS: usize = 4;
        const TIMES: usize = 200;
        let mut test = TestCgroup::new();
        let netns = Arc::new(netns_of_other_users(&mut test));
        test.kill_all();
        let (read, reads) = mpsc::channel();
        for _ in 0..PODS {
            let (netns, read) = (Arc::clone(&netns), read.clone());
            let cgroup = CgroupDir::open(test.cgroup.path()).unwrap();
            // Not joined: a thread that hangs shows by the time limit below.
            thread::spawn(move || {
                for _ in 0..TIMES {
                    read.send(IdMaps::of_pod(&netns, &cgroup).unwrap().users.outside(1337)).unwrap();
                }
            });
        }
        for _ in 0..PODS * TIMES {
            let read = reads.recv_timeout(Duration::from_secs(60));
            if read.is_err() {
                kill_children();
            }
            assert_eq!(read, Ok(Some(101_337)));
        }
    }

    /// Kills the children that run this test. Those that wait for each other would outlive it.
    fn kill_children() {
        let own = procfs::process::Process::myself().unwrap();
        let is_child = |process: &procfs::process::Process| {
            let has_parent = process.stat().is_ok_and(|stat| stat.ppid == own.pid);
            has_parent && process.exe().ok() == own.exe().ok()
        };
        for child in procfs::process::all_processes().unwrap().flatten().filter(is_child) {
            rustix::process::kill_process(Pid::from_raw(child.pid()).unwrap(), rustix::process::Signal::KILL)
                .unwrap();
        }
    }

    #[test]
    fn a_network_namespace_of_the_nodes_users_leaves_ids_what_they_are() {
        let test = TestCgroup::new();
        assert_eq!(IdMaps::of_pod(&crate::testing::new_netns(), &test.cgroup).unwrap(), IdMaps::identity());
    }

    #[test]
    fn a_pods_user_namespace_is_found_through_its_cgroup() {
        let mut test = TestCgroup::new();
        let pid = test.spawn("app", Command::new("unshare").args(["--user", "sleep", "600"]));
        let own = fs::read_link("/proc/self/ns/user").unwrap();
        let deadline = Instant::now() + Duration::from_secs(5);
        while fs::read_link(format!("/proc/{pid}/ns/user")).unwrap() == own {
            assert!(Instant::now() < deadline, "the process makes its namespace");
            thread::yield_now();
        }
        fs::write(format!("/proc/{pid}/uid_map"), "0 100000 65536").unwrap();
        fs::write(format!("/proc/{pid}/gid_map"), "0 200000 65536").unwrap();

        let maps = IdMaps::of_cgroup(&test.cgroup).unwrap();
        assert_eq!(maps.users.outside(1337), Some(101_337));
        assert_eq!(maps.groups.outside(1337), Some(201_337));
        assert_eq!(maps.users.outside(100_000), None);

        // A process with a narrower map does not hide the pod's.
        let narrow = test.spawn("app", Command::new("unshare").args(["--user", "sleep", "600"]));
        while fs::read_link(format!("/proc/{narrow}/ns/user")).unwrap() == own {
            assert!(Instant::now() < deadline, "the process makes its namespace");
            thread::yield_now();
        }
        fs::write(format!("/proc/{narrow}/uid_map"), "5 105 1").unwrap();
        assert_eq!(IdMaps::of_cgroup(&test.cgroup).unwrap(), maps);
    }
}
