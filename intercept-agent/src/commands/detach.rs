//! `detach`.

use std::path::Path;

use anyhow::{Context as _, Result};
use intercept_agent::{
    cgroup::CgroupDir,
    node::{Node, NodeError},
    store::Store,
};

use super::say;
use crate::cli::DetachArgs;

pub(super) fn detach(args: &DetachArgs) -> Result<()> {
    match &args.which.cgroup_path {
        Some(path) => detach_cgroup(&args.bpffs.bpffs, path, false),
        None => detach_all(&args.bpffs.bpffs),
    }
}

/// Detach the pod of a cgroup, also of one that is gone.
pub(super) fn detach_cgroup(bpffs: &Path, cgroup: &Path, absent_is_fine: bool) -> Result<()> {
    let absent = || NodeError::NotAttached(format!("cgroup {}", cgroup.display()));
    let Some(mut node) = Node::find(bpffs)? else {
        return if absent_is_fine { Ok(()) } else { Err(absent().into()) };
    };
    let id = CgroupDir::open(cgroup).ok().map(|cgroup| cgroup.id());
    let pods = node.pods()?;
    let found = pods.iter().find(|(record, _)| match id {
        Some(id) => record.cgroup_id == id,
        None => record.cgroup == cgroup,
    });
    match found {
        Some((record, _)) => {
            let netns = record.netns();
            node.detach(record.cookie, netns.as_ref())
                .with_context(|| format!("detaching cgroup {}", cgroup.display()))?;
            say!("detached cgroup {} (cookie {})", cgroup.display(), record.cookie);
        }
        None if absent_is_fine => {}
        None => return Err(absent().into()),
    }
    node.sweep()?;
    node.remove_if_unused()?;
    Ok(())
}

pub(super) fn detach_all(bpffs: &Path) -> Result<()> {
    let Some(mut node) = Node::find(bpffs)? else {
        if Store::remove_any(bpffs)? {
            say!("removed what another version of the agent, or one that died, had left");
        } else {
            say!("nothing is attached");
        }
        return Ok(());
    };
    let mut failed = None;
    for (record, _) in node.pods()? {
        let netns = record.netns();
        // Take away what can be taken away, and report what could not.
        match node.detach(record.cookie, netns.as_ref()) {
            Ok(()) => say!("detached cgroup {} (cookie {})", record.cgroup.display(), record.cookie),
            Err(error) => {
                tracing::error!(cgroup = %record.cgroup.display(), error = &error as &dyn std::error::Error, "detaching");
                failed = Some(error);
            }
        }
    }
    if let Some(error) = failed {
        return Err(error).context("detaching all pods: the programs stay for those that are left");
    }
    node.remove_everything()?;
    Ok(())
}
