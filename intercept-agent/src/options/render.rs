//! A policy as the options that give it.

use std::fmt::{self, Display};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;

use ipnet::IpNet;

use super::setting::{Setting, Written};
use super::{Cidrs, Config, InboundMode, InboundPorts, table};

const LOOPBACK: [IpAddr; 2] = [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)];

impl Config {
    /// The flags that give this policy, in one way whatever way it was asked for: -u and -g always, because
    /// their defaults depend on the pod, and else what differs from the default. The variables of
    /// [`Config::to_env`] belong to them; the servers of [`Dns::Resolvers`](super::Dns::Resolvers) come from the pod's
    /// resolv.conf.
    pub fn to_args(&self) -> Vec<String> {
        let default = Self::default();
        let mut args = Vec::new();
        for setting in table::ALL {
            let Some(flag) = flag(setting) else { continue };
            match (setting.binding.write)(self, &default) {
                Written::Nothing => {}
                Written::Switch => args.push(flag),
                // An interface may be called -p: by itself that would be a flag.
                Written::Value(value) if value.starts_with('-') => args.push(format!("{flag}={value}")),
                Written::Value(value) => args.extend([flag, value]),
            }
        }
        args
    }

    /// The variables that, with [`Config::to_args`], give this policy: those of the settings that have no flag.
    pub fn to_env(&self) -> Vec<(&'static str, String)> {
        let default = Self::default();
        let settings = table::ALL.iter().filter(|setting| setting.flag.is_none());
        let values = settings.filter_map(|setting| match (setting.binding.write)(self, &default) {
            Written::Value(value) => setting.variables.first().map(|name| (*name, value)),
            Written::Nothing | Written::Switch => None,
        });
        values.collect()
    }
}

/// The shortest flag of a setting.
fn flag(setting: &Setting) -> Option<String> {
    let long = setting.flag?;
    Some(setting.letter.map_or_else(|| format!("--{long}"), |letter| format!("-{letter}")))
}

/// As the value of a list.
pub(super) fn joined<T: Display>(items: &[T]) -> String {
    items.iter().map(T::to_string).collect::<Vec<_>>().join(",")
}

/// As the value of a list; an option that was parsed is UTF-8.
pub(super) fn joined_paths(paths: &[PathBuf]) -> String {
    paths.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(",")
}

impl fmt::Display for InboundMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Redirect => "REDIRECT",
            Self::Tproxy => "TPROXY",
        })
    }
}

/// As the value of -b.
impl fmt::Display for InboundPorts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::All => f.write_str("*"),
            Self::Only(ports) => ports.fmt(f),
        }
    }
}

/// As the value of -i.
impl fmt::Display for Cidrs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.all {
            return f.write_str("*");
        }
        let mut written = self.list.clone();
        if self.loopback && !written.iter().any(|network| network.addr().is_loopback()) {
            // The range that was written with a loopback address covers it.
            let rewritten = written.iter_mut().find_map(|network| {
                let address = LOOPBACK.iter().find(|address| network.contains(*address))?;
                Some((network, *address))
            });
            if let Some((network, address)) = rewritten {
                *network = IpNet::new_assert(address, network.prefix_len());
            }
        }
        f.write_str(&joined(&written))
    }
}
