//! Compiles the eBPF programs to `OUT_DIR/intercept.o`, those of joined connections to `OUT_DIR/join.o`, and that of
//! the self-test to `OUT_DIR/trial.o`. `OUT_DIR/lookup.o` has the program of the first that every attach reads.

use std::{
    env, fs,
    hash::{DefaultHasher, Hasher as _},
    path::{Path, PathBuf},
    process::{Command, ExitCode},
};

use object::build::elf::{Builder, SectionData};

#[path = "build/toolchain.rs"]
mod toolchain;

use toolchain::{Compiler, TARGET, Toolchain};

const PACKAGE: &str = "intercept-ebpf";
const CAPTURE: &str = "intercept";
const BINARIES: [&str; 3] = [CAPTURE, "join", "trial"];
/// The program of which each pod has an instance.
const PER_POD: &str = "lookup";

fn main() -> ExitCode {
    match build() {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("{message}");
            ExitCode::FAILURE
        }
    }
}

fn build() -> Result<(), String> {
    let workspace = path("CARGO_MANIFEST_DIR")?.join("..");
    rerun_when_changed(&workspace);
    link_at_a_fixed_address()?;
    let toolchain = toolchain::find(&path("RUSTC")?).map_err(|missing| missing.to_string())?;
    println!("cargo::rerun-if-changed={}", toolchain.linker.display());

    let out_dir = path("OUT_DIR")?;
    // The outer cargo holds the lock of its own target folder. This one is shared by all of its profiles.
    let target = out_dir.ancestors().find(|folder| folder.join("CACHEDIR.TAG").is_file());
    let target_dir = target.unwrap_or(&out_dir).join("bpf");
    let mut cargo = cargo(&toolchain)?;
    cargo.current_dir(&workspace).arg("--target-dir").arg(&target_dir);
    let status = cargo.status().map_err(|error| format!("starting {cargo:?}: {error}"))?;
    if !status.success() {
        return Err(format!("building {PACKAGE} with {toolchain}: {status}"));
    }

    let mut digest = DefaultHasher::new();
    for binary in BINARIES {
        let built = target_dir.join(TARGET).join("release").join(binary);
        let object = out_dir.join(binary).with_extension("o");
        let bytes = fs::read(&built).map_err(|error| format!("reading {}: {error}", built.display()))?;
        let bytes = without_dwarf(&plain_names(bytes))
            .map_err(|error| format!("removing DWARF from {}: {error}", built.display()))?;
        write(&object, &bytes)?;
        digest.write(&bytes);
        if binary == CAPTURE {
            let stub = only(&bytes, PER_POD)
                .map_err(|error| format!("taking {PER_POD} out of {binary}: {error}"))?;
            write(&out_dir.join(PER_POD).with_extension("o"), &stub)?;
        }
    }
    // Here, because the agent would read and hash all of them at each start.
    println!("cargo::rustc-env=INTERCEPT_OBJECTS_DIGEST={:016x}", digest.finish());
    Ok(())
}

/// A position-independent executable has the addresses of its tables filled in at each start, on 150 pages: of the start of a CNI
/// plugin that was half. `xtask/src/cross.rs` sets the same for static ones. Stack, heap and libraries stay at random
/// addresses.
fn link_at_a_fixed_address() -> Result<(), String> {
    let is_static = env::var("CARGO_CFG_TARGET_FEATURE")
        .map_err(|error| format!("CARGO_CFG_TARGET_FEATURE: {error}"))?
        .split(',')
        .any(|feature| feature == "crt-static");
    if !is_static {
        println!("cargo::rustc-link-arg-bins=-no-pie");
    }
    Ok(())
}

fn write(path: &Path, bytes: &[u8]) -> Result<(), String> {
    fs::write(path, bytes).map_err(|error| format!("writing {}: {error}", path.display()))
}

/// Returns the command that compiles the programs, in an environment without the settings of the outer build.
fn cargo(toolchain: &Toolchain) -> Result<Command, String> {
    let mut cargo = match &toolchain.compiler {
        Compiler::Nightly => {
            let mut rustup = Command::new("rustup");
            rustup.args(["run", "nightly", "cargo", "build", "-Zbuild-std=core"]);
            rustup
        }
        Compiler::ReadyMade(_) => {
            let mut cargo = Command::new(path("CARGO")?);
            cargo.arg("build");
            cargo
        }
    };
    cargo.args(["--release", "--package", PACKAGE, "--bins", "--target", TARGET]);

    for (name, _) in env::vars_os() {
        if name.to_str().is_some_and(belongs_to_outer_build) {
            cargo.env_remove(name);
        }
    }
    if let Compiler::ReadyMade(rustc) = &toolchain.compiler {
        // The target is tier 3 and aya-ebpf uses unstable features.
        cargo.env("RUSTC", rustc).env("RUSTC_BOOTSTRAP", "1");
    }
    cargo.env("LD_LIBRARY_PATH", &toolchain.llvm);

    let arch =
        env::var("CARGO_CFG_TARGET_ARCH").map_err(|error| format!("CARGO_CFG_TARGET_ARCH: {error}"))?;
    let arch = if arch.starts_with("riscv64") { "riscv64" } else { &arch };
    let flags = [
        &format!("--cfg=bpf_target_arch=\"{arch}\""),
        // Socket storage and map types need BTF, which the linker generates from debug information.
        "-Cdebuginfo=2",
        "-Cstrip=none",
        "-Clink-arg=--btf",
        // Otherwise LLVM clears memory with calls of memset, byte by byte.
        "-Clink-arg=--disable-expand-memcpy-in-order",
        // 32-bit instructions (Linux 5.1). Programs with atomic operations that return the old value need 5.12.
        "-Ctarget-cpu=v3",
        &format!("-Clinker={}", toolchain.linker.display()),
    ];
    cargo.env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"));
    Ok(cargo)
}

/// Whether a variable belongs to the outer build: compilers, wrappers (also clippy's), flags, profiles and folders. The
/// registry, access to it and the number of jobs apply to both builds.
fn belongs_to_outer_build(name: &str) -> bool {
    const SHARED: [&str; 6] =
        ["CARGO_HOME", "CARGO_HTTP_", "CARGO_MAKEFLAGS", "CARGO_NET_", "CARGO_REGISTR", "CARGO_TERM_"];
    let shared = SHARED.iter().any(|shared| name.starts_with(shared));
    let tool =
        ["CARGO", "RUSTC", "RUSTDOC", "RUSTFLAGS", "CLIPPY_"].iter().any(|tool| name.starts_with(tool));
    tool && !shared
}

fn rerun_when_changed(workspace: &Path) {
    for source in ["intercept-ebpf", "intercept-common", "Cargo.toml", "Cargo.lock"] {
        println!("cargo::rerun-if-changed={}", workspace.join(source).display());
    }
    for script in ["build.rs", "build/toolchain.rs"] {
        println!("cargo::rerun-if-changed={script}");
    }
    for variable in ["INTERCEPT_CACHE", "XDG_CACHE_HOME", "HOME", "PATH"] {
        println!("cargo::rerun-if-env-changed={variable}");
    }
}

fn path(variable: &str) -> Result<PathBuf, String> {
    env::var_os(variable)
        .map(PathBuf::from)
        .ok_or_else(|| format!("{variable} is not set: run this through cargo"))
}

/// Removes the debug information, of which the linker makes the BTF. It is four fifths of an object, and every attach would
/// read its relocations.
fn without_dwarf(object: &[u8]) -> Result<Vec<u8>, object::build::Error> {
    let mut builder = Builder::read(object)?;
    for section in &mut builder.sections {
        section.delete = section.name.starts_with(b".debug_") || section.name.starts_with(b".rel.debug_");
    }
    // LLVM has the names of sections and symbols in one section, which the builder does not write.
    let names = builder.sections.add();
    names.name = b".shstrtab"[..].into();
    names.sh_type = object::elf::SHT_STRTAB;
    names.data = SectionData::SectionString;
    builder.delete_orphans();
    let mut bytes = Vec::new();
    builder.write(&mut bytes)?;
    Ok(bytes)
}

/// Reduces an object to one program, which calls no function, and to the maps that it uses. It has no types.
fn only(object: &[u8], program: &str) -> Result<Vec<u8>, Box<dyn std::error::Error>> {
    let mut builder = Builder::read(object)?;
    let symbol = builder.symbols.iter().find(|symbol| &*symbol.name == program.as_bytes());
    let symbol = symbol.ok_or("it has no symbol")?;
    let (id, code) = (symbol.id(), symbol.section.ok_or("its symbol has no section")?);
    let (start, end) = (symbol.st_value, symbol.st_value + symbol.st_size);
    let mut used = Vec::new();
    for section in &mut builder.sections {
        let (is_code, of_code) = (section.id() == code, section.sh_info_section == Some(code));
        match &mut section.data {
            SectionData::Data(data) if is_code => {
                let range = usize::try_from(start).ok().zip(usize::try_from(end).ok());
                let bytes = range.and_then(|(start, end)| data.get(start..end));
                *data = bytes.ok_or("it is not in its section")?.to_vec().into();
            }
            SectionData::Data(_) => section.delete = !matches!(&*section.name, b"maps" | b"license"),
            SectionData::Relocation(relocations) if of_code => {
                relocations.retain(|relocation| (start..end).contains(&relocation.r_offset));
                for relocation in relocations {
                    relocation.r_offset -= start;
                    used.extend(relocation.symbol);
                }
            }
            SectionData::Relocation(_) => section.delete = true,
            _ => {}
        }
    }
    for symbol in &mut builder.symbols {
        symbol.delete = symbol.id() != id && !used.contains(&symbol.id());
        if symbol.id() == id {
            symbol.st_value = 0;
        }
    }
    builder.delete_orphans();
    let mut bytes = Vec::new();
    builder.write(&mut bytes)?;
    Ok(bytes)
}

/// Replaces names of types that are not identifiers. The kernel refuses all types of an object with one ("[128] UNION
/// MaybeUninit<u8> size=1 vlen=2 Invalid name"). bpf-linker replaces those of structs, but not of this union, which
/// comes with aya-log's level.
fn plain_names(mut object: Vec<u8>) -> Vec<u8> {
    const RUST: &[u8] = b"MaybeUninit<u8>\0";
    const PLAIN: &[u8; 16] = b"MaybeUninit_u8_\0";
    for at in 0..object.len().saturating_sub(RUST.len()) {
        if object[at..].starts_with(RUST) {
            object[at..at + RUST.len()].copy_from_slice(PLAIN);
        }
    }
    object
}
