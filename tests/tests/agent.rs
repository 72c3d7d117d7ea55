//! The agent beside real iptables, flow by flow.

use tests::differential::{Capture, Case, compare, configurations, observe, random};
use tests::iptables::Backend;

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().expect("a number"))
}

fn beside_iptables(cases: &[Case]) {
    let agent = Capture::agent().expect("INTERCEPT_AGENT names the agent");
    let mut reports = Vec::new();
    for case in cases {
        let iptables = observe(case, &Capture::Iptables(Backend::Nft))
            .unwrap_or_else(|error| panic!("{}: {error:#}", compare::describe(case)));
        match observe(case, &agent) {
            Ok(ours) => reports.extend(compare::with_iptables(case, &iptables, &ours)),
            Err(error) => reports.push(format!("{}: {error:#}", compare::describe(case))),
        }
    }
    assert!(reports.is_empty(), "{}", reports.join("\n"));
}

#[test]
fn fixed_configurations() {
    let seed = number("INTERCEPT_SEED", 1);
    let fixed = configurations::fixed().into_iter();
    beside_iptables(
        &fixed.map(|(name, options)| random::case_of(name, options, seed, 400)).collect::<Vec<_>>(),
    );
}

#[test]
fn random_configurations() {
    let seed = number("INTERCEPT_SEED", 1);
    beside_iptables(
        &(seed..seed + number("INTERCEPT_CASES", 10)).map(|seed| random::case(seed, 400)).collect::<Vec<_>>(),
    );
}
