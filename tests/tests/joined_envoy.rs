//! Envoys in two pods of one node, with joined connections between them: what applications send arrives.

use std::{
    io::{BufRead as _, BufReader},
    process::{Child, Stdio},
    time::Duration,
};

use intercept_common::Family;

use tests::{
    actor::binary::{self, ReadableCopy},
    agent::succeed,
    envoy::Speaks,
    joined::{
        APP, PodPair,
        envoys::{self, JoinedEnvoyFixture, both_ways},
    },
    testbed::Ids,
};

#[test]
fn what_is_sent_through_two_envoys_arrives_and_leaves_the_wire_alone() {
    const EACH: usize = 16 << 20;
    let fixture = JoinedEnvoyFixture::new("envoys");
    let _envoys = fixture.sidecars(Speaks::Tcp);
    for (n, family) in Family::ALL.into_iter().enumerate() {
        let app = fixture.app(family);
        let leg = fixture.connect(&app, family);
        let before = fixture.bytes_on_the_wire();
        both_ways(&leg, 2 * n as u64 + 7, EACH);
        let wire = fixture.bytes_on_the_wire() - before;
        assert!(wire < EACH as u64 / 2, "{wire} bytes of {EACH} went over the wire");
        assert_eq!(fixture.joined(&fixture.pods.dialler), n as u64 + 1);
        assert_eq!(fixture.joined(&fixture.pods.acceptor), n as u64 + 1);
    }
}

struct ServerProcess(Child);

impl Drop for ServerProcess {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

#[test]
fn requests_through_two_envoys_are_answered() {
    const REQUESTS: usize = 300;
    let fixture = JoinedEnvoyFixture::new("envoys-http");
    let original = binary::locate("http", "INTERCEPT_HTTP").expect("the HTTP program");
    let http = ReadableCopy::of(&original).expect("a copy");
    let addresses = ["0.0.0.0", "[::]"].map(|any| format!("{any}:{APP}"));
    let mut serve = fixture.pods.acceptor.command_as(http.path(), Ids::APP).expect("a command");
    let mut server =
        ServerProcess(serve.arg("serve").args(addresses).stdout(Stdio::piped()).spawn().expect("a server"));
    let mut line = String::new();
    BufReader::new(server.0.stdout.take().expect("its output")).read_line(&mut line).expect("a line");
    let _envoys = fixture.sidecars(Speaks::Http);
    for family in Family::ALL {
        for kind in ["fresh", "kept"] {
            let mut get = fixture.pods.dialler.command_as(http.path(), Ids::APP).expect("a command");
            get.args(["get", &PodPair::app(family).to_string(), &REQUESTS.to_string(), kind]);
            succeed(get).expect("answered");
        }
    }
    // Envoy keeps few connections for many requests.
    assert!(fixture.joined(&fixture.pods.dialler) >= 2);
    assert_eq!(fixture.joined(&fixture.pods.dialler), fixture.joined(&fixture.pods.acceptor));
}

/// `cargo xtask soak --accelerate` does the same for longer.
#[test]
fn connections_come_and_go_in_every_way() {
    let soaked = envoys::soak(Duration::from_secs(14), 0);
    println!("{soaked}");
    let (whole, cut) = (soaked.whole.into_inner(), soaked.cut.into_inner());
    assert!(whole > 20 && whole > cut, "{whole} whole, {cut} cut off");
}
