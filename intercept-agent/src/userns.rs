//! User and group ids of the pod's user namespace, and what they are outside of it.
//!
//! Options name ids as the pod sees them; the programs see those of the initial user namespace.

use std::fs;
use std::io;

use rustix::process::Pid;

use crate::cgroup::{CgroupDir, CgroupError};

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
