//! The decision: which row of istio-iptables' rules a flow meets first. The order of the rows is in this file and
//! nowhere else; the rows are numbered as in [`crate::Reason::row`].

use crate::{
    Addr, Decision, PolicyId, Reason, Verdict,
    layout::{Destination, MAX_OWNERS, PodPolicy, container, destination, interface, policy, port},
};

const TCP: u8 = 6;

/// The lookups of a decision. The programs implement them with the maps, `explain` with the same entries in user space.
/// A decision calls each at most once (`destination` once per address), and only when a row needs it.
pub trait PolicyLookup {
    /// The entry of the longest prefix that covers an address; all zero if there is none.
    fn destination(&self, policy: PolicyId, addr: Addr) -> Destination;
    /// Bits of [`port`].
    fn port(&self, policy: PolicyId, port: u16) -> u32;
    /// Whether a gid is in the pod's list of owner groups.
    fn group(&self, policy: PolicyId, gid: u32) -> bool;
    /// Bits of [`interface`].
    fn interface(&self, policy: PolicyId, ifindex: u32) -> u32;
    /// TPROXY only: whether the connect hook marked this connection for the inbound listener.
    fn is_marked(&self) -> bool;
    /// TPROXY only: whether the proxy opened this connection with the mark of `-t`.
    fn is_bypass(&self) -> bool;
}

/// The creator of a socket, with ids of the initial user namespace. A socket without a file has no owner and matches
/// every "owner is not" row.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Owner {
    /// fsuid at creation.
    pub uid: u32,
    /// fsgid at creation.
    pub gid: u32,
}

impl Owner {
    /// A socket without a file; (uid_t)-1 is no user.
    pub const NONE: Self = Self { uid: u32::MAX, gid: u32::MAX };
}

/// A flow started by a process of the pod.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct OutboundFlow {
    /// IPPROTO_TCP (6) or IPPROTO_UDP (17).
    pub protocol: u8,
    /// The destination; for an unspecified one, the address that the kernel uses instead ([`Addr::effective`]).
    pub dst: Addr,
    /// Host order.
    pub dst_port: u16,
    /// The address that the socket is bound to, or unspecified.
    pub src: Addr,
    /// The creator of the socket.
    pub owner: Owner,
    /// SO_MARK of the socket.
    pub mark: u32,
    /// Bits of [`container`]: the container that the process runs in. Only looked up where the policy asks for it.
    pub container: u32,
}

/// A TCP connection that arrives in the namespace.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct InboundFlow {
    /// Destination address.
    pub dst: Addr,
    /// Host order.
    pub dst_port: u16,
    /// Source address.
    pub src: Addr,
    /// Interface that it arrived on.
    pub ifindex: u32,
}

/// An outbound decision, with what the lookup of the destination returned.
#[must_use = "a decision that is dropped is a connection that goes the wrong way"]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct OutboundDecision {
    /// The verdict and its reason.
    pub decision: Decision,
    /// The source address that the route selects; unspecified if it is not known.
    pub source: Addr,
    /// TPROXY: sk_lookup hands this connection to the inbound listener (the rules of the mangle table mark it).
    pub mark: bool,
    /// TPROXY: sk_lookup passes this connection, whatever its source: the proxy's own connection to the application (the
    /// mark of `-t`).
    pub bypass: bool,
}

/// Decides for a flow started by a process of the pod.
#[inline(always)]
pub fn decide_outbound(pod: &PodPolicy, flow: &OutboundFlow, lookup: &impl PolicyLookup) -> OutboundDecision {
    let dst = lookup.destination(pod.id, flow.dst);
    let src = if flow.src.is_unspecified() { dst.source } else { flow.src };
    let mut reason = outbound_reason(pod, flow, src, &dst, lookup);
    let mut mark = false;
    let tproxy = pod.flags & policy::TPROXY != 0;
    let bypass = tproxy && flow.protocol == TCP && flow.mark == pod.tproxy_mark;
    if tproxy && !bypass && is_marked(pod, flow, src, &dst, reason, lookup) {
        // sk_lookup passes destinations on loopback, so the connect hook redirects them.
        if flow.dst.is_loopback() {
            reason = Reason::MarkedLoopback;
        } else {
            mark = true;
        }
    }
    OutboundDecision { decision: reason.into(), source: dst.source, mark, bypass }
}

/// TPROXY: the mangle table marks what the proxy sends over loopback, independently of the nat table, and delivers it to
/// the inbound port when it arrives.
#[inline(always)]
fn is_marked(
    pod: &PodPolicy,
    flow: &OutboundFlow,
    src: Addr,
    dst: &Destination,
    reason: Reason,
    lookup: &impl PolicyLookup,
) -> bool {
    flow.protocol == TCP
        && dst.flags & (destination::LO | destination::LOCALHOST) == destination::LO
        && matches!(reason.verdict(), Verdict::Pass)
        && !matches!(
            reason,
            Reason::NoRoute | Reason::ExcludedEgress | Reason::OutboundIpv6 | Reason::ExemptContainer
        )
        && !src.is_passthrough()
        && pod.may_be_proxy(flow.container)
        && pod.is_proxy(flow.owner.uid, flow.owner.gid)
        && matches!(inbound_port_reason(pod, flow.dst_port, lookup).verdict(), Verdict::Redirect(_))
}

/// Whether an id is in a list of owners, whose unused places repeat the first one.
///
/// Nearly always there is one. The others are compared without a branch, because the verifier follows every branch of
/// every turn of a loop on its own.
#[inline(always)]
fn owned_by(ids: &[u32; MAX_OWNERS], count: u16, id: u32) -> bool {
    if count == 0 {
        return false;
    }
    if ids[0] == id {
        return true;
    }
    if count == 1 {
        return false;
    }
    let mut all_differ = u32::MAX;
    for owner in ids {
        let differs = owner ^ id;
        // The top bit is set unless the two are equal.
        all_differ &= differs | differs.wrapping_neg();
    }
    all_differ >> 31 == 0
}

impl PodPolicy {
    /// Whether one of the ids is the proxy's.
    #[inline(always)]
    pub fn is_proxy(&self, uid: u32, gid: u32) -> bool {
        owned_by(&self.uids, self.uid_count, uid) || owned_by(&self.gids, self.gid_count, gid)
    }

    /// Whether a process with these bits of [`container`] is the proxy if it has the proxy's ids.
    #[inline(always)]
    pub fn may_be_proxy(&self, container: u32) -> bool {
        self.flags & policy::PROXY_CONTAINER == 0 || container & container::PROXY != 0
    }

    /// The bits of [`container`] of a process whose ancestor at [`PodPolicy::cgroup_level`] is this cgroup.
    ///
    /// Without a branch, for the reason of `owned_by`.
    #[inline(always)]
    pub fn container_of(&self, cgroup: u64) -> u32 {
        let mut found = self.zero;
        for (id, kind) in self.cgroup_ids.iter().zip(&self.cgroup_kinds) {
            let differs = id ^ cgroup;
            // 1 unless the two are equal; less 1, it is a mask of all bits or of none.
            let one = (differs | differs.wrapping_neg()) >> 63;
            found |= kind & (one as u32).wrapping_sub(1);
        }
        found
    }
}

#[inline(always)]
fn outbound_reason(
    pod: &PodPolicy,
    flow: &OutboundFlow,
    src: Addr,
    dst: &Destination,
    lookup: &impl PolicyLookup,
) -> Reason {
    let is = |bit: u32| dst.flags & bit != 0;
    let has = |bit: u32| pod.flags & bit != 0;
    let tcp = flow.protocol == TCP;
    let lo = is(destination::LO);
    let localhost = is(destination::LOCALHOST);
    let dns = has(policy::DNS);
    let to_53 = dns && flow.dst_port == 53;

    // 0: no rule sees a packet that is never sent. IPv4 does not leave a host from a loopback address either, and TCP
    // has no connections to groups (ENETUNREACH).
    if !is(destination::ROUTED)
        || (!lo && flow.src.is_v4() && flow.src.is_loopback())
        || (tcp && is(destination::GROUP))
    {
        return Reason::NoRoute;
    }
    if has(policy::WITHOUT_IPV6) && !flow.dst.is_v4() {
        return Reason::OutboundIpv6;
    }
    // Not a row of istio-iptables: what these containers send is as if the pod were not captured.
    if flow.container & container::EXEMPT != 0 {
        return Reason::ExemptContainer;
    }
    // 1
    if is(destination::EXCLUDED_EGRESS) {
        return Reason::ExcludedEgress;
    }
    // 2
    let ports = if has(policy::OUTBOUND_PORTS) { lookup.port(pod.id, flow.dst_port) } else { 0 };
    if ports & port::OUTBOUND_EXCLUDED != 0 {
        return Reason::ExcludedOutboundPort;
    }
    // 3
    if lo && src.is_passthrough() {
        return Reason::Passthrough;
    }
    // 4 and 5. Row b of the first id ends the walk for all that come later, so the order of -u counts.
    let loops_back = lo && !localhost && tcp && flow.dst_port != pod.tunnel_port;
    let leaves_lo = lo && !has(policy::INCLUDES_LOOPBACK) && (!dns || (tcp && !to_53));
    let may_be_proxy = pod.may_be_proxy(flow.container);
    let is_proxy = |ids: &[u32; MAX_OWNERS], count: u16, id: u32| {
        may_be_proxy && (if leaves_lo { count != 0 && ids[0] == id } else { owned_by(ids, count, id) })
    };
    if is_proxy(&pod.uids, pod.uid_count, flow.owner.uid) {
        return if loops_back && !to_53 { Reason::ProxyUidToPod } else { Reason::ProxyUid };
    }
    if leaves_lo && pod.uid_count != 0 {
        return Reason::LoopbackNotProxyUid;
    }
    if is_proxy(&pod.gids, pod.gid_count, flow.owner.gid) {
        return if loops_back { Reason::ProxyGidToPod } else { Reason::ProxyGid };
    }
    if leaves_lo && pod.gid_count != 0 {
        return Reason::LoopbackNotProxyGid;
    }
    // 6
    if has(policy::GROUPS_ONLY | policy::GROUPS_EXCEPT) {
        let listed = lookup.group(pod.id, flow.owner.gid);
        if listed == has(policy::GROUPS_EXCEPT) {
            return Reason::OwnerGroup;
        }
    }
    // 7
    if to_53 && (has(policy::DNS_ALL) || is(destination::RESOLVER)) {
        return Reason::DnsCapture;
    }
    // 8
    if localhost {
        return Reason::Localhost;
    }
    // 9
    if is(destination::EXCLUDED) {
        return Reason::ExcludedCidr;
    }
    // 10
    if tcp && ports & port::OUTBOUND != 0 {
        return Reason::OutboundPort;
    }
    // 11
    if tcp && is(destination::INCLUDED) {
        return Reason::IncludedCidr;
    }
    Reason::NotIncluded
}

/// Decides for a TCP connection that arrives in the namespace.
#[inline(always)]
pub fn decide_inbound(pod: &PodPolicy, flow: &InboundFlow, lookup: &impl PolicyLookup) -> Decision {
    inbound_reason(pod, flow, lookup).into()
}

#[inline(always)]
fn inbound_reason(pod: &PodPolicy, flow: &InboundFlow, lookup: &impl PolicyLookup) -> Reason {
    let has = |bit: u32| pod.flags & bit != 0;
    let tproxy = has(policy::TPROXY);

    if has(policy::WITHOUT_IPV6) && !flow.dst.is_v4() {
        return Reason::InboundIpv6;
    }
    // 0: what this namespace sends to itself arrives over lo. sk_lookup cannot tell lo by the interface index (it
    // names the interface of the address), the source can: it is an address of the pod.
    if flow.src.is_loopback() || lookup.destination(pod.id, flow.src).flags & destination::LO != 0 {
        return if tproxy && lookup.is_marked() { Reason::MarkedLoopback } else { Reason::LocalSource };
    }
    // The proxy, which goes on from its client's address.
    if tproxy && lookup.is_bypass() {
        return Reason::LocalSource;
    }
    let interface = if has(policy::INTERFACES) { lookup.interface(pod.id, flow.ifindex) } else { 0 };
    let virt = interface & interface::VIRT != 0;
    let reason = if virt && !tproxy {
        // 1: nat looks at -k first.
        Reason::VirtNotIncluded
    } else if interface & interface::EXCLUDED != 0 {
        // 2
        Reason::ExcludedIngress
    } else if !tproxy && flow.dst_port == pod.tunnel_port {
        // 3: this exception lives in nat only.
        Reason::TunnelPort
    } else {
        // 4
        inbound_port_reason(pod, flow.dst_port, lookup)
    };
    // 1 again: under TPROXY mangle comes before nat, which sees what mangle left.
    if virt && matches!(reason.verdict(), Verdict::Pass) { virt_reason(pod, flow, lookup) } else { reason }
}

#[inline(always)]
fn inbound_port_reason(pod: &PodPolicy, dst_port: u16, lookup: &impl PolicyLookup) -> Reason {
    let ports = if pod.flags & policy::INBOUND_PORTS != 0 { lookup.port(pod.id, dst_port) } else { 0 };
    if pod.flags & policy::INBOUND_ALL != 0 {
        if ports & port::INBOUND_EXCLUDED != 0 { Reason::ExcludedInboundPort } else { Reason::InboundAll }
    } else if ports & port::INBOUND != 0 {
        Reason::InboundPort
    } else {
        Reason::NotInboundPort
    }
}

#[inline(always)]
fn virt_reason(pod: &PodPolicy, flow: &InboundFlow, lookup: &impl PolicyLookup) -> Reason {
    if lookup.destination(pod.id, flow.dst).flags & destination::INCLUDED != 0 {
        Reason::VirtIncluded
    } else {
        Reason::VirtNotIncluded
    }
}
