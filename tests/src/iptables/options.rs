//! The options of istio-iptables as values.

use std::net::{IpAddr, Ipv4Addr};

use ipnet::{IpNet, Ipv4Net};
use serde::{Deserialize, Serialize};

/// A configuration. The letters are the options of istio-iptables.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct IptablesOptions {
    /// -p: the port of outbound connections.
    pub envoy_port: u16,
    /// -z: the port of inbound connections.
    pub inbound_port: u16,
    /// -e: the tunnel's port.
    pub tunnel_port: u16,
    /// -u: the proxy's users.
    pub proxy_uids: Vec<u32>,
    /// -g: the proxy's groups.
    pub proxy_gids: Vec<u32>,
    /// -m TPROXY with -t and -r. `None` is REDIRECT.
    pub tproxy: Option<Tproxy>,
    /// -b: captured inbound ports.
    pub inbound_ports: IptablesPorts,
    /// -d: excluded inbound ports, if -b is `*`.
    pub exclude_inbound_ports: Vec<u16>,
    /// -c: excluded interfaces.
    pub exclude_interfaces: Vec<String>,
    /// -i: captured outbound destinations.
    pub include_cidrs: IptablesCidrs,
    /// -x: excluded outbound destinations.
    pub exclude_cidrs: Vec<IpNet>,
    /// -q: additional captured outbound ports.
    pub include_outbound_ports: Vec<u16>,
    /// -o: excluded outbound ports.
    pub exclude_outbound_ports: Vec<u16>,
    /// -k: interfaces whose inbound traffic counts as outbound.
    pub virtual_interfaces: Vec<String>,
    /// --redirect-dns.
    pub dns: Option<IptablesDns>,
    /// ISTIO_OUTBOUND_OWNER_GROUPS and its _EXCLUDE.
    pub owner_groups: Groups,
    /// ISTIO_OUTBOUND_IPV4_LOOPBACK_CIDR.
    pub loopback_cidr: Ipv4Net,
    /// --drop-invalid.
    pub drop_invalid: bool,
    /// Whether there are rules for IPv6: with --dual-stack, or if the pod's first address is IPv6.
    pub ipv6: bool,
}

/// The parameters of TPROXY mode.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tproxy {
    /// -t: the mark of packets for the proxy.
    pub mark: u32,
    /// -r: the routing table for them.
    pub table: u32,
}

/// All ports, or a list.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum IptablesPorts {
    /// `*`.
    All,
    /// These ports. No ports if empty.
    List(Vec<u16>),
}

/// All networks, or a list.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum IptablesCidrs {
    /// `*`.
    All,
    /// These networks, as written (with host bits). No networks if empty.
    List(Vec<IpNet>),
}

/// DNS capture.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct IptablesDns {
    /// --capture-all-dns.
    pub all: bool,
    /// The servers of resolv.conf.
    pub servers: Vec<IpAddr>,
}

/// The groups whose traffic is captured.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Groups {
    /// Only these groups.
    Only(Vec<u32>),
    /// All groups but these.
    Except(Vec<u32>),
}

impl Default for IptablesOptions {
    /// istio-iptables without options: the ids of the proxy, and no capture.
    fn default() -> Self {
        Self {
            envoy_port: 15001,
            inbound_port: 15006,
            tunnel_port: 15008,
            proxy_uids: vec![1337],
            proxy_gids: vec![1337],
            tproxy: None,
            inbound_ports: IptablesPorts::List(Vec::new()),
            exclude_inbound_ports: Vec::new(),
            exclude_interfaces: Vec::new(),
            include_cidrs: IptablesCidrs::List(Vec::new()),
            exclude_cidrs: Vec::new(),
            include_outbound_ports: Vec::new(),
            exclude_outbound_ports: Vec::new(),
            virtual_interfaces: Vec::new(),
            dns: None,
            owner_groups: Groups::Except(Vec::new()),
            loopback_cidr: Ipv4Net::new_assert(Ipv4Addr::LOCALHOST, 32),
            drop_invalid: false,
            ipv6: true,
        }
    }
}

impl IptablesOptions {
    /// The options of Istio's injector: `-p 15001 -z 15006 -u 1337 -m REDIRECT -i '*' -x "" -b '*' -d 15090,15020`.
    pub fn injected() -> Self {
        Self {
            inbound_ports: IptablesPorts::All,
            exclude_inbound_ports: vec![15090, 15020],
            include_cidrs: IptablesCidrs::All,
            ..Self::default()
        }
    }

    /// DNS capture, if it is active. It is not without a server and without --capture-all-dns.
    pub(super) fn dns_in_force(&self) -> Option<&IptablesDns> {
        self.dns.as_ref().filter(|dns| dns.all || !dns.servers.is_empty())
    }
}
