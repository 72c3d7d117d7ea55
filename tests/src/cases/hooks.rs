//! Kernels that lack a hook.

use std::{path::Path, process::Output};

use anyhow::{Context, Result, ensure};
use intercept_agent::facade::programs::attach_type;
use intercept_common::names;

use crate::{
    agent::{Agent, INIT_FLAGS, finish},
    kernel,
    missing_hook::with_kernel_without,
    unusual::{Method, UnusualProcess, UnusualSocket, fixture::UnusualFixture},
};

const DNS: [&str; 2] = ["--redirect-dns", "--capture-all-dns"];

/// `recvmsg` serves captured DNS only.
pub(super) fn of_one_option(_: &Agent) -> Result<()> {
    let (agent, fixture) = (Agent::new("lesser")?, UnusualFixture::new("lesser")?);
    with_kernel_without(attach_type(names::RECVMSG4) as u32, || {
        let check = finish(&mut agent.command("check"))?;
        let said = String::from_utf8_lossy(&check.stdout);
        ensure!(
            check.status.success() && said.contains("captures, except: --redirect-dns"),
            "check: {check:?}"
        );
        ensure!(
            said.contains("MISSING hook cgroup/recvmsg4, needed for --redirect-dns only"),
            "check: {said}"
        );

        agent.attach(&fixture.pod, &INIT_FLAGS)?;
        let refused = finish(&mut agent.for_pod("attach", &fixture.pod, &[&INIT_FLAGS[..], &DNS].concat()))?;
        let words = "this kernel lacks for --redirect-dns hook cgroup/recvmsg4";
        ensure!(!refused.status.success() && error(&refused).contains(words), "attach: {refused:?}");
        Ok(())
    })?;
    // The first capture is still active.
    let unusual = UnusualSocket::new(Method::Plain, "198.51.100.7:80".parse()?);
    let outcome = UnusualProcess::start(&fixture.pod, &unusual)?.go()?;
    ensure!(outcome.server() == "outbound", "{outcome:?}");
    // Again the same, by an agent that finds the programs as they were loaded.
    ensure!(agent.attach(&fixture.pod, &INIT_FLAGS)?.starts_with("unchanged"), "it was active");
    agent.detach(&fixture.pod).map(drop)
}

pub(super) fn of_every_capture(_: &Agent) -> Result<()> {
    with_kernel_without(attach_type(names::GETSOCKOPT) as u32, || refused_as_checked().map(drop))
}

/// On a kernel that lacks something that every capture needs: `check` says what, `attach` refuses in the same words, and
/// nothing is left behind. Returns the words.
pub fn refused_as_checked() -> Result<String> {
    let (agent, fixture) = (Agent::new("refused")?, UnusualFixture::new("refused")?);
    let check = finish(&mut agent.command("check"))?;
    let said = error(&check);
    let words = said.trim().strip_prefix("error: ").unwrap_or(&said).trim().to_owned();
    ensure!(!check.status.success() && words.starts_with("this kernel lacks "), "check: {check:?}");
    let refused = finish(&mut agent.for_pod("attach", &fixture.pod, &INIT_FLAGS))?;
    ensure!(
        !refused.status.success() && error(&refused).contains(&words),
        "attach: {refused:?}, not {words:?}"
    );
    let attached = kernel::attached(&fixture.pod)?;
    ensure!(attached.is_empty(), "attached: {attached:?}");
    let left = agent.bpffs().join("intercept");
    ensure!(is_empty(&left)?, "{} is not empty", left.display());
    Ok(words)
}

fn error(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn is_empty(folder: &Path) -> Result<bool> {
    match folder.read_dir() {
        Ok(mut entries) => Ok(entries.next().is_none()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(true),
        Err(error) => Err(error).with_context(|| format!("listing {}", folder.display())),
    }
}
