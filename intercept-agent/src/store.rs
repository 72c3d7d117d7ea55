//! The agent's folder in bpffs, which is all of its state:
//!
//! ```text
//! BPFFS/intercept/v<layout>/maps/NAME               shared by all pods
//! BPFFS/intercept/v<layout>/programs-<digest>/NAME  shared by all pods; the digest is that of the object
//! BPFFS/intercept/v<layout>/pods/<cookie>/<link>    one for each program
//! BPFFS/intercept/v<layout>/pods/<cookie>/record-<policy id>
//! BPFFS/intercept/v<layout>/pods/<cookie>/cgroup-<id>/<link>  of a machine's workload, for further cgroups
//! ```
//!
//! A pod is active if POLICIES has its cookie. Its active record is named by that policy's id. Everything else is being
//! added or removed, and may be swept.

use std::{
    collections::BTreeSet,
    fs::{self, DirBuilder, File},
    io,
    os::{
        fd::AsFd as _,
        unix::fs::{DirBuilderExt as _, MetadataExt as _},
    },
    path::{Path, PathBuf},
};

mod lock;
mod rules;

pub use self::lock::{Lock, Unlocked};
use self::lock::{flock, lock_dir, require_descriptors};
use crate::{
    ids::{NetnsCookie, PolicyId},
    objects,
    ownership::{OwnedFolder, OwnershipError, is_at},
    record::Record,
    sys,
};
use intercept_common::{layout, names};
use rustix::fs::FlockOperation;

/// Default of `--bpffs`.
pub const DEFAULT_BPFFS: &str = "/sys/fs/bpf";

/// Why an operation on the store failed.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The folder exists but is no bpffs, and none can be mounted on it.
    #[error(
        "mounting bpffs on {path}: run as root with CAP_SYS_ADMIN, or mount it with `mount -t bpf bpf {path}`"
    )]
    Mount {
        /// The folder.
        path: String,
        /// The error from the kernel.
        #[source]
        source: io::Error,
    },
    /// A call on a path failed.
    #[error("{action} {path}")]
    Path {
        /// What was attempted.
        action: &'static str,
        /// The path.
        path: String,
        /// The error from the kernel.
        #[source]
        source: io::Error,
    },
    /// The folder is not safe.
    #[error(transparent)]
    Ownership(#[from] OwnershipError),
    /// Another daemon keeps the pods of this store.
    #[error(
        "another daemon keeps the pods of {path}: stop it, or give this one a bpffs of its own with --bpffs"
    )]
    OtherDaemon {
        /// The folder that it has locked.
        path: String,
    },
    /// A record cannot be parsed.
    #[error("reading record {path}, of another version or damaged: attach the pod again, or detach it")]
    Record {
        /// Its path.
        path: String,
        /// What is wrong with it.
        #[source]
        source: serde_json::Error,
    },
    /// Saved rules cannot be parsed.
    #[error(
        "reading saved rules {path}, of another version or damaged: restart the pod, which makes its rules anew"
    )]
    Rules {
        /// Their path.
        path: String,
        /// What is wrong with them.
        #[source]
        source: serde_json::Error,
    },
}

impl StoreError {
    /// Whether a folder or file does not exist.
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::Path { source, .. } if source.kind() == io::ErrorKind::NotFound)
    }

    /// Whether another process has the lock.
    pub fn is_taken(&self) -> bool {
        matches!(self, Self::Path { source, .. } if source.kind() == io::ErrorKind::WouldBlock)
    }

    /// Whether the kernel lacks memory or descriptors or refuses this process, so that a later call or another process may succeed.
    pub fn may_pass(&self) -> bool {
        may_pass(self)
    }
}

/// As [`StoreError::may_pass`], for any error that the kernel may have caused.
pub fn may_pass(error: &(dyn std::error::Error + 'static)) -> bool {
    is_short(error) || code(error).is_some_and(|code| [libc::EACCES, libc::EPERM].contains(&code))
}

/// Whether the kernel lacks memory or descriptors, which says nothing about what was asked for.
pub fn is_short(error: &(dyn std::error::Error + 'static)) -> bool {
    const SHORT: [i32; 5] = [libc::ENOMEM, libc::EMFILE, libc::ENFILE, libc::EINTR, libc::EAGAIN];
    code(error).is_some_and(|code| SHORT.contains(&code))
}

/// The kernel's number of an error, which aya wraps.
fn code(error: &(dyn std::error::Error + 'static)) -> Option<i32> {
    let mut errors = std::iter::successors(Some(error), |error| error.source());
    errors.find_map(|error| error.downcast_ref::<io::Error>()?.raw_os_error())
}

fn at<'a>(action: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> StoreError + use<'a> {
    move |source| StoreError::Path { action, path: path.display().to_string(), source }
}

/// The folder.
#[derive(Clone, Debug)]
pub struct Store {
    root: PathBuf,
    /// Folder of the layout.
    version: PathBuf,
}

/// The records of a pod by the id of their policy, each with its own result.
pub type Records = Vec<(PolicyId, Result<Record, StoreError>)>;

impl Store {
    /// Opens the store in this bpffs, which is mounted if necessary.
    pub fn open(bpffs: &Path) -> Result<Self, StoreError> {
        ensure_bpffs(bpffs)?;
        Ok(Self::at(bpffs))
    }

    /// Fails unless this process may open so many more descriptors.
    pub fn require_descriptors(&self, count: u8) -> io::Result<()> {
        let bpffs = self.root.parent().unwrap_or(&self.root);
        require_descriptors(&File::open(bpffs)?, count)
    }

    /// Opens the store in this bpffs if it exists, to read it.
    pub fn find(bpffs: &Path) -> Result<Option<Self>, StoreError> {
        let store = Self::at(bpffs);
        if !is_bpffs(bpffs)? || !is_folder(&store.maps())? {
            return Ok(None);
        }
        match OwnedFolder::open(&store.root) {
            Ok(_) => Ok(Some(store)),
            // It was removed in between.
            Err(error) if error.is_not_found() => Ok(None),
            Err(error @ OwnershipError::Io { .. }) => Err(error.into()),
            Err(error) => {
                tracing::warn!(error = &error as &dyn std::error::Error, "this state is not the agent's");
                Ok(None)
            }
        }
    }

    /// The store in this bpffs, whichever layouts it has. None if there is no folder.
    pub fn find_any(bpffs: &Path) -> Result<Option<Self>, StoreError> {
        let store = Self::at(bpffs);
        Ok((is_bpffs(bpffs)? && is_folder(&store.root)?).then_some(store))
    }

    /// The same store, once for each layout that it has.
    pub fn layouts(&self) -> Result<Vec<Self>, StoreError> {
        Ok(list(&self.root)?.into_iter().map(|version| Self { version, ..self.clone() }).collect())
    }

    /// Creates a store of this process beside the real one, for trials. The caller removes it.
    pub fn scratch(bpffs: &Path) -> Result<Self, StoreError> {
        ensure_bpffs(bpffs)?;
        let root = bpffs.join(format!("intercept-check-{}", std::process::id()));
        Ok(Self::with_root(root))
    }

    fn at(bpffs: &Path) -> Self {
        Self::with_root(bpffs.join("intercept"))
    }

    fn with_root(root: PathBuf) -> Self {
        Self { version: root.join(format!("v{}", layout::VERSION)), root }
    }

    /// Waits for the lock of the store.
    pub fn lock(&self) -> Result<Lock, StoreError> {
        loop {
            OwnedFolder::create(&self.root)?;
            match lock_dir(&self.root, FlockOperation::LockExclusive) {
                // The agent that had the lock has removed the folder.
                Err(error) if error.is_not_found() => {}
                locked => return locked,
            }
        }
    }

    /// As [`Store::lock`], for a folder that was locked before and whose owners have been checked then, if it is still that of
    /// the store.
    pub fn lock_again(&self, Unlocked(dir): Unlocked) -> Result<Lock, StoreError> {
        flock(&dir, &self.root, FlockOperation::LockExclusive)?;
        if is_at(&dir, &self.root) {
            return Ok(Lock(dir));
        }
        drop(dir);
        self.lock()
    }

    /// Keeps programs and maps while the lock is held, even without pods, as the only daemon of this store. Does not
    /// wait.
    pub fn keep(&self) -> Result<Lock, StoreError> {
        self.create(&self.version)?;
        lock_dir(&self.version, FlockOperation::NonBlockingLockExclusive).map_err(|error| {
            match error.is_taken() {
                true => StoreError::OtherDaemon { path: self.version.display().to_string() },
                false => error,
            }
        })
    }

    /// Whether a daemon keeps programs and maps. The caller has locked the store, so that no daemon that starts meets this lock.
    pub fn is_kept(&self) -> bool {
        let trial = lock_dir(&self.version, FlockOperation::NonBlockingLockExclusive);
        trial.is_err_and(|error| !error.is_not_found())
    }

    /// Becomes the only reader of the events of `trace`. Fails if there is another reader.
    pub fn lock_events(&self) -> Result<Lock, StoreError> {
        lock_dir(&self.maps(), FlockOperation::NonBlockingLockExclusive)
    }

    /// Returns a missing map, if any: the first agent of the store may have crashed while it created them.
    pub fn missing_map(&self) -> Result<Option<&'static str>, StoreError> {
        let pins = self.names_in(&self.maps())?;
        Ok(names::MAPS.into_iter().find(|name| !pins.contains(*name)))
    }

    /// The inode of the folder of maps, which shows whether the maps are still those that were opened.
    pub fn generation(&self) -> Option<u64> {
        fs::metadata(self.maps()).ok().map(|folder| folder.ino())
    }

    /// Folder of the maps.
    pub fn maps(&self) -> PathBuf {
        self.version.join("maps")
    }

    /// Folder of the programs of this build.
    pub fn programs(&self) -> PathBuf {
        self.version.join(format!("programs-{}", objects::DIGEST))
    }

    /// Folders of the programs of other builds.
    pub fn other_programs(&self) -> Result<Vec<PathBuf>, StoreError> {
        let own = self.programs();
        Ok(list(&self.version)?
            .into_iter()
            .filter(|path| *path != own && file_name(path).starts_with("programs-"))
            .collect())
    }

    /// The folder of another layout version that has pods, if there is one.
    pub fn other_layout(&self) -> Result<Option<PathBuf>, StoreError> {
        let own = &self.version;
        for version in list(&self.root)? {
            if version != *own && !list(&version.join("pods"))?.is_empty() {
                return Ok(Some(version));
            }
        }
        Ok(None)
    }

    /// Removes maps and programs of other layout versions that no pod uses and no daemon keeps.
    pub fn remove_other_layouts(&self) -> Result<(), StoreError> {
        let own = &self.version;
        for version in list(&self.root)? {
            if version != *own
                && list(&version.join("pods"))?.is_empty()
                && let Ok(_unkept) = lock_dir(&version, FlockOperation::NonBlockingLockExclusive)
            {
                self.remove(&version)?;
            }
        }
        Ok(())
    }

    /// Folder of a pod.
    pub fn pod(&self, cookie: NetnsCookie) -> PathBuf {
        self.version.join("pods").join(cookie.to_string())
    }

    /// The folders of links in that of a machine's workload, for all of its cgroups but the first.
    pub fn folders_of(&self, cookie: NetnsCookie) -> Result<Vec<PathBuf>, StoreError> {
        let is_folder = |path: &PathBuf| file_name(path).starts_with("cgroup-");
        Ok(list(&self.pod(cookie))?.into_iter().filter(is_folder).collect())
    }

    /// The names in a folder. Empty if there is no such folder.
    pub fn names_in(&self, folder: &Path) -> Result<BTreeSet<String>, StoreError> {
        Ok(list(folder)?.iter().map(|path| file_name(path).to_owned()).collect())
    }

    /// Cookies of all pods that have a folder, active or not.
    pub fn pods(&self) -> Result<Vec<NetnsCookie>, StoreError> {
        let mut cookies: Vec<NetnsCookie> = list(&self.version.join("pods"))?
            .iter()
            .filter_map(|path| file_name(path).parse().ok().map(NetnsCookie))
            .collect();
        cookies.sort_unstable();
        Ok(cookies)
    }

    /// Writes a record, which is active once its policy is.
    pub fn write_record(&self, record: &Record) -> Result<(), StoreError> {
        let path = self.record_path(record.cookie, record.policy);
        let json = serde_json::to_vec(record).expect("a record has string keys only");
        sys::create_blob("record", &json)
            .and_then(|map| sys::pin(map.as_fd(), &path))
            .map_err(at("writing record", &path))
    }

    /// Replaces the record of the same policy.
    pub fn rewrite_record(&self, record: &Record) -> Result<(), StoreError> {
        let path = self.record_path(record.cookie, record.policy);
        let next = path.with_file_name(format!("next-{}", record.policy));
        let json = serde_json::to_vec(record).expect("a record has string keys only");
        let written = sys::create_blob("record", &json).and_then(|map| sys::pin(map.as_fd(), &next));
        written.and_then(|()| fs::rename(&next, &path)).map_err(at("rewriting record", &path))
    }

    /// The ids of the policies of which a pod has a record, active or not.
    pub fn policies_of(&self, cookie: NetnsCookie) -> Result<Vec<PolicyId>, StoreError> {
        let id = |path: &PathBuf| file_name(path).strip_prefix("record-")?.parse().ok().map(PolicyId);
        Ok(list(&self.pod(cookie))?.iter().filter_map(id).collect())
    }

    /// All records of a pod by the ids of their policies, active or not. Each may be unreadable by itself.
    pub fn records(&self, cookie: NetnsCookie) -> Result<Records, StoreError> {
        let ids = self.policies_of(cookie)?;
        let read = |id| Some((id, self.read_record(cookie, id).transpose()?));
        Ok(ids.into_iter().filter_map(read).collect())
    }

    /// The record of a policy, if there is one.
    pub fn read_record(&self, cookie: NetnsCookie, policy: PolicyId) -> Result<Option<Record>, StoreError> {
        let path = self.record_path(cookie, policy);
        if !path.try_exists().map_err(at("reading record", &path))? {
            return Ok(None);
        }
        let json = read_blob(&path).map_err(at("reading record", &path))?;
        serde_json::from_slice(&json)
            .map(Some)
            .map_err(|source| StoreError::Record { path: path.display().to_string(), source })
    }

    /// As [`Store::read_record`]. `None` too if the record will never be readable; an error if it may be the next time.
    pub fn readable_record(
        &self,
        cookie: NetnsCookie,
        policy: PolicyId,
    ) -> Result<Option<Record>, StoreError> {
        match self.read_record(cookie, policy) {
            Err(error) if error.may_pass() => Err(error),
            read => Ok(read.ok().flatten()),
        }
    }

    /// Removes all records of a pod except that of one policy.
    pub fn drop_other_records(&self, cookie: NetnsCookie, keep: PolicyId) -> Result<(), StoreError> {
        let keep = self.record_path(cookie, keep);
        for path in list(&self.pod(cookie))? {
            if path != keep && ["record-", "next-"].iter().any(|kind| file_name(&path).starts_with(kind)) {
                fs::remove_file(&path).map_err(at("removing", &path))?;
            }
        }
        Ok(())
    }

    fn record_path(&self, cookie: NetnsCookie, policy: PolicyId) -> PathBuf {
        self.pod(cookie).join(format!("record-{policy}"))
    }

    /// Removes a folder with what is pinned in it.
    pub fn remove(&self, path: &Path) -> Result<(), StoreError> {
        match fs::remove_dir_all(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(at("removing", path)(error)),
            _ => Ok(()),
        }
    }

    /// Removes everything.
    pub fn remove_all(&self) -> Result<(), StoreError> {
        self.remove(&self.root)
    }

    /// Creates a folder.
    pub fn create(&self, path: &Path) -> Result<(), StoreError> {
        DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(at("creating", path))
    }
}

/// Reads a pinned map of [`sys::create_blob`].
fn read_blob(path: &Path) -> io::Result<Vec<u8>> {
    let data = aya::maps::MapData::from_pin(path).map_err(io::Error::other)?;
    let len = data.info().map_err(io::Error::other)?.value_size();
    sys::read_blob(data.fd().as_fd(), len as usize)
}

fn file_name(path: &Path) -> &str {
    path.file_name().and_then(|name| name.to_str()).unwrap_or_default()
}

fn list(dir: &Path) -> Result<Vec<PathBuf>, StoreError> {
    match fs::read_dir(dir) {
        Ok(entries) => {
            entries.map(|entry| entry.map(|e| e.path())).collect::<Result<_, _>>().map_err(at("listing", dir))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(at("listing", dir)(error)),
    }
}

fn is_folder(path: &Path) -> Result<bool, StoreError> {
    match fs::metadata(path) {
        Ok(found) => Ok(found.is_dir()),
        Err(error) if is_absent(&error) => Ok(false),
        Err(error) => Err(at("looking for", path)(error)),
    }
}

fn is_bpffs(path: &Path) -> Result<bool, StoreError> {
    const BPF_FS_MAGIC: u64 = 0xcafe_4a11;
    match rustix::fs::statfs(path).map_err(io::Error::from) {
        Ok(stat) => Ok(stat.f_type.cast_unsigned() == BPF_FS_MAGIC),
        Err(error) if is_absent(&error) => Ok(false),
        Err(error) => Err(at("looking for", path)(error)),
    }
}

fn is_absent(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
}

fn ensure_bpffs(path: &Path) -> Result<(), StoreError> {
    if is_bpffs(path)? {
        return Ok(());
    }
    fs::create_dir_all(path).map_err(at("creating", path))?;
    // Two mounts at once would hide the first, with what is in it.
    let _mounting = lock_dir(path.parent().unwrap_or(path), FlockOperation::LockExclusive)?;
    if is_bpffs(path)? {
        return Ok(());
    }
    rustix::mount::mount("bpf", path, "bpf", rustix::mount::MountFlags::empty(), Some(c"mode=0700"))
        .map_err(|source| StoreError::Mount { path: path.display().to_string(), source: source.into() })?;
    tracing::info!(path = %path.display(), "mounted bpffs");
    Ok(())
}
