//! The commands of the project: `cargo xtask COMMAND`. Each installs what it needs.

use std::{ffi::OsString, process::ExitCode};

use anyhow::Result;
use clap::{Parser, Subcommand};

mod architecture;
mod build;
mod cluster;
mod cri;
mod cross;
mod debian;
mod deny;
mod docs;
mod drawing;
mod fuzz;
mod helm;
mod image;
mod kube;
mod manifests;
mod parts;
mod release;
mod run;
mod setup;
mod soak;
mod sweep;
mod test;
mod tidy;
#[path = "../../intercept-agent/build/toolchain.rs"]
mod toolchain;
mod vm;
mod workspace;

use setup::Group;

/// Set up, build, show, test and measure intercept.
#[derive(Parser)]
#[command(bin_name = "cargo xtask")]
struct XtaskArgs {
    #[command(subcommand)]
    command: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Install what building, testing or measuring needs and what is missing
    Setup(setup::SetupArgs),
    /// Build the agent with its eBPF programs, in release mode
    Build,
    /// Show a captured pod at work; takes the options of the demo
    #[command(disable_help_flag = true)]
    Demo {
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        options: Vec<OsString>,
    },
    /// Check formatting, lints, structure and behaviour; with a filter, run only the tests that match
    Test(test::TestArgs),
    /// Compare with iptables; takes the options of the benchmark
    #[command(disable_help_flag = true)]
    Bench {
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        options: Vec<OsString>,
    },
    /// Disturb a node in every way at once, and check every connection of its well-behaved pods meanwhile
    Soak(soak::SoakArgs),
    /// Fuzz the option parser, and decide beside the rules
    Fuzz(fuzz::FuzzArgs),
    /// Run the demo and the cases that need no tools under other kernels in virtual machines
    Vm(vm::VmArgs),
    /// Make the container image and print the path of its archive, for `ctr images import` or `docker load`
    Image(image::ImageArgs),
    /// Run the DaemonSet's pod and pods that it captures in containerd
    Cri(parts::PartsArgs),
    /// Run the daemon with a real kube-apiserver
    Kube(parts::PartsArgs),
    /// Install the chart in a cluster of one node, with an application whose sidecars are Envoy
    Cluster(parts::PartsArgs),
    /// Check the chart and the manifests in deploy/ without a cluster
    Manifests(manifests::ManifestsArgs),
    /// Make all files of a release in target/release-files
    Release(release::ReleaseArgs),
    /// Check licences, sources and duplicates of the dependencies
    Deny(deny::DenyArgs),
    /// Make the tables in docs/ that are made from the sources
    Docs,
    /// Make docs/architecture.svg from docs/architecture.dot
    Drawing,
    /// Check the rules of the project that the compiler does not check
    Tidy,
    /// Remove what killed runs left: namespaces, cgroups, pins, processes, temporary folders
    Clean,
}

fn main() -> ExitCode {
    match perform(XtaskArgs::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn perform(task: Task) -> Result<()> {
    match task {
        Task::Setup(arguments) => {
            setup::setup(arguments.groups())?;
            setup::report(arguments.groups())
        }
        Task::Build => {
            setup::setup(&[Group::Base])?;
            println!("{}", build::agent()?.display());
            Ok(())
        }
        Task::Demo { options } => {
            let mut groups = vec![Group::Base];
            if options.iter().any(|option| option.to_string_lossy().contains("envoy")) {
                groups.push(Group::Envoy);
            }
            setup::setup(&groups)?;
            build::and_run("demo", &options)
        }
        Task::Bench { options } => {
            setup::setup(&[Group::Base, Group::Test, Group::Envoy, Group::Bench])?;
            build::and_measure("bench", &options)
        }
        Task::Test(arguments) => test::test(&arguments),
        Task::Soak(arguments) => soak::soak(&arguments),
        Task::Fuzz(arguments) => fuzz::fuzz(&arguments),
        Task::Vm(arguments) => vm::vm(&arguments),
        Task::Image(arguments) => image::make(&arguments),
        Task::Cri(arguments) => cri::cri(&arguments),
        Task::Kube(arguments) => kube::kube(&arguments),
        Task::Cluster(arguments) => cluster::cluster(&arguments),
        Task::Manifests(arguments) => manifests::manifests(&arguments),
        Task::Release(arguments) => release::release(&arguments),
        Task::Deny(arguments) => deny::deny(&arguments),
        Task::Docs => docs::docs(),
        Task::Drawing => drawing::drawing(),
        Task::Tidy => tidy::tidy(),
        Task::Clean => sweep::sweep(),
    }
}
