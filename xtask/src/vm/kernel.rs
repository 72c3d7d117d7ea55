//! Debian's kernels: which there are, and getting one into the cache.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail};

use crate::{debian::Lists, run, workspace};

/// Releases whose kernels are offered, oldest first, when the machine's own lists have no such kernel.
const RELEASES: [&str; 4] = ["bullseye", "bookworm", "trixie", "trixie-backports"];

/// An unpacked package.
pub(super) struct Kernel {
    /// The compressed kernel.
    pub(super) image: PathBuf,
    /// The folder of its modules, which has `modules.dep`.
    pub(super) modules: PathBuf,
}

impl Kernel {
    /// The newest kernel that Debian has of this version ("6.1"), from the cache if any is there.
    pub(super) fn get(version: &str) -> Result<Self> {
        if version.is_empty() || !version.chars().all(|c| c.is_ascii_digit() || c == '.') {
            bail!("getting Linux {version:?}: not a version such as 6.1");
        }
        let folder = workspace::cache()?.join("kernels").join(version);
        if !folder.is_dir() {
            fetch(version, &folder).with_context(|| format!("getting Linux {version}"))?;
        }
        Self::open(&folder).with_context(|| format!("using {}; remove it to get it anew", folder.display()))
    }

    fn open(folder: &Path) -> Result<Self> {
        let modules = only_entry(&folder.join("lib/modules"), "")?;
        let image = only_entry(&folder.join("boot"), "vmlinuz-")?;
        Ok(Self { image, modules })
    }
}

/// Our own lists, which have [`RELEASES`].
fn own_lists() -> Result<Lists> {
    let sources = RELEASES.map(|release| format!("deb {release} main"));
    let sources = sources.each_ref().map(String::as_str);
    Lists::own(&workspace::cache()?.join("apt"), &sources, "reading which kernels Debian has")
}

/// The package with the newest kernel of the version.
fn newest_of(lists: &Lists, version: &str) -> Result<Option<String>> {
    let names = run::output(lists.command("apt-cache").args(["pkgnames", "linux-image-"]))?;
    Ok(newest(names.lines(), version).map(str::to_owned))
}

fn newest<'a>(names: impl Iterator<Item = &'a str>, version: &str) -> Option<&'a str> {
    let start = format!("linux-image-{version}.");
    names
        .filter(|name| name.starts_with(&start) && name.ends_with("-cloud-amd64"))
        .max_by_key(|name| numbers(name))
}

fn numbers(name: &str) -> Vec<u32> {
    name.split(|c: char| !c.is_ascii_digit()).filter_map(|digits| digits.parse().ok()).collect()
}

fn fetch(version: &str, folder: &Path) -> Result<()> {
    let mut lists = Lists::default();
    let mut package = newest_of(&lists, version)?;
    if package.is_none() {
        lists = own_lists()?;
        package = newest_of(&lists, version)?;
    }
    let package = package.with_context(|| format!("Debian ({}) has no such kernel", RELEASES.join(", ")))?;

    let unpacked = folder.with_extension("part");
    drop(fs::remove_dir_all(&unpacked));
    fs::create_dir_all(&unpacked).with_context(|| format!("making {}", unpacked.display()))?;
    lists.unpack(&[&package], &unpacked)?;
    if !unpacked.join("lib").exists() {
        std::os::unix::fs::symlink("usr/lib", unpacked.join("lib")).context("linking lib to usr/lib")?;
    }
    let modules = Kernel::open(&unpacked)?.modules;
    let release = modules.file_name().context("the folder of modules has no name")?;
    let depmod = run::which("depmod").context("there is no depmod: install kmod")?;
    run::output(Command::new(depmod).arg("--basedir").arg(&unpacked).arg(release))?;
    fs::rename(&unpacked, folder).with_context(|| format!("keeping {}", folder.display()))
}

fn only_entry(folder: &Path, start: &str) -> Result<PathBuf> {
    let entries = fs::read_dir(folder).with_context(|| format!("reading {}", folder.display()))?;
    let mut paths = entries.flatten().filter(|entry| entry.file_name().to_string_lossy().starts_with(start));
    match (paths.next(), paths.next()) {
        (Some(entry), None) => Ok(entry.path()),
        _ => bail!("{} should have one entry {start}*", folder.display()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_of_a_version_is_taken() {
        let names = [
            "linux-image-6.1.0-9-cloud-amd64",
            "linux-image-6.1.0-51-cloud-amd64",
            "linux-image-6.1.0-60-amd64",
            "linux-image-6.12-cloud-amd64",
            "linux-image-6.12.100+deb12-cloud-amd64",
            "linux-image-6.12.99+deb12-cloud-amd64",
            "linux-image-6.12.101+deb12-cloud-amd64-unsigned",
        ];
        assert_eq!(newest(names.into_iter(), "6.1"), Some(names[1]));
        assert_eq!(newest(names.into_iter(), "6.12"), Some(names[4]));
        assert_eq!(newest(names.into_iter(), "6.2"), None);
    }
}
