//! The client: runs one job after the other.

use std::io::{BufRead, Write as _};
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::io::Errno;

use super::hold::Holding;
use super::protocol::{Latency, Measured, Timing, WorkerAnswer, WorkerJob};
use super::socket::{IoStep, Poller, SocketReadiness, dial, read, write};
use super::{exchange, say, stream};
use crate::bench::cpu::{Meter, Sample};

/// How long a measurement may still wait after its end.
pub(super) const PATIENCE: Duration = Duration::from_secs(5);

/// Reads jobs and answers them, until the end of the input.
pub(super) fn obey(pods: &[PathBuf]) -> Result<()> {
    let meter = Meter::new(pods)?;
    let mut holding = Holding::default();
    for line in std::io::stdin().lock().lines() {
        let line = line.context("reading a job")?;
        let job: WorkerJob =
            serde_json::from_str(&line).with_context(|| format!("understanding the job {line}"))?;
        let answer = perform(&job, &meter, &mut holding)
            .unwrap_or_else(|error| WorkerAnswer::Failed(format!("{error:#}")));
        say(&serde_json::to_string(&answer)?)?;
    }
    Ok(())
}

fn perform(job: &WorkerJob, meter: &Meter, holding: &mut Holding) -> Result<WorkerAnswer> {
    match job {
        WorkerJob::Connect { to, clients, timing } => {
            exchange::run(*to, *clients, exchange::ExchangeKind::Fresh, *timing, meter)
                .map(WorkerAnswer::Measured)
        }
        WorkerJob::Exchange { to, connections, size, timing } => {
            exchange::run(*to, *connections, exchange::ExchangeKind::Kept { size: *size }, *timing, meter)
                .map(WorkerAnswer::Measured)
        }
        WorkerJob::Stream { to, timing } => stream::run(*to, *timing, meter).map(WorkerAnswer::Measured),
        WorkerJob::Hold { to, from, connections, limit } => {
            holding.open(to, from, *connections, *limit).map(WorkerAnswer::Held)
        }
        WorkerJob::Probe { to, say } => {
            let mut stream =
                std::net::TcpStream::connect(to).with_context(|| format!("connecting to {to}"))?;
            stream.write_all(say.as_bytes()).with_context(|| format!("writing to {to}"))?;
            holding.keep(stream.into());
            Ok(WorkerAnswer::Connected)
        }
        WorkerJob::Release => {
            *holding = Holding::default();
            Ok(WorkerAnswer::Released)
        }
    }
}

/// The measured time: after the warm-up, until the end.
pub(super) struct Window<'a> {
    meter: &'a Meter,
    opens: Instant,
    length: Duration,
    started: Option<(Instant, Sample)>,
    /// Operations within it.
    pub(super) operations: u64,
    /// Failures within it.
    pub(super) failures: u64,
    /// How long each operation took, in nanoseconds.
    pub(super) samples: Vec<u32>,
}

impl<'a> Window<'a> {
    pub(super) fn new(timing: Timing, meter: &'a Meter) -> Self {
        let opens = Instant::now() + timing.warm_up;
        let (operations, failures, samples) = (0, 0, Vec::with_capacity(1 << 16));
        Self { meter, opens, length: timing.measure, started: None, operations, failures, samples }
    }

    /// Updates the time. False once it is over.
    pub(super) fn is_open(&mut self, now: Instant) -> Result<bool> {
        match self.started {
            Some((started, _)) => Ok(now < started + self.length),
            None => {
                if now >= self.opens {
                    self.operations = 0;
                    self.failures = 0;
                    self.samples.clear();
                    self.started = Some((Instant::now(), self.meter.read()?));
                }
                Ok(true)
            }
        }
    }

    /// The next time at which to wake up without an event.
    pub(super) fn deadline(&self) -> Instant {
        self.started.as_ref().map_or(self.opens, |(started, _)| *started + self.length)
    }

    /// Records an operation that was started at this time.
    pub(super) fn done(&mut self, begun: Instant, now: Instant) {
        self.operations += 1;
        let nanoseconds = now.saturating_duration_since(begun).as_nanos();
        self.samples.push(u32::try_from(nanoseconds).unwrap_or(u32::MAX));
    }

    pub(super) fn close(mut self) -> Result<Measured> {
        let (started, before) = self.started.take().context("the measurement ended before it began")?;
        let seconds = started.elapsed().as_secs_f64();
        let cpu = self.meter.read()?.since(&before);
        ensure!(
            self.operations > 0,
            "nothing was done within {seconds:.1} s, and {} connections failed",
            self.failures
        );
        let latency = Latency::of(&mut self.samples);
        Ok(Measured { seconds, operations: self.operations, failures: self.failures, latency, cpu })
    }
}

/// Connects.
pub(super) fn connect(to: SocketAddr, poller: &Poller, token: usize) -> Result<OwnedFd> {
    let socket = dial(to, None).with_context(|| format!("connecting to {to}"))?;
    poller.add(&socket, token as u64)?;
    Ok(socket)
}

/// The index that a socket was registered with.
pub(super) fn index(event: SocketReadiness) -> usize {
    usize::try_from(event.token).expect("tokens are indices")
}

/// A request being sent and its response being received.
#[derive(Debug, Clone, Copy)]
pub(super) struct RequestProgress {
    pub(super) begun: Instant,
    sent: usize,
    received: usize,
}

/// Its progress.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum RequestState {
    Waiting,
    Answered,
    /// With the error, unless the peer just closed.
    Broken(Option<Errno>),
}

impl RequestProgress {
    pub(super) fn begin() -> Self {
        Self { begun: Instant::now(), sent: 0, received: 0 }
    }

    /// Sends and receives as far as possible.
    pub(super) fn go_on(
        &mut self,
        socket: &OwnedFd,
        request: &[u8],
        response: usize,
        buffer: &mut [u8],
    ) -> RequestState {
        while self.sent < request.len() {
            match write(socket, &request[self.sent..]) {
                IoStep::Bytes(n) => self.sent += n,
                IoStep::Later => return RequestState::Waiting,
                IoStep::End => return RequestState::Broken(None),
                IoStep::Broken(error) => return RequestState::Broken(Some(error)),
            }
        }
        while self.received < response {
            match read(socket, buffer) {
                IoStep::Bytes(n) => self.received += n,
                IoStep::Later => return RequestState::Waiting,
                IoStep::End => return RequestState::Broken(None),
                IoStep::Broken(error) => return RequestState::Broken(Some(error)),
            }
        }
        RequestState::Answered
    }
}
