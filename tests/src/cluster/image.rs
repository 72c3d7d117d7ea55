//! Images that are made here, so that nothing is pulled: one with Envoy and what stands for Istio's pilot-agent, and one
//! for the application.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};

use super::proxy;
use crate::{actor::binary, agent::succeed, cri, envoy};

/// Its entrypoint understands what the injector writes for pilot-agent.
pub(super) const PROXY: &str = "intercept.test/proxyv2:1";
/// Shell, client and server.
pub const APP: &str = "intercept.test/app:1";

const PILOT_AGENT: &str = r#"#!/bin/sh
envoy() {
    exec /usr/local/bin/envoy --config-path "$1" --concurrency 1 --disable-hot-restart --log-level error \
        --file-flush-interval-msec 50
}
case "$1 $2" in
"proxy sidecar") envoy "/etc/istio/$ISTIO_META_INTERCEPTION_MODE${ISTIO_DUAL_STACK:+-dual-stack}.json" ;;
"proxy router") envoy /etc/istio/gateway.json ;;
"istio-iptables "*) exec /usr/local/bin/probe ;;
wait*) until timeout 1 wget -q -O /dev/null http://127.0.0.1:15021/; do sleep 0.1; done ;;
*) echo "pilot-agent: $*" >&2; exit 2 ;;
esac
"#;

/// Makes the archives in a folder.
pub(super) fn make(folder: &Path) -> Result<[PathBuf; 2]> {
    let proxy = folder.join("proxy");
    let bin = cri::busybox(&proxy)?;
    add(&proxy, &envoy::program()?, "envoy")?;
    add(&proxy, &binary::locate("probe", "INTERCEPT_PROBE")?, "probe")?;
    let agent = bin.join("pilot-agent");
    fs::write(&agent, PILOT_AGENT)?;
    fs::set_permissions(&agent, fs::Permissions::from_mode(0o755))?;
    fs::create_dir_all(proxy.join("etc/istio"))?;
    for (name, configuration) in [
        ("REDIRECT", proxy::sidecar()),
        ("REDIRECT-dual-stack", proxy::dual_stack_sidecar()),
        ("TPROXY", proxy::transparent_sidecar()),
        ("gateway", proxy::gateway()),
    ] {
        fs::write(proxy.join(format!("etc/istio/{name}.json")), configuration.to_string())?;
    }

    let app = folder.join("app");
    cri::busybox(&app)?;
    add(&app, &binary::locate("http", "INTERCEPT_HTTP")?, "http")?;
    Ok([
        cri::make_archive(&proxy, &["/bin/pilot-agent"], PROXY, &folder.join("proxy.tar"))?,
        cri::make_archive(&app, &["/bin/sh"], APP, &folder.join("app.tar"))?,
    ])
}

/// Adds a program of this machine and the libraries that it is linked to.
fn add(root: &Path, program: &Path, name: &str) -> Result<()> {
    let bin = root.join("usr/local/bin");
    fs::create_dir_all(&bin)?;
    let copy = bin.join(name);
    fs::copy(program, &copy).with_context(|| format!("copying {}", program.display()))?;
    fs::set_permissions(&copy, fs::Permissions::from_mode(0o755))?;
    let mut ldd = Command::new("ldd");
    ldd.arg(program);
    // "libc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x...)", and the interpreter without an arrow.
    for library in succeed(ldd)?.split_whitespace().filter(|word| word.starts_with('/')) {
        let to = root.join(library.trim_start_matches('/'));
        fs::create_dir_all(to.parent().context("a library in no folder")?)?;
        fs::copy(library, &to).with_context(|| format!("copying {library}"))?;
    }
    Ok(())
}
