//! What the agent holds on a node, in a form in which two moments can be compared.

use std::{collections::BTreeMap, fs, path::Path};

use anyhow::{Context as _, Result};
use intercept_agent::facade::maps::Maps;

use super::{node::SoakNode, steady::World};
use crate::{agent::succeed, snapshot::tree};

/// How many there are of each thing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Residue(BTreeMap<String, usize>);

/// What the daemon's process has.
#[derive(Debug, Clone)]
pub struct Process {
    /// Resident memory in KiB.
    pub rss: u64,
    /// Open descriptors, by what they are of.
    pub descriptors: BTreeMap<String, usize>,
}

impl Residue {
    /// Of a node at this moment.
    pub fn of(node: &SoakNode<'_>, world: &World) -> Result<Self> {
        let mut counts = BTreeMap::new();
        let store = node.agent().store();
        let root = node.agent().bpffs();
        for (path, _) in tree(root)? {
            let name = path.strip_prefix(root)?.display().to_string();
            // Cookies and numbers of records differ from one moment to the next.
            *counts.entry(format!("pin {}", without_digits(&name))).or_default() += 1;
        }
        let folder = store.join("maps");
        let fill = Maps::open(&folder).and_then(|maps| maps.fill(&folder)).context("reading the maps")?;
        for (map, used, _) in fill.maps {
            counts.insert(format!("entries of {map}"), used);
        }
        counts.insert("original destinations".into(), node.agent().remembered()?);
        let mut ip = world.neighbour().command("ip")?;
        ip.args(["-o", "link", "show"]);
        // A namespace that something holds keeps its end of the link.
        let links = succeed(ip)?.lines().filter(|line| line.contains(": pod")).count();
        counts.insert("links of namespaces".into(), links);
        counts.insert("pods' cgroups".into(), folders(&node.kubelet().join("kubepods/burstable"))?);
        // Pods of commands are known to a daemon only that has started after them.
        let own =
            node.daemon().reports()?.iter().filter(|report| !report.pod.starts_with("command/")).count();
        counts.insert("pods of the daemon".into(), own);
        Ok(Self(counts))
    }

    /// What differs: what it was, and what it is.
    pub fn difference(&self, after: &Self) -> Vec<String> {
        let names: std::collections::BTreeSet<_> = self.0.keys().chain(after.0.keys()).collect();
        let count = |residue: &Self, name: &String| residue.0.get(name).copied().unwrap_or(0);
        names
            .into_iter()
            .map(|name| (name, count(self, name), count(after, name)))
            .filter(|(_, before, after)| before != after)
            .map(|(name, before, after)| format!("{name}: {before}, then {after}"))
            .collect()
    }
}

impl Process {
    /// Of the daemon.
    pub fn of(node: &SoakNode<'_>) -> Result<Self> {
        let pid = node.daemon().pid().context("the daemon does not run")?;
        let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
        let rss = status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB"));
        let rss = rss.context("no VmRSS")?.trim().parse()?;
        let mut descriptors = BTreeMap::new();
        for entry in fs::read_dir(format!("/proc/{pid}/fd"))?.flatten() {
            let Ok(target) = fs::read_link(entry.path()) else { continue };
            let target = target.display().to_string();
            // "socket:[1234]", "anon_inode:bpf-map", "/sys/fs/cgroup/...".
            let kind = target.split_once(":[").map_or(target.as_str(), |(kind, _)| kind);
            *descriptors.entry(kind.to_owned()).or_default() += 1;
        }
        Ok(Self { rss, descriptors })
    }
}

impl Process {
    /// How many descriptors there are.
    pub fn open(&self) -> usize {
        self.descriptors.values().sum()
    }
}

fn without_digits(path: &str) -> String {
    let part =
        |part: &str| match part.strip_prefix('v').unwrap_or(part).contains(|c: char| c.is_ascii_digit()) {
            false => part.to_owned(),
            // The layout's folder.
            true if part.starts_with('v') => part.to_owned(),
            true => part.split_once('-').map_or_else(|| "#".to_owned(), |(kind, _)| format!("{kind}-#")),
        };
    path.split('/').map(part).collect::<Vec<_>>().join("/")
}

fn folders(folder: &Path) -> Result<usize> {
    let entries = fs::read_dir(folder).with_context(|| format!("listing {}", folder.display()))?;
    Ok(entries.flatten().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())).count())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_pods_and_records_are_left_out() {
        assert_eq!(without_digits("intercept/v4/pods/1234/record-17"), "intercept/v4/pods/#/record-#");
        assert_eq!(without_digits("intercept/v4/maps/PODS"), "intercept/v4/maps/PODS");
    }

    #[test]
    fn a_difference_names_what_came_and_what_went() {
        let of =
            |pairs: &[(&str, usize)]| Residue(pairs.iter().map(|(n, c)| ((*n).to_owned(), *c)).collect());
        let (before, after) = (of(&[("a", 1), ("b", 2)]), of(&[("b", 2), ("c", 3)]));
        assert_eq!(before.difference(&after), ["a: 1, then 0", "c: 0, then 3"]);
        assert_eq!(before.difference(&before), [""; 0]);
    }
}
