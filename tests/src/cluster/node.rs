//! The node: etcd, kube-apiserver and containerd as other tests have them, and beside them what makes pods of objects.

use std::{
    env,
    fs::{self, File},
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use serde::Deserialize as _;
use serde_json::{Deserializer, Value, json};

use super::{AccessLine, App, NAMESPACE, image};
use crate::{
    agent::succeed,
    cri::{CriClient, CriNode, PODS, PODS_V6, PodNetwork},
    kube::{KubeServer, ServerSpec},
};

/// The variable that says where helm is.
const HELM: &str = "INTERCEPT_HELM";
/// The node's name.
pub const NODE: &str = "node-1";
/// The node's address.
pub const ADDRESS: &str = "10.89.0.1";
/// The address of the API's service.
const API_SERVICE: &str = "10.96.0.1";
/// What two busy cores may take for a step.
const PATIENCE: Duration = Duration::from_secs(300);

/// Pods and services have addresses of both families, which is new in 1.20.
const DUAL_STACK: &str = "--feature-gates=IPv6DualStack=true";
/// The addresses of services.
const SERVICES: &str = "--service-cluster-ip-range=10.96.0.0/16,fd00:10:96::/112";

/// The API of a cluster: its pods reach it at the node's address.
const API: ServerSpec = ServerSpec {
    address: SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::new(10, 89, 0, 1)), 6443),
    arguments: &[
        "--advertise-address=10.89.0.1",
        "--allow-privileged=true",
        // Nothing here knows the node by its name.
        "--kubelet-preferred-address-types=InternalIP",
        DUAL_STACK,
        // The last one counts.
        SERVICES,
    ],
};

/// What kubelet writes to by name becomes the node's own. It sets the machine's settings to these values: here it finds
/// them as they should be, and sets none.
const SET_UP: &str = r#"
set -e
settings=$1/settings
ip address add "$2/32" dev lo
# To the addresses of services, which kube-proxy's rules replace.
ip route add 10.96.0.0/16 dev lo src "$2"
mount -t tmpfs none /var/log
# What was sent while the way to the API was cut is sent again within a second after that. Linux before 6.15 does not have this.
again=/proc/sys/net/ipv4/tcp_rto_max_ms
if [ -e $again ]; then echo 1000 >$again; fi
# Not on a tmpfs, on which the agent does not believe the names of containers.
mkdir -p "$settings" "$1/kubelet" /var/lib/kubelet
mount --bind "$1/kubelet" /var/lib/kubelet
for setting in vm/overcommit_memory=1 vm/panic_on_oom=0 kernel/panic=10 kernel/panic_on_oops=1 \
    kernel/keys/root_maxkeys=1000000 kernel/keys/root_maxbytes=25000000; do
    file=$settings/$(echo "${setting%=*}" | tr / .)
    echo "${setting#*=}" >"$file"
    mount --bind "$file" "/proc/sys/${setting%=*}"
done
"#;

/// A running cluster. Dropping it ends everything on the node.
#[derive(Debug)]
pub struct Cluster {
    /// The first to end.
    programs: Vec<Component>,
    server: KubeServer,
    node: CriNode,
}

/// A running program of Kubernetes, killed when dropped.
#[derive(Debug)]
struct Component {
    name: &'static str,
    child: Child,
}

impl Drop for Component {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

impl Cluster {
    /// A cluster whose node has this bpffs; returns when the node is ready for pods.
    pub fn start(bpffs: &Path) -> Result<Self> {
        let node = CriNode::new(bpffs, PodNetwork::Routed)?;
        let mut set_up = node.command("sh")?;
        set_up.args(["-c", SET_UP, "sh"]).arg(node.scratch()).arg(ADDRESS);
        succeed(set_up).context("making the node's settings")?;
        for archive in image::make(node.scratch())? {
            node.import(&archive)?;
        }
        let server = KubeServer::start_on(Arc::clone(node.sandbox()), API)?;
        let mut cluster = Self { programs: Vec::new(), server, node };
        fs::write(cluster.file("admin.json"), cluster.server.kubeconfig().to_string())?;
        fs::write(cluster.file("kubelet.json"), kubelet().to_string())?;
        cluster.start_programs()?;
        cluster.wait("the node is ready", |cluster| {
            let nodes = cluster.list("nodes", "")?;
            let conditions = nodes.iter().flat_map(|node| node["status"]["conditions"].as_array()).flatten();
            Ok(conditions.into_iter().any(|one| one["type"] == "Ready" && one["status"] == "True"))
        })?;
        Ok(cluster)
    }

    fn start_programs(&mut self) -> Result<()> {
        let kubeconfig = format!("--kubeconfig={}", self.file("admin.json").display());
        let certificates = format!("--cert-dir={}", self.file("tls").display());
        let alone = ["--leader-elect=false", "--bind-address=127.0.0.1", "--port=0"];
        let file = |flag: &str, path: &Path| format!("--{flag}={}", path.display());
        let arguments: [(&'static str, Vec<String>); 4] = [
            (
                "kube-controller-manager",
                vec![
                    file("root-ca-file", &self.server.authority()),
                    file("service-account-private-key-file", &self.server.accounts_key()),
                    certificates.clone(),
                    DUAL_STACK.to_owned(),
                ],
            ),
            ("kube-scheduler", vec![certificates]),
            (
                "kube-proxy",
                vec![
                    "--proxy-mode=iptables".to_owned(),
                    DUAL_STACK.to_owned(),
                    format!("--cluster-cidr={PODS},{PODS_V6}"),
                    format!("--hostname-override={NODE}"),
                    // These settings are the machine's.
                    "--conntrack-max-per-core=0".to_owned(),
                    "--conntrack-min=0".to_owned(),
                    "--conntrack-tcp-timeout-established=0s".to_owned(),
                    "--conntrack-tcp-timeout-close-wait=0s".to_owned(),
                ],
            ),
            (
                "kubelet",
                vec![
                    file("config", &self.file("kubelet.json")),
                    "--container-runtime=remote".to_owned(),
                    format!("--container-runtime-endpoint=unix://{}", self.node.socket().display()),
                    format!("--hostname-override={NODE}"),
                    format!("--node-ip={ADDRESS}"),
                    "--root-dir=/var/lib/kubelet".to_owned(),
                    "--cert-dir=/var/lib/kubelet/pki".to_owned(),
                ],
            ),
        ];
        for (name, arguments) in arguments {
            let log = File::create(self.log_file(name))?;
            let mut command = self.command(name)?;
            command.arg(&kubeconfig).args(arguments);
            if ["kube-controller-manager", "kube-scheduler"].contains(&name) {
                command.args(alone);
            }
            command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
            let child = command.spawn().with_context(|| format!("starting {name}"))?;
            self.programs.push(Component { name, child });
        }
        Ok(())
    }

    /// The API, which a test may stop and resume.
    pub fn server(&self) -> &KubeServer {
        &self.server
    }

    /// The node.
    pub fn node(&self) -> &CriNode {
        &self.node
    }

    fn file(&self, name: &str) -> PathBuf {
        self.node.scratch().join(name)
    }

    fn log_file(&self, program: &str) -> PathBuf {
        self.file(&format!("{program}.log"))
    }

    /// One of Kubernetes' programs, on the node.
    fn command(&self, program: &str) -> Result<Command> {
        let mut command = self.node.command(self.server.parts().join(program))?;
        command.env("HOME", self.node.scratch());
        Ok(command)
    }

    /// Runs kubectl to its end.
    pub fn kubectl(&self, arguments: &[&str]) -> Result<String> {
        let mut kubectl = self.command("kubectl")?;
        kubectl.arg("--kubeconfig").arg(self.file("admin.json")).args(arguments);
        succeed(kubectl)
    }

    /// The ids of the containers with this name, of all pods of a namespace.
    pub fn containers(&self, namespace: &str, name: &str) -> Result<Vec<String>> {
        let pods = self.list("pods", namespace)?;
        let statuses = pods.iter().flat_map(|pod| pod["status"]["containerStatuses"].as_array()).flatten();
        let own = statuses.filter(|status| status["name"] == name);
        let ids = own.filter_map(|status| status["containerID"].as_str()?.strip_prefix("containerd://"));
        Ok(ids.map(str::to_owned).collect())
    }

    /// Kills containers.
    pub fn kill(&self, containers: &[String]) -> Result<()> {
        let runtime = CriClient::connect(&self.node.socket())?;
        containers.iter().try_for_each(|id| runtime.kill(id))
    }

    /// Has the API know objects.
    pub fn apply(&self, objects: &Value) -> Result<()> {
        let file = self.file("objects.json");
        fs::write(&file, objects.to_string())?;
        self.kubectl(&["apply", "-f", &file.display().to_string()]).map(drop)
    }

    /// Runs helm to its end.
    pub fn helm(&self, arguments: &[&str]) -> Result<String> {
        let helm =
            env::var_os(HELM).with_context(|| format!("{HELM} is not set: run `cargo xtask cluster`"))?;
        let mut command = self.node.command(helm)?;
        command.env("HOME", self.node.scratch());
        command.arg("--kubeconfig").arg(self.file("admin.json")).args(arguments);
        succeed(command)
    }

    /// Runs a script with kubectl and helm, in a folder with a copy of the chart. Returns its output.
    pub fn shell(&self, script: &str) -> Result<String> {
        self.chart()?;
        let helm = env::var_os(HELM).with_context(|| format!("{HELM} is not set"))?;
        let helm = Path::new(&helm).parent().context("helm is in no folder")?.to_owned();
        let paths = env::var_os("PATH").unwrap_or_default();
        let paths = [helm, self.server.parts().to_owned()].into_iter().chain(env::split_paths(&paths));
        let mut shell = self.node.command("sh")?;
        shell.env("PATH", env::join_paths(paths)?).env("KUBECONFIG", self.file("admin.json"));
        shell.env("HOME", self.node.scratch());
        // Entering the node's mounts loses the folder.
        shell.args(["-c", "cd \"$0\" && eval \"$1\""]).arg(self.node.scratch()).arg(script);
        succeed(shell)
    }

    /// Writes a file into that folder.
    pub fn write(&self, name: &str, text: &str) -> Result<()> {
        let path = self.file(name);
        fs::create_dir_all(path.parent().context("a file in no folder")?)?;
        Ok(fs::write(path, text)?)
    }

    /// The chart, which is content with a Kubernetes of 1.20 here.
    pub fn chart(&self) -> Result<String> {
        let folder = self.file("deploy/chart");
        if !folder.is_dir() {
            fs::create_dir_all(self.file("deploy"))?;
            let mut copy = Command::new("cp");
            copy.arg("-r").arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/chart")).arg(&folder);
            succeed(copy)?;
            let file = folder.join("Chart.yaml");
            let text = fs::read_to_string(&file)?;
            let lines = text.lines().filter(|line| !line.starts_with("kubeVersion:"));
            fs::write(&file, lines.map(|line| format!("{line}\n")).collect::<String>())?;
        }
        Ok(folder.display().to_string())
    }

    /// Cuts what goes through the service of the API off, as the agent does. The kubelet takes another way.
    pub fn cut_agent_off(&self) -> Result<()> {
        self.cut("-I")
    }

    /// Undoes it. Nothing is lost: what was sent meanwhile is sent again.
    pub fn reconnect_agent(&self) -> Result<()> {
        self.cut("-D")
    }

    fn cut(&self, change: &str) -> Result<()> {
        let mut iptables = self.node.command("iptables")?;
        iptables.args([change, "OUTPUT", "-m", "conntrack", "--ctorigdst", API_SERVICE, "-j", "DROP"]);
        succeed(iptables).map(drop)
    }

    /// Objects of a kind, in a namespace or in none.
    pub fn list(&self, kind: &str, namespace: &str) -> Result<Vec<Value>> {
        let mut arguments = vec!["get", kind, "-o", "json"];
        if !namespace.is_empty() {
            arguments.extend(["-n", namespace]);
        }
        let mut list: Value = serde_json::from_str(&self.kubectl(&arguments)?)?;
        Ok(list["items"].as_array_mut().map(std::mem::take).unwrap_or_default())
    }

    /// The one pod of the application with this label that is not on its way out.
    pub fn pod(&self, app: App) -> Result<Value> {
        let mut pods = self.list("pods", NAMESPACE)?;
        pods.retain(|pod| {
            pod["metadata"]["labels"]["app"] == app.as_str() && pod["metadata"]["deletionTimestamp"].is_null()
        });
        match pods.as_slice() {
            [pod] => Ok(pod.clone()),
            pods => bail!("{} pods of {}", pods.len(), app.as_str()),
        }
    }

    /// What a container of a pod of the application has printed.
    pub fn printed(&self, pod: &Value, container: &str) -> Result<String> {
        let name = pod["metadata"]["name"].as_str().context("a pod without a name")?;
        self.kubectl(&["logs", "-n", NAMESPACE, name, "-c", container])
    }

    /// The access log of a pod's proxy.
    pub fn logged(&self, pod: &Value) -> Result<Vec<AccessLine>> {
        let text = self.printed(pod, "istio-proxy")?;
        // Whatever else Envoy says is no JSON.
        let lines = text.lines().filter(|line| line.starts_with('{'));
        lines.map(|line| Ok(AccessLine::deserialize(&mut Deserializer::from_str(line))?)).collect()
    }

    /// What a server answers a request that the node makes.
    pub fn get(&self, to: SocketAddr, path: &str) -> Result<String> {
        let mut stream = self.node.sandbox().netns.run(|| TcpStream::connect(to))??;
        write!(stream, "GET {path} HTTP/1.1\r\nhost: {to}\r\nconnection: close\r\n\r\n")?;
        let mut answer = String::new();
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    }

    /// Waits until something is so; an error is one more "not yet".
    pub fn wait(&self, what: &str, so: impl Fn(&Self) -> Result<bool>) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let now = so(self);
            if matches!(now, Ok(true)) {
                return Ok(());
            }
            if Instant::now() > deadline {
                now.with_context(|| format!("waited in vain: {what}\n{}", self.logs()))?;
                bail!("waited in vain: {what}\n{}", self.logs());
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// Fails if one of the programs has ended.
    pub fn check(&mut self) -> Result<()> {
        for program in &mut self.programs {
            let ended = program.child.try_wait()?;
            ensure!(ended.is_none(), "{} has ended", program.name);
        }
        Ok(())
    }

    /// The ends of what all programs have logged.
    pub fn logs(&self) -> String {
        let mut all =
            format!("== kube-apiserver\n{}\n== containerd\n{}\n", self.server.log(), self.node.log());
        for program in &self.programs {
            let text = fs::read_to_string(self.log_file(program.name)).unwrap_or_default();
            let lines: Vec<_> = text.lines().collect();
            let end = lines[lines.len().saturating_sub(20)..].join("\n");
            all += &format!("== {}\n{end}\n", program.name);
        }
        let pods = ["get", "pods,events", "-A", "-o", "wide"];
        all + "== objects\n" + &self.kubectl(&pods).unwrap_or_else(|error| format!("{error:#}"))
    }
}

fn kubelet() -> Value {
    json!({
        "apiVersion": "kubelet.config.k8s.io/v1beta1", "kind": "KubeletConfiguration",
        // Only what is in the node's namespace asks it.
        "authentication": { "anonymous": { "enabled": true }, "webhook": { "enabled": false } },
        "authorization": { "mode": "AlwaysAllow" },
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": "/",
        "failSwapOn": false,
        "protectKernelDefaults": true,
        "makeIPTablesUtilChains": false,
        // The machine's disk is not this node's alone.
        "evictionHard": { "nodefs.available": "1Mi" },
        "imageGCHighThresholdPercent": 100,
        "volumePluginDir": "/var/lib/kubelet/plugins",
        "featureGates": { "IPv6DualStack": true },
    })
}
