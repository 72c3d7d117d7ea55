//! Envoy that is hot-restarted: each generation takes the listening sockets of the one before, which ends.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use tempfile::TempDir;

use super::{Parts, Speaks};
use crate::{
    actor::binary::ReadableCopy,
    bench::envoy::{Envoy, base_id},
    testbed::{Ids, Sandbox, name},
};

/// Seconds for which a generation lets its connections end, and after which it ends itself.
const DRAIN: [&str; 4] = ["--drain-time-s", "2", "--parent-shutdown-time-s", "4"];

/// A sidecar as [`super::Sidecar`], with the given number of workers, each with listening sockets of its own.
#[derive(Debug)]
pub struct Generations {
    concurrency: u32,
    base_id: u32,
    epoch: u32,
    running: Vec<Envoy>,
    log: PathBuf,
    _folder: TempDir,
}

impl Generations {
    /// Starts the first generation; returns when it listens.
    pub fn start(program: &ReadableCopy, sandbox: &Sandbox, concurrency: u32) -> Result<Self> {
        let folder = name::scratch("envoy").context("making a folder")?;
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o777))?;
        let log = folder.path().join("access.log");
        let running = Vec::new();
        let mut this = Self { concurrency, base_id: base_id(), epoch: 0, running, log, _folder: folder };
        this.launch(program, sandbox)?.wait_until_it_listens(15006)?;
        Ok(this)
    }

    /// Starts the next generation; returns when the one before has ended.
    pub fn restart(&mut self, program: &ReadableCopy, sandbox: &Sandbox, patience: Duration) -> Result<()> {
        self.epoch += 1;
        self.launch(program, sandbox)?;
        let deadline = Instant::now() + patience;
        let [parent, child] = &mut *self.running else { anyhow::bail!("there is no parent") };
        while !parent.has_ended()? {
            child.check()?;
            ensure!(Instant::now() < deadline, "the parent has not ended after {patience:?}");
            std::thread::sleep(Duration::from_millis(20));
        }
        child.check()?;
        self.running.remove(0);
        Ok(())
    }

    fn launch(&mut self, program: &ReadableCopy, sandbox: &Sandbox) -> Result<&mut Envoy> {
        let Parts { listeners, clusters } = Parts::of_sidecar(Speaks::Http, &self.log);
        let numbers = [self.concurrency, self.base_id, self.epoch].map(|number| number.to_string());
        let [concurrency, base_id, epoch] = &numbers;
        let own = ["--concurrency", concurrency, "--base-id", base_id, "--restart-epoch", epoch];
        let arguments = [&own[..], &DRAIN].concat();
        let envoy = Envoy::launch(program.path(), sandbox, Ids::PROXY, &listeners, &clusters, &arguments)?;
        self.running.push(envoy);
        self.running.last_mut().context("it was just started")
    }
}

impl Drop for Generations {
    fn drop(&mut self) {
        self.running.clear();
        // What generations share outlives them.
        let shared = format!("/dev/shm/envoy_shared_memory_{}", self.base_id * 10);
        drop(fs::remove_file(shared));
    }
}
