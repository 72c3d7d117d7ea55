//! Whether the daemon's memory and descriptors are flat.

use super::{
    ledger::{Kind, Ledger},
    residue::Process,
};

/// What memory may grow by, in KiB: an allocator's own ups and downs.
const MEMORY: u64 = 6 << 10;
/// What descriptors may differ by: requests that are being answered.
const DESCRIPTORS: usize = 8;
/// Fewer samples tell nothing: for some minutes an allocator takes what it then keeps.
const LEAST: usize = 60;

/// Samples of one daemon.
#[derive(Debug, Default)]
pub struct Growth(Vec<Process>);

impl Growth {
    /// Takes another.
    pub fn sample(&mut self, process: Process) {
        self.0.push(process);
    }

    /// Compares the last third with the first.
    pub fn judge(&self, ledger: &Ledger) {
        if self.0.len() < LEAST {
            return;
        }
        let third = self.0.len() / 3;
        let [first, last] = [&self.0[..third], &self.0[self.0.len() - third..]].map(median);
        if last > first + MEMORY {
            ledger.find(Kind::Grown, &format_args!("the daemon's memory: {first} KiB, then {last} KiB"));
        }
    }

    /// Compares a daemon that has lived through all with one that has just taken over.
    pub fn compare(old: &Process, fresh: &Process, ledger: &Ledger) {
        if old.open() > fresh.open() + DESCRIPTORS {
            let (old, fresh) = (&old.descriptors, &fresh.descriptors);
            ledger.find(
                Kind::Grown,
                &format_args!("the daemon's descriptors: {old:?}, a fresh one's: {fresh:?}"),
            );
        }
    }

    /// The range of memory, to be shown.
    pub fn range(&self) -> Option<(u64, u64)> {
        let rss = self.0.iter().map(|process| process.rss);
        Some((rss.clone().min()?, rss.max()?))
    }
}

fn median(samples: &[Process]) -> u64 {
    let mut rss: Vec<_> = samples.iter().map(|process| process.rss).collect();
    rss.sort_unstable();
    rss[rss.len() / 2]
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn judged(rss: impl Iterator<Item = u64>) -> u64 {
        let (ledger, mut growth) = (Ledger::new(), Growth::default());
        rss.for_each(|rss| growth.sample(Process { rss, descriptors: BTreeMap::new() }));
        growth.judge(&ledger);
        ledger.count(Kind::Grown)
    }

    #[test]
    fn memory_that_grows_is_found_and_noise_is_not() {
        assert_eq!(judged((0..90).map(|n| 20_000 + n % 2 * 4000)), 0);
        assert_eq!(judged((0..90).map(|n| 20_000 + n * 200)), 1);
        assert_eq!(judged((0..3).map(|n| 20_000 + n * 40_000)), 0, "too few");
    }

    #[test]
    fn descriptors_beyond_a_fresh_daemons_are_found() {
        let of = |count| Process { rss: 1, descriptors: [("socket".to_owned(), count)].into() };
        for (old, findings) in [(20, 0), (27, 0), (30, 1)] {
            let ledger = Ledger::new();
            Growth::compare(&of(old), &of(20), &ledger);
            assert_eq!(ledger.count(Kind::Grown), findings, "{old}");
        }
    }
}
