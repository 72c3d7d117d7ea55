//! Sockets that are used more than once, and destinations that mean another: by the calls of `crate::steps`.

use anyhow::{Result, ensure};

use super::captured;
use crate::{
    agent::Agent,
    steps::{SocketKind, Step, run},
    testbed::Ids,
};

const DNS: [&str; 2] = ["--redirect-dns", "--capture-all-dns"];

/// What the steps give in a pod that is captured with Istio's flags and more.
fn gives(agent: &Agent, more: &[&str], ids: Ids, steps: &[Step], expected: &[&str]) -> Result<()> {
    let fixture = captured(agent, "reuse", more)?;
    let outcomes = run(&fixture.pod, ids, steps)?;
    ensure!(outcomes == expected, "{steps:?}: {outcomes:?}, not {expected:?}");
    Ok(())
}

pub(super) fn unspecified(agent: &Agent) -> Result<()> {
    let steps = [Step::Open(SocketKind::Tcp4), Step::Connect("0.0.0.0:8080".parse()?), Step::Peer];
    gives(agent, &[], Ids::APP, &steps, &["ok", "ok", "127.0.0.1:8080"])?;
    let steps = [Step::Open(SocketKind::Tcp6), Step::Connect("[::]:8080".parse()?), Step::Peer];
    gives(agent, &[], Ids::APP, &steps, &["ok", "ok", "[::1]:8080"])?;
    let steps = [Step::Open(SocketKind::Udp4), Step::AskAt("0.0.0.0:53".parse()?)];
    gives(agent, &DNS, Ids::APP, &steps, &["ok", "dns by 127.0.0.1:53"])
}

pub(super) fn disconnected(agent: &Agent) -> Result<()> {
    for (kind, to, own) in [
        (SocketKind::Tcp4, "198.51.100.7:80", "10.66.0.2:*"),
        (SocketKind::Tcp6, "[2001:db8::7]:80", "[fd66::2]:*"),
    ] {
        let localhost = if kind == SocketKind::Tcp4 { "127.0.0.1:8080" } else { "[::1]:8080" };
        let steps = [
            Step::Open(kind),
            Step::Connect(to.parse()?),
            Step::Name,
            Step::Disconnect,
            Step::Connect(localhost.parse()?),
            Step::Peer,
        ];
        gives(agent, &[], Ids::APP, &steps, &["ok", "ok", own, "ok", "ok", localhost])?;
    }
    Ok(())
}

pub(super) fn one_port(agent: &Agent) -> Result<()> {
    for (kind, any, first, second, own) in [
        (SocketKind::Tcp4, "0.0.0.0:5555", "198.51.100.7:80", "198.51.100.8:80", "10.66.0.2:5555"),
        (SocketKind::Tcp6, "[::]:5555", "[2001:db8::7]:80", "[2001:db8::8]:80", "[fd66::2]:5555"),
    ] {
        let mut steps = Vec::new();
        for to in [first, second] {
            steps.extend([Step::Open(kind), Step::ReuseAddress, Step::Bind(any.parse()?)]);
            steps.extend([Step::Connect(to.parse()?), Step::Name, Step::Peer]);
        }
        let expected = ["ok", "ok", "ok", "ok", own, first, "ok", "ok", "ok", "ok", own, second];
        gives(agent, &[], Ids::APP, &steps, &expected)?;
    }
    Ok(())
}

pub(super) fn interface(agent: &Agent) -> Result<()> {
    let steps = [
        Step::Open(SocketKind::Udp4),
        Step::UnicastInterface("eth0".into()),
        Step::AskAt("10.96.0.10:53".parse()?),
        Step::AskBy("10.96.0.10:53".parse()?, "eth0".into()),
    ];
    let answered = "dns by 10.96.0.10:53";
    gives(agent, &DNS, Ids::APP, &steps, &["ok", "ok", answered, answered])
}

pub(super) fn other_server(agent: &Agent) -> Result<()> {
    let steps = [
        Step::Open(SocketKind::Udp4),
        Step::Connect("10.96.0.10:53".parse()?),
        Step::Ask,
        Step::Disconnect,
        Step::Connect("10.96.0.11:53".parse()?),
        Step::Name,
        Step::Ask,
    ];
    let expected = ["ok", "ok", "dns by 10.96.0.10:53", "ok", "ok", "10.66.0.2:*", "dns by 10.96.0.11:53"];
    gives(agent, &DNS, Ids::APP, &steps, &expected)
}
