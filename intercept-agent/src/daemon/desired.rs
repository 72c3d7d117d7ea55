//! What a source desires for one pod.

use std::{
    collections::BTreeMap,
    fmt,
    path::PathBuf,
    sync::{LazyLock, Mutex, MutexGuard, PoisonError},
};

use clap::{Args as _, Command, FromArgMatches as _};
use serde::{Deserialize, Serialize};

use crate::{
    cgroup::CgroupDir,
    ids::{NetnsCookie, PodUid},
    options::{Config, EtcFiles, NameSource, OptionError, PodFiles, RawOptions},
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
        if let Some(config) = OptionsReader::lock().config(self) {
            return Ok(config);
        }
        // The files may take long to read, so the reader is free meanwhile.
        let files = PodFiles::of(cgroup);
        let config = self.validate_with(&files)?;
        if !files.is_used() {
            OptionsReader::lock().remember(self, &config);
        }
        Ok(config)
    }

    /// Whether these are options of shadow mode, whatever users and groups they name.
    pub fn is_shadow(&self) -> bool {
        OptionsReader::lock().read(self).is_ok_and(|raw| raw.is_shadow().is_ok_and(|shadow| shadow))
    }

    /// Validates options that name no user or group.
    pub fn check(&self) -> Result<Config, CaptureArgsError> {
        self.validate_with(&EtcFiles::below("/"))
    }

    fn validate_with(&self, names: &dyn NameSource) -> Result<Config, CaptureArgsError> {
        let raw = OptionsReader::lock().read(self)?.clone();
        let (config, switches, _notes) = raw.validate(names)?;
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

/// Reads options, and keeps what was read last: the pods of a node mostly have the same ones, and each is asked for several
/// times.
struct OptionsReader {
    command: Command,
    last: Option<LastRead>,
}

struct LastRead {
    given: CaptureArgs,
    raw: RawOptions,
    /// Their meaning, if it depends on no file of a pod.
    config: Option<Config>,
}

impl OptionsReader {
    /// The reader of this process. Hold it for no longer than it takes to read options.
    fn lock() -> MutexGuard<'static, Self> {
        static READER: LazyLock<Mutex<OptionsReader>> = LazyLock::new(|| {
            let command = Command::new("pod").no_binary_name(true).disable_help_flag(true);
            Mutex::new(OptionsReader { command: RawOptions::augment_args(command), last: None })
        });
        READER.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn read(&mut self, given: &CaptureArgs) -> Result<&RawOptions, CaptureArgsError> {
        let last = match self.last.take().filter(|last| last.given == *given) {
            Some(last) => last,
            None => {
                let matches = self.command.try_get_matches_from_mut(&given.arguments);
                let matches = matches.map_err(CaptureArgsError::Flags)?;
                let flags = RawOptions::from_arg_matches(&matches).map_err(CaptureArgsError::Flags)?;
                let raw = flags.read_env(|name| given.environment.get(name).cloned());
                LastRead { given: given.clone(), raw, config: None }
            }
        };
        Ok(&self.last.insert(last).raw)
    }

    fn config(&self, given: &CaptureArgs) -> Option<Config> {
        self.last.as_ref().filter(|last| last.given == *given)?.config.clone()
    }

    fn remember(&mut self, given: &CaptureArgs, config: &Config) {
        if let Some(last) = self.last.as_mut().filter(|last| last.given == *given) {
            last.config = Some(config.clone());
        }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::TestCgroup;

    fn args(arguments: &[&str]) -> CaptureArgs {
        CaptureArgs {
            arguments: arguments.iter().map(ToString::to_string).collect(),
            ..CaptureArgs::default()
        }
    }

    #[test]
    fn shadow_mode_depends_on_no_other_option() {
        assert!(args(&["--shadow", "-u", "a-user-of-the-pod"]).is_shadow());
        assert!(args(&["-p", "none", "--shadow"]).is_shadow());
        assert!(!args(&["-u", "a-user-of-the-pod"]).is_shadow());
        assert!(!args(&["--shadow=false"]).is_shadow());
        let environment = BTreeMap::from([("SHADOW".to_owned(), "true".to_owned())]);
        assert!(CaptureArgs { environment, ..args(&[]) }.is_shadow());
    }

    #[test]
    fn arguments_are_parsed_again_when_they_differ() {
        for _ in 0..2 {
            for (port, expected) in [("15001", 15001), ("15011", 15011)] {
                let config = args(&["-p", port]).check().expect("valid options");
                assert_eq!(config.proxy_port, expected);
            }
        }
        args(&["--unknown"]).check().expect_err("no such flag");
        args(&["-p", "15011"]).check().expect("valid after a refused one");
    }

    #[test]
    fn what_the_files_of_a_pod_say_is_read_for_each_pod() {
        let by_name = args(&["-u", "root"]);
        for _ in 0..2 {
            let config = by_name.validate(&TestCgroup::new().cgroup).expect("a user of this machine");
            assert_eq!(config.proxy_uids, [0]);
            assert!(
                OptionsReader::lock().config(&by_name).is_none(),
                "it may have another id in the next pod"
            );
        }
        let by_id = args(&["-u", "1337"]);
        assert_eq!(by_id.validate(&TestCgroup::new().cgroup).expect("valid").proxy_uids, [1337]);
    }
}
