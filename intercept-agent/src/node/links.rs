//! A pod's links: one for each program, pinned in the pod's folder.

use std::{
    io,
    os::fd::{AsFd as _, OwnedFd},
    path::Path,
};

use intercept_common::names;

use super::{Node, NodeError, Target};
use crate::{
    kernel::{self, LinkTarget},
    programs,
};

impl Node {
    /// Make the links of a pod that are not there.
    pub(super) fn link(&self, target: &Target) -> Result<(), NodeError> {
        let cookie = target.netns.cookie();
        let cgroup = target.cgroup.path().display().to_string();
        for program in names::CGROUP_PROGRAMS {
            let path = self.store.pod(cookie).join(program);
            if self.link_is(&path, LinkTarget::Cgroup(Some(target.cgroup.id()))) {
                continue;
            }
            let attach = || {
                let fd = kernel::open_pin(&self.store.programs().join(program))?;
                let link =
                    kernel::link_create(fd.as_fd(), target.cgroup.as_fd(), programs::attach_type(program))?;
                replace_pin(&link, &path)
            };
            attach().map_err(|source| NodeError::Attach { program, target: cgroup.clone(), source })?;
        }
        let path = self.store.pod(cookie).join(names::SK_LOOKUP);
        if self.link_is(&path, LinkTarget::Netns(u32::try_from(target.netns.inode()).ok())) {
            return Ok(());
        }
        let program = self.lookup()?.load(cookie)?;
        kernel::link_create(program.as_fd(), target.netns.as_fd(), programs::attach_type(names::SK_LOOKUP))
            .and_then(|link| replace_pin(&link, &path))
            .map_err(|source| NodeError::Attach {
                program: names::SK_LOOKUP,
                target: target.netns.name().to_owned(),
                source,
            })
    }

    pub(super) fn link_is(&self, path: &Path, target: LinkTarget) -> bool {
        kernel::open_pin(path)
            .and_then(|link| kernel::link_info(link.as_fd()))
            .is_ok_and(|info| info.target == target)
    }

    pub(super) fn links_intact(&self, cookie: u64, target: &Target) -> bool {
        let dir = self.store.pod(cookie);
        names::CGROUP_PROGRAMS
            .iter()
            .all(|name| self.link_is(&dir.join(name), LinkTarget::Cgroup(Some(target.cgroup.id()))))
            && self.link_is(
                &dir.join(names::SK_LOOKUP),
                LinkTarget::Netns(u32::try_from(target.netns.inode()).ok()),
            )
    }

    /// The cgroup of a pod if that and its namespace are still there. The links tell: they outlive both and then name
    /// neither.
    pub fn cgroup_of(&self, cookie: u64) -> Option<u64> {
        let target_of = |name: &str| {
            kernel::open_pin(&self.store.pod(cookie).join(name))
                .and_then(|link| kernel::link_info(link.as_fd()))
                .map(|info| info.target)
        };
        match (target_of(names::SOCK_OPS), target_of(names::SK_LOOKUP)) {
            (Ok(LinkTarget::Cgroup(cgroup)), Ok(LinkTarget::Netns(Some(_)))) => cgroup,
            _ => None,
        }
    }

    /// Put this build's programs under the links of a pod.
    pub(super) fn replace_programs(&self, cookie: u64) -> Result<(), NodeError> {
        let dir = self.store.pod(cookie);
        for program in names::CGROUP_PROGRAMS {
            let update = || {
                let link = kernel::open_pin(&dir.join(program))?;
                let fd = kernel::open_pin(&self.store.programs().join(program))?;
                kernel::link_update(link.as_fd(), fd.as_fd())
            };
            update().map_err(|source| NodeError::Replace { program, cookie, source })?;
        }
        self.replace_join(cookie);
        let program = self.lookup()?.load(cookie)?;
        kernel::open_pin(&dir.join(names::SK_LOOKUP))
            .and_then(|link| kernel::link_update(link.as_fd(), program.as_fd()))
            .map_err(|source| NodeError::Replace { program: names::SK_LOOKUP, cookie, source })
    }
}

/// Pin a link in place of what an earlier agent left.
pub(super) fn replace_pin(link: &OwnedFd, path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    kernel::pin(link.as_fd(), path)
}
