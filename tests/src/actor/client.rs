//! Starts an actor and talks to it.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{IpAddr, SocketAddr};
use std::process::{Child, ChildStdin, ChildStdout, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};

use super::binary;
use super::protocol::{
    ActorJob, ActorMessage, Bind, Dial, Dialled, Done, Listen, Queried, Query, Relay, RelayDirection,
    Relayed, Request,
};
use crate::deadline::scaled;
use crate::testbed::{Ids, Sandbox};

/// The variable with the path of the actor's executable.
pub const BINARY: &str = "INTERCEPT_ACTOR";
/// How much longer than its timeout a request may take before the actor counts as stuck.
const GRACE: Duration = Duration::from_secs(20);

/// A running actor. Dropping it ends the process.
#[derive(Debug)]
pub struct Actor {
    child: Child,
    input: Mutex<Option<ChildStdin>>,
    next: AtomicU64,
    inbox: Arc<Inbox>,
    reader: Option<JoinHandle<()>>,
}

/// The replies that the reading thread has received.
#[derive(Debug, Default)]
struct Inbox {
    waiting: Mutex<HashMap<u64, Sender<Done>>>,
    relayed: Mutex<Vec<Relayed>>,
    more: Condvar,
}

/// A listener or relay in an actor; see [`Actor::close`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Listening {
    id: u64,
    /// The address of the listener.
    pub addr: SocketAddr,
}

impl Actor {
    /// Starts the actor that [`binary::locate`] finds with [`BINARY`] as root in a pod or its neighbour. Each request
    /// names the user to run as.
    pub fn start(sandbox: &Sandbox) -> Result<Self> {
        let program = binary::locate("actor", BINARY)?;
        let mut child = sandbox
            .command(&program)?
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("starting {} in {}", program.display(), sandbox.netns.name()))?;
        let input = child.stdin.take();
        let output = child.stdout.take().context("the actor has no standard output")?;
        let inbox = Arc::new(Inbox::default());
        let reader = std::thread::spawn({
            let inbox = Arc::clone(&inbox);
            move || inbox.fill(output)
        });
        Ok(Self { child, input: Mutex::new(input), next: AtomicU64::new(1), inbox, reader: Some(reader) })
    }

    /// The actor's process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Opens a server.
    pub fn listen(&self, listen: Listen) -> Result<Listening> {
        let what = format!("listening as {} on {}", listen.name, listen.bind.addr);
        self.open(ActorJob::Listen(listen)).context(what)
    }

    /// Opens a relay.
    pub fn relay(&self, relay: Relay) -> Result<Listening> {
        let what = format!("relaying as {} on {}", relay.name, relay.bind.addr);
        self.open(ActorJob::Relay(relay)).context(what)
    }

    /// Starts the two relays of a proxy on these ports, outbound and inbound, for both families.
    ///
    /// # Errors
    /// If one cannot listen.
    pub fn relays(&self, ports: [u16; 2]) -> Result<()> {
        let directions = [("outbound", RelayDirection::Outbound), ("inbound", RelayDirection::Inbound)];
        for any in [IpAddr::from([0, 0, 0, 0]), IpAddr::from([0u16; 8])] {
            for (port, (name, direction)) in ports.into_iter().zip(directions) {
                self.relay(Relay {
                    name: name.into(),
                    bind: Bind::new(Ids::PROXY, SocketAddr::new(any, port)),
                    direction,
                    report: true,
                    reset: true,
                    workers: 1,
                })?;
            }
        }
        Ok(())
    }

    fn open(&self, job: ActorJob) -> Result<Listening> {
        let (id, done) = self.send(job)?;
        match Self::wait(&done, scaled(GRACE))? {
            Done::Ready(addr) => Ok(Listening { id, addr }),
            other => bail!("the actor answered {other:?}"),
        }
    }

    /// Closes a server or relay: connections made from now on are refused.
    pub fn close(&self, listening: Listening) -> Result<()> {
        let (_, done) = self.send(ActorJob::Close(listening.id))?;
        match Self::wait(&done, scaled(GRACE))? {
            Done::Closed => Ok(()),
            other => bail!("closing {}: the actor answered {other:?}", listening.addr),
        }
    }

    /// Makes one connection.
    pub fn dial(&self, dial: Dial) -> Result<Dialled> {
        Ok(self.dial_all(vec![dial])?.remove(0))
    }

    /// Makes connections concurrently. The results are in the order of `dials`.
    pub fn dial_all(&self, dials: Vec<Dial>) -> Result<Vec<Dialled>> {
        // The timeout applies twice: to the connection and to the answer.
        let pending =
            dials.into_iter().map(|dial| Ok((dial.timeout * 2, self.send(ActorJob::Dial(dial))?.1)));
        let pending = pending.collect::<Result<Vec<_>>>()?;
        let results =
            pending.into_iter().map(|(timeout, done)| match Self::wait(&done, timeout + scaled(GRACE))? {
                Done::Dialled(dialled) => Ok(dialled),
                other => bail!("dialling: the actor answered {other:?}"),
            });
        results.collect()
    }

    /// Sends datagrams from one socket and waits for the answers.
    pub fn query(&self, query: Query) -> Result<Queried> {
        Ok(self.query_all(vec![query])?.remove(0))
    }

    /// Sends datagrams from several sockets concurrently. The results are in the order of `queries`.
    pub fn query_all(&self, queries: Vec<Query>) -> Result<Vec<Queried>> {
        let pending =
            queries.into_iter().map(|query| Ok((query.timeout, self.send(ActorJob::Query(query))?.1)));
        let pending = pending.collect::<Result<Vec<_>>>()?;
        let results =
            pending.into_iter().map(|(timeout, done)| match Self::wait(&done, timeout + scaled(GRACE))? {
                Done::Queried(queried) => Ok(queried),
                other => bail!("querying: the actor answered {other:?}"),
            });
        results.collect()
    }

    /// Takes the reports of the relays since the last call. Waits until there are `at_least` so many, or for
    /// `timeout`.
    pub fn relayed(&self, at_least: usize, timeout: Duration) -> Vec<Relayed> {
        let deadline = Instant::now() + timeout;
        let mut relayed = self.inbox.relayed.lock().unwrap_or_else(PoisonError::into_inner);
        while relayed.len() < at_least {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            relayed = self.inbox.more.wait_timeout(relayed, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        std::mem::take(&mut relayed)
    }

    fn send(&self, job: ActorJob) -> Result<(u64, Receiver<Done>)> {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let (sender, receiver) = mpsc::channel();
        self.inbox.waiting.lock().unwrap_or_else(PoisonError::into_inner).insert(id, sender);
        let mut line = serde_json::to_vec(&Request { id, job })?;
        line.push(b'\n');
        let mut input = self.input.lock().unwrap_or_else(PoisonError::into_inner);
        let input = input.as_mut().context("the actor has no standard input")?;
        input.write_all(&line).context("writing to the actor, which may have died")?;
        Ok((id, receiver))
    }

    fn wait(done: &Receiver<Done>, timeout: Duration) -> Result<Done> {
        match done.recv_timeout(timeout) {
            Ok(Done::Failed(why)) => Err(anyhow!(why)),
            Ok(done) => Ok(done),
            Err(mpsc::RecvTimeoutError::Timeout) => bail!("the actor gave no answer within {timeout:?}"),
            Err(mpsc::RecvTimeoutError::Disconnected) => bail!("the actor died; see its standard error"),
        }
    }
}

impl Inbox {
    fn fill(&self, output: ChildStdout) {
        for line in BufReader::new(output).lines().map_while(Result::ok) {
            match serde_json::from_str(&line) {
                Ok(ActorMessage::Reply { id, done }) => {
                    let sender = self.waiting.lock().unwrap_or_else(PoisonError::into_inner).remove(&id);
                    if let Some(sender) = sender {
                        // The receiver is gone if the request has timed out.
                        drop(sender.send(done));
                    }
                }
                Ok(ActorMessage::Relayed(relayed)) => {
                    self.relayed.lock().unwrap_or_else(PoisonError::into_inner).push(relayed);
                    self.more.notify_all();
                }
                Err(error) => eprintln!("the actor said {line:?}: {error}"),
            }
        }
        // The actor is gone. Closing the channels wakes the waiting requests.
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }
}

impl Drop for Actor {
    fn drop(&mut self) {
        // The end of its input ends the actor. The signal ends it if it is stuck.
        self.input.lock().unwrap_or_else(PoisonError::into_inner).take();
        drop(self.child.kill());
        drop(self.child.wait());
        drop(self.reader.take().map(JoinHandle::join));
    }
}
