//! Building for another architecture: Rust's standard library and other Debian packages, which are kept in the cache. Only
//! the C compiler and library are installed.

use std::{
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};

use crate::{architecture::Architecture, debian::PackageLists, run, workspace};

/// Debian's compiler, which takes the path of another architecture's standard library.
const DEBIAN_RUSTC: &str = "/usr/bin/rustc";
/// The standard library, and a shell with tools for the virtual machine.
const PACKAGES: [&str; 2] = ["libstd-rust-web-dev", "busybox-static"];

/// The source of another architecture's standard library.
enum Library {
    /// An installed target of this compiler (`rustup target add`).
    Target,
    /// Debian's, unpacked below this folder, for Debian's compiler.
    Unpacked(PathBuf),
}

/// Configures a cargo command to build static programs for an architecture.
pub(crate) fn statically(cargo: &mut Command, architecture: Architecture) -> Result<()> {
    let target = architecture.target();
    // The agent's build script tells why its address is fixed.
    let mut flags =
        ["-Ctarget-feature=+crt-static", "-Crelocation-model=static"].map(OsString::from).to_vec();
    if !architecture.is_host() {
        let variable = target.to_uppercase().replace('-', "_");
        cargo.env(format!("CARGO_TARGET_{variable}_LINKER"), architecture.c_compiler());
        cargo.env(format!("CC_{}", target.replace('-', "_")), architecture.c_compiler());
        if let Library::Unpacked(folder) = library(architecture)? {
            let mut sysroot = OsString::from("--sysroot=");
            sysroot.push(folder.join("usr"));
            flags.push(sysroot);
            cargo.env("RUSTC", DEBIAN_RUSTC);
        }
    }
    cargo.env("CARGO_ENCODED_RUSTFLAGS", flags.join::<&std::ffi::OsStr>("\u{1f}".as_ref()));
    // With an explicit target the flags do not apply to build scripts and macros, which cannot be static.
    cargo.args(["--target", target]);
    Ok(())
}

/// The folder with programs of another architecture for the virtual machine.
pub(crate) fn parts(architecture: Architecture) -> Result<PathBuf> {
    let folder = folder(architecture)?;
    if !folder.is_dir() {
        fetch(architecture, &folder).with_context(|| format!("getting {}", PACKAGES.join(", ")))?;
    }
    Ok(folder)
}

/// The folder in the cache.
pub(crate) fn folder(architecture: Architecture) -> Result<PathBuf> {
    Ok(workspace::cache()?.join(architecture.as_str()))
}

fn library(architecture: Architecture) -> Result<Library> {
    let sysroot = run::output(Command::new("rustc").args(["--print", "sysroot"]))?;
    if Path::new(sysroot.trim()).join("lib/rustlib").join(architecture.target()).is_dir() {
        return Ok(Library::Target);
    }
    let folder = parts(architecture)?;
    try_library(architecture, &folder).with_context(|| {
        format!(
            "trying the standard library in {}: it must be of the same version as {DEBIAN_RUSTC}. Remove it to get it \
             again, or `rustup target add {}`",
            folder.display(),
            architecture.target()
        )
    })?;
    Ok(Library::Unpacked(folder))
}

/// Builds an empty program.
fn try_library(architecture: Architecture, folder: &Path) -> Result<()> {
    let scratch = workspace::target().join("cross");
    fs::create_dir_all(&scratch).with_context(|| format!("making {}", scratch.display()))?;
    let source = scratch.join("empty.rs");
    fs::write(&source, "fn main() {}\n").with_context(|| format!("writing {}", source.display()))?;
    let mut rustc = Command::new(DEBIAN_RUSTC);
    rustc
        .args(["--emit", "metadata", "--target", architecture.target(), "--sysroot"])
        .arg(folder.join("usr"));
    run::output(rustc.arg("--out-dir").arg(&scratch).arg(&source)).map(drop)
}

fn fetch(architecture: Architecture, folder: &Path) -> Result<()> {
    let heading = format!("reading which packages Debian has for {}", architecture.as_str());
    let apt = workspace::cache()?.join(format!("apt-{}", architecture.as_str()));
    let lists = PackageLists::of_machine(&apt, architecture, &heading)?;
    let unpacked = folder.with_extension("part");
    drop(fs::remove_dir_all(&unpacked));
    fs::create_dir_all(&unpacked).with_context(|| format!("making {}", unpacked.display()))?;
    lists.unpack(&PACKAGES, &unpacked)?;
    fs::rename(&unpacked, folder).with_context(|| format!("keeping {}", folder.display()))
}
