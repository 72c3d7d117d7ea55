//! Real iptables beside the walk of its rules, and beside the agent where there is one.

use std::time::Instant;

use tests::differential::{Capture, Case, compare, configurations, observe, random};
use tests::iptables::Backend;

const NFT: Capture = Capture::Iptables(Backend::Nft);
const LEGACY: Capture = Capture::Iptables(Backend::Legacy);

/// A number from the environment, to run longer or again.
fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().expect("a number"))
}

fn fixed_cases(flows: usize) -> Vec<Case> {
    let seed = number("INTERCEPT_SEED", 1);
    let fixed = configurations::fixed().into_iter();
    fixed.map(|(name, options)| random::case_of(name, options, seed, flows)).collect()
}

fn random_cases(flows: usize) -> Vec<Case> {
    let seed = number("INTERCEPT_SEED", 1);
    (seed..seed + number("INTERCEPT_CASES", 10)).map(|seed| random::case(seed, flows)).collect()
}

fn against_oracle(cases: &[Case], capture: &Capture) {
    let mut reports = Vec::new();
    for case in cases {
        let start = Instant::now();
        let seen =
            observe(case, capture).unwrap_or_else(|error| panic!("{}: {error:#}", compare::describe(case)));
        println!("{} flows in {:?}: case {}", case.flows.len(), start.elapsed(), case.origin);
        reports.extend(compare::with_oracle(case, &seen));
    }
    assert!(reports.is_empty(), "{}", reports.join("\n"));
}

#[test]
fn fixed_configurations_under_iptables_as_the_rules_say() {
    against_oracle(&fixed_cases(400), &NFT);
}

#[test]
fn fixed_configurations_under_iptables_legacy_as_the_rules_say() {
    against_oracle(&fixed_cases(100), &LEGACY);
}

#[test]
fn random_configurations_under_iptables_as_the_rules_say() {
    against_oracle(&random_cases(400), &NFT);
}

/// The comparison notices when the rules in force are not those that were walked.
#[test]
fn a_wrong_rule_is_noticed() {
    let mut case = random::case_of("wrong", tests::iptables::Options::injected(), 1, 200);
    let seen = observe(&case, &NFT).expect("observed");
    assert_eq!(compare::with_oracle(&case, &seen), None);
    case.options.exclude_outbound_ports = vec![80];
    let report = compare::with_oracle(&case, &seen).expect("a difference");
    assert!(report.contains(":80"), "{report}");
}
