//! The processes and cgroups of a pod, by which a socket is explained.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use intercept_common::decide::Owner;
use procfs::process::{FDTarget, Process};
use rustix::process::Pid;

use crate::{
    cgroup::{CgroupDir, CgroupError},
    netns::Netns,
    sockets::OpenSocket,
};

/// A process that has a socket.
#[derive(Clone, Debug)]
pub(crate) struct SocketProcess {
    pub(crate) pid: i32,
    pub(crate) name: String,
    pub(crate) uid: u32,
    gid: u32,
    /// Whether it runs in the pod's cgroup.
    is_in_pod: bool,
    /// Seconds since 1970; 0 if that is not known.
    pub(crate) started: u64,
}

/// A cgroup of the pod, or below one.
struct PodCgroup {
    /// The path from the pod's on; if that has several, from the folder around it on.
    path: PathBuf,
    /// In the hierarchy.
    level: u32,
}

/// What is there.
pub(crate) struct Inventory {
    /// By id.
    cgroups: BTreeMap<u64, PodCgroup>,
    /// By the inodes of their sockets.
    by_socket: BTreeMap<u64, SocketProcess>,
    /// Processes of the cgroup that are in another network namespace.
    strays: Vec<SocketProcess>,
}

impl Inventory {
    /// Of a pod with one cgroup, or a machine's workload with several.
    pub(crate) fn read(pod: &[&CgroupDir], netns: &Netns) -> Result<Self, CgroupError> {
        let (mut cgroups, mut pids) = (BTreeMap::new(), BTreeSet::new());
        for cgroup in pod {
            let around = if pod.len() > 1 { cgroup.path().parent() } else { None };
            // Without a visible root no container is known either.
            let level = cgroup.level().unwrap_or_default();
            add(around.unwrap_or(cgroup.path()), cgroup.path(), level, &mut cgroups);
            match cgroup.processes() {
                Ok(found) => pids.extend(found.into_iter().map(|pid| pid.as_raw_nonzero())),
                Err(CgroupError::Hidden { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        let (mut by_socket, mut strays) = (BTreeMap::new(), Vec::new());
        for pid in pids.iter().filter_map(|pid| Pid::from_raw(pid.get())) {
            let Some(process) = describe(pid, true) else { continue };
            if netns.holds(pid) {
                take_sockets(pid, &process, &mut by_socket);
            } else if !netns.cookie().is_workload() {
                // Below the cgroups of a machine there may be containers, which are none of its workload.
                strays.push(process);
            }
        }
        // What came into the namespace from elsewhere.
        for pid in everyone().filter(|pid| !pids.contains(&pid.as_raw_nonzero()) && netns.holds(*pid)) {
            if let Some(process) = describe(pid, false) {
                take_sockets(pid, &process, &mut by_socket);
            }
        }
        Ok(Self { cgroups, by_socket, strays })
    }

    /// Whether a socket was created in the pod, or is held by a process of it.
    pub(crate) fn is_of_pod(&self, socket: &OpenSocket) -> bool {
        socket.cgroup.is_some_and(|id| self.is_in_pod(id))
            || self.process(socket).is_some_and(|process| process.is_in_pod)
    }

    pub(crate) fn process(&self, socket: &OpenSocket) -> Option<&SocketProcess> {
        self.by_socket.get(&socket.inode)
    }

    pub(crate) fn strays(&self) -> impl Iterator<Item = &SocketProcess> {
        self.strays.iter()
    }

    pub(crate) fn is_in_pod(&self, cgroup: u64) -> bool {
        self.cgroups.contains_key(&cgroup)
    }

    /// The user of a socket, and the group of the process that has it.
    pub(crate) fn owner(&self, socket: &OpenSocket) -> Owner {
        let gid = self.process(socket).map_or(Owner::NONE.gid, |process| process.gid);
        Owner { uid: socket.uid, gid }
    }

    /// A cgroup for people: from the pod's on, or its id.
    pub(crate) fn cgroup_name(&self, id: u64) -> Option<String> {
        match self.cgroups.get(&id) {
            Some(PodCgroup { path, .. }) if path.as_os_str().is_empty() => None,
            Some(PodCgroup { path, .. }) => Some(path.display().to_string()),
            None => Some(format!("id {id}")),
        }
    }

    /// The id of the cgroup around this one at a level; 0 if there is none in the pod.
    pub(crate) fn ancestor(&self, cgroup: Option<u64>, level: u32) -> u64 {
        let Some(found) = cgroup.and_then(|id| self.cgroups.get(&id)) else { return 0 };
        let Some(up) = found.level.checked_sub(level) else { return 0 };
        let ancestor = found.path.ancestors().nth(up as usize);
        let ancestor = ancestor.and_then(|path| {
            self.cgroups.iter().find(|(_, cgroup)| cgroup.path == path && cgroup.level == level)
        });
        ancestor.map_or(0, |(id, _)| *id)
    }
}

fn add(above: &Path, path: &Path, level: u32, cgroups: &mut BTreeMap<u64, PodCgroup>) {
    let (Ok(found), Ok(relative)) = (fs::metadata(path), path.strip_prefix(above)) else { return };
    cgroups.insert(found.ino(), PodCgroup { path: relative.to_owned(), level });
    let entries = fs::read_dir(path).into_iter().flatten().flatten();
    for entry in entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())) {
        add(above, &entry.path(), level + 1, cgroups);
    }
}

fn everyone() -> impl Iterator<Item = Pid> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok().and_then(Pid::from_raw))
}

fn describe(pid: Pid, is_in_pod: bool) -> Option<SocketProcess> {
    let process = Process::new(pid.as_raw_nonzero().get()).ok()?;
    let status = process.status().ok()?;
    let stat = process.stat().ok()?;
    let booted = procfs::boot_time_secs().unwrap_or_default();
    let started = booted + stat.starttime / procfs::ticks_per_second();
    let (name, uid, gid) = (stat.comm, status.fuid, status.fgid);
    Some(SocketProcess { pid: process.pid, name, uid, gid, is_in_pod, started })
}

fn take_sockets(pid: Pid, process: &SocketProcess, by_socket: &mut BTreeMap<u64, SocketProcess>) {
    let Ok(fds) = Process::new(pid.as_raw_nonzero().get()).and_then(|process| process.fd()) else { return };
    for fd in fds.flatten() {
        if let FDTarget::Socket(inode) = fd.target {
            by_socket.entry(inode).or_insert_with(|| process.clone());
        }
    }
}
