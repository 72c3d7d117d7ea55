//! The pod's cgroup: programs are attached to it, and its processes identify the pod's namespaces.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use rustix::fs::{Mode, OFlags, openat};
use rustix::process::Pid;

use crate::sys;

/// `CGROUP2_SUPER_MAGIC` of linux/magic.h.
const CGROUP2_MAGIC: u64 = 0x6367_7270;
/// `CGROUP_SUPER_MAGIC`, of the version 1 hierarchies.
const CGROUP1_MAGIC: u64 = 0x0027_e0eb;
/// This file exists in every cgroup except the root (cgroup-v2.rst of the kernel), which identifies the root.
const NOT_IN_ROOT: &str = "cgroup.events";

/// Whether the root of the hierarchy may be opened.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Root {
    Refuse,
    Allow,
}

/// A cgroup2 directory, held open. It is below the root, unless it is of a machine's workload.
#[derive(Debug)]
pub struct CgroupDir {
    dir: File,
    path: PathBuf,
    id: u64,
    lineage: OnceLock<Vec<u64>>,
    /// Its `cgroup.events`, which is read again and again.
    events: OnceLock<File>,
}

/// Why a cgroup is refused or cannot be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CgroupError {
    /// The path does not exist or cannot be opened.
    #[error("opening cgroup {}{}", path.display(), hint(mounts))]
    Open {
        /// As passed to [`CgroupDir::open`].
        path: PathBuf,
        /// Where cgroup2 is mounted.
        mounts: Vec<PathBuf>,
        /// The error from the kernel.
        source: io::Error,
    },
    /// The path is not a directory.
    #[error("{} is not a directory; give the directory of the pod's cgroup", path.display())]
    NotFolder {
        /// As passed to [`CgroupDir::open`].
        path: PathBuf,
    },
    /// A cgroup of version 1, which programs cannot be attached to.
    #[error("{} is a cgroup of version 1, to which programs cannot be attached{}", path.display(), hint(mounts))]
    Version1 {
        /// As passed to [`CgroupDir::open`].
        path: PathBuf,
        /// Where cgroup2 is mounted.
        mounts: Vec<PathBuf>,
    },
    /// A directory of another filesystem.
    #[error("{} is not a cgroup{}", path.display(), hint(mounts))]
    NotCgroup {
        /// As passed to [`CgroupDir::open`].
        path: PathBuf,
        /// Where cgroup2 is mounted.
        mounts: Vec<PathBuf>,
    },
    /// The root of the hierarchy, which contains every process of the node.
    #[error(
        "{} is the root cgroup, which would capture the whole node; give the pod's own cgroup, or --machine for the node itself",
        path.display()
    )]
    Root {
        /// As passed to [`CgroupDir::open`].
        path: PathBuf,
    },
    /// The hierarchy is mounted in a cgroup namespace, so that its root is not visible.
    #[error(
        "the root of the hierarchy of cgroup {} is not visible from here, so that its level is not known; start with the \
         node's /sys/fs/cgroup",
        path.display()
    )]
    HiddenRoot {
        /// The cgroup.
        path: PathBuf,
    },
    /// A file or directory in the cgroup cannot be read.
    #[error("reading {}", path.display())]
    Read {
        /// The file or directory.
        path: PathBuf,
        /// The error from the kernel.
        source: io::Error,
    },
    /// All processes of the cgroup are in a PID namespace that is not visible to this process.
    #[error(
        "the {count} processes of cgroup {} are not visible from here; share the node's PID namespace (hostPID: true)",
        path.display()
    )]
    Hidden {
        /// The cgroup.
        path: PathBuf,
        /// Number of processes.
        count: usize,
    },
}

impl CgroupDir {
    /// Opens the cgroup at `path`.
    ///
    /// # Errors
    /// [`CgroupError`], if `path` is not a cgroup2 directory below the root.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, CgroupError> {
        Self::admit(path.as_ref(), Root::Refuse)
    }

    /// Opens the cgroup at `path`, which may be the root: for a machine's workload, and to name what is attached.
    ///
    /// # Errors
    /// [`CgroupError`], if `path` is not a cgroup2 directory.
    pub fn open_any(path: impl AsRef<Path>) -> Result<Self, CgroupError> {
        Self::admit(path.as_ref(), Root::Allow)
    }

    /// Opens the root of the hierarchy.
    ///
    /// # Errors
    /// [`CgroupError`], if it is not mounted, or not visible from here.
    pub fn root() -> Result<Self, CgroupError> {
        let mounts = mounts();
        let path = mounts.first().cloned().unwrap_or_else(|| PathBuf::from("/sys/fs/cgroup"));
        match mounts.iter().find(|mount| !mount.join(NOT_IN_ROOT).exists()) {
            Some(root) => Self::open_any(root),
            None if mounts.is_empty() => Self::open_any(path),
            None => Err(CgroupError::HiddenRoot { path }),
        }
    }

    fn admit(path: &Path, root: Root) -> Result<Self, CgroupError> {
        let path = path.to_path_buf();
        // O_NONBLOCK, so that opening a FIFO returns at once. It is refused below.
        let flags = (OFlags::NONBLOCK | OFlags::CLOEXEC).bits().cast_signed();
        let dir = match OpenOptions::new().read(true).custom_flags(flags).open(&path) {
            Ok(dir) => dir,
            Err(source) => return Err(CgroupError::Open { mounts: mounts(), path, source }),
        };
        let read = |source| CgroupError::Read { path: path.clone(), source };
        let metadata = dir.metadata().map_err(read)?;
        if !metadata.is_dir() {
            return Err(CgroupError::NotFolder { path });
        }
        match rustix::fs::fstatfs(&dir).map_err(|error| read(error.into()))?.f_type.cast_unsigned() {
            CGROUP2_MAGIC => {}
            CGROUP1_MAGIC => return Err(CgroupError::Version1 { path, mounts: mounts() }),
            _ => return Err(CgroupError::NotCgroup { path, mounts: mounts() }),
        }
        // On 64-bit machines the cgroup id of bpf_get_current_cgroup_id and bpf_link_info is the inode number, since
        // Linux 5.5.
        let cgroup =
            Self { dir, path, id: metadata.ino(), lineage: OnceLock::new(), events: OnceLock::new() };
        if root == Root::Refuse && cgroup.is_root() {
            return Err(CgroupError::Root { path: cgroup.path });
        }
        Ok(cgroup)
    }

    /// Returns the path passed to [`CgroupDir::open`].
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the cgroup id, which is also in the info of links attached to this cgroup.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// Whether it is the root of the hierarchy.
    pub fn is_root(&self) -> bool {
        use rustix::fs::{AtFlags, statat};
        statat(&self.dir, NOT_IN_ROOT, AtFlags::empty()).is_err()
    }

    /// Returns the ids of the ancestors, nearest first. They are constant because a cgroup never moves.
    pub fn lineage(&self) -> Result<Vec<u64>, CgroupError> {
        if let Some(known) = self.lineage.get() {
            return Ok(known.clone());
        }
        let (lineage, _) = self.walk_up()?;
        Ok(self.lineage.get_or_init(|| lineage).clone())
    }

    /// Returns how deep the cgroup is in the hierarchy, whose root has level 0.
    ///
    /// # Errors
    /// [`CgroupError::HiddenRoot`], if this mount does not show the root, and is not of a cgroup around this process.
    pub fn level(&self) -> Result<u32, CgroupError> {
        use rustix::fs::{AtFlags, statat};
        let (lineage, top) = self.walk_up()?;
        let above = match statat(&top, NOT_IN_ROOT, AtFlags::empty()) {
            Err(rustix::io::Errno::NOENT) => 0,
            Err(error) => {
                return Err(CgroupError::Read { path: self.path.join(".."), source: error.into() });
            }
            // In a node that is a container, the mount begins at the node's cgroup.
            Ok(_) => {
                let top = lineage.last().copied().unwrap_or(self.id);
                let own = sys::own_cgroups().unwrap_or_default();
                let level = own.iter().position(|id| *id == top);
                level.ok_or_else(|| CgroupError::HiddenRoot { path: self.path.clone() })?
            }
        };
        Ok(u32::try_from(above + lineage.len()).unwrap_or(u32::MAX))
    }

    /// The ids of the ancestors, nearest first, and the last of them that is visible.
    fn walk_up(&self) -> Result<(Vec<u64>, OwnedFd), CgroupError> {
        use rustix::fs::fstat;
        let read =
            |error: rustix::io::Errno| CgroupError::Read { path: self.path.join(".."), source: error.into() };
        let device = fstat(&self.dir).map_err(read)?.st_dev;
        let mut lineage = Vec::new();
        let mut top = self.dir.try_clone().map(OwnedFd::from);
        loop {
            let own = top.map_err(|source| CgroupError::Read { path: self.path.clone(), source })?;
            let at = openat(&own, "..", OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).map_err(read)?;
            let found = fstat(&at).map_err(read)?;
            // Above the root of the hierarchy is another filesystem. The root of all filesystems is its own parent.
            if found.st_dev != device || lineage.last() == Some(&found.st_ino) {
                return Ok((lineage, own));
            }
            lineage.push(found.st_ino);
            top = Ok(at);
        }
    }

    /// Whether neither the cgroup nor a descendant has a process. One file says so for all; the root has none.
    fn is_unpopulated(&self) -> bool {
        let read = || {
            let events = match self.events.get() {
                Some(events) => events,
                None => {
                    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
                    let opened = openat(&self.dir, NOT_IN_ROOT, flags, Mode::empty())?;
                    self.events.get_or_init(|| opened.into())
                }
            };
            sys::read_again(events)
        };
        read().is_ok_and(|text| text.lines().any(|line| line == "populated 0"))
    }

    /// Returns the processes of the cgroup and its descendants in ascending order; empty if there are none.
    pub fn processes(&self) -> Result<Vec<Pid>, CgroupError> {
        if self.is_unpopulated() {
            return Ok(Vec::new());
        }
        let mut found = BTreeSet::new();
        let mut hidden = 0;
        let mut folders = vec![self.path.clone()];
        while let Some(folder) = folders.pop() {
            let read = |path: &Path, source| CgroupError::Read { path: path.to_path_buf(), source };
            let list = folder.join("cgroup.procs");
            let text = match fs::read_to_string(&list) {
                Ok(text) => text,
                // Either removed meanwhile, or a threaded cgroup, whose processes are listed in its domain cgroup.
                Err(error) if gone(&error) || error.raw_os_error() == Some(libc::EOPNOTSUPP) => String::new(),
                Err(source) => return Err(read(&list, source)),
            };
            for line in text.lines() {
                // A process in a PID namespace that is not a descendant of ours is listed as 0.
                match line.trim().parse().ok().and_then(Pid::from_raw) {
                    Some(pid) => _ = found.insert(pid.as_raw_nonzero()),
                    None => hidden += 1,
                }
            }
            let entries = match fs::read_dir(&folder) {
                Ok(entries) => entries,
                Err(error) if gone(&error) => continue,
                Err(source) => return Err(read(&folder, source)),
            };
            for entry in entries {
                let entry = match entry {
                    Ok(entry) => entry,
                    Err(error) if gone(&error) => break,
                    Err(source) => return Err(read(&folder, source)),
                };
                if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                    folders.push(entry.path());
                }
            }
        }
        if found.is_empty() && hidden > 0 {
            return Err(CgroupError::Hidden { path: self.path.clone(), count: hidden });
        }
        Ok(found.into_iter().filter_map(|pid| Pid::from_raw(pid.get())).collect())
    }
}

impl AsFd for CgroupDir {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.dir.as_fd()
    }
}

/// Whether this holds for a process in the cgroup at `path` or in a descendant, for one that is not visible from here, or
/// for a cgroup that cannot be read. Asks only until the first such process.
pub fn has_process(path: &Path, is_it: &impl Fn(Pid) -> bool) -> bool {
    let list = match fs::read_to_string(path.join("cgroup.procs")) {
        Ok(list) => list,
        // Of a threaded cgroup, they are listed in its domain cgroup.
        Err(error) if gone(&error) || error.raw_os_error() == Some(libc::EOPNOTSUPP) => String::new(),
        Err(_) => return true,
    };
    if list.lines().any(|line| line.trim().parse().ok().and_then(Pid::from_raw).is_none_or(is_it)) {
        return true;
    }
    let entries = match fs::read_dir(path) {
        Ok(entries) => entries,
        Err(error) => return !gone(&error),
    };
    let is_folder = |entry: &fs::DirEntry| entry.file_type().is_ok_and(|kind| kind.is_dir());
    entries.flatten().filter(is_folder).any(|entry| has_process(&entry.path(), is_it))
}

/// Returns the mount points of cgroup2; empty if it is not mounted.
pub fn mounts() -> Vec<PathBuf> {
    let Ok(mounts) = procfs::process::Process::myself().and_then(|own| own.mountinfo()) else {
        return Vec::new();
    };
    mounts.into_iter().filter(|mount| mount.fs_type == "cgroup2").map(|mount| mount.mount_point).collect()
}

fn gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENODEV))
}

/// The end of an error's text: the directory to use instead.
fn hint(mounts: &[PathBuf]) -> String {
    match mounts {
        [] => "; cgroup2 is not mounted here: mount it, or start with the node's /sys/fs/cgroup".to_owned(),
        [first, ..] => format!("; give a folder below {}, where cgroup2 is mounted", first.display()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::TestCgroup;

    fn text(error: &CgroupError) -> String {
        error.to_string()
    }

    #[test]
    fn what_is_no_cgroup2_below_the_root_is_refused_with_the_way_out() {
        let mount = mounts().into_iter().next().expect("cgroup2 is mounted");
        let below = format!("below {}", mount.display());

        let error = CgroupDir::open(mount.join("no-such-cgroup")).unwrap_err();
        assert!(matches!(error, CgroupError::Open { .. }), "{error:?}");
        assert!(text(&error).contains(&below), "{error}");

        let error = CgroupDir::open(&mount).unwrap_err();
        assert!(matches!(error, CgroupError::Root { .. }), "{error:?}");

        let error = CgroupDir::open(mount.join("cgroup.procs")).unwrap_err();
        assert!(matches!(error, CgroupError::NotFolder { .. }), "{error:?}");

        let error = CgroupDir::open("/proc").unwrap_err();
        assert!(matches!(error, CgroupError::NotCgroup { .. }), "{error:?}");
        assert!(text(&error).contains(&below), "{error}");
    }

    #[test]
    fn a_version_1_cgroup_is_refused_as_such() {
        let version1 = procfs::process::Process::myself()
            .and_then(|own| own.mountinfo())
            .expect("own mounts")
            .into_iter()
            .find(|mount| mount.fs_type == "cgroup");
        // Machines without version 1 have nothing to refuse.
        if let Some(mount) = version1 {
            let error = CgroupDir::open(&mount.mount_point).unwrap_err();
            assert!(matches!(error, CgroupError::Version1 { .. }), "{error:?}");
        }
    }

    #[test]
    fn the_id_is_that_of_the_folder() {
        let test = TestCgroup::new();
        assert_eq!(test.cgroup.id(), fs::metadata(test.cgroup.path()).unwrap().ino());
        assert_ne!(test.cgroup.id(), 0);
    }

    #[test]
    fn the_lineage_ends_at_the_root() {
        let test = TestCgroup::new();
        let inner = test.cgroup.path().join("inner");
        fs::create_dir(&inner).unwrap();
        let root = fs::metadata(&mounts()[0]).unwrap().ino();
        assert_eq!(test.cgroup.lineage().unwrap(), [root]);
        assert_eq!(test.cgroup.level().unwrap(), 1);
        assert_eq!(CgroupDir::open(&inner).unwrap().level().unwrap(), 2);
        assert_eq!(CgroupDir::open(&inner).unwrap().lineage().unwrap(), [test.cgroup.id(), root]);
    }

    #[test]
    fn a_process_is_looked_for_in_the_whole_subtree() {
        let mut test = TestCgroup::new();
        let found = |cgroup: &CgroupDir, is_it: &dyn Fn(Pid) -> bool| has_process(cgroup.path(), &is_it);
        assert!(!found(&test.cgroup, &|_| true));
        let (first, second) = (test.idle("sandbox"), test.idle("app"));
        assert!(found(&test.cgroup, &|pid| pid == first) && found(&test.cgroup, &|pid| pid == second));
        assert!(!found(&test.cgroup, &|pid| pid != first && pid != second));
        assert!(!has_process(&test.cgroup.path().join("gone"), &|_| true));
    }

    #[test]
    fn processes_of_the_whole_subtree_are_found() {
        let mut test = TestCgroup::new();
        assert_eq!(test.cgroup.processes().unwrap(), []);
        let mut expected = vec![test.idle("sandbox"), test.idle("app"), test.idle("app")];
        expected.sort_by_key(|pid| pid.as_raw_nonzero());
        assert_eq!(test.cgroup.processes().unwrap(), expected);
        test.kill_all();
        assert_eq!(test.cgroup.processes().unwrap(), []);
    }
}
