//! A pod with real rules of iptables beside the agent in shadow mode, and a load of which every connection is accounted for:
//! what its client saw, and which of the proxy's listeners had it with which original destination.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    process::Output,
    sync::atomic::{AtomicBool, AtomicU32, Ordering},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};

mod node;
mod tools;

pub use node::{CUTOVER, CutoverNode, MODE, RulesPod};
pub use tools::WrappedTools;

use crate::{
    actor::{Actor, Bind, Dial, DialOutcome, Listen, OriginalDst, Relay, RelayDirection, Relayed, Transport},
    agent::{Agent, INIT_FLAGS, finish, succeed},
    iptables::{Backend, IptablesOptions, apply},
    testbed::{Ids, Pod, PodSpec},
};

/// Who connects.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LoadClient {
    /// The application of the pod.
    App,
    /// The proxy, to its own pod.
    Proxy,
    /// The world.
    World,
}

/// A kind of connection: its client, its destination, the listener of the proxy that has it, and the server at its end.
pub type LoadFlow = (LoadClient, SocketAddr, &'static str, &'static str);

/// A connection as the proxy had it: listener, original destination, client. Without the client's port, which NAT may change.
/// Connections of applications and of the world are told apart: each has a destination or a source of its own.
pub type ProxySeen = (String, SocketAddr, IpAddr);

/// What a load made, and in what time.
#[derive(Debug, Default)]
pub struct LoadAccount {
    /// How often each connection was made.
    pub made: BTreeMap<ProxySeen, usize>,
    /// How long it went on.
    pub time: Duration,
}

/// The proxy of the pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LoadProxy {
    /// Relays in the actor of the pod.
    Relays,
    /// A process that the test starts.
    Other,
}

/// A pod with rules of iptables, and the agent beside them.
#[derive(Debug)]
pub struct RulesFixture {
    /// The agent.
    pub agent: Agent,
    /// The application, and with [`LoadProxy::Relays`] the proxy.
    pub inside: Actor,
    /// The world outside.
    pub world: Actor,
    /// The pod.
    pub pod: Pod,
    backend: Backend,
    /// The number of the next connection.
    next: AtomicU32,
}

fn at(text: &str) -> SocketAddr {
    text.parse().expect("an address")
}

/// All kinds of connections that the proxy has.
///
/// # Panics
/// Never.
pub fn flows() -> [LoadFlow; 6] {
    [
        (LoadClient::App, at("198.51.100.7:80"), "outbound", "world"),
        (LoadClient::App, at("[2001:db8::7]:80"), "outbound", "world"),
        (LoadClient::World, at("10.66.0.2:8080"), "inbound", "app"),
        (LoadClient::World, at("[fd66::2]:8080"), "inbound", "app"),
        (LoadClient::Proxy, at("10.66.0.2:8080"), "inbound", "app"),
        (LoadClient::Proxy, at("[fd66::2]:8080"), "inbound", "app"),
    ]
}

impl RulesFixture {
    /// A pod with these rules, to which the agent is not attached yet.
    ///
    /// # Panics
    /// If it cannot be made.
    pub fn new(label: &str, backend: Backend, options: &IptablesOptions, proxy: LoadProxy) -> Self {
        let agent = Agent::new(label).expect("the agent");
        let pod = Pod::new(PodSpec::new(label)).expect("a pod");
        apply(options, &pod, backend).expect("rules");
        let (inside, world) =
            (Actor::start(&pod).expect("an actor"), Actor::start(pod.neighbour()).expect("an actor"));
        for any in ["0.0.0.0", "[::]"] {
            let bind = |port: u16, ids| Bind::new(ids, at(&format!("{any}:{port}")));
            let server = |name: &str, port, ids| Listen {
                name: name.into(),
                transport: Transport::Tcp,
                bind: bind(port, ids),
            };
            inside.listen(server("app", 8080, Ids::APP)).expect("a server");
            world.listen(server("world", 80, Ids::ROOT)).expect("a server");
            let relays = [("outbound", RelayDirection::Outbound), ("inbound", RelayDirection::Inbound)];
            for ((name, direction), port) in
                relays.into_iter().zip([options.envoy_port, options.inbound_port])
            {
                if proxy == LoadProxy::Relays {
                    let bind = bind(port, Ids::PROXY);
                    let (name, workers) = (name.into(), 2);
                    let relay = Relay { name, bind, direction, report: true, reset: false, workers };
                    inside.relay(relay).expect("a relay");
                }
            }
        }
        Self { agent, inside, world, pod, backend, next: AtomicU32::new(1) }
    }

    /// Attaches the agent in shadow mode.
    ///
    /// # Panics
    /// If that fails.
    pub fn shadow(&self, flags: &[&str]) {
        self.agent.attach(&self.pod, &[&INIT_FLAGS[..], &["--shadow"], flags].concat()).expect("attached");
    }

    /// Runs `cutover`.
    ///
    /// # Panics
    /// If it cannot be started.
    pub fn cutover(&self, flags: &[&str]) -> Output {
        let mut command = self.agent.command("cutover");
        command.arg("--cgroup-path").arg(self.pod.cgroup.path()).args(flags);
        finish(&mut command).expect("started")
    }

    /// Runs `cutover`, which must succeed.
    ///
    /// # Panics
    /// If it does not.
    pub fn cut(&self, flags: &[&str]) -> String {
        let output = self.cutover(flags);
        let error = String::from_utf8_lossy(&output.stderr);
        if !output.status.success() {
            let mut status = self.agent.command("status");
            let compared = finish(status.arg("--shadow")).map(|output| output.stdout).unwrap_or_default();
            panic!("cutover {flags:?}: {error}{}", String::from_utf8_lossy(&compared));
        }
        String::from_utf8(output.stdout).expect("text")
    }

    /// All tables of both families and of both implementations, without counters and comments.
    ///
    /// # Panics
    /// If they cannot be read.
    pub fn rules(&self) -> String {
        let mut all = String::new();
        let legacy: &[&str] = if self.backend == Backend::Legacy { &["legacy"] } else { &[] };
        for kind in ["nft"].iter().chain(legacy) {
            for program in ["iptables", "ip6tables"] {
                let save = self.pod.command(format!("{program}-{kind}-save")).expect("a command");
                let said = succeed(save).expect("rules");
                let lines = said.lines().filter(|line| !line.starts_with('#'));
                for line in lines.map(|line| line.split(" [").next().unwrap_or_default()) {
                    all.extend([program, " ", line, "\n"]);
                }
            }
        }
        all
    }

    /// Makes each kind of connection `each` times at once, and checks what its client saw.
    fn dial(&self, account: &mut LoadAccount, client: LoadClient, each: usize) -> Result<()> {
        let flows = flows();
        let mine = flows.iter().filter(|flow| (flow.0 == LoadClient::World) == (client == LoadClient::World));
        let all: Vec<&LoadFlow> = mine.flat_map(|flow| std::iter::repeat_n(flow, each)).collect();
        let dials: Vec<Dial> = all.iter().map(|(client, to, ..)| self.numbered(*client, *to)).collect();
        let actor = if client == LoadClient::World { &self.world } else { &self.inside };
        let seen = actor.dial_all(dials.clone())?;
        for (((.., listener, server), dial), seen) in all.iter().zip(dials).zip(seen) {
            let to = dial.to;
            let DialOutcome::Answered(answer) = &seen.outcome else { bail!("{to} is lost: {seen:?}") };
            ensure!(answer.server == *server, "{to} was answered by {answer:?}");
            ensure!(seen.peername == Some(to), "{to}: the client sees {:?}", seen.peername);
            let client = seen.sockname.context("a name")?.ip();
            *account.made.entry(((*listener).to_owned(), to, client)).or_default() += 1;
        }
        Ok(())
    }

    /// A connection that no other is like.
    fn numbered(&self, client: LoadClient, to: SocketAddr) -> Dial {
        let number = self.next.fetch_add(1, Ordering::Relaxed) % (1 << 17);
        let own: IpAddr = match to.ip() {
            IpAddr::V4(_) => Ipv4Addr::from_bits(Ipv4Addr::new(198, 18, 0, 0).to_bits() + number).into(),
            IpAddr::V6(_) => Ipv6Addr::from_bits(
                Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 1, 0).to_bits() + u128::from(number),
            )
            .into(),
        };
        // A machine that is busy elsewhere may stop for seconds.
        let dial = |ids, to| Dial { timeout: Duration::from_secs(10), ..Dial::new(ids, to) };
        match client {
            LoadClient::App => dial(Ids::APP, SocketAddr::new(own, to.port())),
            LoadClient::Proxy => dial(Ids::PROXY, to),
            LoadClient::World => Dial { from: Some(own), ..dial(Ids::ROOT, to) },
        }
    }

    /// Connections of every kind, one round.
    ///
    /// # Errors
    /// If one is lost or wrong.
    pub fn round(&self, each: usize) -> Result<LoadAccount> {
        let mut account = LoadAccount::default();
        self.dial(&mut account, LoadClient::App, each)?;
        self.dial(&mut account, LoadClient::World, each)?;
        Ok(account)
    }

    /// Connections of every kind for as long as `meanwhile` takes.
    ///
    /// # Panics
    /// If one is lost or wrong, or `meanwhile` panics.
    pub fn under_load(&self, each: usize, meanwhile: impl FnOnce()) -> LoadAccount {
        let stop = AtomicBool::new(false);
        let start = Instant::now();
        let load = |client| {
            let mut account = LoadAccount::default();
            while !stop.load(Ordering::Relaxed) {
                self.dial(&mut account, client, each).expect("a connection");
            }
            account
        };
        std::thread::scope(|scope| {
            let load = &load;
            let loads = [LoadClient::App, LoadClient::World].map(|client| scope.spawn(move || load(client)));
            let end = StopOnDrop(&stop);
            meanwhile();
            drop(end);
            let mut all = LoadAccount::default();
            for load in loads {
                all.add(load.join().expect("no connection is lost"));
            }
            all.time = start.elapsed();
            all
        })
    }

    /// What the relays had since the last call, at least `count` connections.
    ///
    /// # Panics
    /// If a relay could not connect onwards.
    pub fn relayed(&self, count: usize) -> Vec<ProxySeen> {
        let seen = |relayed: Relayed| {
            let OriginalDst::Addr(original) = relayed.original_dst else { panic!("{relayed:?}") };
            assert_eq!(relayed.error, None, "{relayed:?}");
            (relayed.relay, original, relayed.peer.ip())
        };
        self.inside.relayed(count, Duration::from_secs(10)).into_iter().map(seen).collect()
    }
}

/// Ends the load also when the test fails, which would wait for it otherwise.
struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

impl LoadAccount {
    fn add(&mut self, other: Self) {
        for (seen, count) in other.made {
            *self.made.entry(seen).or_default() += count;
        }
    }

    /// The number of connections.
    pub fn count(&self) -> usize {
        self.made.values().sum()
    }

    /// Connections per second.
    pub fn rate(&self) -> usize {
        let millis = usize::try_from(self.time.as_millis()).unwrap_or(usize::MAX);
        self.count() * 1000 / millis.max(1)
    }

    /// Asserts that the proxy had each connection once, with its original destination, and no other.
    ///
    /// # Panics
    /// If it is not so.
    #[track_caller]
    pub fn assert_each_captured_once(&self, seen: Vec<ProxySeen>) {
        let mut had: BTreeMap<ProxySeen, usize> = BTreeMap::new();
        for seen in seen {
            *had.entry(seen).or_default() += 1;
        }
        let more = |these: &BTreeMap<ProxySeen, usize>,
                    those: &BTreeMap<ProxySeen, usize>|
         -> Vec<(ProxySeen, usize)> {
            let of = |seen: &ProxySeen| those.get(seen).copied().unwrap_or_default();
            let more = these.iter().filter(|(seen, count)| **count > of(seen));
            more.map(|(seen, count)| (seen.clone(), count - of(seen))).take(10).collect()
        };
        let (bypassed, twice) = (more(&self.made, &had), more(&had, &self.made));
        assert!(
            bypassed.is_empty() && twice.is_empty(),
            "of {} connections the proxy did not have {bypassed:?}, and had besides {twice:?}",
            self.count()
        );
    }
}
