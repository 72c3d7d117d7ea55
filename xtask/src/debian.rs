//! Debian packages that are unpacked without being installed.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};

use crate::{architecture::Architecture, run, setup};

/// Lists of packages: those of the machine, or separate ones.
#[derive(Default)]
pub(crate) struct PackageLists {
    options: Vec<String>,
}

impl PackageLists {
    /// Separate lists in this folder, for these sources (`deb bookworm main`) of the Debian archive that this machine uses.
    pub(crate) fn own(
        folder: &Path,
        sources: &[&str],
        architecture: Architecture,
        heading: &str,
    ) -> Result<Self> {
        let archive = archive()?;
        let lines = sources.iter().filter_map(|source| source.split_once(' '));
        let lines: Vec<String> = lines.map(|(kind, rest)| format!("{kind} {archive} {rest}")).collect();
        Self::update(folder, &lines, architecture, heading)
    }

    /// Separate lists in this folder, for this machine's Debian releases on another architecture.
    pub(crate) fn of_machine(folder: &Path, architecture: Architecture, heading: &str) -> Result<Self> {
        Self::update(folder, &machine_sources()?, architecture, heading)
    }

    fn update(folder: &Path, lines: &[String], architecture: Architecture, heading: &str) -> Result<Self> {
        for part in ["lists/partial", "archives/partial"] {
            fs::create_dir_all(folder.join(part)).with_context(|| format!("making {}", folder.display()))?;
        }
        let list = folder.join("sources.list");
        fs::write(&list, lines.join("\n") + "\n").with_context(|| format!("writing {}", list.display()))?;
        let folder = folder.display();
        let architecture = architecture.as_str();
        let settings = [
            format!("APT::Architecture={architecture}"),
            format!("APT::Architectures::={architecture}"),
            format!("Dir::Etc::sourcelist={folder}/sources.list"),
            "Dir::Etc::sourceparts=-".to_owned(),
            format!("Dir::State::lists={folder}/lists"),
            format!("Dir::Cache={folder}"),
            // Only packages are needed.
            "Acquire::Languages=none".to_owned(),
            "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false".to_owned(),
        ];
        let lists =
            Self { options: settings.into_iter().flat_map(|value| ["-o".to_owned(), value]).collect() };
        run::quietly(heading, lists.command("apt-get").arg("update"))?;
        Ok(lists)
    }

    /// A program of apt that uses these lists.
    pub(crate) fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        // apt's sandbox user cannot write to a cache in root's home.
        command.args(&self.options).args(["-q", "-o", "APT::Sandbox::User=root", "-o", "Acquire::Retries=3"]);
        command
    }

    /// Downloads packages, unpacks them into a new folder and finishes it. The folder appears when it is complete.
    pub(crate) fn fetch(
        &self,
        packages: &[&str],
        folder: &Path,
        finish: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<()> {
        let unpacked = folder.with_extension("part");
        drop(fs::remove_dir_all(&unpacked));
        fs::create_dir_all(&unpacked).with_context(|| format!("making {}", unpacked.display()))?;
        // apt finds no package without up-to-date lists.
        if self.unpack(packages, &unpacked).is_err() {
            run::quietly("updating the lists of packages", &mut setup::apt("update"))?;
            self.unpack(packages, &unpacked)?;
        }
        finish(&unpacked)?;
        fs::rename(&unpacked, folder).with_context(|| format!("keeping {}", folder.display()))
    }

    /// Downloads packages and unpacks them into an existing folder.
    pub(crate) fn unpack(&self, packages: &[&str], folder: &Path) -> Result<()> {
        let heading = format!("downloading {}", packages.join(", "));
        let mut download = self.command("apt-get");
        run::quietly(&heading, download.arg("download").args(packages).current_dir(folder))?;
        for archive in with_ending(folder, "deb")? {
            run::output(Command::new("dpkg-deb").arg("-x").arg(&archive).arg(folder))?;
            fs::remove_file(&archive).with_context(|| format!("removing {}", archive.display()))?;
        }
        Ok(())
    }

    /// Downloads packages and everything that they depend on, and unpacks them into an existing folder. None is
    /// configured: no script of theirs runs.
    pub(crate) fn unpack_with_dependencies(&self, packages: &[&str], folder: &Path) -> Result<()> {
        let apt = folder.with_extension("apt");
        let archives = apt.join("archives");
        fs::create_dir_all(archives.join("partial")).with_context(|| format!("making {}", apt.display()))?;
        // To a system without any package, all dependencies are missing.
        let status = apt.join("status");
        fs::write(&status, "").with_context(|| format!("writing {}", status.display()))?;
        let mut install = self.command("apt-get");
        install.args(["install", "--download-only", "--yes", "--no-install-recommends"]);
        install.args(["-o", "Debug::NoLocking=1", "-o", &format!("Dir::State::status={}", status.display())]);
        install.args(["-o", &format!("Dir::Cache={}", apt.display())]).args(packages);
        run::quietly(&format!("downloading {} and what these need", packages.join(", ")), &mut install)?;
        for archive in with_ending(&archives, "deb")? {
            let mut unpack = Command::new("sh");
            // Folders that are links here, such as /lib, stay so.
            unpack
                .args(["-ec", "dpkg-deb --fsys-tarfile \"$0\" | tar -x --keep-directory-symlink -C \"$1\""]);
            run::output(unpack.arg(&archive).arg(folder))?;
        }
        fs::remove_dir_all(&apt).with_context(|| format!("removing {}", apt.display()))
    }

    /// Downloads the source of a package and unpacks it with Debian's patches into a new folder.
    pub(crate) fn unpack_source(&self, package: &str, folder: &Path) -> Result<()> {
        let parent = folder.parent().context("a folder to unpack into has no parent")?;
        fs::create_dir_all(parent).with_context(|| format!("making {}", parent.display()))?;
        let mut download = self.command("apt-get");
        download.args(["source", "--download-only", package]).current_dir(parent);
        run::quietly(&format!("downloading the source of {package}"), &mut download)?;
        let description = with_ending(parent, "dsc")?;
        let description =
            description.first().with_context(|| format!("there is no .dsc in {}", parent.display()))?;
        // apt has checked it against the signed list.
        let mut unpack = Command::new("dpkg-source");
        run::output(unpack.args(["--no-check", "--extract"]).arg(description).arg(folder)).map(drop)
    }
}

/// The files of a folder with this extension.
fn with_ending(folder: &Path, ending: &str) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(folder).with_context(|| format!("reading {}", folder.display()))?;
    let paths = entries.flatten().map(|entry| entry.path());
    Ok(paths.filter(|path| path.extension().is_some_and(|found| found == ending)).collect())
}

/// The Debian archive that this machine uses.
fn archive() -> Result<String> {
    let archives = index_targets("$(REPO_URI)")?;
    let debian = archives.lines().find(|uri| uri.trim_end_matches('/').ends_with("/debian"));
    debian
        .map(str::to_owned)
        .context("no archive of Debian among apt's sources; these packages come from there")
}

/// The Debian sources of this machine, including security updates, as lines of a sources.list.
fn machine_sources() -> Result<Vec<String>> {
    let targets = index_targets("$(REPO_URI) $(RELEASE) $(COMPONENT)")?;
    let sources: Vec<String> =
        targets.lines().filter(|line| is_debian(line)).map(|line| format!("deb {line}")).collect();
    ensure!(!sources.is_empty(), "no archive of Debian among apt's sources; these packages come from there");
    Ok(sources)
}

fn is_debian(target: &str) -> bool {
    let uri = target.split(' ').next().unwrap_or_default().trim_end_matches('/');
    uri.ends_with("/debian") || uri.ends_with("/debian-security")
}

fn index_targets(format: &str) -> Result<String> {
    run::output(Command::new("apt-get").args(["indextargets", "--format", format, "Created-By: Packages"]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_of_others_are_left_out() {
        assert!(is_debian("http://deb.debian.org/debian/ bookworm main"));
        assert!(is_debian("http://deb.debian.org/debian-security/ bookworm-security main"));
        assert!(!is_debian("https://deb.nodesource.com/node_20.x/ nodistro main"));
    }
}
