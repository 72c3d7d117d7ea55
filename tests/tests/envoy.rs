//! Envoy as the sidecar of a captured pod: requests in both directions, and the entries in its access log.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    time::{Duration, Instant},
};

use intercept_common::Family;

use tests::{
    agent::succeed,
    envoy::loaded::{EnvoyFixture, lost_in_the_gap_alone},
};

/// Requests of each kind and family: 1,000 per direction over new and kept connections of both families.
const REQUESTS: usize = 250;

#[test]
fn requests_both_ways_pass_envoy_and_none_is_lost() {
    let fixture = EnvoyFixture::new("envoy");
    let envoy = fixture.envoy();
    let mut expected = BTreeMap::new();
    for way @ (listener, to) in fixture.ways() {
        for kind in ["fresh", "kept"] {
            succeed(fixture.get(way, REQUESTS, kind)).expect("answered");
        }
        expected.insert((listener.to_owned(), to.to_string(), to.to_string()), 2 * REQUESTS);
    }

    let mut logged = BTreeMap::new();
    for line in envoy.logged(expected.values().sum(), Duration::from_secs(10)).expect("a log") {
        let client: SocketAddr = line.client.parse().expect("an address");
        let family = Family::of(&client.ip());
        // The pod for outbound, and the neighbour's address on the link for inbound connections.
        let world = if family == Family::V6 { "fd66::1" } else { "10.66.0.1" }.parse().expect("an address");
        let who = if line.listener == "outbound" { fixture.pod.address(family) } else { world };
        assert_eq!(client.ip(), who, "{line:?}");
        *logged.entry((line.listener, line.original, line.upstream)).or_insert(0) += 1;
    }
    assert_eq!(logged, expected);
    drop(envoy);
    fixture.end();
}

#[test]
fn without_envoy_nothing_passes_and_a_new_one_takes_over() {
    let fixture = EnvoyFixture::new("envoy-restart");
    for _ in 0..2 {
        for way in fixture.ways() {
            let why = succeed(fixture.get(way, 1, "fresh")).expect_err("there is no proxy").to_string();
            assert!(why.contains("refused"), "{way:?}: {why}");
        }
        let _envoy = fixture.envoy();
        for way in fixture.ways() {
            succeed(fixture.get(way, 10, "fresh")).expect("answered");
        }
    }
    fixture.end();
}

#[test]
fn a_restart_under_load_costs_only_connections_of_the_gap() {
    let fixture = EnvoyFixture::new("envoy-load");
    let mut envoy = Some(fixture.envoy());
    let (loads, gap) = fixture.under_load(|load| {
        load.more(20);
        let gone = Instant::now();
        envoy.take();
        load.more(12);
        envoy = Some(fixture.envoy());
        let back = Instant::now();
        load.more(40);
        gone..back
    });
    lost_in_the_gap_alone(loads, &gap);
    drop(envoy);
    fixture.end();
}
