//! The machine's file system: busybox, a few modules, our programs, and what runs first.

use std::{
    ffi::OsStr,
    fs::{self, File},
    io::{BufWriter, Write},
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail, ensure};
use cpio::newc::{Builder, ModeFileType, trailer};

use super::kernel::Kernel;
use crate::{architecture::Architecture, build, cross, run};

/// What runs first: mounts, loads the modules, runs the steps and tells how each ended.
const INIT: &str = include_str!("init.sh");
/// Defines `step`, with which scripts of steps run each.
pub(super) const STEP: &str = include_str!("step.sh");

const FOLDERS: [&str; 12] =
    ["bin", "dev", "etc", "lib", "lib64", "modules", "proc", "root", "run", "run/netns", "sys", "tmp"];

/// The contents, in the order in which they are unpacked.
pub(super) struct Initramfs {
    files: Vec<(String, u32, Vec<u8>)>,
}

impl Initramfs {
    /// With the modules named and what those need.
    pub(super) fn new(kernel: &Kernel, modules: &[&str]) -> Result<Self> {
        let mut initramfs = Self { files: Vec::new() };
        let busybox = busybox(kernel.architecture)?;
        initramfs.program("busybox", &busybox)?;
        initramfs.file(
            "etc/passwd",
            0o644,
            b"root:x:0:0::/root:/bin/sh\nistio-proxy:x:1337:1337::/:/bin/sh\n",
        );
        initramfs.file("etc/group", 0o644, b"root:x:0:\nistio-proxy:x:1337:\n");
        let dependencies = kernel.modules.join("modules.dep");
        let dependencies = fs::read_to_string(&dependencies)
            .with_context(|| format!("reading {}", dependencies.display()))?;
        let builtin = fs::read_to_string(kernel.modules.join("modules.builtin")).unwrap_or_default();
        for (position, path) in load_order(&dependencies, &builtin, modules)?.into_iter().enumerate() {
            let module = decompressed(&kernel.modules.join(path))?;
            // Loaded in the order of their names.
            initramfs.file(&format!("modules/{position:02}-{}.ko", stem(path)), 0o644, &module);
        }
        Ok(initramfs)
    }

    /// Adds a program to `/bin`; it must need no libraries.
    pub(super) fn program(&mut self, name: &str, path: &Path) -> Result<()> {
        let contents = fs::read(path).with_context(|| format!("reading {}", path.display()))?;
        ensure!(
            !build::needs_libraries(&contents),
            "{} is not linked statically, and the machine has no libraries",
            path.display()
        );
        self.file(&format!("bin/{name}"), 0o755, &contents);
        Ok(())
    }

    /// Writes it, with a script of steps to be run.
    pub(super) fn write(mut self, steps: &str, to: &Path) -> Result<()> {
        self.file("init", 0o755, INIT.as_bytes());
        self.file("steps", 0o644, format!("{STEP}{steps}").as_bytes());
        self.write_entries(to).with_context(|| format!("writing {}", to.display()))
    }

    /// Adds a file, in a folder that is there.
    pub(super) fn file(&mut self, name: &str, mode: u32, contents: &[u8]) {
        self.files.push((name.to_owned(), mode, contents.to_owned()));
    }

    fn write_entries(&self, to: &Path) -> Result<()> {
        let mut out = BufWriter::new(File::create(to)?);
        for folder in FOLDERS {
            let entry = Builder::new(folder).mode(0o755).set_mode_file_type(ModeFileType::Directory);
            entry.write(&mut out, 0).finish()?;
        }
        // The first process's input and output are this, before anything is mounted.
        let console = Builder::new("dev/console").mode(0o600).set_mode_file_type(ModeFileType::Char);
        console.rdev_major(5).rdev_minor(1).write(&mut out, 0).finish()?;
        for (name, mode, contents) in &self.files {
            let entry = Builder::new(name).mode(*mode).set_mode_file_type(ModeFileType::Regular);
            let mut entry = entry.write(&mut out, u32::try_from(contents.len())?);
            entry.write_all(contents)?;
            entry.finish()?;
        }
        trailer(out)?.flush()?;
        Ok(())
    }
}

/// A shell and its tools, linked statically.
fn busybox(architecture: Architecture) -> Result<PathBuf> {
    if architecture.is_host() {
        return run::which("busybox").context("there is no busybox: install busybox-static");
    }
    let folder = cross::parts(architecture)?;
    let places = ["bin/busybox", "usr/bin/busybox"].map(|place| folder.join(place));
    let found = places.into_iter().find(|place| place.is_file());
    found.with_context(|| format!("there is no busybox in {}; remove it to get it again", folder.display()))
}

/// The files of the modules and of what they need, the needed ones first; what is built in needs no file.
fn load_order<'a>(dependencies: &'a str, builtin: &str, modules: &[&str]) -> Result<Vec<&'a str>> {
    let mut order = Vec::new();
    for module in modules {
        let line = dependencies.lines().find_map(|line| {
            let (path, needs) = line.split_once(':')?;
            (stem(path) == *module).then_some((path, needs))
        });
        match line {
            // In modules.dep the one to be loaded first is the last.
            Some((path, needs)) => order.extend(needs.split_whitespace().rev().chain([path])),
            None if builtin.lines().any(|path| stem(path) == *module) => {}
            None => bail!("the kernel has no module {module}"),
        }
    }
    let mut once = Vec::new();
    for path in order {
        if !once.contains(&path) {
            once.push(path);
        }
    }
    Ok(once)
}

/// "kernel/net/ipv4/tcp_diag.ko.xz" is the module tcp_diag; file names may have hyphens for underscores.
fn stem(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    file.split('.').next().unwrap_or(file).replace('-', "_")
}

fn decompressed(path: &Path) -> Result<Vec<u8>> {
    if path.extension() != Some(OsStr::new("xz")) {
        return fs::read(path).with_context(|| format!("reading {}", path.display()));
    }
    let output = Command::new("xz").args(["-dc"]).arg(path).output().context("starting xz")?;
    ensure!(output.status.success(), "decompressing {}: {}", path.display(), output.status);
    Ok(output.stdout)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_are_loaded_after_what_they_need() {
        let dependencies = "kernel/net/ipv4/tcp_diag.ko.xz: kernel/net/ipv4/inet_diag.ko.xz kernel/net/base.ko.xz\n\
                            kernel/net/base.ko.xz:\nkernel/net/ipv4/inet_diag.ko.xz: kernel/net/base.ko.xz\n";
        let order =
            load_order(dependencies, "kernel/drivers/net/veth.ko\n", &["veth", "tcp_diag", "inet_diag"]);
        let expected =
            ["kernel/net/base.ko.xz", "kernel/net/ipv4/inet_diag.ko.xz", "kernel/net/ipv4/tcp_diag.ko.xz"];
        assert_eq!(order.expect("found"), expected);
        assert!(load_order(dependencies, "", &["veth"]).is_err());
    }
}
