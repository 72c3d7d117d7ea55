//! The validated policy of one pod, and the switches of one run.

use std::collections::BTreeSet;
use std::fmt;
use std::io;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use ipnet::{IpNet, Ipv4Net};
use serde::{Deserialize, Serialize};

use super::render::joined_paths;
use super::{InterfacePattern, NameSource, Ports, RawOptions};

/// Where captured DNS goes in Istio.
pub(super) const DEFAULT_DNS_PORT: u16 = 15053;
/// Most users, and most groups, whose traffic is the proxy's own.
pub const MAX_PROXY_IDS: usize = 16;
/// Most groups in either owner-group list; istio's own limit for the list of groups to capture.
pub const MAX_OWNER_GROUPS: usize = 64;
/// Most DNS servers of a pod: a C library asks three.
pub const MAX_RESOLVERS: usize = 64;

/// What is captured for one pod, and what is left alone.
///
/// Two equal values decide every flow alike: sets are sorted and free of duplicates, and what other options
/// make meaningless is left out. Ports and ids are in host order; ids are those seen inside the pod.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Where outbound TCP goes.
    pub proxy_port: u16,
    /// Where inbound TCP goes.
    pub inbound_port: u16,
    /// Never captured inbound in [`InboundMode::Redirect`], never looped back to the inbound port.
    pub tunnel_port: u16,
    /// Users whose traffic is the proxy's, in the order given, which decides.
    pub proxy_uids: Vec<u32>,
    /// Groups whose traffic is the proxy's, in the order given.
    pub proxy_gids: Vec<u32>,
    /// How inbound connections reach the proxy.
    pub mode: InboundMode,
    /// The mark of packets on their way to the proxy in [`InboundMode::Tproxy`].
    pub tproxy_mark: u32,
    /// The routing table of marked packets in [`InboundMode::Tproxy`].
    pub tproxy_table: u32,
    /// Inbound ports to capture.
    pub inbound_ports: InboundPorts,
    /// Inbound ports left alone; empty unless `inbound_ports` is [`InboundPorts::All`].
    pub inbound_exclude: Ports,
    /// Interfaces on which neither direction is captured.
    pub exclude_interfaces: Vec<InterfacePattern>,
    /// Interfaces whose arriving traffic is treated as outbound.
    pub virt_interfaces: Vec<InterfacePattern>,
    /// Outbound destinations to capture.
    pub include: Cidrs,
    /// Outbound destinations left alone; host bits cleared, sorted.
    pub exclude: Vec<IpNet>,
    /// Outbound ports captured in addition to `include`.
    pub outbound_ports: Ports,
    /// Outbound ports left alone, for TCP and UDP.
    pub outbound_exclude_ports: Ports,
    /// Whose outbound traffic is captured.
    pub owner_groups: OwnerGroups,
    /// What counts as localhost for IPv4; host bits cleared.
    pub loopback_v4: Ipv4Net,
    /// Which DNS queries are captured.
    pub dns: Dns,
    /// Where captured DNS goes.
    #[serde(default = "default_dns_port")]
    pub dns_port: u16,
    /// DNS over TCP is left alone.
    #[serde(default)]
    pub dns_over_udp_only: bool,
    /// Sources whose inbound connections are left alone; host bits cleared, sorted.
    #[serde(default)]
    pub exclude_sources: Vec<IpNet>,
    /// The proxy's connections to its own pod are left alone.
    #[serde(default)]
    pub without_self_capture: bool,
    /// What would be refused because the proxy does not listen goes on uncaptured.
    #[serde(default)]
    pub open_without_proxy: bool,
    /// IPv6 is left alone.
    #[serde(default)]
    pub without_ipv6: bool,
    /// Executables of the proxy whose connections within the node are joined past TCP; none when empty. Sorted.
    #[serde(default)]
    pub accelerate: Vec<String>,
    /// Cgroups of the proxy's container: only a process in one of them can be the proxy. Any can when empty. Sorted.
    #[serde(default)]
    pub proxy_cgroups: Vec<PathBuf>,
    /// Cgroups of containers whose outbound traffic is left alone. Sorted.
    #[serde(default)]
    pub exempt_cgroups: Vec<PathBuf>,
    /// As `proxy_cgroups`, by the names that Kubernetes has for the containers. Sorted.
    #[serde(default)]
    pub proxy_containers: Vec<String>,
    /// As `exempt_cgroups`, by name. Sorted.
    #[serde(default)]
    pub exempt_containers: Vec<String>,
    /// The programs decide and compare with what happens, and change nothing.
    #[serde(default)]
    pub shadow: bool,
}

/// How inbound connections reach the proxy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum InboundMode {
    /// The proxy asks for the original destination.
    Redirect,
    /// The proxy sees the original destination, and the application the original source.
    Tproxy,
}

/// Inbound ports to capture.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum InboundPorts {
    /// Every port but the excluded ones.
    All,
    /// These; none when empty.
    Only(Ports),
}

/// Outbound destinations to capture.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cidrs {
    /// Every destination; `list` is empty then.
    pub all: bool,
    /// These destinations; host bits cleared, sorted.
    pub list: Vec<IpNet>,
    /// An item was written with a loopback address: other owners' loopback traffic is then not left alone
    /// early. Kept apart from `list` because the address as written counts, host bits included
    /// (`127.0.0.1/1`).
    pub loopback: bool,
}

/// Whose outbound traffic is captured. Group ids, sorted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OwnerGroups {
    /// Everyone's.
    All,
    /// That of these groups; nobody's when empty.
    Only(Vec<u32>),
    /// Everyone's but that of these groups.
    Except(Vec<u32>),
}

/// Which DNS queries are captured.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Dns {
    /// None.
    Off,
    /// Those to these servers; sorted, never empty.
    Resolvers(Vec<IpAddr>),
    /// Everything to port 53.
    All,
}

/// For records of agents that knew no other port.
fn default_dns_port() -> u16 {
    DEFAULT_DNS_PORT
}

/// What this run is asked to do. None of it is policy: it does not decide a flow.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunOptions {
    /// Print what would be done, change nothing.
    pub dry_run: bool,
    /// Change nothing; useful with `run_validation`.
    pub skip_rule_apply: bool,
    /// Probe that redirection works.
    pub run_validation: bool,
    /// The port the probe connects to.
    pub probe_port: u16,
    /// How long the probe may take; never zero.
    pub probe_timeout: Duration,
    /// Remove what is attached, attach nothing.
    pub cleanup_only: bool,
    /// Replace what differs instead of failing.
    pub reconcile: bool,
    /// Apply again even if the same policy is active.
    pub force_apply: bool,
    /// The pod's network namespace, as a path.
    pub network_namespace: Option<PathBuf>,
    /// Called from a CNI plugin, in the host's filesystem.
    pub cni_mode: bool,
    /// Both address families were asked for.
    pub dual_stack: bool,
    /// Conntrack hygiene was asked for.
    pub drop_invalid: bool,
    /// nftables was asked for.
    pub native_nftables: bool,
    /// The iptables binary asked for.
    pub force_iptables_binary: Option<String>,
    /// The log level asked for, in istio's `scope:level` form.
    pub log_output_level: Option<String>,
    /// JSON logs were asked for.
    pub log_as_json: bool,
}

impl Config {
    /// Before any option has been read. Every field is set by a row of the table, which has the defaults.
    pub(super) fn unread() -> Self {
        Self {
            proxy_port: 0,
            inbound_port: 0,
            tunnel_port: 0,
            proxy_uids: Vec::new(),
            proxy_gids: Vec::new(),
            mode: InboundMode::Redirect,
            tproxy_mark: 0,
            tproxy_table: 0,
            inbound_ports: InboundPorts::Only(Ports::default()),
            inbound_exclude: Ports::default(),
            exclude_interfaces: Vec::new(),
            virt_interfaces: Vec::new(),
            include: Cidrs::default(),
            exclude: Vec::new(),
            outbound_ports: Ports::default(),
            outbound_exclude_ports: Ports::default(),
            owner_groups: OwnerGroups::All,
            loopback_v4: Ipv4Net::default(),
            dns: Dns::Off,
            dns_port: 0,
            dns_over_udp_only: false,
            exclude_sources: Vec::new(),
            without_self_capture: false,
            open_without_proxy: false,
            without_ipv6: false,
            accelerate: Vec::new(),
            proxy_cgroups: Vec::new(),
            exempt_cgroups: Vec::new(),
            proxy_containers: Vec::new(),
            exempt_containers: Vec::new(),
            shadow: false,
        }
    }

    /// Whether containers are named, whose cgroups come and go with them.
    pub fn names_containers(&self) -> bool {
        !self.proxy_containers.is_empty() || !self.exempt_containers.is_empty()
    }
}

impl RunOptions {
    /// As [`Config::unread`].
    pub(super) fn unread() -> Self {
        Self {
            dry_run: false,
            skip_rule_apply: false,
            run_validation: false,
            probe_port: 0,
            probe_timeout: Duration::ZERO,
            cleanup_only: false,
            reconcile: false,
            force_apply: false,
            network_namespace: None,
            cni_mode: false,
            dual_stack: false,
            drop_invalid: false,
            native_nftables: false,
            force_iptables_binary: None,
            log_output_level: None,
            log_as_json: false,
        }
    }
}

/// A pod without users, groups and servers.
pub(super) struct Nameless;

impl NameSource for Nameless {
    fn user(&self, _: &str) -> io::Result<Option<u32>> {
        Ok(None)
    }

    fn group(&self, _: &str) -> io::Result<Option<u32>> {
        Ok(None)
    }

    fn resolv_conf(&self) -> io::Result<String> {
        Ok(String::new())
    }
}

fn defaults() -> (Config, RunOptions) {
    let read = RawOptions::default().validate(&Nameless);
    let (config, run, _) = read.expect("the table's defaults are valid, as every test of an option shows");
    (config, run)
}

impl Default for Config {
    /// What no options at all mean where no `istio-proxy` user exists: nothing is captured.
    fn default() -> Self {
        defaults().0
    }
}

impl Default for RunOptions {
    fn default() -> Self {
        defaults().1
    }
}

impl OwnerGroups {
    /// Everyone's but that of `groups`, which need not be sorted.
    pub(super) fn except(groups: BTreeSet<u32>) -> Self {
        if groups.is_empty() { Self::All } else { Self::Except(groups.into_iter().collect()) }
    }
}

/// One line a rule, for people.
impl fmt::Display for Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let or_none = |text: String| if text.is_empty() { "none".to_owned() } else { text };
        let mut line = |name: &str, value: String| writeln!(f, "{name:<26}{value}");
        line("outbound TCP goes to", self.proxy_port.to_string())?;
        line("inbound TCP goes to", self.inbound_port.to_string())?;
        line("tunnel port", self.tunnel_port.to_string())?;
        line("proxy users", or_none(listed(&self.proxy_uids)))?;
        line("proxy groups", or_none(listed(&self.proxy_gids)))?;
        if !self.proxy_cgroups.is_empty() {
            line("proxy only in", joined_paths(&self.proxy_cgroups))?;
        }
        if !self.exempt_cgroups.is_empty() {
            line("containers left alone", joined_paths(&self.exempt_cgroups))?;
        }
        for (what, names) in
            [("proxy container", &self.proxy_containers), ("exempt containers", &self.exempt_containers)]
        {
            if !names.is_empty() {
                line(what, listed(names))?;
            }
        }
        line("inbound mode", self.mode_text())?;
        line("inbound ports", or_none(self.inbound_ports_text()))?;
        line("sources left alone", or_none(listed(&self.exclude_sources)))?;
        line("interfaces left alone", or_none(listed(&self.exclude_interfaces)))?;
        line("interfaces of guests", or_none(listed(&self.virt_interfaces)))?;
        let include = if self.include.all { "all".to_owned() } else { or_none(listed(&self.include.list)) };
        line("outbound destinations", include)?;
        line("destinations left alone", or_none(listed(&self.exclude)))?;
        line("outbound ports besides", or_none(self.outbound_ports.to_string()))?;
        line("outbound ports left alone", or_none(self.outbound_exclude_ports.to_string()))?;
        line("owner groups", or_none(self.owner_groups.to_string()))?;
        line("localhost", format!("{}, ::1/128", self.loopback_v4))?;
        line("accelerated", or_none(listed(&self.accelerate)))?;
        line("without the proxy", if self.open_without_proxy { "open" } else { "refused" }.to_owned())?;
        if self.shadow {
            line("mode", "shadow: nothing is changed".to_owned())?;
        }
        let to_itself = if self.without_self_capture { "left alone" } else { "captured" };
        line("the proxy to its own pod", to_itself.to_owned())?;
        line("IPv6", if self.without_ipv6 { "left alone" } else { "as IPv4" }.to_owned())?;
        line("DNS", self.dns_text())
    }
}

/// The longer lines.
impl Config {
    fn mode_text(&self) -> String {
        match self.mode {
            InboundMode::Redirect => self.mode.to_string(),
            InboundMode::Tproxy => {
                format!("{}, mark {}, table {}", self.mode, self.tproxy_mark, self.tproxy_table)
            }
        }
    }

    fn inbound_ports_text(&self) -> String {
        match &self.inbound_ports {
            InboundPorts::All if self.inbound_exclude.is_empty() => "all".to_owned(),
            InboundPorts::All => format!("all but {}", self.inbound_exclude),
            InboundPorts::Only(ports) => ports.to_string(),
        }
    }

    fn dns_text(&self) -> String {
        let over = if self.dns_over_udp_only { " over UDP" } else { "" };
        match &self.dns {
            Dns::Off => "left alone".to_owned(),
            Dns::Resolvers(servers) => format!("{}{over} to {}", listed(servers), self.dns_port),
            Dns::All => format!("everything{over} to {}", self.dns_port),
        }
    }
}

impl fmt::Display for OwnerGroups {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::All => f.write_str("all"),
            Self::Only(groups) => f.write_str(&listed(groups)),
            Self::Except(groups) => write!(f, "all but {}", listed(groups)),
        }
    }
}

fn listed<T: fmt::Display>(items: &[T]) -> String {
    items.iter().map(T::to_string).collect::<Vec<_>>().join(", ")
}
