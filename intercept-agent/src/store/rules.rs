//! The rules of iptables of a pod that is cut over, pinned beside its record.

use std::{fs, io, os::fd::AsFd as _, path::PathBuf};

use rustix::fs::FlockOperation;

use super::{Lock, Store, StoreError, at, lock_dir, read_blob};
use crate::{cutover::SavedRules, ids::NetnsCookie, ownership::is_at, sys};

impl Store {
    /// Waits until no other process cuts the pod over.
    pub fn lock_pod(&self, cookie: NetnsCookie) -> Result<Lock, StoreError> {
        lock_dir(&self.pod(cookie), FlockOperation::LockExclusive)
    }

    /// Whether a pod's lock is still that of its folder: a detach removes the folder.
    pub fn is_lock_of(&self, Lock(dir): &Lock, cookie: NetnsCookie) -> bool {
        is_at(dir, &self.pod(cookie))
    }

    fn rules_path(&self, cookie: NetnsCookie) -> PathBuf {
        self.pod(cookie).join("rules")
    }

    /// The pod's rules, if it is cut over or about to be.
    pub fn saved_rules(&self, cookie: NetnsCookie) -> Result<Option<SavedRules>, StoreError> {
        let path = self.rules_path(cookie);
        if !path.try_exists().map_err(at("reading saved rules", &path))? {
            return Ok(None);
        }
        let json = read_blob(&path).map_err(at("reading saved rules", &path))?;
        serde_json::from_slice(&json)
            .map(Some)
            .map_err(|source| StoreError::Rules { path: path.display().to_string(), source })
    }

    /// Replaces the pod's rules.
    pub fn save_rules(&self, cookie: NetnsCookie, rules: &SavedRules) -> Result<(), StoreError> {
        let path = self.rules_path(cookie);
        let next = path.with_file_name("next-rules");
        let json = serde_json::to_vec(rules).expect("rules have string keys only");
        // Left by a process that was killed.
        _ = fs::remove_file(&next);
        let written = sys::create_blob("rules", &json).and_then(|map| sys::pin(map.as_fd(), &next));
        written.and_then(|()| fs::rename(&next, &path)).map_err(at("saving rules", &path))
    }

    /// Removes the pod's rules.
    pub fn forget_rules(&self, cookie: NetnsCookie) -> Result<(), StoreError> {
        let path = self.rules_path(cookie);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(at("removing", &path)(error)),
            _ => Ok(()),
        }
    }
}
