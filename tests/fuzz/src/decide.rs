//! Configurations and flows drawn from the input: `decide` says what the walk of istio-iptables' rules says.

#![no_main]

use libfuzzer_sys::fuzz_target;
use rand::{RngCore, SeedableRng as _, rngs::SmallRng};
use tests::witness::{Ours, Rules, Situation};

/// Flows a configuration.
const FLOWS: usize = 20;

/// Draws what the input says; when that is used up, anything, so that what is drawn until it suits ends.
struct Drawn<'a> {
    input: &'a [u8],
    rest: SmallRng,
}

impl RngCore for Drawn<'_> {
    fn next_u32(&mut self) -> u32 {
        match self.input.split_first_chunk() {
            Some((bytes, rest)) => {
                self.input = rest;
                u32::from_le_bytes(*bytes)
            }
            None => self.rest.next_u32(),
        }
    }

    fn next_u64(&mut self) -> u64 {
        u64::from(self.next_u32()) << 32 | u64::from(self.next_u32())
    }

    fn fill_bytes(&mut self, to: &mut [u8]) {
        to.fill_with(|| self.next_u32().to_le_bytes()[0]);
    }
}

fuzz_target!(|input: &[u8]| {
    let mut situation = Situation::drawn(Drawn { input, rest: SmallRng::seed_from_u64(1) });
    let ours = Ours::new(&situation.options, &situation.place).expect("options that hold");
    let rules = Rules::new(&situation.options);
    for _ in 0..FLOWS {
        let flow = situation.flow();
        let (fate, reason) = ours.fate(&situation.place, &flow);
        let expected = rules.fate(&situation.place, &flow);
        let (options, place) = (&situation.options, &situation.place);
        assert_eq!(fate, expected, "{}: {flow:?}\n{options:?}\n{place:?}", reason.word());
    }
});
