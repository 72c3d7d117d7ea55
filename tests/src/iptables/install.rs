//! Installs the rules with real iptables.

use std::io::Write;
use std::process::Stdio;

use anyhow::{Context, Result, bail};
use ipnet::{IpNet, Ipv6Net};

use super::chains::{PASSTHROUGH_V6, rules};
use super::options::{IptablesOptions, IptablesPorts};
use super::restore::restore_input;
use super::rule::IpFamily;
use crate::testbed::Sandbox;
use crate::testbed::netlink::RouteSpec;

/// An implementation of iptables.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backend {
    /// iptables-nft, today's default.
    Nft,
    /// iptables-legacy.
    Legacy,
}

/// Changes a pod as istio-iptables does: rules of both families, ::6 on lo, and the routes of TPROXY mode.
pub fn apply(options: &IptablesOptions, sandbox: &Sandbox, backend: Backend) -> Result<()> {
    let name = if backend == Backend::Nft { "nft" } else { "legacy" };
    for (program, family) in [("iptables", IpFamily::V4), ("ip6tables", IpFamily::V6)] {
        restore(sandbox, &format!("{program}-{name}-restore"), &restore_input(&rules(options, family)))?;
    }
    sandbox.netns.add_address("lo", IpNet::V6(Ipv6Net::from(PASSTHROUGH_V6)))?;
    if let Some(tproxy) = options.tproxy
        && options.inbound_ports != IptablesPorts::List(Vec::new())
    {
        sandbox.netns.add_mark_rule(tproxy.mark, tproxy.table)?;
        for everything in ["0.0.0.0/0", "::/0"] {
            sandbox.netns.add_route(RouteSpec {
                to: everything.parse()?,
                via: None,
                dev: Some("lo"),
                table: tproxy.table,
                local: true,
            })?;
        }
    }
    Ok(())
}

fn restore(sandbox: &Sandbox, program: &str, input: &str) -> Result<()> {
    let mut child = sandbox
        .command(program)?
        .arg("--noflush")
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("starting {program}; is the package iptables installed?"))?;
    child.stdin.take().context("no standard input")?.write_all(input.as_bytes())?;
    let output = child.wait_with_output()?;
    if !output.status.success() {
        bail!("{program} refused: {}\n{input}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(())
}
