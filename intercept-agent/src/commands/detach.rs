//! `detach`.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};

use super::print_line;
use crate::{
    cgroup::CgroupDir,
    cli::{DetachArgs, Which},
    cutover::{self, RulesReturn},
    escape::OneLine,
    ids::NetnsCookie,
    node::{DetachedPod, Node, NodeError},
    record::netns_of,
    store::may_pass,
};

pub(super) fn detach(args: &DetachArgs) -> Result<()> {
    let Which { cgroup_path, machine, all } = &args.which;
    let root;
    let paths = match (cgroup_path.as_slice(), machine) {
        ([], true) => {
            root = [CgroupDir::root()?.path().to_owned()];
            &root[..]
        }
        (paths, _) => paths,
    };
    if *all {
        return detach_all(&args.bpffs.bpffs);
    }
    detach_cgroups(&args.bpffs.bpffs, paths, Absent::IsAnError)
}

/// What it means that a cgroup is not attached.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Absent {
    IsFine,
    IsAnError,
}

/// Detaches the pods of cgroups, which may be gone, or the workloads of a machine that have one of them.
pub(super) fn detach_cgroups(bpffs: &Path, cgroups: &[PathBuf], absent: Absent) -> Result<()> {
    let not_attached = |cgroup: &Path| NodeError::NotAttached(format!("cgroup {}", cgroup.display()));
    let Some(mut node) = Node::find(bpffs)? else {
        return match cgroups.first() {
            Some(cgroup) if absent == Absent::IsAnError => Err(not_attached(cgroup).into()),
            _ => Ok(()),
        };
    };
    let mut found = BTreeMap::new();
    let mut missing = None;
    for cgroup in cgroups {
        match find(&node, cgroup)? {
            Some(cookie) => _ = found.entry(cookie).or_insert(cgroup),
            None => missing = missing.or(Some(cgroup)),
        }
    }
    for (cookie, cgroup) in found {
        let netns = netns_of(node.record_of(cookie)?.as_ref())?;
        node.detach(cookie, netns.as_ref())
            .with_context(|| format!("detaching cgroup {}", cgroup.display()))?;
        print_line!("detached cgroup {} (cookie {cookie})", cgroup.display());
    }
    // Also remove what an earlier detach could not.
    node.sweep()?;
    node.remove_if_unused()?;
    match missing {
        Some(cgroup) if absent == Absent::IsAnError => Err(not_attached(cgroup).into()),
        _ => Ok(()),
    }
}

/// The pod or workload with this cgroup. Of one that is gone only the name is left, which another cgroup may have by now.
fn find(node: &Node, cgroup: &Path) -> Result<Option<NetnsCookie>> {
    match CgroupDir::open_any(cgroup) {
        Ok(cgroup) => {
            if let Some((cookie, _)) = node.pod_of_cgroup(cgroup.id())? {
                return Ok(Some(cookie));
            }
        }
        Err(error) if may_pass(&error) => return Err(error.into()),
        Err(_) => {}
    }
    for (record, _) in node.pods()?.readable {
        if record.cgroups().any(|path| path == cgroup)
            && (!cgroup.exists() || node.cgroup_of(record.cookie)?.is_none())
        {
            return Ok(Some(record.cookie));
        }
    }
    Ok(None)
}

pub(super) fn detach_all(bpffs: &Path) -> Result<()> {
    let found = match Node::find(bpffs) {
        // Nor could the changes of the pods' namespaces be read, which must be undone first.
        Err(error) if may_pass(&error) => return Err(error).context("detaching all pods"),
        Err(error) => {
            // State that cannot be read can still be removed.
            tracing::warn!(error = &error as &dyn std::error::Error, "removing state that cannot be read");
            None
        }
        Ok(found) => found,
    };
    let Some(node) = found else {
        let removed = cutover::remove_unreadable(bpffs).context(
            "removing the state of another version of the agent, after the rules of iptables of its pods are in again",
        )?;
        if removed {
            print_line!("removed state of another version of the agent, or of one that crashed");
        } else {
            print_line!("nothing is attached");
        }
        return Ok(());
    };
    // The rules are put in with a lock of their own.
    drop(node);
    let (mut failed, kept) = put_rules_in(bpffs)?;
    let Some(mut node) = Node::find(bpffs)? else { return Ok(()) };
    for DetachedPod { cookie, cgroup, result } in node.detach_all()? {
        if kept.contains(&cookie) && result.is_err() {
            // That was said.
            continue;
        }
        let cgroup = cgroup.map_or("(unknown)".to_owned(), |path| path.display().to_string());
        match result {
            Ok(()) => print_line!("detached cgroup {cgroup} (cookie {cookie})"),
            Err(error) => {
                tracing::error!(cgroup, error = &error as &dyn std::error::Error, "detaching");
                failed = Some(error.into());
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

/// Puts the rules of pods in again that are cut over. Returns the last error, and the pods that nothing would capture without the
/// programs.
fn put_rules_in(bpffs: &Path) -> Result<(Option<anyhow::Error>, BTreeSet<NetnsCookie>)> {
    let (mut failed, mut kept) = (None, BTreeSet::new());
    for RulesReturn { cookie, cgroup, result } in cutover::all_back(bpffs)? {
        let cgroup = cgroup.display();
        match result {
            Ok(Some(report)) => {
                let rules = report.rules.len();
                print_line!("{rules} rules of iptables of cgroup {cgroup} are in again");
                for line in &report.differences {
                    print_line!("  DIFFERS from before: {}", OneLine(line));
                }
            }
            Ok(None) => print_line!("cgroup {cgroup} is gone, and its rules of iptables with it"),
            Err(error) => {
                let what = format!(
                    "putting the rules of iptables of cgroup {cgroup} in again: the programs go on to capture it; restart the pod, \
                     which makes its rules again, or remove the cause and run this command again"
                );
                tracing::error!(error = &error as &dyn std::error::Error, "{what}");
                failed = Some(anyhow::Error::from(error).context(what));
                kept.insert(cookie);
            }
        }
    }
    Ok((failed, kept))
}
