//! Every outcome of a decision, with the word that logs, metrics and `explain` use for it.

/// Where a redirected flow goes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ProxyListener {
    /// The proxy's outbound listener, `-p`, 15001.
    Outbound,
    /// The proxy's inbound listener, `-z`, 15006.
    Inbound,
    /// The proxy's DNS listener, 15053.
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
    ($($(#[doc = $doc:literal])+ $name:ident = $word:literal, $row:literal, $verdict:expr;)+) => {
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

const PASS: Verdict = Verdict::Pass;
const OUTBOUND: Verdict = Verdict::Redirect(ProxyListener::Outbound);
const INBOUND: Verdict = Verdict::Redirect(ProxyListener::Inbound);
const DNS: Verdict = Verdict::Redirect(ProxyListener::Dns);

reasons! {
    /// no route leads to the destination: the kernel refuses it as it would have
    NoRoute = "no_route", "outbound 0", PASS;
    /// the route leaves through an interface named by -c
    ExcludedEgress = "excluded_egress", "outbound 1", PASS;
    /// the destination port is named by -o
    ExcludedOutboundPort = "excluded_outbound_port", "outbound 2", PASS;
    /// over loopback from 127.0.0.6 or ::6: the proxy's inbound passthrough
    Passthrough = "inbound_passthrough", "outbound 3", PASS;
    /// the proxy, by user, dials an address of its own pod
    ProxyUidToPod = "proxy_uid_to_pod", "outbound 4a", INBOUND;
    /// over loopback and not by the proxy's user
    LoopbackNotProxyUid = "loopback_not_proxy_uid", "outbound 4b", PASS;
    /// made by the proxy's user
    ProxyUid = "proxy_uid", "outbound 4c", PASS;
    /// the proxy, by group, dials an address of its own pod
    ProxyGidToPod = "proxy_gid_to_pod", "outbound 5a", INBOUND;
    /// over loopback and not by the proxy's group
    LoopbackNotProxyGid = "loopback_not_proxy_gid", "outbound 5b", PASS;
    /// made by the proxy's group
    ProxyGid = "proxy_gid", "outbound 5c", PASS;
    /// the owner's group is not one that is captured
    OwnerGroup = "owner_group", "outbound 6", PASS;
    /// DNS to a captured server
    DnsCapture = "dns", "outbound 7", DNS;
    /// the destination is localhost
    Localhost = "localhost", "outbound 8", PASS;
    /// the destination is in -x
    ExcludedCidr = "excluded_cidr", "outbound 9", PASS;
    /// the destination port is named by -q
    OutboundPort = "outbound_port", "outbound 10", OUTBOUND;
    /// the destination is in -i
    IncludedCidr = "included_cidr", "outbound 11", OUTBOUND;
    /// no row captures the destination
    NotIncluded = "not_included", "outbound 11", PASS;

    /// made in this namespace: only arriving traffic is captured inbound
    LocalSource = "local_source", "inbound 0", PASS;
    /// TPROXY: made over loopback by the proxy to an address of its own pod
    MarkedLoopback = "marked_loopback", "inbound tproxy", INBOUND;
    /// arrived on an interface of -k, for a destination in -i
    VirtIncluded = "virt_included", "inbound 1", OUTBOUND;
    /// arrived on an interface of -k, for a destination that is not in -i
    VirtNotIncluded = "virt_not_included", "inbound 1", PASS;
    /// arrived on an interface named by -c
    ExcludedIngress = "excluded_ingress", "inbound 2", PASS;
    /// the port is the tunnel port
    TunnelPort = "tunnel_port", "inbound 3", PASS;
    /// the port is named by -d
    ExcludedInboundPort = "excluded_inbound_port", "inbound 4", PASS;
    /// every inbound port is captured
    InboundAll = "inbound_all", "inbound 4", INBOUND;
    /// the port is named by -b
    InboundPort = "inbound_port", "inbound 4", INBOUND;
    /// the port is not named by -b
    NotInboundPort = "not_inbound_port", "inbound 4", PASS;
    /// made over IPv6, of which nothing is captured (--without-ipv6)
    OutboundIpv6 = "outbound_ipv6", "outbound 0", PASS;
    /// arrived over IPv6, of which nothing is captured (--without-ipv6)
    InboundIpv6 = "inbound_ipv6", "inbound 0", PASS;
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
