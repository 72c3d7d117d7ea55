//! `detach`.

use std::{fs, os::linux::fs::MetadataExt as _, path::Path};

use anyhow::{Context as _, Result};
use intercept_agent::{
    cgroup::CgroupDir,
    netns::Netns,
    node::{Node, NodeError},
    store::{Record, Store},
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
            let netns = reach(record);
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
        let netns = reach(&record);
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

/// The namespace of a pod, by the path it was given by or by a process that is in it. None if it is gone.
fn reach(record: &Record) -> Option<Netns> {
    let is_it = |netns: &Netns| netns.cookie() == record.cookie;
    let by_path = record.netns_path.as_ref().and_then(|path| Netns::open(path).ok()).filter(is_it);
    by_path.or_else(|| {
        fs::read_dir("/proc").ok()?.filter_map(Result::ok).find_map(|process| {
            let path = process.path().join("ns/net");
            let inode = fs::metadata(&path).ok()?.st_ino();
            (inode == record.netns_inode).then(|| Netns::open(&path).ok()).flatten().filter(is_it)
        })
    })
}
