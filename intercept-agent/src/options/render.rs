//! A policy as the options that give it, and as text to read.

use std::fmt::{self, Display};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;

use super::setting::{self, Setting};
use super::{Cidrs, Config, DNS_PORT, Dns, InboundMode, InboundPorts, KNOWN_PROXY, OwnerGroups};

const LOOPBACK: [IpAddr; 2] = [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)];

impl Config {
    /// The flags that give this policy, in one way whatever way it was asked for: -u and -g always, because
    /// their defaults depend on the pod, and else what differs from the default. The variables of
    /// [`Config::to_env`] belong to them; the servers of [`Dns::Resolvers`] come from the pod's resolv.conf.
    pub fn to_args(&self) -> Vec<String> {
        let default = Self::default();
        let mut args = Flags(Vec::new());
        args.differing(&setting::ENVOY_PORT, &self.proxy_port, &default.proxy_port);
        args.differing(&setting::INBOUND_CAPTURE_PORT, &self.inbound_port, &default.inbound_port);
        args.differing(&setting::INBOUND_TUNNEL_PORT, &self.tunnel_port, &default.tunnel_port);
        args.push(&setting::PROXY_UID, &list_or_comma(&self.proxy_uids));
        args.push(&setting::PROXY_GID, &list_or_comma(&self.proxy_gids));
        args.differing(&setting::INBOUND_MODE, &self.mode, &default.mode);
        args.differing(&setting::TPROXY_MARK, &self.tproxy_mark, &default.tproxy_mark);
        args.differing(&setting::TPROXY_TABLE, &self.tproxy_table, &default.tproxy_table);
        args.unless_empty(&setting::INBOUND_PORTS, &self.inbound_ports);
        args.unless_empty(&setting::LOCAL_EXCLUDE_PORTS, &self.inbound_exclude);
        args.unless_empty(&setting::EXCLUDE_INTERFACES, &join(&self.exclude_interfaces, ","));
        args.unless_empty(&setting::VIRT_INTERFACES, &join(&self.virt_interfaces, ","));
        args.unless_empty(&setting::SERVICE_CIDR, &self.include);
        args.unless_empty(&setting::SERVICE_EXCLUDE_CIDR, &join(&self.exclude, ","));
        args.unless_empty(&setting::OUTBOUND_PORTS, &self.outbound_ports);
        args.unless_empty(&setting::OUTBOUND_PORTS_EXCLUDE, &self.outbound_exclude_ports);
        if self.dns != Dns::Off {
            args.switch(&setting::REDIRECT_DNS);
        }
        if self.dns == Dns::All {
            args.switch(&setting::CAPTURE_ALL_DNS);
        }
        if self.open_without_proxy {
            args.switch(&setting::OPEN_WITHOUT_PROXY);
        }
        if self.without_ipv6 {
            args.switch(&setting::WITHOUT_IPV6);
        }
        if !self.accelerate.is_empty() {
            args.switch(&setting::ACCELERATE);
            args.differing(
                &setting::ACCELERATE_PROXIES,
                &join(&self.accelerate, ","),
                &KNOWN_PROXY.to_owned(),
            );
        }
        args.0
    }

    /// The variables that, with [`Config::to_args`], give this policy: those of the settings that have no flag.
    pub fn to_env(&self) -> Vec<(&'static str, String)> {
        let mut env = Vec::new();
        match &self.owner_groups {
            OwnerGroups::All => {}
            OwnerGroups::Only(groups) => env.push((setting::OWNER_GROUPS.env[0], list_or_comma(groups))),
            OwnerGroups::Except(groups) => {
                env.push((setting::OWNER_GROUPS_EXCLUDE.env[0], join(groups, ",")));
            }
        }
        if self.loopback_v4 != Self::default().loopback_v4 {
            env.push((setting::LOOPBACK_CIDR.env[0], self.loopback_v4.to_string()));
        }
        env
    }
}

/// Flags and their values.
struct Flags(Vec<String>);

impl Flags {
    fn push(&mut self, setting: &Setting, value: &dyn Display) {
        self.switch(setting);
        let value = value.to_string();
        // An interface may be called -p: by itself that would be a flag.
        match self.0.last_mut() {
            Some(flag) if value.starts_with('-') => *flag += &format!("={value}"),
            _ => self.0.push(value),
        }
    }

    fn differing<T: Display + PartialEq>(&mut self, setting: &Setting, value: &T, default: &T) {
        if value != default {
            self.push(setting, value);
        }
    }

    fn unless_empty(&mut self, setting: &Setting, value: &dyn Display) {
        let value = value.to_string();
        if !value.is_empty() {
            self.push(setting, &value);
        }
    }

    fn switch(&mut self, setting: &Setting) {
        self.0.extend(match (setting.short, setting.long) {
            (Some(short), _) => Some(format!("-{short}")),
            (None, long) => long.map(|long| format!("--{long}")),
        });
    }
}

fn join<T: Display>(items: &[T], separator: &str) -> String {
    items.iter().map(T::to_string).collect::<Vec<_>>().join(separator)
}

/// A list that must not vanish when it is empty: nothing at all would mean the default.
fn list_or_comma<T: Display>(items: &[T]) -> String {
    if items.is_empty() { ",".to_owned() } else { join(items, ",") }
}

impl fmt::Display for InboundMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Redirect => "REDIRECT",
            Self::Tproxy => "TPROXY",
        })
    }
}

/// As the value of -b.
impl fmt::Display for InboundPorts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::All => f.write_str("*"),
            Self::Only(ports) => ports.fmt(f),
        }
    }
}

/// As the value of -i.
impl fmt::Display for Cidrs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.all {
            return f.write_str("*");
        }
        let mut written = self.list.clone();
        if self.loopback && !written.iter().any(|network| network.addr().is_loopback()) {
            // The range that was written with a loopback address covers it.
            let rewritten = written.iter_mut().find_map(|network| {
                let address = LOOPBACK.iter().find(|address| network.contains(*address))?;
                Some((network, *address))
            });
            if let Some((network, address)) = rewritten {
                *network = IpNet::new_assert(address, network.prefix_len());
            }
        }
        f.write_str(&join(&written, ","))
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
        line("proxy users", or_none(join(&self.proxy_uids, ", ")))?;
        line("proxy groups", or_none(join(&self.proxy_gids, ", ")))?;
        line(
            "inbound mode",
            match self.mode {
                InboundMode::Redirect => self.mode.to_string(),
                InboundMode::Tproxy => {
                    format!("{}, mark {}, table {}", self.mode, self.tproxy_mark, self.tproxy_table)
                }
            },
        )?;
        line(
            "inbound ports",
            match &self.inbound_ports {
                InboundPorts::All if self.inbound_exclude.is_empty() => "all".to_owned(),
                InboundPorts::All => format!("all but {}", self.inbound_exclude),
                InboundPorts::Only(ports) => or_none(ports.to_string()),
            },
        )?;
        line("interfaces left alone", or_none(join(&self.exclude_interfaces, ", ")))?;
        line("interfaces of guests", or_none(join(&self.virt_interfaces, ", ")))?;
        let include =
            if self.include.all { "all".to_owned() } else { or_none(join(&self.include.list, ", ")) };
        line("outbound destinations", include)?;
        line("destinations left alone", or_none(join(&self.exclude, ", ")))?;
        line("outbound ports besides", or_none(self.outbound_ports.to_string()))?;
        line("outbound ports left alone", or_none(self.outbound_exclude_ports.to_string()))?;
        line(
            "owner groups",
            match &self.owner_groups {
                OwnerGroups::All => "all".to_owned(),
                OwnerGroups::Only(groups) => or_none(join(groups, ", ")),
                OwnerGroups::Except(groups) => format!("all but {}", join(groups, ", ")),
            },
        )?;
        line("localhost", format!("{}, ::1/128", self.loopback_v4))?;
        line("accelerated", or_none(join(&self.accelerate, ", ")))?;
        line("without the proxy", if self.open_without_proxy { "open" } else { "refused" }.to_owned())?;
        line("IPv6", if self.without_ipv6 { "left alone" } else { "as IPv4" }.to_owned())?;
        line(
            "DNS",
            match &self.dns {
                Dns::Off => "left alone".to_owned(),
                Dns::Resolvers(servers) => format!("{} to {DNS_PORT}", join(servers, ", ")),
                Dns::All => format!("everything to {DNS_PORT}"),
            },
        )
    }
}
