//! The drawing of the architecture, which graphviz makes from text.

use std::{fs, process::Command};

use anyhow::{Context as _, Result};

use crate::{run, workspace};

/// Makes docs/architecture.svg from its text. `cargo xtask tidy` compares them.
pub(crate) fn drawing() -> Result<()> {
    let program = run::which("dot").context("there is no dot: install graphviz")?;
    let folder = workspace::root().join("docs");
    let svg = run::output(Command::new(program).arg("-Tsvg").arg(folder.join("architecture.dot")))?;
    let to = folder.join("architecture.svg");
    fs::write(&to, svg).with_context(|| format!("writing {}", to.display()))
}
