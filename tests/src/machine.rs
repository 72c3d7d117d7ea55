//! A machine as a workload: cgroups of it, or all of it, captured in the network namespace of its first process.
//!
//! The first process is that of a PID namespace (`tests/tests/machine.rs`), or that of a virtual machine (`cargo xtask vm`).
//! Only there the root cgroup is captured.

mod beside;
mod cases;
mod guard;
mod observed;
pub mod systemd;
mod units;
mod whole;

use std::{
    fs,
    net::{IpAddr, SocketAddr},
    path::Path,
    process::Command,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use ipnet::IpNet;

use crate::{
    actor::{Actor, Bind, Dial, DialOutcome, Listen, OriginalDst, Transport},
    agent::Agent,
    deadline::scaled,
    kernel::attached,
    snapshot::tree,
    testbed::{
        Cgroup, Ids, Namespace, Neighbour, Sandbox,
        netlink::{RouteSpec, TABLE_LOCAL, TABLE_MAIN},
    },
};

pub use cases::{RootCgroup, run};

/// Ports of the proxies of two workloads.
const FIRST: [u16; 2] = [15001, 15006];
const SECOND: [u16; 2] = [16001, 16006];
/// Ports of applications: the captured one's, another's, and one that is opened later.
const APP: u16 = 8080;
const OTHER: u16 = 8081;
const LATER: u16 = 8082;
const SERVICE: u16 = 80;

/// The machine with an interface, the world at its other end, and a slice for units.
struct CapturedMachine {
    agent: Agent,
    world: Actor,
    slice: Cgroup,
    /// Seconds in which a capture is to be confirmed, which must be enough to see it.
    confirm_seconds: u64,
    neighbour: Arc<Neighbour>,
}

/// A service of the machine: a process in a cgroup of its own.
struct Unit {
    actor: Actor,
    sandbox: Sandbox,
}

/// What must become of a flow.
#[derive(Clone, Copy)]
enum ExpectedPath<'a> {
    /// Through a relay of this unit.
    Proxy(&'a Unit, &'static str),
    Direct,
}

impl CapturedMachine {
    fn new(confirm_seconds: u64) -> Result<Self> {
        let netns = Namespace::of_machine()?;
        let neighbour = Neighbour::new("machine")?;
        connect(&netns, &neighbour)?;
        let world = Actor::start(&neighbour)?;
        for any in any() {
            serve(&world, "world", any, SERVICE)?;
        }
        let (agent, slice) = (Agent::new("machine")?, Cgroup::new("system.slice")?);
        Ok(Self { agent, world, slice, confirm_seconds, neighbour })
    }

    /// Starts a unit that listens on these ports.
    fn unit(&self, name: &str, ports: &[u16]) -> Result<Unit> {
        let cgroup = Cgroup::at(self.slice.path().join(format!("{name}.service")))?;
        let sandbox = Sandbox { cgroup, netns: Namespace::of_machine()? };
        let unit = Unit { actor: Actor::start(&sandbox)?, sandbox };
        for port in ports {
            for any in any() {
                serve(&unit.actor, name, any, *port)?;
            }
        }
        Ok(unit)
    }

    /// Starts a unit whose process is a proxy on these ports, outbound and inbound.
    fn proxy(&self, name: &str, ports: [u16; 2]) -> Result<Unit> {
        let unit = self.unit(name, &[])?;
        unit.actor.relays(ports)?;
        Ok(unit)
    }

    /// A command of the agent, with the cgroups of these units.
    fn command(&self, command: &str, units: &[&Unit], flags: &[&str]) -> Command {
        let mut command = self.agent.command(command);
        for unit in units {
            command.arg("--cgroup-path").arg(unit.sandbox.cgroup.path());
        }
        command.args(flags);
        command
    }

    /// Attaches units with a proxy on these ports.
    fn attach(&self, units: &[&Unit], ports: [u16; 2], flags: &[&str]) -> Command {
        let [outbound, inbound] = ports.map(|port| port.to_string());
        let mut command = self.command("attach", units, &["--machine", "-p", &outbound, "-z", &inbound]);
        command.args(["-u", "1337", "-g", "1337", "-i", "*"]).args(flags);
        command
    }

    /// Everything that a capture may change.
    fn state(&self, units: &[&Unit]) -> Result<Vec<String>> {
        let sandboxes: Vec<_> = units.iter().map(|unit| &unit.sandbox).collect();
        state(&sandboxes, self.agent.bpffs())
    }
}

/// Everything that a capture may change: hooks of these units, routes, rules, addresses, listeners, settings and
/// pins.
fn state(units: &[&Sandbox], bpffs: &Path) -> Result<Vec<String>> {
    let mut lines = Vec::new();
    for (hook, count) in units.iter().map(|unit| attached(unit)).collect::<Result<Vec<_>>>()?.concat() {
        lines.push(format!("{count} programs at {hook}"));
    }
    for file in ["route", "ipv6_route", "if_inet6", "fib_trie", "igmp6", "dev_mcast"] {
        lines.extend(table(file)?);
    }
    for file in ["tcp", "tcp6", "udp", "udp6"] {
        // Of sockets only those that listen: others come and go.
        let listening =
            table(file)?.into_iter().filter(|line| line.contains(" 0A ") || file.starts_with("udp"));
        let names = listening.filter_map(|line| Some(line.split_whitespace().nth(2)?.to_owned()));
        lines.extend(names.map(|name| format!("{file} {name}")));
    }
    for arguments in [&["-4", "rule"][..], &["-6", "rule"], &["addr"], &["link"]] {
        lines.extend(ip(arguments)?);
    }
    for folder in ["net/ipv4", "net/ipv6"] {
        read_settings(Path::new("/proc/sys").join(folder), &mut lines)?;
    }
    lines.extend(tree(bpffs)?.into_iter().map(|(path, _)| format!("pin {}", path.display())));
    lines.sort();
    Ok(lines)
}

/// A file of /proc/net without the columns that change by themselves.
fn table(file: &str) -> Result<Vec<String>> {
    let path = format!("/proc/1/net/{file}");
    let text = fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
    let line = |line: &str| {
        let mut words: Vec<_> = line.split_whitespace().collect();
        if file == "ipv6_route" && words.len() > 6 {
            // Numbers of references and of uses; flags tell whether the kernel has looked it up.
            words.drain(6..9);
        }
        format!("{file} {}", words.join(" "))
    };
    Ok(text.lines().map(line).filter(|line| !is_cached(line)).collect())
}

/// Routes to single destinations that the kernel made for sockets.
fn is_cached(line: &str) -> bool {
    line.starts_with("ipv6_route ")
        && line.split_whitespace().nth(7).is_some_and(|flags| flags.starts_with("01"))
}

fn ip(arguments: &[&str]) -> Result<Vec<String>> {
    let mut command = Command::new("ip");
    command.args(arguments);
    let said = crate::agent::succeed(command)?;
    let lines = said.lines().filter(|line| !line.contains("valid_lft"));
    Ok(lines.map(|line| format!("ip {}: {}", arguments.join(" "), line.trim())).collect())
}

fn read_settings(folder: std::path::PathBuf, found: &mut Vec<String>) -> Result<()> {
    for entry in fs::read_dir(&folder).with_context(|| format!("listing {}", folder.display()))? {
        let path = entry?.path();
        if path.is_dir() {
            read_settings(path, found)?;
        } else if let Ok(value) = fs::read_to_string(&path) {
            found.push(format!("{} = {}", path.display(), value.trim()));
        }
    }
    Ok(())
}

/// The lines that only one of two states has.
fn difference(before: &[String], after: &[String]) -> Vec<String> {
    let gone = before.iter().filter(|line| !after.contains(line)).map(|line| format!("- {line}"));
    let new = after.iter().filter(|line| !before.contains(line)).map(|line| format!("+ {line}"));
    gone.chain(new).collect()
}

fn any() -> [IpAddr; 2] {
    [IpAddr::from([0, 0, 0, 0]), IpAddr::from([0u16; 8])]
}

/// The machine's own address.
fn own(v6: bool) -> IpAddr {
    if v6 { "fd66::2" } else { "10.66.0.2" }.parse().expect("an address")
}

/// An address outside.
fn service(v6: bool) -> IpAddr {
    if v6 { "fd96::10" } else { "10.96.0.10" }.parse().expect("an address")
}

fn serve(actor: &Actor, name: &str, any: IpAddr, port: u16) -> Result<crate::actor::Listening> {
    let bind = Bind::new(Ids::ROOT, SocketAddr::new(any, port));
    actor.listen(Listen { name: name.into(), transport: Transport::Tcp, bind })
}

/// Connects the machine to the world.
fn connect(netns: &Namespace, world: &Sandbox) -> Result<()> {
    let net = |text: &str| text.parse::<IpNet>().expect("an address with prefix");
    netns.veth("eth0", &world.netns, "machine0")?;
    for address in ["10.66.0.1/24", "fd66::1/64"].map(net) {
        world.netns.add_address("machine0", address)?;
        let link = RouteSpec {
            to: address.trunc(),
            via: None,
            dev: Some("machine0"),
            table: TABLE_LOCAL,
            local: false,
        };
        world.netns.add_route(link)?;
    }
    for address in ["10.66.0.2/24", "fd66::2/64"].map(net) {
        netns.add_address("eth0", address)?;
    }
    for (to, via) in [("0.0.0.0/0", "10.66.0.1"), ("::/0", "fd66::1")] {
        let via = Some(via.parse().expect("an address"));
        netns.add_route(RouteSpec {
            to: net(to),
            via,
            dev: Some("eth0"),
            table: TABLE_MAIN,
            local: false,
        })?;
    }
    Ok(())
}

/// Makes a connection and compares what all ends saw. No relay of `proxies` may see it, except the one that it must go
/// through.
fn flow(
    what: &str,
    client: &Actor,
    ids: Ids,
    to: SocketAddr,
    server: &str,
    way: ExpectedPath<'_>,
    proxies: &[&Unit],
) -> Result<()> {
    let dialled = client.dial(Dial::new(ids, to))?;
    let DialOutcome::Answered(answer) = &dialled.outcome else {
        anyhow::bail!("{what}, {to}: no answer: {:?}", dialled.outcome);
    };
    ensure!(answer.server == server, "{what}, {to}: answered by {}, not {server}", answer.server);
    ensure!(dialled.peername == Some(to), "{what}, {to}: the client's peer is {:?}", dialled.peername);
    for proxy in proxies {
        let must = matches!(way, ExpectedPath::Proxy(unit, _) if std::ptr::eq(unit, *proxy));
        let wait = if must { scaled(Duration::from_secs(5)) } else { Duration::ZERO };
        let relayed = proxy.actor.relayed(usize::from(must), wait);
        let through: Vec<_> = relayed.iter().map(|relayed| relayed.relay.as_str()).collect();
        match way {
            ExpectedPath::Proxy(_, relay) if must => {
                ensure!(through == [relay], "{what}, {to}: went through {through:?}, not {relay}");
                let original = relayed[0].original_dst;
                ensure!(original == OriginalDst::Addr(to), "{what}, {to}: the proxy was told {original:?}");
                let peer = relayed[0].peer.ip().to_canonical();
                let name = dialled.sockname.map(|name| name.ip().to_canonical());
                ensure!(name == Some(peer), "{what}, {to}: the proxy saw {peer}, the client is {name:?}");
            }
            _ => ensure!(through.is_empty(), "{what}, {to}: went through {through:?} of a proxy"),
        }
    }
    Ok(())
}
