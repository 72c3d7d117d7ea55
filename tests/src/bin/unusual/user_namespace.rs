//! A user namespace of one's own.

use std::fs;
use std::io::{Read, Write};

use anyhow::{Context, Result, ensure};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::{ForkResult, Gid, Uid, fork, setresgid, setresuid};

/// Continues in a child as the superuser of a new user namespace. This process ends as soon as it can, so that only
/// processes in the namespace are visible.
pub(crate) fn enter(first: u32) -> Result<()> {
    let (mut unshared, mut tell_unshared) = std::io::pipe()?;
    let (mut mapped, mut tell_mapped) = std::io::pipe()?;
    // SAFETY: this process has one thread.
    match unsafe { fork() }.context("fork")? {
        ForkResult::Child => {
            drop((unshared, tell_mapped));
            unshare(CloneFlags::CLONE_NEWUSER).context("unshare")?;
            tell_unshared.write_all(b"x")?;
            ensure!(mapped.read(&mut [0])? == 1, "nobody made the maps");
            let (root, group) = (Uid::from_raw(0), Gid::from_raw(0));
            setresgid(group, group, group).context("setresgid in the namespace")?;
            setresuid(root, root, root).context("setresuid in the namespace")?;
            // Only now is the other gone.
            ensure!(mapped.read(&mut [0])? == 0, "the other process said more than once");
            Ok(())
        }
        ForkResult::Parent { child } => {
            drop((tell_unshared, mapped));
            ensure!(unshared.read(&mut [0])? == 1, "the child has not got its namespace");
            for file in ["uid_map", "gid_map"] {
                fs::write(format!("/proc/{child}/{file}"), format!("0 {first} 65536"))
                    .with_context(|| format!("writing {file}"))?;
            }
            tell_mapped.write_all(b"x")?;
            std::process::exit(0);
        }
    }
}
