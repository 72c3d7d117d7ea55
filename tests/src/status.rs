//! What `status --json` prints, typed.

use std::path::PathBuf;

use intercept_agent::facade::daemon::PodReport;
use serde::Deserialize;

/// An attached pod. Of one whose record cannot be read (`broken`), most fields are empty.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[expect(missing_docs, reason = "the fields of the JSON, which docs/operations.md describes")]
pub struct StatusEntry {
    pub cgroup: PathBuf,
    pub cgroup_id: Option<u64>,
    pub netns_inode: u64,
    pub netns_cookie: u64,
    pub state: String,
    pub problem: Option<String>,
    pub since: u64,
    pub arguments: Vec<String>,
    pub environment: Vec<(String, String)>,
    pub policy: u32,
    pub connections: u64,
    pub max_connections: u32,
    pub room: Vec<StatusRoom>,
    pub listeners: Vec<StatusListener>,
    pub mptcp_listeners: Vec<StatusListener>,
    pub decisions: Vec<StatusCount>,
    pub failures: Vec<StatusCount>,
    pub acceleration: Option<StatusAcceleration>,
    pub daemon: Option<PodReport>,
}

/// A pod's entries in a map, and its budget.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "the fields of the JSON")]
pub struct StatusRoom {
    pub map: String,
    pub used: usize,
    pub limit: u32,
}

/// A registered listener.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "the fields of the JSON")]
pub struct StatusListener {
    pub port: u16,
    pub family: u8,
}

/// How often something was counted.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "the fields of the JSON")]
pub struct StatusCount {
    pub reason: String,
    pub count: u64,
}

/// Joined connections of a pod.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "the fields of the JSON")]
pub struct StatusAcceleration {
    pub state: String,
    pub connections: Vec<StatusCount>,
    pub back_to_tcp: Vec<StatusCount>,
}

/// The count of a reason, 0 if it is not listed.
pub fn count_of(counts: &[StatusCount], reason: &str) -> u64 {
    counts.iter().find(|count| count.reason == reason).map_or(0, |count| count.count)
}
