//! `run`: one pod in the foreground.

use std::path::Path;

use anyhow::{Context as _, Result};
use intercept_agent::{
    mirror::Follower,
    netns::Netns,
    node::{Attached, Node, Target},
    options::Config,
};
use tokio::signal::unix::{SignalKind, signal};

use super::attach::{self, Request};
use crate::cli::AttachArgs;

pub(super) fn run(args: AttachArgs) -> Result<()> {
    let request = Request::of(args)?;
    super::check::require_privileges()?;
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().context("starting the runtime")?;
    runtime.block_on(follow(request))
}

async fn follow(request: Request) -> Result<()> {
    let Request { target, config, switches, bpffs } = request;
    // Before the attach, so that no signal and no change falls in between.
    let mut interrupt = signal(SignalKind::interrupt()).context("listening for SIGINT")?;
    let mut terminate = signal(SignalKind::terminate()).context("listening for SIGTERM")?;
    let mut changes = Follower::start(&target.netns)?;
    let done = put_in_force(&bpffs, &target, &config)?;
    println!(
        "{} cgroup {} in namespace {}",
        done.word(),
        target.cgroup.path().display(),
        target.netns.name()
    );
    if switches.run_validation {
        attach::validate(&target, &config, &switches)?;
    }
    loop {
        tokio::select! {
            _ = interrupt.recv() => break,
            _ = terminate.recv() => break,
            change = changes.changed() => {
                if let Err(error) = change {
                    tracing::warn!(error = &error as &dyn std::error::Error, "following the namespace: reading it anew");
                }
                match put_in_force(&bpffs, &target, &config) {
                    Ok(Attached::Unchanged) => {}
                    Ok(_) => tracing::info!(netns = target.netns.name(), "followed a change of addresses or routes"),
                    Err(error) => tracing::error!("{error:#}: what was in force stays in force"),
                }
            }
        }
    }
    take_out(&bpffs, &target.netns).context("detaching")?;
    println!("detached cgroup {}", target.cgroup.path().display());
    Ok(())
}

fn put_in_force(bpffs: &Path, target: &Target, config: &Config) -> Result<Attached> {
    let mut node = Node::open(bpffs).with_context(|| format!("opening the state in {}", bpffs.display()))?;
    node.attach(target, config).with_context(|| {
        format!("attaching cgroup {} in {}", target.cgroup.path().display(), target.netns.name())
    })
}

fn take_out(bpffs: &Path, netns: &Netns) -> Result<()> {
    if let Some(mut node) = Node::find(bpffs)? {
        node.detach(netns.cookie(), Some(netns))?;
        node.remove_if_unused()?;
    }
    Ok(())
}
