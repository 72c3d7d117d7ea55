//! `trace` says what becomes of connections between proxies.

use std::{
    process::{Child, Stdio},
    time::{Duration, Instant},
};

use intercept_common::Family;
use serde_json::Value;
use tests::{
    agent::{Agent, INIT_FLAGS},
    joined::{APP, PATIENCE, PodPair, goes_past, own_name, pass},
};

struct TraceProcess(Child);

impl Drop for TraceProcess {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

/// Lines of `trace --json` while something is done.
fn traced(agent: &Agent, lines: usize, done: impl FnOnce()) -> Vec<Value> {
    let mut trace = agent.command("trace");
    trace.args(["--json", "--count", &lines.to_string()]);
    let trace = trace.stdout(Stdio::piped()).spawn().expect("started");
    let deadline = Instant::now() + PATIENCE;
    while !agent.tracing().expect("a switch") {
        assert!(Instant::now() < deadline, "trace does not start");
        std::thread::sleep(Duration::from_millis(5));
    }
    done();
    let mut trace = TraceProcess(trace);
    let status = loop {
        if let Some(status) = trace.0.try_wait().expect("a process") {
            break status;
        }
        assert!(Instant::now() < deadline, "fewer than {lines} events");
        std::thread::sleep(Duration::from_millis(5));
    };
    assert!(status.success());
    let output = std::io::read_to_string(trace.0.stdout.take().expect("piped")).expect("text");
    output.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect()
}

#[test]
fn trace_names_what_becomes_of_a_connection_between_proxies() {
    let agent = Agent::new("join-trace").expect("the agent");
    let pods = PodPair::accelerated("join-trace", &agent).expect("pods");
    for family in Family::ALL {
        let listener = pods.listen(family).expect("a listener");
        // The decisions at both ends, the two ends, and one that goes by TCP.
        let lines = traced(&agent, 5, || {
            let leg = pods.connect(&listener, PodPair::app(family)).expect("a connection");
            leg.greet().expect("greeted");
            assert!(goes_past(&leg.dialled, &leg.accepted).expect("passed"));
            // A reader that blocks.
            leg.accepted.set_nonblocking(false).expect("set");
            pass(&leg.dialled, &leg.accepted, b"by TCP").expect("passed");
        });
        let told = |direction: &str, reason: &str| {
            let found = lines.iter().find(|line| line["direction"] == direction && line["reason"] == reason);
            found.unwrap_or_else(|| panic!("no {direction} {reason}: {lines:#?}")).clone()
        };
        let ends = [told("outbound", "joined"), told("inbound", "joined")];
        for end in &ends {
            assert_eq!(end["verdict"], "joined");
            assert_eq!(end["destination"], PodPair::app(family).ip().to_string(), "{end}");
            assert_eq!(end["destination_port"], APP, "{end}");
        }
        assert_eq!(ends[0]["source"], ends[1]["source"]);
        assert_eq!(ends[0]["source_port"], ends[1]["source_port"]);
        assert_ne!(ends[0]["netns_cookie"], ends[1]["netns_cookie"]);
        let by_tcp = told("outbound", "reader_blocks");
        assert_eq!(
            (&by_tcp["verdict"], &by_tcp["source_port"]),
            (&Value::from("tcp"), &ends[0]["source_port"])
        );
    }
    // An executable that is not in the list.
    let flags: Vec<_> = INIT_FLAGS.into_iter().chain(["--accelerate"]).collect();
    agent.attach(&pods.dialler, &flags).expect("attached");
    let listener = pods.listen(Family::V4).expect("a listener");
    let lines =
        traced(&agent, 2, || drop(pods.connect(&listener, PodPair::app(Family::V4)).expect("dialled")));
    let refused = lines.iter().find(|line| line["reason"] == "refused_proxy").expect("an event");
    let beginning: String = own_name().expect("a name").chars().take(16).collect();
    assert_eq!((&refused["verdict"], &refused["process"]), (&Value::from("tcp"), &Value::from(beginning)));
}
