//! A pod is cut over from iptables to the agent and back, under load: no connection is lost, bypasses the proxy or is captured
//! twice, established ones continue, and the rules return as they were.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    net::SocketAddr,
    process::{Child, ChildStdin, ChildStdout, Stdio},
    time::Duration,
};

use tests::{
    actor::binary::{self, ReadableCopy},
    agent::finish,
    cutover::{LoadProxy, ProxySeen, RulesFixture},
    envoy::{self, Sidecar, Speaks},
    iptables::{Backend, IptablesOptions},
    testbed::{Ids, Sandbox},
};

fn fixture(label: &str, backend: Backend) -> RulesFixture {
    RulesFixture::new(label, backend, &IptablesOptions::injected(), LoadProxy::Relays)
}

/// A connection that is made once and used from time to time.
struct HeldClient(Child, ChildStdin, BufReader<ChildStdout>, String);

impl HeldClient {
    fn start(http: &ReadableCopy, sandbox: &Sandbox, ids: Ids, to: &str) -> Self {
        let mut command = sandbox.command_as(http.path(), ids).expect("a command");
        let command = command.args(["hold", to]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().expect("a client");
        let (input, output) = (child.stdin.take().expect("piped"), child.stdout.take().expect("piped"));
        let mut held = Self(child, input, BufReader::new(output), to.to_owned());
        held.ask();
        held
    }

    #[track_caller]
    fn ask(&mut self) {
        writeln!(self.1, "ask").expect("the client lives");
        let mut line = String::new();
        self.2.read_line(&mut line).expect("a line");
        assert_eq!(line, "answered\n", "an established connection to {} does not continue", self.3);
    }
}

impl Drop for HeldClient {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

/// HTTP servers of the pod and of the world, and connections to them that are held.
struct HeldClients {
    http: ReadableCopy,
    servers: Vec<Child>,
    held: Vec<HeldClient>,
}

impl HeldClients {
    fn new(fixture: &RulesFixture) -> Self {
        let http =
            ReadableCopy::of(&binary::locate("http", "INTERCEPT_HTTP").expect("http")).expect("a copy");
        let world: &Sandbox = fixture.pod.neighbour();
        let sandboxes: [(&Sandbox, Ids, u16); 2] = [(&fixture.pod, Ids::APP, 8081), (world, Ids::ROOT, 81)];
        let servers = sandboxes.map(|(sandbox, ids, port)| {
            let mut command = sandbox.command_as(http.path(), ids).expect("a command");
            command.arg("serve").args([format!("0.0.0.0:{port}"), format!("[::]:{port}")]);
            let mut child = command.stdout(Stdio::piped()).spawn().expect("a server");
            let mut line = String::new();
            BufReader::new(child.stdout.as_mut().expect("piped")).read_line(&mut line).expect("a line");
            assert_eq!(line, "ready\n");
            child
        });
        Self { http, servers: servers.into(), held: Vec::new() }
    }

    /// Opens one more of each kind. Returns how many connections the proxy has of them.
    fn open(&mut self, fixture: &RulesFixture) -> usize {
        let world: &Sandbox = fixture.pod.neighbour();
        let kinds: [(&Sandbox, Ids, &str); 6] = [
            (&fixture.pod, Ids::APP, "198.51.100.7:81"),
            (&fixture.pod, Ids::APP, "[2001:db8::7]:81"),
            (world, Ids::ROOT, "10.66.0.2:8081"),
            (world, Ids::ROOT, "[fd66::2]:8081"),
            (&fixture.pod, Ids::PROXY, "10.66.0.2:8081"),
            (&fixture.pod, Ids::PROXY, "[fd66::2]:8081"),
        ];
        self.held.extend(kinds.map(|(sandbox, ids, to)| HeldClient::start(&self.http, sandbox, ids, to)));
        kinds.len()
    }

    #[track_caller]
    fn ask(&mut self) {
        self.held.iter_mut().for_each(HeldClient::ask);
    }
}

impl Drop for HeldClients {
    fn drop(&mut self) {
        for server in &mut self.servers {
            drop(server.kill());
            drop(server.wait());
        }
    }
}

/// There and back under load, with connections that are held all the time.
fn there_and_back(fixture: &RulesFixture, times: usize, each: usize) -> tests::cutover::LoadAccount {
    let before = fixture.rules();
    let mut held = HeldClients::new(fixture);
    held.open(fixture);
    let account = fixture.under_load(each, || {
        for n in 0..times {
            let said = fixture.cut(&[]);
            assert!(said.contains("is enforced"), "{said}");
            assert!(!fixture.rules().contains("-A OUTPUT -j ISTIO_OUTPUT"), "{}", fixture.rules());
            let [pod] = &fixture.agent.pods().expect("a status")[..] else { panic!("one pod") };
            let rules = pod.cutover.as_ref().map(|cutover| cutover.rules.as_str());
            assert_eq!((pod.mode.as_str(), rules), ("enforce", Some("out")));
            held.ask();
            if n == 0 {
                held.open(fixture);
            }
            let said = fixture.cut(&["--back"]);
            assert!(said.contains("is in shadow mode") && !said.contains("DIFFERS"), "{said}");
            assert_eq!(fixture.rules(), before);
            let [pod] = &fixture.agent.pods().expect("a status")[..] else { panic!("one pod") };
            assert_eq!((pod.mode.as_str(), &pod.cutover), ("shadow", &None));
            held.ask();
            // The next time is refused before a flow is compared.
            std::thread::sleep(Duration::from_millis(300));
        }
    });
    println!("{times} times there and back: {} connections, {} a second", account.count(), account.rate());
    account
}

/// The connections without those that are held.
fn of_load(seen: Vec<ProxySeen>) -> Vec<ProxySeen> {
    seen.into_iter().filter(|(_, original, _)| ![81, 8081].contains(&original.port())).collect()
}

fn relays_keep_every_connection(label: &str, backend: Backend, times: usize) {
    let fixture = fixture(label, backend);
    fixture.shadow(&[]);
    let first = fixture.round(2).expect("connections");
    first.assert_each_captured_once(fixture.relayed(first.count()));
    let account = there_and_back(&fixture, times, 12);
    // Twelve connections are held.
    account.assert_each_captured_once(of_load(fixture.relayed(account.count() + 12)));
}

#[test]
fn ten_times_under_load_with_nft() {
    relays_keep_every_connection("cut-nft", Backend::Nft, 10);
}

#[test]
fn ten_times_under_load_with_legacy_tables() {
    relays_keep_every_connection("cut-legacy", Backend::Legacy, 10);
}

#[test]
fn ten_times_under_load_with_envoy() {
    let fixture =
        RulesFixture::new("cut-envoy", Backend::Nft, &IptablesOptions::injected(), LoadProxy::Other);
    let program = ReadableCopy::of(&envoy::program().expect("Envoy")).expect("a copy");
    let envoy = Sidecar::start(&program, &fixture.pod, Speaks::Tcp).expect("Envoy");
    fixture.shadow(&[]);
    let first = fixture.round(2).expect("connections").count();
    let account = there_and_back(&fixture, 10, 12);
    let logged = envoy.logged(first + account.count(), Duration::from_secs(20)).expect("a log");
    let at = |text: &str| -> SocketAddr { text.parse().expect("an address") };
    let seen = logged.into_iter().skip(first);
    let seen = seen.map(|line| (line.listener, at(&line.original), at(&line.client).ip())).collect();
    account.assert_each_captured_once(of_load(seen));
}

#[test]
fn what_is_not_ready_is_refused() {
    let fixture = fixture("cut-refused", Backend::Nft);
    let refused = |flags: &[&str], why: &str| {
        let before = fixture.rules();
        let output = fixture.cutover(flags);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && said.contains(why), "{flags:?}: {said}");
        assert_eq!(fixture.rules(), before, "{flags:?}");
    };
    refused(&[], "is not attached: attach it in shadow mode first");
    fixture.agent.attach(&fixture.pod, &tests::agent::INIT_FLAGS).expect("attached");
    refused(&[], "is not in shadow mode");
    refused(&["--force"], "is not in shadow mode");
    refused(&["--back"], "no rules of iptables are saved for it");
    fixture.shadow(&[]);
    refused(&[], "no flow has been compared yet");
    assert!(fixture.cut(&["--back"]).contains("is unchanged"));

    // A person adds a rule that the options do not have.
    let rule = "-t nat -I ISTIO_OUTPUT 1 -p tcp --dport 80 -j RETURN".split(' ');
    let mut iptables = fixture.pod.command("iptables-nft").expect("a command");
    assert!(iptables.args(rule.clone()).status().expect("iptables").success());
    // One goes around the proxy.
    fixture.round(1).expect("connections");
    refused(&[], "flows differ from what happened");
    let before = fixture.rules();
    fixture.cut(&["--force"]);
    for (command, flags) in [("detach", &[][..]), ("attach", &["--shadow"])] {
        let output = finish(&mut fixture.agent.for_pod(command, &fixture.pod, flags)).expect("started");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && said.contains("cutover --back"), "{command}: {said}");
    }
    drop(fixture.relayed(0));
    let round = fixture.round(1).expect("connections");
    round.assert_each_captured_once(fixture.relayed(round.count()));
    assert!(fixture.cut(&[]).contains("is unchanged"));
    fixture.cut(&["--back"]);
    assert_eq!(fixture.rules(), before);
    fixture.agent.detach(&fixture.pod).expect("detached");
}
