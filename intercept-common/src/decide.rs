//! The decision: which row of istio-iptables' rules a flow meets first. The order of the rows is in this file and
//! nowhere else; the rows are numbered as in [`crate::Reason::row`].

use crate::{
    Addr, Decision, PolicyId, Reason, Verdict,
    layout::{Destination, MAX_OWNERS, PodPolicy, container, destination, interface, policy, port},
};

const TCP: u16 = 6;

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
    /// Bits of [`owner_match`].
    #[inline(always)]
    fn owner(&self, pod: &PodPolicy, owner: Owner) -> u32 {
        pod.match_owner(owner)
    }
    /// TPROXY only: whether the connect hook marked this connection for the inbound listener.
    fn is_marked(&self) -> bool;
    /// TPROXY only: whether the proxy opened this connection with the mark of `-t`.
    fn is_bypass(&self) -> bool;
}

/// The creator of a socket, with ids of the initial user namespace. A socket without a file has no owner and matches
/// every "owner is not" row.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(C)]
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

/// A flow started by a process of the pod. Without padding, because the programs pass it to functions by reference.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(C)]
pub struct OutboundFlow {
    /// The destination; for an unspecified one, the address that the kernel uses instead ([`Addr::effective`]).
    pub dst: Addr,
    /// The address that the socket is bound to, or unspecified.
    pub src: Addr,
    /// The creator of the socket.
    pub owner: Owner,
    /// SO_MARK of the socket.
    pub mark: u32,
    /// Bits of [`container`]: the container that the process runs in. Only looked up where the policy asks for it.
    pub container: u32,
    /// Host order.
    pub dst_port: u16,
    /// IPPROTO_TCP (6) or IPPROTO_UDP (17).
    pub protocol: u16,
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
    /// TPROXY: what the mangle table does with it.
    pub mark: TproxyMark,
}

/// What the mangle table of TPROXY does with a connection, besides the nat table.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum TproxyMark {
    /// Nothing.
    None,
    /// It is marked, and goes to the inbound port when it arrives over loopback.
    Steered,
    /// As [`TproxyMark::Steered`], to a destination that sk_lookup passes: the connect hook redirects it.
    Redirected,
    /// The proxy has set the mark of `-t` itself: it passes.
    Bypass,
}

impl TproxyMark {
    /// The mark with this discriminant.
    #[inline(always)]
    pub const fn of(discriminant: u8) -> Self {
        match discriminant {
            1 => Self::Steered,
            2 => Self::Redirected,
            3 => Self::Bypass,
            _ => Self::None,
        }
    }
}

/// Decides for a flow started by a process of the pod. The programs take the same steps one by one.
#[inline(always)]
pub fn decide_outbound(pod: &PodPolicy, flow: &OutboundFlow, lookup: &impl PolicyLookup) -> OutboundDecision {
    let dst = lookup.destination(pod.id, flow.dst);
    let reason = outbound_reason(pod, flow, &dst, lookup);
    let mark = if pod.flags & policy::TPROXY == 0 {
        TproxyMark::None
    } else {
        tproxy_mark(pod, flow, &dst, reason.keeps_mark(), lookup)
    };
    OutboundDecision {
        decision: if mark == TproxyMark::Redirected { Reason::MarkedLoopback } else { reason }.into(),
        source: dst.source,
        mark,
    }
}

/// The source address of a flow: that of the socket, or that of the route.
#[inline(always)]
fn source(flow: &OutboundFlow, dst: &Destination) -> Addr {
    if flow.src.is_unspecified() { dst.source } else { flow.src }
}

/// TPROXY: the mangle table marks what the proxy sends over loopback, independently of the nat table, and delivers it to
/// the inbound port when it arrives. `keeps_mark` is what the row of the nat table says ([`Reason::keeps_mark`]).
#[inline(always)]
pub fn tproxy_mark(
    pod: &PodPolicy,
    flow: &OutboundFlow,
    dst: &Destination,
    keeps_mark: bool,
    lookup: &impl PolicyLookup,
) -> TproxyMark {
    if flow.protocol != TCP {
        return TproxyMark::None;
    }
    if flow.mark == pod.tproxy_mark {
        return TproxyMark::Bypass;
    }
    let is_marked = keeps_mark
        && dst.flags & (destination::LO | destination::LOCALHOST) == destination::LO
        && !source(flow, dst).is_passthrough()
        && pod.may_be_proxy(flow.container)
        && pod.flags & policy::WITHOUT_SELF_CAPTURE == 0
        && lookup.owner(pod, flow.owner) != 0
        && matches!(inbound_port_reason(pod, flow.dst_port, lookup).verdict(), Verdict::Redirect(_));
    match (is_marked, flow.dst.is_loopback()) {
        (false, _) => TproxyMark::None,
        (true, false) => TproxyMark::Steered,
        (true, true) => TproxyMark::Redirected,
    }
}

/// Bits of [`PodPolicy::match_owner`].
pub mod owner_match {
    /// The first of `-u`.
    pub const FIRST_UID: u32 = 1 << 0;
    /// One of `-u`.
    pub const UID: u32 = 1 << 1;
    /// The first of `-g`.
    pub const FIRST_GID: u32 = 1 << 2;
    /// One of `-g`.
    pub const GID: u32 = 1 << 3;
}

/// Whether an id is the first of a list of owners and whether it is in the list, whose unused places repeat the first one.
///
/// Nearly always there is one. The others are compared without a branch, because the verifier follows every branch of
/// every turn of a loop on its own.
#[inline(always)]
fn match_ids(ids: &[u32; MAX_OWNERS], count: u16, id: u32, (first, any): (u32, u32)) -> u32 {
    if count == 0 {
        return 0;
    }
    if ids[0] == id {
        return first | any;
    }
    if count == 1 {
        return 0;
    }
    let mut all_differ = u32::MAX;
    for owner in ids {
        let differs = owner ^ id;
        // The top bit is set unless the two are equal.
        all_differ &= differs | differs.wrapping_neg();
    }
    if all_differ >> 31 == 0 { any } else { 0 }
}

impl PodPolicy {
    /// Whether the ids are the proxy's: bits of [`owner_match`].
    #[inline(always)]
    pub fn match_owner(&self, owner: Owner) -> u32 {
        use owner_match::{FIRST_GID, FIRST_UID, GID, UID};
        match_ids(&self.uids, self.uid_count, owner.uid, (FIRST_UID, UID))
            | match_ids(&self.gids, self.gid_count, owner.gid, (FIRST_GID, GID))
    }

    /// Whether one of the ids is the proxy's.
    #[inline(always)]
    pub fn is_proxy(&self, uid: u32, gid: u32) -> bool {
        self.match_owner(Owner { uid, gid }) != 0
    }

    /// Whether a process with these bits of [`container`] is the proxy if it has the proxy's ids.
    #[inline(always)]
    pub fn may_be_proxy(&self, container: u32) -> bool {
        self.flags & policy::PROXY_CONTAINER == 0 || container & container::PROXY != 0
    }

    /// The bits of [`container`] of a process whose ancestor at [`PodPolicy::cgroup_level`] is this cgroup.
    ///
    /// Without a branch, for the reason of `match_ids`.
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

/// The first row that a flow meets.
#[inline(always)]
pub fn outbound_reason(
    pod: &PodPolicy,
    flow: &OutboundFlow,
    dst: &Destination,
    lookup: &impl PolicyLookup,
) -> Reason {
    if let Some(reason) = unseen_by_rules(pod, flow, dst) {
        return reason;
    }
    // 1
    if dst.flags & destination::EXCLUDED_EGRESS != 0 {
        return Reason::ExcludedEgress;
    }
    // 2
    let ports = if pod.flags & policy::OUTBOUND_PORTS != 0 { lookup.port(pod.id, flow.dst_port) } else { 0 };
    if ports & port::OUTBOUND_EXCLUDED != 0 {
        return Reason::ExcludedOutboundPort;
    }
    // 3
    if dst.flags & destination::LO != 0 && source(flow, dst).is_passthrough() {
        return Reason::Passthrough;
    }
    if let Some(reason) = owner_reason(pod, flow, dst, lookup) {
        return reason;
    }
    destination_reason(pod, flow, dst, ports)
}

/// Row 0, and what no row of istio-iptables says.
#[inline(always)]
fn unseen_by_rules(pod: &PodPolicy, flow: &OutboundFlow, dst: &Destination) -> Option<Reason> {
    let is = |bit: u32| dst.flags & bit != 0;
    // No rule sees a packet that is never sent. IPv4 does not leave a host from a loopback address either, and TCP has
    // no connections to groups (ENETUNREACH).
    if !is(destination::ROUTED)
        || (!is(destination::LO) && flow.src.is_v4() && flow.src.is_loopback())
        || (flow.protocol == TCP && is(destination::GROUP))
    {
        return Some(Reason::NoRoute);
    }
    if pod.flags & policy::WITHOUT_IPV6 != 0 && !flow.dst.is_v4() {
        return Some(Reason::OutboundIpv6);
    }
    // What these containers send is as if the pod were not captured.
    if flow.container & container::EXEMPT != 0 {
        return Some(Reason::ExemptContainer);
    }
    None
}

/// Rows 4 to 6: who sends.
#[inline(always)]
fn owner_reason(
    pod: &PodPolicy,
    flow: &OutboundFlow,
    dst: &Destination,
    lookup: &impl PolicyLookup,
) -> Option<Reason> {
    let has = |bit: u32| pod.flags & bit != 0;
    let tcp = flow.protocol == TCP;
    let lo = dst.flags & destination::LO != 0;
    let dns = has(policy::DNS);
    let to_53 = dns && flow.dst_port == 53;
    // 4 and 5. Row b of the first id ends the walk for all that come later, so the order of -u counts.
    let loops_back = lo
        && dst.flags & destination::LOCALHOST == 0
        && tcp
        && flow.dst_port != pod.tunnel_port
        && !has(policy::WITHOUT_SELF_CAPTURE);
    let leaves_lo = lo && !has(policy::INCLUDES_LOOPBACK) && (!dns || (tcp && !to_53));
    let owner = if pod.may_be_proxy(flow.container) { lookup.owner(pod, flow.owner) } else { 0 };
    let (uid, gid) = if leaves_lo {
        (owner_match::FIRST_UID, owner_match::FIRST_GID)
    } else {
        (owner_match::UID, owner_match::GID)
    };
    if owner & uid != 0 {
        return Some(if loops_back && (!to_53 || has(policy::DNS_UDP_ONLY)) {
            Reason::ProxyUidToPod
        } else {
            Reason::ProxyUid
        });
    }
    if leaves_lo && pod.uid_count != 0 {
        return Some(Reason::LoopbackNotProxyUid);
    }
    if owner & gid != 0 {
        return Some(if loops_back { Reason::ProxyGidToPod } else { Reason::ProxyGid });
    }
    if leaves_lo && pod.gid_count != 0 {
        return Some(Reason::LoopbackNotProxyGid);
    }
    // 6
    if has(policy::GROUPS_ONLY | policy::GROUPS_EXCEPT) {
        let listed = lookup.group(pod.id, flow.owner.gid);
        if listed == has(policy::GROUPS_EXCEPT) {
            return Some(Reason::OwnerGroup);
        }
    }
    None
}

/// Rows 7 to 11: where it goes. `ports` is what the lists say of the destination's port.
#[inline(always)]
fn destination_reason(pod: &PodPolicy, flow: &OutboundFlow, dst: &Destination, ports: u32) -> Reason {
    let is = |bit: u32| dst.flags & bit != 0;
    let has = |bit: u32| pod.flags & bit != 0;
    let tcp = flow.protocol == TCP;
    let to_53 = has(policy::DNS) && flow.dst_port == 53;
    // 7
    if to_53 && tcp && has(policy::DNS_UDP_ONLY) {
        return Reason::DnsOverTcp;
    }
    if to_53 && (has(policy::DNS_ALL) || is(destination::RESOLVER)) {
        return Reason::DnsCapture;
    }
    // 8
    if is(destination::LOCALHOST) {
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
    let src = lookup.destination(pod.id, flow.src).flags;
    if flow.src.is_loopback() || src & destination::LO != 0 {
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
    } else if src & destination::EXCLUDED_SOURCE != 0 {
        Reason::ExcludedSource
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
