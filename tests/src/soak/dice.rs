//! Randomness by a seed: each thread of a run has a sequence of its own, so that one thread's choices do not depend on
//! how fast another is.

use std::{ops::Range, time::Duration};

use rand::{Rng as _, SeedableRng as _, rngs::StdRng, seq::IndexedRandom as _};

/// A sequence of choices.
#[derive(Debug)]
pub struct Dice(StdRng);

impl Dice {
    /// The sequence of a thread.
    pub fn new(seed: u64, thread: u64) -> Self {
        Self(StdRng::seed_from_u64(seed ^ thread.wrapping_mul(0x9e37_79b9_7f4a_7c15)))
    }

    /// A number of a range.
    pub fn number(&mut self, range: Range<u32>) -> u32 {
        self.0.random_range(range)
    }

    /// A time of a range of milliseconds.
    pub fn millis(&mut self, range: Range<u64>) -> Duration {
        Duration::from_millis(self.0.random_range(range))
    }

    /// True once in so many times.
    pub fn once_in(&mut self, times: u32) -> bool {
        self.number(0..times) == 0
    }

    /// One of several.
    ///
    /// # Panics
    /// If there is none.
    pub fn one_of<T: Copy>(&mut self, several: &[T]) -> T {
        *several.choose(&mut self.0).expect("at least one")
    }
}
