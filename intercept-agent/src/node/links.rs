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
    /// Make the links of a pod that are not there.
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

    /// The programs of the cgroup that this kernel has: all but those that serve one option and of which it lacks
    /// something.
    fn loaded_programs(&self) -> impl Iterator<Item = &'static str> + use<'_> {
        let programs = self.store.programs();
        names::CGROUP_PROGRAMS
            .into_iter()
            .filter(move |name| support::need(name) == Need::Always || programs.join(name).exists())
    }

    /// Refuse a capture for which this kernel lacks something, in the words of `check`.
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
            // It has come since: with a module, or a change of the kernel's settings.
            None => Err(NodeError::LeftOut),
        }
    }

    /// Whether a link is pinned there and holds on to that.
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

    /// The cgroup of a pod if that and its namespace are still there.
    pub fn cgroup_of(&self, cookie: NetnsCookie) -> Result<Option<u64>, NodeError> {
        Ok(self.place_of(cookie)?.map(|(cgroup, _)| cgroup))
    }

    /// The cgroup's id and the namespace's inode of a pod if both are still there. The links tell: they outlive both
    /// and then name neither. A pod whose links cannot be looked at just now is not one that is gone.
    pub(super) fn place_of(&self, cookie: NetnsCookie) -> Result<Option<(u64, u64)>, NodeError> {
        let dir = self.store.pod(cookie);
        Ok(match (link_target(&dir.join(names::SOCK_OPS))?, link_target(&dir.join(names::SK_LOOKUP))?) {
            (Some(LinkTarget::Cgroup(Some(cgroup))), Some(LinkTarget::Netns(Some(netns)))) => {
                Some((cgroup, netns.into()))
            }
            _ => None,
        })
    }

    /// Whether a pod's namespace may still be there: its link says so, or there is none.
    pub(super) fn may_have_netns(&self, cookie: NetnsCookie) -> Result<bool, NodeError> {
        let link = link_target(&self.store.pod(cookie).join(names::SK_LOOKUP))?;
        Ok(link != Some(LinkTarget::Netns(None)))
    }

    /// Put this build's programs under the links of a pod.
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

/// What the link that is pinned there holds on to; none if nothing is pinned there.
fn link_target(path: &Path) -> Result<Option<LinkTarget>, NodeError> {
    let link = match sys::open_pin(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        opened => opened,
    };
    link.and_then(|link| sys::link_info(link.as_fd()))
        .map(|info| Some(info.target))
        .map_err(|source| NodeError::Link { path: path.display().to_string(), source })
}

/// Pin a link in place of what an earlier agent left.
pub(super) fn replace_pin(link: &OwnedFd, path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    sys::pin(link.as_fd(), path)
}
