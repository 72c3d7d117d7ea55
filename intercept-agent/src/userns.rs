//! User and group ids of the pod's user namespace, and what they are outside of it.
//!
//! Options name ids as the pod sees them; the programs see those of the initial user namespace.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;

use rustix::io::Errno;
use rustix::pipe::PipeFlags;
use rustix::process::{Pid, WaitOptions};

use crate::cgroup::{CgroupDir, CgroupError};
use crate::netns::{Netns, NetnsError};

/// How the ids of one pod translate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IdMaps {
    /// User ids.
    pub users: IdMap,
    /// Group ids.
    pub groups: IdMap,
}

/// How ids of one kind translate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IdMap(Vec<Extent>);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Extent {
    inside: u32,
    outside: u32,
    count: u32,
}

/// The ids that were asked for, outside.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Translated {
    /// In the order asked for.
    pub ids: Vec<u32>,
    /// Those that nobody can have, as they were given: worth a note, because they match nothing.
    pub unmapped: Vec<u32>,
}

/// Why the ids of a pod cannot be translated.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum IdMapError {
    /// A map cannot be read.
    #[error("reading {path}; may this process look at the pod's?")]
    Read {
        /// The file.
        path: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// A map is not in the form of user_namespaces(7).
    #[error("{path} has the line `{line}`, which is not three numbers; is this Linux?")]
    Form {
        /// The file.
        path: String,
        /// The line.
        line: String,
    },
    /// A user namespace cannot be entered.
    #[error("entering the pod's user namespace to read its ids; this takes CAP_SYS_ADMIN")]
    Enter(#[source] io::Error),
    /// The owner of the network namespace is not known.
    #[error(transparent)]
    Netns(#[from] NetnsError),
    /// The cgroup cannot be read.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
}

impl IdMaps {
    /// Ids that are the same inside and outside.
    pub fn identity() -> Self {
        Self { users: IdMap::identity(), groups: IdMap::identity() }
    }

    /// The maps of the process `pid`.
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

    /// The maps of the pod with this network namespace and cgroup: of the user namespace that owns the network
    /// namespace, also before anything runs in it. A network namespace of the node's own users tells nothing; then what
    /// [`IdMaps::of_cgroup`] says.
    pub fn of_pod(netns: &Netns, cgroup: &CgroupDir) -> Result<Self, IdMapError> {
        let owner = netns.owner()?;
        let inode = rustix::fs::fstat(&owner).map_err(io::Error::from).map_err(IdMapError::Enter)?.st_ino;
        if fs::metadata("/proc/self/ns/user").is_ok_and(|own| own.ino() == inode) {
            return Self::of_cgroup(cgroup);
        }
        let is_in_it = |pid: &Pid| {
            fs::metadata(format!("/proc/{pid}/ns/user")).is_ok_and(|namespace| namespace.ino() == inode)
        };
        let inside = cgroup.processes().ok().and_then(|pids| pids.into_iter().find(is_in_it));
        match inside.map(Self::of_process) {
            Some(Ok(maps)) => Ok(maps),
            // Nothing is, or is any more.
            _ => of_namespace(owner.as_fd()),
        }
    }

    /// The maps of the pod in `cgroup`: of the process whose map covers most ids, since a process of the pod may
    /// have made a narrower namespace below the pod's. [`IdMaps::identity`] when there is no process.
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

impl IdMap {
    fn identity() -> Self {
        Self(vec![Extent { inside: 0, outside: 0, count: u32::MAX }])
    }

    /// Reads the form of user_namespaces(7); fails with the line that is not in it.
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

    /// What `inside` is in the initial user namespace; `None` when nobody can have it.
    pub fn outside(&self, inside: u32) -> Option<u32> {
        self.0.iter().find_map(|extent| {
            let offset = inside.checked_sub(extent.inside)?;
            if offset < extent.count { extent.outside.checked_add(offset) } else { None }
        })
    }

    /// Translates all of `ids`.
    pub fn translate(&self, ids: &[u32]) -> Translated {
        let mut translated = Translated::default();
        for &id in ids {
            match self.outside(id) {
                Some(outside) => translated.ids.push(outside),
                None => translated.unmapped.push(id),
            }
        }
        translated
    }

    fn size(&self) -> u64 {
        self.0.iter().map(|extent| u64::from(extent.count)).sum()
    }
}

/// The maps of a user namespace that may have no process: a process is put into it for as long as it takes to read them.
fn of_namespace(namespace: BorrowedFd<'_>) -> Result<IdMaps, IdMapError> {
    let pipe =
        || rustix::pipe::pipe_with(PipeFlags::CLOEXEC).map_err(io::Error::from).map_err(IdMapError::Enter);
    let (entered, enters) = pipe()?;
    let (released, release) = pipe()?;
    // SAFETY: the child makes system calls only; it neither allocates nor locks, and leaves by _exit.
    let child = unsafe {
        match libc::fork() {
            0 => {
                // So that it ends with the parent, whatever becomes of that.
                libc::close(release.as_raw_fd());
                let result = libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWUSER);
                let error = if result == 0 { 0 } else { *libc::__errno_location() };
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
    use std::thread;
    use std::time::{Duration, Instant};

    use super::*;
    use crate::cgroup::tests::TestCgroup;

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
        assert_eq!(
            map.translate(&[1337, 65_536, 0]),
            Translated { ids: vec![101_337, 100_000], unmapped: vec![65_536] }
        );
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

    #[test]
    fn the_owner_of_the_network_namespace_tells_before_anything_runs() {
        let mut test = TestCgroup::new();
        let pid = test.spawn("app", Command::new("unshare").args(["--user", "--net", "sleep", "600"]));
        let own = ["user", "net"].map(|kind| fs::read_link(format!("/proc/self/ns/{kind}")).unwrap());
        let deadline = Instant::now() + Duration::from_secs(5);
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
        let netns = Netns::of_process(pid).unwrap();
        let running = IdMaps::of_pod(&netns, &test.cgroup).unwrap();
        assert_eq!(running.users.outside(1337), Some(101_337));
        assert_eq!(running.groups.outside(1337), Some(201_337));

        test.kill_all();
        assert_eq!(test.cgroup.processes().unwrap(), []);
        assert_eq!(IdMaps::of_pod(&netns, &test.cgroup).unwrap(), running);
        // A process of the node's own users that is in the cgroup does not matter.
        test.idle("app");
        assert_eq!(IdMaps::of_pod(&netns, &test.cgroup).unwrap(), running);
    }

    #[test]
    fn a_network_namespace_of_the_nodes_users_leaves_ids_what_they_are() {
        let test = TestCgroup::new();
        assert_eq!(IdMaps::of_pod(&crate::netns::tests::fresh(), &test.cgroup).unwrap(), IdMaps::identity());
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

        // A process with a narrower view does not hide the pod's.
        let narrow = test.spawn("app", Command::new("unshare").args(["--user", "sleep", "600"]));
        while fs::read_link(format!("/proc/{narrow}/ns/user")).unwrap() == own {
            assert!(Instant::now() < deadline, "the process makes its namespace");
            thread::yield_now();
        }
        fs::write(format!("/proc/{narrow}/uid_map"), "5 105 1").unwrap();
        assert_eq!(IdMaps::of_cgroup(&test.cgroup).unwrap(), maps);
    }
}
