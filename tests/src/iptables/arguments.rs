//! A configuration as a command line and environment.

use std::fmt::Write;
use std::path::Path;

use super::options::{Groups, IptablesCidrs, IptablesOptions, IptablesPorts};

impl IptablesOptions {
    /// The arguments without the program's name. `resolv_conf` is the file with [`IptablesOptions::resolv_conf`].
    pub fn arguments(&self, resolv_conf: &Path) -> Vec<String> {
        let mut arguments: Vec<String> = Vec::new();
        let mut option = |name: &str, value: String| arguments.extend([name.to_owned(), value]);
        option("-p", self.envoy_port.to_string());
        option("-z", self.inbound_port.to_string());
        option("-e", self.tunnel_port.to_string());
        // An empty argument counts as absent; a list of empty items is an empty list.
        option("-u", if self.proxy_uids.is_empty() { ",".into() } else { join(&self.proxy_uids) });
        option("-g", join(&self.proxy_gids));
        match self.tproxy {
            None => option("-m", "REDIRECT".into()),
            Some(tproxy) => {
                option("-m", "TPROXY".into());
                option("-t", tproxy.mark.to_string());
                option("-r", tproxy.table.to_string());
            }
        }
        option(
            "-b",
            if let IptablesPorts::List(ports) = &self.inbound_ports { join(ports) } else { "*".into() },
        );
        option("-d", join(&self.exclude_inbound_ports));
        option("-c", join(&self.exclude_interfaces));
        option(
            "-i",
            if let IptablesCidrs::List(cidrs) = &self.include_cidrs { join(cidrs) } else { "*".into() },
        );
        option("-x", join(&self.exclude_cidrs));
        option("-q", join(&self.include_outbound_ports));
        option("-o", join(&self.exclude_outbound_ports));
        option("-k", join(&self.virtual_interfaces));
        if let Some(dns) = &self.dns {
            arguments.push("--redirect-dns".into());
            if dns.all {
                arguments.push("--capture-all-dns".into());
            }
            arguments.extend(["--resolv-conf".into(), resolv_conf.display().to_string()]);
        }
        if self.drop_invalid {
            arguments.push("--drop-invalid".into());
        }
        if !self.ipv6 {
            arguments.push("--without-ipv6".into());
        }
        arguments
    }

    /// The environment variables, for what has no option.
    pub fn environment(&self) -> Vec<(&'static str, String)> {
        let groups = match &self.owner_groups {
            Groups::Only(groups) => ("ISTIO_OUTBOUND_OWNER_GROUPS", join(groups)),
            Groups::Except(groups) => ("ISTIO_OUTBOUND_OWNER_GROUPS_EXCLUDE", join(groups)),
        };
        vec![groups, ("ISTIO_OUTBOUND_IPV4_LOOPBACK_CIDR", self.loopback_cidr.to_string())]
    }

    /// The content of a resolv.conf with the DNS servers.
    pub fn resolv_conf(&self) -> String {
        let servers = self.dns.iter().flat_map(|dns| &dns.servers);
        servers.fold(String::new(), |mut text, server| {
            writeln!(text, "nameserver {server}").expect("strings take everything");
            text
        })
    }
}

fn join(items: &[impl ToString]) -> String {
    items.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
}
