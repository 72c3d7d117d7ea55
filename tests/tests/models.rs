//! Compares `decide` with the interpreted rules of istio-iptables on a million flows (a quarter in a debug build).

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::time::{SystemTime, UNIX_EPOCH};

use intercept_common::Reason;
use tests::model::{AgentModel, IptablesModel, ModelVerdict, Situation};

/// The number of flows for each configuration.
const FLOWS: u64 = 100;

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().expect("a number"))
}

/// The number of flows by verdict and row, and the differences.
#[derive(Default)]
struct FlowTally {
    rows: BTreeMap<&'static str, u64>,
    differing: Vec<String>,
}

fn examine(seed: u64, tally: &mut FlowTally) {
    let mut situation = Situation::new(seed);
    let agent = AgentModel::new(&situation.options, &situation.netns)
        .unwrap_or_else(|e| panic!("seed {seed}: {e:#}"));
    let iptables = IptablesModel::new(&situation.options);
    for _ in 0..FLOWS {
        let flow = situation.flow();
        let expected = iptables.verdict(&situation.netns, &flow);
        let (verdict, reason) = agent.verdict(&situation.netns, &flow);
        *tally.rows.entry(reason.as_str()).or_default() += 1;
        assert_ne!(expected, ModelVerdict::Dropped, "no rule drops the beginning of anything");
        if verdict != expected && tally.differing.len() < 5 {
            let Situation { options, netns, .. } = &situation;
            tally.differing.push(format!(
                "seed {seed}: the rules say {expected:?}, we {verdict:?} ({}):\n  {flow:?}\n  {options:?}\n  {netns:?}",
                reason.as_str()
            ));
        }
    }
}

/// Repeat with INTERCEPT_SEED=SEED INTERCEPT_CONFIGURATIONS=1.
#[test]
fn decide_agrees_with_the_rules() {
    let clock = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_secs() << 24;
    let first = number("INTERCEPT_SEED", clock);
    // A million flows. Without optimisation they would take a minute, so a quarter of them.
    let count = number("INTERCEPT_CONFIGURATIONS", if cfg!(debug_assertions) { 3_000 } else { 12_000 });
    println!("{count} configurations from seed {first}, {FLOWS} flows each");
    let total = Mutex::new(FlowTally::default());
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for thread in 0..threads {
            let total = &total;
            scope.spawn(move || {
                let mut tally = FlowTally::default();
                for seed in (first..first + count).skip(thread).step_by(threads) {
                    examine(seed, &mut tally);
                }
                let mut total = total.lock().expect("no thread panicked");
                for (row, count) in tally.rows {
                    *total.rows.entry(row).or_default() += count;
                }
                total.differing.extend(tally.differing);
            });
        }
    });
    let FlowTally { rows, differing } = total.into_inner().expect("no thread panicked");
    println!("{rows:#?}");
    assert!(differing.is_empty(), "{}", differing.join("\n"));
    if count >= 1000 {
        // If sk_lookup passes a local flow, the row is the one of the connect hook. iptables has no rules for containers, and
        // `meshes.rs` compares the rules of other meshes.
        let without =
            [Reason::LocalSource, Reason::ExemptContainer, Reason::DnsOverTcp, Reason::ExcludedSource];
        for reason in Reason::ALL.iter().filter(|reason| !without.contains(reason)) {
            assert!(rows.contains_key(reason.as_str()), "no flow met {}: {rows:?}", reason.as_str());
        }
    }
}
