//! What `audit` and `prove` say of a workload, and addresses that its listeners do not have.

use std::{
    io::{BufRead as _, BufReader},
    net::{IpAddr, SocketAddr},
    process::{Child, Stdio},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;

use super::{
    APP, CapturedMachine, ExpectedPath, FIRST, LATER, OTHER, SECOND, Unit, any, difference, flow, own, serve,
};
use crate::{
    actor::{Bind, Listen, Transport},
    agent::{finish, succeed},
    testbed::{
        Ids, Namespace,
        netlink::{RouteSpec, TABLE_LOCAL},
    },
};

/// A connection of a unit that stays open until it is dropped.
struct HeldConnection(Child);

impl Drop for HeldConnection {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

impl HeldConnection {
    fn open(unit: &Unit) -> Result<Self> {
        let mut bash = unit.sandbox.command_as("bash", Ids::APP)?;
        bash.args(["-c", "exec 3<>/dev/tcp/10.96.0.10/80 && echo open && exec sleep 600"]);
        let mut child = bash.stdout(Stdio::piped()).spawn().context("starting bash")?;
        let output = child.stdout.take().context("no output")?;
        let held = Self(child);
        let mut said = String::new();
        BufReader::new(output).read_line(&mut said)?;
        ensure!(said == "open\n", "bash did not connect");
        Ok(held)
    }
}

/// Of several units with open connections, `audit` names those of the workload.
pub(super) fn audit(machine: &CapturedMachine) -> Result<()> {
    let (app, other) = (machine.unit("app", &[APP])?, machine.unit("other", &[OTHER])?);
    let envoy = machine.proxy("envoy", FIRST)?;
    let early = (HeldConnection::open(&app)?, HeldConnection::open(&other)?);
    succeed(machine.attach(&[&app, &envoy], FIRST, &["-b", "*"]))?;
    let audit = |unit: &Unit| -> Result<Value> {
        Ok(serde_json::from_str(&succeed(machine.command("audit", &[unit], &["--json"]))?)?)
    };
    for unit in [&app, &envoy] {
        let found = audit(unit)?;
        let bypasses = found["bypasses"].as_array().context("no list")?;
        ensure!(bypasses.len() == 1, "{found:#}");
        ensure!(bypasses[0]["cause"] == "before_capture" && bypasses[0]["process"] == "sleep", "{found:#}");
        ensure!(bypasses[0]["pid"] == early.0.0.id(), "{found:#}");
    }
    let later = (HeldConnection::open(&app)?, HeldConnection::open(&other)?);
    drop(early);
    let found = audit(&app)?;
    ensure!(found["captured"] == 1 && found["bypasses"] == Value::Array(Vec::new()), "{found:#}");
    drop(later);
    succeed(machine.command("detach", &[&app], &["--machine"])).map(drop)
}

/// Returns a state that is the same a moment later: the kernel enters the route of an IPv6 address after the address.
fn settled(state: impl Fn() -> Result<Vec<String>>) -> Result<Vec<String>> {
    let mut last = state()?;
    for _ in 0..50 {
        thread::sleep(Duration::from_millis(100));
        let next = state()?;
        if difference(&last, &next).is_empty() {
            return Ok(next);
        }
        last = next;
    }
    bail!("the state of the machine changes all the time")
}

/// `prove` makes connections of a unit, and asks for one to a port of its own.
pub(super) fn prove(machine: &CapturedMachine) -> Result<()> {
    let (app, second) = (machine.unit("app", &[APP])?, machine.unit("second", &[])?);
    // A relay would reset what it cannot connect onward.
    let envoy = machine.unit("envoy", &[])?;
    for (any, port) in any().into_iter().flat_map(|any| FIRST.map(|port| (any, port))) {
        let bind = Bind::new(Ids::PROXY, SocketAddr::new(any, port));
        envoy.actor.listen(Listen { name: "envoy".into(), transport: Transport::Tcp, bind })?;
    }
    succeed(machine.attach(&[&app, &envoy], FIRST, &["-b", "*"]))?;
    let before = settled(|| machine.state(&[&app, &envoy]))?;
    for unit in [&app, &envoy] {
        let said = succeed(machine.command("prove", &[unit], &["--machine", "--json"]))?;
        let proof: Value = serde_json::from_str(&said)?;
        let legs = proof["legs"].as_array().context("no legs")?;
        ensure!(legs.len() == 4 && legs.iter().all(|leg| leg["state"] == "proven"), "{proof:#}");
        let inbound: Vec<_> = legs.iter().filter(|leg| leg["direction"] == "inbound").collect();
        for (leg, v6) in inbound.iter().zip([false, true]) {
            let to = SocketAddr::new(own(v6), APP).to_string();
            ensure!(leg["destination"] == to.as_str(), "{proof:#}");
        }
    }
    let left = difference(&before, &machine.state(&[&app, &envoy])?);
    ensure!(left.is_empty(), "a proof leaves: {left:#?}");

    // Without a proxy, and without a port that is captured.
    succeed(machine.attach(&[&second], SECOND, &["-b", "*"]))?;
    let output = finish(&mut machine.command("prove", &[&second], &["--json"]))?;
    let proof: Value = serde_json::from_slice(&output.stdout)?;
    let state = |leg: &Value| leg["state"].as_str().unwrap_or_default().to_owned();
    let states: Vec<_> = proof["legs"].as_array().context("no legs")?.iter().map(state).collect();
    ensure!(states == ["failed", "failed", "nothing_to_prove", "nothing_to_prove"], "{proof:#}");
    ensure!(output.status.code() == Some(126), "{}", output.status);
    for unit in [&app, &second] {
        succeed(machine.command("detach", &[unit], &["--machine"]))?;
    }
    Ok(())
}

/// Addresses of the machine whose hash is the same as that of [`own`], and as that of the wildcard address.
const ALIKE: &str = "fd66:3::1";
const AS_WILDCARD: &str = "fd66:4::fd66:4";

/// Two units listen on the same port of different addresses, whose keys in LISTENERS are the same.
pub(super) fn alike(machine: &CapturedMachine) -> Result<()> {
    let netns = Namespace::of_machine()?;
    for text in [ALIKE, AS_WILDCARD] {
        let address = format!("{text}/128").parse()?;
        netns.add_address("eth0", address)?;
        let via =
            RouteSpec { to: address, via: None, dev: Some("machine0"), table: TABLE_LOCAL, local: false };
        machine.neighbour.netns.add_route(via)?;
    }
    let (app, other) = (machine.unit("app", &[])?, machine.unit("other", &[])?);
    let envoy = machine.proxy("envoy", FIRST)?;
    let (alike, as_wildcard): (IpAddr, IpAddr) = (ALIKE.parse()?, AS_WILDCARD.parse()?);
    // One before the attach, one after it.
    serve(&app.actor, "app", own(true), LATER)?;
    succeed(machine.attach(&[&app, &envoy], FIRST, &["-b", "*"]))?;
    serve(&other.actor, "other", alike, LATER)?;
    serve(&app.actor, "app", as_wildcard, APP)?;
    serve(&other.actor, "other", own(true), APP)?;
    let inbound = ExpectedPath::Proxy(&envoy, "inbound");
    for (to, port, server, way) in [
        (own(true), LATER, "app", inbound),
        (alike, LATER, "other", ExpectedPath::Direct),
        (as_wildcard, APP, "app", inbound),
        (own(true), APP, "other", ExpectedPath::Direct),
    ] {
        flow("a client calls", &machine.world, Ids::ROOT, SocketAddr::new(to, port), server, way, &[&envoy])?;
    }
    succeed(machine.command("detach", &[&app], &["--machine"]))?;
    for text in [ALIKE, AS_WILDCARD] {
        netns.delete_address("eth0", format!("{text}/128").parse()?)?;
    }
    Ok(())
}
