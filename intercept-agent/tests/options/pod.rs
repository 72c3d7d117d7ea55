//! A pod with names of its own, and the command line put to it.

use std::collections::HashMap;
use std::io;

use clap::Parser;
use intercept_agent::facade::options::{Config, NameSource, Note, OptionError, RawOptions, RunOptions};

#[derive(Debug, Parser)]
#[command(name = "istio-iptables")]
pub(crate) struct CaptureCli {
    #[command(flatten)]
    pub(crate) raw: RawOptions,
}

/// A pod with users, groups and a resolv.conf of its own.
pub(crate) struct NamesOfPod {
    pub(crate) users: Vec<(&'static str, u32)>,
    pub(crate) resolv_conf: Option<&'static str>,
}

impl Default for NamesOfPod {
    fn default() -> Self {
        Self {
            users: vec![("istio-proxy", 1400), ("app", 1000)],
            resolv_conf: Some("nameserver 10.96.0.10\n"),
        }
    }
}

impl NameSource for NamesOfPod {
    fn user(&self, name: &str) -> io::Result<Option<u32>> {
        if name == "unreadable" {
            return Err(io::Error::from(io::ErrorKind::PermissionDenied));
        }
        Ok(self.users.iter().find(|(user, _)| *user == name).map(|(_, id)| *id))
    }

    /// Every user has a group of that name, with an id one higher.
    fn group(&self, name: &str) -> io::Result<Option<u32>> {
        Ok(self.user(name)?.map(|id| id + 1))
    }

    fn resolv_conf(&self) -> io::Result<String> {
        self.resolv_conf.map(str::to_owned).ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))
    }
}

pub(crate) type ValidationOutcome = Result<(Config, RunOptions, Vec<Note>), OptionError>;

pub(crate) fn raw(args: &[&str], env: &[(&str, &str)]) -> Result<RawOptions, clap::Error> {
    let env: HashMap<&str, &str> = env.iter().copied().collect();
    let cli = CaptureCli::try_parse_from(std::iter::once(&"istio-iptables").chain(args))?;
    Ok(cli.raw.read_env(|name| env.get(name).map(|value| (*value).to_owned())))
}

pub(crate) fn outcome(args: &[&str], env: &[(&str, &str)], pod: &NamesOfPod) -> ValidationOutcome {
    raw(args, env).unwrap_or_else(|error| panic!("{args:?}: {error}")).validate(pod)
}

pub(crate) fn valid(args: &[&str], env: &[(&str, &str)]) -> (Config, RunOptions, Vec<String>) {
    let (config, switches, notes) = outcome(args, env, &NamesOfPod::default())
        .unwrap_or_else(|error| panic!("{args:?} {env:?}: {error}"));
    (config, switches, notes.iter().map(Note::to_string).collect())
}
