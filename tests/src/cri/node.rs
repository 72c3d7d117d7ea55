//! A node: a network namespace and a cgroup, with mounts of its own in which that cgroup is the whole hierarchy.

use std::{
    env,
    ffi::OsStr,
    fs,
    io::{BufRead as _, BufReader},
    os::unix::fs::{PermissionsExt as _, symlink},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::Arc,
};

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::{client::wait, image};
use crate::{
    agent::succeed,
    testbed::{Sandbox, name},
};

/// Variable with the folder of the unpacked parts.
pub const VARIABLE: &str = "INTERCEPT_CRI";
/// Variable with the path of the agent's image archive.
const AGENT_IMAGE: &str = "INTERCEPT_IMAGE";
/// The addresses of pods.
pub const PODS: &str = "10.88.0.0/24";
/// Their IPv6 addresses, where they have both.
pub const PODS_V6: &str = "fd00:10:88::/64";
/// The image of all pods but the agent's.
pub const IMAGE: &str = "intercept.test/busybox:1";

/// The snapshotter, which uses layers instead of copies.
const SNAPSHOTTER: &str = "overlayfs";

/// Mounts folders of the node over all paths that the programs write to, except bpffs and the scratch folder.
const SET_UP: &str = r#"
set -e
bpffs=$1 scratch=$2
mount --make-rprivate /
mkdir "$scratch/bpffs"
mount --bind "$bpffs" "$scratch/bpffs"
mount -t tmpfs none /run
mkdir -p "$bpffs" /run/netns
mount --move "$scratch/bpffs" "$bpffs"
mount --bind "$bpffs" /sys/fs/bpf
mount -t tmpfs none /var/lib
umount -R /sys/fs/cgroup
mount -t cgroup2 none /sys/fs/cgroup
# As systemd has it, so that containers see what is mounted later.
mount --make-rshared /
echo ready
exec sleep 3600
"#;

/// Settings that fail on a machine without CAP_SYS_RESOURCE and with controllers in the old hierarchies.
const RUNC: &str = r#"#!/usr/bin/python3
import json, os, sys
RUNC = "@RUNC@"
if "create" in sys.argv:
    path = sys.argv[sys.argv.index("--bundle") + 1] + "/config.json"
    with open(path) as file:
        spec = json.load(file)
    spec["linux"]["resources"] = {"devices": spec["linux"].get("resources", {}).get("devices", [])}
    spec["process"].pop("oomScoreAdj", None)
    for names in spec["process"].get("capabilities", {}).values():
        names[:] = [name for name in names if name != "CAP_SYS_RESOURCE"]
    with open(path, "w") as file:
        json.dump(spec, file)
os.execv(RUNC, [RUNC] + sys.argv[1:])
"#;

const CONTAINERD: &str = r#"
version = 2
root = "@SCRATCH@/root"
state = "/run/containerd"
disabled_plugins = ["io.containerd.internal.v1.opt"]
[grpc]
  address = "@SCRATCH@/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "@IMAGE@"
  restrict_oom_score_adj = true
  disable_apparmor = true
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "@SNAPSHOTTER@"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
        BinaryName = "@SCRATCH@/runc"
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "@SCRATCH@/cni/bin"
    conf_dir = "@SCRATCH@/cni/net.d"
"#;

/// How pods are connected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PodNetwork {
    /// By a bridge.
    Bridged,
    /// Each by a link to the node, which forwards between pods, so that its rules for services apply. Pods have IPv6 too.
    Routed,
}

impl PodNetwork {
    /// The name of its configuration file.
    pub fn file(self) -> &'static str {
        match self {
            Self::Bridged => "10-bridged.conflist",
            Self::Routed => "10-routed.conflist",
        }
    }

    fn plugin(self) -> Value {
        let ipam = |ranges: &[&str], routes: &[&str]| {
            let ranges: Vec<_> = ranges.iter().map(|range| json!([{ "subnet": range }])).collect();
            let routes: Vec<_> = routes.iter().map(|route| json!({ "dst": route })).collect();
            json!({ "type": "host-local", "ranges": ranges, "routes": routes })
        };
        match self {
            Self::Bridged => json!({
                "type": "bridge", "bridge": "cni0", "isGateway": true, "ipam": ipam(&[PODS], &["0.0.0.0/0"]),
            }),
            Self::Routed => {
                json!({ "type": "ptp", "ipam": ipam(&[PODS, PODS_V6], &["0.0.0.0/0", "::/0"]) })
            }
        }
    }
}

/// A node with containerd. Dropping it kills everything on it.
#[derive(Debug)]
pub struct CriNode {
    sandbox: Arc<Sandbox>,
    network: PodNetwork,
    scratch: TempDir,
    first: Child,
    containerd: Option<Child>,
}

impl CriNode {
    /// Starts a node that shares this bpffs, with containerd, the images and a network.
    pub fn new(bpffs: &Path, network: PodNetwork) -> Result<Self> {
        let parts = env::var_os(VARIABLE).map(PathBuf::from);
        let parts = parts.with_context(|| format!("{VARIABLE} is not set: run `cargo xtask cri`"))?;
        let sandbox = Arc::new(Sandbox::new("cri-node")?);
        let scratch = name::scratch("cri")?;
        let mut unshare = sandbox.command("unshare")?;
        unshare.args(["--mount", "--cgroup", "sh", "-c", SET_UP, "sh"]).arg(bpffs).arg(scratch.path());
        let mut first =
            unshare.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().context("starting a node")?;
        let mut said = String::new();
        BufReader::new(first.stdout.take().context("piped")?).read_line(&mut said)?;
        let mut node = Self { sandbox, network, scratch, first, containerd: None };
        if said != "ready\n" {
            bail!("making the node's mounts failed: see above");
        }
        node.write_files(&parts)?;
        node.start_containerd(&parts)?;
        Ok(node)
    }

    fn write_files(&self, parts: &Path) -> Result<()> {
        let scratch = self.scratch.path();
        let fill = |text: &str| {
            text.replace("@SCRATCH@", &scratch.display().to_string())
                .replace("@IMAGE@", IMAGE)
                .replace("@SNAPSHOTTER@", SNAPSHOTTER)
                .replace("@RUNC@", &parts.join("usr/sbin/runc").display().to_string())
        };
        fs::write(scratch.join("containerd.toml"), fill(CONTAINERD))?;
        fs::write(scratch.join("runc"), fill(RUNC))?;
        fs::set_permissions(scratch.join("runc"), fs::Permissions::from_mode(0o755))?;
        for folder in [self.cni_bin(), self.cni_conf(), self.logs()] {
            fs::create_dir_all(folder)?;
        }
        for plugin in ["bridge", "host-local", "loopback", "ptp"] {
            symlink(parts.join("usr/lib/cni").join(plugin), self.cni_bin().join(plugin))?;
        }
        let list = json!({ "cniVersion": "1.0.0", "name": "pods", "plugins": [self.network.plugin()] });
        Ok(fs::write(self.cni_conf().join(self.network.file()), list.to_string())?)
    }

    fn start_containerd(&mut self, parts: &Path) -> Result<()> {
        let bin = parts.join("usr/bin");
        let log = fs::File::create(self.scratch.path().join("containerd.log"))?;
        let mut containerd = self.command(bin.join("containerd"))?;
        let paths = env::var_os("PATH").unwrap_or_default();
        let paths = std::iter::once(bin.clone()).chain(env::split_paths(&paths));
        containerd.arg("--config").arg(self.scratch.path().join("containerd.toml"));
        containerd.env("PATH", env::join_paths(paths)?).stdin(Stdio::null()).stderr(log);
        self.containerd = Some(containerd.spawn().context("starting containerd")?);
        let socket = self.socket();
        wait("containerd", || Ok(std::os::unix::net::UnixStream::connect(&socket).is_ok()))
            .with_context(|| self.log())?;
        let agent = env::var_os(AGENT_IMAGE).with_context(|| format!("{AGENT_IMAGE} is not set"))?;
        self.import(&image::make(self.scratch.path(), IMAGE)?)?;
        self.import(Path::new(&agent))
    }

    /// Imports the image of an archive into containerd.
    pub fn import(&self, archive: &Path) -> Result<()> {
        let parts = env::var_os(VARIABLE).map(PathBuf::from).unwrap_or_default();
        let mut import = self.command(parts.join("usr/bin/ctr"))?;
        import.arg("--address").arg(self.socket()).args(["--namespace", "k8s.io", "images", "import"]);
        import.args(["--snapshotter", SNAPSHOTTER]).arg(archive);
        succeed(import).map(drop).with_context(|| self.log())
    }

    /// A command that runs on the node.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Result<Command> {
        let mut command = self.sandbox.command("nsenter")?;
        command.args(self.entry()).arg(program);
        Ok(command)
    }

    /// The arguments with which `nsenter` enters the node's mount, network and cgroup namespaces.
    pub fn entry(&self) -> [String; 4] {
        let first = self.first.id();
        [
            format!("--net={}", self.sandbox.netns.path().display()),
            format!("--mount=/proc/{first}/ns/mnt"),
            format!("--cgroup=/proc/{first}/ns/cgroup"),
            "--".to_owned(),
        ]
    }

    /// Its network namespace and its cgroup.
    pub fn sandbox(&self) -> &Arc<Sandbox> {
        &self.sandbox
    }

    /// Creates the cgroup of a pod, as the kubelet does first. Returns its path for the runtime.
    pub fn make_pod_cgroup(&self, uid: &str) -> Result<String> {
        let path = format!("kubepods/besteffort/pod{uid}");
        fs::create_dir_all(self.sandbox.cgroup.path().join(&path))
            .with_context(|| format!("making {path}"))?;
        Ok(format!("/{path}"))
    }

    /// Removes the cgroup of a pod.
    pub fn remove_pod_cgroup(&self, uid: &str) -> Result<()> {
        let path = self.sandbox.cgroup.path().join("kubepods/besteffort").join(format!("pod{uid}"));
        fs::remove_dir(&path).with_context(|| format!("removing {}", path.display()))
    }

    /// containerd's socket.
    pub fn socket(&self) -> PathBuf {
        self.scratch.path().join("containerd.sock")
    }

    /// The path of a folder of the node for a pod. The machine's own folders of CNI files are not used.
    pub(super) fn host_path(&self, path: &Path) -> PathBuf {
        match path.to_str() {
            Some("/etc/cni/net.d") => self.cni_conf(),
            Some("/opt/cni/bin") => self.cni_bin(),
            _ => path.to_owned(),
        }
    }

    /// The folder of CNI plugins.
    pub fn cni_bin(&self) -> PathBuf {
        self.scratch.path().join("cni/bin")
    }

    /// The folder of CNI configurations.
    pub fn cni_conf(&self) -> PathBuf {
        self.scratch.path().join("cni/net.d")
    }

    /// The CNI configuration of the pods' network.
    pub fn cni_file(&self) -> PathBuf {
        self.cni_conf().join(self.network.file())
    }

    /// The scratch folder of this node.
    pub fn scratch(&self) -> &Path {
        self.scratch.path()
    }

    /// The folder of the containers' logs.
    pub fn logs(&self) -> PathBuf {
        self.scratch.path().join("logs")
    }

    /// The end of containerd's log.
    pub fn log(&self) -> String {
        let text = fs::read_to_string(self.scratch.path().join("containerd.log")).unwrap_or_default();
        let lines: Vec<_> = text.lines().collect();
        lines[lines.len().saturating_sub(20)..].join("\n")
    }
}

impl Drop for CriNode {
    fn drop(&mut self) {
        // Shims and containers are killed with the cgroup. These children have to be waited for.
        for child in self.containerd.iter_mut().chain([&mut self.first]) {
            drop(child.kill());
            drop(child.wait());
        }
    }
}
