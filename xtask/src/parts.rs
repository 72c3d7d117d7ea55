//! Parts that no set-up gets, because they are large or slow to make: the commands that need them keep them in the cache.

use std::{path::Path, process::Command};

use anyhow::{Context as _, Result};
use clap::Args;

use crate::run;

#[derive(Args)]
pub(crate) struct Arguments {
    /// Do nothing, and say so, where the parts are not in the cache
    #[arg(long)]
    if_cached: bool,
}

impl Arguments {
    /// Whether nothing is to be done; `what` is not, and `remedy` gets the parts.
    pub(crate) fn leave_out(&self, folder: &Path, what: &str, remedy: &str) -> bool {
        let left_out = self.if_cached && !folder.is_dir();
        if left_out {
            println!("left out: {what}, which is not in {} ({remedy})", folder.display());
        }
        left_out
    }
}

/// Whether programs in the cache start here.
pub(crate) fn try_programs(folder: &Path, programs: &[&str]) -> Result<()> {
    for program in programs {
        run::output(Command::new(folder.join(program)).arg("--version"))
            .with_context(|| format!("trying what is in {}; remove it to get it anew", folder.display()))?;
    }
    Ok(())
}
