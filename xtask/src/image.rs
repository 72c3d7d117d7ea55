//! The container image, made from deploy/Dockerfile without docker: the agent as one static file.
//!
//! A statically linked glibc is enough: the agent reads users and groups from the pods' files, and the API's address is
//! numeric (KUBERNETES_SERVICE_HOST). Host names in a kubeconfig are resolved by files and dns, which glibc has built in
//! since 2.34. Other services of nsswitch.conf are missing.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail, ensure};
use clap::Args;
use serde_json::{Value, json};

use crate::{architecture::Architecture, build, setup, setup::Group, workspace};

mod archive;

use archive::GzipLevel;

/// The name in deploy/.
pub(crate) const NAME: &str = concat!("intercept-agent:", env!("CARGO_PKG_VERSION"));

#[derive(Args)]
pub(crate) struct ImageArgs {
    /// The architectures of the image, all in one archive
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [Architecture::HOST])]
    arch: Vec<Architecture>,
}

/// Makes the image and prints the path of the archive.
pub(crate) fn make(arguments: &ImageArgs) -> Result<()> {
    setup::setup(&[Group::Base])?;
    let image = named(NAME, &arguments.arch)?;
    println!("{}", image.archive.display());
    eprintln!("its digest is {}", image.digest);
    Ok(())
}

/// An image in an archive.
pub(crate) struct Image {
    /// The path of the archive.
    pub(crate) archive: PathBuf,
    /// The digest, as in registries.
    pub(crate) digest: String,
    /// The agent in it, by architecture.
    pub(crate) agents: Vec<(Architecture, PathBuf)>,
}

/// Makes the image with the name in deploy/. Returns the path of the archive.
pub(crate) fn image(architectures: &[Architecture]) -> Result<PathBuf> {
    Ok(named(NAME, architectures)?.archive)
}

/// Makes the image under a name with a tag.
pub(crate) fn named(name: &str, architectures: &[Architecture]) -> Result<Image> {
    let path = workspace::root().join("deploy/Dockerfile");
    let text = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
    let recipe = Recipe::parse(&text).with_context(|| format!("reading {}", path.display()))?;
    let mut roots = Vec::new();
    for architecture in architectures {
        roots.push((architecture.as_str(), root(&recipe, *architecture)?));
    }
    let platforms: Vec<_> =
        roots.iter().map(|(name, root)| archive::Platform { architecture: name, root }).collect();
    let archive = workspace::target().join("image/intercept-agent.tar");
    let digest = archive::write(&platforms, &recipe.config(), name, GzipLevel(9), &archive)?;
    let agents = roots.iter().map(|(_, root)| root.join(&recipe.destination));
    let agents = architectures.iter().copied().zip(agents).collect();
    Ok(Image { archive, digest, agents })
}

/// The files of the image for one architecture.
fn root(recipe: &Recipe, architecture: Architecture) -> Result<PathBuf> {
    setup::for_architecture(architecture)?;
    let agent = build::static_agent(architecture)?;
    let inside = workspace::root().join(recipe.binary.replace(ARCHITECTURE, architecture.as_str()));
    let root = inside.parent().map(Path::to_owned).context("the agent is in no folder")?;
    drop(fs::remove_dir_all(&root));
    fs::create_dir_all(&root).with_context(|| format!("making {}", root.display()))?;
    fs::copy(&agent, root.join(&recipe.destination))
        .with_context(|| format!("copying {}", agent.display()))?;
    Ok(root)
}

/// The variable of the architecture in the Dockerfile.
const ARCHITECTURE: &str = "${TARGETARCH}";

/// The content of the Dockerfile, of which only a few instructions are supported.
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
                "ARG" => ensure!(rest == "TARGETARCH", "{line:?}: only the architecture is known"),
                "COPY" => {
                    let (binary, destination) = rest.split_once(" /").unwrap_or_default();
                    recipe.binary = binary.to_owned();
                    recipe.destination = destination.to_owned();
                }
                "ENTRYPOINT" => recipe.entrypoint = list()?,
                "CMD" => recipe.command = list()?,
                _ => bail!("`cargo xtask image` does not support {line:?}"),
            }
        }
        ensure!(
            recipe.binary.contains(ARCHITECTURE) && !recipe.destination.is_empty(),
            "no COPY PATH /NAME whose path has {ARCHITECTURE} in it"
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
        assert_eq!(recipe.binary, "target/image/${TARGETARCH}/intercept-agent");
        assert_eq!(recipe.config(), json!({ "Entrypoint": ["/intercept-agent"], "Cmd": ["daemon"] }));
        assert_eq!(format!("/{}", recipe.destination), recipe.entrypoint[0]);
    }

    #[test]
    fn the_same_files_give_the_same_image() {
        let folder = std::env::temp_dir().join(format!("intercept-image-{}", std::process::id()));
        let root = folder.join("root");
        fs::create_dir_all(&root).expect("made");
        fs::write(root.join("agent"), "contents").expect("written");
        let platform = |architecture| archive::Platform { architecture, root: &root };
        let write = |to: &str| {
            let to = folder.join(to);
            let platforms = [platform("amd64"), platform("arm64")];
            let config = json!({ "Cmd": ["/agent"] });
            let digest = archive::write(&platforms, &config, "a:1", GzipLevel(9), &to);
            (digest.expect("written"), fs::read(to).expect("read"))
        };
        let (one, two) = (write("one.tar"), write("two.tar"));
        fs::remove_dir_all(&folder).expect("removed");
        assert!(one.0.starts_with("sha256:") && one == two, "{} {}", one.0, two.0);
    }

    #[test]
    fn what_is_not_understood_is_refused() {
        for text in ["FROM debian", "RUN true", "FROM scratch", "CMD daemon", "ARG OTHER"] {
            assert!(Recipe::parse(text).is_err(), "{text}");
        }
    }
}
