//! Starts workers and talks to them.

use std::cell::OnceCell;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::agent::BenchAgent;
use super::mode::CaptureMode;
use super::worker::{READY, Role, WorkerAnswer, WorkerJob};
use super::{envoy, interrupt};
use crate::actor::binary::ReadableCopy;
use crate::testbed::{Ids, Sandbox};

/// The first argument of a worker's process.
pub const WORKER: &str = "worker";

/// How often who waits looks whether the benchmark is to end.
const GLANCE: Duration = Duration::from_millis(50);

/// The executables that workers and proxies run, where every user may execute them.
#[derive(Debug)]
pub struct WorkerPool {
    /// The benchmark's own.
    program: ReadableCopy,
    envoy: OnceCell<ReadableCopy>,
    agent: OnceCell<BenchAgent>,
    baseline: Option<BenchAgent>,
}

/// A running worker. Dropping it ends the process.
#[derive(Debug)]
pub struct WorkerProcess {
    name: String,
    child: Child,
    input: Option<ChildStdin>,
    lines: Receiver<String>,
    reader: Option<JoinHandle<()>>,
}

impl WorkerPool {
    /// Copies the running executable.
    /// `baseline` is another build of the agent, to compare this one with.
    pub fn new(baseline: Option<PathBuf>) -> Result<Self> {
        let original: PathBuf = std::env::current_exe().context("finding the running executable")?;
        Ok(Self {
            program: ReadableCopy::of(&original)?,
            envoy: OnceCell::new(),
            agent: OnceCell::new(),
            baseline: baseline.map(BenchAgent::of).transpose()?,
        })
    }

    /// Envoy, which is copied when it is first asked for.
    pub fn envoy(&self) -> Result<&Path> {
        if self.envoy.get().is_none() {
            drop(self.envoy.set(ReadableCopy::of(&envoy::program()?)?));
        }
        Ok(self.envoy.get().context("there is no copy of Envoy")?.path())
    }

    /// The agent, which is looked for when it is first asked for.
    pub fn agent(&self) -> Result<&BenchAgent> {
        if self.agent.get().is_none() {
            drop(self.agent.set(BenchAgent::new()?));
        }
        self.agent.get().context("there is no agent")
    }

    /// The other build of the agent.
    pub fn baseline(&self) -> Result<&BenchAgent> {
        self.baseline
            .as_ref()
            .context("the baseline modes need another build of the agent: give it with --baseline")
    }

    /// The agent of a mode.
    pub fn agent_of(&self, mode: CaptureMode) -> Result<&BenchAgent> {
        if mode.is_baseline() { self.baseline() } else { self.agent() }
    }

    /// Starts a worker in a pod and waits until it is ready.
    pub fn start(&self, sandbox: &Sandbox, ids: Ids, role: &Role) -> Result<WorkerProcess> {
        let name = match role {
            Role::Server { .. } => "server",
            Role::Relay(_) => "relay",
            Role::Client { .. } => "client",
        };
        let mut command = sandbox.command_as(self.program.path(), ids)?;
        command.arg(WORKER).arg(serde_json::to_string(role)?);
        let mut worker = WorkerProcess::spawn(&mut command, format!("{name} in {}", sandbox.netns.name()))?;
        let ready = worker.line(Duration::from_secs(10))?;
        if ready != READY {
            bail!("the {} said {ready:?}", worker.name);
        }
        Ok(worker)
    }
}

impl WorkerProcess {
    fn spawn(command: &mut std::process::Command, name: String) -> Result<Self> {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("starting the {name}"))?;
        let input = child.stdin.take();
        let output = child.stdout.take().context("a worker has no standard output")?;
        let (sender, lines) = mpsc::channel();
        let reader = std::thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        Ok(Self { name, child, input, lines, reader: Some(reader) })
    }

    /// The process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Has a job done; an error if it takes longer than `limit`.
    pub fn ask(&mut self, job: &WorkerJob, limit: Duration) -> Result<WorkerAnswer> {
        self.tell(job)?;
        self.answer(limit)
    }

    /// Gives a job, whose answer is to be fetched by [`WorkerProcess::answer`].
    pub fn tell(&mut self, job: &WorkerJob) -> Result<()> {
        let mut line = serde_json::to_vec(job)?;
        line.push(b'\n');
        let input = self.input.as_mut().context("a worker has no standard input")?;
        input.write_all(&line).with_context(|| format!("giving a job to the {}; has it died?", self.name))
    }

    /// Waits for the answer to the last job.
    pub fn answer(&mut self, limit: Duration) -> Result<WorkerAnswer> {
        let line = self.line(limit)?;
        match serde_json::from_str(&line).with_context(|| format!("the {} said {line:?}", self.name))? {
            WorkerAnswer::Failed(why) => bail!("the {}: {why}", self.name),
            answer => Ok(answer),
        }
    }

    fn line(&mut self, limit: Duration) -> Result<String> {
        let deadline = Instant::now() + limit;
        loop {
            interrupt::check()?;
            match self.lines.recv_timeout(GLANCE) {
                Ok(line) => return Ok(line),
                Err(RecvTimeoutError::Timeout) if Instant::now() < deadline => {}
                Err(RecvTimeoutError::Timeout) => {
                    bail!("the {} gave no answer within {limit:?}", self.name)
                }
                Err(RecvTimeoutError::Disconnected) => {
                    bail!("the {} died; see its standard error", self.name)
                }
            }
        }
    }
}

impl Drop for WorkerProcess {
    fn drop(&mut self) {
        drop(self.input.take());
        drop(self.child.kill());
        drop(self.child.wait());
        drop(self.reader.take().map(JoinHandle::join));
    }
}
