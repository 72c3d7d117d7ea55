//! The arguments of commands for one attached pod.

use std::path::PathBuf;

use clap::Args;

use super::{Bpffs, WhichCapture};

// Of `audit` and `prove`. Not a doc comment, which clap would take for help.
#[derive(Args)]
pub(crate) struct InspectArgs {
    #[command(flatten)]
    pub(crate) attachment: WhichCapture,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) bpffs: Bpffs,
}

#[derive(Args)]
pub(crate) struct CutoverArgs {
    /// Cgroup of the attached pod
    #[arg(long, value_name = "PATH")]
    pub(crate) cgroup_path: PathBuf,
    /// Put the rules in again, and the policy back into shadow mode
    #[arg(long)]
    pub(crate) back: bool,
    /// Cut over although flows differ, or none has been compared
    #[arg(long, conflicts_with = "back")]
    pub(crate) force: bool,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) bpffs: Bpffs,
}
