//! Compares real iptables with the interpreted rules and with the agent.

use std::collections::BTreeMap;
use std::time::Instant;

use tests::differential::{Capture, Case, compare, configurations, observe, oracle, random};
use tests::iptables::{Backend, IptablesOptions, IptablesVerdict};

const NFT: Capture = Capture::Iptables(Backend::Nft);
const LEGACY: Capture = Capture::Iptables(Backend::Legacy);

/// A number from the environment, to run longer or to repeat a run.
fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().expect("a number"))
}

fn fixed_cases(flows: usize) -> Vec<Case> {
    let seed = number("INTERCEPT_SEED", 1);
    let fixed = configurations::fixed().into_iter().zip(seed..);
    fixed.map(|((name, options), seed)| random::case_of(name, options, seed, flows)).collect()
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

fn agent_against_iptables(cases: &[Case]) {
    let agent = Capture::agent().expect("the agent");
    let mut reports = Vec::new();
    for case in cases {
        let observe = |capture| {
            observe(case, capture).unwrap_or_else(|error| panic!("{}: {error:#}", compare::describe(case)))
        };
        let (iptables, agent) = std::thread::scope(|scope| {
            let iptables = scope.spawn(|| observe(&NFT));
            let agent = observe(&agent);
            (iptables.join().expect("observed"), agent)
        });
        reports.extend(compare::with_iptables(case, &iptables, &agent));
        reports.extend(compare::changed_ports(case, &agent));
    }
    assert!(reports.is_empty(), "{}", reports.join("\n"));
}

#[test]
fn fixed_configurations_under_the_agent_as_under_iptables() {
    agent_against_iptables(&fixed_cases(400));
}

#[test]
fn random_configurations_under_the_agent_as_under_iptables() {
    agent_against_iptables(&random_cases(400));
}

/// Equal captures show no difference in the closest comparison, and different ones do.
#[test]
fn the_closest_comparison_has_no_false_results() {
    for case in random_cases(400).into_iter().take(3) {
        let nft = observe(&case, &NFT).expect("observed");
        let legacy = observe(&case, &LEGACY).expect("observed");
        assert_eq!(compare::with_iptables(&case, &nft, &legacy), None);
    }
    let case = random::case_of("injected", IptablesOptions::injected(), 1, 200);
    let other = Case {
        options: IptablesOptions { envoy_port: 15000, ..IptablesOptions::injected() },
        ..case.clone()
    };
    let (right, wrong) = (observe(&case, &NFT).expect("observed"), observe(&other, &NFT).expect("observed"));
    let report = compare::with_iptables(&case, &right, &wrong).expect("a difference");
    assert!(report.contains("who answered differs"), "{report}");
}

/// The seeds draw flows with every verdict.
#[test]
fn random_cases_have_every_verdict() {
    let mut fates = BTreeMap::new();
    for seed in 0..100 {
        let case = random::case(seed, 400);
        for expected in oracle::predict(&case) {
            let verdict = match expected.verdict {
                IptablesVerdict::Pass => "left",
                IptablesVerdict::Redirect(_) => "redirected",
                IptablesVerdict::Tproxy(_) => "tproxied",
                IptablesVerdict::Drop => "dropped",
            };
            *fates.entry((verdict, expected.server.unwrap_or("nobody"))).or_insert(0) += 1;
        }
    }
    for fate in [
        ("left", "world"),
        ("left", "app"),
        ("left", "tunnel"),
        ("left", "dns"),
        ("left", "nobody"),
        ("redirected", "outbound"),
        ("redirected", "inbound"),
        ("redirected", "dns"),
        ("tproxied", "inbound"),
    ] {
        assert!(fates.get(&fate).is_some_and(|count| *count >= 200), "{fate:?}: {fates:?}");
    }
}

/// The comparison fails if the installed rules differ from the interpreted ones.
#[test]
fn a_wrong_rule_is_found() {
    let mut case = random::case_of("wrong", IptablesOptions::injected(), 1, 200);
    let seen = observe(&case, &NFT).expect("observed");
    assert_eq!(compare::with_oracle(&case, &seen), None);
    case.options.exclude_outbound_ports = vec![80];
    let report = compare::with_oracle(&case, &seen).expect("a difference");
    assert!(report.contains(":80"), "{report}");
}
