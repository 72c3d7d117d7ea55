//! Every outcome of a decision, with the word that logs, metrics and `explain` use for it.

/// Where a redirected flow goes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ProxyListener {
    /// The proxy's outbound listener, `-p`, 15001.
    Outbound,
    /// The proxy's inbound listener, `-z`, 15006.
    Inbound,
    /// The proxy's DNS listener, `--dns-capture-port`, 15053.
    Dns,
}

/// What happens to a flow.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// Nothing: it goes where it was sent.
    Pass,
    /// To the proxy.
    Redirect(ProxyListener),
}

/// A verdict and why.
#[must_use = "a decision that is dropped is a connection that goes the wrong way"]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Decision {
    /// What happens.
    pub verdict: Verdict,
    /// The row that decided.
    pub reason: Reason,
}

impl From<Reason> for Decision {
    #[inline(always)]
    fn from(reason: Reason) -> Self {
        Self { verdict: reason.verdict(), reason }
    }
}

macro_rules! reasons {
    ($($(#[doc = $doc:literal])+ $name:ident = $word:literal, $row:literal, $verdict:expr,
        $chain:literal, $rule:literal;)+) => {
        /// The row that decided, or the failure that did. A reason implies its verdict.
        #[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
        #[repr(u8)]
        pub enum Reason { $($(#[doc = $doc])+ $name),+ }

        impl Reason {
            /// All of them, in the order of their discriminants.
            pub const ALL: &'static [Self] = &[$(Self::$name),+];

            /// The word for it in logs, metrics and `explain`. Stable.
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$name => $word),+ }
            }

            /// The row of the rules that it stands for.
            pub const fn row(self) -> &'static str {
                match self { $(Self::$name => $row),+ }
            }

            /// The table and chain of iptables where istio-iptables has the rule that it stands for.
            pub const fn chain(self) -> &'static str {
                match self { $(Self::$name => $chain),+ }
            }

            /// That rule, as iptables takes it, or two with `; ` between; capital letters stand for values of the
            /// options. In parentheses: that there is none.
            pub const fn rule(self) -> &'static str {
                match self { $(Self::$name => $rule),+ }
            }

            /// What the reason describes, for people.
            pub const fn describe(self) -> &'static str {
                match self { $(Self::$name => concat!($($doc),+).trim_ascii()),+ }
            }

            /// The verdict that it implies.
            #[inline(always)]
            pub const fn verdict(self) -> Verdict {
                match self { $(Self::$name => $verdict),+ }
            }
        }
    };
}

impl Reason {
    /// TPROXY: whether a connection with this row of the nat table keeps the mark of the mangle table.
    #[inline(always)]
    pub const fn keeps_mark(self) -> bool {
        matches!(self.verdict(), Verdict::Pass)
            && !matches!(
                self,
                Self::NoRoute | Self::ExcludedEgress | Self::OutboundIpv6 | Self::ExemptContainer
            )
    }
}

const PASS: Verdict = Verdict::Pass;
const OUTBOUND: Verdict = Verdict::Redirect(ProxyListener::Outbound);
const INBOUND: Verdict = Verdict::Redirect(ProxyListener::Inbound);
const DNS: Verdict = Verdict::Redirect(ProxyListener::Dns);

// A name; its word; its row; its verdict; and the rule of istio-iptables that it stands for. Where TPROXY has rows of
// `inbound`, they are in mangle, and ISTIO_TPROXY takes the place of ISTIO_IN_REDIRECT. IPv6 has the same with ::6/128.
reasons! {
    /// no route leads to the destination: the kernel refuses it as it would have
    NoRoute = "no_route", "outbound 0", PASS, "OUTPUT",
        "(the kernel sends no packet)";
    /// the route leaves through an interface named by -c
    ExcludedEgress = "excluded_egress", "outbound 1", PASS, "nat OUTPUT",
        "-o INTERFACE -j RETURN";
    /// the destination port is named by -o
    ExcludedOutboundPort = "excluded_outbound_port", "outbound 2", PASS, "nat ISTIO_OUTPUT",
        "-p tcp --dport PORT -j RETURN; -p udp --dport PORT -j RETURN";
    /// over loopback from 127.0.0.6 or ::6: the proxy's inbound passthrough
    Passthrough = "inbound_passthrough", "outbound 3", PASS, "nat ISTIO_OUTPUT",
        "-o lo -s 127.0.0.6/32 -j RETURN";
    /// the proxy, by user, dials an address of its own pod
    ProxyUidToPod = "proxy_uid_to_pod", "outbound 4a", INBOUND, "nat ISTIO_OUTPUT",
        "-o lo ! -d LOCALHOST -p tcp ! --dport TUNNEL -m owner --uid-owner UID -j ISTIO_IN_REDIRECT";
    /// over loopback and not by the proxy's user
    LoopbackNotProxyUid = "loopback_not_proxy_uid", "outbound 4b", PASS, "nat ISTIO_OUTPUT",
        "-o lo -m owner ! --uid-owner UID -j RETURN";
    /// made by the proxy's user
    ProxyUid = "proxy_uid", "outbound 4c", PASS, "nat ISTIO_OUTPUT",
        "-m owner --uid-owner UID -j RETURN";
    /// the proxy, by group, dials an address of its own pod
    ProxyGidToPod = "proxy_gid_to_pod", "outbound 5a", INBOUND, "nat ISTIO_OUTPUT",
        "-o lo ! -d LOCALHOST -p tcp ! --dport TUNNEL -m owner --gid-owner GID -j ISTIO_IN_REDIRECT";
    /// over loopback and not by the proxy's group
    LoopbackNotProxyGid = "loopback_not_proxy_gid", "outbound 5b", PASS, "nat ISTIO_OUTPUT",
        "-o lo -m owner ! --gid-owner GID -j RETURN";
    /// made by the proxy's group
    ProxyGid = "proxy_gid", "outbound 5c", PASS, "nat ISTIO_OUTPUT",
        "-m owner --gid-owner GID -j RETURN";
    /// the owner's group is not one that is captured
    OwnerGroup = "owner_group", "outbound 6", PASS, "nat ISTIO_OUTPUT",
        "-m owner --gid-owner GROUP -j RETURN; -m owner ! --gid-owner GROUP -j RETURN";
    /// DNS to a captured server
    DnsCapture = "dns", "outbound 7", DNS, "nat ISTIO_OUTPUT_DNS",
        "-p udp --dport 53 -d SERVER -j REDIRECT --to-ports 15053; -p tcp --dport 53 -d SERVER -j REDIRECT --to-ports 15053";
    /// the destination is localhost
    Localhost = "localhost", "outbound 8", PASS, "nat ISTIO_OUTPUT",
        "-d LOCALHOST -j RETURN";
    /// the destination is in -x
    ExcludedCidr = "excluded_cidr", "outbound 9", PASS, "nat ISTIO_OUTPUT",
        "-d RANGE -j RETURN";
    /// the destination port is named by -q
    OutboundPort = "outbound_port", "outbound 10", OUTBOUND, "nat ISTIO_OUTPUT",
        "-p tcp --dport PORT -j ISTIO_REDIRECT";
    /// the destination is in -i
    IncludedCidr = "included_cidr", "outbound 11", OUTBOUND, "nat ISTIO_OUTPUT",
        "-d RANGE -j ISTIO_REDIRECT";
    /// no row captures the destination
    NotIncluded = "not_included", "outbound 11", PASS, "nat ISTIO_OUTPUT",
        "(the end of the chain)";

    /// made in this namespace: only arriving traffic is captured inbound
    LocalSource = "local_source", "inbound 0", PASS, "nat PREROUTING",
        "(nat has decided in OUTPUT)";
    /// TPROXY: made over loopback by the proxy to an address of its own pod
    MarkedLoopback = "marked_loopback", "inbound tproxy", INBOUND, "mangle OUTPUT",
        "! -d LOCALHOST -p tcp -o lo -m owner --uid-owner UID -j MARK --set-mark 1338; ! -d LOCALHOST -p tcp -o lo -m owner --gid-owner GID -j MARK --set-mark 1338";
    /// arrived on an interface of -k, for a destination in -i
    VirtIncluded = "virt_included", "inbound 1", OUTBOUND, "nat PREROUTING",
        "-i INTERFACE -d RANGE -j ISTIO_REDIRECT";
    /// arrived on an interface of -k, for a destination that is not in -i
    VirtNotIncluded = "virt_not_included", "inbound 1", PASS, "nat PREROUTING",
        "-i INTERFACE -j RETURN";
    /// arrived on an interface named by -c
    ExcludedIngress = "excluded_ingress", "inbound 2", PASS, "nat PREROUTING",
        "-i INTERFACE -j RETURN";
    /// the port is the tunnel port
    TunnelPort = "tunnel_port", "inbound 3", PASS, "nat ISTIO_INBOUND",
        "-p tcp --dport TUNNEL -j RETURN";
    /// the port is named by -d
    ExcludedInboundPort = "excluded_inbound_port", "inbound 4", PASS, "nat ISTIO_INBOUND",
        "-p tcp --dport PORT -j RETURN";
    /// every inbound port is captured
    InboundAll = "inbound_all", "inbound 4", INBOUND, "nat ISTIO_INBOUND",
        "-p tcp -j ISTIO_IN_REDIRECT";
    /// the port is named by -b
    InboundPort = "inbound_port", "inbound 4", INBOUND, "nat ISTIO_INBOUND",
        "-p tcp --dport PORT -j ISTIO_IN_REDIRECT";
    /// the port is not named by -b
    NotInboundPort = "not_inbound_port", "inbound 4", PASS, "nat ISTIO_INBOUND",
        "(the end of the chain)";
    /// made over IPv6, of which nothing is captured (--without-ipv6)
    OutboundIpv6 = "outbound_ipv6", "outbound 0", PASS, "OUTPUT",
        "(ip6tables has no rules)";
    /// arrived over IPv6, of which nothing is captured (--without-ipv6)
    InboundIpv6 = "inbound_ipv6", "inbound 0", PASS, "PREROUTING",
        "(ip6tables has no rules)";
    /// made in a container that is exempt (--exempt-cgroup)
    ExemptContainer = "exempt_container", "outbound 0", PASS, "OUTPUT",
        "(iptables knows no containers)";
    /// DNS over TCP, of which nothing is captured (--dns-over-udp-only)
    DnsOverTcp = "dns_over_tcp", "outbound 7", PASS, "nat OUTPUT",
        "(a rule of Kuma)";
    /// arrived from a source in --exclude-inbound-cidr
    ExcludedSource = "excluded_source", "inbound 2", PASS, "nat PREROUTING",
        "(a rule of Linkerd and Kuma)";
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_unique_and_label_safe() {
        let words = || Reason::ALL.iter().map(|r| r.as_str());
        for (i, word) in words().enumerate() {
            assert!(
                word.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_'),
                "{word}"
            );
            assert_eq!(words().position(|w| w == word), Some(i), "{word} twice");
        }
    }

    #[test]
    fn discriminants_follow_the_list() {
        for (i, reason) in Reason::ALL.iter().enumerate() {
            assert_eq!(*reason as usize, i);
        }
    }
}
