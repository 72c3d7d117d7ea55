//! A network namespace that lives as long as its guard.

use std::fs::{self, File};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};
use rustix::fs::{FlockOperation, flock};
use rustix::mount::{
    MountPropagationFlags, UnmountFlags, mount_bind, mount_bind_recursive, mount_change, unmount,
};
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space, unshare_unsafe};

use super::{complain, name};

/// Where namespaces are bind-mounted, as by iproute2.
pub const FOLDER: &str = "/run/netns";

/// A network namespace, bind-mounted at [`Namespace::path`].
#[derive(Debug)]
pub struct Namespace {
    name: String,
    path: PathBuf,
    fd: OwnedFd,
    is_own: bool,
}

impl Namespace {
    /// A new namespace with lo up, without duplicate address detection and reverse path filter, in which every user may
    /// bind every port.
    pub fn new(label: &str) -> Result<Self> {
        let name = name::fresh(label);
        let path = Path::new(FOLDER).join(&name);
        prepare_folder().with_context(|| format!("preparing {FOLDER}"))?;
        File::create_new(&path).with_context(|| format!("making {}", path.display()))?;
        let made = std::thread::scope(|scope| {
            scope
                .spawn(|| -> Result<OwnedFd> {
                    // SAFETY: only the network namespace is unshared; memory and descriptors stay shared.
                    unsafe { unshare_unsafe(UnshareFlags::NEWNET) }
                        .context("making a network namespace (needs CAP_SYS_ADMIN)")?;
                    mount_bind("/proc/thread-self/ns/net", &path)
                        .with_context(|| format!("keeping the namespace at {}", path.display()))?;
                    Ok(File::open(&path)?.into())
                })
                .join()
                .map_err(|_| anyhow!("the thread making a namespace panicked"))?
        });
        let fd = match made {
            Ok(fd) => fd,
            Err(error) => {
                drop(fs::remove_file(&path));
                return Err(error);
            }
        };
        let namespace = Self { name, path, fd, is_own: true };
        namespace.prepare()?;
        Ok(namespace)
    }

    /// The namespace of the first process, which a virtual machine or a PID namespace has. It is not removed.
    pub fn of_machine() -> Result<Self> {
        let path = PathBuf::from("/proc/1/ns/net");
        let fd = File::open(&path).with_context(|| format!("opening {}", path.display()))?.into();
        let namespace = Self { name: "machine".to_owned(), path, fd, is_own: false };
        namespace.prepare()?;
        Ok(namespace)
    }

    fn prepare(&self) -> Result<()> {
        for (key, value) in [
            ("net/ipv6/conf/all/accept_dad", "0"),
            ("net/ipv6/conf/default/accept_dad", "0"),
            ("net/ipv4/conf/all/rp_filter", "0"),
            ("net/ipv4/conf/default/rp_filter", "0"),
            ("net/ipv4/ip_unprivileged_port_start", "0"),
        ] {
            self.sysctl(key, value)?;
        }
        self.link_up("lo")
    }

    /// The namespace's name: `intercept-test.MAKER.N.LABEL`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The path of the namespace, for `--netns`.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Runs `work` on a thread of its own inside the namespace.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        std::thread::scope(|scope| {
            scope
                .spawn(|| {
                    move_into_link_name_space(self.fd.as_fd(), Some(LinkNameSpaceType::Network))
                        .with_context(|| format!("entering {}", self.path.display()))?;
                    Ok(work())
                })
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Writes a setting below /proc/sys, for instance `net/ipv4/ip_forward`.
    pub fn sysctl(&self, key: &str, value: &str) -> Result<()> {
        let path = Path::new("/proc/sys").join(key);
        self.run(|| fs::write(&path, value))?
            .with_context(|| format!("writing {value} to {} in {}", path.display(), self.name))
    }
}

impl AsFd for Namespace {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        if self.is_own
            && let Err(error) = remove(&self.path)
        {
            complain(&format_args!("removing the namespace {}: {error}", self.path.display()));
        }
    }
}

/// Makes [`FOLDER`] a shared mount, as `ip netns add` does.
///
/// Otherwise the next `ip netns add` would mount the folder over itself, with copies of the namespaces' mounts.
/// Removing a namespace would then undo the copy only, and its file could not be removed.
fn prepare_folder() -> std::io::Result<()> {
    fs::create_dir_all(FOLDER)?;
    // iproute2 takes the same lock, so that the folder is mounted only once. Closing the file releases it.
    let folder = File::open(FOLDER)?;
    flock(&folder, FlockOperation::LockExclusive)?;
    let share = || mount_change(FOLDER, MountPropagationFlags::SHARED | MountPropagationFlags::REC);
    match share() {
        // Not a mount point yet.
        Err(rustix::io::Errno::INVAL) => {
            mount_bind_recursive(FOLDER, FOLDER)?;
            share()?;
        }
        result => result?,
    }
    Ok(())
}

/// Undoes the bind mount and removes its file.
pub(super) fn remove(path: &Path) -> std::io::Result<()> {
    match unmount(path, UnmountFlags::DETACH) {
        // Not a mount point: the process that made it died before the mount.
        Ok(()) | Err(rustix::io::Errno::INVAL) => fs::remove_file(path),
        Err(error) => Err(error.into()),
    }
}
