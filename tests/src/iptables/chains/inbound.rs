//! Connections from outside: REDIRECT in nat, or TPROXY in mangle.

use super::{Builder, OUTBOUND_MARK, captures_inbound, lo_out};
use crate::iptables::options::IptablesPorts;
use crate::iptables::rule::{Chain, IptablesTable, Match, Protocol, RuleTarget};

impl Builder<'_> {
    pub(super) fn inbound(&mut self) {
        let options = self.options;
        self.append(
            IptablesTable::Nat,
            Chain::IstioInbound,
            [tcp(), Match::Port(options.tunnel_port)],
            RuleTarget::Return,
        );
        self.append(
            IptablesTable::Nat,
            Chain::IstioRedirect,
            [tcp()],
            RuleTarget::Redirect(options.envoy_port),
        );
        self.append(
            IptablesTable::Nat,
            Chain::IstioInRedirect,
            [tcp()],
            RuleTarget::Redirect(options.inbound_port),
        );
        if !captures_inbound(options) {
            return;
        }
        let table = if options.tproxy.is_some() { IptablesTable::Mangle } else { IptablesTable::Nat };
        if let Some(tproxy) = options.tproxy {
            self.append(IptablesTable::Mangle, Chain::IstioDivert, [], RuleTarget::SetMark(tproxy.mark));
            self.append(IptablesTable::Mangle, Chain::IstioDivert, [], RuleTarget::Accept);
            self.append(
                IptablesTable::Mangle,
                Chain::IstioTproxy,
                [Match::NotDestination(self.localhost), tcp()],
                RuleTarget::Tproxy { mark: tproxy.mark, port: options.inbound_port },
            );
        }
        self.append(table, Chain::Prerouting, [tcp()], RuleTarget::Jump(Chain::IstioInbound));
        match &options.inbound_ports {
            IptablesPorts::All => {
                for &port in &options.exclude_inbound_ports {
                    self.append(table, Chain::IstioInbound, [tcp(), Match::Port(port)], RuleTarget::Return);
                }
                if table == IptablesTable::Mangle {
                    let established = [tcp(), Match::Established];
                    self.append(
                        table,
                        Chain::IstioInbound,
                        established,
                        RuleTarget::Jump(Chain::IstioDivert),
                    );
                    self.append(table, Chain::IstioInbound, [tcp()], RuleTarget::Jump(Chain::IstioTproxy));
                } else {
                    self.append(
                        table,
                        Chain::IstioInbound,
                        [tcp()],
                        RuleTarget::Jump(Chain::IstioInRedirect),
                    );
                }
            }
            IptablesPorts::List(ports) => {
                for &port in ports {
                    let at = [tcp(), Match::Port(port)];
                    if table == IptablesTable::Mangle {
                        let established = [tcp(), Match::Port(port), Match::Established];
                        let divert = RuleTarget::Jump(Chain::IstioDivert);
                        self.append(table, Chain::IstioInbound, established, divert);
                        self.append(table, Chain::IstioInbound, at, RuleTarget::Jump(Chain::IstioTproxy));
                    } else {
                        self.append(table, Chain::IstioInbound, at, RuleTarget::Jump(Chain::IstioInRedirect));
                    }
                }
            }
        }
    }

    /// In TPROXY mode, distinguishes the proxy's connections to the pod (captured) from its onward connections with the
    /// client's address and the application's connections over lo (both not captured).
    pub(super) fn tproxy_marks(&mut self) {
        let options = self.options;
        let Some(tproxy) = options.tproxy else { return };
        let (localhost, passthrough) = (self.localhost, self.passthrough);
        let marked = Match::Mark(tproxy.mark);
        self.append(IptablesTable::Mangle, Chain::Prerouting, [tcp(), marked.clone()], RuleTarget::SaveMark);
        self.append(
            IptablesTable::Mangle,
            Chain::Output,
            [tcp(), lo_out(), marked.clone()],
            RuleTarget::Return,
        );
        let owners = options.proxy_uids.iter().map(|&user| Match::User(user));
        let owners = owners.chain(options.proxy_gids.iter().map(|&group| Match::Group(group)));
        for owner in owners {
            let to_pod = [Match::NotDestination(localhost), tcp(), lo_out(), owner];
            self.append(IptablesTable::Mangle, Chain::Output, to_pod, RuleTarget::SetMark(OUTBOUND_MARK));
        }
        let onwards = [tcp(), Match::Connmark(tproxy.mark)];
        self.append(IptablesTable::Mangle, Chain::Output, onwards, RuleTarget::RestoreMark);
        self.insert(IptablesTable::Mangle, Chain::IstioInbound, 1, [tcp(), marked], RuleTarget::Return);
        let lo_in = || Match::In("lo".into());
        let from_passthrough = [tcp(), Match::Source(passthrough), lo_in()];
        self.insert(IptablesTable::Mangle, Chain::IstioInbound, 2, from_passthrough, RuleTarget::Return);
        let not_proxy = [tcp(), lo_in(), Match::NotMark(OUTBOUND_MARK)];
        self.insert(IptablesTable::Mangle, Chain::IstioInbound, 3, not_proxy, RuleTarget::Return);
    }
}

fn tcp() -> Match {
    Match::Protocol(Protocol::Tcp)
}
