//! Counters for every decision, events while `trace` runs, log lines for failures.

use aya_ebpf::helpers::{bpf_get_current_comm, bpf_get_current_pid_tgid, generated::bpf_ktime_get_ns};
use intercept_common::{
    NetnsCookie, Slot,
    decide::{OutboundFlow, Owner},
    failure::Failure,
    layout::{ConnKey, Event, PodPolicy},
};

use crate::{context::TCP, maps, verdict::PackedReason, verifier::opaque};

#[inline(always)]
fn decision(slot: Slot, reason: PackedReason) {
    if let Some(counters) = maps::counters(slot) {
        // SAFETY: this CPU's own value. A program that interrupts this one can lose a count, nothing more.
        unsafe {
            // In a register from here to its use. Linux 6.1 does not know the bounds of what was compared and is loaded from the
            // stack again.
            let index = opaque(reason.number().into()) as usize;
            if let Some(cell) = (*counters).decisions.get_mut(index) {
                *cell += 1;
            }
        }
    }
}

/// Counts a failure of the table in `intercept_common::failure`.
#[inline(always)]
pub(crate) fn failure(pod: &PodPolicy, failure: Failure) {
    if let Some(counters) = maps::counters(pod.slot) {
        // SAFETY: as for `decision`.
        unsafe {
            if let Some(cell) = (*counters).failures.get_mut(failure as usize) {
                *cell += 1;
            }
        }
    }
}

/// Counts a failure and logs it. An agent in the foreground prints the line, which says what was attempted and has a
/// placeholder for the cookie of the namespace.
macro_rules! failure_line {
    ($ctx:expr, $netns:expr, $pod:expr, $failure:expr, $line:literal) => {{
        $crate::observe::failure($pod, $failure);
        $crate::observe::line!($ctx, $netns, $line);
    }};
}
pub(crate) use failure_line;

/// Logs a line.
macro_rules! line {
    ($ctx:expr, $netns:expr, $line:literal) => {{
        #[cfg(target_arch = "bpf")]
        aya_log_ebpf::warn!($ctx, $line, $netns.0);
        #[cfg(not(target_arch = "bpf"))]
        let _ = ($ctx, $netns);
    }};
}
pub(crate) use line;

/// Counts and traces an outbound decision.
#[inline(always)]
pub(crate) fn outbound(netns: NetnsCookie, pod: &PodPolicy, flow: &OutboundFlow, reason: PackedReason) {
    decision(pod.slot, reason);
    if maps::tracing() {
        let comm = bpf_get_current_comm().unwrap_or([0; 16]);
        emit(&Event {
            time: now(),
            netns,
            dst: flow.dst,
            src: flow.src,
            dst_port: flow.dst_port,
            src_port: 0,
            pid: (bpf_get_current_pid_tgid() >> 32) as u32,
            uid: flow.owner.uid,
            gid: flow.owner.gid,
            reason: reason.number(),
            protocol: flow.protocol as u8,
            inbound: 0,
            container: flow.container as u8,
            comm,
            acceleration: 0,
        });
    }
}

/// Counts and traces an inbound decision.
#[inline(always)]
pub(crate) fn inbound(pod: &PodPolicy, conn: &ConnKey, reason: PackedReason) {
    decision(pod.slot, reason);
    if maps::tracing() {
        emit(&Event {
            time: now(),
            netns: conn.netns,
            dst: conn.proxy,
            src: conn.client,
            dst_port: conn.proxy_port,
            src_port: conn.client_port,
            pid: 0,
            uid: Owner::NONE.uid,
            gid: Owner::NONE.gid,
            reason: reason.number(),
            protocol: TCP as u8,
            inbound: 1,
            container: 0,
            comm: [0; 16],
            acceleration: 0,
        });
    }
}

#[inline(always)]
fn now() -> u64 {
    // SAFETY: takes no argument.
    unsafe { bpf_ktime_get_ns() }
}

#[inline(always)]
fn emit(event: &Event) {
    // A slow reader loses events; connections do not wait for it.
    let _full = maps::events().output::<Event>(event, 0);
}
