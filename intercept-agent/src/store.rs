//! The agent's folder in bpffs, which is all of its state:
//!
//! ```text
//! BPFFS/intercept/v<layout>/maps/NAME               shared by all pods
//! BPFFS/intercept/v<layout>/programs-<digest>/NAME  shared by all pods; the digest is that of the object
//! BPFFS/intercept/v<layout>/pods/<cookie>/<link>    one for each program
//! BPFFS/intercept/v<layout>/pods/<cookie>/record-<policy id>
//! ```
//!
//! A pod is in force when POLICIES has its cookie; the record in force is the one that is named by that policy's id. All
//! else is on its way in or out, and may be swept.

use std::{
    fs::{self, DirBuilder, File},
    io,
    os::{
        fd::AsFd as _,
        unix::fs::{DirBuilderExt as _, MetadataExt as _},
    },
    path::{Path, PathBuf},
};

use crate::{
    ids::{NetnsCookie, PolicyId},
    ownership::{OwnedFolder, OwnershipError},
    record::Record,
    sys,
};
use intercept_common::{layout, names};
use rustix::fs::FlockOperation;

/// Where bpffs is mounted unless `--bpffs` says otherwise.
pub const DEFAULT_BPFFS: &str = "/sys/fs/bpf";

/// A step on the store failed.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The folder is there but is no bpffs, and nothing can be mounted on it.
    #[error(
        "mounting bpffs on {path}: run as root with CAP_SYS_ADMIN, or mount it with `mount -t bpf bpf {path}`"
    )]
    Mount {
        /// The folder.
        path: String,
        /// The kernel's word.
        #[source]
        source: io::Error,
    },
    /// A call on a path failed.
    #[error("{action} {path}")]
    Path {
        /// What was attempted.
        action: &'static str,
        /// On what.
        path: String,
        /// The kernel's word.
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
    /// A record does not read.
    #[error("reading record {path}, of another version or damaged: attach the pod again, or detach it")]
    Record {
        /// The pin.
        path: String,
        /// What is wrong with it.
        #[source]
        source: serde_json::Error,
    },
}

impl StoreError {
    /// Whether it is about a shortage of memory or descriptors, so that a later call may succeed.
    pub fn may_pass(&self) -> bool {
        let Self::Path { source, .. } = self else { return false };
        // aya's errors hold the kernel's word further down.
        let mut errors =
            std::iter::successors(Some(source as &dyn std::error::Error), |error| error.source());
        let code = errors.find_map(|error| error.downcast_ref::<io::Error>()?.raw_os_error());
        let is_short = [libc::ENOMEM, libc::EMFILE, libc::ENFILE, libc::EINTR, libc::EAGAIN];
        code.is_some_and(|code| is_short.contains(&code))
    }
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
    digest: String,
}

/// Held while the store is changed: one agent at a time. Or by the daemon, while its programs are to stay.
pub struct Lock(#[expect(dead_code, reason = "the lock goes with the descriptor")] File);

/// The records of a pod by the id of their policy, each as far as it can be read.
pub type Records = Vec<(PolicyId, Result<Record, StoreError>)>;

impl Store {
    /// The store in this bpffs, which is mounted if it is not.
    pub fn open(bpffs: &Path) -> Result<Self, StoreError> {
        ensure_bpffs(bpffs)?;
        Ok(Self::at(bpffs))
    }

    /// The store in this bpffs if it is mounted there: for those who only look.
    pub fn find(bpffs: &Path) -> Option<Self> {
        let store = Self::at(bpffs);
        if !is_bpffs(bpffs) || !store.maps().is_dir() {
            return None;
        }
        match OwnedFolder::open(&store.root) {
            Ok(_) => Some(store),
            Err(error) => {
                tracing::warn!(error = &error as &dyn std::error::Error, "this state is not the agent's");
                None
            }
        }
    }

    /// The store in this bpffs, whichever layouts it has. None if there is no folder.
    pub fn find_any(bpffs: &Path) -> Option<Self> {
        let store = Self::at(bpffs);
        (is_bpffs(bpffs) && store.root.is_dir()).then_some(store)
    }

    /// The same store, once for each layout that it has.
    pub fn layouts(&self) -> Result<Vec<Self>, StoreError> {
        Ok(list(&self.root)?.into_iter().map(|version| Self { version, ..self.clone() }).collect())
    }

    /// A store of this process's own beside the real one, to try things in; its user removes it.
    pub fn scratch(bpffs: &Path) -> Result<Self, StoreError> {
        ensure_bpffs(bpffs)?;
        let root = bpffs.join(format!("intercept-check-{}", std::process::id()));
        Ok(Self::with_root(root))
    }

    fn at(bpffs: &Path) -> Self {
        Self::with_root(bpffs.join("intercept"))
    }

    fn with_root(root: PathBuf) -> Self {
        Self {
            version: root.join(format!("v{}", layout::VERSION)),
            root,
            digest: digest(&[crate::programs::OBJECT, crate::acceleration::OBJECT]),
        }
    }

    /// Wait for the store to be ours.
    pub fn lock(&self) -> Result<Lock, StoreError> {
        OwnedFolder::create(&self.root)?;
        lock_dir(&self.root, FlockOperation::LockExclusive)
    }

    /// Have programs and maps stay while this is held, also when no pod uses them, and be the one daemon that keeps the
    /// pods of this store. Does not wait.
    pub fn keep(&self) -> Result<Lock, StoreError> {
        self.lock_version(FlockOperation::NonBlockingLockExclusive).map_err(|error| match error {
            StoreError::Path { source, .. } if source.kind() == io::ErrorKind::WouldBlock => {
                StoreError::OtherDaemon { path: self.version.display().to_string() }
            }
            error => error,
        })
    }

    /// Whether somebody has programs and maps stay.
    pub fn is_kept(&self) -> bool {
        self.version.is_dir() && self.lock_version(FlockOperation::NonBlockingLockExclusive).is_err()
    }

    /// Be the one reader of the events of `trace`; an error when somebody else is.
    pub fn lock_events(&self) -> Result<Lock, StoreError> {
        lock_dir(&self.maps(), FlockOperation::NonBlockingLockExclusive)
    }

    fn lock_version(&self, operation: FlockOperation) -> Result<Lock, StoreError> {
        self.create(&self.version)?;
        lock_dir(&self.version, operation)
    }

    /// A map that is not there, if any: of a store whose first agent died while it made them.
    pub fn missing_map(&self) -> Option<&'static str> {
        names::MAPS.into_iter().find(|name| !self.maps().join(name).exists())
    }

    /// The inode of the folder of maps: it tells whether the maps are still the ones that were opened.
    pub fn generation(&self) -> Option<u64> {
        fs::metadata(self.maps()).ok().map(|folder| folder.ino())
    }

    /// Folder of the maps.
    pub fn maps(&self) -> PathBuf {
        self.version.join("maps")
    }

    /// Folder of the programs of this very build.
    pub fn programs(&self) -> PathBuf {
        self.version.join(format!("programs-{}", self.digest))
    }

    /// Folders of the programs of other builds.
    pub fn other_programs(&self) -> Result<Vec<PathBuf>, StoreError> {
        let own = self.programs();
        Ok(list(&self.version)?
            .into_iter()
            .filter(|path| *path != own && file_name(path).starts_with("programs-"))
            .collect())
    }

    /// The folder of another layout version that holds pods, if there is one.
    pub fn other_layout(&self) -> Result<Option<PathBuf>, StoreError> {
        let own = &self.version;
        for version in list(&self.root)? {
            if version != *own && !list(&version.join("pods"))?.is_empty() {
                return Ok(Some(version));
            }
        }
        Ok(None)
    }

    /// Take out maps and programs of other layout versions that no pod uses and no daemon keeps.
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

    /// Cookies of all pods that have a folder, in force or not.
    pub fn pods(&self) -> Result<Vec<NetnsCookie>, StoreError> {
        let mut cookies: Vec<NetnsCookie> = list(&self.version.join("pods"))?
            .iter()
            .filter_map(|path| file_name(path).parse().ok().map(NetnsCookie))
            .collect();
        cookies.sort_unstable();
        Ok(cookies)
    }

    /// Write a record; it counts once its policy is in force.
    pub fn write_record(&self, record: &Record) -> Result<(), StoreError> {
        let path = self.record_path(record.cookie, record.policy);
        let json = serde_json::to_vec(record).expect("a record has string keys only");
        sys::create_blob("record", &json)
            .and_then(|map| sys::pin(map.as_fd(), &path))
            .map_err(at("writing record", &path))
    }

    /// Write a record in place of the one of the same policy.
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
        if !path.exists() {
            return Ok(None);
        }
        let read = || {
            let data = aya::maps::MapData::from_pin(&path).map_err(io::Error::other)?;
            let len = data.info().map_err(io::Error::other)?.value_size();
            sys::read_blob(data.fd().as_fd(), len as usize)
        };
        let json = read().map_err(at("reading record", &path))?;
        serde_json::from_slice(&json)
            .map(Some)
            .map_err(|source| StoreError::Record { path: path.display().to_string(), source })
    }

    /// Take out all records of a pod but that of one policy.
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

    /// Take out a folder with what is pinned in it.
    pub fn remove(&self, path: &Path) -> Result<(), StoreError> {
        match fs::remove_dir_all(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(at("removing", path)(error)),
            _ => Ok(()),
        }
    }

    /// Take out everything.
    pub fn remove_all(&self) -> Result<(), StoreError> {
        self.remove(&self.root)
    }

    /// Make a folder.
    pub fn create(&self, path: &Path) -> Result<(), StoreError> {
        DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(at("creating", path))
    }
}

fn lock_dir(path: &Path, operation: FlockOperation) -> Result<Lock, StoreError> {
    let dir = File::open(path).map_err(at("opening", path))?;
    rustix::fs::flock(&dir, operation).map_err(io::Error::from).map_err(at("locking", path))?;
    Ok(Lock(dir))
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

fn is_bpffs(path: &Path) -> bool {
    const BPF_FS_MAGIC: u64 = 0xcafe_4a11;
    rustix::fs::statfs(path).is_ok_and(|stat| stat.f_type.cast_unsigned() == BPF_FS_MAGIC)
}

fn ensure_bpffs(path: &Path) -> Result<(), StoreError> {
    if is_bpffs(path) {
        return Ok(());
    }
    fs::create_dir_all(path).map_err(at("creating", path))?;
    rustix::mount::mount("bpf", path, "bpf", rustix::mount::MountFlags::empty(), Some(c"mode=0700"))
        .map_err(|source| StoreError::Mount { path: path.display().to_string(), source: source.into() })?;
    tracing::info!(path = %path.display(), "mounted bpffs");
    Ok(())
}

/// Names an object in a path (bpffs allows no dots). Tells builds apart; guards against nothing.
fn digest(objects: &[&[u8]]) -> String {
    use std::hash::{Hash as _, Hasher as _};
    let mut hasher = std::hash::DefaultHasher::new();
    objects.hash(&mut hasher);
    format!("{:016x}", hasher.finish())
}
