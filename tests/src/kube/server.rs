//! etcd and kube-apiserver.

use std::{
    env,
    fs::{self, File},
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::{
    agent::succeed,
    testbed::{Sandbox, name},
};

/// Variable with the folder of the programs.
pub const VARIABLE: &str = "INTERCEPT_KUBE";

/// A fixed port: nothing else runs in this namespace.
const ETCD: SocketAddr = at(2379);
const PEERS: SocketAddr = at(2380);
/// The token of the administrator.
const ADMIN: &str = "the-admin-of-this-test";

/// Start takes ten seconds on two cores, and minutes if they are busy.
const PATIENCE: Duration = Duration::from_secs(300);

const fn at(port: u16) -> SocketAddr {
    SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), port)
}

/// The use of the API.
#[derive(Clone, Copy, Debug)]
pub struct ServerSpec {
    /// Where it listens.
    pub address: SocketAddr,
    /// Its other arguments.
    pub arguments: &'static [&'static str],
}

impl ServerSpec {
    /// An API without a cluster, at which a test plays the kubelet.
    const ALONE: Self = Self {
        address: at(6443),
        arguments: &[
            // Endpoints are not needed, and must not be on the loopback interface.
            "--advertise-address=192.0.2.1",
            "--endpoint-reconciler-type=none",
            // No controller creates the accounts of pods.
            "--disable-admission-plugins=ServiceAccount",
        ],
    };
}

/// A running API. Dropping it ends both processes.
#[derive(Debug)]
pub struct KubeServer {
    sandbox: Arc<Sandbox>,
    spec: ServerSpec,
    folder: TempDir,
    parts: PathBuf,
    etcd: Child,
    api: Mutex<Option<Child>>,
}

impl KubeServer {
    /// Starts both on a separate node. Returns when the API is ready.
    pub fn start() -> Result<Self> {
        Self::start_on(Arc::new(Sandbox::new("kube")?), ServerSpec::ALONE)
    }

    /// Starts both on this node. Returns when the API is ready.
    pub fn start_on(sandbox: Arc<Sandbox>, spec: ServerSpec) -> Result<Self> {
        let parts = env::var_os(VARIABLE).map(PathBuf::from);
        let parts = parts.with_context(|| format!("{VARIABLE} is not set: run `cargo xtask kube`"))?;
        let folder = name::scratch("kube")?;
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
        let server = Self { sandbox, spec, folder, parts, etcd, api: Mutex::default() };
        server.resume()?;
        Ok(server)
    }

    /// Restarts the API with the state in etcd. Returns when it is ready.
    pub fn resume(&self) -> Result<()> {
        let mut running = self.api.lock().expect("whole");
        ensure!(running.is_none(), "the API runs");
        let mut api = self.sandbox.command(self.parts.join("kube-apiserver"))?;
        api.args([
            format!("--etcd-servers=http://{ETCD}"),
            format!("--bind-address={}", self.spec.address.ip()),
            format!("--secure-port={}", self.spec.address.port()),
            "--authorization-mode=RBAC".to_owned(),
            "--anonymous-auth=false".to_owned(),
            "--service-account-issuer=https://kubernetes.default.svc".to_owned(),
            "--service-cluster-ip-range=10.96.0.0/16".to_owned(),
        ]);
        api.args(self.spec.arguments);
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
        // Its certificate exists by then.
        let client = super::KubeClient::connect(self);
        client.is_ok_and(|client| client.text("/readyz").is_ok_and(|text| text == "ok"))
    }

    /// Kills the API. etcd keeps running.
    pub fn stop(&self) -> Result<()> {
        let mut api = self.api.lock().expect("whole").take().context("the API does not run")?;
        api.kill()?;
        api.wait()?;
        Ok(())
    }

    /// The node on which it runs.
    pub fn sandbox(&self) -> &Sandbox {
        &self.sandbox
    }

    /// The kubeconfig of the administrator.
    pub fn kubeconfig(&self) -> Value {
        let server = format!("https://{}", self.spec.address);
        json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "c",
            "clusters": [{ "name": "c", "cluster": { "server": server, "certificate-authority": self.authority() } }],
            "users": [{ "name": "u", "user": { "token": ADMIN } }],
            "contexts": [{ "name": "c", "context": { "cluster": "c", "user": "u" } }],
        })
    }

    /// The CA of the API's certificate.
    pub fn authority(&self) -> PathBuf {
        self.folder.path().join("tls/apiserver.crt")
    }

    /// The key that signs the tokens of accounts.
    pub fn accounts_key(&self) -> PathBuf {
        self.folder.path().join("accounts.key")
    }

    /// The folder with the programs.
    pub fn parts(&self) -> &Path {
        &self.parts
    }

    fn log_file(&self) -> PathBuf {
        self.folder.path().join("kube-apiserver.log")
    }

    /// The end of its log.
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
