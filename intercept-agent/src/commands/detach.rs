//! `detach`.

use std::path::Path;

use anyhow::{Context as _, Result};

use super::print_line;
use crate::{
    cgroup::CgroupDir,
    cli::DetachArgs,
    node::{DetachedPod, Node, NodeError},
};

pub(super) fn detach(args: &DetachArgs) -> Result<()> {
    match &args.which.cgroup_path {
        Some(path) => detach_cgroup(&args.bpffs.bpffs, path, Absent::IsAnError),
        None => detach_all(&args.bpffs.bpffs),
    }
}

/// What it means that a cgroup is not attached.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Absent {
    IsFine,
    IsAnError,
}

/// Detaches the pod of a cgroup, which may be gone.
pub(super) fn detach_cgroup(bpffs: &Path, cgroup: &Path, absent: Absent) -> Result<()> {
    let not_attached = || NodeError::NotAttached(format!("cgroup {}", cgroup.display()));
    let Some(mut node) = Node::find(bpffs)? else {
        return if absent == Absent::IsFine { Ok(()) } else { Err(not_attached().into()) };
    };
    let found = match CgroupDir::open(cgroup) {
        Ok(cgroup) => node.pod_of_cgroup(cgroup.id())?.map(|(cookie, _)| cookie),
        Err(_) => {
            let pods = node.pods()?.readable;
            pods.iter().find(|(record, _)| record.cgroup == cgroup).map(|(record, _)| record.cookie)
        }
    };
    if let Some(cookie) = found {
        let netns = node.record_of(cookie)?.and_then(|record| record.netns());
        node.detach(cookie, netns.as_ref())
            .with_context(|| format!("detaching cgroup {}", cgroup.display()))?;
        print_line!("detached cgroup {} (cookie {cookie})", cgroup.display());
    }
    // Also remove what an earlier detach could not.
    node.sweep()?;
    node.remove_if_unused()?;
    if found.is_none() && absent == Absent::IsAnError {
        return Err(not_attached().into());
    }
    Ok(())
}

pub(super) fn detach_all(bpffs: &Path) -> Result<()> {
    let found = Node::find(bpffs).unwrap_or_else(|error| {
        // State that cannot be read can still be removed.
        tracing::warn!(error = &error as &dyn std::error::Error, "removing state that cannot be read");
        None
    });
    let Some(mut node) = found else {
        if Node::remove_unreadable(bpffs)? {
            print_line!("removed state of another version of the agent, or of one that crashed");
        } else {
            print_line!("nothing is attached");
        }
        return Ok(());
    };
    let mut failed = None;
    for DetachedPod { cookie, cgroup, result } in node.detach_all()? {
        let cgroup = cgroup.map_or("(unknown)".to_owned(), |path| path.display().to_string());
        match result {
            Ok(()) => print_line!("detached cgroup {cgroup} (cookie {cookie})"),
            Err(error) => {
                tracing::error!(cgroup, error = &error as &dyn std::error::Error, "detaching");
                failed = Some(error);
            }
        }
    }
    if let Some(error) = failed {
        return Err(error)
            .context("detaching all pods: the programs stay for the pods that are still attached");
    }
    node.remove_programs()?;
    Ok(())
}
