//! DNS capture with real clients and servers (dig, glibc's resolver, dnsmasq), and sockets that query several servers.

use std::fs;
use std::io::Write;
use std::net::SocketAddr;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use intercept_common::names;
use tests::agent::{Agent, INIT_FLAGS, succeed};
use tests::testbed::{Ids, Pod, PodSpec, Sandbox};
use tests::unusual::{Method, UnusualOutcome, UnusualProcess, UnusualSocket};

/// The servers of the pod's resolv.conf.
const RESOLV_CONF: &str = "nameserver 10.96.0.10\nnameserver fd96::10\n";

/// The addresses of the world's server: those two and two others.
const DNS_SERVERS: [&str; 4] = ["10.96.0.10", "10.96.0.11", "fd96::10", "fd96::11"];

/// A server that answers every name with one address. Dropping it ends the process.
struct Dnsmasq(Child);

impl Dnsmasq {
    /// `answer` identifies the server.
    fn start(sandbox: &Sandbox, port: u16, answer: &str, ids: Ids) -> Self {
        let mut command = sandbox.command_as("dnsmasq", ids).expect("a command");
        command.args([
            "--keep-in-foreground",
            "--conf-file=/dev/null",
            "--no-resolv",
            "--no-hosts",
            "--pid-file=",
        ]);
        command.arg(format!("--port={port}")).arg(format!("--address=/#/{answer}"));
        // In the world no interface has these addresses, and dnsmasq would close TCP connections to them and change its
        // user.
        if ids == Ids::ROOT {
            command.arg("--bind-interfaces");
            command.args(DNS_SERVERS.map(|server| format!("--listen-address={server}")));
            command.args(["--user=root", "--group=root"]);
        }
        Self(command.stderr(Stdio::null()).spawn().expect("dnsmasq"))
    }
}

impl Drop for Dnsmasq {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

/// A pod whose proxy answers 192.0.2.1 and whose world answers 192.0.2.2.
struct DnsFixture {
    agent: Agent,
    resolv_conf: tempfile::NamedTempFile,
    _servers: [Dnsmasq; 2],
    pod: Pod,
}

const PROXY: &str = "192.0.2.1";
const WORLD: &str = "192.0.2.2";

impl DnsFixture {
    /// Captured with the servers of the pod's resolv.conf and these flags.
    fn new(flags: &[&str]) -> Self {
        let fixture = Self::uncaptured();
        fixture.attach(flags);
        fixture
    }

    fn attach(&self, flags: &[&str]) -> String {
        let path = self.resolv_conf.path().display().to_string();
        let flags = [&INIT_FLAGS[..], &["--redirect-dns", "--resolv-conf", &path], flags].concat();
        self.agent.attach(&self.pod, &flags).expect("attached")
    }

    fn uncaptured() -> Self {
        let pod = Pod::new(PodSpec::new("dns")).expect("a pod");
        let agent = Agent::new("dns").expect("a bpffs");
        let mut resolv_conf = tempfile::NamedTempFile::new().expect("a file");
        resolv_conf.write_all(RESOLV_CONF.as_bytes()).expect("written");
        let servers = [
            Dnsmasq::start(&pod, 15053, PROXY, Ids::PROXY),
            Dnsmasq::start(pod.neighbour(), 53, WORLD, Ids::ROOT),
        ];
        let fixture = Self { agent, resolv_conf, _servers: servers, pod };
        fixture.await_answer(&["@127.0.0.1", "-p", "15053"], PROXY);
        fixture.await_answer(&["@10.96.0.10"], WORLD);
        fixture
    }

    /// How many hooks of datagrams have a link of the pod.
    fn datagram_hooks(&self) -> usize {
        let pods = fs::read_dir(self.agent.store().join("pods")).expect("listed");
        let pod = pods.map(|pod| pod.expect("a pod").path()).next().expect("one");
        let hooks = [names::SENDMSG4, names::SENDMSG6, names::RECVMSG4, names::RECVMSG6];
        hooks.iter().filter(|hook| pod.join(hook).exists()).count()
    }

    fn await_answer(&self, arguments: &[&str], answer: &str) {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            let said = self.dig(Ids::APP, arguments);
            if said == answer {
                return;
            }
            assert!(Instant::now() < deadline, "dig {arguments:?}: {said:?}, not {answer}");
        }
    }

    /// The output of dig: the address or the error. dig refuses answers from an address that it did not query.
    fn dig(&self, ids: Ids, arguments: &[&str]) -> String {
        let mut dig = self.pod.command_as("dig", ids).expect("a command");
        dig.args(["+short", "+tries=1", "+time=2", "-r"]).args(arguments).args(["service.test", "A"]);
        let output = dig.output().expect("dig");
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    }

    /// The result of glibc's resolver with the pod's resolv.conf and an empty /etc/hosts.
    fn getent(&self) -> String {
        let script = format!(
            "mount --bind {} /etc/resolv.conf && exec getent ahostsv4 service.test",
            self.resolv_conf.path().display()
        );
        let mut unshare = self.pod.command("unshare").expect("a command");
        unshare.args(["--mount", "--propagation", "private", "sh", "-c", &script]);
        let said = succeed(unshare).expect("getent");
        said.split_whitespace().next().unwrap_or_default().to_owned()
    }
}

#[test]
fn queries_to_the_servers_of_resolv_conf_go_to_the_proxy() {
    let fixture = DnsFixture::new(&[]);
    for transport in ["+notcp", "+tcp"] {
        for (server, answer) in
            [("@10.96.0.10", PROXY), ("@fd96::10", PROXY), ("@10.96.0.11", WORLD), ("@fd96::11", WORLD)]
        {
            let said = fixture.dig(Ids::APP, &[server, transport]);
            // TCP to other servers goes to the proxy's outbound listener, which does not exist here.
            let answer = if answer == WORLD && transport == "+tcp" { None } else { Some(answer) };
            match answer {
                Some(answer) => assert_eq!(said, answer, "{server} {transport}"),
                None => assert_ne!(said, PROXY, "{server} {transport}"),
            }
            // Queries of the proxy are not captured.
            assert_eq!(fixture.dig(Ids::PROXY, &[server, transport]), WORLD, "{server} {transport}");
        }
    }
    assert_eq!(fixture.getent(), PROXY);
}

#[test]
fn all_queries_go_to_the_proxy_if_asked_for() {
    let fixture = DnsFixture::new(&["--capture-all-dns"]);
    for transport in ["+notcp", "+tcp"] {
        for server in ["@10.96.0.10", "@10.96.0.11", "@fd96::10", "@fd96::11"] {
            assert_eq!(fixture.dig(Ids::APP, &[server, transport]), PROXY, "{server} {transport}");
            assert_eq!(fixture.dig(Ids::PROXY, &[server, transport]), WORLD, "{server} {transport}");
        }
    }
    assert_eq!(fixture.getent(), PROXY);
}

#[test]
fn capture_of_queries_is_switched_on_and_off_later() {
    let fixture = DnsFixture::uncaptured();
    let answers = |answer: &str| {
        for server in ["@10.96.0.10", "@fd96::10"] {
            assert_eq!(fixture.dig(Ids::APP, &[server, "+notcp"]), answer, "{server}");
        }
    };
    fixture.agent.attach(&fixture.pod, &INIT_FLAGS).expect("attached");
    assert_eq!(fixture.datagram_hooks(), 0);
    answers(WORLD);
    assert!(fixture.attach(&[]).starts_with("replaced"));
    assert_eq!(fixture.datagram_hooks(), 4);
    answers(PROXY);
    // Answers to earlier queries may still be on their way.
    fixture.agent.attach(&fixture.pod, &INIT_FLAGS).expect("attached");
    assert_eq!(fixture.datagram_hooks(), 4);
    answers(WORLD);
    let again = fixture.agent.attach(&fixture.pod, &INIT_FLAGS).expect("attached");
    assert!(again.starts_with("unchanged"), "{again}");
}

/// The actor is the server here, because its answers name the query.
fn ask(method: Method, to: &[SocketAddr]) -> UnusualOutcome {
    let fixture = tests::unusual::fixture::UnusualFixture::new("dns").expect("a pod");
    let agent = Agent::new("dns").expect("a bpffs");
    let flags = [&INIT_FLAGS[..], &["--redirect-dns", "--capture-all-dns"]].concat();
    agent.attach(&fixture.pod, &flags).expect("attached");
    let unusual = UnusualSocket { to: to.to_vec(), ..UnusualSocket::new(method, to[0]) };
    UnusualProcess::start(&fixture.pod, &unusual).expect("started").go().expect("asked")
}

fn servers(texts: &[&str]) -> Vec<SocketAddr> {
    texts.iter().map(|text| text.parse().expect("an address")).collect()
}

#[test]
fn one_socket_that_asks_servers_in_turn_hears_from_each() {
    for to in [
        servers(&["10.96.0.10:53", "10.96.0.11:53", "10.96.0.10:53", "203.0.113.9:53"]),
        servers(&["[fd96::10]:53", "[fd96::11]:53", "[fd96::10]:53"]),
    ] {
        let outcome = ask(Method::InTurn, &to);
        assert!(outcome.servers.iter().all(|server| server.as_deref() == Ok("dns")), "{outcome:?}");
        assert_eq!(outcome.peers, to);
    }
}

#[test]
fn of_several_queries_at_once_each_answer_names_its_server() {
    let to = servers(&["10.96.0.10:53", "10.96.0.11:53", "203.0.113.9:53"]);
    let outcome = ask(Method::AtOnce, &to);
    assert!(outcome.servers.iter().all(|server| server.as_deref() == Ok("dns")), "{outcome:?}");
    assert_eq!(outcome.peers, to);
}
