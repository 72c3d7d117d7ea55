//! Finds the tools that compile the eBPF crate.
//!
//! Shared by the build script, which uses them, and `cargo xtask setup`, which installs them.

use std::{
    env, fmt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

/// Name of the target for compiler and linker.
pub(crate) const TARGET: &str = "bpfel-unknown-none";

/// A distribution's compiler. Debian's comes with a compiled `core` for [`TARGET`].
const SYSTEM_RUSTC: &str = "/usr/bin/rustc";

/// A complete set: compiler, linker, and the LLVM library that the linker loads.
pub(crate) struct Toolchain {
    pub(crate) compiler: Compiler,
    pub(crate) linker: PathBuf,
    pub(crate) llvm: PathBuf,
}

/// The source of `core` for [`TARGET`].
pub(crate) enum Compiler {
    /// rustup's nightly compiles it from the `rust-src` component.
    Nightly,
    /// This compiler comes with a compiled one.
    ReadyMade(PathBuf),
}

/// The missing parts.
pub(crate) struct MissingTool {
    pub(crate) compiler: bool,
    pub(crate) linker: bool,
}

/// Finds a complete set. `host_rustc` is the compiler for the rest of the workspace.
pub(crate) fn find(host_rustc: &Path) -> Result<Toolchain, MissingTool> {
    let compiler = nightly().or_else(|| ready_made(host_rustc));
    let linker = linker();
    let missing = MissingTool { compiler: compiler.is_none(), linker: linker.is_none() };
    match (compiler, linker) {
        (Some((compiler, llvm)), Some(linker)) => Ok(Toolchain { compiler, linker, llvm }),
        _ => Err(missing),
    }
}

/// Returns the folder for what `cargo xtask setup` builds and downloads. `None` without a home folder.
pub(crate) fn cache() -> Option<PathBuf> {
    // A relative path would be a different folder for every crate.
    let set = |name| env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    set("INTERCEPT_CACHE")
        .or_else(|| set("XDG_CACHE_HOME").map(|base| base.join("intercept")))
        .or_else(|| set("HOME").map(|home| home.join(".cache/intercept")))
}

fn nightly() -> Option<(Compiler, PathBuf)> {
    let mut rustc = Command::new("rustup");
    // The check must not install anything.
    rustc.args(["run", "nightly", "rustc"]).env("RUSTUP_AUTO_INSTALL", "0");
    let sysroot = sysroot(rustc)?;
    let sources = sysroot.join("lib/rustlib/src/rust/library/core");
    sources.is_dir().then(|| (Compiler::Nightly, sysroot.join("lib")))
}

fn ready_made(host_rustc: &Path) -> Option<(Compiler, PathBuf)> {
    let rustc = PathBuf::from(SYSTEM_RUSTC);
    let core = sysroot(Command::new(&rustc))?.join("lib/rustlib").join(TARGET).join("lib");
    core.is_dir().then_some((Compiler::ReadyMade(rustc), llvm(host_rustc)?))
}

/// Returns the folder of the LLVM library of the host's compiler, for which the linker was built. A compiler without
/// one (for cross builds) uses that of the default compiler.
fn llvm(host_rustc: &Path) -> Option<PathBuf> {
    let folder = |rustc: &Path| Some(sysroot(Command::new(rustc))?.join("lib"));
    let has_llvm = |folder: &PathBuf| {
        let entries = folder.read_dir().into_iter().flatten().flatten();
        entries.into_iter().any(|entry| entry.file_name().to_string_lossy().starts_with("libLLVM"))
    };
    let own = folder(host_rustc)?;
    let usual = || folder(Path::new("rustc")).filter(has_llvm);
    if has_llvm(&own) { Some(own) } else { usual().or(Some(own)) }
}

fn sysroot(mut rustc: Command) -> Option<PathBuf> {
    let output = rustc.args(["--print", "sysroot"]).stderr(Stdio::null()).output().ok()?;
    let path = String::from_utf8(output.stdout).ok()?;
    output.status.success().then(|| PathBuf::from(path.trim()))
}

fn linker() -> Option<PathBuf> {
    let own = cache().map(|cache| cache.join("bpf-linker/bin"));
    let path = env::var_os("PATH").unwrap_or_default();
    own.into_iter()
        .chain(env::split_paths(&path))
        .map(|folder| folder.join("bpf-linker"))
        .find(|p| p.is_file())
}

impl fmt::Display for Toolchain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.compiler {
            Compiler::Nightly => write!(f, "rustup's nightly with rust-src")?,
            Compiler::ReadyMade(rustc) => write!(f, "{} with its core for {TARGET}", rustc.display())?,
        }
        write!(f, ", {}, LLVM from {}", self.linker.display(), self.llvm.display())
    }
}

impl fmt::Display for MissingTool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "building the eBPF programs needs tools that are missing")?;
        if self.compiler {
            write!(
                f,
                "\n  a compiler with core for {TARGET}; one of\n    \
                 rustup toolchain install nightly --component rust-src\n    \
                 apt-get install --no-install-recommends rustc-web libstd-rust-web-dev-bpf    (Debian; gives {SYSTEM_RUSTC})"
            )?;
        }
        if self.linker {
            write!(f, "\n  bpf-linker, on the PATH or in the cache\n    cargo install bpf-linker --locked")?;
        }
        write!(f, "\n`cargo xtask setup` installs those that are available for this machine")
    }
}
