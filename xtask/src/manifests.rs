//! Checks deploy/ without a cluster: helm renders the chart, the schemas of the Kubernetes API validate the result, and
//! promtool checks and tests the alerts.

use std::{fs, path::Path};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;

use crate::{
    helm::{self, Values},
    image, run, workspace,
};

mod alerts;

/// Settings that enable parts of the chart, and the version of Kubernetes to render for.
const VARIANTS: [(&[&str], Option<&str>); 7] = [
    (&[], None),
    (&["cni.options={-m,TPROXY}"], None),
    (&["cleanUpOnExit=true", "maxConnections=1000", "cni.options={-m,TPROXY}", "watch=false"], None),
    (&["metrics.podMonitor=true", "metrics.prometheusRule=true", "metrics.dashboard=true"], None),
    (
        &[
            "podLabels.k8s-app=istio-cni-node",
            "podAnnotations.a=b",
            "imagePullSecrets[0].name=key",
            "extraArgs={--accelerate}",
            "env[0].name=A",
            "env[0].value=b",
            "affinity.podAntiAffinity.requiredDuringSchedulingIgnoredDuringExecution[0].topologyKey=zone",
            "dnsPolicy=Default",
            "mountBpffs=true",
            "cni.install=false",
        ],
        None,
    ),
    (
        &[
            "mode=shadow",
            "enforcePercent=50",
            "enforceWorkloads={shop/Deployment/cart,bank/CronJob/bill}",
            "cutover.legacyTables=true",
            "cutover.minFlows=100",
            "securityContextConstraints=true",
        ],
        None,
    ),
    // The oldest supported version, where AppArmor is an annotation.
    (&[], Some("1.25")),
];

/// Values that are refused, and a part of the message.
const REFUSED: [(&str, &str); 19] = [
    ("cni.confdir=/etc/cni/net.d", "confdir"),
    ("metric.port=15099", "metric"),
    ("maxConnections=0", "/maxConnections"),
    ("maxConnections=many", "/maxConnections"),
    ("image.digest=sha256:1", "/image/digest"),
    ("metrics.port=99999", "/metrics/port"),
    ("cni.confDir=net.d", "/cni/confDir"),
    ("appArmorProfile=unconfined", "/appArmorProfile"),
    ("extraArgs={log=debug}", "/extraArgs/0"),
    ("mesh=istoi", "/mesh"),
    ("apiWait=60", "/apiWait"),
    ("cni.confName=/etc/cni/net.d/10-a.conflist", "/cni/confName"),
    ("resources.limits.memory=128MB", "/resources/limits/memory"),
    ("enforcePercent=101", "/enforcePercent"),
    ("mode=shadow,enforceWorkloads={shop/cart}", "/enforceWorkloads/0"),
    // The default is to enforce all.
    ("enforcePercent=50", "/mode"),
    ("enforceWorkloads={shop/Deployment/cart}", "/mode"),
    ("mode=shadow,watch=false,enforcePercent=50", "/watch"),
    ("cutover.minFlows=0", "/cutover/minFlows"),
];

/// Texts that must or must not be in the manifests with a value.
const EFFECTS: [(&[&str], Option<&str>, &str, bool); 24] = [
    (&[], None, "appArmorProfile: { type: Unconfined }", true),
    (&[], Some("1.29"), "appArmorProfile", false),
    (&[], Some("1.29"), "container.apparmor.security.beta.kubernetes.io/agent: unconfined", true),
    (&["appArmorProfile="], None, "appArmorProfile", false),
    (
        &["image.digest=sha256:0000000000000000000000000000000000000000000000000000000000000000"],
        None,
        "@sha256:0",
        true,
    ),
    (&["maxConnections=1048576"], None, "memory: 352Mi", true),
    (&["maxConnections=1000000000"], None, "--max-connections=1000000000", true),
    (&["resources.limits.memory=64Mi"], None, "memory: 64Mi", true),
    (&["cni.install=false"], None, "cni", false),
    (&["cni.standalone=istio-cni"], None, "kind: NetworkAttachmentDefinition", true),
    (&["watch=true"], None, "resources: [namespaces]", true),
    (&["watch=false"], None, "resources: [namespaces]", false),
    (&["mode=enforce"], None, "--shadow", false),
    (&["mode=shadow", "cni.options={--accelerate}"], None, "- --shadow\n            - --accelerate", true),
    (&["mode=shadow", "enforcePercent=50"], None, "- --enforce-percent=50\n", true),
    (&["mode=shadow"], None, "--enforce-", false),
    (
        &["mode=shadow", "enforceWorkloads={a/Pod/b,c/Job/d}"],
        None,
        "- --enforce-workloads=a/Pod/b,c/Job/d\n",
        true,
    ),
    (&["cutover.minFlows=1000000"], None, "- --cutover-min-flows=1000000\n", true),
    (&[], None, "NET_RAW", false),
    (&["cutover.legacyTables=true"], None, "SETGID, NET_RAW]\n", true),
    (&["cutover.legacyTables=true"], None, "mountPath: /run/xtables.lock", true),
    (&["cutover.legacyTables=true"], None, "path: /run/xtables.lock, type: FileOrCreate", true),
    (&["excludeNamespaces={a,b}"], None, "--exclude-namespaces=a,b", true),
    (&["metrics.address=0.0.0.0"], None, "host: 127.0.0.1", true),
];

/// Kinds outside Kubernetes, which have no schema.
const CUSTOM: [&str; 3] = [
    "apiVersion: k8s.cni.cncf.io/",
    "apiVersion: monitoring.coreos.com/",
    "apiVersion: security.openshift.io/",
];

const HEAD: &str = "\
# The agent on every node, for Kubernetes 1.30 and later: older ones know AppArmor by an annotation, which helm writes.
# Made from deploy/chart by `cargo xtask manifests --write`; change it there.
apiVersion: v1
kind: Namespace
metadata:
  name: intercept-system
  labels:
    pod-security.kubernetes.io/enforce: privileged
";

#[derive(Args)]
pub(crate) struct ManifestsArgs {
    /// Write deploy/intercept.yaml from the chart
    #[arg(long)]
    write: bool,
}

pub(crate) fn manifests(arguments: &ManifestsArgs) -> Result<()> {
    run::shown(helm::helm()?.args(["lint", "--strict", "--quiet"]).arg(helm::chart()))?;
    for (settings, kubernetes) in VARIANTS {
        conforms(&Values { kubernetes, ..Values::set(settings) })?;
    }
    for platform in platforms()? {
        conforms(&Values { platform: Some(platform), ..Values::default() })?;
    }
    for (setting, named) in REFUSED {
        is_refused(setting, named)?;
    }
    for (settings, kubernetes, text, expected) in EFFECTS {
        let found = helm::rendered(&Values { kubernetes, ..Values::set(settings) })?.contains(text);
        ensure!(found == expected, "with {settings:?}, {text:?} is there: {found}, and not {expected}");
    }
    alerts::check()?;

    let expected = plain(&Values::default())?;
    // The image of `cargo xtask image`.
    ensure!(
        expected.contains(&format!("image: {:?}", image::NAME)),
        "deploy/chart does not run {}: is its appVersion the workspace's version?",
        image::NAME
    );
    let path = workspace::root().join("deploy/intercept.yaml");
    if arguments.write {
        fs::write(&path, &expected).with_context(|| format!("writing {}", path.display()))?;
    } else if fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))? != expected {
        bail!("deploy/intercept.yaml is not what deploy/chart gives: `cargo xtask manifests --write`");
    }
    helm::validate(&path, None)?;
    println!("the chart, its values and its alerts are sound");
    Ok(())
}

/// The manifests for use without helm, with their own namespace.
pub(crate) fn plain(values: &Values) -> Result<String> {
    let text = helm::rendered(values)?;
    let lines = text.lines().filter(|line| !line.starts_with("# Source"));
    Ok(HEAD.lines().chain(lines).map(|line| format!("{line}\n")).collect())
}

/// The names of the files of values for distributions.
pub(crate) fn platforms() -> Result<Vec<String>> {
    let folder = helm::platforms();
    let entries = fs::read_dir(&folder).with_context(|| format!("listing {}", folder.display()))?;
    let mut names: Vec<_> =
        entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.sort();
    Ok(names)
}

fn conforms(values: &Values) -> Result<()> {
    let text = helm::rendered(values)?;
    let known = |document: &&str| !CUSTOM.iter().any(|custom| document.contains(custom));
    let documents: Vec<&str> = text.split("\n---\n").filter(known).collect();
    let file = workspace::target().join("rendered.yaml");
    fs::write(&file, documents.join("\n---\n")).with_context(|| format!("writing {}", file.display()))?;
    let what = values.platform.clone().unwrap_or_else(|| values.settings.join(","));
    helm::validate(&file, values.kubernetes).with_context(|| format!("rendering the chart with {what:?}"))
}

/// Checks that helm refuses a value by its schema, with a message that names it.
fn is_refused(setting: &str, named: &str) -> Result<()> {
    let output = helm::template(&Values::set(&[setting]))?.output().context("starting helm")?;
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(
        !output.status.success() && errors.contains(named),
        "--set {setting} should be refused by deploy/chart/values.schema.json, naming {named}: {errors}"
    );
    Ok(())
}

/// Writes the chart rendered with these settings.
pub(crate) fn write(settings: &[&str], to: &Path) -> Result<()> {
    fs::write(to, helm::rendered(&Values::set(settings))?)
        .with_context(|| format!("writing {}", to.display()))
}
