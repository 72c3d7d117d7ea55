//! Debian's kernels: which there are, and getting one into the cache.

use std::{
    cell::OnceCell,
    fmt, fs,
    path::{Path, PathBuf},
    process::Command,
    str::FromStr,
};

use anyhow::{Context, Result, bail};

use crate::{architecture::Architecture, debian::PackageLists, run, workspace};

/// Releases whose kernels are offered, oldest first.
const RELEASES: [&str; 4] =
    ["deb bullseye main", "deb bookworm main", "deb trixie main", "deb trixie-backports main"];

/// Which kernel is asked for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Wish {
    /// The newest of a series.
    Series(Series),
    /// The newest of all.
    Newest,
}

/// A version of Linux without what comes after its second number, such as 6.1.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) struct Series(u32, u32);

impl FromStr for Wish {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "newest" => Ok(Self::Newest),
            text => text.parse().map(Self::Series),
        }
    }
}

impl fmt::Display for Wish {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Series(series) => series.fmt(f),
            Self::Newest => f.write_str("newest"),
        }
    }
}

impl FromStr for Series {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let numbers = text.split_once('.').map(|(major, minor)| (major.parse(), minor.parse()));
        match numbers {
            Some((Ok(major), Ok(minor))) => Ok(Self(major, minor)),
            _ => Err("not a version such as 6.1, nor `newest`".to_owned()),
        }
    }
}

impl fmt::Display for Series {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.0, self.1)
    }
}

/// An unpacked kernel.
pub(super) struct Kernel {
    pub(super) series: Series,
    pub(super) architecture: Architecture,
    /// What is booted.
    pub(super) image: PathBuf,
    /// The folder of its modules, which has `modules.dep`.
    pub(super) modules: PathBuf,
}

/// The kernels that Debian has for an architecture, and those of them that are in the cache.
pub(super) struct Kernels {
    architecture: Architecture,
    cache: PathBuf,
    debian: OnceCell<Debian>,
}

/// What Debian's lists of packages say.
struct Debian {
    lists: PackageLists,
    /// Names of packages that begin like a kernel's.
    names: Vec<String>,
}

impl Kernels {
    pub(super) fn of(architecture: Architecture) -> Result<Self> {
        let cache = workspace::cache()?.join("kernels");
        Ok(Self { architecture, cache, debian: OnceCell::new() })
    }

    /// The kernel, from Debian unless any of its series is in the cache.
    pub(super) fn get(&self, wish: &Wish) -> Result<Kernel> {
        let series = match wish {
            Wish::Series(series) => *series,
            Wish::Newest => newest_series(&self.debian()?.names, self.architecture)
                .context("looking for the newest kernel: Debian has none")?,
        };
        let folder = self.folder(series);
        if !folder.is_dir() {
            self.fetch(series, &folder).with_context(|| format!("getting Linux {series}"))?;
        }
        self.open(series, &folder)
            .with_context(|| format!("using {}; remove it to get it again", folder.display()))
    }

    /// The kernel if it is in the cache; of [`Wish::Newest`] the newest that is there.
    pub(super) fn cached(&self, wish: &Wish) -> Result<Option<Kernel>> {
        let series = match wish {
            Wish::Series(series) => Some(*series).filter(|series| self.folder(*series).is_dir()),
            Wish::Newest => self.all_cached().into_iter().max(),
        };
        series.map(|series| self.open(series, &self.folder(series))).transpose()
    }

    fn all_cached(&self) -> Vec<Series> {
        let ending = format!("-{}", self.architecture.as_str());
        let entries = fs::read_dir(&self.cache).into_iter().flatten().flatten();
        entries.filter_map(|entry| entry.file_name().to_str()?.strip_suffix(&ending)?.parse().ok()).collect()
    }

    fn folder(&self, series: Series) -> PathBuf {
        self.cache.join(format!("{series}-{}", self.architecture.as_str()))
    }

    /// The lists, read once.
    fn debian(&self) -> Result<&Debian> {
        if let Some(debian) = self.debian.get() {
            return Ok(debian);
        }
        let apt = workspace::cache()?.join(format!("apt-kernels-{}", self.architecture.as_str()));
        let lists =
            PackageLists::own(&apt, &RELEASES, self.architecture, "reading which kernels Debian has")?;
        let names = run::output(lists.command("apt-cache").args(["pkgnames", "linux-"]))?;
        let names = names.lines().map(str::to_owned).collect();
        Ok(self.debian.get_or_init(|| Debian { lists, names }))
    }

    fn fetch(&self, series: Series, folder: &Path) -> Result<()> {
        let Debian { lists, names } = self.debian()?;
        let packages = packages(names, series, self.architecture)
            .with_context(|| format!("Debian ({}) has no such kernel", RELEASES.join(", ")))?;
        let mut part = folder.as_os_str().to_owned();
        part.push(".part");
        let unpacked = PathBuf::from(part);
        drop(fs::remove_dir_all(&unpacked));
        fs::create_dir_all(&unpacked).with_context(|| format!("making {}", unpacked.display()))?;
        lists.unpack(&packages.iter().map(String::as_str).collect::<Vec<_>>(), &unpacked)?;
        if !unpacked.join("lib").exists() {
            std::os::unix::fs::symlink("usr/lib", unpacked.join("lib")).context("linking lib to usr/lib")?;
        }
        let modules = self.open(series, &unpacked)?.modules;
        let release = modules.file_name().context("the folder of modules has no name")?;
        let depmod = run::which("depmod").context("there is no depmod: install kmod")?;
        run::output(Command::new(depmod).arg("--basedir").arg(&unpacked).arg(release))?;
        fs::rename(&unpacked, folder).with_context(|| format!("keeping {}", folder.display()))
    }

    fn open(&self, series: Series, folder: &Path) -> Result<Kernel> {
        let modules = only_entry(&folder.join("lib/modules"), "")?;
        // Since 6.19 it is with its modules.
        let beside = modules.join("vmlinuz");
        let image = if beside.is_file() { beside } else { only_entry(&folder.join("boot"), "vmlinuz-")? };
        Ok(Kernel { series, architecture: self.architecture, image, modules })
    }
}

/// The packages with the newest kernel of a series.
fn packages(names: &[String], series: Series, architecture: Architecture) -> Option<Vec<String>> {
    let releases = names.iter().filter_map(|name| release(name, architecture));
    let newest = releases
        .filter(|release| series_of(release) == Some(series))
        .max_by_key(|release| numbers(release))?;
    let split = ["binary", "modules"].map(|part| format!("linux-{part}-{newest}"));
    // Since 6.19 the package that is named after the image only depends on these two.
    Some(match split.iter().all(|part| names.contains(part)) {
        true => split.to_vec(),
        false => vec![format!("linux-image-{newest}")],
    })
}

fn newest_series(names: &[String], architecture: Architecture) -> Option<Series> {
    names.iter().filter_map(|name| series_of(release(name, architecture)?)).max()
}

/// "6.1.0-50-cloud-amd64", from the name of a package with a kernel for virtual machines.
fn release(name: &str, architecture: Architecture) -> Option<&str> {
    let release = name.strip_prefix("linux-image-")?;
    let version = release.strip_suffix(architecture.as_str())?.strip_suffix("-cloud-")?;
    // "6.12-cloud-amd64" is the newest of a series, and has nothing in it.
    (version.split('.').count() > 2).then_some(release)
}

fn series_of(release: &str) -> Option<Series> {
    let mut numbers = release.split('.');
    format!("{}.{}", numbers.next()?, numbers.next()?).parse().ok()
}

fn numbers(name: &str) -> Vec<u32> {
    name.split(|c: char| !c.is_ascii_digit()).filter_map(|digits| digits.parse().ok()).collect()
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

    fn names() -> Vec<String> {
        let names = [
            "linux-image-6.1.0-9-cloud-amd64",
            "linux-image-6.1.0-51-cloud-amd64",
            "linux-image-6.1.0-60-amd64",
            "linux-image-6.12-cloud-amd64",
            "linux-image-6.12.100+deb12-cloud-amd64",
            "linux-image-6.12.99+deb12-cloud-amd64",
            "linux-image-6.12.101+deb12-cloud-amd64-unsigned",
            "linux-image-6.18.15+deb13-cloud-arm64",
            "linux-image-7.3.4+deb13-cloud-amd64",
            "linux-binary-7.3.4+deb13-cloud-amd64",
            "linux-modules-7.3.4+deb13-cloud-amd64",
            "linux-image-cloud-amd64",
        ];
        names.map(str::to_owned).to_vec()
    }

    #[test]
    fn the_newest_of_a_series_is_taken() {
        let of = |series, architecture| packages(&names(), series, architecture).map(|names| names.join(" "));
        let amd64 = |major, minor| of(Series(major, minor), Architecture::Amd64);
        assert_eq!(amd64(6, 1).as_deref(), Some("linux-image-6.1.0-51-cloud-amd64"));
        assert_eq!(amd64(6, 12).as_deref(), Some("linux-image-6.12.100+deb12-cloud-amd64"));
        assert_eq!(amd64(6, 2), None);
        assert_eq!(amd64(6, 18), None);
        let arm64 = of(Series(6, 18), Architecture::Arm64);
        assert_eq!(arm64.as_deref(), Some("linux-image-6.18.15+deb13-cloud-arm64"));
    }

    #[test]
    fn a_kernel_in_several_packages_is_all_of_them() {
        let both = packages(&names(), Series(7, 3), Architecture::Amd64).expect("there");
        assert_eq!(both, ["linux-binary-7.3.4+deb13-cloud-amd64", "linux-modules-7.3.4+deb13-cloud-amd64"]);
    }

    #[test]
    fn the_newest_of_all_is_found() {
        assert_eq!(newest_series(&names(), Architecture::Amd64), Some(Series(7, 3)));
        assert_eq!(newest_series(&names(), Architecture::Arm64), Some(Series(6, 18)));
    }

    #[test]
    fn versions_are_read() {
        assert_eq!("7.3".parse(), Ok(Wish::Series(Series(7, 3))));
        assert_eq!("newest".parse(), Ok(Wish::Newest));
        assert!(["7", "7.3.4", "", "../x"].iter().all(|text| text.parse::<Wish>().is_err()));
    }
}
