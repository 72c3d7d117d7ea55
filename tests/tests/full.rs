//! A pod or a node without room for another original destination.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    net::{IpAddr, SocketAddr},
    process::{Child, Stdio},
    time::{Duration, Instant},
};

use tests::{
    actor::{Actor, Bind, Dial, DialOutcome, Listen, OriginalDst, Transport},
    agent::{Agent, RunningAgent},
    status::count_of,
    steps::{self, SocketKind, Step},
    testbed::{Ids, Pod, PodSpec},
};

/// The capacity of the node. A pod may use a quarter.
const ROOM: usize = 16;
const EACH: usize = ROOM / 4;
const TO: SocketAddr = SocketAddr::new(IpAddr::V4(std::net::Ipv4Addr::new(10, 96, 0, 10)), 80);

struct FullFixture {
    inside: Actor,
    _running: RunningAgent,
    pod: Pod,
}

impl FullFixture {
    fn new(agent: &Agent, label: &str) -> Self {
        let pod = Pod::new(PodSpec::new(label)).expect("a pod");
        let inside = Actor::start(&pod).expect("an actor");
        let bind = Bind::new(Ids::PROXY, SocketAddr::new(IpAddr::from([0, 0, 0, 0]), 15001));
        inside.listen(Listen { name: "outbound".into(), transport: Transport::Tcp, bind }).expect("a proxy");
        let flags = ["-i", "*", "-u", "1337", "--max-connections", &ROOM.to_string()];
        let (running, said) = agent.run(&pod, &flags).expect("in force");
        assert!(said.starts_with("attached"), "{said}");
        Self { inside, _running: running, pod }
    }

    fn is_told_right(&self) -> bool {
        match self.inside.dial(Dial::new(Ids::APP, TO)).expect("dialled").outcome {
            DialOutcome::Answered(answer) => {
                assert_eq!(answer.original_dst, Some(OriginalDst::Addr(TO)));
                true
            }
            _ => false,
        }
    }

    /// The result of another connect().
    fn one_more(&self) -> String {
        let steps = [Step::Open(SocketKind::Tcp4), Step::Connect(TO)];
        steps::run(&self.pod, Ids::APP, &steps).expect("run").remove(1)
    }

    /// Opens connections that the client does not close.
    fn hold(&self, count: usize) -> ConnectionHolder {
        let line =
            format!("for i in $(seq {count}); do exec {{fd}}<>/dev/tcp/10.96.0.10/80; done; echo open; read");
        let mut bash = self.pod.command_as("/bin/bash", Ids::APP).expect("bash");
        let mut child = bash
            .args(["-c", &line])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("bash starts");
        let mut open = String::new();
        BufReader::new(child.stdout.take().expect("a pipe")).read_line(&mut open).expect("a line");
        assert_eq!(open, "open\n");
        ConnectionHolder(child)
    }
}

struct ConnectionHolder(Child);

impl Drop for ConnectionHolder {
    fn drop(&mut self) {
        drop(self.0.stdin.take().expect("a pipe").write_all(b"\n"));
        drop(self.0.wait());
    }
}

fn failed(agent: &Agent, reason: &str) -> bool {
    let pods = agent.pods().expect("status");
    pods.iter().any(|pod| count_of(&pod.failures, reason) > 0)
}

fn comes_back(fixture: &FullFixture) {
    let deadline = Instant::now() + Duration::from_secs(5);
    while !fixture.is_told_right() {
        assert!(Instant::now() < deadline, "room is not given back");
    }
}

/// The next connect() of a pod that has used its share fails and is counted. Other pods are not affected.
#[test]
fn a_pod_has_its_share_and_no_more() {
    let agent = Agent::new("share").expect("the agent");
    let (greedy, other) = (FullFixture::new(&agent, "greedy"), FullFixture::new(&agent, "other"));
    assert!(greedy.is_told_right());
    let held = greedy.hold(EACH);
    assert_eq!(greedy.one_more(), "ENOBUFS");
    assert!(!greedy.is_told_right());
    assert!(other.is_told_right());
    let pods = agent.pods().expect("status");
    assert!(
        pods.iter().any(|pod| usize::try_from(pod.connections) == Ok(EACH)
            && usize::try_from(pod.max_connections) == Ok(EACH)),
        "{pods:#?}"
    );
    assert!(failed(&agent, "too_many_connections"), "{pods:#?}");
    drop(held);
    comes_back(&greedy);
}

/// The shares of all pods can exceed the capacity of the node. connect() then fails as well, and no SYN leaves without an
/// entry for its original destination.
#[test]
fn a_full_map_refuses_the_connect() {
    let agent = Agent::new("full").expect("the agent");
    let beds: Vec<FullFixture> = (0..5).map(|n| FullFixture::new(&agent, &format!("full{n}"))).collect();
    let mut held: Vec<ConnectionHolder> = beds[..4].iter().map(|fixture| fixture.hold(EACH)).collect();
    let last = &beds[4];
    assert_eq!(last.one_more(), "EHOSTUNREACH");
    assert!(failed(&agent, "orig_dst_full"));
    held.pop();
    comes_back(last);
}
