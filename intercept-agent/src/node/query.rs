//! Reads a node: programs, maps, and the attached pods with their records.

use aya::programs::ProgramInfo;
use aya_log::EbpfLogger;
use intercept_common::{layout::PodPolicy, names};

use super::{Node, NodeError};
use crate::{
    cgroup::CgroupDir,
    ids::NetnsCookie,
    maps::Maps,
    record::Record,
    store::{Store, may_pass},
};

/// The attached pods.
#[derive(Debug, Default)]
pub struct PodRecords {
    /// Each with its policy, the oldest first.
    pub readable: Vec<(Record, PodPolicy)>,
    /// Those whose record cannot be read.
    pub broken: Vec<BrokenPod>,
}

/// A pod whose record was written by another version or is damaged. It stays captured, and can be detached or attached
/// again.
#[derive(Debug)]
pub struct BrokenPod {
    /// Cookie of its namespace.
    pub cookie: NetnsCookie,
    /// Its policy.
    pub policy: PodPolicy,
    /// What is wrong.
    pub error: NodeError,
}

impl Node {
    /// Opens the log lines of this build's programs.
    pub fn log_reader(&self) -> Result<EbpfLogger<&'static dyn log::Log>, NodeError> {
        let failed = |source: Box<dyn std::error::Error + Send + Sync>| NodeError::Logs { source };
        let program = ProgramInfo::from_pin(self.store.programs().join(names::SOCK_OPS))
            .map_err(|e| failed(e.into()))?;
        EbpfLogger::init_from_id(program.id()).map_err(|e| failed(e.into()))
    }

    /// The store.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// The maps.
    pub fn maps(&self) -> &Maps {
        &self.maps
    }

    /// Opens the maps again, to read them when the node's lock is no longer held.
    pub fn open_maps(&self) -> Result<Maps, NodeError> {
        Ok(Maps::open(&self.store.maps())?)
    }

    /// The attached pods.
    pub fn pods(&self) -> Result<PodRecords, NodeError> {
        let mut pods = PodRecords::default();
        for (cookie, policy) in self.maps.policies()? {
            match self.store.read_record(cookie, policy.id) {
                Ok(Some(record)) => pods.readable.push((record, policy)),
                // It says nothing about the record.
                Err(error) if error.may_pass() => return Err(error.into()),
                Ok(None) => {
                    pods.broken.push(BrokenPod { cookie, policy, error: NodeError::NoRecord(cookie) })
                }
                Err(error) => pods.broken.push(BrokenPod { cookie, policy, error: error.into() }),
            }
        }
        pods.readable.sort_by_key(|(record, _)| record.since);
        pods.broken.sort_by_key(|pod| pod.cookie);
        Ok(pods)
    }

    /// Opens the cgroups of a pod or workload that are still attached: others of the same names may have taken their place.
    pub fn open_cgroups(&self, record: &Record) -> Result<Vec<CgroupDir>, NodeError> {
        let attached = self.cgroups_of(record.cookie)?;
        let mut opened = Vec::new();
        for path in record.cgroups() {
            match CgroupDir::open_any(path) {
                Ok(cgroup) if attached.contains(&cgroup.id()) => opened.push(cgroup),
                Err(error) if may_pass(&error) => return Err(error.into()),
                _ => {}
            }
        }
        Ok(opened)
    }

    /// Returns the pod that is attached to this cgroup. Its links say so; its record is not read.
    pub fn pod_of_cgroup(&self, cgroup_id: u64) -> Result<Option<(NetnsCookie, PodPolicy)>, NodeError> {
        for (cookie, policy) in self.maps.policies()? {
            if self.cgroups_of(cookie)?.contains(&cgroup_id) {
                return Ok(Some((cookie, policy)));
            }
        }
        Ok(None)
    }

    /// The record of a namespace's active policy, if it can be read.
    pub fn record_of(&self, cookie: NetnsCookie) -> Result<Option<Record>, NodeError> {
        let Some(policy) = self.maps.policy(cookie)? else { return Ok(None) };
        Ok(self.store.readable_record(cookie, policy.id)?)
    }
}
