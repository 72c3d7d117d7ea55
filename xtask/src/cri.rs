//! Pods of a real container runtime: containerd, runc and the CNI plugins of Debian, which are unpacked into the cache
//! and not installed.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};
use clap::Args;

use crate::{build, image, manifests, run, setup, setup::Group, sweep, workspace};

/// Debian's packages of what runs pods; their libraries (libc6, libseccomp2) are on every system with systemd.
const PACKAGES: [&str; 3] = ["containerd", "runc", "containernetworking-plugins"];
/// What is run from them, and must start here.
const PROGRAMS: [&str; 2] = ["usr/bin/containerd", "usr/sbin/runc"];

#[derive(Args)]
pub(crate) struct Arguments {
    /// Do nothing, and say so, where containerd is not in the cache
    #[arg(long)]
    if_cached: bool,
}

/// Runs the tests that need containerd, in namespaces and cgroups of their own.
pub(crate) fn cri(arguments: &Arguments) -> Result<()> {
    let folder = workspace::cache()?.join("cri");
    if arguments.if_cached && !folder.is_dir() {
        println!(
            "left out: pods of containerd, which is not in {} (`cargo xtask cri` gets it)",
            folder.display()
        );
        return Ok(());
    }
    setup::setup(&[Group::Base, Group::Cri])?;
    if !folder.is_dir() {
        fetch(&folder).with_context(|| format!("getting {}", PACKAGES.join(", ")))?;
    }
    for program in PROGRAMS {
        run::output(Command::new(folder.join(program)).arg("--version"))
            .with_context(|| format!("trying what is in {}; remove it to get it anew", folder.display()))?;
    }
    let agent = build::agent()?;
    let image = image::image()?;
    let uninstall = workspace::target().join("image/uninstall.yaml");
    fs::write(&uninstall, manifests::rendered(&["cleanUpOnExit=true"])?)
        .with_context(|| format!("writing {}", uninstall.display()))?;
    let before = sweep::present();
    let mut test = run::cargo("test");
    test.args(["--package", "tests", "--test", "cri", "--", "--ignored", "--test-threads=1"]);
    test.env("INTERCEPT_CRI", &folder).env("INTERCEPT_IMAGE", image).env("INTERCEPT_UNINSTALL", uninstall);
    let tested = run::shown(build::with_parts(&mut test, &agent)?);
    let mut left = sweep::present();
    left.retain(|item| !before.contains(item));
    let list: Vec<_> = left.iter().map(ToString::to_string).collect();
    tested?;
    ensure!(left.is_empty(), "left behind: {}; `cargo xtask clean` removes it", list.join(", "));
    Ok(())
}

fn fetch(folder: &Path) -> Result<()> {
    let unpacked = folder.with_extension("part");
    drop(fs::remove_dir_all(&unpacked));
    fs::create_dir_all(&unpacked).with_context(|| format!("making {}", unpacked.display()))?;
    let download = || {
        let heading = format!("downloading {}", PACKAGES.join(", "));
        // The user that apt would become cannot write to a cache in root's home.
        let root = ["-o", "APT::Sandbox::User=root"];
        run::quietly(&heading, setup::apt("download").args(root).args(PACKAGES).current_dir(&unpacked))
    };
    // Without lists of packages, or with old ones, it finds none.
    if download().is_err() {
        run::quietly("updating the lists of packages", &mut setup::apt("update"))?;
        download()?;
    }
    for archive in archives(&unpacked)? {
        run::output(Command::new("dpkg-deb").arg("-x").args([&archive, &unpacked]))?;
        fs::remove_file(&archive).with_context(|| format!("removing {}", archive.display()))?;
    }
    fs::rename(&unpacked, folder).with_context(|| format!("keeping {}", folder.display()))
}

fn archives(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(folder).with_context(|| format!("reading {}", folder.display()))?;
    let paths = entries.flatten().map(|entry| entry.path());
    Ok(paths.filter(|path| path.extension().is_some_and(|ending| ending == "deb")).collect())
}
