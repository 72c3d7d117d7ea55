//! Runs the demo and the cases under other kernels of Debian, in an emulator that does not need KVM.

use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;

use crate::{architecture::Architecture, build, cross, parts, setup, setup::Group, workspace};

mod apparmor;
mod initramfs;
mod kernel;
mod machine;
mod systemd;
mod table;

use initramfs::Initramfs;
use kernel::{Kernel, Kernels, Wish};
use machine::{Boot, VmStep};

/// Modules that the demo and the agent need: links between namespaces, and listing sockets.
const MODULES: [&str; 4] = ["veth", "inet_diag", "tcp_diag", "udp_diag"];

/// The demo and the programs that it starts.
const PROGRAMS: [&str; 5] = ["demo", "actor", "unusual", "steps", "intercept-agent"];

/// Kernels that are too old: `check` says what they lack, and `attach` refuses in the same words.
const TOO_OLD: [&str; 1] = ["5.10"];

#[derive(Args)]
pub(crate) struct VmArgs {
    /// Kernels by the first two numbers of the version, or `newest`. Debian has 5.10, 6.1, 6.12 and those in backports
    #[arg(long, value_delimiter = ',', default_values = ["5.10", "6.1", "6.12", "6.18", "newest"])]
    kernel: Vec<Wish>,
    /// The architecture of the machines
    #[arg(long, value_enum, default_value_t = Architecture::HOST)]
    arch: Architecture,
    /// Print a note and skip kernels that are not in the cache
    #[arg(long)]
    if_cached: bool,
    /// Only boot and print the kernel's version
    #[arg(long)]
    boot_only: bool,
    /// Test the agent under AppArmor instead: confined by a runtime's default profile, then unconfined
    #[arg(long, conflicts_with = "boot_only")]
    apparmor: bool,
    /// Test deploy/systemd, SSH and containers instead: a Debian system whose first process is systemd, with Envoy
    #[arg(long, conflicts_with_all = ["boot_only", "apparmor"])]
    systemd: bool,
    /// Seconds without a line of output until a virtual machine is stopped
    #[arg(long, default_value_t = 900)]
    timeout: u64,
    /// Options for the demo; with --systemd the suites to run, of: units, ssh, containers, families, and
    /// only when named: compose, rootless, cgroupfs
    #[arg(last = true)]
    options: Vec<String>,
}

/// Runs the demo and the cases under each kernel.
pub(crate) fn vm(arguments: &VmArgs) -> Result<()> {
    let kernels = kernels(arguments)?;
    if kernels.is_empty() || (arguments.systemd && leaves_out_systemd(arguments)?) {
        return Ok(());
    }
    setup::setup(&[Group::Base, Group::Vm])?;
    setup::for_architecture(arguments.arch)?;
    let programs = match arguments.boot_only {
        true => None,
        false => Some(build::linked_statically("demo", arguments.arch)?),
    };
    let mut failed = Vec::new();
    let mut rows = Vec::new();
    for (wish, kernel) in kernels {
        let name = format!("Linux {wish} on {}", arguments.arch.as_str());
        let start = Instant::now();
        let ran = kernel.and_then(|kernel| Ok((boot(&kernel, programs.as_deref(), arguments)?, kernel)));
        let judged = ran.and_then(|(steps, kernel)| {
            rows.push(table::KernelRow::of(&kernel, &steps));
            judge(&kernel, &steps)
        });
        match judged {
            Ok(what) => println!("ok      {name}: {what} ({} s)", start.elapsed().as_secs()),
            Err(error) => {
                eprintln!("error: {error:#}");
                println!("FAILED  {name}");
                failed.push(name);
            }
        }
    }
    if programs.is_some() && arguments.options.is_empty() && !arguments.apparmor && !arguments.systemd {
        table::update(&rows)?;
    }
    ensure!(failed.is_empty(), "running under {}: failed", failed.join(", "));
    Ok(())
}

/// The requested kernels, or the errors. Kernels that are not cached are left out if only cached ones are requested.
fn kernels(arguments: &VmArgs) -> Result<Vec<(&Wish, Result<Kernel>)>> {
    let kernels = Kernels::of(arguments.arch)?;
    if !arguments.if_cached {
        setup::setup(&[Group::Vm])?;
        return Ok(arguments.kernel.iter().map(|wish| (wish, kernels.get(wish))).collect());
    }
    let builds = arguments.arch.is_host() || cross::folder(arguments.arch)?.is_dir();
    let mut found = Vec::new();
    for wish in &arguments.kernel {
        match kernels.cached(wish) {
            Ok(Some(kernel)) if builds => found.push((wish, Ok(kernel))),
            Err(error) => found.push((wish, Err(error))),
            Ok(_) => println!(
                "left out: Linux {wish} on {arch}, which is not in the cache (`cargo xtask vm --arch {arch} --kernel \
                 {wish}` gets it)",
                arch = arguments.arch.as_str()
            ),
        }
    }
    Ok(found)
}

/// Whether the step is skipped; gets Envoy otherwise.
fn leaves_out_systemd(arguments: &VmArgs) -> Result<bool> {
    ensure!(arguments.arch.is_host(), "--systemd: its packages and Envoy are those of this machine");
    let missing = systemd::missing()?;
    let get = "`cargo xtask vm --systemd --kernel 6.12` gets it";
    if arguments.if_cached && parts::leave_out(&missing, "deploy/systemd in a virtual machine", get) {
        return Ok(true);
    }
    setup::setup(&[Group::Envoy]).map(|()| false)
}

fn boot(kernel: &Kernel, programs: Option<&Path>, arguments: &VmArgs) -> Result<Vec<VmStep>> {
    let folder = workspace::target().join("vm");
    fs::create_dir_all(&folder).with_context(|| format!("making {}", folder.display()))?;
    let file = |ending: &str| -> PathBuf {
        folder.join(format!("{}-{}.{ending}", kernel.series, kernel.architecture.as_str()))
    };
    let modules =
        if arguments.systemd { [&MODULES[..], &systemd::MODULES].concat() } else { MODULES.to_vec() };
    let mut initramfs = Initramfs::new(kernel, &modules)?;
    let (image, disk) = (file("cpio"), file("ext4"));
    let (mut script, mut parameters) = (script(programs.is_some(), &arguments.options), "");
    match programs {
        Some(programs) if arguments.systemd => {
            systemd::disk(kernel, (programs, &PROGRAMS), &arguments.options, &disk)?;
            (script, parameters) = (systemd::SCRIPT.to_owned(), systemd::PARAMETERS);
        }
        Some(programs) => {
            for name in PROGRAMS {
                initramfs.program(name, &programs.join(name))?;
            }
        }
        None => {}
    }
    if arguments.apparmor {
        (script, parameters) = (apparmor::prepare(&mut initramfs)?.to_owned(), apparmor::PARAMETERS);
    }
    initramfs.write(&script, &image)?;
    let disk = arguments.systemd.then_some(disk.as_path());
    let what = Boot { kernel, initramfs: &image, parameters, disk };
    machine::run(&what, &file("log"), Duration::from_secs(arguments.timeout))
}

/// The script that the machine runs.
fn script(has_programs: bool, options: &[String]) -> String {
    let mut script = "step kernel uname -r\n".to_owned();
    if has_programs {
        let options = options.join(" ");
        script += &format!(
            "if step check intercept-agent check; then step demo demo {options}; step cases demo --cases; step joined demo --joined; step machine demo --machine whole\n\
             else step refusal demo --refused; fi\n"
        );
    }
    script
}

/// Checks the steps and summarises them.
fn judge(kernel: &Kernel, steps: &[VmStep]) -> Result<String> {
    let too_old = TOO_OLD.contains(&kernel.series.to_string().as_str());
    let unmet: Vec<&str> = steps
        .iter()
        .filter(|step| step.status != Some(0) && !(too_old && step.name == "check"))
        .map(|step| step.name.as_str())
        .collect();
    ensure!(unmet.is_empty(), "under Linux {}: failed: {}", kernel.series, unmet.join(", "));
    if too_old && !steps.iter().any(|step| step.name == "refusal" || steps.len() == 1) {
        bail!("Linux {} supports capture; remove it from the list of unsupported kernels", kernel.series);
    }
    Ok(steps.iter().map(|step| step.last.as_str()).collect::<Vec<_>>().join("; "))
}
