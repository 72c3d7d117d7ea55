//! Fuzzing with libFuzzer.

use std::{fs, os::unix::fs::PermissionsExt as _, path::Path, process::Command, thread};

use anyhow::{Context as _, Result};
use clap::{Args, ValueEnum};

use crate::{build, run, setup, setup::Group, workspace};

#[derive(Args)]
pub(crate) struct FuzzArgs {
    /// What to fuzz [default: everything]
    #[arg(value_enum)]
    targets: Vec<FuzzTarget>,
    /// Seconds for each target
    #[arg(long, default_value_t = 60)]
    seconds: u32,
}

#[derive(Clone, Copy, ValueEnum)]
enum FuzzTarget {
    /// The option parser
    Options,
    /// `decide`, compared with the rules of istio-iptables
    Decide,
}

/// Instruments the crates of the workspace, and only those.
const COMPILER: &str = "tests/fuzz/rustc.sh";

/// Builds the targets and runs each for its time. The corpora are kept in target/fuzz.
pub(crate) fn fuzz(arguments: &FuzzArgs) -> Result<()> {
    setup::setup(&[Group::Base, Group::Fuzz])?;
    let folder = workspace::target().join("fuzz");
    fs::create_dir_all(&folder).with_context(|| format!("making {}", folder.display()))?;
    let compiler = folder.join("rustc.sh");
    // A copy, because a source tree may have lost the permission to execute it.
    fs::copy(workspace::root().join(COMPILER), &compiler)
        .and_then(|_| fs::set_permissions(&compiler, fs::Permissions::from_mode(0o755)))
        .with_context(|| format!("copying {COMPILER} to {}", compiler.display()))?;
    let mut cargo = run::cargo("build");
    cargo.args(["--release", build::SELECTION, "--bin", "fuzz-options", "--bin", "fuzz-decide"]);
    run::shown(cargo.env("RUSTC_WORKSPACE_WRAPPER", compiler))?;
    let targets =
        if arguments.targets.is_empty() { FuzzTarget::value_variants() } else { &arguments.targets };
    let (folder, seconds) = (&folder, arguments.seconds);
    // In parallel: each has one thread.
    thread::scope(|scope| {
        let running: Vec<_> =
            targets.iter().map(|target| scope.spawn(|| perform(*target, folder, seconds))).collect();
        let done = running.into_iter().map(|fuzzer| match fuzzer.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        });
        // Wait for all, even if one has found something.
        done.collect::<Vec<_>>().into_iter().collect()
    })
}

fn perform(target: FuzzTarget, folder: &Path, seconds: u32) -> Result<()> {
    let (name, dictionary) = match target {
        FuzzTarget::Options => ("fuzz-options", Some("tests/fuzz/options.dict")),
        FuzzTarget::Decide => ("fuzz-decide", None),
    };
    let (corpus, findings) = (folder.join("corpus").join(name), folder.join("findings").join(name));
    for folder in [&corpus, &findings] {
        fs::create_dir_all(folder).with_context(|| format!("making {}", folder.display()))?;
    }
    let mut fuzzer = Command::new(workspace::target().join("release").join(name));
    fuzzer.arg(format!("-max_total_time={seconds}"));
    fuzzer.arg(format!("-artifact_prefix={}/", findings.display()));
    if let Some(dictionary) = dictionary {
        fuzzer.arg(format!("-dict={}", workspace::root().join(dictionary).display()));
    }
    eprintln!("== {name}, for {seconds} s");
    let found = || format!("{name} has found something: run it with the file in {}", findings.display());
    run::shown(fuzzer.args(["-max_len=4096", "-verbosity=0", "-print_final_stats=1"]).arg(&corpus))
        .with_context(found)
}
