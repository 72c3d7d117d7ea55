//! Folders and files that the agent trusts: only root can write to them or replace them.

use std::{
    fs::{self, DirBuilder, File},
    io::{self, Read as _},
    os::{
        fd::AsFd as _,
        unix::fs::{DirBuilderExt as _, MetadataExt as _},
    },
    path::{Path, PathBuf},
};

use rustix::fs::{Mode, OFlags};

/// Mode of the folders that the agent creates.
const OWN_MODE: u32 = 0o700;
/// How often a folder is created that another process removes at the same time.
const CREATE_ATTEMPTS: u32 = 100;
/// Mode bits that let others than the owner write.
const WRITABLE: u32 = 0o022;
/// Mode bit of a folder in which users can replace only their own files.
const STICKY: u32 = 0o1000;

/// A folder or file cannot be trusted or opened.
#[derive(Debug, thiserror::Error)]
pub enum OwnershipError {
    /// A system call failed.
    #[error("{action} {path}")]
    Io {
        /// The operation.
        action: &'static str,
        /// Its path.
        path: String,
        /// The error from the kernel.
        #[source]
        source: io::Error,
    },
    /// Another user owns it.
    #[error(
        "refusing {path}: it belongs to user {uid}, who could change it; give it to root with `chown root {path}`"
    )]
    Owner {
        /// The folder or file.
        path: String,
        /// The owner's user id.
        uid: u32,
    },
    /// Others than root can write to it.
    #[error(
        "refusing {path}: its mode {mode:04o} lets others than root write to it; change it with `chmod go-w {path}`"
    )]
    Writable {
        /// The folder or file.
        path: String,
        /// Its permission bits.
        mode: u32,
    },
    /// A symbolic link, a pipe, a device or another special file.
    #[error("refusing {path}: it is not a regular file")]
    NotRegular {
        /// The path.
        path: String,
    },
    /// The file is too long for its purpose.
    #[error("refusing {path}: it is longer than {limit} bytes")]
    TooLong {
        /// The file.
        path: String,
        /// Longest length in bytes.
        limit: u64,
    },
}

impl OwnershipError {
    /// Whether the folder or file does not exist.
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::Io { source, .. } if source.kind() == io::ErrorKind::NotFound)
    }

    /// Whether another process may have removed or created a folder between two system calls.
    fn is_race(&self) -> bool {
        let kinds = [io::ErrorKind::NotFound, io::ErrorKind::AlreadyExists];
        matches!(self, Self::Io { source, .. } if kinds.contains(&source.kind()))
    }
}

fn at(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> OwnershipError {
    let path = path.display().to_string();
    move |source| OwnershipError::Io { action, path, source }
}

/// A folder that only root can change, held open.
#[derive(Debug)]
pub struct OwnedFolder {
    path: PathBuf,
    file: File,
}

impl OwnedFolder {
    /// Opens an existing folder. It must not be a symbolic link, and no folder above it may let others replace it.
    pub fn open(path: &Path) -> Result<Self, OwnershipError> {
        let absolute = std::path::absolute(path).map_err(at("opening folder", path))?;
        let parent = absolute.parent().unwrap_or(&absolute);
        let parent = fs::canonicalize(parent).map_err(at("opening folder", path))?;
        for ancestor in parent.ancestors() {
            let metadata =
                fs::symlink_metadata(ancestor).map_err(at("reading the attributes of", ancestor))?;
            let sticky = metadata.mode() & STICKY != 0;
            check(ancestor, metadata.uid(), if sticky { 0 } else { metadata.mode() })?;
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = rustix::fs::open(&absolute, flags, Mode::empty())
            .map_err(io::Error::from)
            .map_err(at("opening folder", path))?;
        let file = File::from(file);
        let metadata = file.metadata().map_err(at("reading the attributes of", path))?;
        check(path, metadata.uid(), metadata.mode())?;
        Ok(Self { path: path.to_owned(), file })
    }

    /// Opens a folder, and creates it with mode 0700 if it does not exist.
    pub fn create(path: &Path) -> Result<Self, OwnershipError> {
        let mut result = Self::try_create(path);
        for _ in 1..CREATE_ATTEMPTS {
            match &result {
                Err(error) if error.is_race() => result = Self::try_create(path),
                _ => break,
            }
        }
        result
    }

    fn try_create(path: &Path) -> Result<Self, OwnershipError> {
        let created = DirBuilder::new().recursive(true).mode(OWN_MODE).create(path);
        created.map_err(at("creating folder", path))?;
        Self::open(path)
    }

    /// Returns the path passed to [`OwnedFolder::open`] or [`OwnedFolder::create`].
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Opens a file for locking, and creates it with mode 0600 if it does not exist. Symbolic links are refused.
    pub fn lock_file(&self, name: &Path) -> Result<File, OwnershipError> {
        self.open_file(name, OFlags::RDWR | OFlags::CREATE)
    }

    /// Reads a regular file of at most `limit` bytes.
    pub fn read(&self, name: &Path, limit: u64) -> Result<Vec<u8>, OwnershipError> {
        let file = self.open_file(name, OFlags::RDONLY)?;
        let path = self.path.join(name);
        let mut bytes = Vec::new();
        file.take(limit + 1).read_to_end(&mut bytes).map_err(at("reading", &path))?;
        if u64::try_from(bytes.len()).is_ok_and(|length| length > limit) {
            return Err(OwnershipError::TooLong { path: path.display().to_string(), limit });
        }
        Ok(bytes)
    }

    fn open_file(&self, name: &Path, flags: OFlags) -> Result<File, OwnershipError> {
        let path = self.path.join(name);
        // O_NONBLOCK, so that opening a FIFO returns at once.
        let flags = flags | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let opened = rustix::fs::openat(self.file.as_fd(), name, flags, Mode::RUSR | Mode::WUSR);
        let file = match opened {
            Ok(file) => File::from(file),
            Err(rustix::io::Errno::LOOP) => {
                return Err(OwnershipError::NotRegular { path: path.display().to_string() });
            }
            Err(error) => return Err(at("opening", &path)(error.into())),
        };
        let metadata = file.metadata().map_err(at("reading the attributes of", &path))?;
        if !metadata.is_file() {
            return Err(OwnershipError::NotRegular { path: path.display().to_string() });
        }
        check(&path, metadata.uid(), metadata.mode())?;
        Ok(file)
    }
}

/// Whether an open folder is the one at the path, where another process may have removed it and created it again.
pub fn is_at(dir: &File, path: &Path) -> bool {
    let folder = |found: fs::Metadata| (found.dev(), found.ino());
    let own = dir.metadata().map(folder).ok();
    own.is_some() && fs::metadata(path).map(folder).ok() == own
}

fn check(path: &Path, uid: u32, mode: u32) -> Result<(), OwnershipError> {
    let path = || path.display().to_string();
    if uid != 0 {
        return Err(OwnershipError::Owner { path: path(), uid });
    }
    if mode & WRITABLE != 0 {
        return Err(OwnershipError::Writable { path: path(), mode: mode & 0o7777 });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt as _, chown, symlink};

    use super::*;

    fn folder() -> tempfile::TempDir {
        tempfile::tempdir().expect("a folder")
    }

    fn set_mode(path: &Path, mode: u32) {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("changed");
    }

    fn refused(path: &Path) -> String {
        OwnedFolder::open(path).expect_err("refused").to_string()
    }

    #[test]
    fn a_created_folder_is_closed_to_others() {
        let dir = folder();
        let path = dir.path().join("a/b");
        OwnedFolder::create(&path).expect("created");
        for path in [&path, &dir.path().join("a")] {
            assert_eq!(fs::metadata(path).expect("there").mode() & 0o7777, 0o700, "{}", path.display());
        }
        OwnedFolder::create(&path).expect("opened again");
    }

    #[test]
    fn a_folder_that_others_can_change_is_refused() {
        let dir = folder();
        let (above, path) = (dir.path().join("above"), dir.path().join("above/own"));
        fs::create_dir_all(&path).expect("created");
        for mode in [0o777, 0o775, 0o757, 0o1777] {
            set_mode(&path, mode);
            let error = refused(&path);
            assert!(error.contains("above/own") && error.contains("chmod go-w"), "{mode:o}: {error}");
        }
        set_mode(&path, 0o755);
        OwnedFolder::open(&path).expect("others may only read it");
        chown(&path, Some(1234), None).expect("given away");
        assert!(refused(&path).contains("belongs to user 1234"));
        chown(&path, Some(0), None).expect("taken back");

        set_mode(&above, 0o777);
        assert!(refused(&path).contains("above: its mode 0777"), "it could be replaced");
        set_mode(&above, 0o1777);
        OwnedFolder::open(&path).expect("sticky: it cannot be replaced");
        let link = dir.path().join("link");
        symlink(&path, &link).expect("linked");
        assert!(OwnedFolder::open(&link).is_err(), "a link in its place");
    }

    #[test]
    fn only_short_regular_files_of_root_are_read() {
        let dir = folder();
        let own = OwnedFolder::open(dir.path()).expect("opened");
        let path = |name: &str| dir.path().join(name);
        let read = |name: &str| own.read(Path::new(name), 10);
        fs::write(path("file"), "0123456789").expect("written");
        assert_eq!(read("file").expect("read"), b"0123456789");
        fs::write(path("file"), "0123456789a").expect("written");
        assert!(matches!(read("file"), Err(OwnershipError::TooLong { limit: 10, .. })));

        let mknod = |name: &str, kind, device| {
            rustix::fs::mknodat(rustix::fs::CWD, path(name), kind, Mode::RUSR, device).expect("made");
        };
        mknod("fifo", rustix::fs::FileType::Fifo, 0);
        symlink("/dev/zero", path("link")).expect("linked");
        fs::create_dir(path("folder")).expect("made");
        for name in ["fifo", "link", "folder"] {
            assert!(matches!(read(name), Err(OwnershipError::NotRegular { .. })), "{name}");
        }
        assert!(read("absent").expect_err("absent").is_not_found());

        fs::write(path("file"), "short").expect("written");
        set_mode(&path("file"), 0o646);
        assert!(matches!(read("file"), Err(OwnershipError::Writable { mode: 0o646, .. })));
        set_mode(&path("file"), 0o644);
        chown(path("file"), Some(1234), None).expect("given away");
        assert!(matches!(read("file"), Err(OwnershipError::Owner { uid: 1234, .. })));
    }

    #[test]
    fn a_folder_that_comes_and_goes_is_opened() {
        let dir = folder();
        let path = dir.path().join("own");
        let stop = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    _ = fs::remove_dir(&path);
                    // Several attempts fit in between.
                    std::thread::sleep(std::time::Duration::from_micros(200));
                }
            });
            let failed = (0..20_000).find_map(|_| OwnedFolder::create(&path).err());
            stop.store(true, std::sync::atomic::Ordering::Relaxed);
            assert!(failed.is_none(), "{failed:?}");
        });
        fs::write(dir.path().join("file"), "").expect("written");
        OwnedFolder::create(&dir.path().join("file")).expect_err("a file is in its place");
    }

    #[test]
    fn a_lock_is_not_opened_through_a_link() {
        let dir = folder();
        let own = OwnedFolder::open(dir.path()).expect("opened");
        let target = dir.path().join("target");
        fs::write(&target, "precious").expect("written");
        symlink(&target, dir.path().join("lock")).expect("linked");
        assert!(matches!(own.lock_file(Path::new("lock")), Err(OwnershipError::NotRegular { .. })));
        own.lock_file(Path::new("other")).expect("created");
        assert_eq!(fs::read_to_string(&target).expect("read"), "precious");
    }
}
