//! What a source desires for one pod.

use std::{
    collections::BTreeMap,
    fmt,
    path::PathBuf,
    sync::{LazyLock, Mutex, PoisonError},
};

use clap::{Args as _, Command, FromArgMatches as _};
use serde::{Deserialize, Serialize};

use crate::{
    cgroup::CgroupDir,
    ids::{NetnsCookie, PodUid},
    options::{Config, EtcFiles, OptionError, RawOptions},
    record::{Record, RecordOrigin},
};

use super::{mode::PodMode, takeover::Takeover};

/// The identity of a pod, the same for all sources.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Key {
    /// A file of the folder.
    File(String),
    /// A pod by its UID, or a sandbox by its id.
    Pod(PodUid),
    /// A pod that was attached by a command, by the cookie of its namespace.
    Command(NetnsCookie),
}

impl Key {
    /// The identity of an attached pod.
    pub fn of_record(record: &Record) -> Self {
        match &record.origin {
            RecordOrigin::Command => Self::Command(record.cookie),
            RecordOrigin::File { name } => Self::File(name.clone()),
            RecordOrigin::Pod { uid, .. } => Self::Pod(uid.clone()),
        }
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(name) => write!(f, "file/{name}"),
            Self::Pod(uid) => write!(f, "pod/{uid}"),
            Self::Command(cookie) => write!(f, "command/{cookie}"),
        }
    }
}

/// A pod to capture.
#[derive(Clone, Debug, PartialEq)]
pub struct DesiredPod {
    /// The source that asks for it.
    pub origin: RecordOrigin,
    /// Its cgroup.
    pub cgroup: PathBuf,
    /// Its namespace; by default that of its processes.
    pub netns: Option<PathBuf>,
    /// What to capture.
    pub options: CaptureOptions,
    /// Whether it is cut over from rules of its own.
    pub takeover: Takeover,
}

/// The options of a capture.
#[derive(Clone, Debug, PartialEq)]
pub enum CaptureOptions {
    /// The options of `attach`.
    Args(CaptureArgs),
    /// Already validated.
    Config(Box<Config>),
}

/// The options of `attach`: its flags, and its environment.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CaptureArgs {
    /// Flags and their values, as on the command line.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub arguments: Vec<String>,
    /// The variables of the options; the daemon's own environment does not count.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub environment: BTreeMap<String, String>,
}

/// Why options are refused.
#[derive(Debug, thiserror::Error)]
pub enum CaptureArgsError {
    /// Not flags of `attach`.
    #[error("reading the options: {}", first_line(.0))]
    Flags(clap::Error),
    /// A value is wrong.
    #[error(transparent)]
    Value(#[from] OptionError),
    /// An option that is an action rather than part of a policy.
    #[error(
        "option {0} is for one run of the command line: a pod of the daemon takes options of what to capture alone"
    )]
    Switch(&'static str),
}

/// Without the usage that clap appends, because there is no command here.
fn first_line(error: &clap::Error) -> String {
    let text = error.to_string();
    let line = text.lines().next().unwrap_or_default();
    line.strip_prefix("error: ").unwrap_or(line).to_owned()
}

impl CaptureArgs {
    /// Validates the options, with the users, groups and resolvers of the pod if it has a process.
    pub fn validate(&self, cgroup: &CgroupDir) -> Result<Config, CaptureArgsError> {
        self.validate_with(&EtcFiles::of_pod(cgroup))
    }

    /// Whether these are valid options of shadow mode.
    pub fn is_shadow(&self) -> bool {
        self.check().is_ok_and(|config| config.shadow)
    }

    /// Validates options that name no user or group.
    pub fn check(&self) -> Result<Config, CaptureArgsError> {
        self.validate_with(&EtcFiles::below("/"))
    }

    fn validate_with(&self, files: &EtcFiles) -> Result<Config, CaptureArgsError> {
        /// Made once: that takes longer than reading options.
        static COMMAND: LazyLock<Mutex<Command>> = LazyLock::new(|| {
            let command = Command::new("pod").no_binary_name(true).disable_help_flag(true);
            Mutex::new(RawOptions::augment_args(command))
        });
        let matches = COMMAND
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .try_get_matches_from_mut(&self.arguments)
            .map_err(CaptureArgsError::Flags)?;
        let raw = RawOptions::from_arg_matches(&matches).map_err(CaptureArgsError::Flags)?;
        let raw = raw.read_env(|name| self.environment.get(name).cloned());
        let (config, switches, _notes) = raw.validate(files)?;
        for (set, name) in [
            (switches.dry_run, "--dry-run"),
            (switches.cleanup_only, "--cleanup-only"),
            (switches.skip_rule_apply, "--skip-rule-apply"),
            (switches.run_validation, "--run-validation"),
            (switches.network_namespace.is_some(), "--network-namespace"),
        ] {
            if set {
                return Err(CaptureArgsError::Switch(name));
            }
        }
        Ok(config)
    }
}

impl CaptureOptions {
    /// Whether nothing is changed for the pod.
    pub fn is_shadow(&self) -> bool {
        match self {
            Self::Args(given) => given.is_shadow(),
            Self::Config(config) => config.shadow,
        }
    }

    /// The mode that they are for.
    pub fn mode(&self) -> PodMode {
        if self.is_shadow() { PodMode::Shadow } else { PodMode::Enforce }
    }
}

impl DesiredPod {
    /// The desired pod that a record describes.
    pub fn of_record(record: &Record) -> Self {
        Self {
            origin: record.origin.clone(),
            cgroup: record.cgroup.clone(),
            netns: record.netns_path.clone(),
            options: CaptureOptions::Config(Box::new(record.config.clone())),
            takeover: Takeover::None,
        }
    }

    /// Whether something else captures the pod until the programs do, so that nothing depends on its capture.
    pub fn is_optional(&self) -> bool {
        self.takeover != Takeover::None || self.options.is_shadow()
    }

    /// Its name for logs: `namespace/name`, if it has these.
    pub fn name(&self) -> String {
        self.origin.name().unwrap_or_else(|| self.cgroup.display().to_string())
    }
}
