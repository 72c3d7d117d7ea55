//! The kernel features that the programs need and this kernel lacks, and what fails without them. Each is probed on its
//! own, because kernels of distributions have features that their version does not tell. Probes run only when a program
//! cannot be loaded or on request.

mod probe;

use std::{collections::BTreeSet, fmt, io};

use intercept_common::names;

use crate::options::{Config, Dns};

pub use probe::missing;

/// The captures that need a program.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Need {
    /// All of them.
    Always,
    /// Those that capture DNS.
    RedirectDns,
    /// None: the programs have a fallback.
    Never,
}

impl Need {
    /// Returns the option that needs it. `None` unless a single option does.
    pub fn option(self) -> Option<&'static str> {
        match self {
            Self::Always | Self::Never => None,
            Self::RedirectDns => Some("--redirect-dns"),
        }
    }

    /// Whether a capture with `config` needs it.
    pub fn is_of(self, config: &Config) -> bool {
        match self {
            Self::Always => true,
            Self::RedirectDns => config.dns != Dns::Off,
            Self::Never => false,
        }
    }
}

/// A program's need, and what fails without it.
struct Purpose {
    program: &'static str,
    need: Need,
    lost: &'static str,
}

const fn always(program: &'static str, lost: &'static str) -> Purpose {
    Purpose { program, need: Need::Always, lost }
}

const fn for_dns(program: &'static str, lost: &'static str) -> Purpose {
    Purpose { program, need: Need::RedirectDns, lost }
}

/// Every program.
const PURPOSES: [Purpose; 16] = [
    always(names::SOCK_OPS, "original destinations are not kept for the proxy"),
    always(names::SOCK_CREATE, "a proxy that listens with MPTCP gets no inbound connections"),
    always(
        names::SOCK_RELEASE,
        "connections whose callbacks another program disables are never removed from the maps",
    ),
    always(names::GETSOCKOPT, "the proxy cannot ask for original destinations (SO_ORIGINAL_DST)"),
    always(names::GETPEERNAME4, "IPv4 clients see the proxy as their peer"),
    always(names::GETPEERNAME6, "IPv6 clients see the proxy as their peer"),
    always(names::GETSOCKNAME4, "IPv4 clients see a loopback address as their own"),
    always(names::GETSOCKNAME6, "IPv6 clients see a loopback address as their own"),
    for_dns(names::RECVMSG4, "answers over IPv4 come from the proxy's address"),
    for_dns(names::RECVMSG6, "answers over IPv6 come from the proxy's address"),
    for_dns(names::SENDMSG4, "queries over IPv4 from unconnected sockets are not captured"),
    for_dns(names::SENDMSG6, "queries over IPv6 from unconnected sockets are not captured"),
    always(names::CONNECT4, "outbound IPv4 is not captured"),
    always(names::CONNECT6, "outbound IPv6 is not captured"),
    always(names::SK_LOOKUP, "inbound connections are not captured"),
    always(names::STEER_INBOUND, "inbound connections are not captured"),
];

/// Helpers for which the programs have a fallback, and what is worse without them. The agent sets a global of the
/// programs.
const DISPENSABLE: [(&str, &str); 1] = [("bpf_set_retval", "connect() fails with EPERM, whatever the cause")];

fn purpose(program: &str) -> &'static Purpose {
    let found = PURPOSES.iter().find(|purpose| purpose.program == program);
    found.unwrap_or_else(|| unreachable!("{program} is not in the list of programs"))
}

/// Returns which captures need a program.
pub fn need(program: &str) -> Need {
    purpose(program).need
}

/// A feature that a kernel may lack.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Feature {
    /// The hook of a program.
    Hook,
    /// A BPF helper.
    Helper(String),
    /// A map type.
    Map(String),
    /// Atomic operations that return the old value (BPF_FETCH, Linux 5.12).
    FetchingAtomics,
    /// The socket option SO_NETNS_COOKIE (Linux 5.14).
    NetnsCookie,
}

/// A feature that this kernel lacks.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Missing {
    /// The feature.
    pub feature: Feature,
    /// The programs that cannot be loaded without it, in the order in which they are attached. Empty if the agent
    /// itself needs it.
    pub programs: Vec<&'static str>,
}

impl Missing {
    /// Returns which captures need it.
    pub fn need(&self) -> Need {
        if self.dispensable().is_some() {
            return Need::Never;
        }
        self.programs.iter().map(|program| need(program)).min().unwrap_or(Need::Always)
    }

    /// Returns what is worse without it, if the programs have a fallback.
    fn dispensable(&self) -> Option<&'static str> {
        let Feature::Helper(helper) = &self.feature else { return None };
        DISPENSABLE.iter().find(|(name, _)| name == helper).map(|(_, lost)| *lost)
    }

    /// Returns its name, such as "hook cgroup/connect4" or "helper bpf_get_netns_cookie in sock_ops".
    pub fn name(&self) -> String {
        let programs = self.programs.join(", ");
        match &self.feature {
            Feature::Hook => {
                let hooks: Vec<_> = self.programs.iter().map(|program| hook(program)).collect();
                format!("hook {}", hooks.join(", "))
            }
            Feature::Helper(helper) => format!("helper {helper} in {programs}"),
            Feature::Map(kind) => format!("maps of type {kind}"),
            Feature::NetnsCookie => "socket option SO_NETNS_COOKIE".to_owned(),
            Feature::FetchingAtomics => format!("atomic operations that return the old value in {programs}"),
        }
    }

    /// Returns what fails without it.
    pub fn lost(&self) -> String {
        if let Some(lost) = self.dispensable() {
            return lost.to_owned();
        }
        if self.feature == Feature::NetnsCookie {
            return "pods cannot be distinguished".to_owned();
        }
        let mut said = BTreeSet::new();
        let lost: Vec<_> = self
            .programs
            .iter()
            .map(|program| purpose(program).lost)
            .filter(|lost| said.insert(*lost))
            .collect();
        lost.join("; ")
    }
}

/// Returns the hook of a program as the section name of libbpf.
fn hook(program: &str) -> String {
    match program {
        names::SOCK_OPS => "sockops".to_owned(),
        names::SK_LOOKUP | names::STEER_INBOUND => "sk_lookup".to_owned(),
        program => format!("cgroup/{program}"),
    }
}

/// Why a capture is refused: the missing features that it needs.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Lacking(Vec<Missing>);

impl Lacking {
    /// Returns the missing features that every capture needs. `None` if there are none.
    pub fn for_any(missing: &[Missing]) -> Option<Self> {
        Self::of(missing, |need| need == Need::Always)
    }

    /// Returns the missing features that this capture needs. `None` if there are none.
    pub fn for_config(missing: &[Missing], config: &Config) -> Option<Self> {
        Self::of(missing, |need| need.is_of(config))
    }

    fn of(missing: &[Missing], is_needed: impl Fn(Need) -> bool) -> Option<Self> {
        let needed: Vec<_> = missing.iter().filter(|missing| is_needed(missing.need())).cloned().collect();
        (!needed.is_empty()).then_some(Self(needed))
    }
}

impl fmt::Display for Lacking {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("this kernel lacks ")?;
        for (index, missing) in self.0.iter().enumerate() {
            f.write_str(if index > 0 { ", " } else { "" })?;
            if let Some(option) = missing.need().option() {
                write!(f, "for {option} ")?;
            }
            write!(f, "{} ({})", missing.name(), missing.lost())?;
        }
        Ok(())
    }
}

impl std::error::Error for Lacking {}

/// Why the kernel's features cannot be probed.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// The built-in object cannot be parsed.
    #[error("reading the built-in programs")]
    Object(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// A probe failed for a reason other than a missing feature.
    #[error("probing {what}")]
    Refused {
        /// The feature.
        what: String,
        /// The error from the kernel.
        #[source]
        source: io::Error,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    fn missing(feature: Feature, programs: &[&'static str]) -> Missing {
        Missing { feature, programs: programs.to_vec() }
    }

    #[test]
    fn every_program_has_a_purpose() {
        for program in names::CGROUP_PROGRAMS.iter().chain(&[names::SK_LOOKUP, names::STEER_INBOUND]) {
            assert_eq!(purpose(program).program, *program);
        }
    }

    #[test]
    fn what_serves_one_option_is_needed_only_by_it() {
        let all = [missing(Feature::Hook, &[names::RECVMSG4])];
        assert_eq!(Lacking::for_any(&all), None);
        let plain = Config::default();
        assert_eq!(Lacking::for_config(&all, &plain), None);
        let dns = Config { dns: Dns::All, ..plain };
        let refusal = Lacking::for_config(&all, &dns).expect("needed").to_string();
        assert_eq!(
            refusal,
            "this kernel lacks for --redirect-dns hook cgroup/recvmsg4 (answers over IPv4 come from the proxy's address)"
        );
    }

    #[test]
    fn what_programs_do_without_is_no_reason_to_refuse() {
        let all = [missing(Feature::Helper("bpf_set_retval".to_owned()), &[names::CONNECT4])];
        assert_eq!(Lacking::for_any(&all), None);
        assert_eq!(Lacking::for_config(&all, &Config { dns: Dns::All, ..Config::default() }), None);
        assert!(all[0].lost().contains("EPERM"));
    }

    #[test]
    fn what_several_programs_need_is_needed_as_the_first_of_them_is() {
        let helper = missing(
            Feature::Helper("bpf_x".to_owned()),
            &[names::SENDMSG4, names::SK_LOOKUP, names::STEER_INBOUND],
        );
        assert_eq!(helper.need(), Need::Always);
        assert_eq!(helper.name(), "helper bpf_x in sendmsg4, lookup, steer_inbound");
        assert_eq!(
            helper.lost(),
            "queries over IPv4 from unconnected sockets are not captured; inbound connections are not captured"
        );
    }
}
