//! Makes all files of a release in one folder. RELEASING.md lists them.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail, ensure};
use clap::Args;

use crate::{
    architecture::Architecture,
    helm::{self, Values},
    image, manifests, run, setup,
    setup::Group,
    workspace,
};

const VERSION: &str = env!("CARGO_PKG_VERSION");
/// The tool that writes a bill of materials.
const SBOM: &str = "cargo-cyclonedx@0.5.9";
/// The released package, and the package of the programs inside it.
const RELEASED: [&str; 2] = ["intercept-agent", "intercept-ebpf"];
/// The maximum size of the stripped agent.
const MOST_BYTES: u64 = 24 << 20;

#[derive(Args)]
pub(crate) struct ReleaseArgs {
    /// The released tag, which must be `v` and the version
    #[arg(long)]
    tag: Option<String>,
    /// The released architectures
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [Architecture::HOST])]
    arch: Vec<Architecture>,
    /// The repository of the image: the chart and the manifests then contain its digest
    #[arg(long, value_name = "REGISTRY/NAME")]
    repository: Option<String>,
}

/// Makes target/release-files.
pub(crate) fn release(arguments: &ReleaseArgs) -> Result<()> {
    versions_agree(arguments.tag.as_deref())?;
    setup::setup(&[Group::Base])?;
    let folder = workspace::target().join("release-files");
    drop(fs::remove_dir_all(&folder));
    fs::create_dir_all(&folder).with_context(|| format!("making {}", folder.display()))?;

    let repository = arguments.repository.as_deref().unwrap_or("intercept-agent");
    let image = image::named(&format!("{repository}:{VERSION}"), &arguments.arch)?;
    for (architecture, agent) in &image.agents {
        let size = fs::metadata(agent).with_context(|| format!("looking at {}", agent.display()))?.len();
        ensure!(size < MOST_BYTES, "{} has {size} bytes: is it stripped?", agent.display());
        let name = format!("intercept-agent-{VERSION}-linux-{}", architecture.as_str());
        copy(agent, &folder.join(name))?;
    }
    copy(&image.archive, &folder.join(format!("intercept-agent-{VERSION}.oci.tar")))?;
    write(&folder.join("DIGEST"), &format!("{}  {repository}:{VERSION}\n", image.digest))?;

    // Only registries know digests; an archive that is loaded on nodes has a name.
    let digest = arguments.repository.as_ref().map(|_| image.digest.as_str());
    package_chart(repository, digest, &folder)?;
    let mut settings = vec![format!("image.repository={repository}")];
    settings.extend(digest.map(|digest| format!("image.digest={digest}")));
    let values = Values { settings, ..Values::default() };
    write(&folder.join(format!("intercept-{VERSION}.yaml")), &manifests::plain(&values)?)?;
    for name in manifests::platforms()? {
        let to = name.replace(".yaml", ".values.yaml");
        copy(&helm::platforms().join(&name), &folder.join(to))?;
    }
    bills_of_materials(&folder)?;
    checksums(&folder)?;
    for name in names(&folder)? {
        println!("{}", folder.join(name).display());
    }
    println!("the image's digest is {}", image.digest);
    Ok(())
}

/// Checks that the workspace, the chart, the changelog and the tag have the same version.
fn versions_agree(tag: Option<&str>) -> Result<()> {
    let read = |path: &str| {
        let path = workspace::root().join(path);
        fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))
    };
    check_versions(&read("deploy/chart/Chart.yaml")?, &read("CHANGELOG.md")?, tag)
}

fn check_versions(chart: &str, changelog: &str, tag: Option<&str>) -> Result<()> {
    for field in ["version", "appVersion"] {
        let found = chart.lines().find_map(|line| line.strip_prefix(&format!("{field}: ")));
        ensure!(
            found == Some(VERSION),
            "{field} in deploy/chart/Chart.yaml is {found:?}, and Cargo.toml has {VERSION}"
        );
    }
    let heading = changelog.lines().find_map(|line| line.strip_prefix("## ")).unwrap_or_default();
    ensure!(
        heading.split(' ').next() == Some(VERSION),
        "CHANGELOG.md begins with {heading:?}, and Cargo.toml has {VERSION}"
    );
    if let Some(tag) = tag {
        ensure!(tag == format!("v{VERSION}"), "the tag is {tag}, and Cargo.toml has {VERSION}");
        ensure!(!heading.contains("unreleased"), "CHANGELOG.md still says {heading:?}: put the date there");
    }
    Ok(())
}

/// Packs the chart with values that name this image.
fn package_chart(repository: &str, digest: Option<&str>, folder: &Path) -> Result<()> {
    let copy = workspace::target().join("release-chart");
    drop(fs::remove_dir_all(&copy));
    run::output(Command::new("cp").arg("-r").arg(helm::chart()).arg(&copy))?;
    let values = copy.join("values.yaml");
    let text = fs::read_to_string(&values).with_context(|| format!("reading {}", values.display()))?;
    let named = naming(&text, repository, digest).context("naming the image in deploy/chart/values.yaml")?;
    write(&values, &named)?;
    run::output(helm::helm()?.args(["package", "--destination"]).arg(folder).arg(&copy)).map(drop)
}

fn naming(values: &str, repository: &str, digest: Option<&str>) -> Result<String> {
    let mut text = values.to_owned();
    let digest = digest.unwrap_or_default();
    let changes = [
        ("  repository: intercept-agent\n", format!("  repository: {repository}\n")),
        ("  digest: \"\"\n", format!("  digest: \"{digest}\"\n")),
    ];
    for (from, to) in changes {
        ensure!(text.matches(from).count() == 1, "there is no line {from:?}");
        text = text.replace(from, &to);
    }
    Ok(text)
}

/// Writes bills of materials for the agent and for the programs, which are built separately.
fn bills_of_materials(folder: &Path) -> Result<()> {
    const NAME: &str = "bill-of-materials";
    let tool = workspace::cache()?.join("cargo-cyclonedx");
    let program = tool.join("bin/cargo-cyclonedx");
    if !program.is_file() {
        eprintln!("building {SBOM} into {} (some minutes) ...", tool.display());
        run::shown(run::cargo("install").args(["--locked", "--root"]).arg(&tool).arg(SBOM))?;
    }
    let mut list = Command::new(&program);
    list.args(["cyclonedx", "--format", "json", "--spec-version", "1.5", "--quiet"]);
    list.args(["--override-filename", NAME]).env("SOURCE_DATE_EPOCH", "0");
    let listed = run::output(list.current_dir(workspace::root()));
    // The tool writes one next to the manifest of every package.
    for path in members()? {
        let written = path.join(format!("{NAME}.json"));
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if listed.is_ok() && RELEASED.contains(&&*name) {
            copy(&written, &folder.join(format!("{name}-{VERSION}.cdx.json")))?;
        }
        drop(fs::remove_file(&written));
    }
    listed.map(drop)
}

/// The folders of the workspace's packages.
fn members() -> Result<Vec<PathBuf>> {
    let mut list = run::cargo("metadata");
    let text = run::output(list.args(["--no-deps", "--format-version", "1"]))?;
    let metadata: serde_json::Value = serde_json::from_str(&text).context("reading cargo's metadata")?;
    let manifests = metadata["packages"].as_array().into_iter().flatten();
    let manifests = manifests.filter_map(|package| package["manifest_path"].as_str());
    Ok(manifests.filter_map(|manifest| Some(Path::new(manifest).parent()?.to_owned())).collect())
}

fn checksums(folder: &Path) -> Result<()> {
    let mut sum = Command::new("sha256sum");
    let sums = run::output(sum.arg("--").args(names(folder)?).current_dir(folder))?;
    write(&folder.join("SHA256SUMS"), &sums)
}

fn names(folder: &Path) -> Result<Vec<String>> {
    let entries = fs::read_dir(folder).with_context(|| format!("listing {}", folder.display()))?;
    let mut names: Vec<_> =
        entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.sort();
    if names.is_empty() {
        bail!("{} is empty", folder.display());
    }
    Ok(names)
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    fs::copy(from, to).with_context(|| format!("copying {} to {}", from.display(), to.display())).map(drop)
}

fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).with_context(|| format!("writing {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_that_differ_are_refused() {
        let chart = format!("name: intercept\nversion: {VERSION}\nappVersion: {VERSION}\n");
        let changelog = |heading: &str| format!("# Changelog\n\n## {heading}\n\n## 0.0.1\n");
        let (dated, open) =
            (changelog(&format!("{VERSION} (2026-01-01)")), changelog(&format!("{VERSION} (unreleased)")));
        let tag = format!("v{VERSION}");
        assert!(check_versions(&chart, &dated, Some(&tag)).is_ok());
        assert!(check_versions(&chart, &open, None).is_ok());
        for (chart, changelog, tag) in [
            (&chart, &open, Some(tag.as_str())),
            (&chart, &dated, Some("v9.9.9")),
            (&chart, &changelog("9.9.9"), None),
            (&chart.replace("appVersion: ", "appVersion: 9"), &dated, None),
        ] {
            assert!(check_versions(chart, changelog, tag).is_err(), "{chart} {changelog} {tag:?}");
        }
    }

    #[test]
    fn the_charts_values_can_name_an_image() {
        let values = include_str!("../../deploy/chart/values.yaml");
        let named = naming(values, "registry.example/a", Some("sha256:0")).expect("named");
        assert!(
            named.contains("repository: registry.example/a\n") && named.contains("digest: \"sha256:0\"\n")
        );
    }
}
