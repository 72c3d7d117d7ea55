//! etcd and kube-apiserver.

use std::{
    env,
    fs::{self, File},
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::Mutex,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use tempfile::TempDir;

use crate::{agent::succeed, testbed::Sandbox};

/// The variable that says where the programs are.
pub const VARIABLE: &str = "INTERCEPT_KUBE";

/// Nobody else is in this namespace, so ports can be chosen.
const ETCD: SocketAddr = at(2379);
const PEERS: SocketAddr = at(2380);
/// Where the API is.
pub(super) const API: SocketAddr = at(6443);
/// Whose token this is may do everything.
pub(super) const ADMIN: &str = "the-admin-of-this-test";

/// On a busy machine with two cores it takes ten seconds.
const PATIENCE: Duration = Duration::from_secs(60);

const fn at(port: u16) -> SocketAddr {
    SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), port)
}

/// A running API. Dropping it ends everything in its cgroup.
#[derive(Debug)]
pub struct KubeServer {
    sandbox: Sandbox,
    folder: TempDir,
    parts: PathBuf,
    etcd: Child,
    api: Mutex<Option<Child>>,
}

impl KubeServer {
    /// Starts both; returns when the API is ready.
    pub fn start() -> Result<Self> {
        let parts = env::var_os(VARIABLE).map(PathBuf::from);
        let parts = parts.with_context(|| format!("{VARIABLE} is not set: run `cargo xtask kube`"))?;
        let sandbox = Sandbox::new("kube")?;
        let folder = TempDir::with_prefix("intercept-test-kube")?;
        let mut key = Command::new("openssl");
        key.args(["ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out"]);
        key.arg(folder.path().join("accounts.key"));
        succeed(key)?;
        fs::write(folder.path().join("tokens.csv"), format!("{ADMIN},admin,admin,system:masters\n"))?;

        let mut etcd = sandbox.command(parts.join("etcd"))?;
        etcd.arg("--data-dir").arg(folder.path().join("etcd"));
        etcd.args([
            format!("--listen-client-urls=http://{ETCD}"),
            format!("--advertise-client-urls=http://{ETCD}"),
        ]);
        etcd.arg(format!("--listen-peer-urls=http://{PEERS}"));
        let etcd = start(&mut etcd, &folder.path().join("etcd.log")).context("starting etcd")?;
        let server = Self { sandbox, folder, parts, etcd, api: Mutex::default() };
        server.resume()?;
        Ok(server)
    }

    /// Starts the API anew, with what etcd remembers; returns when it is ready.
    pub fn resume(&self) -> Result<()> {
        let mut running = self.api.lock().expect("whole");
        ensure!(running.is_none(), "the API runs");
        let mut api = self.sandbox.command(self.parts.join("kube-apiserver"))?;
        api.args([
            format!("--etcd-servers=http://{ETCD}"),
            format!("--bind-address={}", API.ip()),
            format!("--secure-port={}", API.port()),
            "--authorization-mode=RBAC".to_owned(),
            "--anonymous-auth=false".to_owned(),
            "--service-account-issuer=https://kubernetes.default.svc".to_owned(),
            "--service-cluster-ip-range=10.96.0.0/16".to_owned(),
            // Endpoints are not needed here, and may not be on the loopback interface.
            "--advertise-address=192.0.2.1".to_owned(),
            "--endpoint-reconciler-type=none".to_owned(),
            // The accounts of the pods are made by another program.
            "--disable-admission-plugins=ServiceAccount".to_owned(),
        ]);
        let file = |flag: &str, name: &str| format!("--{flag}={}", self.folder.path().join(name).display());
        api.args([
            file("cert-dir", "tls"),
            file("token-auth-file", "tokens.csv"),
            file("service-account-key-file", "accounts.key"),
            file("service-account-signing-key-file", "accounts.key"),
        ]);
        *running = Some(start(&mut api, &self.log_file()).context("starting kube-apiserver")?);
        let deadline = Instant::now() + PATIENCE;
        while !self.is_ready() {
            let ended = running.as_mut().map(Child::try_wait).transpose()?.flatten();
            ensure!(ended.is_none() && Instant::now() < deadline, "the API does not start:\n{}", self.log());
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    fn is_ready(&self) -> bool {
        // Its certificate is there by then.
        let client = super::KubeClient::connect(self);
        client.is_ok_and(|client| client.text("/readyz").is_ok_and(|text| text == "ok"))
    }

    /// Kills the API; etcd goes on.
    pub fn stop(&self) -> Result<()> {
        let mut api = self.api.lock().expect("whole").take().context("the API does not run")?;
        api.kill()?;
        api.wait()?;
        Ok(())
    }

    /// Where it runs: its namespace is the node's.
    pub fn sandbox(&self) -> &Sandbox {
        &self.sandbox
    }

    /// What vouches for the API's certificate.
    pub(super) fn authority(&self) -> PathBuf {
        self.folder.path().join("tls/apiserver.crt")
    }

    fn log_file(&self) -> PathBuf {
        self.folder.path().join("kube-apiserver.log")
    }

    /// The end of what it has logged.
    pub fn log(&self) -> String {
        let text = fs::read_to_string(self.log_file()).unwrap_or_default();
        let lines: Vec<_> = text.lines().collect();
        lines[lines.len().saturating_sub(30)..].join("\n")
    }
}

fn start(command: &mut Command, log: &Path) -> Result<Child> {
    let log = File::options().create(true).append(true).open(log)?;
    Ok(command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).spawn()?)
}

impl Drop for KubeServer {
    fn drop(&mut self) {
        for child in self.api.get_mut().into_iter().flatten().chain([&mut self.etcd]) {
            drop(child.kill());
            drop(child.wait());
        }
    }
}
