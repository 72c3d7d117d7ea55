//! `cargo xtask demo`: one pod, both directions, shown as a table.
//!
//! Creates a pod and its neighbour, starts a proxy as user 1337, an application and a remote client, and attaches with the
//! flags of Istio's init container. Then it sends traffic in both directions, and prints for each flow the destination, the
//! socket that it reached, the original destination that the proxy recovered, and the row that decided. Fails if any of
//! these is wrong.

use std::{
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    process::{Command, ExitCode},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use clap::{Parser, ValueEnum};
use intercept_common::Family;
use serde_json::Value;
use tests::{
    actor::{
        Actor, Bind, Dial, DialOutcome, Dialled, Listen, OriginalDst, Relayed, Transport,
        binary::ReadableCopy,
    },
    cases,
    deadline::scaled,
    envoy::{self, Sidecar, Speaks},
    machine::{self, systemd::SystemdSuite},
    testbed::{self, Ids, Pod, PodSpec},
};

/// The flags of Istio's init container.
const INIT_FLAGS: [&str; 14] =
    ["-p", "15001", "-z", "15006", "-u", "1337", "-m", "REDIRECT", "-i", "*", "-x", "", "-b", "*"];
const INIT_EXCLUDED: [&str; 2] = ["-d", "15090,15020"];
const APP_PORT: u16 = 8080;
const METRICS_PORT: u16 = 15090;
const WORLD_PORT: u16 = 80;

#[derive(Parser)]
struct DemoArguments {
    /// The agent
    #[arg(long, env = "INTERCEPT_AGENT", default_value = "target/release/intercept-agent")]
    agent: PathBuf,
    /// The sidecar proxy
    #[arg(long, value_enum, default_value_t = DemoProxy::Relay)]
    proxy: DemoProxy,
    /// Path of Envoy, for --proxy envoy
    #[arg(long, env = "INTERCEPT_ENVOY")]
    envoy: Option<PathBuf>,
    /// Run the cases that need no tools instead, or only those whose names contain this text
    #[arg(long, num_args = 0..=1, default_missing_value = "", value_name = "NAME")]
    cases: Option<String>,
    /// Run the cases of joined connections instead, or check that this kernel is refused for them
    #[arg(long, conflicts_with = "cases")]
    joined: bool,
    /// Capture this machine instead, whose first process is in its network namespace
    #[arg(long, value_enum, conflicts_with = "cases")]
    machine: Option<DemoMachine>,
    /// Run these cases on this machine instead, whose first process is systemd
    #[arg(long, value_enum, conflicts_with_all = ["cases", "machine"])]
    systemd: Option<SystemdSuite>,
    /// Check instead that this kernel, which lacks something, is refused with the words of `check`
    #[arg(long, conflicts_with = "cases")]
    refused: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum DemoMachine {
    /// Its root cgroup as well
    Whole,
    /// Only cgroups that are made for it
    Units,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum DemoProxy {
    /// A small proxy that is built in
    Relay,
    /// Envoy
    Envoy,
}

fn main() -> ExitCode {
    let options = DemoArguments::parse();
    let (done, failure) = match &options {
        DemoArguments { cases: Some(filter), .. } => {
            (cases::run(filter).map(|failed| failed == 0), "a case does not hold")
        }
        DemoArguments { machine: Some(which), .. } => (captured_machine(*which), "a case does not hold"),
        DemoArguments { systemd: Some(suite), .. } => {
            (machine::systemd::run(*suite).map(|failed| failed == 0), "a case does not hold")
        }
        DemoArguments { refused: true, .. } => (refused(), ""),
        DemoArguments { joined: true, .. } => (joined(), ""),
        _ => (demo(&options), "a flow did not go where it must"),
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => {
            eprintln!("error: {failure}");
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn captured_machine(which: DemoMachine) -> Result<bool> {
    let root = match which {
        DemoMachine::Whole => machine::RootCgroup::Capture,
        DemoMachine::Units => machine::RootCgroup::Spare,
    };
    Ok(machine::run("", root)? == 0)
}

fn joined() -> Result<bool> {
    println!("{}", tests::joined::cases::run()?);
    Ok(true)
}

fn refused() -> Result<bool> {
    println!("{}", cases::refused_as_checked()?);
    println!("refused in the words of check");
    Ok(true)
}

/// A flow and its expected result.
struct DemoFlow {
    what: &'static str,
    from: Dialler,
    ids: Ids,
    to: SocketAddr,
    mapped: bool,
    expect: Expect,
}

/// Who dials.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Dialler {
    Pod,
    World,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Expect {
    ProxyOut,
    ProxyIn,
    Direct,
}

impl Expect {
    fn as_str(self) -> &'static str {
        match self {
            Self::ProxyOut => "proxy, outbound",
            Self::ProxyIn => "proxy, inbound",
            Self::Direct => "direct",
        }
    }
}

fn flows(pod: &Pod) -> Vec<DemoFlow> {
    let world = |text: &str, port| SocketAddr::new(text.parse().expect("an address"), port);
    let mut flows = Vec::new();
    for (family, service) in [(Family::V4, "10.96.0.10"), (Family::V6, "fd96::10")] {
        let own = pod.address(family);
        let localhost: IpAddr =
            if family == Family::V6 { [0, 0, 0, 0, 0, 0, 0, 1].into() } else { [127, 0, 0, 1].into() };
        let mut flow = |what, from, ids, to, expect| {
            flows.push(DemoFlow { what, from, ids, to, mapped: false, expect });
        };
        flow("the app calls a service", Dialler::Pod, Ids::APP, world(service, WORLD_PORT), Expect::ProxyOut);
        flow(
            "a client calls the app",
            Dialler::World,
            Ids::ROOT,
            SocketAddr::new(own, APP_PORT),
            Expect::ProxyIn,
        );
        flow(
            "a client scrapes an excluded port",
            Dialler::World,
            Ids::ROOT,
            SocketAddr::new(own, METRICS_PORT),
            Expect::Direct,
        );
        flow(
            "the proxy calls a service",
            Dialler::Pod,
            Ids::PROXY,
            world(service, WORLD_PORT),
            Expect::Direct,
        );
        flow(
            "the app calls localhost",
            Dialler::Pod,
            Ids::APP,
            SocketAddr::new(localhost, APP_PORT),
            Expect::Direct,
        );
        flow(
            "the app calls its own address",
            Dialler::Pod,
            Ids::APP,
            SocketAddr::new(own, APP_PORT),
            Expect::Direct,
        );
        flow(
            "the proxy calls its own pod",
            Dialler::Pod,
            Ids::PROXY,
            SocketAddr::new(own, APP_PORT),
            Expect::ProxyIn,
        );
    }
    flows.push(DemoFlow {
        what: "the app calls IPv4 through IPv6",
        from: Dialler::Pod,
        ids: Ids::APP,
        to: world("10.96.0.10", WORLD_PORT),
        mapped: true,
        expect: Expect::ProxyOut,
    });
    flows
}

fn demo(options: &DemoArguments) -> Result<bool> {
    ensure!(options.agent.exists(), "{} is not built: `cargo build --release`", options.agent.display());
    testbed::sweep::sweep()?;
    println!("a pod, its neighbour, and a proxy as user 1337");
    let pod = Pod::new(PodSpec::new("demo"))?;
    let world = Actor::start(pod.neighbour())?;
    let inside = Actor::start(&pod)?;
    for any in [IpAddr::from([0, 0, 0, 0]), IpAddr::from([0u16; 8])] {
        serve(&world, "world", Ids::ROOT, any, WORLD_PORT)?;
        serve(&inside, "app", Ids::APP, any, APP_PORT)?;
        serve(&inside, "metrics", Ids::APP, any, METRICS_PORT)?;
    }
    let sidecar = match options.proxy {
        DemoProxy::Relay => {
            inside.relays([15001, 15006])?;
            None
        }
        DemoProxy::Envoy => {
            let program = options.envoy.clone().map_or_else(envoy::program, Ok)?;
            let program = ReadableCopy::of(&program)?;
            Some((Sidecar::start(&program, &pod, Speaks::Tcp)?, program))
        }
    };
    let mut reports =
        Reports { inside: &inside, sidecar: sidecar.as_ref().map(|(sidecar, _)| sidecar), logged: 0 };

    let agent = DemoAgent { binary: &options.agent, cgroup: pod.cgroup.path(), netns: pod.netns.path() };
    println!(
        "intercept-agent attach {}",
        [&INIT_FLAGS[..], &INIT_EXCLUDED[..]]
            .concat()
            .iter()
            .map(|arg| quote(arg))
            .collect::<Vec<_>>()
            .join(" ")
    );
    print!(
        "{}",
        agent.run(
            &[
                &["attach", "--netns", &agent.netns.display().to_string()],
                &INIT_FLAGS[..],
                &INIT_EXCLUDED[..]
            ]
            .concat()
        )?
    );
    let shown = show(&flows(&pod), &pod, &agent, &mut reports, &world);
    print!("{}", agent.run(&["detach"])?);
    let (right, made) = shown?;
    drop((sidecar, inside, world, pod));
    let left = testbed::sweep::leftovers(std::process::id())?;
    ensure!(left.is_empty(), "left behind: {left:?}");
    println!("nothing is left behind");
    println!("{right} of {made} flows");
    Ok(right == made)
}

fn quote(arg: &str) -> String {
    if arg.is_empty() || arg == "*" { format!("'{arg}'") } else { arg.to_owned() }
}

fn serve(actor: &Actor, name: &str, ids: Ids, any: IpAddr, port: u16) -> Result<()> {
    let bind = Bind::new(ids, SocketAddr::new(any, port));
    actor.listen(Listen { name: name.into(), transport: Transport::Tcp, bind }).map(drop)
}

struct DemoAgent<'a> {
    binary: &'a Path,
    cgroup: &'a Path,
    netns: &'a Path,
}

impl DemoAgent<'_> {
    fn run(&self, args: &[&str]) -> Result<String> {
        let (command, rest) = args.split_first().context("no command")?;
        let output = Command::new(self.binary)
            .args(["--log", "warn", command, "--cgroup-path"])
            .arg(self.cgroup)
            .args(rest)
            .output()
            .with_context(|| format!("starting {}", self.binary.display()))?;
        ensure!(
            output.status.success(),
            "intercept-agent {command}: {}{}",
            output.status,
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(String::from_utf8(output.stdout)?)
    }

    /// The reason that `explain` gives for a flow.
    fn reason(&self, flow: &DemoFlow, client: Option<SocketAddr>) -> Result<String> {
        let direction = if flow.from == Dialler::World { "inbound" } else { "outbound" };
        let (dst, port, uid) =
            (flow.to.ip().to_string(), flow.to.port().to_string(), flow.ids.uid.to_string());
        let mut args = vec![
            "explain", direction, "--json", "--dst", &dst, "--dport", &port, "--uid", &uid, "--gid", &uid,
        ];
        let src = client.map(|client| client.ip().to_string());
        if let (Dialler::World, Some(src)) = (flow.from, &src) {
            args.extend(["--src", src]);
        }
        let answer: Value = serde_json::from_str(&self.run(&args)?)?;
        let text = |key: &str| answer[key].as_str().unwrap_or_default().to_owned();
        Ok(format!("{} ({})", text("because"), text("row")))
    }
}

fn show(
    flows: &[DemoFlow],
    pod: &Pod,
    agent: &DemoAgent<'_>,
    reports: &mut Reports<'_>,
    world: &Actor,
) -> Result<(usize, usize)> {
    let mut rows = vec![
        ["flow", "dialled", "went to", "original destination", "peer the proxy saw", "because", ""]
            .map(str::to_owned),
    ];
    let mut right = 0;
    for flow in flows {
        let actor = if flow.from == Dialler::World { world } else { reports.inside };
        let dial = Dial { mapped: flow.mapped, ..Dial::new(flow.ids, flow.to) };
        let dialled = actor.dial(dial)?;
        let relayed = reports.of(flow)?;
        let verdict = judge(flow, &dialled, relayed.as_ref(), pod);
        right += usize::from(verdict.is_ok());
        rows.push([
            flow.what.to_owned(),
            flow.to.to_string(),
            went_to(&dialled, relayed.as_ref()),
            relayed.as_ref().map_or("-".to_owned(), |r| original(r.original_dst)),
            relayed.as_ref().map_or("-".to_owned(), |r| r.peer.ip().to_string()),
            agent.reason(flow, dialled.sockname)?,
            verdict.map_or_else(|why| format!("WRONG: {why}"), |()| "ok".to_owned()),
        ]);
    }
    table(&rows);
    Ok((right, flows.len()))
}

/// The reports of the proxy on its flows.
struct Reports<'a> {
    /// The actor with the built-in relay.
    inside: &'a Actor,
    sidecar: Option<&'a Sidecar>,
    /// Number of lines of the sidecar's log that have been read.
    logged: usize,
}

impl Reports<'_> {
    /// Returns the report of the last flow. `None` if it bypassed the proxy.
    fn of(&mut self, flow: &DemoFlow) -> Result<Option<Relayed>> {
        let (expected, patience) = match flow.expect {
            Expect::Direct => (0, Duration::ZERO),
            _ => (1, scaled(Duration::from_secs(3))),
        };
        let Some(sidecar) = self.sidecar else {
            return Ok(self.inside.relayed(expected, patience).into_iter().next());
        };
        let lines = sidecar.logged(self.logged + expected, patience)?;
        let new = lines.get(self.logged).cloned();
        self.logged = lines.len();
        new.map(|line| {
            let original: SocketAddr = line.original.parse()?;
            Ok(Relayed {
                relay: line.listener,
                original_dst: OriginalDst::Addr(original),
                local: original,
                peer: line.client.parse()?,
                error: None,
            })
        })
        .transpose()
    }
}

fn original(original: OriginalDst) -> String {
    match original {
        OriginalDst::Addr(addr) => addr.to_string(),
        OriginalDst::Errno(errno) => format!("error {errno}"),
    }
}

fn went_to(dialled: &Dialled, relayed: Option<&Relayed>) -> String {
    let served = match &dialled.outcome {
        DialOutcome::Answered(answer) => answer.server.clone(),
        other => format!("{other:?}"),
    };
    match relayed {
        Some(relayed) => format!("proxy, {} -> {served}", relayed.relay),
        None => served,
    }
}

/// Checks what all ends saw.
fn judge(flow: &DemoFlow, dialled: &Dialled, relayed: Option<&Relayed>, pod: &Pod) -> Result<(), String> {
    let DialOutcome::Answered(_) = &dialled.outcome else {
        return Err(format!("no answer: {:?}", dialled.outcome));
    };
    let by = relayed.map_or(Expect::Direct, |relayed| {
        if relayed.relay == "outbound" { Expect::ProxyOut } else { Expect::ProxyIn }
    });
    if by != flow.expect {
        return Err(format!("went {}, must go {}", by.as_str(), flow.expect.as_str()));
    }
    let unmapped = |addr: SocketAddr| SocketAddr::new(addr.ip().to_canonical(), addr.port());
    if dialled.peername.map(unmapped) != Some(flow.to) {
        return Err(format!("the client's peer is {:?}", dialled.peername));
    }
    let Some(relayed) = relayed else { return Ok(()) };
    if relayed.original_dst != OriginalDst::Addr(flow.to) {
        return Err(format!("the original destination is {}", original(relayed.original_dst)));
    }
    if dialled.sockname.map(unmapped) != Some(unmapped(relayed.peer)) {
        return Err(format!("the client is {:?}, the proxy saw {}", dialled.sockname, relayed.peer));
    }
    let own = pod.address(Family::of(&flow.to.ip()));
    if flow.from == Dialler::Pod && relayed.peer.ip().to_canonical() != own {
        return Err(format!("the proxy saw {} in place of {own}", relayed.peer.ip()));
    }
    Ok(())
}

fn table<const N: usize>(rows: &[[String; N]]) {
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..N).map(width).collect();
    for row in rows {
        let line: Vec<String> =
            row.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        println!("{}", line.join("  ").trim_end());
    }
}
