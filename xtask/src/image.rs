//! The container image, made without docker from deploy/Dockerfile: the agent as one static file, and nothing else.
//!
//! The agent is content with glibc linked statically: users and groups it reads from the pods' own files, and the
//! API's address is a number (KUBERNETES_SERVICE_HOST). Names of hosts, which a kubeconfig may have, are looked up as
//! well: files and dns are built into glibc since 2.34; other services of nsswitch.conf are not there.

use std::{fs, path::PathBuf};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};

use crate::{build, workspace};

mod archive;

/// What deploy/ calls it.
pub(crate) const NAME: &str = concat!("intercept-agent:", env!("CARGO_PKG_VERSION"));

/// Makes the image; returns where the archive is.
pub(crate) fn image() -> Result<PathBuf> {
    let path = workspace::root().join("deploy/Dockerfile");
    let text = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
    let recipe = Recipe::parse(&text).with_context(|| format!("reading {}", path.display()))?;
    let agent = build::static_agent()?;
    let folder = workspace::target().join("image");
    let root = folder.join("root");
    drop(fs::remove_dir_all(&root));
    fs::create_dir_all(&root).with_context(|| format!("making {}", root.display()))?;
    let inside = root.join(&recipe.destination);
    fs::copy(&agent, &inside).with_context(|| format!("copying {}", agent.display()))?;
    let to = folder.join("intercept-agent.tar");
    archive::write(&root, &recipe.config(), NAME, &to)?;
    Ok(to)
}

/// What is in the Dockerfile, which has the few instructions that are understood here.
#[derive(Debug, Default, PartialEq)]
struct Recipe {
    binary: String,
    /// Without the leading slash.
    destination: String,
    entrypoint: Vec<String>,
    command: Vec<String>,
}

impl Recipe {
    fn parse(text: &str) -> Result<Self> {
        let mut recipe = Self::default();
        for line in text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#')) {
            let (instruction, rest) = line.split_once(' ').unwrap_or((line, ""));
            let list = || serde_json::from_str(rest).with_context(|| format!("{line:?} has no list"));
            match instruction {
                "FROM" => ensure!(rest == "scratch", "{line:?}: only an empty image can be made"),
                "ARG" => recipe.binary = rest.strip_prefix("BINARY=").unwrap_or_default().to_owned(),
                "COPY" => {
                    let destination = rest.strip_prefix("${BINARY} /").unwrap_or_default();
                    recipe.destination = destination.to_owned();
                }
                "ENTRYPOINT" => recipe.entrypoint = list()?,
                "CMD" => recipe.command = list()?,
                _ => bail!("{line:?} is not understood by `cargo xtask image`: teach it, too"),
            }
        }
        ensure!(
            !recipe.binary.is_empty() && !recipe.destination.is_empty(),
            "no ARG BINARY=PATH, or no COPY ${{BINARY}} /NAME"
        );
        Ok(recipe)
    }

    fn config(&self) -> Value {
        json!({ "Entrypoint": self.entrypoint, "Cmd": self.command })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_dockerfile_copies_what_is_built_here() {
        let recipe = Recipe::parse(include_str!("../../deploy/Dockerfile")).expect("understood");
        assert_eq!(recipe.binary, format!("target/image/{}/release/intercept-agent", build::STATIC));
        assert_eq!(recipe.config(), json!({ "Entrypoint": ["/intercept-agent"], "Cmd": ["daemon"] }));
        assert_eq!(format!("/{}", recipe.destination), recipe.entrypoint[0]);
    }

    #[test]
    fn what_is_not_understood_is_refused() {
        for text in ["FROM debian", "RUN true", "FROM scratch", "CMD daemon"] {
            assert!(Recipe::parse(text).is_err(), "{text}");
        }
    }
}
