//! `accelerate`, `check --accelerate`, and the self-test before an attach with `--accelerate`.

use anyhow::{Context as _, Result, bail};

use super::print_line;
use crate::{
    acceleration::{
        Acceleration,
        self_test::{self, Finding, User},
    },
    cli::{AccelerateArgs, OnOff},
    node::Node,
    options::Config,
    store::Store,
};

/// The end of every refusal.
const WITHOUT: &str = "without --accelerate, connections use plain TCP";

/// Prints the result of each check of the self-test.
pub(super) fn check(json: bool) -> Result<()> {
    let findings = self_test::find_out(&[User::Proxy, User::Application])
        .context("running the self-test of joined connections")?;
    if json {
        print_line!("{}", serde_json::to_string_pretty(&findings)?);
    } else {
        print_line!("Proxies, which sleep only in epoll; all of these checks must pass:");
        findings.iter().filter(|finding| finding.user == User::Proxy).for_each(print);
        print_line!("Applications; these checks show why their own connections are never joined:");
        findings.iter().filter(|finding| finding.user == User::Application).for_each(print);
    }
    let needed: Vec<_> = findings.iter().filter(|finding| finding.user == User::Proxy).collect();
    let failed: Vec<_> = needed.iter().filter(|finding| !finding.ok).map(|finding| finding.what).collect();
    if !failed.is_empty() {
        bail!("{} of {} checks for proxies failed: {}", failed.len(), needed.len(), failed.join(", "));
    }
    Ok(())
}

fn print(finding: &Finding) {
    let Finding { what, ok, plain_ok, joined, plain, .. } = finding;
    let word = if *ok { "ok    " } else { "FAILED" };
    let fault = if *plain_ok { "" } else { ", so the check itself is at fault" };
    print_line!("{word} {what}: {joined} (plain TCP: {plain}{fault})");
}

/// Refuses `--accelerate`, before anything is changed, if joined connections do not behave like TCP on this kernel.
pub(super) fn admit(bpffs: &std::path::Path, config: &Config) -> Result<()> {
    if config.accelerate.is_empty()
        || Store::find(bpffs)?.is_some_and(|store| Acceleration::is_loaded(&store))
    {
        return Ok(());
    }
    self_test::admit().with_context(|| format!("refusing --accelerate ({WITHOUT})"))
}

/// Sets the switch of this node, with immediate effect.
pub(super) fn accelerate(args: &AccelerateArgs) -> Result<()> {
    let absent = "no pod of this node is accelerated: attach one with --accelerate first";
    let node = Node::find(&args.bpffs.bpffs)?.context(absent)?;
    let mut acceleration = Acceleration::find(node.store())?.context(absent)?;
    match args.switch {
        OnOff::On => acceleration.activate()?,
        OnOff::Off => acceleration.deactivate()?,
    }
    print_line!(
        "connections between proxies of this node are {}",
        match args.switch {
            OnOff::On => "joined if both pods are attached with --accelerate",
            OnOff::Off => "plain TCP",
        }
    );
    Ok(())
}
