//! The settings: their flags, variables, defaults and help, in one table.

use std::fmt;

/// One setting of istio-iptables: a flag, variables, or both.
#[derive(Debug, PartialEq, Eq)]
pub struct Setting {
    /// The short flag.
    pub short: Option<char>,
    /// The long flag; absent where istio-iptables has a variable only.
    pub long: Option<&'static str>,
    /// The variables, the strongest first.
    pub env: &'static [&'static str],
    /// What its value is called in the help; nothing for a switch.
    pub value: Option<&'static str>,
    /// What it is when neither flag nor variable is given, in words.
    pub default: &'static str,
    /// One line of help.
    pub help: &'static str,
}

/// Where a value came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SettingOrigin {
    /// The flag.
    Flag(&'static Setting),
    /// The variable of this name.
    Variable(&'static str),
    /// Neither was given, and the default does not do.
    Default(&'static Setting),
}

impl fmt::Display for Setting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.short, self.long) {
            (Some(short), Some(long)) => write!(f, "-{short}/--{long}"),
            (None, Some(long)) => write!(f, "--{long}"),
            (_, None) => f.write_str(self.env.first().copied().unwrap_or_default()),
        }
    }
}

impl fmt::Display for SettingOrigin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Flag(setting) | Self::Default(setting) => setting.fmt(f),
            Self::Variable(name) => write!(f, "environment variable {name}"),
        }
    }
}

macro_rules! settings {
    ($($name:ident: $short:expr, $long:expr, [$($env:literal),*], $value:expr, $default:literal, $help:literal;)*) => {
        $(pub(super) static $name: Setting = Setting {
            short: $short, long: $long, env: &[$($env),*], value: $value, default: $default, help: $help,
        };)*
        /// Every setting, in the order of the help.
        pub(super) static ALL: &[&Setting] = &[$(&$name),*];
    };
}

// Where a setting has two variables, istio lets the one that is not the flag's name win: it comes first here.
settings! {
    ENVOY_PORT: Some('p'), Some("envoy-port"), ["ENVOY_PORT"], Some("PORT"), "15001",
        "Where outbound TCP goes";
    INBOUND_CAPTURE_PORT: Some('z'), Some("inbound-capture-port"), ["INBOUND_CAPTURE_PORT"], Some("PORT"), "15006",
        "Where inbound TCP goes";
    INBOUND_TUNNEL_PORT: Some('e'), Some("inbound-tunnel-port"), ["INBOUND_TUNNEL_PORT"], Some("PORT"), "15008",
        "Port of the tunnel, not captured inbound and never sent back to the inbound port";
    PROXY_UID: Some('u'), Some("proxy-uid"), ["PROXY_UID"], Some("USERS"), "the uid of $ENVOY_USER, else 1337",
        "Users whose traffic is the proxy's own and is not captured, ids or names";
    PROXY_GID: Some('g'), Some("proxy-gid"), ["PROXY_GID"], Some("GROUPS"), "the value of -u",
        "Groups whose traffic is the proxy's own and is not captured, ids or names";
    INBOUND_MODE: Some('m'), Some("istio-inbound-interception-mode"), ["ISTIO_INBOUND_INTERCEPTION_MODE"],
        Some("MODE"), "REDIRECT",
        "How inbound connections reach the proxy, REDIRECT or TPROXY";
    TPROXY_MARK: Some('t'), Some("istio-inbound-tproxy-mark"), ["ISTIO_INBOUND_TPROXY_MARK"], Some("MARK"), "1337",
        "Packet mark of TPROXY";
    TPROXY_TABLE: Some('r'), Some("istio-inbound-tproxy-route-table"), ["ISTIO_INBOUND_TPROXY_ROUTE_TABLE"],
        Some("TABLE"), "133",
        "Routing table of TPROXY";
    INBOUND_PORTS: Some('b'), Some("istio-inbound-ports"), ["ISTIO_INBOUND_PORTS"], Some("PORTS"), "none",
        "Inbound ports to capture, a list of ports and low:high ranges, or * for all";
    LOCAL_EXCLUDE_PORTS: Some('d'), Some("istio-local-exclude-ports"), ["ISTIO_LOCAL_EXCLUDE_PORTS"],
        Some("PORTS"), "none",
        "Inbound ports left alone; only with -b '*'";
    EXCLUDE_INTERFACES: Some('c'), Some("istio-exclude-interfaces"), ["ISTIO_EXCLUDE_INTERFACES"],
        Some("NAMES"), "none",
        "Interfaces on which neither direction is captured; eth+ is every name that begins with eth";
    SERVICE_CIDR: Some('i'), Some("istio-service-cidr"), ["ISTIO_SERVICE_CIDR"], Some("RANGES"), "none",
        "Outbound destinations to capture, a list of address ranges, or * for all";
    SERVICE_EXCLUDE_CIDR: Some('x'), Some("istio-service-exclude-cidr"), ["ISTIO_SERVICE_EXCLUDE_CIDR"],
        Some("RANGES"), "none",
        "Outbound destinations left alone";
    OUTBOUND_PORTS: Some('q'), Some("istio-outbound-ports"), ["ISTIO_OUTBOUND_PORTS"], Some("PORTS"), "none",
        "Outbound ports to capture in addition to -i";
    OUTBOUND_PORTS_EXCLUDE: Some('o'), Some("istio-local-outbound-ports-exclude"),
        ["ISTIO_LOCAL_OUTBOUND_PORTS_EXCLUDE"], Some("PORTS"), "none",
        "Outbound ports left alone, for TCP and UDP";
    VIRT_INTERFACES: Some('k'), Some("kube-virt-interfaces"), ["KUBE_VIRT_INTERFACES"], Some("NAMES"), "none",
        "Interfaces whose arriving traffic is treated as outbound";
    DRY_RUN: Some('n'), Some("dry-run"), ["DRY_RUN"], None, "false",
        "Print what would be done and change nothing";
    PROBE_PORT: None, Some("iptables-probe-port"), ["IPTABLES_PROBE_PORT"], Some("PORT"), "15002",
        "Port that --run-validation connects to";
    PROBE_TIMEOUT: None, Some("probe-timeout"), ["PROBE_TIMEOUT"], Some("TIME"), "5s",
        "How long --run-validation may take";
    RUN_VALIDATION: None, Some("run-validation"), ["RUN_VALIDATION"], None, "false",
        "Probe that redirection works, and exit with 126 if it does not";
    SKIP_RULE_APPLY: None, Some("skip-rule-apply"), ["SKIP_RULE_APPLY"], None, "false",
        "Change nothing; with --run-validation, only probe";
    REDIRECT_DNS: None, Some("redirect-dns"), ["ISTIO_META_DNS_CAPTURE", "REDIRECT_DNS"], None, "false",
        "Capture DNS to the servers in resolv.conf";
    CAPTURE_ALL_DNS: None, Some("capture-all-dns"), ["CAPTURE_ALL_DNS"], None, "false",
        "Capture everything to port 53; only with --redirect-dns";
    RESOLV_CONF: None, Some("resolv-conf"), ["RESOLV_CONF"], Some("PATH"), "the pod's /etc/resolv.conf",
        "The file that lists the servers for --redirect-dns";
    OPEN_WITHOUT_PROXY: None, Some("open-without-proxy"), ["OPEN_WITHOUT_PROXY"], None, "false",
        "Not one of istio-iptables: where nothing listens, let traffic go on uncaptured instead of refusing it";
    WITHOUT_IPV6: None, Some("without-ipv6"), ["WITHOUT_IPV6"], None, "false",
        "Not one of istio-iptables: leave IPv6 alone, as istio-iptables does in a pod whose first address is IPv4";
    ACCELERATE: None, Some("accelerate"), ["ACCELERATE"], None, "false",
        "Not one of istio-iptables: join the proxy's connections with proxies of this node past TCP";
    ACCELERATE_PROXIES: None, Some("accelerate-proxies"), ["ACCELERATE_PROXIES"], Some("NAMES"), "envoy",
        "Executables that --accelerate is for; to name another is to vouch for it";
    DROP_INVALID: None, Some("drop-invalid"), ["INVALID_DROP", "DROP_INVALID"], None, "false",
        "Accepted; there is no connection tracking to guard";
    DUAL_STACK: None, Some("dual-stack"), ["ISTIO_DUAL_STACK", "DUAL_STACK"], None, "false",
        "Accepted; both address families are captured unless --without-ipv6 says otherwise";
    NETWORK_NAMESPACE: None, Some("network-namespace"), ["NETWORK_NAMESPACE"], Some("PATH"), "the pod's own",
        "The network namespace to work in";
    CNI_MODE: None, Some("cni-mode"), ["CNI_MODE"], None, "false",
        "Called from a CNI plugin";
    RECONCILE: None, Some("reconcile"), ["RECONCILE"], None, "false",
        "Replace what is in force and differs";
    CLEANUP_ONLY: None, Some("cleanup-only"), ["CLEANUP_ONLY"], None, "false",
        "Remove what is in force and attach nothing";
    FORCE_APPLY: None, Some("force-apply"), ["FORCE_APPLY"], None, "false",
        "Apply again even if the same is in force";
    NATIVE_NFTABLES: None, Some("native-nftables"), ["NATIVE_NFTABLES"], None, "false",
        "Accepted; no netfilter rules are installed";
    FORCE_IPTABLES_BINARY: None, Some("force-iptables-binary"), ["FORCE_IPTABLES_BINARY"], Some("NAME"), "none",
        "Accepted; iptables is not called";
    LOG_OUTPUT_LEVEL: None, Some("log_output_level"), [], Some("LEVELS"), "default:info",
        "Log levels, a list of scope:level";
    LOG_AS_JSON: None, Some("log_as_json"), [], None, "false",
        "Log in JSON";
    OWNER_GROUPS: None, None, ["ISTIO_OUTBOUND_OWNER_GROUPS"], Some("GROUPS"), "*",
        "Capture the outbound traffic of these groups only, ids or names, at most 64";
    OWNER_GROUPS_EXCLUDE: None, None, ["ISTIO_OUTBOUND_OWNER_GROUPS_EXCLUDE"], Some("GROUPS"), "none",
        "Never capture the outbound traffic of these groups; only without the above";
    LOOPBACK_CIDR: None, None, ["ISTIO_OUTBOUND_IPV4_LOOPBACK_CIDR"], Some("RANGE"), "127.0.0.1/32",
        "What counts as localhost for IPv4";
    ENVOY_USER: None, None, ["ENVOY_USER"], Some("USER"), "istio-proxy",
        "The user whose id is the default of -u";
}
