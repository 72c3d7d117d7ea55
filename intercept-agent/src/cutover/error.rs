//! Why a pod is not cut over.

use std::{path::PathBuf, time::Duration};

use super::rules::RulesError;
use crate::{netns::NetnsError, node::NodeError, store::StoreError};

/// Why a pod is not cut over, or not back.
#[derive(Debug, thiserror::Error)]
pub enum CutoverError {
    #[error(
        "cgroup {} is not attached: attach it in shadow mode first (`intercept-agent attach --shadow`)",
        cgroup.display()
    )]
    NotAttached { cgroup: PathBuf },
    #[error(
        "cgroup {} is not in shadow mode, and `cutover` has not enforced it: attach it with --shadow, let it compare, and \
         cut it over then",
        cgroup.display()
    )]
    NotShadow { cgroup: PathBuf },
    #[error(
        "cgroup {} is enforced, and no rules of iptables are saved for it: `intercept-agent attach --shadow` puts it into \
         shadow mode, and leaves it to its rules if it has some",
        cgroup.display()
    )]
    NothingSaved { cgroup: PathBuf },
    #[error(
        "in cgroup {} {differed} of {compared} compared flows differ from what happened: see \
         `intercept-agent status --shadow`, and correct the options or the rules, which starts the comparison again; {force} cuts over \
         regardless",
        cgroup.display()
    )]
    Differs { cgroup: PathBuf, differed: u64, compared: u64, force: &'static str },
    #[error(
        "in cgroup {} no flow has been compared yet, and {least} are needed: let it run, and see \
         `intercept-agent status --shadow`; {force} cuts over regardless",
        cgroup.display()
    )]
    NothingCompared { cgroup: PathBuf, least: u64, force: &'static str },
    #[error(
        "in cgroup {} {compared} flows have been compared, and {least} are needed: let it run, and see \
         `intercept-agent status --shadow`; {force} cuts over regardless",
        cgroup.display()
    )]
    TooFewCompared { cgroup: PathBuf, compared: u64, least: u64, force: &'static str },
    #[error(
        "{netns} is captured by TPROXY, in which the pod cannot be cut over while it runs: the rules mark what comes in, and \
         for the agent sockets take such marks over (tcp_fwmark_accept), so that while both are active the proxy's answers \
         would go to the loopback interface; restart the pod without the rules"
    )]
    Tproxy { netns: String },
    #[error("cgroup {} is a workload of this machine: only pods are cut over", cgroup.display())]
    Machine { cgroup: PathBuf },
    #[error(
        "the daemon keeps {name} (cgroup {}): it would put the pod back into shadow mode while the rules are out; the pod's mode \
         says what the daemon does (annotation or label intercept/mode)",
        cgroup.display()
    )]
    Kept { cgroup: PathBuf, name: String },
    #[error(
        "no rule in {netns} leads to a port of the proxy (looked with {tools}): the pod has no rules of iptables, or others \
         than its options have; if nothing else captures it, `attach` without --shadow enforces the policy"
    )]
    NoRules { netns: String, tools: String },
    #[error(
        "{program} is not found, so the pod's rules cannot be read and changed: install iptables (packages iptables; both \
         variants, nft and legacy), or run this command where it is installed"
    )]
    Missing { program: String },
    #[error("running {program} in {netns}: {what}")]
    Iptables { program: String, netns: String, what: String },
    #[error(
        "{program} in {netns} took longer than {limit:?} and was killed: the namespace has very many rules, another program \
         holds the lock of iptables, or the machine is overloaded"
    )]
    Slow { program: String, netns: String, limit: Duration },
    #[error("reading the rules of {tool} in {netns}")]
    Rules { tool: String, netns: String, source: RulesError },
    #[error(
        "rules of {tool} that capture the pod are there again after they were taken out: something puts them in; stop it, \
         and run this command again (until then both capture the pod, and each connection by one of them)"
    )]
    Returned { tool: String },
    #[error(
        "the rule {rule:?} of {tool} is not there after it was put in: the policy stays enforced; run this command again"
    )]
    Lost { tool: String, rule: String },
    #[error(transparent)]
    Node(#[from] NodeError),
    #[error(transparent)]
    Netns(#[from] NetnsError),
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl CutoverError {
    /// The cause of a pod that needs only time.
    pub const COMPARED_TOO_FEW: &str = "compared_too_few";

    /// Whether the text has numbers of flows, which grow.
    pub fn counts_flows(&self) -> bool {
        matches!(self, Self::Differs { .. } | Self::NothingCompared { .. } | Self::TooFewCompared { .. })
    }

    /// Its word in reports and logs, stable.
    pub fn cause(&self) -> &'static str {
        match self {
            Self::Differs { .. } => "differs",
            Self::NothingCompared { .. } | Self::TooFewCompared { .. } => Self::COMPARED_TOO_FEW,
            Self::Tproxy { .. } => "tproxy",
            Self::NoRules { .. } => "no_rules",
            Self::Missing { .. } | Self::Iptables { .. } | Self::Slow { .. } | Self::Rules { .. } => {
                "iptables"
            }
            Self::Returned { .. } | Self::Lost { .. } => "rules_changed",
            Self::NotAttached { .. }
            | Self::NotShadow { .. }
            | Self::NothingSaved { .. }
            | Self::Machine { .. }
            | Self::Kept { .. }
            | Self::Node(_)
            | Self::Netns(_)
            | Self::Store(_) => "agent",
        }
    }
}
