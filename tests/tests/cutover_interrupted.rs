//! `cutover` is killed at every step: one of the two captures the pod, and the next command finishes it. DNS goes on to be
//! captured through it all.

use std::{
    io::Write as _,
    net::SocketAddr,
    process::{Command, Output},
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use tests::{
    actor::{Actor, Bind, Listen, Queried, Query, QueryReply, Sending, Transport},
    agent::{finish, succeed},
    cutover::{LoadProxy, RulesFixture},
    iptables::{Backend, IptablesDns, IptablesOptions, Tproxy},
    steps::{self, SocketKind, Step},
    testbed::Ids,
};

fn at(text: &str) -> SocketAddr {
    text.parse().expect("an address")
}

/// Runs `cutover` under strace, which kills it in this call of each thread.
fn killed(fixture: &mut RulesFixture, (call, number): (&str, usize), flags: &[&str]) -> Output {
    let inject = format!("--inject={call}:signal=KILL:when={number}");
    let strace = ["strace", "--follow-forks", "--quiet=all", "--output", "/dev/null"];
    let trace = format!("--trace={call}");
    fixture.agent.start_by(strace.into_iter().chain([trace.as_str(), &inject]).map(str::to_owned).collect());
    let output = fixture.cutover(flags);
    fixture.agent.start_by(Vec::new());
    output
}

/// The calls in which the command is killed: threads of its own, of which each enters the namespace, what saves the rules, what
/// changes maps and pins, and the wait while both captures are active.
const POINTS: [(&str, usize, usize); 4] =
    [("clone3", 1, 3), ("rename", 1, 1), ("bpf", 3, 23), ("clock_nanosleep", 1, 5)];

#[track_caller]
fn assert_captured_once(fixture: &RulesFixture) {
    drop(fixture.relayed(0));
    let round = fixture.round(2).expect("no connection is lost");
    round.assert_each_captured_once(fixture.relayed(round.count()));
}

/// Kills a command at each of its steps, and finishes it by `finish`; `reset` makes the state in which it begins.
fn kill_everywhere(fixture: &mut RulesFixture, flags: &[&str], finish: &[&str], reset: &[&str]) {
    let (mut kills, begin, clean) = (0, fixture.rules(), fixture.rules());
    for (call, first, step) in POINTS {
        let mut number = first;
        while !killed(fixture, (call, number), flags).status.success() {
            kills += 1;
            let when = format!("cutover {flags:?} killed in {call} {number}");
            println!("{when}");
            assert_captured_once(fixture);
            fixture.cut(finish);
            assert_captured_once(fixture);
            if finish != reset {
                fixture.cut(reset);
            }
            assert_eq!(fixture.rules(), begin, "{when}");
            number += step;
        }
        assert!(number > first, "cutover {flags:?} makes no call of {call}");
        fixture.cut(reset);
        assert_eq!(fixture.rules(), clean);
    }
    assert!(kills > 10, "killed {kills} times only");
}

fn shadowed(label: &str, backend: Backend) -> RulesFixture {
    let fixture = RulesFixture::new(label, backend, &IptablesOptions::injected(), LoadProxy::Relays);
    fixture.shadow(&[]);
    assert_captured_once(&fixture);
    fixture
}

#[test]
fn killed_on_the_way_there_and_finished() {
    let mut fixture = shadowed("kill-there", Backend::Nft);
    kill_everywhere(&mut fixture, &["--force"], &["--force"], &["--back"]);
}

#[test]
fn killed_on_the_way_there_and_gone_back() {
    let mut fixture = shadowed("kill-undone", Backend::Legacy);
    kill_everywhere(&mut fixture, &["--force"], &["--back"], &["--back"]);
}

#[test]
fn killed_on_the_way_back_and_finished() {
    let mut fixture = shadowed("kill-back", Backend::Nft);
    fixture.cut(&[]);
    kill_everywhere(&mut fixture, &["--back"], &["--back"], &["--force"]);
}

/// The answer of a query, by which server and from which address.
fn answered(queried: &Queried) -> Option<(&str, SocketAddr)> {
    match &queried.replies[..] {
        [QueryReply::Answered { from, answer }] => Some((&answer.server, *from)),
        _ => None,
    }
}

fn query(to: &str, sending: Sending) -> Query {
    Query { sending, timeout: Duration::from_secs(5), ..Query::new(Ids::APP, at(to)) }
}

const SERVERS: [&str; 3] = ["10.96.0.10:53", "10.96.0.11:53", "[fd96::10]:53"];

/// A pod whose proxy also answers DNS, in a process of its own.
fn with_dns(label: &str) -> (RulesFixture, Actor, tempfile::NamedTempFile) {
    let servers = SERVERS.map(|server| at(server).ip()).to_vec();
    let dns = Some(IptablesDns { all: false, servers });
    let options = IptablesOptions { dns, ..IptablesOptions::injected() };
    let fixture = RulesFixture::new(label, Backend::Nft, &options, LoadProxy::Relays);
    let proxy = Actor::start(&fixture.pod).expect("an actor");
    for any in ["0.0.0.0", "[::]"] {
        let server = |name: &str, port: u16, ids| Listen {
            name: name.into(),
            transport: Transport::Udp,
            bind: Bind::new(ids, at(&format!("{any}:{port}"))),
        };
        proxy.listen(server("dns", 15053, Ids::PROXY)).expect("a server");
        fixture.world.listen(server("world", 53, Ids::ROOT)).expect("a server");
    }
    let mut resolv_conf = tempfile::NamedTempFile::new().expect("a file");
    resolv_conf.write_all(options.resolv_conf().as_bytes()).expect("written");
    let path = resolv_conf.path().display().to_string();
    fixture.shadow(&["--redirect-dns", "--resolv-conf", &path]);
    (fixture, proxy, resolv_conf)
}

#[test]
fn every_query_is_answered_by_the_proxy() {
    let (fixture, _proxy, _file) = with_dns("cut-dns");
    let before = fixture.rules();
    let stop = AtomicBool::new(false);
    let asking = || {
        let mut asked = 0;
        while !stop.load(Ordering::Relaxed) {
            let each = SERVERS
                .into_iter()
                .flat_map(|to| [Sending::To, Sending::Connected].map(|way| query(to, way)));
            let queries: Vec<Query> = std::iter::repeat_n(each.collect::<Vec<_>>(), 5).flatten().collect();
            let replies = fixture.inside.query_all(queries.clone()).expect("asked");
            for (query, queried) in queries.iter().zip(&replies) {
                assert_eq!(answered(queried), Some(("dns", query.to[0])), "{query:?}: {queried:?}");
            }
            asked += queries.len();
        }
        asked
    };
    let asked = std::thread::scope(|scope| {
        let load = scope.spawn(asking);
        let mut cut = || {
            for _ in 0..5 {
                fixture.cut(&["--force"]);
                fixture.cut(&["--back"]);
                assert_eq!(fixture.rules(), before);
            }
        };
        let cut = std::panic::catch_unwind(std::panic::AssertUnwindSafe(&mut cut));
        stop.store(true, Ordering::Relaxed);
        cut.expect("there and back");
        load.join().expect("every query is answered")
    });
    println!("{asked} queries");
    assert!(asked > 1000, "{asked} queries only");
}

/// Stops a process, and lets it go on when dropped.
struct Stopped(String);

impl Stopped {
    fn of(actor: &Actor) -> Self {
        let pid = actor.pid().to_string();
        assert!(Command::new("kill").args(["-STOP", &pid]).status().expect("kill").success());
        Self(pid)
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        drop(Command::new("kill").args(["-CONT", &self.0]).status());
    }
}

/// Queries that are asked under one capture and answered under the other.
#[test]
fn queries_in_flight_are_answered() {
    let (fixture, proxy, _file) = with_dns("cut-flight");
    for flags in [&["--force"][..], &["--back"]] {
        let stopped = Stopped::of(&proxy);
        let queries: Vec<Query> = SERVERS
            .into_iter()
            .flat_map(|to| [Sending::To, Sending::Connected].map(|sending| query(to, sending)))
            .map(|query| Query { timeout: Duration::from_secs(20), ..query })
            .collect();
        std::thread::scope(|scope| {
            let asked = scope.spawn(|| fixture.inside.query_all(queries.clone()).expect("asked"));
            std::thread::sleep(Duration::from_millis(500));
            fixture.cut(flags);
            drop(stopped);
            for (query, queried) in queries.iter().zip(&asked.join().expect("asked")) {
                assert_eq!(answered(queried), Some(("dns", query.to[0])), "{flags:?} {query:?}: {queried:?}");
            }
        });
    }
}

/// The port of a query that conntrack still knows is used again.
#[test]
fn a_port_that_was_used_for_a_query_is_used_again() {
    let (fixture, _proxy, _file) = with_dns("cut-port");
    let ask = |kind, from: &str, to: &str| {
        let steps = [Step::Open(kind), Step::Bind(at(from)), Step::Connect(at(to)), Step::Ask];
        steps::run(&fixture.pod, Ids::APP, &steps).expect("asked").pop().expect("an outcome")
    };
    let ask_all = |when: &str| {
        for (kind, from, to) in [
            (SocketKind::Udp4, "10.66.0.2:29001", SERVERS[0]),
            (SocketKind::Udp4, "10.66.0.2:29001", SERVERS[1]),
            (SocketKind::Udp6, "[fd66::2]:29001", SERVERS[2]),
        ] {
            assert_eq!(ask(kind, from, to), format!("dns by {to}"), "{when}");
        }
    };
    for _ in 0..2 {
        ask_all("under iptables");
        fixture.cut(&["--force"]);
        ask_all("under the agent");
        fixture.cut(&["--back"]);
    }
    ask_all("under iptables again");
}

/// The peers of the pod's UDP sockets, as the kernel has them.
fn datagram_peers(fixture: &RulesFixture) -> String {
    let mut ss = fixture.pod.command("ss").expect("a command");
    succeed({
        ss.args(["-Hun", "state", "connected"]);
        ss
    })
    .expect("sockets")
}

/// A socket that was connected before the cut-over asks on by the translation that conntrack has for it, and is captured by the
/// agent when it is connected again. Another one, connected under the agent, asks on after the way back. Each query is answered
/// once, by the proxy.
#[test]
fn sockets_that_were_connected_before_go_on() {
    let (fixture, _proxy, _file) = with_dns("cut-connected");
    let has_peer = |peer: &str| datagram_peers(&fixture).contains(peer);
    for (kind, server, next, proxy) in [
        (SocketKind::Udp4, SERVERS[0], SERVERS[1], "127.0.0.1:15053"),
        (SocketKind::Udp6, SERVERS[2], SERVERS[2], "[::1]:15053"),
    ] {
        let under_iptables = [Step::Open(kind), Step::Connect(at(server)), Step::Ask, Step::Pause];
        let cut_over = [Step::Ask, Step::Ask, Step::Receive, Step::Pause];
        let again = [Step::Connect(at(next)), Step::Ask, Step::Peer, Step::Receive];
        let under_the_agent = [Step::Open(kind), Step::Connect(at(server)), Step::Ask, Step::Pause];
        let cut_back = [Step::Ask, Step::Peer, Step::Receive];
        let steps = [&under_iptables[..], &cut_over, &again, &under_the_agent, &cut_back].concat();
        let mut running = steps::start(&fixture.pod, Ids::APP, "", &steps).expect("started");
        running.await_pause().expect("asked");
        fixture.cut(&["--force"]);
        running.resume().expect("it runs");
        running.await_pause().expect("asked");
        assert!(has_peer(server) && !has_peer(proxy), "{}", datagram_peers(&fixture));
        running.resume().expect("it runs");
        running.await_pause().expect("asked");
        assert!(!has_peer(server) && has_peer(proxy), "{}", datagram_peers(&fixture));
        fixture.cut(&["--back"]);
        let outcomes = running.finish().expect("asked");
        let (first, second) = (format!("dns by {server}"), format!("dns by {next}"));
        let expected = [
            &["ok", "ok", &first, "ok"][..],
            &[&first, &first, "EAGAIN", "ok"],
            &["ok", &second, next, "EAGAIN"],
            &["ok", "ok", &first, "ok"],
            &[&first, server, "EAGAIN"],
        ];
        assert_eq!(outcomes, expected.concat());
    }
}

#[track_caller]
fn assert_refused(output: &Output, why: &str) {
    let (said, result) = (String::from_utf8_lossy(&output.stderr), String::from_utf8_lossy(&output.stdout));
    assert!(!output.status.success() && said.contains(why), "{said}{result}");
}

#[test]
fn what_cannot_be_had_is_named() {
    let tproxy = Some(Tproxy { mark: 1337, table: 133 });
    let options = IptablesOptions { tproxy, ..IptablesOptions::injected() };
    let mut fixture = RulesFixture::new("cut-tproxy", Backend::Nft, &options, LoadProxy::Relays);
    fixture.shadow(&["-m", "TPROXY"]);
    assert_refused(&fixture.cutover(&["--force"]), "is captured by TPROXY");
    // The options of the agent do not matter, if the rules have TPROXY.
    fixture.shadow(&[]);
    assert_refused(&fixture.cutover(&["--force"]), "is captured by TPROXY");
    let hidden = "mount -t tmpfs none /usr/sbin && exec \"$@\"";
    fixture.agent.start_by(["unshare", "-m", "sh", "-c", hidden, "--"].map(str::to_owned).to_vec());
    assert_refused(&fixture.cutover(&["--force"]), "iptables-save is not found");
    fixture.agent.start_by(Vec::new());
    let bare = RulesFixture::new("cut-bare", Backend::Nft, &IptablesOptions::default(), LoadProxy::Relays);
    for program in ["iptables-nft", "ip6tables-nft"] {
        let mut flush = bare.pod.command(program).expect("a command");
        assert!(flush.args(["-t", "nat", "-F"]).status().expect("iptables").success());
    }
    bare.shadow(&[]);
    assert_refused(&bare.cutover(&["--force"]), "leads to a port of the proxy");
    let output = finish(&mut bare.agent.for_pod("detach", &bare.pod, &[])).expect("started");
    assert!(output.status.success());
}
