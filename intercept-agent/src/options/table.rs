//! The table of settings: everything that is particular to one flag, in the order of `--help`.
//!
//! A row names the flag, its letter, variables, default and help, and is bound to a field of [`Config`](super::Config) or of
//! [`RunOptions`](super::RunOptions). The arguments of clap, the reading of the environment, the help, the flags of a
//! [`Config`] and the tables in docs/reference.md (`cargo xtask docs`) come from it. The order counts in three ways: of
//! several options at fault the first is the error, a row may look at fields of the rows before it, and a [`Config`]
//! is written as flags in this order.

use super::binding::{list, switch, text, value};
use super::ports::parse_port;
use super::reader::OptionReader;
use super::render::{joined, joined_paths};
use super::setting::{FieldBinding, Setting, Written, flag, switch_flag, variable};
use super::values::{parse_loopback, parse_mark, parse_mode, parse_table, parse_timeout};
use super::{Cidrs, Dns, InboundPorts, OwnerGroups, Ports};

macro_rules! settings {
    ($($name:ident = $setting:expr;)*) => {
        $(pub(super) static $name: Setting = $setting;)*
        /// Every setting, in the order of the help.
        pub(super) static ALL: &[&Setting] = &[$(&$name),*];
    };
}

// Where a setting has two variables, istio lets the one that is not the flag's name win: it comes first here.
settings! {
    ENVOY_PORT = flag("envoy-port").letter('p').variables(&["ENVOY_PORT"]).takes("PORT").default("15001")
        .help("Where outbound TCP goes")
        .bound(value!(config.proxy_port, parse_port));

    INBOUND_CAPTURE_PORT = flag("inbound-capture-port").letter('z').variables(&["INBOUND_CAPTURE_PORT"])
        .takes("PORT").default("15006")
        .help("Where inbound TCP goes")
        .bound(value!(config.inbound_port, parse_port));

    INBOUND_TUNNEL_PORT = flag("inbound-tunnel-port").letter('e').variables(&["INBOUND_TUNNEL_PORT"])
        .takes("PORT").default("15008")
        .help("Port of the tunnel, not captured inbound and never sent back to the inbound port")
        .bound(value!(config.tunnel_port, parse_port));

    PROXY_UID = flag("proxy-uid").letter('u').variables(&["PROXY_UID"]).takes("USERS")
        .default("the uid of $ENVOY_USER, else 1337")
        .help("Users whose traffic is the proxy's own and is not captured, ids or names")
        .bound(FieldBinding {
            read: |reader, _, options| reader.proxy_uids(&mut options.config),
            write: |config, _| Written::of_ids(&config.proxy_uids),
        });

    PROXY_GID = flag("proxy-gid").letter('g').variables(&["PROXY_GID"]).takes("GROUPS")
        .default("the value of -u")
        .help("Groups whose traffic is the proxy's own and is not captured, ids or names")
        .bound(FieldBinding {
            read: |reader, _, options| reader.proxy_gids(&mut options.config),
            write: |config, _| Written::of_ids(&config.proxy_gids),
        });

    INBOUND_MODE = flag("istio-inbound-interception-mode").letter('m')
        .variables(&["ISTIO_INBOUND_INTERCEPTION_MODE"]).takes("MODE").default("REDIRECT")
        .help("How inbound connections reach the proxy, REDIRECT or TPROXY")
        .bound(value!(config.mode, parse_mode));

    TPROXY_MARK = flag("istio-inbound-tproxy-mark").letter('t').variables(&["ISTIO_INBOUND_TPROXY_MARK"])
        .takes("MARK").default("1337")
        .help("Packet mark of TPROXY")
        .bound(value!(config.tproxy_mark, parse_mark));

    TPROXY_TABLE = flag("istio-inbound-tproxy-route-table").letter('r')
        .variables(&["ISTIO_INBOUND_TPROXY_ROUTE_TABLE"]).takes("TABLE").default("133")
        .help("Routing table of TPROXY")
        .bound(value!(config.tproxy_table, parse_table));

    INBOUND_PORTS = flag("istio-inbound-ports").letter('b').variables(&["ISTIO_INBOUND_PORTS"]).takes("PORTS")
        .help("Inbound ports to capture, a list of ports and low:high ranges, or * for all")
        .bound(list!(config.inbound_ports, OptionReader::inbound_ports, InboundPorts::to_string));

    LOCAL_EXCLUDE_PORTS = flag("istio-local-exclude-ports").letter('d').variables(&["ISTIO_LOCAL_EXCLUDE_PORTS"])
        .takes("PORTS")
        .help("Inbound ports left alone; only with -b '*'")
        .bound(FieldBinding {
            read: |reader, setting, options| reader.inbound_exclude(setting, &mut options.config),
            write: |config, _| Written::unless_empty(config.inbound_exclude.to_string()),
        });

    EXCLUDE_INTERFACES = flag("istio-exclude-interfaces").letter('c').variables(&["ISTIO_EXCLUDE_INTERFACES"])
        .takes("NAMES")
        .help("Interfaces on which neither direction is captured; eth+ is every name that begins with eth")
        .bound(list!(config.exclude_interfaces, OptionReader::interfaces, joined));

    VIRT_INTERFACES = flag("kube-virt-interfaces").letter('k').variables(&["KUBE_VIRT_INTERFACES"])
        .takes("NAMES")
        .help("Interfaces whose arriving traffic is treated as outbound")
        .note("IPv4 for addresses that are not the pod's is answered by a listener of -p that is IP_TRANSPARENT: \
               one that listens already is made so, for one that comes later attach again (or let it set the option)")
        .bound(list!(config.virt_interfaces, OptionReader::interfaces, joined));

    SERVICE_CIDR = flag("istio-service-cidr").letter('i').variables(&["ISTIO_SERVICE_CIDR"]).takes("RANGES")
        .help("Outbound destinations to capture, a list of address ranges, or * for all")
        .bound(list!(config.include, OptionReader::include, Cidrs::to_string));

    SERVICE_EXCLUDE_CIDR = flag("istio-service-exclude-cidr").letter('x')
        .variables(&["ISTIO_SERVICE_EXCLUDE_CIDR"]).takes("RANGES")
        .help("Outbound destinations left alone")
        .bound(list!(config.exclude, OptionReader::exclude, joined));

    OUTBOUND_PORTS = flag("istio-outbound-ports").letter('q').variables(&["ISTIO_OUTBOUND_PORTS"]).takes("PORTS")
        .help("Outbound ports to capture in addition to -i")
        .bound(list!(config.outbound_ports, OptionReader::ports, Ports::to_string));

    OUTBOUND_PORTS_EXCLUDE = flag("istio-local-outbound-ports-exclude").letter('o')
        .variables(&["ISTIO_LOCAL_OUTBOUND_PORTS_EXCLUDE"]).takes("PORTS")
        .help("Outbound ports left alone, for TCP and UDP")
        .bound(list!(config.outbound_exclude_ports, OptionReader::ports, Ports::to_string));

    DRY_RUN = switch_flag("dry-run").letter('n').variables(&["DRY_RUN"])
        .help("Print what would be done and change nothing")
        .bound(switch!(run.dry_run));

    PROBE_PORT = flag("iptables-probe-port").variables(&["IPTABLES_PROBE_PORT"]).takes("PORT").default("15002")
        .help("Port that --run-validation connects to")
        .bound(value!(run.probe_port, parse_port));

    PROBE_TIMEOUT = flag("probe-timeout").variables(&["PROBE_TIMEOUT"]).takes("TIME").default("5s")
        .help("How long --run-validation may take")
        .bound(value!(run.probe_timeout, parse_timeout));

    RUN_VALIDATION = switch_flag("run-validation").variables(&["RUN_VALIDATION"])
        .help("Probe that redirection works, and exit with 126 if it does not")
        .bound(switch!(run.run_validation));

    SKIP_RULE_APPLY = switch_flag("skip-rule-apply").variables(&["SKIP_RULE_APPLY"])
        .help("Change nothing; with --run-validation, only probe")
        .bound(switch!(run.skip_rule_apply));

    REDIRECT_DNS = switch_flag("redirect-dns").variables(&["ISTIO_META_DNS_CAPTURE", "REDIRECT_DNS"])
        .help("Capture DNS to the servers in resolv.conf")
        .bound(FieldBinding {
            read: |reader, setting, options| reader.dns(setting, &mut options.config),
            write: |config, _| Written::switch(config.dns != Dns::Off),
        });

    CAPTURE_ALL_DNS = switch_flag("capture-all-dns").variables(&["CAPTURE_ALL_DNS"])
        .help("Capture everything to port 53; only with --redirect-dns")
        .bound(FieldBinding {
            write: |config, _| Written::switch(config.dns == Dns::All),
            ..FieldBinding::READ_BY_ANOTHER
        });

    DNS_SERVERS = flag("dns-servers").variables(&["DNS_SERVERS"]).takes("ADDRESSES")
        .default("those in --resolv-conf")
        .help("Not one of istio-iptables: the servers for --redirect-dns, instead of those in a file")
        .bound(FieldBinding {
            write: |config, _| match &config.dns {
                Dns::Resolvers(servers) => Written::unless_empty(joined(servers)),
                Dns::Off | Dns::All => Written::Nothing,
            },
            ..FieldBinding::READ_BY_ANOTHER
        });

    DNS_CAPTURE_PORT = flag("dns-capture-port").variables(&["DNS_CAPTURE_PORT"]).takes("PORT").default("15053")
        .help("Not one of istio-iptables: where captured DNS goes")
        .bound(FieldBinding {
            read: |reader, setting, options| reader.dns_port(setting, &mut options.config),
            write: |config, default| Written::differing(&config.dns_port, &default.dns_port),
        });

    DNS_OVER_UDP_ONLY = switch_flag("dns-over-udp-only").variables(&["DNS_OVER_UDP_ONLY"])
        .help("Not one of istio-iptables: leave DNS over TCP alone, as Kuma does; only with --redirect-dns")
        .bound(FieldBinding {
            read: |reader, setting, options| reader.dns_over_udp_only(setting, &mut options.config),
            write: |config, _| Written::switch(config.dns_over_udp_only),
        });

    EXCLUDE_INBOUND_CIDR = flag("exclude-inbound-cidr").variables(&["EXCLUDE_INBOUND_CIDR"]).takes("RANGES")
        .help("Not one of istio-iptables: sources whose inbound connections are left alone")
        .bound(list!(config.exclude_sources, OptionReader::exclude, joined));

    WITHOUT_SELF_CAPTURE = switch_flag("without-self-capture").variables(&["WITHOUT_SELF_CAPTURE"])
        .help("Not one of istio-iptables: leave the proxy's connections to its own pod alone")
        .bound(switch!(config.without_self_capture));

    RESOLV_CONF = flag("resolv-conf").variables(&["RESOLV_CONF"]).takes("PATH")
        .default("the pod's /etc/resolv.conf")
        .help("The file that lists the servers for --redirect-dns")
        .bound(FieldBinding::READ_BY_ANOTHER);

    OPEN_WITHOUT_PROXY = switch_flag("open-without-proxy").variables(&["OPEN_WITHOUT_PROXY"])
        .help("Not one of istio-iptables: where nothing listens, let traffic go on uncaptured instead of refusing it")
        .bound(switch!(config.open_without_proxy));

    WITHOUT_IPV6 = switch_flag("without-ipv6").variables(&["WITHOUT_IPV6"])
        .help("Not one of istio-iptables: leave IPv6 alone, as istio-iptables does in a pod whose first address is IPv4")
        .bound(switch!(config.without_ipv6));

    PROXY_CGROUP = flag("proxy-cgroup").variables(&["PROXY_CGROUP"]).takes("PATHS")
        .help("Not one of istio-iptables: the cgroup of the proxy's container, a list for several; a process elsewhere is \
               captured even with an id of -u or -g")
        .bound(list!(config.proxy_cgroups, OptionReader::cgroups, joined_paths));

    EXEMPT_CGROUP = flag("exempt-cgroup").variables(&["EXEMPT_CGROUP"]).takes("PATHS")
        .help("Not one of istio-iptables: cgroups of containers whose outbound traffic is left alone, such as init \
               containers that need the network before the proxy runs")
        .bound(list!(config.exempt_cgroups, OptionReader::cgroups, joined_paths));

    PROXY_CONTAINER = flag("proxy-container").variables(&["PROXY_CONTAINER"]).takes("NAMES")
        .help("Not one of istio-iptables: as --proxy-cgroup, by the container's name in Kubernetes; the daemon follows it \
               when it restarts")
        .bound(list!(config.proxy_containers, OptionReader::containers, joined));

    EXEMPT_CONTAINERS = flag("exempt-containers").variables(&["EXEMPT_CONTAINERS"]).takes("NAMES")
        .help("Not one of istio-iptables: as --exempt-cgroup, by the containers' names in Kubernetes")
        .bound(list!(config.exempt_containers, OptionReader::containers, joined));

    SHADOW = switch_flag("shadow").variables(&["SHADOW"])
        .help("Not one of istio-iptables: decide and change nothing; what would have been done is compared with what \
               happens to each connection (docs/shadow.md)")
        .bound(switch!(config.shadow));

    ACCELERATE = switch_flag("accelerate").variables(&["ACCELERATE"])
        .help("Not one of istio-iptables: join the proxy's connections with proxies of this node past TCP")
        .bound(FieldBinding {
            read: |reader, setting, options| reader.accelerate(setting, &mut options.config),
            write: |config, _| Written::switch(!config.accelerate.is_empty()),
        });

    ACCELERATE_PROXIES = flag("accelerate-proxies").variables(&["ACCELERATE_PROXIES"]).takes("NAMES")
        .default("envoy")
        .help("Executables that --accelerate is for; to name another is to vouch for it")
        .bound(FieldBinding {
            write: |config, _| match joined(&config.accelerate) {
                names if names == ACCELERATE_PROXIES.default => Written::Nothing,
                names => Written::unless_empty(names),
            },
            ..FieldBinding::READ_BY_ANOTHER
        });

    DROP_INVALID = switch_flag("drop-invalid").variables(&["INVALID_DROP", "DROP_INVALID"])
        .help("Accepted; there is no connection tracking to guard")
        .note("nothing to do, because no connection tracking is involved")
        .bound(switch!(run.drop_invalid));

    DUAL_STACK = switch_flag("dual-stack").variables(&["ISTIO_DUAL_STACK", "DUAL_STACK"])
        .help("Accepted; both address families are captured unless --without-ipv6 says otherwise")
        .note("nothing to do, because both address families are captured unless --without-ipv6 says otherwise")
        .bound(switch!(run.dual_stack));

    NETWORK_NAMESPACE = flag("network-namespace").variables(&["NETWORK_NAMESPACE"]).takes("PATH")
        .default("the pod's own")
        .help("The network namespace to work in")
        .bound(text!(run.network_namespace));

    CNI_MODE = switch_flag("cni-mode").variables(&["CNI_MODE"])
        .help("Called from a CNI plugin")
        .note("nothing to do, because the pod's namespace is entered from wherever the agent runs")
        .bound(switch!(run.cni_mode));

    RECONCILE = switch_flag("reconcile").variables(&["RECONCILE"])
        .help("Replace an active capture that differs")
        .note("nothing to do, because an active capture that differs is always replaced, in one step")
        .bound(switch!(run.reconcile));

    CLEANUP_ONLY = switch_flag("cleanup-only").variables(&["CLEANUP_ONLY"])
        .help("Remove the active capture and attach nothing")
        .bound(switch!(run.cleanup_only));

    FORCE_APPLY = switch_flag("force-apply").variables(&["FORCE_APPLY"])
        .help("Apply again even if the same capture is active")
        .bound(switch!(run.force_apply));

    NATIVE_NFTABLES = switch_flag("native-nftables").variables(&["NATIVE_NFTABLES"])
        .help("Accepted; no netfilter rules are installed")
        .note("nothing to do, because no netfilter rules are installed")
        .bound(switch!(run.native_nftables));

    FORCE_IPTABLES_BINARY = flag("force-iptables-binary").variables(&["FORCE_IPTABLES_BINARY"]).takes("NAME")
        .help("Accepted; iptables is not called")
        .note("nothing to do, because iptables is not called")
        .bound(text!(run.force_iptables_binary));

    LOG_OUTPUT_LEVEL = flag("log_output_level").takes("LEVELS").default("default:info")
        .help("Log levels, a list of scope:level")
        .note("not used, because the scopes are istio's; --log or INTERCEPT_LOG say what is logged")
        .bound(text!(run.log_output_level));

    LOG_AS_JSON = switch_flag("log_as_json")
        .help("Log in JSON")
        .note("not used; --log-format json or INTERCEPT_LOG_FORMAT=json do that")
        .bound(switch!(run.log_as_json));

    OWNER_GROUPS = variable(&["ISTIO_OUTBOUND_OWNER_GROUPS"]).takes("GROUPS").default("*")
        .help("Capture the outbound traffic of these groups only, ids or names, at most 64")
        .bound(FieldBinding {
            read: |reader, _, options| reader.owner_groups(&mut options.config),
            write: |config, _| match &config.owner_groups {
                OwnerGroups::Only(groups) => Written::of_ids(groups),
                OwnerGroups::All | OwnerGroups::Except(_) => Written::Nothing,
            },
        });

    OWNER_GROUPS_EXCLUDE = variable(&["ISTIO_OUTBOUND_OWNER_GROUPS_EXCLUDE"]).takes("GROUPS")
        .help("Never capture the outbound traffic of these groups; only without the above")
        .bound(FieldBinding {
            write: |config, _| match &config.owner_groups {
                OwnerGroups::Except(groups) => Written::of_ids(groups),
                OwnerGroups::All | OwnerGroups::Only(_) => Written::Nothing,
            },
            ..FieldBinding::READ_BY_ANOTHER
        });

    LOOPBACK_CIDR = variable(&["ISTIO_OUTBOUND_IPV4_LOOPBACK_CIDR"]).takes("RANGE").default("127.0.0.1/32")
        .help("What counts as localhost for IPv4")
        .bound(value!(config.loopback_v4, parse_loopback));

    ENVOY_USER = variable(&["ENVOY_USER"]).takes("USER").default("istio-proxy")
        .help("The user whose id is the default of -u")
        .bound(FieldBinding::READ_BY_ANOTHER);
}
