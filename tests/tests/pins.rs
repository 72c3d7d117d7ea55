//! Which pins a command opens, and what it says if it cannot open one: an error with the pin and the kernel's reason, and never an
//! answer that is not so.

use std::{
    net::SocketAddr,
    path::Path,
    process::{Command, Output, Stdio},
    time::{Duration, Instant},
};

use intercept_agent::facade::{netns::Netns, routes::RouteSnapshot};
use intercept_common::{Family, names};
use tests::{
    actor::{Actor, Bind, Dial, Listen, Transport, binary::ReadableCopy},
    agent::{Agent, finish, succeed},
    deadline::scaled,
    snapshot::Snapshot,
    steps::{self, SocketKind, Step},
    strace::StraceOutput,
    testbed::{Ids, Pod, PodSpec},
};

/// With [`EXCLUDED_GROUP`], a policy with entries in every map.
const CAPTURE: [&str; 14] =
    ["-u", "1337", "-i", "*", "-x", "10.1.0.0/16", "-b", "*", "-d", "82", "-o", "22", "-c", "eth1"];
/// A group whose outbound traffic is not captured.
const EXCLUDED_GROUP: (&str, &str) = ("ISTIO_OUTBOUND_OWNER_GROUPS_EXCLUDE", "2000");
/// Descriptors that every process has.
const STANDARD: usize = 3;

/// An attached pod, and commands about it.
struct PinsFixture {
    agent: Agent,
    inside: Actor,
    pod: Pod,
    strace: StraceOutput,
}

/// A command and its arguments.
type Question<'a> = (&'a str, &'a [&'a str]);

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

impl PinsFixture {
    fn new(label: &str) -> Self {
        let agent = Agent::new(label).expect("the agent");
        let pod = Pod::new(PodSpec::new(label).with_eth1()).expect("a pod");
        let inside = Actor::start(&pod).expect("an actor");
        for port in [15001, 15006] {
            let bind = Bind::new(Ids::PROXY, ([0, 0, 0, 0], port).into());
            let listen = Listen { name: port.to_string(), transport: Transport::Tcp, bind };
            inside.listen(listen).expect("a listener");
        }
        let fixture = Self { agent, inside, pod, strace: StraceOutput::new().expect("a folder") };
        fixture.capture(&fixture.pod);
        fixture
    }

    fn attach(&self, pod: &Pod, flags: &[&str]) {
        self.agent.attach(pod, flags).expect("attached");
    }

    /// Attaches with entries in every map.
    fn capture(&self, pod: &Pod) {
        let mut attach = self.agent.for_pod("attach", pod, &CAPTURE);
        attach.env(EXCLUDED_GROUP.0, EXCLUDED_GROUP.1);
        succeed(attach).expect("attached");
    }

    fn command(&self, (subcommand, arguments): Question<'_>) -> Command {
        let mut command = self.agent.command(subcommand);
        command.args(arguments);
        command
    }

    /// The output of a command. One that waits for a decision gets one.
    fn ask(&self, question: Question<'_>) -> Output {
        let mut command = self.command(question);
        if question.0 != "trace" {
            return finish(&mut command).expect("it starts");
        }
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("it starts");
        let deadline = Instant::now() + scaled(Duration::from_secs(120));
        while child.try_wait().expect("waited").is_none() {
            if Instant::now() > deadline {
                child.kill().expect("killed");
                panic!("{question:?} does not end: {:?}", child.wait_with_output());
            }
            let to = SocketAddr::from(([10, 9, 0, 1], 80));
            self.inside.dial(Dial::new(Ids::APP, to)).expect("dialled");
        }
        child.wait_with_output().expect("its output")
    }

    /// Asks by the starter, and again without.
    fn ask_by(&mut self, starter: Vec<String>, question: Question<'_>) -> Output {
        self.agent.start_by(starter);
        let output = self.ask(question);
        self.agent.start_by(Vec::new());
        output
    }

    /// The calls of `bpf()` that a command makes.
    fn calls(&mut self, question: Question<'_>) -> Vec<String> {
        let output = self.ask_by(self.strace.tracing("bpf"), question);
        assert!(output.status.success(), "{question:?}: {}", text(&output.stderr));
        self.strace.text().expect("calls").lines().map(str::to_owned).collect()
    }

    /// Makes each call fail for which `object` names what it is about, such as the path of a pin. Returns these names.
    fn refuse_each(
        &mut self,
        question: Question<'_>,
        (errno, number): (&str, u32),
        object: fn(&str) -> Option<&str>,
    ) -> Vec<String> {
        let mut pins = Vec::new();
        for call in 1.. {
            let starter = self.strace.injecting(("bpf", &format!("error={errno}")), call);
            let output = self.ask_by(starter, question);
            let Some(call) = self.strace.injected().expect("calls") else { break };
            let Some(pin) = object(&call) else { continue };
            let error = text(&output.stderr);
            let when = format!("{question:?} with {errno} of {pin}: {error}");
            assert!(!output.status.success(), "{when}: {}", text(&output.stdout));
            assert!(output.stdout.is_empty(), "{when}: {}", text(&output.stdout));
            assert!(error.contains(pin), "{when} does not name it");
            assert!(error.contains(&format!("(os error {number})")), "{when} does not say why");
            pins.push(pin.rsplit('/').next().expect("a name").to_owned());
        }
        pins
    }

    /// Lets the command run out of descriptors at every place.
    fn run_out(&mut self, question: Question<'_>, answer: &str) {
        for descriptors in STANDARD.. {
            let starter = vec!["prlimit".to_owned(), format!("--nofile={descriptors}")];
            let output = self.ask_by(starter, question);
            let (error, printed) = (text(&output.stderr), text(&output.stdout));
            let when = format!("{question:?} with {descriptors} descriptors: {error}");
            if output.status.success() {
                // An event of `trace` is not that of before.
                assert!(printed == answer || question.0 == "trace", "{when}: {printed}");
                assert!(descriptors > STANDARD + 3, "{when}: it needs more");
                return;
            }
            assert!(printed.is_empty(), "{when}: {printed}");
            // The dynamic linker has words of its own.
            assert!(error.contains("rror 24"), "{when} does not say why");
        }
    }
}

/// The path of the pin that this call opens.
fn opened(call: &str) -> Option<&str> {
    let (_, path) = call.split_once("bpf(BPF_OBJ_GET, {pathname=\"")?;
    path.split('"').next()
}

/// Nothing, if this call looks an entry up: of a map, which is open by now, it has the descriptor only.
fn looked_up(call: &str) -> Option<&str> {
    call.contains("bpf(BPF_MAP_LOOKUP_ELEM").then_some("")
}

/// The command of each call.
fn kinds(calls: &[String]) -> Vec<&str> {
    calls.iter().filter_map(|call| call.split_once("bpf(")?.1.split(',').next()).collect()
}

#[test]
fn what_cannot_be_opened_or_read_is_an_error_and_no_answer() {
    let mut fixture = PinsFixture::new("pins");
    let cgroup = fixture.pod.cgroup.path().display().to_string();
    let own = fixture.pod.address(Family::V4).to_string();
    let netns = Netns::open(fixture.pod.netns.path()).expect("the namespace");
    let interfaces = RouteSnapshot::snapshot(&netns).expect("a snapshot").interfaces;
    let eth1 = interfaces.iter().find(|interface| interface.name == "eth1").expect("eth1").index.to_string();
    let outbound = |to: &[&str]| {
        let flow = ["outbound", "--json", "--cgroup-path", &cgroup, "--uid", "1000"];
        flow.iter().chain(to).map(|word| (*word).to_owned()).collect::<Vec<_>>()
    };
    let inbound = ["inbound", "--json", "--cgroup-path", &cgroup, "--dst", &own, "--dport", "8080"];
    let inbound = inbound.iter().copied().chain(["--ifindex", &eth1]).map(str::to_owned).collect();
    let questions: [(&str, Vec<String>, &str); 9] = [
        // Each of these answers would be another one if a map was empty.
        ("explain", outbound(&["--dst", "10.1.0.1", "--dport", "80", "--gid", "1000"]), "excluded_cidr"),
        (
            "explain",
            outbound(&["--dst", "10.9.0.1", "--dport", "22", "--gid", "1000"]),
            "excluded_outbound_port",
        ),
        ("explain", outbound(&["--dst", "10.9.0.1", "--dport", "80", "--gid", "2000"]), "owner_group"),
        ("explain", inbound, "excluded_ingress"),
        ("status", vec!["--json".into()], &cgroup),
        ("status", vec!["--cgroup-path".into(), cgroup.clone()], &cgroup),
        ("status", vec!["--shadow".into()], "nothing is in shadow mode"),
        ("trace", ["--count", "1", "--cgroup-path", &cgroup].map(str::to_owned).into(), "10.9.0.1"),
        ("audit", vec!["--cgroup-path".into(), cgroup.clone()], ""),
    ];
    for (subcommand, arguments, answer) in &questions {
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let question = (*subcommand, &arguments[..]);
        let output = fixture.ask(question);
        let printed = text(&output.stdout);
        assert!(output.status.success() && printed.contains(answer), "{question:?}: {printed} {output:?}");
        for error in [("EMFILE", 24), ("EACCES", 13)] {
            let pins = fixture.refuse_each(question, error, opened);
            assert!(pins.iter().any(|pin| pin == names::POLICIES), "{question:?}: {pins:?}");
            if *subcommand == "explain" {
                let opened = |name: &&str| pins.iter().any(|pin| pin == name);
                assert!(
                    [names::DESTINATIONS, names::PORTS, names::GROUPS, names::INTERFACES].iter().all(opened)
                );
            }
        }
        if *subcommand == "explain" {
            assert!(!fixture.refuse_each(question, ("ENOMEM", 12), looked_up).is_empty());
        }
        fixture.run_out(question, &printed);
    }
    assert!(!fixture.agent.tracing().expect("the switch"), "`trace` leaves the events switched on");
}

/// Another user may not look into the folder of pins, and does not learn whether there is any.
#[test]
fn a_folder_that_may_not_be_read_is_not_taken_for_an_empty_one() {
    let fixture = PinsFixture::new("folder");
    let copy = ReadableCopy::of(fixture.agent.program()).expect("a copy");
    let folder = fixture.agent.bpffs().display().to_string();
    for command in [&["status"][..], &["status", "--json"], &["status", "--shadow"], &["trace"]] {
        let mut asked = Command::new("setpriv");
        asked.args(["--reuid=1000", "--regid=1000", "--clear-groups"]).arg(copy.path());
        let output = finish(asked.args(command).args(["--bpffs", &folder])).expect("it starts");
        let (printed, error) = (text(&output.stdout), text(&output.stderr));
        assert!(!output.status.success() && printed.is_empty(), "{command:?}: {printed} {error}");
        assert!(error.contains(&folder) && error.contains("(os error 13)"), "{command:?}: {error}");
    }
}

/// The process by which a namespace was opened may be gone, and its number that of another, which this process may not look at.
#[test]
fn a_namespace_whose_path_may_not_be_opened_is_found_by_a_process() {
    let mut fixture = PinsFixture::new("refused");
    let cgroup = fixture.pod.cgroup.path().display().to_string();
    let arguments = ["--cgroup-path", &cgroup];
    let detach: Question<'_> = ("detach", &arguments);
    assert!(finish(&mut fixture.command(detach)).expect("it starts").status.success());
    let before = Snapshot::of(&fixture.pod).expect("a snapshot");
    fixture.capture(&fixture.pod);
    let mut starter = fixture.strace.injecting(("openat", "error=EACCES"), 1);
    starter.push(format!("--trace-path={}", fixture.pod.netns.path().display()));
    let output = fixture.ask_by(starter, detach);
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert!(fixture.strace.injected().expect("calls").is_some(), "it is not opened by its path");
    assert_eq!(before.difference(&Snapshot::of(&fixture.pod).expect("a snapshot")), [""; 0]);
}

/// A pod that closed its connections is detached without a look at those of others, however many there are.
#[test]
fn a_detach_reads_no_large_map_without_need() {
    let mut fixture = PinsFixture::new("unread");
    let cgroup = fixture.pod.cgroup.path().display().to_string();
    let arguments = ["--cgroup-path", &cgroup];
    let detach: Question<'_> = ("detach", &arguments);
    let plain = ["-u", "1337", "-i", "*", "-b", "*"];
    let beside = Pod::new(PodSpec::new("beside")).expect("a pod");
    fixture.attach(&beside, &plain);
    fixture.attach(&fixture.pod, &plain);
    let alone = fixture.calls(detach);

    // More than a call reads.
    let cidrs = (0..4000).map(|n| format!("10.{}.{}.0/24", n / 250, n % 250)).collect::<Vec<_>>().join(",");
    let ports = (1..4000).map(|n| (n * 2).to_string()).collect::<Vec<_>>().join(",");
    fixture.attach(&beside, &["-u", "1337", "-i", "*", "-b", "*", "-x", &cidrs, "-o", &ports, "-c", "eth1"]);
    fixture.attach(&fixture.pod, &plain);
    let among_many = fixture.calls(detach);
    assert_eq!(kinds(&alone), kinds(&among_many));

    let opens = |calls: &[String], name: &str| {
        let pins = calls.iter().filter_map(|call| opened(call));
        pins.into_iter().any(|pin| Path::new(pin).file_name().is_some_and(|file| file == name))
    };
    let unopened = [names::ORIG_DST, names::GROUPS, names::INTERFACES];
    for name in unopened {
        assert!(!opens(&among_many, name), "{name} is opened: {among_many:#?}");
    }
    // With the connections, groups and interfaces of its own they are.
    fixture.capture(&fixture.pod);
    let to = SocketAddr::from(([10, 9, 0, 1], 80));
    let steps = [Step::Open(SocketKind::Tcp4), Step::Connect(to), Step::Read, Step::Pause];
    let mut connected = steps::start(&fixture.pod, Ids::APP, "", &steps).expect("it starts");
    connected.await_pause().expect("a connection");
    let with_its_own = fixture.calls(detach);
    for name in unopened {
        assert!(opens(&with_its_own, name), "{name} is not opened: {with_its_own:#?}");
    }
}
