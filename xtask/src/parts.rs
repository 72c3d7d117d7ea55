//! Parts that `setup` does not install, because they are large or slow to build. The commands that need them keep them in the
//! cache.

use std::{path::Path, process::Command};

use anyhow::{Context as _, Result};
use clap::Args;

use crate::run;

#[derive(Args)]
pub(crate) struct PartsArgs {
    /// Print a note and do nothing if the parts are not in the cache
    #[arg(long)]
    if_cached: bool,
}

impl PartsArgs {
    /// Whether to skip `what`, because its parts are not cached. Prints so, with the command that fetches them.
    pub(crate) fn leave_out(&self, folder: &Path, what: &str, remedy: &str) -> bool {
        let left_out = self.if_cached && !folder.is_dir();
        if left_out {
            println!("left out: {what}, which is not in {} ({remedy})", folder.display());
        }
        left_out
    }
}

/// Checks that programs in the cache start on this machine.
pub(crate) fn try_programs(folder: &Path, programs: &[&str]) -> Result<()> {
    for program in programs {
        run::output(Command::new(folder.join(program)).arg("--version"))
            .with_context(|| format!("trying what is in {}; remove it to get it anew", folder.display()))?;
    }
    Ok(())
}
