//! The demo under other kernels: Debian's, booted in an emulator that needs no help from this machine's.

use std::{ffi::OsString, fs, path::PathBuf, time::Duration};

use anyhow::{Context, Result, bail};
use clap::Args;

use crate::{build, setup, setup::Group, workspace};

mod initramfs;
mod kernel;
mod machine;

use initramfs::Initramfs;
use kernel::Kernel;

/// What the demo and the agent need that is not built into Debian's kernels: links between namespaces, and
/// listing sockets.
const MODULES: [&str; 4] = ["veth", "inet_diag", "tcp_diag", "udp_diag"];

/// The demo, and what it starts.
const PROGRAMS: [&str; 3] = ["demo", "actor", "intercept-agent"];

#[derive(Args)]
pub(crate) struct Arguments {
    /// Kernels, each by the beginning of its version; Debian has 5.10, 6.1, 6.12 and newer ones in backports
    #[arg(long, value_delimiter = ',', default_values = ["6.1", "6.12"])]
    kernel: Vec<String>,
    /// Only boot, and print the kernel's version
    #[arg(long)]
    boot_only: bool,
    /// Seconds until a machine is stopped
    #[arg(long, default_value_t = 240)]
    timeout: u64,
    /// Options for the demo
    #[arg(last = true)]
    options: Vec<OsString>,
}

/// Runs the demo under each of the kernels.
pub(crate) fn vm(arguments: &Arguments) -> Result<()> {
    setup::setup(&[Group::Base, Group::Vm])?;
    let programs = if arguments.boot_only { None } else { Some(build::linked_statically("demo")?) };
    let mut failed = Vec::new();
    for version in &arguments.kernel {
        match boot(version, programs.as_ref(), arguments) {
            Ok(seconds) => println!("ok      Linux {version} ({seconds} s)"),
            Err(error) => {
                eprintln!("error: {error:#}");
                println!("FAILED  Linux {version}");
                failed.push(version.as_str());
            }
        }
    }
    if !failed.is_empty() {
        bail!("running under Linux {}: failed", failed.join(", "));
    }
    Ok(())
}

fn boot(version: &str, programs: Option<&PathBuf>, arguments: &Arguments) -> Result<u64> {
    let kernel = Kernel::get(version)?;
    let folder = workspace::target().join("vm");
    fs::create_dir_all(&folder).with_context(|| format!("making {}", folder.display()))?;

    let mut initramfs = Initramfs::new(&kernel, &MODULES)?;
    let mut command = OsString::from("uname -a");
    if let Some(programs) = programs {
        for name in PROGRAMS {
            initramfs.program(name, &programs.join(name))?;
        }
        command = OsString::from("demo");
        for option in &arguments.options {
            command.push(" ");
            command.push(option);
        }
    }
    let image = folder.join(format!("{version}.cpio"));
    initramfs.write(&command, &image)?;
    let log = folder.join(format!("{version}.log"));
    machine::run(&kernel.image, &image, &log, Duration::from_secs(arguments.timeout))
}
