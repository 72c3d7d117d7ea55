//! `trace`: prints decisions as they are made.

use std::{collections::HashMap, io::Write as _};

use anyhow::{Context as _, Result, bail};
use tokio::signal::unix::{SignalKind, signal};

use crate::{
    cgroup::CgroupDir,
    cli::TraceArgs,
    escape,
    ids::NetnsCookie,
    node::Node,
    store::Store,
    trace::{Printer, Trace},
};

pub(super) fn trace(args: &TraceArgs) -> Result<()> {
    let bpffs = &args.bpffs.bpffs;
    let (Some(node), Some(store)) = (Node::find(bpffs)?, Store::find(bpffs)?) else {
        bail!("tracing: no pod is attached on this node, so there are no decisions");
    };
    let mut only = None;
    if let Some(path) = &args.cgroup_path {
        let cgroup = CgroupDir::open_any(path)?;
        let (cookie, _) = node
            .pod_of_cgroup(cgroup.id())?
            .with_context(|| format!("tracing: {} is not attached", path.display()))?;
        only = Some(cookie);
    }
    let names: HashMap<NetnsCookie, String> =
        node.pods()?.readable.into_iter().map(|(record, _)| (record.cookie, record.name())).collect();
    // Releases the node's lock while events are read.
    drop(node);
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().context("starting the runtime")?;
    runtime.block_on(read(args, &store, only, &names))
}

async fn read(
    args: &TraceArgs,
    store: &Store,
    only: Option<NetnsCookie>,
    names: &HashMap<NetnsCookie, String>,
) -> Result<()> {
    // Before the events are switched on, so that they are switched off after a signal.
    let mut interrupt = signal(SignalKind::interrupt()).context("listening for SIGINT")?;
    let mut terminate = signal(SignalKind::terminate()).context("listening for SIGTERM")?;
    let mut trace = Trace::start(store)?;
    let printer = Printer::new();
    let mut left = args.count;
    loop {
        let mut out = std::io::stdout().lock();
        let print = |event: &intercept_common::layout::Event| {
            if only.is_some_and(|cookie| cookie != event.netns) {
                return true;
            }
            let line = printer.line(event, names.get(&event.netns).cloned());
            let written = match args.json {
                true => escape::json(&line).map_err(Into::into).and_then(|json| writeln!(out, "{json}")),
                false => writeln!(out, "{line}"),
            };
            left = left.map(|left| left.saturating_sub(1));
            // A reader that has closed the pipe has seen enough.
            written.is_ok() && left != Some(0)
        };
        let go_on = tokio::select! {
            go_on = trace.read(print) => go_on?,
            _ = interrupt.recv() => false,
            _ = terminate.recv() => false,
        };
        if !go_on {
            return Ok(());
        }
    }
}
