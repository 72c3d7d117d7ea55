//! What shadow mode remembers of a connection until it can be compared: it is found in unusual cases as well, what is lost is
//! counted and never compared wrongly, and nothing stays.

use std::{
    fs::File,
    net::{IpAddr, SocketAddr},
    os::fd::AsFd as _,
    thread,
    time::{Duration, Instant},
};

use aya::maps::{Array, HashMap, Map};
use aya_obj::generated::bpf_attach_type;
use intercept_agent::facade::sys::{self, Plain};
use intercept_common::{
    NetnsCookie,
    layout::{
        ComparedFlow, DifferenceKey, PodPolicy, RememberedFlow, SHADOW_CONNS, ShadowConn, ShadowCounters,
        ShadowKey, ShadowSet, ShadowSocket, policy, stage,
    },
    names,
};
use rustix::process::{Pid, Signal, kill_process};
use tests::{
    actor::{Actor, Bind, Dial, DialOutcome, Listen, Query, QueryReply, Transport},
    agent::{Agent, INIT_FLAGS, succeed},
    bpf,
    deadline::scaled,
    iptables::{Backend, IptablesDns, IptablesOptions, apply},
    status::ShadowEntry,
    steps::{self, SocketKind, Step},
    testbed::{Ids, Pod, PodSpec, Sandbox},
};

/// A pod with the rules of iptables, a proxy, and the agent in shadow mode. Its world has a server.
struct RememberedFixture {
    agent: Agent,
    inside: Actor,
    _world: Actor,
    pod: Pod,
}

const DNS: [&str; 2] = ["--redirect-dns", "--capture-all-dns"];

fn at(text: &str) -> SocketAddr {
    text.parse().expect("an address")
}

impl RememberedFixture {
    fn new(label: &str) -> Self {
        let agent = Agent::new(label).expect("the agent");
        let pod = Pod::new(PodSpec::new(label)).expect("a pod");
        let options = IptablesOptions {
            dns: Some(IptablesDns { all: true, servers: Vec::new() }),
            ..IptablesOptions::injected()
        };
        apply(&options, &pod, Backend::Nft).expect("rules");
        // Before they listen: both ends send data with the SYN, and need no cookie for it.
        for sandbox in [&*pod, pod.neighbour()] as [&Sandbox; 2] {
            sandbox.netns.sysctl("net/ipv4/tcp_fastopen", "1543").expect("a setting");
        }
        let (inside, world) =
            (Actor::start(&pod).expect("an actor"), Actor::start(pod.neighbour()).expect("an actor"));
        let listen = |actor: &Actor, name: &str, transport, ids, port| {
            let bind = Bind::new(ids, SocketAddr::new(IpAddr::from([0, 0, 0, 0]), port));
            actor.listen(Listen { name: name.into(), transport, bind }).expect("a server");
        };
        listen(&inside, "outbound", Transport::Tcp, Ids::PROXY, 15001);
        listen(&inside, "inbound", Transport::Tcp, Ids::PROXY, 15006);
        listen(&inside, "dns", Transport::Udp, Ids::PROXY, 15053);
        listen(&world, "world", Transport::Tcp, Ids::ROOT, 80);
        agent.attach(&pod, &[&INIT_FLAGS[..], &DNS, &["--shadow"]].concat()).expect("attached");
        Self { agent, inside, _world: world, pod }
    }

    fn shadow(&self) -> ShadowEntry {
        let mut status = self.agent.command("status");
        status.args(["--shadow", "--json", "--cgroup-path"]).arg(self.pod.cgroup.path());
        let mut pods: Vec<ShadowEntry> =
            serde_json::from_str(&succeed(status).expect("a status")).expect("JSON");
        pods.pop().expect("a pod in shadow mode")
    }

    /// Waits until so many flows were compared or counted as not compared.
    #[track_caller]
    fn assert_counted(&self, compared: u64, uncompared: u64) {
        let deadline = Instant::now() + Duration::from_secs(5);
        let shadow = loop {
            let shadow = self.shadow();
            if shadow.compared + shadow.uncompared >= compared + uncompared || Instant::now() > deadline {
                break shadow;
            }
            thread::sleep(Duration::from_millis(20));
        };
        let counted = (shadow.compared, shadow.uncompared, shadow.differed);
        assert_eq!(counted, (compared, uncompared, 0), "{shadow:?}");
    }

    fn iptables(&self, rule: &str) {
        let mut iptables = self.pod.command("iptables-nft").expect("a command");
        assert!(iptables.args(rule.split(' ')).status().expect("iptables").success(), "{rule}");
    }

    fn steps(&self, sandbox: &Sandbox, ids: Ids, steps: &[Step], expected: &[&str]) {
        assert_eq!(steps::run(sandbox, ids, steps).expect("run"), expected);
    }

    /// The connections that are remembered, in any pod.
    fn remembered(&self) -> Vec<ShadowConn> {
        let sets = self.agent.entries::<u32, ShadowSet>(names::SHADOW_CONNS).expect("read");
        sets.iter().flat_map(|(_, set)| set.conns).filter(|conn| conn.id != 0).collect()
    }
}

/// Adds or removes the flag of shadow mode in the pod's policy.
fn set_shadow(fixture: &RememberedFixture, is_shadow: bool) {
    let mut policies: HashMap<_, Plain<NetnsCookie>, Plain<PodPolicy>> =
        Map::HashMap(fixture.agent.map(names::POLICIES).expect("a map")).try_into().expect("a hash");
    let (cookie, mut policy) = policies.iter().next().expect("a policy").expect("read");
    policy.0.flags =
        if is_shadow { policy.0.flags | policy::SHADOW } else { policy.0.flags & !policy::SHADOW };
    policies.insert(cookie, policy, 0).expect("written");
}

/// An attach makes the policy enforce before it removes what shadow mode remembers. Between the two it is not noted where a SYN has
/// arrived, so a connection that seems to differ is counted as not compared, once, and compared by nothing later.
#[test]
fn a_connection_that_outlives_shadow_mode_is_not_compared() {
    let fixture = RememberedFixture::new("remembered-late");
    // The proxy is told another destination, which would be a difference.
    let balancing = bpf::load_balancing([198, 51, 100, 7].into()).expect("loaded");
    let cgroup = File::open(fixture.pod.cgroup.path()).expect("a cgroup");
    let hook = bpf_attach_type::BPF_CGROUP_INET4_CONNECT;
    let _link = sys::link_create(balancing.as_fd(), cgroup.as_fd(), hook).expect("attached");
    let signal = |signal| {
        let proxy = Pid::from_raw(fixture.inside.pid().cast_signed()).expect("a process");
        kill_process(proxy, signal).expect("signalled");
    };
    let counters = || {
        let all = fixture.agent.entries::<u64, ShadowCounters>(names::SHADOW_COUNTERS).expect("read");
        let [(_, counters)] = all[..] else { panic!("one pod: {}", all.len()) };
        (counters.agreed.iter().sum::<u64>(), counters.differed.iter().sum::<u64>(), counters.uncompared)
    };
    let until = |what: &str, is_so: &dyn Fn() -> bool| {
        let deadline = Instant::now() + scaled(Duration::from_secs(30));
        while !is_so() {
            assert!(Instant::now() < deadline, "{what}: {:?} {:?}", fixture.remembered(), counters());
            thread::sleep(Duration::from_millis(10));
        }
    };
    fixture.iptables("-I INPUT -p tcp --dport 15001 --syn -j DROP");
    let connect = [Step::Open(SocketKind::Tcp4), Step::Connect(at("10.96.0.10:80")), Step::Read];
    let connecting = steps::start(&fixture.pod, Ids::APP, "", &connect).expect("started");
    until("its SYN has left", &|| fixture.remembered().len() == 1);
    signal(Signal::STOP);
    set_shadow(&fixture, false);
    fixture.iptables("-D INPUT -p tcp --dport 15001 --syn -j DROP");
    until("it is established", &|| counters() == (0, 0, 1));
    let [conn] = fixture.remembered()[..] else { panic!("in its place alone: {:?}", fixture.remembered()) };
    assert_eq!(conn.stage & stage::UNCOMPARED, stage::UNCOMPARED, "{conn:?}");
    // Back in shadow mode when the proxy asks.
    set_shadow(&fixture, true);
    signal(Signal::CONT);
    let told = "outbound for 198.51.100.7:80 from 10.66.0.2:*";
    assert_eq!(connecting.finish().expect("run"), ["ok", "ok", told]);
    assert_eq!(counters(), (0, 0, 1));
}

/// Many connections at once take the places of others that wait for the answer to their SYN.
#[test]
fn what_had_to_make_room_is_counted_and_goes_on() {
    const COUNT: u16 = 5;
    let fixture = RememberedFixture::new("remembered-full");
    let dial = || {
        let dials = (0..COUNT)
            .map(|_| Dial { timeout: Duration::from_secs(10), ..Dial::new(Ids::APP, at("10.96.0.10:80")) });
        for dialled in fixture.inside.dial_all(dials.collect()).expect("dialled") {
            let DialOutcome::Answered(answer) = dialled.outcome else { panic!("{dialled:?}") };
            assert_eq!(answer.server, "outbound");
        }
    };
    fixture.iptables("-I INPUT -p tcp --dport 15001 --syn -j DROP");
    thread::scope(|scope| {
        let dialling = scope.spawn(dial);
        while fixture.remembered().len() < usize::from(COUNT) {
            assert!(!dialling.is_finished());
            thread::sleep(Duration::from_millis(10));
        }
        let mut map: Array<_, Plain<ShadowSet>> =
            Map::Array(fixture.agent.map(names::SHADOW_CONNS).expect("a map")).try_into().expect("an array");
        let other = ShadowConn { id: 1 << 63 | 1, stage: 0x1ff, ..bytemuck::Zeroable::zeroed() };
        for index in 0..SHADOW_CONNS {
            map.set(index, Plain(ShadowSet { conns: [other; 2] }), 0).expect("written");
        }
        fixture.iptables("-D INPUT -p tcp --dport 15001 --syn -j DROP");
        dialling.join().expect("every connection goes on");
    });
    fixture.assert_counted(0, COUNT.into());
    dial();
    fixture.assert_counted(COUNT.into(), COUNT.into());
}

/// The first of two sockets is connected, and sends its SYN with the first byte. The decision on the second one takes the
/// place of its.
#[test]
fn of_two_sockets_that_meet_one_is_compared() {
    let fixture = RememberedFixture::new("remembered-meet");
    // TCP_FASTOPEN_CONNECT.
    let deferred = Step::Option { level: 6, name: 30, value: 1i32.to_ne_bytes().to_vec() };
    let connect = |to| Step::Connect(at(to));
    let (one, other) = ("10.96.0.10:80", "10.96.0.11:81");
    let alone = [Step::Open(SocketKind::Tcp4), deferred.clone(), connect(one), Step::Send, Step::Read];
    let first = "outbound for 10.96.0.10:80 from 10.66.0.2:*";
    fixture.steps(&fixture.pod, Ids::APP, &alone, &["ok", "ok", "ok", "ok", first]);
    fixture.assert_counted(1, 0);
    let steps = [
        Step::Open(SocketKind::Tcp4),
        deferred,
        connect(one),
        Step::OpenMeeting(0),
        connect(other),
        Step::Read,
        Step::Use(0),
        Step::Send,
        Step::Read,
    ];
    let second = "outbound for 10.96.0.11:81 from 10.66.0.2:*";
    let expected = ["ok", "ok", "ok", "ok", "ok", second, "ok", "ok", first];
    fixture.steps(&fixture.pod, Ids::APP, &steps, &expected);
    fixture.assert_counted(2, 1);
}

/// Both directions: the data is in the SYN and accepted, as the kernel's counters say.
#[test]
fn connections_with_data_in_the_syn_are_compared() {
    let fixture = RememberedFixture::new("remembered-tfo");
    let world: &Sandbox = fixture.pod.neighbour();
    let steps = |to| [Step::Open(SocketKind::Tcp4), Step::FastOpen(at(to)), Step::Read];
    for n in 1..=3 {
        let outbound = ["ok", "ok", "outbound for 10.96.0.10:80 from 10.66.0.2:*"];
        fixture.steps(&fixture.pod, Ids::APP, &steps("10.96.0.10:80"), &outbound);
        let inbound = ["ok", "ok", "inbound for 10.66.0.2:8080 from 10.66.0.1:*"];
        fixture.steps(world, Ids::ROOT, &steps("10.66.0.2:8080"), &inbound);
        let not_captured = ["ok", "ok", "world from 10.66.0.2:*"];
        fixture.steps(&fixture.pod, Ids::PROXY, &steps("198.51.100.7:80"), &not_captured);
        fixture.assert_counted(3 * n, 0);
    }
    let counters = |sandbox: &Sandbox| {
        let mut cat = sandbox.command("cat").expect("a command");
        cat.arg("/proc/net/netstat");
        let text = succeed(cat).expect("counters");
        let mut lines = text.lines().filter(|line| line.starts_with("TcpExt:"));
        let (head, values) = (lines.next().expect("names"), lines.next().expect("values"));
        let of = |name: &str| {
            let found = head.split(' ').zip(values.split(' ')).find(|(head, _)| *head == name);
            found.and_then(|(_, value)| value.parse::<u64>().ok()).expect("a counter")
        };
        (of("TCPFastOpenActive"), of("TCPFastOpenPassive"))
    };
    assert_eq!((counters(&fixture.pod), counters(world)), ((6, 6), (3, 3)));
}

/// Another program in `connect()` takes an address of a service's endpoint in place of the service's. The proxy is told the
/// endpoint then, by iptables, and would be told the service.
#[test]
fn another_original_destination_is_a_difference() {
    let fixture = RememberedFixture::new("remembered-other");
    let balancing = bpf::load_balancing([198, 51, 100, 7].into()).expect("loaded");
    let cgroup = File::open(fixture.pod.cgroup.path()).expect("a cgroup");
    let hook = bpf_attach_type::BPF_CGROUP_INET4_CONNECT;
    let _link = sys::link_create(balancing.as_fd(), cgroup.as_fd(), hook).expect("attached");
    let connect = |to| [Step::Open(SocketKind::Tcp4), Step::Connect(at(to)), Step::Read];
    let told = "outbound for 198.51.100.7:80 from 10.66.0.2:*";
    fixture.steps(&fixture.pod, Ids::APP, &connect("198.51.100.7:80"), &["ok", "ok", told]);
    fixture.assert_counted(1, 0);
    fixture.steps(&fixture.pod, Ids::APP, &connect("10.96.0.10:80"), &["ok", "ok", told]);
    let shadow = fixture.shadow();
    let [found] = &shadow.differences[..] else { panic!("one difference: {shadow:?}") };
    // The redirect agrees, and the destination does not.
    assert_eq!((shadow.compared, shadow.differed, shadow.uncompared), (3, 1, 0), "{shadow:?}");
    assert_eq!((found.reason.as_str(), found.count), ("included_cidr", 1));
    assert_eq!(
        (found.expected.as_str(), found.actual.as_str()),
        ("redirected to outbound", "another original destination")
    );
    let first = &found.first;
    assert_eq!((first.destination, first.original_dst), (at("10.96.0.10:80"), Some(at("198.51.100.7:80"))));
    assert_eq!((first.source.ip(), first.uid, first.gid), (at("10.66.0.2:0").ip(), Some(1000), Some(1000)));
}

#[test]
fn nothing_stays_after_the_last_pod_has_left_shadow_mode() {
    let fixture = RememberedFixture::new("remembered-left");
    let flags = [&INIT_FLAGS[..], &DNS].concat();
    // The maps go with the last pod.
    let other = Pod::new(PodSpec::new("remembered-other")).expect("a pod");
    fixture.agent.attach(&other, &INIT_FLAGS).expect("attached");
    // Refused, so that its place is given to no other.
    let refused = [Step::Open(SocketKind::Tcp4), Step::Connect(at("127.0.0.1:9"))];
    for leave in [false, true] {
        let pod = &fixture.pod;
        for _ in 0..20 {
            let dialled = fixture.inside.dial(Dial::new(Ids::APP, at("10.96.0.10:80"))).expect("dialled");
            assert!(matches!(dialled.outcome, DialOutcome::Answered(_)), "{dialled:?}");
        }
        fixture.steps(pod, Ids::APP, &refused, &["ok", "ECONNREFUSED"]);
        let queried = fixture.inside.query(Query::new(Ids::APP, at("10.96.0.10:53"))).expect("asked");
        assert!(matches!(queried.replies[..], [QueryReply::Answered { .. }]), "{queried:?}");
        fixture.assert_counted(21, 0);
        assert!(fixture.remembered().len() >= 21, "{:?}", fixture.remembered());
        if leave {
            fixture.agent.detach(pod).expect("detached");
        } else {
            fixture.agent.attach(pod, &flags).expect("enforced");
        }
        let agent = &fixture.agent;
        let dials = agent.entries::<u32, ShadowSocket>(names::SHADOW_DIALS).expect("read");
        let dials = dials.iter().filter(|(_, dial)| *dial != bytemuck::Zeroable::zeroed()).count();
        let flows = agent.entries::<ShadowKey, RememberedFlow>(names::SHADOW_FLOWS).expect("read").len();
        let counters = agent.entries::<u64, ShadowCounters>(names::SHADOW_COUNTERS).expect("read").len();
        let kinds = agent.entries::<DifferenceKey, ComparedFlow>(names::SHADOW_KINDS).expect("read").len();
        assert_eq!((fixture.remembered().len(), dials, flows, counters, kinds), (0, 0, 0, 0, 0));
        if !leave {
            fixture.agent.attach(pod, &[&flags[..], &["--shadow"]].concat()).expect("in shadow mode");
        }
    }
}
