//! What is compared.

use std::fmt;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::iptables::{IptablesCidrs, IptablesOptions};

/// How traffic gets to the proxy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CaptureMode {
    /// Not at all: the client dials the server
    None,
    /// The client dials the proxy: the floor that interception can reach
    Explicit,
    /// istio-iptables' rules by iptables-nft
    IptablesNft,
    /// istio-iptables' rules by iptables-legacy
    IptablesLegacy,
    /// The same rules in nftables' own words, long lists as sets
    Nft,
    /// Another build of the agent: the one that --baseline names
    Baseline,
    /// This agent
    Agent,
    /// The other build, joining the sockets of a node
    BaselineAccelerated,
    /// This agent, joining the sockets of a node
    Accelerated,
    /// istio-iptables' rules by iptables-nft, and this agent in shadow mode
    Shadowed,
}

impl CaptureMode {
    /// Whether the agent is needed.
    pub fn is_agent(self) -> bool {
        self.is_baseline() || matches!(self, Self::Agent | Self::Accelerated | Self::Shadowed)
    }

    /// Whether the agent is the other build.
    pub fn is_baseline(self) -> bool {
        matches!(self, Self::Baseline | Self::BaselineAccelerated)
    }

    /// Whether connections between proxies are joined.
    pub fn is_accelerated(self) -> bool {
        matches!(self, Self::BaselineAccelerated | Self::Accelerated)
    }

    /// Whether something captures, so that flags mean something.
    pub fn captures(self) -> bool {
        !matches!(self, Self::None | Self::Explicit)
    }
}

/// Which of the two pods has its traffic captured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Path {
    /// Both: client, proxy, proxy, server.
    Both,
    /// The client's.
    Outbound,
    /// The server's.
    Inbound,
}

/// Long lists in the flags.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Lists {
    /// None: what Istio's injector asks for.
    Injected,
    /// So many excluded networks; the traffic is to none of them.
    Cidrs(u32),
    /// So many excluded ports, inbound and outbound; the traffic is to none of them.
    Ports(u16),
}

/// Who is the proxy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ProxyKind {
    /// The built-in relay.
    Relay,
    /// Envoy, which copies bytes.
    EnvoyTcp,
    /// Envoy, which understands HTTP.
    EnvoyHttp,
    /// The same, with HTTP/2 between the two proxies.
    EnvoyHttp2,
}

impl ProxyKind {
    /// Whether it understands HTTP, so that client and server have to speak it.
    pub fn is_http(self) -> bool {
        matches!(self, Self::EnvoyHttp | Self::EnvoyHttp2)
    }
}

/// One thing that is measured: a pair of pods.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Cell {
    /// How traffic gets to the proxy.
    pub mode: CaptureMode,
    /// In which pods.
    pub path: Path,
    /// With which flags.
    pub lists: Lists,
    /// To which proxy.
    pub proxy: ProxyKind,
}

impl Cell {
    /// Both pods captured by the injector's flags, with the built-in relay.
    pub fn plain(mode: CaptureMode) -> Self {
        Self { mode, path: Path::Both, lists: Lists::Injected, proxy: ProxyKind::Relay }
    }

    /// The same in another mode.
    #[must_use]
    pub fn by(self, mode: CaptureMode) -> Self {
        Self { mode, ..self }
    }
}

impl Lists {
    /// The flags, of both pods alike.
    pub fn options(self) -> IptablesOptions {
        let mut options = IptablesOptions::injected();
        match self {
            Self::Injected => {}
            Self::Cidrs(n) => options.exclude_cidrs = cidrs(n),
            Self::Ports(n) => {
                let ports = 20_000..20_000 + n;
                options.exclude_outbound_ports.extend(ports.clone());
                options.exclude_inbound_ports.extend(ports);
            }
        }
        debug_assert_eq!(options.include_cidrs, IptablesCidrs::All);
        options
    }
}

/// Networks that do not touch, so that nobody can merge them, and short, so that 10,000 of them fit an argument
/// (128 KiB is the kernel's limit for one).
fn cidrs(n: u32) -> Vec<ipnet::IpNet> {
    let all = (1..=8).flat_map(|a| (0..=255).flat_map(move |b| (0..5).map(move |c| (a, b, 2 * c))));
    let nets: Vec<ipnet::IpNet> = all
        .take(n as usize)
        .map(|(a, b, c)| ipnet::Ipv4Net::new_assert(std::net::Ipv4Addr::new(a, b, c, 0), 24).into())
        .collect();
    assert_eq!(nets.len(), n as usize, "there are not so many short networks");
    nets
}

macro_rules! displayed_as_serialized {
    ($($kind:ty),*) => {$(
        impl fmt::Display for $kind {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                let name = serde_json::to_value(self).map_err(|_| fmt::Error)?;
                f.pad(name.as_str().ok_or(fmt::Error)?)
            }
        }
    )*};
}
displayed_as_serialized!(CaptureMode, Path, ProxyKind);

impl fmt::Display for Lists {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Injected => f.pad("no lists"),
            Self::Cidrs(n) => f.pad(&format!("{n} CIDRs")),
            Self::Ports(n) => f.pad(&format!("{n} ports")),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn the_longest_list_fits_an_argument() {
        let options = Lists::Cidrs(10_000).options();
        let longest = options.arguments(Path::new("")).into_iter().map(|argument| argument.len()).max();
        assert!(longest.is_some_and(|longest| longest < 128 * 1024), "{longest:?}");
    }

    #[test]
    fn excluded_networks_stay_apart() {
        let nets = cidrs(10_000);
        assert_eq!(ipnet::IpNet::aggregate(&nets).len(), 10_000);
    }

    #[test]
    fn modes_are_named_as_on_the_command_line() {
        for mode in CaptureMode::value_variants() {
            let name = mode.to_possible_value().expect("no mode is hidden").get_name().to_owned();
            assert_eq!(mode.to_string(), name);
        }
    }
}
