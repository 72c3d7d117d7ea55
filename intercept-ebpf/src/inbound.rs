//! Connections that reach the namespace: `sk_lookup` hands them to the proxy's listener. Nothing is rewritten, so
//! the proxy finds the original destination as its own local address.

use aya_ebpf::{bindings::bpf_sk_lookup, programs::SkLookupContext};
use intercept_common::{
    Target, Verdict,
    decide::{Inbound, decide_inbound},
    failure::Failure,
    layout::{Arrival, LISTENER_SLOTS, ListenerKey, PodPolicy, policy},
};

use crate::{
    context::{self, TCP, load},
    facts::MapFacts,
    maps, observe,
    original::proxy_key,
};

/// The cookie of the namespace that this instance is attached to: the hook has no helper that tells it. The agent
/// writes it into the one instruction that loads it.
#[inline(always)]
fn own_netns() -> u64 {
    #[cfg(target_arch = "bpf")]
    {
        let cookie: u64;
        // SAFETY: loads a constant.
        unsafe { core::arch::asm!("{0} = 0x696e746572636570 ll", out(reg) cookie, options(pure, nomem)) };
        cookie
    }
    #[cfg(not(target_arch = "bpf"))]
    unreachable!("runs in the kernel only")
}

/// What becomes of the look-up.
pub(crate) enum Steer {
    /// Go on looking, as without us.
    Pass,
    /// The proxy's listener has it.
    Assigned,
    /// Nobody has it: reset.
    Drop,
}

/// A connection without a socket of its own yet: say whose it is, and go on to [`steer`].
///
/// A program of its own a pod, so that an attach loads these few instructions and not all of the decision.
#[inline(always)]
pub(crate) fn arrive(ctx: &SkLookupContext) -> Steer {
    if load!(load_u32, bpf_sk_lookup, ctx.lookup, protocol) != TCP {
        return Steer::Pass;
    }
    // The way to the proxy itself, and all else that is dialled on loopback.
    if context::lookup_local(ctx.lookup).is_loopback() {
        return Steer::Pass;
    }
    let netns = own_netns();
    if let Some(arrival) = maps::arrival() {
        // SAFETY: this CPU's own value.
        unsafe { arrival.write(Arrival { netns, tag: tag(ctx) }) };
        maps::go_on(ctx);
    }
    match maps::pod(netns) {
        Some(pod) => fail(pod, Failure::SteerMissing),
        None => Steer::Pass,
    }
}

/// Tells a look-up from another that interrupts it. Packets do not interrupt each other, but a packet may interrupt
/// the look-up of a process that asks for one socket (`ss`).
#[inline(always)]
fn tag(ctx: &SkLookupContext) -> u64 {
    // Zero for IPv6.
    let remote = load!(load_u32, bpf_sk_lookup, ctx.lookup, remote_ip4);
    let local_port = load!(load_u32, bpf_sk_lookup, ctx.lookup, local_port);
    let remote_port = load!(load_u16, bpf_sk_lookup, ctx.lookup, remote_port);
    u64::from(remote) << 32 | u64::from(local_port << 16) | u64::from(remote_port)
}

/// Decide on a connection that [`arrive`] has announced.
#[inline(always)]
pub(crate) fn steer(ctx: &SkLookupContext) -> Steer {
    // SAFETY: this CPU's own value.
    let Some(arrival) = maps::arrival().map(|arrival| unsafe { arrival.read() }) else { return Steer::Drop };
    if arrival.tag != tag(ctx) {
        // No packet: whoever asked finds nothing.
        return Steer::Drop;
    }
    let netns = arrival.netns;
    let Some(pod) = maps::pod(netns) else { return Steer::Pass };
    let ends = context::lookup_ends(ctx.lookup);
    let flow = Inbound {
        dst: ends.local,
        dst_port: ends.local_port,
        src: ends.remote,
        ifindex: load!(load_u32, bpf_sk_lookup, ctx.lookup, ingress_ifindex),
    };
    let conn = proxy_key(netns, &ends);
    let decision = decide_inbound(pod, &flow, &MapFacts { conn: Some(&conn) });
    observe::inbound(netns, pod, &flow, ends.remote_port, decision.reason);
    match decision.verdict {
        Verdict::Leave => Steer::Pass,
        Verdict::Redirect(target) => assign(ctx, netns, pod, target),
    }
}

#[inline(always)]
fn assign(ctx: &SkLookupContext, netns: u64, pod: &PodPolicy, target: Target) -> Steer {
    let port = match target {
        Target::Outbound => pod.outbound_port,
        Target::Inbound | Target::Dns => pod.inbound_port,
    };
    let own = if load!(load_u32, bpf_sk_lookup, ctx.lookup, family) == context::AF_INET6 { 6 } else { 4 };
    // A socket of IPv6 may take IPv4 as well; the kernel refuses the assignment if it does not.
    for family in [own, 6] {
        for slot in 0..LISTENER_SLOTS {
            let key = ListenerKey { netns, port, family, slot, reserved: 0 };
            if maps::assign_listener(ctx, &key).is_ok() {
                return Steer::Assigned;
            }
        }
        if own == 6 {
            break;
        }
    }
    fail(pod, Failure::NoListener)
}

#[inline(always)]
fn fail(pod: &PodPolicy, failure: Failure) -> Steer {
    observe::failure(pod, failure);
    if pod.flags & policy::OPEN_WITHOUT_PROXY != 0 { Steer::Pass } else { Steer::Drop }
}
