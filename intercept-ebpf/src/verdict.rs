//! The decision in functions that the verifier checks by themselves.
//!
//! A global function (Linux 5.6, with pointers to memory 5.12) is verified once, for arguments of which only the types are
//! known, and its callers are verified for any result. Inlined, each row would be walked for every state in which the hook
//! arrives at it, and the rest of the hook for every row.

use bytemuck::Zeroable as _;
use intercept_common::{
    Addr, InboundFlow, OutboundFlow, PolicyLookup as _, ProxyListener, Reason, Verdict,
    decide::{Owner, TproxyMark, decide_inbound, outbound_reason, tproxy_mark},
    layout::{ConnKey, Destination, PodPolicy, policy},
};

use crate::{lookup::PolicyMaps, verifier::opaque};

/// A reason with what it implies, in a word.
#[must_use = "a decision that is dropped is a connection that goes the wrong way"]
#[derive(Clone, Copy)]
pub(crate) struct PackedReason(u64);

const VERDICT_SHIFT: u32 = 8;
const KEEPS_MARK: u64 = 1 << 16;

impl PackedReason {
    #[inline(always)]
    const fn new(reason: Reason) -> Self {
        let verdict = match reason.verdict() {
            Verdict::Pass => 0,
            Verdict::Redirect(ProxyListener::Outbound) => 1,
            Verdict::Redirect(ProxyListener::Inbound) => 2,
            Verdict::Redirect(ProxyListener::Dns) => 3,
        };
        let keeps_mark = if reason.keeps_mark() { KEEPS_MARK } else { 0 };
        Self(reason as u64 | verdict << VERDICT_SHIFT | keeps_mark)
    }

    /// The number of the reason.
    #[inline(always)]
    pub(crate) const fn number(self) -> u8 {
        self.0 as u8
    }

    #[inline(always)]
    pub(crate) const fn verdict(self) -> Verdict {
        match self.0 >> VERDICT_SHIFT & 3 {
            0 => Verdict::Pass,
            1 => Verdict::Redirect(ProxyListener::Outbound),
            2 => Verdict::Redirect(ProxyListener::Inbound),
            _ => Verdict::Redirect(ProxyListener::Dns),
        }
    }
}

/// An outbound decision.
#[must_use = "a decision that is dropped is a connection that goes the wrong way"]
#[derive(Clone, Copy)]
pub(crate) struct Outbound {
    pub(crate) reason: PackedReason,
    /// The source address that the route selects; unspecified if it is not known.
    pub(crate) source: Addr,
    /// TPROXY: what the mangle table does.
    pub(crate) mark: TproxyMark,
}

/// As [`intercept_common::decide_outbound`].
#[inline(always)]
pub(crate) fn outbound(pod: &PodPolicy, flow: &OutboundFlow) -> Outbound {
    let mut dst = Destination::zeroed();
    let owner = owner(pod, flow.owner);
    let mut reason = PackedReason(opaque(decide_outbound_reason(pod, flow, &raw mut dst, owner)));
    let mut mark = TproxyMark::None;
    if pod.flags & policy::TPROXY != 0 {
        let number = opaque(decide_tproxy_mark(pod, flow, &raw const dst, reason.0 & KEEPS_MARK, owner));
        mark = TproxyMark::of(number as u8);
        if matches!(mark, TproxyMark::Redirected) {
            reason = PackedReason::new(Reason::MarkedLoopback);
        }
    }
    Outbound { reason, source: dst.source, mark }
}

/// As [`intercept_common::decide_inbound`] for the connection of this key.
#[inline(always)]
pub(crate) fn inbound(pod: &PodPolicy, conn: &ConnKey, ifindex: u32) -> PackedReason {
    PackedReason(opaque(decide_inbound_reason(pod, conn, ifindex)))
}

/// As [`PodPolicy::match_owner`].
#[inline(always)]
pub(crate) fn owner(pod: &PodPolicy, owner: Owner) -> u32 {
    opaque(match_owner(pod, owner.uid, owner.gid)) as u32
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn match_owner(pod: *const PodPolicy, uid: u32, gid: u32) -> u64 {
    // SAFETY: the verifier checks the size of what a caller passes; a null pointer is none.
    let Some(pod) = (unsafe { pod.as_ref() }) else { return 0 };
    pod.match_owner(Owner { uid, gid }).into()
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn decide_outbound_reason(
    pod: *const PodPolicy,
    flow: *const OutboundFlow,
    dst: *mut Destination,
    owner: u32,
) -> u64 {
    // SAFETY: the verifier checks the size of what a caller passes; a null pointer is none.
    let (Some(pod), Some(flow), Some(dst)) = (unsafe { (pod.as_ref(), flow.as_ref(), dst.as_mut()) }) else {
        return 0;
    };
    let lookup = PolicyMaps { conn: None, owner };
    *dst = lookup.destination(pod.id, flow.dst);
    PackedReason::new(outbound_reason(pod, flow, dst, &lookup)).0
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn decide_tproxy_mark(
    pod: *const PodPolicy,
    flow: *const OutboundFlow,
    dst: *const Destination,
    keeps_mark: u64,
    owner: u32,
) -> u64 {
    // SAFETY: as above.
    let (Some(pod), Some(flow), Some(dst)) = (unsafe { (pod.as_ref(), flow.as_ref(), dst.as_ref()) }) else {
        return 0;
    };
    tproxy_mark(pod, flow, dst, keeps_mark != 0, &PolicyMaps { conn: None, owner }) as u64
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn decide_inbound_reason(pod: *const PodPolicy, conn: *const ConnKey, ifindex: u32) -> u64 {
    // SAFETY: as above.
    let (Some(pod), Some(conn)) = (unsafe { (pod.as_ref(), conn.as_ref()) }) else { return 0 };
    let flow = InboundFlow { dst: conn.proxy, dst_port: conn.proxy_port, src: conn.client, ifindex };
    PackedReason::new(decide_inbound(pod, &flow, &PolicyMaps { conn: Some(conn), owner: 0 }).reason).0
}
