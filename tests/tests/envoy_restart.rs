//! The real Envoy with many workers, each with listening sockets of its own: hot-restarted and replaced under load, with
//! `attach` alone.

use std::time::{Duration, Instant};

use tests::{
    envoy::{
        generations::Generations,
        loaded::{EnvoyFixture, lost_in_the_gap_alone},
    },
    status::{StatusEntry, StatusListener},
};

const WORKERS: u32 = 16;
const PATIENCE: Duration = Duration::from_secs(60);

#[test]
fn hot_restarts_lose_nothing_and_a_replacement_only_what_comes_meanwhile() {
    let fixture = EnvoyFixture::new("envoy-generations");
    let start = |workers| Generations::start(&fixture.program, &fixture.pod, workers).expect("Envoy");
    let mut envoy = start(WORKERS);
    let (loads, ()) = fixture.under_load(|load| {
        load.more(20);
        for _ in 0..2 {
            envoy.restart(&fixture.program, &fixture.pod, PATIENCE).expect("the next generation");
            load.more(20);
        }
    });
    for (way, batches) in loads {
        let lost: Vec<_> = batches.iter().filter_map(|batch| batch.failed.as_ref()).collect();
        assert!(lost.is_empty(), "{way:?}: of {} batches {lost:#?}", batches.len());
    }
    let status = &fixture.agent.pods().expect("a status")[0];
    assert_listens(status);
    assert_eq!(status.failures, [], "{status:#?}");

    // Others than before in number, none of which is handed over.
    let mut envoy = Some(envoy);
    let (loads, gap) = fixture.under_load(|load| {
        load.more(20);
        let gone = Instant::now();
        envoy.take();
        load.more(12);
        envoy = Some(start(2));
        let back = Instant::now();
        load.more(40);
        gone..back
    });
    lost_in_the_gap_alone(loads, &gap);
    let status = &fixture.agent.pods().expect("a status")[0];
    assert_listens(status);
    let refused = &status.failures;
    assert!(refused.iter().all(|failure| failure.reason == "no_listener"), "{status:#?}");
    drop(envoy);
    let status = &fixture.agent.pods().expect("a status")[0];
    assert_eq!(status.listeners, [], "{status:#?}");
    fixture.end();
}

/// Both ports in both families.
fn assert_listens(status: &StatusEntry) {
    for (port, family) in [(15001, 4), (15001, 6), (15006, 4), (15006, 6)] {
        assert!(status.listeners.contains(&StatusListener { port, family }), "{port}: {status:#?}");
    }
    assert_eq!(status.mptcp_listeners, []);
}
