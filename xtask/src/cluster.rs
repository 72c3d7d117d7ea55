//! A cluster of one node: etcd, kube-apiserver, kube-controller-manager, kube-scheduler, kube-proxy, kubelet and
//! containerd, on which helm installs the agent from the chart and pods have Envoy as their sidecar.

use anyhow::Result;

use crate::{
    architecture::Architecture, cri, helm, image, kube, parts, setup, setup::Group, test, workspace,
};

/// Runs the tests that need a cluster, in their own namespaces and cgroups.
pub(crate) fn cluster(arguments: &parts::PartsArgs) -> Result<()> {
    let programs = kube::cluster();
    let mut missing = [kube::missing(&programs)?, cri::missing()?, helm::missing()?].concat();
    missing.extend(Some(workspace::envoy()?).filter(|envoy| !envoy.is_file()));
    if arguments.leave_out(&missing, "a cluster of one node", "`cargo xtask cluster` gets it") {
        return Ok(());
    }
    setup::setup(&[Group::Base, Group::Test, Group::Envoy, Group::Cri, Group::Kube])?;
    kube::get(&programs)?;
    let (kube, cri, helm) = (kube::folder()?, cri::get()?, helm::program()?);
    let image = image::image(&[Architecture::HOST])?;
    test::needing(
        "cluster",
        &[
            ("INTERCEPT_KUBE", &kube),
            ("INTERCEPT_CRI", &cri),
            ("INTERCEPT_HELM", &helm),
            ("INTERCEPT_IMAGE", &image),
        ],
    )
}
