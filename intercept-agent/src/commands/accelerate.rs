//! `accelerate`, `check --accelerate`, and what an attach with `--accelerate` asks first.

use anyhow::{Context as _, Result, bail};
use intercept_agent::{
    acceleration::{
        Acceleration,
        self_test::{self, Finding, User},
    },
    node::Node,
    options::Config,
    store::Store,
};

use super::say;
use crate::cli::{AccelerateArgs, OnOff};

/// What every refusal ends with.
const WITHOUT: &str = "leave --accelerate out: connections are plain TCP then";

/// Tell what each check of the self-test saw.
pub(super) fn check(json: bool) -> Result<()> {
    let findings =
        self_test::find_out(&[User::Proxy, User::Application]).context("trying out joined connections")?;
    if json {
        say!("{}", serde_json::to_string_pretty(&findings)?);
    } else {
        say!("A proxy that sleeps in epoll alone; all of these have to pass:");
        findings.iter().filter(|finding| finding.user == User::Proxy).for_each(print);
        say!("Applications; why their own connections are never joined:");
        findings.iter().filter(|finding| finding.user == User::Application).for_each(print);
    }
    let needed: Vec<_> = findings.iter().filter(|finding| finding.user == User::Proxy).collect();
    let failed: Vec<_> = needed.iter().filter(|finding| !finding.ok).map(|finding| finding.what).collect();
    if !failed.is_empty() {
        bail!("{} of {} checks of a proxy failed: {}", failed.len(), needed.len(), failed.join(", "));
    }
    Ok(())
}

fn print(finding: &Finding) {
    let Finding { what, ok, plain_ok, joined, plain, .. } = finding;
    let word = if *ok { "ok    " } else { "FAILED" };
    let fault = if *plain_ok { "" } else { ", which is a fault of this check" };
    say!("{word} {what}: {joined} (plain TCP: {plain}{fault})");
}

/// Refuse `--accelerate` where joined connections do not behave like TCP, before anything is changed.
pub(super) fn admit(bpffs: &std::path::Path, config: &Config) -> Result<()> {
    let is_loaded = || Store::find(bpffs).is_some_and(|store| Acceleration::is_loaded(&store));
    if config.accelerate.is_empty() || is_loaded() {
        return Ok(());
    }
    self_test::admit().with_context(|| format!("refusing --accelerate ({WITHOUT})"))
}

/// The switch of this node, at once.
pub(super) fn accelerate(args: &AccelerateArgs) -> Result<()> {
    let absent = "no pod of this node is accelerated: attach one with --accelerate first";
    let node = Node::find(&args.bpffs.bpffs)?.context(absent)?;
    let mut acceleration = Acceleration::find(node.store())?.context(absent)?;
    match args.switch {
        OnOff::On => acceleration.activate()?,
        OnOff::Off => acceleration.deactivate()?,
    }
    say!(
        "connections between proxies of this node are {}",
        match args.switch {
            OnOff::On => "joined where their pods say so",
            OnOff::Off => "plain TCP",
        }
    );
    Ok(())
}
