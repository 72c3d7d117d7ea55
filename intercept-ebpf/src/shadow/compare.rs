//! Compares what was decided with what happened, counts it, and keeps an example of each kind of difference.

use core::mem::offset_of;

use aya_ebpf::helpers::generated::bpf_ktime_get_ns;
use intercept_common::{
    NetnsCookie,
    layout::{ComparedFlow, DifferenceKey, MAX_REASONS, ShadowCounters},
};

use super::flows;
use crate::{atomic, verifier::opaque};

/// A decision and what happened.
#[derive(Clone, Copy)]
pub(super) struct Verdicts {
    /// Discriminant of the reason of the decision.
    pub(super) reason: u8,
    /// The decision.
    pub(super) expected: u8,
    /// What happened. Both are one of `layout::outcome`.
    pub(super) actual: u8,
}

/// Compares the two. The flow is only needed if they differ.
#[inline(always)]
pub(super) fn compare(netns: NetnsCookie, verdicts: Verdicts, flow: impl FnOnce() -> ComparedFlow) {
    let Verdicts { reason, expected, actual } = verdicts;
    if expected == actual {
        count(netns, offset_of!(ShadowCounters, agreed), reason);
        return;
    }
    let packed = u64::from(reason) | u64::from(expected) << 8 | u64::from(actual) << 16;
    let flow = flow();
    let _done = opaque(shadow_differs(netns.0, &raw const flow, packed));
}

/// Counts a difference and keeps an example. A function of its own, as those of `verdict.rs`.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn shadow_differs(netns: u64, flow: *const ComparedFlow, verdicts: u64) -> u64 {
    let netns = NetnsCookie(netns);
    let (reason, expected, actual) = (verdicts as u8, (verdicts >> 8) as u8, (verdicts >> 16) as u8);
    count(netns, offset_of!(ShadowCounters, differed), reason);
    // SAFETY: the verifier checks the size of what a caller passes; a null pointer is none.
    let Some(&(mut flow)) = (unsafe { flow.as_ref() }) else { return 0 };
    flow.time = now();
    flow.count = 1;
    let mut key = DifferenceKey { netns, reason, expected, actual, is_last: 0, reserved: [0; 4] };
    match flows::example(&key) {
        None => flows::set_example(&key, &flow),
        Some(first) => {
            // SAFETY: inside a map element; one that is removed is freed after a grace period.
            unsafe { atomic::fetch_add(&raw mut (*first).count, 1) };
            key.is_last = 1;
            flows::set_example(&key, &flow);
        }
    }
    0
}

/// Adds to the count of a reason, in the array of counts at this offset.
#[inline(always)]
fn count(netns: NetnsCookie, array: usize, reason: u8) {
    let Some(counters) = flows::counters(netns) else { return };
    // In a register from here to its use, as in `observe::decision`.
    let index = opaque(reason.into()) as usize;
    if index >= MAX_REASONS {
        return;
    }
    // SAFETY: inside a map element, as in `shadow_differs`; the arrays have this many elements.
    unsafe { atomic::fetch_add(counters.cast::<u8>().add(array).cast::<u64>().add(index), 1) };
}

/// Counts a flow of which it is not known what happened. False if the namespace is not in shadow mode.
#[inline(always)]
pub(super) fn uncompared(netns: NetnsCookie) -> bool {
    let Some(counters) = flows::counters(netns) else { return false };
    // SAFETY: as in `count`.
    unsafe { atomic::fetch_add(&raw mut (*counters).uncompared, 1) };
    true
}

/// Nanoseconds of `CLOCK_MONOTONIC`.
#[inline(always)]
pub(super) fn now() -> u64 {
    // SAFETY: takes no argument.
    unsafe { bpf_ktime_get_ns() }
}
