//! Configurations and flows drawn from the input: `decide` says what the walk of istio-iptables' rules says.

#![no_main]

use libfuzzer_sys::fuzz_target;
use rand::{RngCore, SeedableRng as _, rngs::SmallRng};
use tests::model::{AgentModel, IptablesModel, Situation};

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
    let ours = AgentModel::new(&situation.options, &situation.netns).expect("options that hold");
    let rules = IptablesModel::new(&situation.options);
    for _ in 0..FLOWS {
        let flow = situation.flow();
        let (verdict, reason) = ours.verdict(&situation.netns, &flow);
        let expected = rules.verdict(&situation.netns, &flow);
        let (options, netns) = (&situation.options, &situation.netns);
        assert_eq!(verdict, expected, "{}: {flow:?}\n{options:?}\n{netns:?}", reason.as_str());
    }
});
