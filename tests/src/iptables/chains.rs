//! The rules of a configuration, in the order in which istio-iptables makes them.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;

use super::options::{Groups, IptablesCidrs, IptablesOptions, IptablesPorts};
use super::rule::{Chain, IpFamily, IptablesTable, Match, Protocol, Rule, RuleTarget};

mod dns;
mod inbound;

/// The source of the proxy's inbound passthrough.
pub const PASSTHROUGH_V4: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 6);
/// The same for IPv6. istio-iptables adds this address to lo.
pub const PASSTHROUGH_V6: Ipv6Addr = Ipv6Addr::new(0, 0, 0, 0, 0, 0, 0, 6);
/// The mark of the proxy's connections over lo, in TPROXY mode.
pub const OUTBOUND_MARK: u32 = 1338;
/// The port on which Istio's agent answers DNS.
pub const DNS_PORT: u16 = 15053;

/// All rules of a configuration for one family.
pub fn rules(options: &IptablesOptions, family: IpFamily) -> Vec<Rule> {
    if family == IpFamily::V6 && !options.ipv6 {
        return Vec::new();
    }
    let mut builder = Builder::new(options, family);
    builder.exclude_interfaces();
    builder.virtual_interfaces();
    builder.drop_invalid();
    builder.inbound();
    builder.outbound();
    builder.tproxy_marks();
    builder.rules
}

struct Builder<'a> {
    options: &'a IptablesOptions,
    family: IpFamily,
    /// The network that counts as "localhost".
    localhost: IpNet,
    passthrough: IpNet,
    rules: Vec<Rule>,
}

impl<'a> Builder<'a> {
    fn new(options: &'a IptablesOptions, family: IpFamily) -> Self {
        let localhost = match family {
            IpFamily::V4 => IpNet::V4(options.loopback_cidr),
            IpFamily::V6 => family.host(Ipv4Addr::LOCALHOST, Ipv6Addr::LOCALHOST),
        };
        let passthrough = family.host(PASSTHROUGH_V4, PASSTHROUGH_V6);
        Self { options, family, localhost, passthrough, rules: Vec::new() }
    }

    fn append<const N: usize>(
        &mut self,
        table: IptablesTable,
        chain: Chain,
        matches: [Match; N],
        target: RuleTarget,
    ) {
        self.rules.push(Rule { table, chain, position: None, matches: matches.into(), target });
    }

    fn insert<const N: usize>(
        &mut self,
        table: IptablesTable,
        chain: Chain,
        position: usize,
        matches: [Match; N],
        target: RuleTarget,
    ) {
        self.rules.push(Rule { table, chain, position: Some(position), matches: matches.into(), target });
    }

    /// Appends to ISTIO_OUTPUT of table nat.
    fn output<const N: usize>(&mut self, matches: [Match; N], target: RuleTarget) {
        self.append(IptablesTable::Nat, Chain::IstioOutput, matches, target);
    }

    fn exclude_interfaces(&mut self) {
        let tables: &[IptablesTable] = if self.options.tproxy.is_some() {
            &[IptablesTable::Nat, IptablesTable::Mangle]
        } else {
            &[IptablesTable::Nat]
        };
        for &table in tables {
            for interface in &self.options.exclude_interfaces {
                self.append(table, Chain::Prerouting, [Match::In(interface.clone())], RuleTarget::Return);
                self.append(table, Chain::Output, [Match::Out(interface.clone())], RuleTarget::Return);
            }
        }
    }

    fn virtual_interfaces(&mut self) {
        for interface in &self.options.virtual_interfaces {
            self.insert(
                IptablesTable::Nat,
                Chain::Prerouting,
                1,
                [Match::In(interface.clone())],
                RuleTarget::Return,
            );
        }
    }

    fn drop_invalid(&mut self) {
        if self.options.drop_invalid {
            self.append(
                IptablesTable::Mangle,
                Chain::Prerouting,
                [Match::Invalid],
                RuleTarget::Jump(Chain::IstioDrop),
            );
            self.append(IptablesTable::Mangle, Chain::IstioDrop, [], RuleTarget::Drop);
        }
    }

    fn outbound(&mut self) {
        let family = self.family;
        self.append(IptablesTable::Nat, Chain::Output, [], RuleTarget::Jump(Chain::IstioOutput));
        for &port in &self.options.exclude_outbound_ports {
            for protocol in [Protocol::Tcp, Protocol::Udp] {
                self.output([Match::Protocol(protocol), Match::Port(port)], RuleTarget::Return);
            }
        }
        self.output([lo_out(), Match::Source(self.passthrough)], RuleTarget::Return);
        self.proxy_users();
        self.proxy_groups();
        self.owner_groups();
        self.dns();
        self.output([Match::Destination(self.localhost)], RuleTarget::Return);
        for &cidr in self.options.exclude_cidrs.iter().filter(|cidr| family.is_of(cidr)) {
            self.output([Match::Destination(cidr)], RuleTarget::Return);
        }
        for &port in &self.options.include_outbound_ports {
            self.output(
                [Match::Protocol(Protocol::Tcp), Match::Port(port)],
                RuleTarget::Jump(Chain::IstioRedirect),
            );
        }
        self.include_cidrs();
    }

    fn proxy_users(&mut self) {
        let dns = self.options.dns_in_force().is_some();
        let tunnel = self.options.tunnel_port;
        for &user in &self.options.proxy_uids {
            let port = if dns { Match::NotPorts(vec![53, tunnel]) } else { Match::NotPort(tunnel) };
            self.output(
                [
                    lo_out(),
                    Match::NotDestination(self.localhost),
                    Match::Protocol(Protocol::Tcp),
                    port,
                    Match::User(user),
                ],
                RuleTarget::Jump(Chain::IstioInRedirect),
            );
            self.self_calls(Match::NotUser(user));
            self.output([Match::User(user)], RuleTarget::Return);
        }
    }

    fn proxy_groups(&mut self) {
        let tunnel = self.options.tunnel_port;
        for &group in &self.options.proxy_gids {
            // With DNS capture, port 53 is excepted for users, but not for groups.
            self.output(
                [
                    lo_out(),
                    Match::NotDestination(self.localhost),
                    Match::Protocol(Protocol::Tcp),
                    Match::NotPort(tunnel),
                    Match::Group(group),
                ],
                RuleTarget::Jump(Chain::IstioInRedirect),
            );
            self.self_calls(Match::NotGroup(group));
            self.output([Match::Group(group)], RuleTarget::Return);
        }
    }

    /// Connections of applications to the pod itself are not captured, unless the captured networks contain loopback.
    fn self_calls(&mut self, others: Match) {
        if let IptablesCidrs::List(cidrs) = &self.options.include_cidrs
            && cidrs.iter().any(|cidr| cidr.addr().is_loopback())
        {
            return;
        }
        if self.options.dns_in_force().is_some() {
            self.output(
                [lo_out(), Match::Protocol(Protocol::Tcp), Match::NotPort(53), others],
                RuleTarget::Return,
            );
        } else {
            self.output([lo_out(), others], RuleTarget::Return);
        }
    }

    fn owner_groups(&mut self) {
        match &self.options.owner_groups {
            Groups::Except(groups) => {
                for &group in groups {
                    self.output([Match::Group(group)], RuleTarget::Return);
                }
            }
            Groups::Only(groups) => self.rules.push(Rule {
                table: IptablesTable::Nat,
                chain: Chain::IstioOutput,
                position: None,
                matches: groups.iter().map(|&group| Match::NotGroup(group)).collect(),
                target: RuleTarget::Return,
            }),
        }
    }

    fn include_cidrs(&mut self) {
        let family = self.family;
        match &self.options.include_cidrs {
            IptablesCidrs::All => {
                self.output([], RuleTarget::Jump(Chain::IstioRedirect));
                for interface in &self.options.virtual_interfaces {
                    self.insert(
                        IptablesTable::Nat,
                        Chain::Prerouting,
                        1,
                        [Match::In(interface.clone())],
                        RuleTarget::Jump(Chain::IstioRedirect),
                    );
                }
            }
            IptablesCidrs::List(cidrs) => {
                for &cidr in cidrs.iter().filter(|cidr| family.is_of(cidr)) {
                    for interface in &self.options.virtual_interfaces {
                        self.insert(
                            IptablesTable::Nat,
                            Chain::Prerouting,
                            1,
                            [Match::In(interface.clone()), Match::Destination(cidr)],
                            RuleTarget::Jump(Chain::IstioRedirect),
                        );
                    }
                    self.output([Match::Destination(cidr)], RuleTarget::Jump(Chain::IstioRedirect));
                }
            }
        }
    }
}

fn lo_out() -> Match {
    Match::Out("lo".into())
}

fn host(addr: IpAddr) -> IpNet {
    addr.into()
}

/// Whether inbound ports are captured.
fn captures_inbound(options: &IptablesOptions) -> bool {
    options.inbound_ports != IptablesPorts::List(Vec::new())
}
