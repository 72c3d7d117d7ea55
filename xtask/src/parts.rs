//! Parts that `setup` does not install, because they are large or slow to build. The commands that need them keep them in the
//! cache.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

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
    /// Whether to skip `what`, because parts are missing. Prints so, with the command that gets them.
    pub(crate) fn leave_out(&self, missing: &[PathBuf], what: &str, remedy: &str) -> bool {
        self.if_cached && leave_out(missing, what, remedy)
    }
}

/// Whether parts are missing. Prints so, with the command that gets them.
pub(crate) fn leave_out(missing: &[PathBuf], what: &str, remedy: &str) -> bool {
    let Some(first) = missing.first() else { return false };
    println!("left out: {what}, for which there is no {} ({remedy})", first.display());
    true
}

/// Checks that programs in the cache start on this machine.
pub(crate) fn try_programs(folder: &Path, programs: &[&str]) -> Result<()> {
    for program in programs {
        run::output(Command::new(folder.join(program)).arg("--version"))
            .with_context(|| format!("trying what is in {}; remove it to get it anew", folder.display()))?;
    }
    Ok(())
}
