//! Everything that the agent can change for a pod, to compare the state before and after.

use std::fmt;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::agent::succeed;
use crate::kernel::attached;
use crate::testbed::Sandbox;

/// Settings of a namespace that affect its packets.
const SETTINGS: [&str; 10] = [
    "net/ipv4/tcp_fwmark_accept",
    "net/ipv4/fwmark_reflect",
    "net/ipv4/ip_forward",
    "net/ipv4/ip_nonlocal_bind",
    "net/ipv4/conf/all/route_localnet",
    "net/ipv4/conf/all/rp_filter",
    "net/ipv4/conf/lo/route_localnet",
    "net/ipv4/ip_unprivileged_port_start",
    "net/ipv6/ip_nonlocal_bind",
    "net/ipv6/conf/all/forwarding",
];

/// The state of a pod as lines of text, so that differences are readable.
#[derive(Clone, PartialEq, Eq)]
pub struct Snapshot(Vec<String>);

impl Snapshot {
    /// Reads the state of a pod.
    pub fn of(sandbox: &Sandbox) -> Result<Self> {
        let mut lines = Vec::new();
        for (hook, count) in attached(sandbox)? {
            lines.push(format!("{count} programs at {hook}"));
        }
        for arguments in [
            &["-o", "-d", "addr", "show"][..],
            &["-o", "link", "show"],
            &["-4", "rule", "show"],
            &["-6", "rule", "show"],
            &["-4", "route", "show", "table", "all"],
            &["-6", "route", "show", "table", "all"],
        ] {
            let mut ip = sandbox.command("ip")?;
            ip.args(arguments);
            let said = succeed(ip)?;
            // Lifetimes change, and the order is not defined.
            let mut said: Vec<_> =
                said.lines().map(|line| format!("ip {}: {}", arguments[0], line.trim())).collect();
            said.sort();
            lines.extend(said);
        }
        for setting in SETTINGS {
            let path = Path::new("/proc/sys").join(setting);
            let value = sandbox.netns.run(|| fs::read_to_string(&path))?;
            lines.push(format!("{setting} = {}", value.as_deref().map_or("none", str::trim)));
        }
        let mut folders: Vec<PathBuf> = vec![sandbox.cgroup.path().to_owned()];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(&folder)?.flatten() {
                if entry.file_type()?.is_dir() {
                    lines.push(format!("cgroup {}", entry.path().display()));
                    folders.push(entry.path());
                }
            }
        }
        Ok(Self(lines))
    }

    /// The lines that only one of two snapshots has, as in a patch.
    pub fn difference(&self, after: &Self) -> Vec<String> {
        let gone = self.0.iter().filter(|line| !after.0.contains(line)).map(|line| format!("- {line}"));
        let new = after.0.iter().filter(|line| !self.0.contains(line)).map(|line| format!("+ {line}"));
        gone.chain(new).collect()
    }
}

impl fmt::Debug for Snapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.join("\n"))
    }
}

/// The files below a folder with their inodes, because a new pin has a new inode. What vanishes meanwhile is left out.
pub fn tree(folder: &Path) -> Result<Vec<(PathBuf, u64)>> {
    let mut found = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(below) = folders.pop() {
        let entries = match fs::read_dir(&below) {
            Err(error) if error.kind() == io::ErrorKind::NotFound && below != folder => continue,
            entries => entries.with_context(|| format!("listing {}", below.display()))?,
        };
        for entry in entries {
            let path = entry?.path();
            let metadata = match fs::symlink_metadata(&path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                metadata => metadata.with_context(|| format!("looking at {}", path.display()))?,
            };
            if metadata.is_dir() {
                folders.push(path.clone());
            }
            found.push((path, metadata.ino()));
        }
    }
    found.sort();
    Ok(found)
}
