//! A pod's links: one for each program, pinned in the pod's folder.

use std::{
    cell::OnceCell,
    collections::BTreeSet,
    io,
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    path::Path,
};

use intercept_common::names;

use super::{Node, NodeError, Target, workload::OwnPrograms};
use crate::{
    ids::NetnsCookie,
    netns::Netns,
    options::Config,
    programs,
    store::{Store, StoreError},
    support::{self, Lacking, Need},
    sys::{self, LinkTarget},
};

/// The cgroup programs that all pods share. Each is opened at its first use and stays open.
#[derive(Default)]
pub(super) struct SharedPrograms {
    open: [OnceCell<OwnedFd>; names::CGROUP_PROGRAMS.len()],
    loaded: OnceCell<Vec<&'static str>>,
}

impl SharedPrograms {
    /// Those that this kernel supports. Only programs that serve a single option may be missing.
    fn loaded(&self, store: &Store) -> Result<&[&'static str], StoreError> {
        if let Some(loaded) = self.loaded.get() {
            return Ok(loaded);
        }
        let pins = store.names_in(&store.programs())?;
        let is_loaded = |name: &&str| support::need(name) == Need::Always || pins.contains(*name);
        Ok(self.loaded.get_or_init(|| names::CGROUP_PROGRAMS.into_iter().filter(is_loaded).collect()))
    }

    fn get(&self, folder: &Path, program: &'static str) -> io::Result<BorrowedFd<'_>> {
        let at = names::CGROUP_PROGRAMS.iter().position(|name| *name == program);
        let kept = at.map(|at| &self.open[at]).ok_or(io::ErrorKind::NotFound)?;
        if let Some(open) = kept.get() {
            return Ok(open.as_fd());
        }
        let open = sys::open_pin(&folder.join(program))?;
        Ok(kept.get_or_init(|| open).as_fd())
    }
}

/// Whether a pod may have links already.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum LinksBefore {
    None,
    Possible,
}

impl Node {
    /// Creates the missing links of a pod, or of a machine's workload.
    pub(super) fn link(
        &self,
        target: &Target,
        config: &Config,
        before: LinksBefore,
    ) -> Result<(), NodeError> {
        let cookie = target.netns.cookie();
        let mut own = OwnPrograms::default();
        for ((folder, id), cgroup) in self.link_folders(target).into_iter().zip(target.cgroups()) {
            // One of a workload's cgroups may be gone since it was attached.
            if target.is_workload()
                && self.link_is(&folder.join(names::SOCK_OPS), LinkTarget::Cgroup(None))?
            {
                continue;
            }
            let pins = match before {
                // The pod's own folder has the record already.
                LinksBefore::None if folder == self.store.pod(cookie) => BTreeSet::new(),
                _ => {
                    self.store.create(&folder)?;
                    self.store.names_in(&folder)?
                }
            };
            for &program in self.loaded_programs()? {
                let path = folder.join(program);
                if pins.contains(program) && self.link_is(&path, LinkTarget::Cgroup(Some(id)))? {
                    continue;
                }
                if !is_needed(program, config) {
                    continue;
                }
                let failed = |source| NodeError::Attach {
                    program,
                    target: cgroup.path().display().to_string(),
                    source,
                };
                let fd = if target.is_workload() {
                    match own.get(self, cookie, target.netns.kernel_cookie(), program)? {
                        Some(fd) => fd.as_fd(),
                        None => continue,
                    }
                } else {
                    self.shared.get(&self.store.programs(), program).map_err(failed)?
                };
                sys::link_create(fd, cgroup.as_fd(), programs::attach_type(program))
                    .and_then(|link| replace_pin(&link, &path))
                    .map_err(failed)?;
            }
        }
        let path = self.store.pod(cookie).join(names::SK_LOOKUP);
        if before == LinksBefore::Possible && self.link_is(&path, netns_target(target))? {
            return Ok(());
        }
        let program = self.lookup()?.load(cookie)?;
        sys::link_create(program.as_fd(), target.netns.as_fd(), programs::attach_type(names::SK_LOOKUP))
            .and_then(|link| replace_pin(&link, &path))
            .map_err(|source| NodeError::Attach {
                program: names::SK_LOOKUP,
                target: target.netns.name().to_owned(),
                source,
            })
    }

    /// The cgroup programs that this kernel supports.
    fn loaded_programs(&self) -> Result<&[&'static str], StoreError> {
        self.shared.loaded(&self.store)
    }

    /// Refuses a capture that needs something this kernel lacks, in the words of `check`.
    pub(super) fn refuse_unsupported(&self, config: &Config) -> Result<(), NodeError> {
        let loaded = self.loaded_programs()?;
        let lacks_any = names::CGROUP_PROGRAMS
            .iter()
            .any(|name| support::need(name).is_of(config) && !loaded.contains(name));
        if !lacks_any {
            return Ok(());
        }
        match Lacking::for_config(&support::missing()?, config) {
            Some(lacking) => Err(lacking.into()),
            // It has become available, with a module or a setting of the kernel.
            None => Err(NodeError::LeftOut),
        }
    }

    /// Whether the link that is pinned there is attached to this target.
    pub(super) fn link_is(&self, path: &Path, target: LinkTarget) -> Result<bool, NodeError> {
        Ok(link_target(path)? == Some(target))
    }

    pub(super) fn links_intact(
        &self,
        cookie: NetnsCookie,
        target: &Target,
        config: &Config,
    ) -> Result<bool, NodeError> {
        let folders = self.link_folders(target);
        for (folder, id) in &folders {
            for name in self.loaded_programs()?.iter().filter(|name| is_needed(name, config)) {
                if !self.link_is(&folder.join(name), LinkTarget::Cgroup(Some(*id)))? {
                    return Ok(false);
                }
            }
        }
        let all = self.existing_link_folders(cookie)?.len() == folders.len();
        Ok(all && self.link_is(&self.store.pod(cookie).join(names::SK_LOOKUP), netns_target(target))?)
    }

    /// Returns the id of a pod's cgroup if cgroup and namespace still exist.
    pub fn cgroup_of(&self, cookie: NetnsCookie) -> Result<Option<u64>, NodeError> {
        Ok(self.cgroups_of(cookie)?.first().copied())
    }

    /// Returns the ids of a pod's cgroups that still exist, if its namespace does: one, except of a machine's workload.
    pub fn cgroups_of(&self, cookie: NetnsCookie) -> Result<Vec<u64>, NodeError> {
        Ok(self.place_of(cookie)?.map(|(cgroups, _)| cgroups).unwrap_or_default())
    }

    /// Returns the ids of a pod's cgroups and the inode of its namespace if both still exist. The links outlive both and
    /// then name neither. An error does not mean that the pod is gone.
    pub(super) fn place_of(&self, cookie: NetnsCookie) -> Result<Option<(Vec<u64>, u64)>, NodeError> {
        let mut cgroups = Vec::new();
        for folder in self.existing_link_folders(cookie)? {
            if let Some(LinkTarget::Cgroup(Some(cgroup))) = link_target(&folder.join(names::SOCK_OPS))? {
                cgroups.push(cgroup);
            }
        }
        Ok(match link_target(&self.store.pod(cookie).join(names::SK_LOOKUP))? {
            Some(LinkTarget::Netns(Some(netns))) if !cgroups.is_empty() => Some((cgroups, netns.into())),
            _ => None,
        })
    }

    /// Whether a pod's namespace may still exist: its link names it, or there is no link.
    pub(super) fn may_have_netns(&self, cookie: NetnsCookie) -> Result<bool, NodeError> {
        let link = link_target(&self.store.pod(cookie).join(names::SK_LOOKUP))?;
        Ok(link != Some(LinkTarget::Netns(None)))
    }

    /// Replaces the programs of a pod's links with this build's.
    pub(super) fn replace_programs(&self, cookie: NetnsCookie) -> Result<(), NodeError> {
        let mut own = OwnPrograms::default();
        let netns = match cookie.is_workload() {
            true => Some(Netns::of_machine(cookie)?.kernel_cookie()),
            false => None,
        };
        for folder in self.existing_link_folders(cookie)? {
            // One of a workload's cgroups may be gone.
            if link_target(&folder.join(names::SOCK_OPS))? == Some(LinkTarget::Cgroup(None)) {
                continue;
            }
            for &program in self.loaded_programs()? {
                let failed = |source| NodeError::Replace { program, cookie, source };
                let fd = if let Some(netns) = netns {
                    match own.get(self, cookie, netns, program)? {
                        Some(fd) => fd.as_fd(),
                        None => continue,
                    }
                } else {
                    self.shared.get(&self.store.programs(), program).map_err(failed)?
                };
                let updated =
                    sys::open_pin(&folder.join(program)).and_then(|link| sys::link_update(link.as_fd(), fd));
                match updated {
                    // The pod's options do not need it.
                    Err(error)
                        if error.kind() == io::ErrorKind::NotFound
                            && support::need(program) != Need::Always => {}
                    updated => updated.map_err(failed)?,
                }
            }
        }
        self.replace_join(cookie);
        let program = self.lookup()?.load(cookie)?;
        sys::open_pin(&self.store.pod(cookie).join(names::SK_LOOKUP))
            .and_then(|link| sys::link_update(link.as_fd(), program.as_fd()))
            .map_err(|source| NodeError::Replace { program: names::SK_LOOKUP, cookie, source })
    }
}

/// Whether a capture with these options needs a program. The hooks of datagrams do nothing unless queries are captured, or
/// compared in shadow mode. Their links stay once they are made: answers to earlier queries need them.
fn is_needed(program: &str, config: &Config) -> bool {
    config.shadow || support::need(program).is_of(config)
}

fn netns_target(target: &Target) -> LinkTarget {
    LinkTarget::Netns(u32::try_from(target.netns.inode()).ok())
}

/// The target of the link that is pinned there. `None` if nothing is pinned.
fn link_target(path: &Path) -> Result<Option<LinkTarget>, NodeError> {
    let link = match sys::open_pin(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        opened => opened,
    };
    link.and_then(|link| sys::link_info(link.as_fd()))
        .map(|info| Some(info.target))
        .map_err(|source| NodeError::Link { path: path.display().to_string(), source })
}

/// Pins a link, replacing what an earlier agent left.
pub(super) fn replace_pin(link: &OwnedFd, path: &Path) -> io::Result<()> {
    match sys::pin(link.as_fd(), path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            std::fs::remove_file(path)?;
            sys::pin(link.as_fd(), path)
        }
        pinned => pinned,
    }
}
