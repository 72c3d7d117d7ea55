//! Connections that arrive in the namespace: `sk_lookup` assigns them to the proxy's listener. Nothing is rewritten, so the
//! original destination is the local address of the proxy's socket.

use aya_ebpf::{bindings::bpf_sk_lookup, programs::SkLookupContext};
use intercept_common::{
    Addr, Family, NetnsCookie, PolicyLookup as _, ProxyListener, StandIn, Verdict,
    failure::Failure,
    layout::{LookupScratch, PodPolicy, Proxy, destination, policy, scope},
};

use crate::{
    context::{self, TCP, load},
    listeners,
    lookup::PolicyMaps,
    maps, observe,
    original::proxy_key,
    shadow, verdict, workload,
};

/// The cookie of the namespace that this instance is attached to, because the hook has no helper for it. The agent replaces
/// the constant by the address of a cell that only this instance has, and writes the cookie there before it attaches it.
#[inline(always)]
fn own_netns() -> NetnsCookie {
    #[cfg(target_arch = "bpf")]
    {
        let cookie: u64;
        // SAFETY: loads an address, then the eight bytes there. The verifier refuses the constant itself as an address.
        unsafe {
            core::arch::asm!(
                "{0} = {1} ll",
                "{0} = *(u64 *)({0} + 0)",
                out(reg) cookie,
                const intercept_common::layout::COOKIE_PLACEHOLDER,
                options(pure, readonly, nostack),
            );
        }
        NetnsCookie(cookie)
    }
    #[cfg(not(target_arch = "bpf"))]
    unreachable!("runs in the kernel only")
}

/// The result of a socket lookup.
#[must_use = "the hook must return it to the kernel"]
pub(crate) enum Steer {
    /// The kernel continues its own lookup.
    Pass,
    /// The connection is assigned to the proxy's listener.
    Assigned,
    /// The connection is reset.
    Drop,
}

/// The pod's stub: stores which pod the lookup belongs to and tail-calls [`steer`].
///
/// It is a program per pod, so that an attach loads these few instructions rather than the whole decision.
#[inline(always)]
pub(crate) fn arrive(ctx: &SkLookupContext) -> Steer {
    if load!(load_u32, bpf_sk_lookup, ctx.lookup, protocol) != TCP {
        return Steer::Pass;
    }
    let netns = own_netns();
    if let Some(scratch) = maps::scratch() {
        // SAFETY: this CPU's own value.
        unsafe { scratch.write(LookupScratch { netns, tag: tag(ctx), listeners: 0 }) };
        maps::tail_call(ctx);
    }
    match maps::policy(netns) {
        // A connection within the pod is none of this program's, nor one to its proxy.
        Some(pod) if !context::lookup_local(ctx.lookup).is_loopback() => fail(pod, Failure::SteerMissing),
        _ => Steer::Pass,
    }
}

/// Whether a lookup needs no decision: a destination on loopback, including redirected connections to a proxy on the
/// wildcard address.
#[inline(always)]
fn passes_early(ctx: &SkLookupContext) -> bool {
    let local = context::lookup_local(ctx.lookup);
    match local.stand_in_range() {
        Some(StandIn::Steered) => false,
        // IPv4 stand-in addresses are on loopback. A connection from outside to an IPv6 one must not pass; only the kernel
        // itself can have the source ::1 (ipv6_rcv).
        Some(StandIn::Direct) => context::lookup_ends(ctx.lookup).remote.is_loopback(),
        None => local.is_loopback(),
    }
}

/// Distinguishes a lookup from one that interrupts it. Packets do not interrupt each other, but a packet may interrupt the
/// lookup of a process that asks for a socket (`ss`).
#[inline(always)]
fn tag(ctx: &SkLookupContext) -> u64 {
    // Zero for IPv6.
    let remote = load!(load_u32, bpf_sk_lookup, ctx.lookup, remote_ip4);
    let local_port = load!(load_u32, bpf_sk_lookup, ctx.lookup, local_port);
    let remote_port = load!(load_u16, bpf_sk_lookup, ctx.lookup, remote_port);
    u64::from(remote) << 32 | u64::from(local_port << 16) | u64::from(remote_port)
}

/// The shared program: decides on the connection that [`arrive`] has stored.
#[inline(always)]
pub(crate) fn steer(ctx: &SkLookupContext) -> Steer {
    let Some(scratch) = maps::scratch() else { return Steer::Drop };
    // SAFETY: this CPU's own value.
    let noted = unsafe { scratch.read_volatile() };
    if noted.tag != tag(ctx) {
        // Not a packet: the process that asks finds no socket.
        return Steer::Drop;
    }
    if passes_early(ctx) {
        return Steer::Pass;
    }
    let Some(pod) = maps::policy(noted.netns) else { return Steer::Pass };
    if shadow::is_of(pod) {
        shadow::looked_up(ctx, noted.netns, pod);
        return Steer::Pass;
    }
    if pod.flags & policy::MACHINE != 0 && workload::is_expired(pod) {
        return Steer::Pass;
    }
    let Some((port, scope)) = target(ctx, noted.netns, pod) else { return Steer::Pass };
    let Some(role) = pod.proxy_port(port) else { return fail(pod, Failure::NoListener) };
    let listeners = u64::from(port) << 16 | Proxy::index(role, Family::V4, scope) as u64;
    // The verifier knows nothing about a value read from a map, so it walks the search once rather than once for each row.
    // SAFETY: as above.
    let noted = unsafe {
        (&raw mut (*scratch).listeners).write_volatile(listeners);
        scratch.read_volatile()
    };
    if noted.tag != tag(ctx) {
        return Steer::Drop;
    }
    if listeners::assign(ctx, &noted, pod) { Steer::Assigned } else { fail(pod, Failure::NoListener) }
}

/// Port and scope of the listeners that a connection is assigned to. `None` if it passes.
#[inline(always)]
fn target(ctx: &SkLookupContext, netns: NetnsCookie, pod: &PodPolicy) -> Option<(u16, u8)> {
    let ends = context::lookup_ends(ctx.lookup);
    if ends.local.stand_in_range() == Some(StandIn::Steered) && is_own(pod, ends.remote) {
        // A redirected connection to a proxy on 127.0.0.1 or ::1.
        // The namespace of a machine may have other workloads, with proxies of their own.
        let is_others = pod.flags & policy::MACHINE != 0 && pod.proxy_port(ends.local_port).is_none();
        return if is_others { None } else { Some((ends.local_port, scope::LOCALHOST)) };
    }
    let conn = proxy_key(netns, &ends);
    let ifindex = load!(load_u32, bpf_sk_lookup, ctx.lookup, ingress_ifindex);
    let reason = verdict::inbound(pod, &conn, ifindex);
    if pod.flags & policy::BY_LISTENER != 0
        && !matches!(reason.verdict(), Verdict::Pass)
        && pod.proxy_port(ends.local_port).is_none()
        && !listeners::is_for_application(netns, ends.local, ends.local_port)
    {
        return None;
    }
    observe::inbound(pod, &conn, reason);
    match reason.verdict() {
        Verdict::Pass => None,
        Verdict::Redirect(ProxyListener::Outbound) => Some((pod.outbound_port, scope::ANY)),
        Verdict::Redirect(_) => Some((pod.inbound_port, scope::ANY)),
    }
}

/// Whether a source is an address of the namespace.
#[inline(always)]
fn is_own(pod: &PodPolicy, addr: Addr) -> bool {
    addr.is_loopback()
        || PolicyMaps { conn: None, owner: 0 }.destination(pod.id, addr).flags & destination::LO != 0
}

#[inline(always)]
fn fail(pod: &PodPolicy, failure: Failure) -> Steer {
    observe::failure(pod, failure);
    if pod.flags & (policy::OPEN_WITHOUT_PROXY | policy::SHADOW) != 0 { Steer::Pass } else { Steer::Drop }
}
