//! Connections from their SYN until the proxy has asked for their original destination: SHADOW_CONNS, behind accessors.

use aya_ebpf::helpers::generated::bpf_jiffies64;
use bytemuck::Zeroable as _;
use intercept_common::{
    Addr, NetnsCookie,
    layout::{ShadowConn, ShadowSet},
};

use super::flows;
use crate::atomic;

/// A connection that is remembered. Its place may be given to another at any time; then at worst one comparison is wrong.
#[derive(Clone, Copy)]
pub(super) struct KnownConn(*mut ShadowConn);

impl KnownConn {
    /// A connection by the sequence number of its SYN. `None` if it is not remembered, or made room for others.
    #[inline(always)]
    pub(super) fn find(netns: NetnsCookie, isn: u32) -> Option<Self> {
        let id = ShadowConn::id(netns, isn);
        let [first, second] = places(flows::set(ShadowConn::set_of(id))?);
        if first.id() == id {
            Some(first)
        } else if second.id() == id {
            Some(second)
        } else {
            None
        }
    }

    /// Remembers a connection, in the place of the older of the two in its set. `id` and `time` of `conn` are set here.
    #[inline(always)]
    pub(super) fn remember(netns: NetnsCookie, isn: u32, conn: ShadowConn) {
        let id = ShadowConn::id(netns, isn);
        let Some(set) = flows::set(ShadowConn::set_of(id)) else { return };
        let [first, second] = places(set);
        // SAFETY: takes no argument.
        let now = unsafe { bpf_jiffies64() } as u32;
        let age = |place: Self| now.wrapping_sub(place.time());
        let place = if age(first) >= age(second) { first } else { second };
        // SAFETY: aligned and inside an array element, which is never freed. The same holds for the rest of this file.
        unsafe {
            let stored = &raw mut (*place.0).id;
            if atomic::swap(stored, ShadowConn::WRITING) == ShadowConn::WRITING {
                // Another processor writes here. What it remembers is whole, and this one is not compared.
                return;
            }
            place.0.write(ShadowConn { id: ShadowConn::WRITING, time: now, ..conn });
            stored.write_volatile(id);
        }
    }

    /// Remembers what has happened to a connection of which no decision is known.
    #[inline(always)]
    pub(super) fn note(netns: NetnsCookie, isn: u32, stage: u32) {
        Self::remember(netns, isn, ShadowConn { stage, ..ShadowConn::zeroed() });
    }

    #[inline(always)]
    fn id(self) -> u64 {
        // SAFETY: see `remember`.
        unsafe { (&raw const (*self.0).id).read_volatile() }
    }

    #[inline(always)]
    fn time(self) -> u32 {
        // SAFETY: see `remember`.
        unsafe { (&raw const (*self.0).time).read_volatile() }
    }

    /// [`ShadowConn::stage`].
    #[inline(always)]
    pub(super) fn stage(self) -> u32 {
        // SAFETY: see `remember`.
        unsafe { (&raw const (*self.0).stage).read_volatile() }
    }

    /// Sets [`ShadowConn::stage`].
    #[inline(always)]
    pub(super) fn set_stage(self, stage: u32) {
        // SAFETY: see `remember`.
        unsafe { (&raw mut (*self.0).stage).write_volatile(stage) };
    }

    /// [`ShadowConn::expected`].
    #[inline(always)]
    pub(super) fn expected(self) -> u8 {
        // SAFETY: see `remember`.
        unsafe { (&raw const (*self.0).expected).read() }
    }

    /// [`ShadowConn::reason`].
    #[inline(always)]
    pub(super) fn reason(self) -> u8 {
        // SAFETY: see `remember`.
        unsafe { (&raw const (*self.0).reason).read() }
    }

    /// [`ShadowConn::dst`] and its port.
    #[inline(always)]
    pub(super) fn dst(self) -> (Addr, u16) {
        // SAFETY: see `remember`.
        unsafe { ((&raw const (*self.0).dst).read(), (&raw const (*self.0).dst_port).read()) }
    }

    /// [`ShadowConn::uid`] and [`ShadowConn::gid`].
    #[inline(always)]
    pub(super) fn owner(self) -> (u32, u32) {
        // SAFETY: see `remember`.
        unsafe { ((&raw const (*self.0).uid).read(), (&raw const (*self.0).gid).read()) }
    }
}

#[inline(always)]
fn places(set: *mut ShadowSet) -> [KnownConn; 2] {
    let first = set.cast::<ShadowConn>();
    // SAFETY: a set has two.
    [KnownConn(first), KnownConn(unsafe { first.add(1) })]
}
