//! Connections from outside: REDIRECT in nat, or TPROXY in mangle.

use super::{Builder, OUTBOUND_MARK, captures_inbound, lo_out};
use crate::iptables::options::Ports;
use crate::iptables::rule::{Chain, Match, Protocol, Table, Target};

impl Builder<'_> {
    pub(super) fn inbound(&mut self) {
        let options = self.options;
        self.append(
            Table::Nat,
            Chain::IstioInbound,
            [tcp(), Match::Port(options.tunnel_port)],
            Target::Return,
        );
        self.append(Table::Nat, Chain::IstioRedirect, [tcp()], Target::Redirect(options.envoy_port));
        self.append(Table::Nat, Chain::IstioInRedirect, [tcp()], Target::Redirect(options.inbound_port));
        if !captures_inbound(options) {
            return;
        }
        let table = if options.tproxy.is_some() { Table::Mangle } else { Table::Nat };
        if let Some(tproxy) = options.tproxy {
            self.append(Table::Mangle, Chain::IstioDivert, [], Target::SetMark(tproxy.mark));
            self.append(Table::Mangle, Chain::IstioDivert, [], Target::Accept);
            self.append(
                Table::Mangle,
                Chain::IstioTproxy,
                [Match::NotDestination(self.localhost), tcp()],
                Target::Tproxy { mark: tproxy.mark, port: options.inbound_port },
            );
        }
        self.append(table, Chain::Prerouting, [tcp()], Target::Jump(Chain::IstioInbound));
        match &options.inbound_ports {
            Ports::All => {
                for &port in &options.exclude_inbound_ports {
                    self.append(table, Chain::IstioInbound, [tcp(), Match::Port(port)], Target::Return);
                }
                if table == Table::Mangle {
                    let established = [tcp(), Match::Established];
                    self.append(table, Chain::IstioInbound, established, Target::Jump(Chain::IstioDivert));
                    self.append(table, Chain::IstioInbound, [tcp()], Target::Jump(Chain::IstioTproxy));
                } else {
                    self.append(table, Chain::IstioInbound, [tcp()], Target::Jump(Chain::IstioInRedirect));
                }
            }
            Ports::List(ports) => {
                for &port in ports {
                    let at = [tcp(), Match::Port(port)];
                    if table == Table::Mangle {
                        let established = [tcp(), Match::Port(port), Match::Established];
                        let divert = Target::Jump(Chain::IstioDivert);
                        self.append(table, Chain::IstioInbound, established, divert);
                        self.append(table, Chain::IstioInbound, at, Target::Jump(Chain::IstioTproxy));
                    } else {
                        self.append(table, Chain::IstioInbound, at, Target::Jump(Chain::IstioInRedirect));
                    }
                }
            }
        }
    }

    /// Tells apart, in TPROXY mode, the proxy's connections to the pod (captured), the proxy's onward connections
    /// that carry the client's address (not), and the application's own over lo (not).
    pub(super) fn tproxy_marks(&mut self) {
        let options = self.options;
        let Some(tproxy) = options.tproxy else { return };
        let (localhost, passthrough) = (self.localhost, self.passthrough);
        let marked = Match::Mark(tproxy.mark);
        self.append(Table::Mangle, Chain::Prerouting, [tcp(), marked.clone()], Target::SaveMark);
        self.append(Table::Mangle, Chain::Output, [tcp(), lo_out(), marked.clone()], Target::Return);
        let owners = options.proxy_uids.iter().map(|&user| Match::User(user));
        let owners = owners.chain(options.proxy_gids.iter().map(|&group| Match::Group(group)));
        for owner in owners {
            let to_pod = [Match::NotDestination(localhost), tcp(), lo_out(), owner];
            self.append(Table::Mangle, Chain::Output, to_pod, Target::SetMark(OUTBOUND_MARK));
        }
        let onwards = [tcp(), Match::Connmark(tproxy.mark)];
        self.append(Table::Mangle, Chain::Output, onwards, Target::RestoreMark);
        self.insert(Table::Mangle, Chain::IstioInbound, 1, [tcp(), marked], Target::Return);
        let lo_in = || Match::In("lo".into());
        let from_passthrough = [tcp(), Match::Source(passthrough), lo_in()];
        self.insert(Table::Mangle, Chain::IstioInbound, 2, from_passthrough, Target::Return);
        let not_proxy = [tcp(), lo_in(), Match::NotMark(OUTBOUND_MARK)];
        self.insert(Table::Mangle, Chain::IstioInbound, 3, not_proxy, Target::Return);
    }
}

fn tcp() -> Match {
    Match::Protocol(Protocol::Tcp)
}
