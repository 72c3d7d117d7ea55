//! Envoy as a pod's sidecar: Istio's two listeners in both families, which connect to the original destination.

pub mod generations;
pub mod loaded;

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use serde::Deserialize;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::{
    actor::binary::ReadableCopy,
    bench::envoy::{self, Envoy, named},
    testbed::{Ids, Sandbox, name},
};

/// What Envoy relays.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Speaks {
    /// Connections. The log has a line for each ended one.
    Tcp,
    /// Requests. The log has a line for each.
    Http,
}

/// Envoy as user 1337 of a pod. Dropping it ends the process.
#[derive(Debug)]
pub struct Sidecar {
    envoy: Envoy,
    log: PathBuf,
    _folder: TempDir,
}

/// A line of the access log. Addresses include ports.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Logged {
    /// `outbound` or `inbound`.
    pub listener: String,
    /// %DOWNSTREAM_LOCAL_ADDRESS%: the original destination.
    pub original: String,
    /// %DOWNSTREAM_REMOTE_ADDRESS%: the client.
    pub client: String,
    /// %UPSTREAM_HOST%: the destination of the onward connection.
    pub upstream: String,
}

impl Sidecar {
    /// Starts Envoy in a pod. Returns when it listens on 15001 and 15006. Callers make the copy once: a copy that is made
    /// while other processes start cannot be executed while one of them has it open for writing (ETXTBSY).
    pub fn start(program: &ReadableCopy, sandbox: &Sandbox, speaks: Speaks) -> Result<Self> {
        let folder = name::scratch("envoy").context("making a folder")?;
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o777))?;
        let log = folder.path().join("access.log");
        let Parts { listeners, clusters } = Parts::of_sidecar(speaks, &log);
        let more = ["--file-flush-interval-msec", "50"];
        let envoy = Envoy::start(program.path(), sandbox, Ids::PROXY, &listeners, &clusters, 15006, &more)?;
        Ok(Self { envoy, log, _folder: folder })
    }

    /// The process.
    pub fn pid(&self) -> u32 {
        self.envoy.pid()
    }

    /// Waits until the access log has this number of lines, and reads it.
    pub fn logged(&self, lines: usize, patience: Duration) -> Result<Vec<Logged>> {
        let deadline = Instant::now() + patience;
        loop {
            let text = fs::read_to_string(&self.log).unwrap_or_default();
            let whole = text.lines().count();
            if whole >= lines && (text.is_empty() || text.ends_with('\n')) {
                return text.lines().map(|line| Ok(serde_json::from_str(line)?)).collect();
            }
            if Instant::now() > deadline {
                bail!("Envoy logged {whole} of {lines} after {patience:?}");
            }
            std::thread::yield_now();
        }
    }
}

/// Envoy as Istio's inbound proxy in TPROXY mode: accepts connections to any address and connects to the original
/// destination from the client's address, with the mark. Runs as root with the proxy's group, as in Istio, because both
/// need CAP_NET_ADMIN.
pub fn transparent(program: &Path, sandbox: &Sandbox, mark: u32) -> Result<Envoy> {
    let kind = |name: &str| format!("type.googleapis.com/envoy.extensions.filters.{name}");
    let original_dst = named(
        "envoy.filters.listener.original_dst",
        &kind("listener.original_dst.v3.OriginalDst"),
        json!({}),
    );
    let original_src = named(
        "envoy.filters.listener.original_src",
        &kind("listener.original_src.v3.OriginalSrc"),
        json!({"mark": mark}),
    );
    let (mut listeners, mut clusters) = (Vec::new(), Vec::new());
    // The IPv4 listener is the last, so wait for it.
    for any in ["::", "0.0.0.0"] {
        let filter = named(
            "envoy.filters.network.tcp_proxy",
            &kind("network.tcp_proxy.v3.TcpProxy"),
            json!({"stat_prefix": "tcp", "cluster": any}),
        );
        listeners.push(json!({
            "name": any,
            "address": {"socket_address": {"address": any, "port_value": 15006}},
            "transparent": true,
            "listener_filters": [original_dst, original_src],
            "filter_chains": [{"filters": [filter]}],
        }));
        clusters.push(json!({
            "name": any, "connect_timeout": "5s", "type": "ORIGINAL_DST", "lb_policy": "CLUSTER_PROVIDED",
        }));
    }
    let root = Ids { gid: Ids::PROXY.gid, ..Ids::ROOT };
    Envoy::start(program, sandbox, root, &listeners, &clusters, 15006, &[])
}

/// Envoy's binary: the path in the variable, or the one of `cargo xtask setup`.
pub fn program() -> Result<PathBuf> {
    envoy::program().or_else(|error| {
        let cache = std::env::var_os("INTERCEPT_CACHE").map(PathBuf::from);
        let home = || std::env::var_os("HOME").map(|home| Path::new(&home).join(".cache/intercept"));
        let found = cache.or_else(home).map(|cache| cache.join("envoy/envoy"));
        found.filter(|path| path.is_file()).ok_or(error)
    })
}

/// What Envoy's configuration has.
struct Parts {
    listeners: Vec<Value>,
    clusters: Vec<Value>,
}

impl Parts {
    fn of_sidecar(speaks: Speaks, log: &Path) -> Self {
        let (mut listeners, mut clusters) = (Vec::new(), Vec::new());
        // IPv4's inbound one comes last: that is the one waited for.
        for (v6, any, passthrough) in [(true, "::", "::6"), (false, "0.0.0.0", "127.0.0.6")] {
            for (name, port) in [("outbound", 15001), ("inbound", 15006)] {
                let cluster = format!("{name}-{}", if v6 { 6 } else { 4 });
                listeners.push(listener(name, any, port, &filter(speaks, &cluster, name, log)));
                let mut upstream = json!({
                    "name": cluster, "connect_timeout": "5s",
                    "type": "ORIGINAL_DST", "lb_policy": "CLUSTER_PROVIDED",
                });
                if name == "inbound" {
                    let source = json!({"address": passthrough, "port_value": 0});
                    upstream["upstream_bind_config"] = json!({"source_address": source});
                }
                clusters.push(upstream);
            }
        }
        Self { listeners, clusters }
    }
}

fn listener(name: &str, any: &str, port: u16, filter: &Value) -> Value {
    let original = named(
        "envoy.filters.listener.original_dst",
        "type.googleapis.com/envoy.extensions.filters.listener.original_dst.v3.OriginalDst",
        json!({}),
    );
    json!({
        "name": format!("{name} {any}"),
        "address": {"socket_address": {"address": any, "port_value": port}},
        "listener_filters": [original],
        "filter_chains": [{"filters": [filter]}],
    })
}

fn filter(speaks: Speaks, cluster: &str, name: &str, log: &Path) -> Value {
    let log = named(
        "envoy.access_loggers.file",
        "type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccessLog",
        json!({"path": log, "log_format": {"json_format": {
            "listener": name,
            "original": "%DOWNSTREAM_LOCAL_ADDRESS%",
            "client": "%DOWNSTREAM_REMOTE_ADDRESS%",
            "upstream": "%UPSTREAM_HOST%",
        }}}),
    );
    match speaks {
        Speaks::Tcp => named(
            "envoy.filters.network.tcp_proxy",
            "type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy",
            json!({"stat_prefix": "tcp", "cluster": cluster, "access_log": [log]}),
        ),
        Speaks::Http => {
            let mut http = envoy::http(json!({"cluster": cluster}), "route");
            http["typed_config"]["access_log"] = json!([log]);
            http
        }
    }
}
