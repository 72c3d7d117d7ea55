//! A captured pod with Envoy, and requests both ways in both families while something happens to that.

use std::{
    io::{BufRead as _, BufReader},
    net::SocketAddr,
    ops::Range,
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    time::{Duration, Instant},
};

use intercept_common::Family;

use super::{Sidecar, Speaks};
use crate::{
    actor::binary::{self, ReadableCopy},
    agent::{Agent, INIT_FLAGS, succeed},
    testbed::{Ids, Pod, PodSpec, Sandbox},
};

/// The listener that has to get a connection, and where it goes.
pub type FlowPath = (&'static str, SocketAddr);

#[derive(Debug)]
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
#[derive(Debug)]
pub struct EnvoyFixture {
    /// Captures it.
    pub agent: Agent,
    http: ReadableCopy,
    /// Envoy.
    pub program: ReadableCopy,
    _servers: [HttpServer; 2],
    /// The pod.
    pub pod: Pod,
}

impl EnvoyFixture {
    /// A new one.
    ///
    /// # Panics
    /// If it cannot be made or captured.
    pub fn new(label: &str) -> Self {
        let agent = Agent::new("envoy").expect("the agent");
        let pod = Pod::new(PodSpec::new(label)).expect("a pod");
        let original = binary::locate("http", "INTERCEPT_HTTP").expect("the HTTP program");
        let http = ReadableCopy::of(&original).expect("a copy");
        let program = ReadableCopy::of(&super::program().expect("Envoy's binary")).expect("a copy");
        let app = HttpServer::start(&http, &pod, Ids::APP, 8080);
        let world = HttpServer::start(&http, pod.neighbour(), Ids::ROOT, 80);
        // Before Envoy, as an init container does it.
        agent.attach(&pod, &INIT_FLAGS).expect("attached");
        Self { agent, http, program, _servers: [app, world], pod }
    }

    /// Starts its Envoy.
    ///
    /// # Panics
    /// If it does not listen.
    pub fn envoy(&self) -> Sidecar {
        Sidecar::start(&self.program, &self.pod, Speaks::Http).expect("Envoy")
    }

    /// What is dialled: the listener that has to get it, and where it goes.
    ///
    /// # Panics
    /// Never.
    pub fn ways(&self) -> [FlowPath; 4] {
        let service = |text: &str| text.parse().expect("an address");
        let app = |family| SocketAddr::new(self.pod.address(family), 8080);
        [
            ("outbound", service("10.96.0.10:80")),
            ("outbound", service("[fd96::10]:80")),
            ("inbound", app(Family::V4)),
            ("inbound", app(Family::V6)),
        ]
    }

    /// Requests by the app, or by the world when they are to come in.
    ///
    /// # Panics
    /// If there is no such sandbox any more.
    pub fn get(&self, (listener, to): FlowPath, count: usize, kind: &str) -> Command {
        let world: &Sandbox = self.pod.neighbour();
        let (sandbox, ids): (&Sandbox, _) =
            if listener == "outbound" { (&self.pod, Ids::APP) } else { (world, Ids::ROOT) };
        let mut get = sandbox.command_as(self.http.path(), ids).expect("a command");
        get.args(["get", &to.to_string(), &count.to_string(), kind]);
        get
    }

    /// Detaches it.
    ///
    /// # Panics
    /// If that fails.
    pub fn end(self) {
        self.agent.detach(&self.pod).expect("detached");
        assert!(!self.agent.bpffs().join("intercept").exists());
    }
}

/// Some requests one after the other, each over a connection of its own.
#[derive(Debug)]
pub struct Batch {
    started: Instant,
    ended: Instant,
    /// Why one of them was not answered.
    pub failed: Option<String>,
}

/// Ends the load also when the test fails, which would wait for it otherwise.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// What goes on beside the requests.
#[derive(Debug)]
pub struct RunningLoad(AtomicUsize);

impl RunningLoad {
    /// Waits for so many more batches.
    ///
    /// # Panics
    /// If they do not come.
    pub fn more(&self, batches: usize) {
        let enough = self.0.load(Ordering::Relaxed) + batches;
        let deadline = Instant::now() + Duration::from_secs(60);
        while self.0.load(Ordering::Relaxed) < enough {
            assert!(Instant::now() < deadline, "the load has stopped");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl EnvoyFixture {
    /// Requests by every way at once for as long as `meanwhile` takes; the batches of each way.
    ///
    /// # Panics
    /// If `meanwhile` does.
    pub fn under_load<T>(
        &self,
        meanwhile: impl FnOnce(&RunningLoad) -> T,
    ) -> ([(FlowPath, Vec<Batch>); 4], T) {
        let (stop, load) = (AtomicBool::new(false), RunningLoad(AtomicUsize::new(0)));
        let requests = |way| {
            let mut batches = Vec::new();
            while !stop.load(Ordering::Relaxed) {
                let started = Instant::now();
                let failed = succeed(self.get(way, 5, "fresh")).err().map(|error| error.to_string());
                batches.push(Batch { started, ended: Instant::now(), failed });
                load.0.fetch_add(1, Ordering::Relaxed);
            }
            (way, batches)
        };
        std::thread::scope(|scope| {
            let requests = &requests;
            let loads = self.ways().map(|way| scope.spawn(move || requests(way)));
            let end = Stop(&stop);
            let came_of_it = meanwhile(&load);
            drop(end);
            (loads.map(|load| load.join().expect("a load")), came_of_it)
        })
    }
}

/// Only connections of a gap failed, and there were some before, in and after it.
///
/// # Panics
/// If it is not so.
pub fn lost_in_the_gap_alone(loads: [(FlowPath, Vec<Batch>); 4], gap: &Range<Instant>) {
    for (way, batches) in loads {
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
}
