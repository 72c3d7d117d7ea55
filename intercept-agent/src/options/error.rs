//! What is wrong with an option, and how to mend it.

use super::setting::SettingOrigin;
use super::{MAX_OWNER_GROUPS, MAX_PROXY_IDS, MAX_RESOLVERS};

/// A refused option. Shown as `option: `value` problem and remedy`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{origin}: `{value}` {problem}")]
pub struct OptionError {
    /// The flag or the variable that carried the value.
    pub origin: SettingOrigin,
    /// The value, or the offending item of a list.
    pub value: String,
    /// What is wrong with it.
    pub problem: OptionProblem,
}

impl OptionError {
    /// The exit code of a command line that is refused.
    pub const EXIT_CODE: u8 = 2;
}

/// What is wrong with a value. Shown as the remainder of a sentence that starts with the value.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum OptionProblem {
    /// Not a port.
    #[error("is not a port; give a decimal number from 1 to 65535")]
    Port,
    /// A range that ends before it starts.
    #[error("is not a range of ports; give the lower port first, as in 8000:9000")]
    PortRange,
    /// A `*` in a list of ports that has none.
    #[error("is not a list of ports; `*` stands alone in -b and nowhere else")]
    PortWildcard,
    /// A `*` beside other ranges.
    #[error("stands alone or not at all; give `*`, or a list of ranges without it")]
    CidrWildcard,
    /// A `*` in the ranges to exclude.
    #[error("would exclude everything; leave -i empty to capture nothing, or list the ranges to exclude")]
    ExcludeEverything,
    /// Not an address range.
    #[error("is not an address range; write it as 10.0.0.0/8, fd00::/8 or a single address")]
    Cidr,
    /// Not an address.
    #[error("is not an address; write it as 10.96.0.10 or fd00::a")]
    Address,
    /// Not a loopback range.
    #[error(
        "is not a loopback range; give one within 127.0.0.0/8 with a prefix from 8 to 32, as in 127.0.0.1/32"
    )]
    Loopback,
    /// Not a boolean.
    #[error("is neither true nor false; give true, false, 1, 0, t or f")]
    Bool,
    /// Not a duration.
    #[error("is not a duration above zero; write it as 5s, 1m30s or 500ms")]
    Duration,
    /// Not an interception mode.
    #[error("is not an interception mode; give REDIRECT or TPROXY, in capitals, or nothing for REDIRECT")]
    Mode,
    /// Not a packet mark.
    #[error("is not a packet mark; give a number from 1 to 4294967295, decimal or 0x and hexadecimal")]
    Mark,
    /// Not a routing table.
    #[error(
        "is not a free routing table; give a number from 1 to 4294967295 except 253 to 255, the kernel's own"
    )]
    Table,
    /// Not a user.
    #[error("is neither a user id nor a user of this pod; give the id, or a name from its /etc/passwd")]
    User,
    /// Not a group.
    #[error("is neither a group id nor a group of this pod; give the id, or a name from its /etc/group")]
    Group,
    /// Not the name of an executable.
    #[error(
        "is not the name of an executable; give the last part of its path, of 31 bytes at most, as in envoy"
    )]
    Executable,
    /// Not an absolute path.
    #[error("is not an absolute path; give the cgroup of a container, below the pod's")]
    CgroupPath,
    /// Not the name of a container.
    #[error(
        "is not the name of a container; give lower-case letters, digits and `-`, 63 at most, as in istio-proxy"
    )]
    ContainerName,
    /// A range of ids.
    #[error("is a range of ids, which is not supported; list the ids one by one")]
    IdRange,
    /// More ids than there is room for.
    #[error("lists {0} ids, and there is room for {MAX_PROXY_IDS}; give fewer")]
    TooManyIds(usize),
    /// More groups than there is room for.
    #[error("lists {0} groups, and there is room for {MAX_OWNER_GROUPS}; give fewer")]
    TooManyGroups(usize),
    /// Neither a user nor a group marks the proxy.
    #[error("names nobody, and neither does -g: the proxy would be sent its own traffic; give its user id")]
    NoProxy,
    /// Groups to exclude beside a list of groups to capture.
    #[error("excludes groups while ISTIO_OUTBOUND_OWNER_GROUPS lists those to capture; keep one of the two")]
    ExcludeWithoutAll,
    /// A `*` beside other groups.
    #[error("stands alone or not at all; give `*`, or a list of groups without it")]
    GroupWildcard,
    /// Not the name of an interface.
    #[error(
        "is not the name of an interface; give 1 to 15 bytes without `/`, `:` or space; `eth+` is all that begin with eth"
    )]
    InterfacePattern,
    /// A file that cannot be read.
    #[error("cannot be read ({0}); name the pod's resolv.conf with --resolv-conf, or use --capture-all-dns")]
    ResolvConf(String),
    /// More DNS servers than there is room for.
    #[error("lists {0} servers, and there is room for {MAX_RESOLVERS}; list fewer, or use --capture-all-dns")]
    TooManyServers(usize),
    /// The user and group files cannot be read.
    #[error("cannot be looked up ({0}); give the numeric id")]
    Lookup(String),
}
