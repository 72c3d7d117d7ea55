//! Redirected connections in the presence of NAT, of unusual addresses on the loopback interface, and of other programs on
//! the same sockets.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd as _;
use std::process::Command;
use std::time::{Duration, Instant};

use intercept_common::Family;

use tests::actor::{Actor, Bind, Dial, DialOutcome, Listen, OriginalDst, Transport};
use tests::agent::{Agent, INIT_FLAGS};
use tests::bpf;
use tests::testbed::{Ids, Pod, PodSpec};

struct RedirectsFixture {
    inside: Actor,
    agent: Agent,
    pod: Pod,
}

impl RedirectsFixture {
    fn new(label: &str, at: [&str; 2]) -> Self {
        let agent = Agent::new(label).expect("the agent");
        let pod = Pod::new(PodSpec::new(label)).expect("a pod");
        let inside = Actor::start(&pod).expect("an actor");
        for at in at {
            let at: IpAddr = at.parse().expect("an address");
            for port in [15001, 15006, 15053] {
                let bind = Bind::new(Ids::PROXY, SocketAddr::new(at, port));
                let listen = Listen { name: port.to_string(), transport: Transport::Tcp, bind };
                inside.listen(listen).expect("a listener");
            }
        }
        Self { inside, agent, pod }
    }

    /// The original destination that the proxy gets for a connection to `to`.
    fn original(&self, to: &str) -> Result<SocketAddr, String> {
        let dial = Dial::new(Ids::APP, to.parse().expect("an address"));
        match self.inside.dial(dial).expect("dialled").outcome {
            DialOutcome::Answered(answer) => match answer.original_dst {
                Some(OriginalDst::Addr(addr)) => Ok(addr),
                other => Err(format!("{other:?}")),
            },
            other => Err(format!("{other:?}")),
        }
    }

    fn command(&self, line: &str) {
        let status = self.pod.command("sh").expect("a command").args(["-c", line]).status().expect("sh");
        assert!(status.success(), "{line}: {status}");
    }
}

const WILDCARD: [&str; 2] = ["0.0.0.0", "::"];
const LOCALHOST: [&str; 2] = ["127.0.0.1", "::1"];
const SERVICES: [&str; 2] = ["10.96.0.10:80", "[fd96::10]:80"];

#[test]
fn nat_in_the_pod_changes_nothing() {
    let rules = [
        "POSTROUTING -j MASQUERADE",
        "POSTROUTING -p tcp -j MASQUERADE --random-fully",
        "POSTROUTING -p tcp -o lo -j MASQUERADE --to-ports 20000-20999",
        "POSTROUTING -p tcp -j MASQUERADE --to-ports 1024-65535 --random",
        "INPUT -p tcp -j SNAT --to-source {own}",
        "POSTROUTING ! -o eth1 -j MASQUERADE",
    ];
    for at in [WILDCARD, LOCALHOST] {
        for rule in rules {
            for attached_first in [false, true] {
                let fixture = RedirectsFixture::new("nat", at);
                let attach = || fixture.agent.attach(&fixture.pod, &INIT_FLAGS).expect("attached");
                if attached_first {
                    attach();
                }
                for (iptables, own) in [("iptables", "10.66.0.2"), ("ip6tables", "fd66::2")] {
                    fixture.command(&format!("{iptables} -w -t nat -A {}", rule.replace("{own}", own)));
                }
                if !attached_first {
                    attach();
                }
                for to in SERVICES {
                    for _ in 0..5 {
                        assert_eq!(
                            fixture.original(to),
                            Ok(to.parse().expect("an address")),
                            "{rule}, {at:?}"
                        );
                    }
                }
                forgotten(&fixture);
                fixture.agent.detach(&fixture.pod).expect("detached");
            }
        }
    }
}

/// Docker's rule, in a pod that runs Docker.
#[test]
fn nat_for_nested_containers_changes_nothing() {
    let fixture = RedirectsFixture::new("docker", WILDCARD);
    fixture.agent.attach(&fixture.pod, &INIT_FLAGS).expect("attached");
    fixture.command(
        "ip link add docker0 type veth peer name docker1 && ip addr add 172.17.0.1/16 dev docker0 && ip link set docker0 up",
    );
    fixture.command("iptables -w -t nat -A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE");
    fixture.command("iptables -w -t nat -A POSTROUTING -s 10.66.0.0/16 ! -o docker0 -j MASQUERADE");
    for to in SERVICES {
        assert_eq!(fixture.original(to), Ok(to.parse().expect("an address")));
    }
    fixture.agent.detach(&fixture.pod).expect("detached");
}

fn forgotten(fixture: &RedirectsFixture) {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let left = fixture.agent.remembered().expect("the map");
        if left == 0 {
            break;
        }
        assert!(Instant::now() < deadline, "{left} entries are left");
        std::thread::yield_now();
    }
    let pods = fixture.agent.pods().expect("a status");
    assert_eq!(pods[0].connections, 0, "{pods:#?}");
}

/// The loopback interface has a longer prefix than 127/8.
#[test]
fn a_narrow_loopback_is_as_good() {
    for net in ["127.0.0.1/8", "127.0.0.1/16", "127.0.0.1/32", "127.0.0.1/9"] {
        for at in [WILDCARD, LOCALHOST] {
            let fixture = RedirectsFixture::new("narrow", at);
            fixture.command(&format!(
                "ip addr flush dev lo scope host && ip addr add {net} dev lo && ip -6 addr add ::1/128 dev lo"
            ));
            fixture.agent.attach(&fixture.pod, &INIT_FLAGS).expect("attached");
            for to in SERVICES {
                assert_eq!(fixture.original(to), Ok(to.parse().expect("an address")), "{net}, {at:?}");
            }
            let dns = ["-u", "1337", "-i", "*", "-b", "*", "--redirect-dns", "--capture-all-dns"];
            fixture.agent.attach(&fixture.pod, &dns).expect("attached");
            for to in ["10.96.0.10:53", "[fd96::10]:53"] {
                assert_eq!(fixture.original(to), Ok(to.parse().expect("an address")), "{net}, {at:?}");
            }
            fixture.agent.detach(&fixture.pod).expect("detached");
        }
    }
}

/// The loopback interface loses its IPv6 routes when it goes down, and the agent's routes do not return by themselves.
#[test]
fn a_loopback_that_was_down_is_as_good() {
    let fixture = RedirectsFixture::new("down", WILDCARD);
    fixture.command("ip link set lo down");
    let (_running, _) = fixture.agent.run(&fixture.pod, &INIT_FLAGS).expect("in force");
    fixture.command("ip link set lo up && ip link set lo down && ip link set lo up");
    let deadline = Instant::now() + Duration::from_secs(10);
    for to in SERVICES {
        while fixture.original(to) != Ok(to.parse().expect("an address")) {
            assert!(Instant::now() < deadline, "{to}: {:?}", fixture.original(to));
        }
    }
}

/// Nobody follows the namespace: what dials a stand-in address that is not local any more does not leave by the default
/// route, and the next attach repairs it.
#[test]
fn nothing_leaves_by_a_stand_in_address_that_is_not_local() {
    for net in ["127.0.0.1/8", "127.0.0.1/32"] {
        let fixture = RedirectsFixture::new("stand-in", WILDCARD);
        fixture.command(&format!(
            "ip addr flush dev lo scope host && ip addr add {net} dev lo && ip -6 addr add ::1/128 dev lo"
        ));
        // The world takes what leaves.
        let world = Actor::start(fixture.pod.neighbour()).expect("an actor");
        for at in WILDCARD {
            let bind = Bind::new(Ids::ROOT, SocketAddr::new(at.parse().expect("an address"), 15001));
            let listen = Listen { name: "world".into(), transport: Transport::Tcp, bind };
            world.listen(listen).expect("a listener");
        }
        fixture.pod.neighbour().netns.sysctl("net/ipv4/conf/all/route_localnet", "1").expect("set");
        fixture.agent.attach(&fixture.pod, &INIT_FLAGS).expect("attached");
        fixture.command(
            "ip link set lo down && ip link set lo up && ip -6 route replace default via fd66::1 dev eth0",
        );
        let leaves = |to: &str, from: Option<IpAddr>| {
            let dial = Dial { from, ..Dial::new(Ids::APP, to.parse().expect("an address")) };
            let outcome = fixture.inside.dial(dial).expect("dialled").outcome;
            matches!(&outcome, DialOutcome::Answered(answer) if answer.server == "world")
                || matches!(outcome, DialOutcome::TimedOut(_))
        };
        for to in SERVICES {
            assert!(!leaves(to, None), "{to}, {net}");
            assert!(!leaves(to, Some(fixture.pod.address(family_of(to)))), "{to}, {net}, bound");
        }
        fixture.agent.attach(&fixture.pod, &INIT_FLAGS).expect("attached");
        for to in SERVICES {
            assert_eq!(fixture.original(to), Ok(to.parse().expect("an address")), "{net}");
        }
        fixture.agent.detach(&fixture.pod).expect("detached");
    }
}

/// A program above the pod that sets the callbacks of sockets without keeping others'.
#[test]
fn entries_go_with_their_connections_whatever_other_programs_do() {
    let fixture = RedirectsFixture::new("overruled", WILDCARD);
    let above = fixture.pod.cgroup.path().parent().expect("a parent").to_owned();
    let program = bpf::load_overruling().expect("loaded");
    let folder = std::fs::File::open(&above).expect("opened");
    let attach_type = aya_obj::generated::bpf_attach_type::BPF_CGROUP_SOCK_OPS;
    let link = intercept_agent::facade::sys::link_create(program.as_fd(), folder.as_fd(), attach_type)
        .expect("attached");
    fixture.agent.attach(&fixture.pod, &INIT_FLAGS).expect("attached");
    for _ in 0..100 {
        for to in SERVICES {
            assert_eq!(fixture.original(to), Ok(to.parse().expect("an address")));
        }
    }
    forgotten(&fixture);
    // Also refused connections.
    fixture.agent.attach(&fixture.pod, &["-p", "15009", "-u", "1337", "-i", "*"]).expect("attached");
    for _ in 0..100 {
        for to in SERVICES {
            assert!(fixture.original(to).is_err());
        }
    }
    forgotten(&fixture);
    drop(link);
    fixture.agent.detach(&fixture.pod).expect("detached");
}

/// Whichever end closes first, no socket stays in a state that only a timeout ends, on any port of the proxy.
#[test]
fn nothing_lingers_whoever_closes_first() {
    for at in [WILDCARD, LOCALHOST] {
        let fixture = RedirectsFixture::new("lingers", at);
        let flags = ["-u", "1337", "-i", "*", "-b", "*", "--redirect-dns", "--capture-all-dns"];
        fixture.agent.attach(&fixture.pod, &flags).expect("attached");
        for (ids, to) in [
            (Ids::APP, "[fd96::10]:80"),
            (Ids::APP, "10.96.0.10:80"),
            (Ids::APP, "[fd96::10]:53"),
            (Ids::PROXY, "[fd66::2]:8080"),
            (Ids::PROXY, "10.66.0.2:8080"),
        ] {
            for from in [None, Some(fixture.pod.address(family_of(to)))] {
                let to: SocketAddr = to.parse().expect("an address");
                closed_by_client(&fixture.pod, ids, to, from);
            }
        }
        let deadline = Instant::now() + Duration::from_secs(8);
        loop {
            let left = last_acks(&fixture.pod);
            if left.is_empty() {
                break;
            }
            assert!(Instant::now() < deadline, "{at:?}: {left}");
            std::thread::sleep(Duration::from_millis(50));
        }
        fixture.agent.detach(&fixture.pod).expect("detached");
    }
}

fn closed_by_client(pod: &Pod, ids: Ids, to: SocketAddr, from: Option<IpAddr>) {
    use tests::steps::{SocketKind, Step, run};
    let mut steps = vec![Step::Open(if to.is_ipv6() { SocketKind::Tcp6 } else { SocketKind::Tcp4 })];
    steps.extend(from.map(|from| Step::Bind(SocketAddr::new(from, 0))));
    steps.extend([Step::Connect(to), Step::Shutdown, Step::Read, Step::Close]);
    let outcomes = run(pod, ids, &steps).expect("run");
    assert!(outcomes.iter().all(|outcome| !outcome.starts_with('E')), "{to} from {from:?}: {outcomes:?}");
}

fn last_acks(pod: &Pod) -> String {
    let mut ss = Command::new("ss");
    ss.args(["-Htn", "state", "last-ack", "state", "closing"]);
    let output = pod.netns.run(|| ss.output()).expect("entered").expect("ss");
    String::from_utf8(output.stdout).expect("text")
}

fn family_of(to: &str) -> Family {
    let to: SocketAddr = to.parse().expect("an address");
    Family::of(&to.ip())
}
