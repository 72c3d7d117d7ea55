//! Tests with a real container runtime: Debian's containerd, runc and CNI plugins, unpacked into the cache without being
//! installed.

use std::path::PathBuf;

use anyhow::{Context, Result};

use crate::{
    architecture::Architecture, debian::PackageLists, image, manifests, parts, setup, setup::Group, test,
    workspace,
};

/// The Debian packages. Their libraries (libc6, libseccomp2) are on every system with systemd.
const PACKAGES: [&str; 3] = ["containerd", "runc", "containernetworking-plugins"];
/// The programs in them that must start on this machine.
const PROGRAMS: [&str; 2] = ["usr/bin/containerd", "usr/sbin/runc"];

/// Runs the tests that need containerd, in their own namespaces and cgroups.
pub(crate) fn cri(arguments: &parts::PartsArgs) -> Result<()> {
    if arguments.leave_out(&missing()?, "pods of containerd", "`cargo xtask cri` gets it") {
        return Ok(());
    }
    setup::setup(&[Group::Base, Group::Cri])?;
    let folder = get()?;
    let image = image::image(&[Architecture::HOST])?;
    let uninstall = workspace::target().join("image/uninstall.yaml");
    manifests::write(&["cleanUpOnExit=true"], &uninstall)?;
    test::needing(
        "cri",
        &[("INTERCEPT_CRI", &folder), ("INTERCEPT_IMAGE", &image), ("INTERCEPT_UNINSTALL", &uninstall)],
    )
}

/// The folder of its parts, if that is not there.
pub(crate) fn missing() -> Result<Vec<PathBuf>> {
    let folder = folder()?;
    Ok(if folder.is_dir() { Vec::new() } else { vec![folder] })
}

/// Gets what is not there; returns the folder.
pub(crate) fn get() -> Result<PathBuf> {
    let folder = folder()?;
    if !folder.is_dir() {
        PackageLists::default()
            .fetch(&PACKAGES, &folder, |_| Ok(()))
            .with_context(|| format!("getting {}", PACKAGES.join(", ")))?;
    }
    parts::try_programs(&folder, &PROGRAMS)?;
    Ok(folder)
}

fn folder() -> Result<PathBuf> {
    Ok(workspace::cache()?.join("cri"))
}
