//! The processes and cgroups of a pod, by which a socket is explained.

use std::{
    collections::BTreeMap,
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
    /// Seconds since 1970; 0 if that is not known.
    pub(crate) started: u64,
}

/// What is there.
pub(crate) struct Inventory {
    /// The pod's cgroup and those below it, by id, with their paths from the pod's on and their level below it.
    cgroups: BTreeMap<u64, (PathBuf, u32)>,
    /// The level of the pod's cgroup.
    level: u32,
    /// By the inodes of their sockets.
    by_socket: BTreeMap<u64, SocketProcess>,
    /// Processes of the cgroup that are in another network namespace.
    strays: Vec<SocketProcess>,
}

impl Inventory {
    pub(crate) fn read(cgroup: &CgroupDir, netns: &Netns) -> Result<Self, CgroupError> {
        let mut cgroups = BTreeMap::new();
        add(cgroup.path(), cgroup.path(), 0, &mut cgroups);
        let (mut by_socket, mut strays) = (BTreeMap::new(), Vec::new());
        let pods = match cgroup.processes() {
            Ok(pods) => pods,
            Err(CgroupError::Hidden { .. }) => Vec::new(),
            Err(error) => return Err(error),
        };
        for pid in &pods {
            let Some(process) = describe(*pid) else { continue };
            if netns.holds(*pid) {
                take_sockets(*pid, &process, &mut by_socket);
            } else {
                strays.push(process);
            }
        }
        // What came into the namespace from elsewhere.
        for pid in everyone().filter(|pid| !pods.contains(pid) && netns.holds(*pid)) {
            if let Some(process) = describe(pid) {
                take_sockets(pid, &process, &mut by_socket);
            }
        }
        // Without a visible root no container is known either.
        Ok(Self { cgroups, level: cgroup.level().unwrap_or_default(), by_socket, strays })
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
            Some((path, _)) if path.as_os_str().is_empty() => None,
            Some((path, _)) => Some(path.display().to_string()),
            None => Some(format!("id {id}")),
        }
    }

    /// The id of the cgroup around this one at a level; 0 if there is none in the pod.
    pub(crate) fn ancestor(&self, cgroup: Option<u64>, level: u32) -> u64 {
        let Some((path, below)) = cgroup.and_then(|id| self.cgroups.get(&id)) else { return 0 };
        let Some(up) = (self.level + below).checked_sub(level) else { return 0 };
        let ancestor = path.ancestors().nth(up as usize);
        let found = ancestor.and_then(|path| self.cgroups.iter().find(|(_, (own, _))| own == path));
        found.map_or(0, |(id, _)| *id)
    }
}

fn add(pod: &Path, path: &Path, below: u32, cgroups: &mut BTreeMap<u64, (PathBuf, u32)>) {
    let (Ok(found), Ok(relative)) = (fs::metadata(path), path.strip_prefix(pod)) else { return };
    cgroups.insert(found.ino(), (relative.to_owned(), below));
    let entries = fs::read_dir(path).into_iter().flatten().flatten();
    for entry in entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())) {
        add(pod, &entry.path(), below + 1, cgroups);
    }
}

fn everyone() -> impl Iterator<Item = Pid> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok().and_then(Pid::from_raw))
}

fn describe(pid: Pid) -> Option<SocketProcess> {
    let process = Process::new(pid.as_raw_nonzero().get()).ok()?;
    let status = process.status().ok()?;
    let stat = process.stat().ok()?;
    let booted = procfs::boot_time_secs().unwrap_or_default();
    let started = booted + stat.starttime / procfs::ticks_per_second();
    Some(SocketProcess { pid: process.pid, name: stat.comm, uid: status.fuid, gid: status.fgid, started })
}

fn take_sockets(pid: Pid, process: &SocketProcess, by_socket: &mut BTreeMap<u64, SocketProcess>) {
    let Ok(fds) = Process::new(pid.as_raw_nonzero().get()).and_then(|process| process.fd()) else { return };
    for fd in fds.flatten() {
        if let FDTarget::Socket(inode) = fd.target {
            by_socket.entry(inode).or_insert_with(|| process.clone());
        }
    }
}
