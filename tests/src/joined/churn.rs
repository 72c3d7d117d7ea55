//! Short connections between proxies in pods that are easily confused: they have equal addresses, and ports that are used
//! again at once, behind rewritten destinations and sources, and with SYN cookies. Each end sends its identity first. All
//! bytes after that are compared.

pub mod end;

use std::{
    io::{BufRead as _, BufReader, Write as _},
    net::SocketAddr,
    path::Path,
    process::{Child, ChildStdout, Command, Stdio},
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use intercept_common::Family;

use self::end::{ChurnProgress, READY};
use super::{PodPair, footprint, joined};
use crate::{
    actor::binary::{self, ReadableCopy},
    agent::{Agent, INIT_FLAGS},
    testbed::{Ids, Sandbox},
};

/// How often progress is printed.
const PROGRESS: Duration = Duration::from_secs(30);
/// A connection that takes longer is stuck.
const STUCK: Duration = Duration::from_secs(60);

/// What happens to the connections of a pair of pods on the way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ChurnWay {
    Plain,
    /// The destination is rewritten.
    Dnat,
    /// The source is rewritten.
    Masquerade,
    /// The accepting end answers with SYN cookies.
    Cookies,
}

/// Two of them are plain, so that two pairs have the same order of events.
const WAYS: [ChurnWay; 5] =
    [ChurnWay::Plain, ChurnWay::Plain, ChurnWay::Dnat, ChurnWay::Masquerade, ChurnWay::Cookies];

impl ChurnWay {
    fn prepare(self, pods: &PodPair) -> Result<()> {
        let rules = match self {
            Self::Plain => return Ok(()),
            Self::Cookies => return pods.acceptor.netns.sysctl("net/ipv4/tcp_syncookies", "2"),
            Self::Dnat => {
                "-A PREROUTING -d 10.96.0.1/32 -p tcp --dport 80 -j DNAT --to-destination 10.72.0.2:8080"
            }
            Self::Masquerade => "-A POSTROUTING -o pod2 -j MASQUERADE",
        };
        restore(&pods.router, &format!("*nat\n{rules}\nCOMMIT\n"))
    }

    fn destination(self) -> SocketAddr {
        match self {
            Self::Dnat => ([10, 96, 0, 1], 80).into(),
            _ => PodPair::app(Family::V4),
        }
    }

    /// Whether all connections can be joined. Of other pairs, a connection is joined only if it finds the note of an earlier
    /// connection from the same port, or of another pod.
    fn is_always_joined(self) -> bool {
        matches!(self, Self::Plain | Self::Dnat)
    }
}

fn restore(router: &Sandbox, rules: &str) -> Result<()> {
    let mut restore = router.command("iptables-nft-restore")?;
    let mut restore = restore.stdin(Stdio::piped()).spawn().context("starting iptables-nft-restore")?;
    restore.stdin.take().context("no standard input")?.write_all(rules.as_bytes())?;
    ensure!(restore.wait()?.success(), "iptables-nft-restore refused {rules}");
    Ok(())
}

/// The result.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Churned {
    /// Complete connections, with all bytes compared.
    pub made: u64,
    /// Connections that ended early.
    pub broken: u64,
    /// Joined connections among the complete ones.
    pub joined: u64,
}

/// A process of a pod's proxy, killed when dropped.
struct ChurnEnd(Child);

impl Drop for ChurnEnd {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

/// Makes this number of connections.
///
/// # Errors
/// A byte is wrong, a connection is stuck, or too few were joined of a pair that can join all.
pub fn churn(connections: u64, seed: u64) -> Result<Churned> {
    let agent = Agent::new("churn")?;
    let program = ReadableCopy::of(&binary::locate("soak", "INTERCEPT_SOAK")?)?;
    let pairs = WAYS.iter().map(|way| capture(&agent, *way)).collect::<Result<Vec<_>>>()?;
    let before = footprint(&agent)?;
    let each = connections.div_ceil(WAYS.len() as u64);
    let counted: Vec<ChurnCount> = WAYS.iter().map(|_| ChurnCount::default()).collect();
    std::thread::scope(|scope| -> Result<()> {
        let mut acceptors = Vec::new();
        let mut diallers = Vec::new();
        for (n, pods) in pairs.iter().enumerate() {
            let accept = command(&program, &pods.acceptor, "accept", n)?;
            let (end, mut output) = start(accept)?;
            let mut line = String::new();
            output.read_line(&mut line)?;
            ensure!(line.trim() == READY, "the end that accepts said {line}");
            acceptors.push(end);
        }
        for (n, (pods, counted)) in pairs.iter().zip(&counted).enumerate() {
            let mut dial = command(&program, &pods.dialler, "dial", n)?;
            dial.args(["--to", &WAYS[n].destination().to_string()]);
            dial.args(["--connections", &each.to_string(), "--seed", &seed.to_string()]);
            let (end, output) = start(dial)?;
            diallers.push(end);
            scope.spawn(move || counted.follow(output));
        }
        watch(&mut diallers, &counted, each * WAYS.len() as u64)
    })?;
    let mut churned = Churned { made: 0, broken: 0, joined: 0 };
    for ((way, pods), counted) in WAYS.iter().zip(&pairs).zip(&counted) {
        let (made, broken) = counted.read();
        let joined = joined(&agent, &pods.acceptor)?;
        println!("churn: {way:?}: {made} made, {broken} broken, {joined} joined");
        // Another pair may have used the note of the SYN.
        ensure!(
            !way.is_always_joined() || joined + broken + made / 20 >= made,
            "{way:?}: {joined} of {made} are joined"
        );
        churned.made += made;
        churned.broken += broken;
        churned.joined += joined;
    }
    let after = footprint(&agent)?;
    ensure!(after == before, "{after:?} bytes in the maps afterwards, {before:?} before");
    Ok(churned)
}

fn capture(agent: &Agent, way: ChurnWay) -> Result<PodPair> {
    let pods = PodPair::new("churn")?;
    way.prepare(&pods)?;
    let flags: Vec<_> =
        INIT_FLAGS.into_iter().chain(["--accelerate", "--accelerate-proxies", "soak"]).collect();
    for pod in [&pods.dialler, &pods.acceptor] {
        agent.attach(pod, &flags)?;
    }
    Ok(pods)
}

fn command(program: &ReadableCopy, pod: &Sandbox, role: &str, pair: usize) -> Result<Command> {
    let path: &Path = program.path();
    let mut command = pod.command_as(path, Ids::PROXY)?;
    command.args(["end", role, "--pair", &pair.to_string()]);
    command.stdin(Stdio::null()).stdout(Stdio::piped());
    Ok(command)
}

fn start(mut command: Command) -> Result<(ChurnEnd, BufReader<ChildStdout>)> {
    let mut end = ChurnEnd(command.spawn().with_context(|| format!("starting {command:?}"))?);
    let output = end.0.stdout.take().context("no standard output")?;
    Ok((end, BufReader::new(output)))
}

/// The last line of the connecting end of a pair.
#[derive(Debug, Default)]
struct ChurnCount {
    made: AtomicU64,
    broken: AtomicU64,
}

impl ChurnCount {
    fn follow(&self, output: BufReader<ChildStdout>) {
        for ChurnProgress { made, broken } in
            output.lines().map_while(Result::ok).filter_map(|line| line.parse().ok())
        {
            self.made.store(made, Ordering::Relaxed);
            self.broken.store(broken, Ordering::Relaxed);
        }
    }

    fn read(&self) -> (u64, u64) {
        (self.made.load(Ordering::Relaxed), self.broken.load(Ordering::Relaxed))
    }
}

/// Waits for the connecting ends and prints progress.
fn watch(diallers: &mut [ChurnEnd], counted: &[ChurnCount], whole: u64) -> Result<()> {
    let begun = Instant::now();
    let (mut printed, mut moved, mut last) = (begun, begun, 0);
    loop {
        let mut running = 0;
        for dialler in diallers.iter_mut() {
            match dialler.0.try_wait()? {
                None => running += 1,
                Some(status) => ensure!(status.success(), "an end of a connection found what it says above"),
            }
        }
        if running == 0 {
            return Ok(());
        }
        let made: u64 = counted.iter().map(|counted| counted.read().0).sum();
        if made != last {
            (last, moved) = (made, Instant::now());
        }
        if moved.elapsed() > STUCK {
            bail!("no connection was made for {STUCK:?}, after {made}");
        }
        if printed.elapsed() > PROGRESS {
            printed = Instant::now();
            let broken: u64 = counted.iter().map(|counted| counted.read().1).sum();
            println!(
                "churn: {} s: {made} of {whole} connections, {broken} broken",
                begun.elapsed().as_secs()
            );
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}
