//! Locks of folders that the agent that has the lock may remove.

use std::{fs::File, io, os::fd::AsRawFd as _, path::Path};

use rustix::{
    fs::FlockOperation,
    process::{Resource, getrlimit},
};

use super::{StoreError, at};
use crate::ownership::is_at;

/// A lock on the store: of the one agent that changes it, or of the daemon that keeps its programs.
pub struct Lock(pub(super) File);

/// The folder of a lock that was given up, still open.
pub struct Unlocked(pub(super) File);

impl Lock {
    /// As [`require_descriptors`].
    pub fn require_descriptors(&self, count: u8) -> io::Result<()> {
        require_descriptors(&self.0, count)
    }

    /// Gives the lock up. `None` if it goes with the descriptor only.
    pub fn unlock(self) -> Option<Unlocked> {
        rustix::fs::flock(&self.0, FlockOperation::Unlock).is_ok().then_some(Unlocked(self.0))
    }
}

/// Fails unless this process may open so many more descriptors than `one`.
pub fn require_descriptors(one: &File, count: u8) -> io::Result<()> {
    let another = || rustix::io::fcntl_dupfd_cloexec(one, 0);
    let lowest = another()?;
    let limit = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    // Few above the lowest free one are open, so that with many left they need not be tried.
    if limit.saturating_sub(lowest.as_raw_fd().cast_unsigned().into()) >= u64::from(count) * 4 {
        return Ok(());
    }
    let more = std::iter::repeat_with(another).take(count.into());
    Ok(more.collect::<Result<Vec<_>, _>>().map(drop)?)
}

/// Locks the folder that is at the path once it has the lock: the agent that had it may have removed the folder, and another one
/// may have created it again.
pub(super) fn lock_dir(path: &Path, operation: FlockOperation) -> Result<Lock, StoreError> {
    loop {
        let dir = File::open(path).map_err(at("opening", path))?;
        flock(&dir, path, operation)?;
        if is_at(&dir, path) {
            return Ok(Lock(dir));
        }
    }
}

pub(super) fn flock(dir: &File, path: &Path, operation: FlockOperation) -> Result<(), StoreError> {
    rustix::fs::flock(dir, operation).map_err(io::Error::from).map_err(at("locking", path))
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::MetadataExt as _, thread, time::Duration};

    use super::*;

    #[test]
    fn the_lock_of_a_removed_folder_does_not_count() {
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join("own");
        fs::create_dir(&path).expect("created");
        let first = lock_dir(&path, FlockOperation::LockExclusive).expect("locked");
        thread::scope(|scope| {
            let waiting = scope.spawn(|| lock_dir(&path, FlockOperation::LockExclusive));
            let number = fs::metadata(&path).expect("there").ino().to_string();
            let is_waiting = || {
                let locks = fs::read_to_string("/proc/locks").expect("read");
                locks.lines().any(|line| line.contains("->") && line.contains(&format!(":{number} ")))
            };
            while !is_waiting() {
                thread::sleep(Duration::from_millis(1));
            }
            fs::remove_dir(&path).expect("removed");
            fs::create_dir(&path).expect("created again");
            drop(first);
            let lock = waiting.join().expect("no panic").expect("locked");
            assert!(is_at(&lock.0, &path), "it waited for the folder that is gone");
            let next = lock_dir(&path, FlockOperation::NonBlockingLockExclusive);
            assert!(next.is_err_and(|error| !error.is_not_found()), "the new folder is not locked");
        });
        fs::remove_dir(&path).expect("removed");
        let absent = lock_dir(&path, FlockOperation::LockExclusive);
        assert!(absent.is_err_and(|error| error.is_not_found()));
    }
}
