//! DNS capture: nat's ISTIO_OUTPUT_DNS, and raw's connection tracking zones.

use std::net::IpAddr;

use super::{Builder, DNS_PORT, host};
use crate::iptables::rule::{Chain, Family, Match, Protocol, Table, Target};

impl Builder<'_> {
    pub(super) fn dns(&mut self) {
        let Some(dns) = self.options.dns_in_force() else { return };
        let family = self.family;
        let servers: Vec<IpAddr> =
            dns.servers.iter().copied().filter(|server| server.is_ipv6() == (family == Family::V6)).collect();
        let to_agent = Target::Redirect(DNS_PORT);
        self.append(Table::Raw, Chain::Output, [], Target::Jump(Chain::IstioOutputDns));
        if dns.all || !servers.is_empty() {
            self.output([], Target::Jump(Chain::IstioOutputDns));
        }
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            let dns_port = [Match::Protocol(protocol), Match::Port(53)];
            if dns.all {
                self.append(Table::Nat, Chain::IstioOutputDns, dns_port, to_agent);
                continue;
            }
            for &server in &servers {
                let [proto, port] = dns_port.clone();
                let matches = [proto, port, Match::Destination(host(server))];
                self.append(Table::Nat, Chain::IstioOutputDns, matches, to_agent);
            }
        }
        self.zones(dns.all, &servers);
    }

    /// The agent's questions to the real servers are tracked in zone 1, the application's to the agent in zone 2:
    /// both may have the same addresses and ports. The first zone a packet is given stays.
    fn zones(&mut self, all: bool, servers: &[IpAddr]) {
        let owners = self.options.proxy_uids.iter().map(|&user| Match::User(user));
        let owners = owners.chain(self.options.proxy_gids.iter().map(|&group| Match::Group(group)));
        for owner in owners {
            let question = [udp(), Match::Port(53), owner.clone()];
            self.append(Table::Raw, Chain::IstioOutputDns, question, Target::Zone(1));
            let answer = [udp(), Match::SourcePort(DNS_PORT), owner];
            self.append(Table::Raw, Chain::IstioOutputDns, answer, Target::Zone(2));
        }
        if all {
            self.append(Table::Raw, Chain::Prerouting, [], Target::Jump(Chain::IstioInbound));
            self.append(Table::Raw, Chain::IstioOutputDns, [udp(), Match::Port(53)], Target::Zone(2));
            self.append(Table::Raw, Chain::IstioInbound, [udp(), Match::SourcePort(53)], Target::Zone(1));
            return;
        }
        if !servers.is_empty() {
            self.append(Table::Raw, Chain::Prerouting, [], Target::Jump(Chain::IstioInbound));
        }
        for &server in servers {
            let question = [udp(), Match::Port(53), Match::Destination(host(server))];
            self.append(Table::Raw, Chain::IstioOutputDns, question, Target::Zone(2));
            let answer = [udp(), Match::SourcePort(53), Match::Source(host(server))];
            self.append(Table::Raw, Chain::IstioInbound, answer, Target::Zone(1));
        }
    }
}

fn udp() -> Match {
    Match::Protocol(Protocol::Udp)
}
