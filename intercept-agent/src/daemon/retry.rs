//! The delay before a retry, and between the changes of one pod.

use std::{
    hash::{BuildHasher as _, RandomState},
    time::Duration,
};

const FIRST: Duration = Duration::from_millis(100);
const LAST: Duration = Duration::from_secs(30);
/// Changes that cost less are not delayed.
const CHEAP: Duration = Duration::from_millis(5);
/// How many times its cost a pod waits after a change.
const REST: u32 = 200;

/// Returns the delay after this many consecutive failures, at least one. It doubles each time up to half a minute, with
/// a random deviation of up to a quarter so that pods that failed together are not retried together.
pub fn delay(failures: u32) -> Duration {
    // A hash with random keys is random enough.
    let chance = RandomState::new().hash_one(0) % 1024;
    nominal(failures).mul_f64(0.75 + 0.5 * (chance as f64 / 1024.0))
}

/// Returns the delay before the next change of a pod, after a change that took `cost` of the worker's processor time. All
/// pods share the worker: a pod with long lists whose routes change all the time gets a two-hundredth of it.
pub fn rest(cost: Duration) -> Duration {
    if cost < CHEAP { Duration::ZERO } else { (cost * REST).min(LAST) }
}

fn nominal(failures: u32) -> Duration {
    let doublings = failures.saturating_sub(1).min(16);
    (FIRST * (1 << doublings)).min(LAST)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_double_up_to_half_a_minute() {
        let nominal = [1, 2, 3, 9, 10, 40, u32::MAX].map(|n| nominal(n).as_millis());
        assert_eq!(nominal, [100, 200, 400, 25_600, 30_000, 30_000, 30_000]);
    }

    #[test]
    fn expensive_changes_are_rare() {
        let rest = [1, 4, 5, 20, 100, 150, 151, 9999].map(|ms| rest(Duration::from_millis(ms)).as_millis());
        assert_eq!(rest, [0, 0, 1000, 4000, 20_000, 30_000, 30_000, 30_000]);
    }

    #[test]
    fn delays_vary_by_a_quarter() {
        let delays: Vec<Duration> = (0..200).map(|_| delay(20)).collect();
        assert!(delays.iter().all(|d| (LAST.mul_f64(0.75)..=LAST.mul_f64(1.25)).contains(d)), "{delays:?}");
        assert!(delays.iter().any(|d| *d < LAST) && delays.iter().any(|d| *d > LAST), "{delays:?}");
    }
}
