//! Connections that end after one message: joining them gains nothing, as both ends enter a map and leave it.
//! Where a pod closes many of these in a second, most of its further connections to the same destination stay on TCP. Some
//! are joined all the same, so that a change is noticed.
//!
//! Each destination has a cell of a hash table without chains. Two destinations with one cell take it from each other, and
//! their connections are joined then.

use intercept_common::{
    NetnsCookie,
    acceleration::{MANY_SHORT, PROBED},
};

use crate::{context::Ends, maps};

/// A cell: from the high bits, 32 of the hash, 16 of the time, and two counts of 8 bits.
#[derive(Clone, Copy)]
struct Recent {
    tag: u32,
    /// Seconds, about.
    time: u16,
    /// Number in the second before.
    previous: u8,
    /// Number in this second.
    current: u8,
}

impl Recent {
    #[inline(always)]
    fn of(cell: u64, tag: u32) -> Self {
        let time = (maps::now() >> 30) as u16;
        let stored = Self {
            tag: (cell >> 32) as u32,
            time: (cell >> 16) as u16,
            previous: (cell >> 8) as u8,
            current: cell as u8,
        };
        match time.wrapping_sub(stored.time) {
            0 if stored.tag == tag => stored,
            1 if stored.tag == tag => Self { time, previous: stored.current, current: 0, tag },
            _ => Self { tag, time, previous: 0, current: 0 },
        }
    }

    #[inline(always)]
    fn are_many(self) -> bool {
        self.previous >= MANY_SHORT || self.current >= MANY_SHORT
    }

    #[inline(always)]
    fn cell(self) -> u64 {
        u64::from(self.tag) << 32
            | u64::from(self.time) << 16
            | u64::from(self.previous) << 8
            | u64::from(self.current)
    }
}

#[inline(always)]
fn cell(netns: NetnsCookie, ends: &Ends) -> Option<(*mut u64, u32)> {
    let hash = super::pair::hash(ends.remote, ends.remote_port) ^ netns.0.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    Some((maps::short(hash)?, (hash >> 32) as u32))
}

/// Whether a connection from `ends.local` is likely to end after one message.
#[inline(always)]
pub(crate) fn is_likely(netns: NetnsCookie, ends: &Ends) -> bool {
    // Ports that the kernel chooses are all even or all odd.
    if ends.local_port >> 1 & (PROBED - 1) == 0 {
        return false;
    }
    let Some((cell, tag)) = cell(netns, ends) else { return false };
    // SAFETY: an element of an array map; one word, read whole.
    Recent::of(unsafe { core::ptr::read_volatile(cell) }, tag).are_many()
}

/// A joined connection ended after one message.
#[inline(always)]
pub(crate) fn ended(netns: NetnsCookie, ends: &Ends) {
    let Some((cell, tag)) = cell(netns, ends) else { return };
    // SAFETY: an element of an array map; one word, read and written whole. A count that is lost makes no difference.
    unsafe {
        let mut recent = Recent::of(core::ptr::read_volatile(cell), tag);
        // One that was probed stands for others.
        let number = if recent.are_many() { PROBED as u8 } else { 1 };
        recent.current = recent.current.saturating_add(number);
        core::ptr::write_volatile(cell, recent.cell());
    }
}
