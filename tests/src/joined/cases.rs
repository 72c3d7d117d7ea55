//! Cases of joined connections that need no tools, for virtual machines. If the kernel is refused, the check that failed
//! must be named, and nothing may be changed.

use std::{io::Write as _, net::Shutdown, process::Output};

use anyhow::{Context as _, Result, ensure};
use intercept_common::Family;
use rand::{Rng as _, SeedableRng as _, rngs::SmallRng};

use super::{APP, Leg, PodPair, given_to_tcp, goes_past, pass, receive, send};
use crate::agent::{Agent, INIT_FLAGS, finish, succeed};

type JoinedCase = fn(&Agent, &PodPair) -> Result<()>;

/// Runs the cases. Returns a line for the report.
pub fn run() -> Result<String> {
    let agent = Agent::new("joined-cases")?;
    let mut check = agent.command("check");
    check.arg("--accelerate");
    let checked = finish(&mut check)?;
    print!("{}", String::from_utf8_lossy(&checked.stdout));
    if !checked.status.success() {
        return refused(&agent, &checked);
    }
    let pods = PodPair::accelerated("joined-cases", &agent)?;
    let cases: [(&str, JoinedCase); 5] = [
        ("both families", both_families),
        ("streams in both directions", streams),
        ("the switch of the node", switch),
        ("a reader that does not read", unread),
        ("the end of a stream", end),
    ];
    for (what, case) in cases {
        case(&agent, &pods).with_context(|| what)?;
        println!("ok     {what}");
    }
    Ok(format!("joined, {} cases", cases.len()))
}

/// Attaches with the option on a kernel that is refused. The error must be that of `check`.
fn refused(agent: &Agent, checked: &Output) -> Result<String> {
    let said = |output: &Output| String::from_utf8_lossy(&output.stderr).trim().replace("error: ", "");
    let why = said(checked);
    let why = why.lines().last().context("check says nothing")?;
    let pods = PodPair::new("joined-refused")?;
    let flags: Vec<_> = INIT_FLAGS.into_iter().chain(["--accelerate"]).collect();
    let attached = finish(&mut agent.for_pod("attach", &pods.dialler, &flags))?;
    ensure!(!attached.status.success(), "check refuses, and attach does not: {why}");
    let names = why.rsplit(": ").next().unwrap_or(why);
    ensure!(said(&attached).contains(names), "check says {why}, attach says {}", said(&attached));
    ensure!(!agent.bpffs().join("intercept").join("pods").exists(), "a refused attach has left something");
    Ok(format!("refused: {why}"))
}

fn leg(pods: &PodPair, family: Family) -> Result<Leg> {
    let listener = pods.listen(family)?;
    let leg = pods.connect(&listener, PodPair::app(family))?;
    leg.greet()?;
    Ok(leg)
}

fn are_past(leg: &Leg) -> Result<bool> {
    Ok(goes_past(&leg.dialled, &leg.accepted)? && goes_past(&leg.accepted, &leg.dialled)?)
}

fn both_families(_agent: &Agent, pods: &PodPair) -> Result<()> {
    for family in Family::ALL {
        ensure!(are_past(&leg(pods, family)?)?, "not joined: {family:?}, port {APP}");
    }
    Ok(())
}

fn streams(_agent: &Agent, pods: &PodPair) -> Result<()> {
    let leg = leg(pods, Family::V4)?;
    let mut random = SmallRng::seed_from_u64(1);
    for round in 0..400 {
        let mut bytes = vec![0; random.random_range(1..20_000)];
        random.fill(&mut bytes[..]);
        let (from, to) =
            if round % 2 == 0 { (&leg.dialled, &leg.accepted) } else { (&leg.accepted, &leg.dialled) };
        for piece in bytes.chunks(random.random_range(1_000..20_000)) {
            send(from, piece)?;
        }
        ensure!(receive(to, bytes.len())? == bytes, "other bytes than were sent, in round {round}");
    }
    Ok(())
}

fn switch(agent: &Agent, pods: &PodPair) -> Result<()> {
    let leg = leg(pods, Family::V4)?;
    for (switch, past) in [("off", false), ("on", true)] {
        let mut command = agent.command("accelerate");
        command.arg(switch);
        succeed(command)?;
        leg.greet()?;
        ensure!(goes_past(&leg.dialled, &leg.accepted)? == past, "switched {switch}");
    }
    Ok(())
}

fn unread(_agent: &Agent, pods: &PodPair) -> Result<()> {
    let leg = leg(pods, Family::V4)?;
    let before = given_to_tcp(&leg.dialled)?;
    let (mut sent, piece) = (0, vec![1; 16 << 10]);
    while let Ok(written) = (&leg.dialled).write(&piece) {
        sent += written;
        ensure!(sent < 64 << 20, "nothing stops the sender");
    }
    let past = sent - usize::try_from(given_to_tcp(&leg.dialled)? - before)?;
    ensure!(past > 0 && past <= 1 << 20, "{past} bytes past TCP");
    receive(&leg.accepted, sent)?;
    leg.greet()?;
    ensure!(are_past(&leg)?, "it does not join again");
    Ok(())
}

fn end(_agent: &Agent, pods: &PodPair) -> Result<()> {
    let leg = leg(pods, Family::V4)?;
    send(&leg.dialled, b"the last bytes")?;
    leg.dialled.shutdown(Shutdown::Write)?;
    ensure!(receive(&leg.accepted, 14)? == b"the last bytes", "other bytes than were sent");
    super::wait(&leg.accepted, rustix::event::PollFlags::IN)?;
    let end = std::io::Read::read(&mut &leg.accepted, &mut [0])?;
    ensure!(end == 0, "more than was sent");
    // The other direction stays open.
    pass(&leg.accepted, &leg.dialled, b"goodbye")?;
    Ok(())
}
