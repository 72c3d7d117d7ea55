//! DNS capture: nat's ISTIO_OUTPUT_DNS, and raw's connection tracking zones.

use std::net::IpAddr;

use super::{Builder, DNS_PORT, host};
use crate::iptables::rule::{Chain, IpFamily, IptablesTable, Match, Protocol, RuleTarget};

impl Builder<'_> {
    pub(super) fn dns(&mut self) {
        let Some(dns) = self.options.dns_in_force() else { return };
        let family = self.family;
        let servers: Vec<IpAddr> = dns
            .servers
            .iter()
            .copied()
            .filter(|server| server.is_ipv6() == (family == IpFamily::V6))
            .collect();
        let to_agent = RuleTarget::Redirect(DNS_PORT);
        self.append(IptablesTable::Raw, Chain::Output, [], RuleTarget::Jump(Chain::IstioOutputDns));
        if dns.all || !servers.is_empty() {
            self.output([], RuleTarget::Jump(Chain::IstioOutputDns));
        }
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            let dns_port = [Match::Protocol(protocol), Match::Port(53)];
            if dns.all {
                self.append(IptablesTable::Nat, Chain::IstioOutputDns, dns_port, to_agent);
                continue;
            }
            for &server in &servers {
                let [proto, port] = dns_port.clone();
                let matches = [proto, port, Match::Destination(host(server))];
                self.append(IptablesTable::Nat, Chain::IstioOutputDns, matches, to_agent);
            }
        }
        self.zones(dns.all, &servers);
    }

    /// Queries of Istio's agent to the real servers are tracked in zone 1, and those of applications to the agent in zone
    /// 2, because both may have the same addresses and ports. A packet keeps the first zone that it gets.
    fn zones(&mut self, all: bool, servers: &[IpAddr]) {
        let owners = self.options.proxy_uids.iter().map(|&user| Match::User(user));
        let owners = owners.chain(self.options.proxy_gids.iter().map(|&group| Match::Group(group)));
        for owner in owners {
            let question = [udp(), Match::Port(53), owner.clone()];
            self.append(IptablesTable::Raw, Chain::IstioOutputDns, question, RuleTarget::Zone(1));
            let answer = [udp(), Match::SourcePort(DNS_PORT), owner];
            self.append(IptablesTable::Raw, Chain::IstioOutputDns, answer, RuleTarget::Zone(2));
        }
        if all {
            self.append(IptablesTable::Raw, Chain::Prerouting, [], RuleTarget::Jump(Chain::IstioInbound));
            self.append(
                IptablesTable::Raw,
                Chain::IstioOutputDns,
                [udp(), Match::Port(53)],
                RuleTarget::Zone(2),
            );
            self.append(
                IptablesTable::Raw,
                Chain::IstioInbound,
                [udp(), Match::SourcePort(53)],
                RuleTarget::Zone(1),
            );
            return;
        }
        if !servers.is_empty() {
            self.append(IptablesTable::Raw, Chain::Prerouting, [], RuleTarget::Jump(Chain::IstioInbound));
        }
        for &server in servers {
            let question = [udp(), Match::Port(53), Match::Destination(host(server))];
            self.append(IptablesTable::Raw, Chain::IstioOutputDns, question, RuleTarget::Zone(2));
            let answer = [udp(), Match::SourcePort(53), Match::Source(host(server))];
            self.append(IptablesTable::Raw, Chain::IstioInbound, answer, RuleTarget::Zone(1));
        }
    }
}

fn udp() -> Match {
    Match::Protocol(Protocol::Udp)
}
