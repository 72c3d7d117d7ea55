//! The options as given: text by setting, not yet looked at.

use std::collections::BTreeMap;

use clap::{Arg, ArgAction, ArgMatches, Args, Command, FromArgMatches};

use super::setting::{Setting, SettingOrigin};
use super::table;

const HEADING: &str = "Capture options (as istio-iptables)";

/// The options as given on a command line and in the environment. Flatten into a clap command.
///
/// clap sees the flags alone: the environment is read by [`RawOptions::read_env`], so that a test can bring its
/// own and a refusal can name the variable at fault.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RawOptions {
    flags: BTreeMap<&'static str, String>,
    env: BTreeMap<&'static str, String>,
}

impl RawOptions {
    /// Adds the variables of the settings, as `lookup` gives them. An empty one counts as unset, and so does one that
    /// Kubernetes has made for a Service of such a name.
    #[must_use]
    pub fn read_env(mut self, lookup: impl Fn(&str) -> Option<String>) -> Self {
        for &name in table::ALL.iter().flat_map(|setting| setting.variables) {
            if let Some(value) =
                lookup(name).filter(|value| !value.is_empty() && !is_service_link(name, value))
            {
                self.env.insert(name, value);
            }
        }
        self
    }

    /// Adds the variables of this process. One that is not UTF-8 is kept, mangled, to be refused by name.
    #[must_use]
    pub fn read_process_env(self) -> Self {
        self.read_env(|name| std::env::var_os(name).map(|value| value.to_string_lossy().into_owned()))
    }

    /// The value of `setting`: the flag's, else the strongest variable's.
    pub(super) fn get(&self, setting: &'static Setting) -> Option<(SettingOrigin, &str)> {
        let flag = setting.flag.and_then(|long| self.flags.get(long));
        if let Some(value) = flag {
            return Some((SettingOrigin::Flag(setting), value));
        }
        let (name, value) = setting.variables.iter().find_map(|name| self.env.get_key_value(name))?;
        Some((SettingOrigin::Variable(name), value))
    }
}

/// Whether Kubernetes has set this variable: for a Service `envoy` in the pod's namespace, ENVOY_PORT is
/// `tcp://10.96.0.7:80`. The other variables of a Service (`_SERVICE_HOST`, `_PORT_80_TCP` and so on) have no names of
/// settings.
fn is_service_link(name: &str, value: &str) -> bool {
    name.ends_with("_PORT") && ["tcp://", "udp://", "sctp://"].iter().any(|scheme| value.starts_with(scheme))
}

impl FromArgMatches for RawOptions {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let mut raw = Self::default();
        raw.update_from_arg_matches(matches)?;
        Ok(raw)
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        for long in table::ALL.iter().filter_map(|setting| setting.flag) {
            if let Some(value) = matches.get_one::<String>(long) {
                self.flags.insert(long, value.clone());
            }
        }
        Ok(())
    }
}

impl Args for RawOptions {
    fn augment_args(command: Command) -> Command {
        let mut variables = String::from("Environment variables without a flag:\n");
        let mut command = command;
        for setting in table::ALL {
            match setting.flag {
                Some(long) => command = command.arg(argument(setting, long)),
                None => variables.push_str(&format!("  {setting}\n          {}\n", help(setting))),
            }
        }
        command.after_help(variables.trim_end().to_owned())
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

fn argument(setting: &'static Setting, long: &'static str) -> Arg {
    // The last one of a repeated flag counts, as in istio.
    let mut text = help(setting);
    if !setting.variables.is_empty() {
        text.push_str(&format!(" [env: {}]", setting.variables.join(", ")));
    }
    let arg = Arg::new(long).long(long).help(text).help_heading(HEADING).overrides_with(long);
    let arg = match setting.letter {
        Some(short) => arg.short(short),
        None => arg,
    };
    match setting.takes {
        Some(name) => arg.action(ArgAction::Set).value_name(name),
        // A switch takes its value behind `=` only: `--redirect-dns false` is a mistake, not a false.
        None => arg
            .action(ArgAction::Set)
            .num_args(0..=1)
            .require_equals(true)
            .default_missing_value("true")
            .value_name("BOOL"),
    }
}

fn help(setting: &Setting) -> String {
    format!("{} [default: {}]", setting.help, setting.default)
}
