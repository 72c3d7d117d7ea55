//! The real Envoy as the sidecar of a captured pod: requests both ways, and what its access log says of them.

use std::{
    collections::BTreeMap,
    io::{BufRead as _, BufReader},
    net::SocketAddr,
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    time::{Duration, Instant},
};

use tests::{
    actor::binary::{self, ReadableCopy},
    agent::{Agent, INIT_FLAGS, succeed},
    envoy::{self, Sidecar, Speaks},
    testbed::{Ids, Pod, PodSpec, Sandbox},
};

/// Requests of each kind and family; over fresh and kept connections of both families that is 1,000 a direction.
const REQUESTS: usize = 250;

struct HttpServer(Child);

impl HttpServer {
    fn start(http: &ReadableCopy, sandbox: &Sandbox, ids: Ids, port: u16) -> Self {
        let addresses = ["0.0.0.0", "[::]"].map(|any| format!("{any}:{port}"));
        let mut command = sandbox.command_as(http.path(), ids).expect("a command");
        let mut child =
            command.arg("serve").args(addresses).stdout(Stdio::piped()).spawn().expect("a server");
        let output = child.stdout.take().expect("its output");
        let server = Self(child);
        let mut line = String::new();
        BufReader::new(output).read_line(&mut line).expect("a line");
        assert_eq!(line, "ready\n");
        server
    }
}

impl Drop for HttpServer {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

/// A captured pod with an app and without its Envoy yet, and the world.
struct EnvoyFixture {
    agent: Agent,
    http: ReadableCopy,
    program: ReadableCopy,
    _servers: [HttpServer; 2],
    pod: Pod,
}

impl EnvoyFixture {
    fn new(label: &str) -> Self {
        let agent = Agent::new("envoy").expect("the agent");
        let pod = Pod::new(PodSpec::new(label)).expect("a pod");
        let original = binary::locate("http", "INTERCEPT_HTTP").expect("the HTTP program");
        let http = ReadableCopy::of(&original).expect("a copy");
        let program = ReadableCopy::of(&envoy::program().expect("Envoy's binary")).expect("a copy");
        let app = HttpServer::start(&http, &pod, Ids::APP, 8080);
        let world = HttpServer::start(&http, pod.neighbour(), Ids::ROOT, 80);
        // Before Envoy, as an init container does it.
        agent.attach(&pod, &INIT_FLAGS).expect("attached");
        Self { agent, http, program, _servers: [app, world], pod }
    }

    fn envoy(&self) -> Sidecar {
        Sidecar::start(&self.program, &self.pod, Speaks::Http).expect("Envoy")
    }

    /// What is dialled: the listener that has to get it, and where it goes.
    fn ways(&self) -> [(&'static str, SocketAddr); 4] {
        let service = |text: &str| text.parse().expect("an address");
        let app = |v6| SocketAddr::new(self.pod.address(v6), 8080);
        [
            ("outbound", service("10.96.0.10:80")),
            ("outbound", service("[fd96::10]:80")),
            ("inbound", app(false)),
            ("inbound", app(true)),
        ]
    }

    /// Requests by the app, or by the world when they are to come in.
    fn get(&self, (listener, to): (&str, SocketAddr), count: usize, kind: &str) -> Command {
        let world: &Sandbox = self.pod.neighbour();
        let (sandbox, ids): (&Sandbox, _) =
            if listener == "outbound" { (&self.pod, Ids::APP) } else { (world, Ids::ROOT) };
        let mut get = sandbox.command_as(self.http.path(), ids).expect("a command");
        get.args(["get", &to.to_string(), &count.to_string(), kind]);
        get
    }

    fn end(self) {
        self.agent.detach(&self.pod).expect("detached");
        assert!(!self.agent.bpffs().join("intercept").exists());
    }
}

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
        let v6 = client.is_ipv6();
        // The pod itself going out; the neighbour, by its address on the link, coming in.
        let world = if v6 { "fd66::1" } else { "10.66.0.1" }.parse().expect("an address");
        let who = if line.listener == "outbound" { fixture.pod.address(v6) } else { world };
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

/// Some requests one after the other, each over a connection of its own.
struct Batch {
    started: Instant,
    ended: Instant,
    failed: Option<String>,
}

/// Ends the load also when the test fails, which would wait for it otherwise.
struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn a_restart_under_load_costs_only_connections_of_the_gap() {
    let fixture = EnvoyFixture::new("envoy-load");
    let mut envoy = Some(fixture.envoy());
    let (stop, count) = (AtomicBool::new(false), AtomicUsize::new(0));
    let load = |way| {
        let mut batches = Vec::new();
        while !stop.load(Ordering::Relaxed) {
            let started = Instant::now();
            let failed = succeed(fixture.get(way, 5, "fresh")).err().map(|error| error.to_string());
            batches.push(Batch { started, ended: Instant::now(), failed });
            count.fetch_add(1, Ordering::Relaxed);
        }
        batches
    };
    let more = |batches| {
        let (enough, deadline) =
            (count.load(Ordering::Relaxed) + batches, Instant::now() + Duration::from_secs(60));
        while count.load(Ordering::Relaxed) < enough {
            assert!(Instant::now() < deadline, "the load has stopped");
            std::thread::yield_now();
        }
    };
    let ways = fixture.ways();
    let (loads, gap) = std::thread::scope(|scope| {
        let load = &load;
        let loads = ways.map(|way| scope.spawn(move || load(way)));
        let end = StopOnDrop(&stop);
        more(20);
        let gone = Instant::now();
        envoy.take();
        more(12);
        envoy = Some(fixture.envoy());
        let back = Instant::now();
        more(40);
        drop(end);
        (loads.map(|load| load.join().expect("a load")), gone..back)
    });
    for (way, batches) in ways.iter().zip(loads) {
        let (mut before, mut after, mut lost) = (0, 0, 0);
        for Batch { started, ended, failed } in batches {
            if ended < gap.start || started > gap.end {
                assert_eq!(failed, None, "{way:?}: outside the gap");
                *(if ended < gap.start { &mut before } else { &mut after }) += 1;
            } else {
                lost += usize::from(failed.is_some());
            }
        }
        assert!(before > 0 && after > 0 && lost > 0, "{way:?}: {before} before, {lost} lost, {after} after");
    }
    drop(envoy);
    fixture.end();
}
