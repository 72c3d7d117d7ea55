//! Why attempts on pods fail.

/// The cause of a failure: the label `cause` of `intercept_errors_total`, and the same word in reports and logs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Cause {
    Options,
    Cgroup,
    HostNetwork,
    NoProcess,
    Netns,
    MapFull,
    OverBudget,
    Conflict,
    Store,
    Leaving,
    Routes,
    Kernel,
    Internal,
    Detached,
    Rules,
    Metrics,
}

impl Cause {
    /// The word, stable.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Options => "options",
            Self::Cgroup => "cgroup",
            Self::HostNetwork => "host_network",
            Self::NoProcess => "no_process",
            Self::Netns => "netns",
            Self::MapFull => "map_full",
            Self::OverBudget => "over_budget",
            Self::Conflict => "conflict",
            Self::Store => "store",
            Self::Leaving => "leaving",
            Self::Routes => "routes",
            Self::Kernel => "kernel",
            Self::Internal => "internal",
            Self::Detached => "detached",
            Self::Rules => "rules",
            Self::Metrics => "metrics",
        }
    }
}
