//! `run` follows the addresses and routes of the namespace and detaches when it ends. Validation reports whether redirection
//! works.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    process::Output,
    time::{Duration, Instant},
};

use tests::{
    actor::{Actor, Answer, Bind, Dial, DialOutcome, Listen, OriginalDst, Transport},
    agent::{Agent, INIT_FLAGS, RunningAgent, finish},
    testbed::{Ids, Pod, PodSpec, netlink::RouteSpec, netlink::TABLE_MAIN},
};

/// The time until a change must be applied.
const SOON: Duration = Duration::from_millis(500);

fn addr(text: &str) -> SocketAddr {
    text.parse().unwrap_or_else(|_| panic!("{text} is not an address"))
}

/// Starts the agent in the foreground. Dropping it kills the process.
fn run(fixture: &FollowFixture, flags: &[&str]) -> RunningAgent {
    let (running, said) = fixture.agent.run(&fixture.pod, flags).expect("in force");
    assert!(said.starts_with("attached cgroup "), "{said}");
    running
}

fn end(running: RunningAgent) {
    let (status, log) = running.terminate().expect("ended");
    assert!(status.success(), "{status}: {log}");
}

/// A pod with a proxy and an application, connected to the world.
struct FollowFixture {
    agent: Agent,
    inside: Actor,
    _world: Actor,
    pod: Pod,
}

impl FollowFixture {
    fn new(label: &str) -> Self {
        let agent = Agent::new("follow").expect("the agent");
        let pod = Pod::new(PodSpec::new(label).with_eth1()).expect("a pod");
        let (inside, world) =
            (Actor::start(&pod).expect("an actor"), Actor::start(pod.neighbour()).expect("an actor"));
        for any in ["0.0.0.0", "[::]"] {
            let serve = |actor: &Actor, name: &str, ids, port: u16| {
                let bind = Bind::new(ids, addr(&format!("{any}:{port}")));
                actor
                    .listen(Listen { name: name.into(), transport: Transport::Tcp, bind })
                    .expect("a server");
            };
            serve(&inside, "proxy", Ids::PROXY, 15001);
            serve(&inside, "app", Ids::APP, 80);
            serve(&world, "world", Ids::ROOT, 80);
        }
        Self { agent, inside, _world: world, pod }
    }

    fn dial(&self, to: SocketAddr) -> Answer {
        match self.inside.dial(Dial::new(Ids::APP, to)).expect("dialled").outcome {
            DialOutcome::Answered(answer) => answer,
            other => panic!("{to}: {other:?}"),
        }
    }

    /// Waits until `server` answers. Only `before` may answer until then, and only for a short time after `since`.
    fn becomes(&self, to: SocketAddr, before: &str, server: &str, since: Instant) {
        loop {
            let started = since.elapsed();
            let answer = self.dial(to);
            if answer.server == server {
                if server == "proxy" {
                    assert_eq!(answer.original_dst, Some(OriginalDst::Addr(to)));
                }
                return;
            }
            assert_eq!(answer.server, before, "{to}");
            assert!(started < SOON, "{to} still goes to {before} after {started:?}");
        }
    }
}

#[test]
fn new_addresses_are_followed() {
    let fixture = FollowFixture::new("follow-address");
    let running = run(&fixture, &INIT_FLAGS);
    for (net, to) in [("10.99.0.7/32", "10.99.0.7:80"), ("fd99::7/128", "[fd99::7]:80")] {
        let (net, to) = (net.parse().expect("a net"), addr(to));
        assert_eq!(fixture.dial(to).server, "proxy", "{to} is the world's yet");
        fixture.pod.netns.add_address("eth0", net).expect("added");
        fixture.becomes(to, "proxy", "app", Instant::now());
        fixture.pod.netns.delete_address("eth0", net).expect("removed");
        // The kernel uses the new routes at once, and the world answers on every address.
        fixture.becomes(to, "world", "proxy", Instant::now());
    }
    end(running);
}

#[test]
fn moved_routes_are_followed() {
    let fixture = FollowFixture::new("follow-route");
    let running = run(&fixture, &[&INIT_FLAGS[..], &["-c", "eth1"]].concat());
    for (net, via, to) in
        [("172.20.0.0/16", "10.67.0.1", "172.20.1.1:80"), ("fd20::/16", "fd67::1", "[fd20::1]:80")]
    {
        let via: IpAddr = via.parse().expect("an address");
        let route = || RouteSpec {
            to: net.parse().expect("a net"),
            via: Some(via),
            dev: Some("eth1"),
            table: TABLE_MAIN,
            local: false,
        };
        let to = addr(to);
        assert_eq!(fixture.dial(to).server, "world", "what leaves by eth1 is not captured");
        fixture.pod.netns.delete_route(route()).expect("removed");
        fixture.becomes(to, "world", "proxy", Instant::now());
        fixture.pod.netns.add_route(route()).expect("added");
        fixture.becomes(to, "proxy", "world", Instant::now());
    }
    end(running);
}

#[test]
fn the_end_of_run_ends_the_capture() {
    let fixture = FollowFixture::new("run-end");
    let to = SocketAddr::from((Ipv4Addr::new(198, 51, 100, 7), 80));
    for _ in 0..2 {
        let running = run(&fixture, &INIT_FLAGS);
        assert_eq!(fixture.dial(to).server, "proxy");
        assert_eq!(fixture.agent.pods().expect("a status").len(), 1);
        end(running);
        assert_eq!(fixture.dial(to).server, "world");
        assert!(!fixture.agent.bpffs().join("intercept").exists());
    }
}

#[test]
fn a_killed_run_keeps_the_capture() {
    let fixture = FollowFixture::new("run-killed");
    let to = SocketAddr::from((Ipv4Addr::new(198, 51, 100, 7), 80));
    drop(run(&fixture, &INIT_FLAGS));
    assert_eq!(fixture.dial(to).server, "proxy");
    fixture.agent.detach(&fixture.pod).expect("detached");
    assert_eq!(fixture.dial(to).server, "world");
    assert!(!fixture.agent.bpffs().join("intercept").exists());
}

/// Runs attach. Returns its exit code and its output.
fn attach(agent: &Agent, pod: &Pod, args: &[&str]) -> (Option<i32>, String) {
    let args = [&INIT_FLAGS[..], args].concat();
    let Output { status, stdout, stderr } =
        finish(&mut agent.for_pod("attach", pod, &args)).expect("started");
    (status.code(), String::from_utf8_lossy(&stdout).into_owned() + &String::from_utf8_lossy(&stderr))
}

#[test]
fn validation_reports_whether_redirection_works() {
    let agent = Agent::new("follow").expect("the agent");
    let pod = Pod::new(PodSpec::new("validation")).expect("a pod");
    let (code, said) = attach(&agent, &pod, &["--skip-rule-apply", "--run-validation"]);
    assert_eq!(code, Some(126), "nothing is attached: {said}");
    assert!(said.contains("127.0.0.6:15002") && said.contains("not redirected"), "{said}");
    assert!(!agent.bpffs().join("intercept").exists());

    let (code, said) = attach(&agent, &pod, &["--run-validation"]);
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("validated: IPv4 arrives at port 15006, IPv6 at port 15006"), "{said}");
    let (code, said) = attach(&agent, &pod, &["--skip-rule-apply", "--run-validation"]);
    assert_eq!(code, Some(0), "{said}");

    // The proxy occupies the ports of the probe, and the check reports that.
    let inside = Actor::start(&pod).expect("an actor");
    for port in [15001, 15006] {
        let bind = Bind::new(Ids::PROXY, SocketAddr::from((Ipv4Addr::UNSPECIFIED, port)));
        inside.listen(Listen { name: "proxy".into(), transport: Transport::Tcp, bind }).expect("a proxy");
    }
    let (code, said) = attach(&agent, &pod, &["--skip-rule-apply", "--run-validation"]);
    assert_eq!(code, Some(126), "{said}");
    assert!(said.contains("before the proxy starts"), "{said}");
    // `run` leaves no capture behind that it does not keep up to date.
    agent.detach(&pod).expect("detached");
    assert!(!agent.bpffs().join("intercept").exists());
    let args = [&INIT_FLAGS[..], &["--run-validation"]].concat();
    let output = finish(&mut agent.for_pod("run", &pod, &args)).expect("started");
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && error.contains("before the proxy starts"), "{error}");
    assert!(!agent.bpffs().join("intercept").exists());
    drop(inside);

    let children = std::fs::read_dir(pod.cgroup.path()).expect("the cgroup").flatten();
    let children = children.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())).count();
    assert_eq!(children, 0, "the check's cgroup is left");
}
