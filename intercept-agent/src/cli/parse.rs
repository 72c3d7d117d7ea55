//! Parses arguments before clap does, and what flags mean.

use std::{ffi::OsString, path::Path, time::Duration};

use super::{Cli, CniArgs, Command, Deferred, LogFormat, Logging, WhichCapture};
use crate::{
    cgroup::{CgroupDir, CgroupError},
    cni,
    daemon::workload::{WorkloadError, WorkloadRef},
};

/// Parses a namespace of Kubernetes, or an empty string, which excludes no namespace.
pub(super) fn namespace(text: &str) -> Result<String, String> {
    let is_sound = |c: u8| matches!(c, b'a'..=b'z' | b'0'..=b'9' | b'-');
    if text.len() <= 63 && text.bytes().all(is_sound) {
        Ok(text.to_owned())
    } else {
        Err("a namespace consists of at most 63 lower-case letters, digits and `-`".to_owned())
    }
}

/// Parses a reference to a workload.
pub(super) fn workload(text: &str) -> Result<WorkloadRef, WorkloadError> {
    WorkloadRef::parse(text)
}

/// Parses a time in seconds. The limit is below the half minute after which the plugin gives up.
pub(super) fn seconds(text: &str) -> Result<Duration, String> {
    let seconds = text.parse().ok().filter(|seconds| (0.0..=10.0).contains(seconds));
    seconds.map(Duration::from_secs_f64).ok_or_else(|| "give a number of seconds from 0 to 10".to_owned())
}

/// Returns the arguments. If the binary is called by the name of a subcommand (istio-iptables, the CNI plugin), that
/// subcommand is inserted.
pub(super) fn arguments(mut args: impl Iterator<Item = OsString>) -> Vec<OsString> {
    const NAMES: [(&str, &str); 2] = [("istio-iptables", "istio-iptables"), (cni::PLUGIN, "cni")];
    let Some(own) = args.next() else { return Vec::new() };
    let called = Path::new(&own).file_name();
    let subcommand = NAMES.iter().find(|(name, _)| called.is_some_and(|called| called == *name));
    let subcommand = subcommand.map(|(_, subcommand)| OsString::from(subcommand));
    std::iter::once(own).chain(subcommand).chain(args).collect()
}

impl Cli {
    /// A call of the CNI plugin, which logs nothing.
    pub(super) fn plugin() -> Self {
        let logging = Logging { log_format: LogFormat::Text, log: "off".to_owned() };
        Self { logging, command: Command::Cni(Deferred(CniArgs { command: None })) }
    }
}

impl WhichCapture {
    /// Opens its cgroup.
    pub(crate) fn open(&self) -> Result<CgroupDir, CgroupError> {
        match &self.cgroup_path {
            Some(path) => CgroupDir::open_any(path),
            None => CgroupDir::root(),
        }
    }
}

/// Parses a time in minutes, up to a day.
pub(super) fn minutes(text: &str) -> Result<Duration, String> {
    let minutes = text.parse().ok().filter(|minutes| (0.0..=1440.0).contains(minutes));
    let duration = minutes.map(|minutes: f64| Duration::from_secs_f64(60.0 * minutes));
    duration.ok_or_else(|| "give a number of minutes from 0 to 1440".to_owned())
}
