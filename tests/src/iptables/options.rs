//! What istio-iptables can be told, as values.

use std::net::{IpAddr, Ipv4Addr};

use ipnet::{IpNet, Ipv4Net};
use serde::{Deserialize, Serialize};

/// One configuration; the letters are istio-iptables' own options.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct IptablesOptions {
    /// -p: where outbound connections go.
    pub envoy_port: u16,
    /// -z: where inbound connections go.
    pub inbound_port: u16,
    /// -e: the tunnel's own port.
    pub tunnel_port: u16,
    /// -u: the proxy's users.
    pub proxy_uids: Vec<u32>,
    /// -g: the proxy's groups.
    pub proxy_gids: Vec<u32>,
    /// -m TPROXY, with -t and -r; none is REDIRECT.
    pub tproxy: Option<Tproxy>,
    /// -b: inbound ports that are captured.
    pub inbound_ports: IptablesPorts,
    /// -d: inbound ports that are not, when -b is `*`.
    pub exclude_inbound_ports: Vec<u16>,
    /// -c: interfaces left alone.
    pub exclude_interfaces: Vec<String>,
    /// -i: outbound destinations that are captured.
    pub include_cidrs: IptablesCidrs,
    /// -x: outbound destinations that are not.
    pub exclude_cidrs: Vec<IpNet>,
    /// -q: outbound ports captured besides.
    pub include_outbound_ports: Vec<u16>,
    /// -o: outbound ports left alone.
    pub exclude_outbound_ports: Vec<u16>,
    /// -k: interfaces whose arrivals count as outbound.
    pub virtual_interfaces: Vec<String>,
    /// --redirect-dns.
    pub dns: Option<IptablesDns>,
    /// ISTIO_OUTBOUND_OWNER_GROUPS and its _EXCLUDE.
    pub owner_groups: Groups,
    /// ISTIO_OUTBOUND_IPV4_LOOPBACK_CIDR.
    pub loopback_cidr: Ipv4Net,
    /// --drop-invalid.
    pub drop_invalid: bool,
    /// There are rules for IPv6: with --dual-stack, or if the pod's first address is of IPv6.
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

/// A list of ports, or all.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum IptablesPorts {
    /// `*`.
    All,
    /// These; none if empty.
    List(Vec<u16>),
}

/// A list of networks, or all.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum IptablesCidrs {
    /// `*`.
    All,
    /// These, as written (host bits are kept); none if empty.
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

/// Which groups' traffic is captured.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Groups {
    /// Only these.
    Only(Vec<u32>),
    /// All but these.
    Except(Vec<u32>),
}

impl Default for IptablesOptions {
    /// istio-iptables without options: the proxy's ids, and nothing captured.
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
    /// What Istio's injector asks for: `-p 15001 -z 15006 -u 1337 -m REDIRECT -i '*' -x "" -b '*' -d 15090,15020`.
    pub fn injected() -> Self {
        Self {
            inbound_ports: IptablesPorts::All,
            exclude_inbound_ports: vec![15090, 15020],
            include_cidrs: IptablesCidrs::All,
            ..Self::default()
        }
    }

    /// DNS capture, if it is in force: without a server and without --capture-all-dns it is not.
    pub(super) fn dns_in_force(&self) -> Option<&IptablesDns> {
        self.dns.as_ref().filter(|dns| dns.all || !dns.servers.is_empty())
    }
}
