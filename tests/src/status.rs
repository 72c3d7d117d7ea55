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
    pub mode: String,
    pub problem: Option<String>,
    pub since: u64,
    pub cutover: Option<StatusCutover>,
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

/// Rules of iptables that are saved.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "the fields of the JSON, which docs/cutover.md describes")]
pub struct StatusCutover {
    pub rules: String,
    pub since: u64,
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

/// A pod of `status --shadow --json`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[expect(missing_docs, reason = "the fields of the JSON, which docs/shadow.md describes")]
pub struct ShadowEntry {
    pub cgroup: PathBuf,
    pub name: String,
    pub netns_cookie: u64,
    pub since: u64,
    pub compared: u64,
    pub differed: u64,
    pub uncompared: u64,
    pub reasons: Vec<ShadowReason>,
    pub differences: Vec<ShadowDifference>,
}

/// How often the decisions of a reason agreed.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "the fields of the JSON")]
pub struct ShadowReason {
    pub reason: String,
    pub direction: String,
    pub agreed: u64,
    pub differed: u64,
}

/// A kind of difference.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "the fields of the JSON")]
pub struct ShadowDifference {
    pub reason: String,
    pub direction: String,
    pub row: String,
    pub rule: String,
    pub expected: String,
    pub actual: String,
    pub count: u64,
    pub first: ShadowExample,
    pub last: ShadowExample,
}

/// A flow that differed.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "the fields of the JSON")]
pub struct ShadowExample {
    pub time: f64,
    pub protocol: String,
    pub source: std::net::SocketAddr,
    pub destination: std::net::SocketAddr,
    pub original_dst: Option<std::net::SocketAddr>,
    pub uid: Option<u32>,
    pub gid: Option<u32>,
}
