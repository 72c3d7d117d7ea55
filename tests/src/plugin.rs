//! The CNI plugin, called as by a runtime.

use std::{
    io::Write as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use crate::{agent::Agent, daemon::Daemon};

/// The plugin of an agent, which asks a daemon.
#[derive(Debug)]
pub struct RuntimePlugin {
    program: PathBuf,
    socket: PathBuf,
}

/// What a runtime passes for a pod.
#[derive(Debug)]
pub struct CniSandbox<'a> {
    /// The pod's object.
    pub object: &'a Value,
    /// The pod's UID, which differs from that of the object for a static pod.
    pub uid: &'a str,
    /// The pod's network namespace.
    pub netns: &'a Path,
    /// The pod's first address, with the length of its prefix.
    pub address: &'a str,
}

impl RuntimePlugin {
    /// The plugin with this daemon's socket.
    pub fn new(agent: &Agent, daemon: &Daemon<'_>) -> Self {
        Self { program: agent.program().to_owned(), socket: daemon.socket() }
    }

    /// Calls the plugin. The inner error is its output if it fails.
    pub fn call(&self, command: &str, sandbox: &CniSandbox<'_>) -> Result<Result<(), String>> {
        let metadata = &sandbox.object["metadata"];
        let config = json!({
            "cniVersion": "1.0.0", "name": "net", "type": "intercept-cni", "socket": self.socket,
            "prevResult": { "cniVersion": "1.0.0", "ips": [{ "address": sandbox.address }] },
            "runtimeConfig": { "io.kubernetes.cri.pod-annotations": metadata["annotations"] },
        });
        let text = |name: &str| metadata[name].as_str().with_context(|| format!("an object without {name}"));
        let arguments = format!(
            "K8S_POD_NAMESPACE={};K8S_POD_NAME={};K8S_POD_UID={}",
            text("namespace")?,
            text("name")?,
            sandbox.uid
        );
        let mut child = Command::new(&self.program)
            .arg("cni")
            .env("CNI_COMMAND", command)
            .env("CNI_CONTAINERID", format!("sandbox-of-{}", sandbox.uid))
            .env("CNI_NETNS", sandbox.netns)
            .env("CNI_IFNAME", "eth0")
            .env("CNI_ARGS", arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("starting the plugin")?;
        let mut stdin = child.stdin.take().context("no standard input")?;
        stdin.write_all(config.to_string().as_bytes())?;
        drop(stdin);
        let output = child.wait_with_output()?;
        let printed = String::from_utf8(output.stdout)?;
        Ok(if output.status.success() { Ok(()) } else { Err(printed) })
    }
}
