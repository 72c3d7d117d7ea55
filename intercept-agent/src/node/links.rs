//! A pod's links: one for each program, pinned in the pod's folder.

use std::{
    io,
    os::fd::{AsFd as _, OwnedFd},
    path::Path,
};

use intercept_common::names;

use super::{Node, NodeError, Target};
use crate::{
    ids::NetnsCookie,
    options::Config,
    programs,
    support::{self, Lacking, Need},
    sys::{self, LinkTarget},
};

impl Node {
    /// Creates the missing links of a pod.
    pub(super) fn link(&self, target: &Target) -> Result<(), NodeError> {
        let cookie = target.netns.cookie();
        let cgroup = target.cgroup.path().display().to_string();
        for program in self.loaded_programs() {
            let path = self.store.pod(cookie).join(program);
            if self.link_is(&path, LinkTarget::Cgroup(Some(target.cgroup.id())))? {
                continue;
            }
            let attach = || {
                let fd = sys::open_pin(&self.store.programs().join(program))?;
                let link =
                    sys::link_create(fd.as_fd(), target.cgroup.as_fd(), programs::attach_type(program))?;
                replace_pin(&link, &path)
            };
            attach().map_err(|source| NodeError::Attach { program, target: cgroup.clone(), source })?;
        }
        let path = self.store.pod(cookie).join(names::SK_LOOKUP);
        if self.link_is(&path, netns_target(target))? {
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

    /// The cgroup programs that this kernel supports. Only programs that serve a single option may be missing.
    fn loaded_programs(&self) -> impl Iterator<Item = &'static str> + use<'_> {
        let programs = self.store.programs();
        names::CGROUP_PROGRAMS
            .into_iter()
            .filter(move |name| support::need(name) == Need::Always || programs.join(name).exists())
    }

    /// Refuses a capture that needs something this kernel lacks, in the words of `check`.
    pub(super) fn refuse_unsupported(&self, config: &Config) -> Result<(), NodeError> {
        let loaded: Vec<_> = self.loaded_programs().collect();
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

    pub(super) fn links_intact(&self, cookie: NetnsCookie, target: &Target) -> Result<bool, NodeError> {
        let dir = self.store.pod(cookie);
        let cgroup = LinkTarget::Cgroup(Some(target.cgroup.id()));
        for name in self.loaded_programs() {
            if !self.link_is(&dir.join(name), cgroup)? {
                return Ok(false);
            }
        }
        self.link_is(&dir.join(names::SK_LOOKUP), netns_target(target))
    }

    /// Returns the id of a pod's cgroup if cgroup and namespace still exist.
    pub fn cgroup_of(&self, cookie: NetnsCookie) -> Result<Option<u64>, NodeError> {
        Ok(self.place_of(cookie)?.map(|(cgroup, _)| cgroup))
    }

    /// Returns the id of a pod's cgroup and the inode of its namespace if both still exist. The links outlive both and
    /// then name neither. An error does not mean that the pod is gone.
    pub(super) fn place_of(&self, cookie: NetnsCookie) -> Result<Option<(u64, u64)>, NodeError> {
        let dir = self.store.pod(cookie);
        Ok(match (link_target(&dir.join(names::SOCK_OPS))?, link_target(&dir.join(names::SK_LOOKUP))?) {
            (Some(LinkTarget::Cgroup(Some(cgroup))), Some(LinkTarget::Netns(Some(netns)))) => {
                Some((cgroup, netns.into()))
            }
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
        let dir = self.store.pod(cookie);
        for program in self.loaded_programs() {
            let update = || {
                let link = sys::open_pin(&dir.join(program))?;
                let fd = sys::open_pin(&self.store.programs().join(program))?;
                sys::link_update(link.as_fd(), fd.as_fd())
            };
            update().map_err(|source| NodeError::Replace { program, cookie, source })?;
        }
        self.replace_join(cookie);
        let program = self.lookup()?.load(cookie)?;
        sys::open_pin(&dir.join(names::SK_LOOKUP))
            .and_then(|link| sys::link_update(link.as_fd(), program.as_fd()))
            .map_err(|source| NodeError::Replace { program: names::SK_LOOKUP, cookie, source })
    }
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
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    sys::pin(link.as_fd(), path)
}
