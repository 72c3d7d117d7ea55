//! The application: objects as their author writes them, and what Istio's injector makes of their pods.

use serde_json::{Value, json};

use super::{image, proxy};

/// Where the application is.
pub const NAMESPACE: &str = "shop";
/// The address of the service of the backend, whose pods have sidecars.
pub const SERVICE: &str = "10.96.0.80";
/// The address of a service whose pod has none.
const PLAIN_SERVICE: &str = "10.96.0.81";
/// The address of the service of the pod in TPROXY mode.
const TRANSPARENT_SERVICE: &str = "10.96.0.82";
/// The addresses of the service of the dual-stack pod.
pub(super) const DUAL_STACK_SERVICES: [&str; 2] = ["10.96.0.83", "fd00:10:96::83"];
/// The container that dials the IPv6 one.
pub(super) const OVER_IPV6: &str = "six";
/// The container that dials the pod in TPROXY mode.
pub(super) const OTHER: &str = "other";
/// The container that asks to be exempt.
pub(super) const EXEMPT: &str = "free";
/// Where servers listen.
pub(super) const PORT: u16 = 8080;

/// Dials a service for as long as it runs (wget's own timeout crashes Debian's static busybox): says which requests were answered and which were not. Each has a path of its
/// own, which starts with the pod's name.
const CLIENT: &str = r#"
$WAIT
n=0
while [ $n -lt $COUNT ]; do
    n=$((n + 1))
    path=/$HOSTNAME/$NAME/$n
    if timeout 5 wget -q -O /dev/null "http://$SERVICE$path"; then echo "answered $path"; else echo "failed $path"; fi
    sleep $PAUSE
done
$END
"#;
/// As applications wait that start beside their proxy.
const PROXY_IS_READY: &str =
    "until timeout 1 wget -q -O /dev/null http://127.0.0.1:15021/; do sleep 0.1; done";
/// As Jobs end their proxy.
const END_PROXY: &str = "wget -q -O /dev/null --post-data= http://127.0.0.1:15000/quitquitquit";

/// What the injector makes of a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Template {
    /// A sidecar, started beside the others.
    Sidecar,
    /// A sidecar that the others wait for.
    SidecarFirst,
    /// A sidecar in TPROXY mode.
    Transparent,
    /// A sidecar that also listens on IPv6.
    DualStack,
    /// A gateway: its one container is the proxy.
    Gateway,
}

/// The pods of the application, by the label `app`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum App {
    /// A Deployment that answers, with a sidecar.
    Backend,
    /// A Deployment that answers, with a sidecar in TPROXY mode.
    Transparent,
    /// A Deployment that answers on IPv4 and IPv6, with a sidecar that does too.
    DualStack,
    /// A Deployment that dials it by both, with such a sidecar.
    DualStackClient,
    /// A Deployment that dials the first two, with a sidecar.
    Frontend,
    /// A Deployment that dials it from the first moment; its sidecar is started first.
    Held,
    /// A Deployment that dials it from two containers, of which one asks to be exempt; with a sidecar.
    Exempt,
    /// A Job that dials it, with a sidecar.
    Job,
    /// A Deployment that passes requests on to it.
    Gateway,
    /// A Deployment without a sidecar, which dials another.
    Plain,
    /// That other, without a sidecar too.
    PlainServer,
}

/// Pods that are captured as long as they run.
pub const CAPTURED: [App; 7] = [
    App::Backend,
    App::Transparent,
    App::DualStack,
    App::DualStackClient,
    App::Frontend,
    App::Held,
    App::Exempt,
];
/// Pods with a sidecar that dial the backend.
pub const CLIENTS: [App; 3] = [App::Frontend, App::Held, App::Exempt];

impl App {
    /// The value of the label.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Backend => "backend",
            Self::Transparent => "transparent",
            Self::DualStack => "dual-stack",
            Self::DualStackClient => "dual-client",
            Self::Frontend => "frontend",
            Self::Held => "held",
            Self::Exempt => "exempt",
            Self::Job => "job",
            Self::Gateway => "gateway",
            Self::Plain => "plain",
            Self::PlainServer => "plain-server",
        }
    }
}

/// What answers.
pub fn servers() -> Value {
    list(&json!([
        { "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": NAMESPACE } },
        service(App::Backend, SERVICE),
        service(App::PlainServer, PLAIN_SERVICE),
        service(App::Transparent, TRANSPARENT_SERVICE),
        deployment(App::Backend, injected(&server(), Template::Sidecar)),
        dual_stack_service(),
        deployment(App::Transparent, injected(&server(), Template::Transparent)),
        deployment(App::DualStack, injected(&server(), Template::DualStack)),
        deployment(App::PlainServer, pod(&server())),
        deployment(App::Gateway, injected(&json!([]), Template::Gateway)),
    ]))
}

/// What dials them.
pub fn clients() -> Value {
    let client = |service: &str, wait: &str| endless_client("app", service, wait);
    list(&json!([
        deployment(App::Frontend, injected(&frontend(), Template::Sidecar)),
        deployment(App::DualStackClient, injected(&dual_stack_client(), Template::DualStack)),
        deployment(App::Held, injected(&client(SERVICE, ""), Template::SidecarFirst)),
        deployment(App::Exempt, exempt()),
        deployment(App::Plain, pod(&client(PLAIN_SERVICE, ""))),
        job(&json!([self::client("app", SERVICE, PROXY_IS_READY, 20, "0.1", END_PROXY)])),
    ]))
}

fn list(items: &Value) -> Value {
    json!({ "apiVersion": "v1", "kind": "List", "items": items })
}

/// One container for each service.
fn frontend() -> Value {
    let dials = |(name, service)| endless_client(name, service, PROXY_IS_READY)[0].clone();
    json!([("app", SERVICE), (OTHER, TRANSPARENT_SERVICE)].map(dials))
}

/// One container for each family.
fn dual_stack_client() -> Value {
    let [v4, v6] = DUAL_STACK_SERVICES;
    let dials = |name, service: &str| endless_client(name, service, PROXY_IS_READY)[0].clone();
    json!([dials("app", v4), dials(OVER_IPV6, &format!("[{v6}]"))])
}

/// A pod of which one container asks to be left alone.
fn exempt() -> Value {
    let named = |name: &str| endless_client(name, SERVICE, PROXY_IS_READY)[0].clone();
    let mut pod = injected(&json!([named("app"), named(EXEMPT)]), Template::Sidecar);
    pod["metadata"]["annotations"]["intercept/exempt-containers"] = json!(EXEMPT);
    pod
}

fn endless_client(name: &str, service: &str, wait: &str) -> Value {
    json!([client(name, service, wait, 1_000_000, "0.2", "")])
}

fn client(name: &str, service: &str, wait: &str, count: u32, pause: &str, end: &str) -> Value {
    let script = CLIENT
        .replace("$NAME", name)
        .replace("$WAIT", wait)
        .replace("$SERVICE", service)
        .replace("$COUNT", &count.to_string())
        .replace("$PAUSE", pause)
        .replace("$END", end);
    json!({ "name": name, "image": image::APP, "command": ["/bin/sh", "-c", script] })
}

fn server() -> Value {
    json!([{
        "name": "app", "image": image::APP,
        "command": ["/usr/local/bin/http", "log", format!("0.0.0.0:{PORT}"), format!("[::]:{PORT}")],
        // Istio would have its own agent answer; unchanged, the kubelet's probes pass the proxy.
        "readinessProbe": { "httpGet": { "path": "/probe", "port": PORT }, "periodSeconds": 1 },
    }])
}

fn service(app: App, address: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": { "name": app.as_str(), "namespace": NAMESPACE },
        "spec": {
            "clusterIP": address,
            "selector": { "app": app.as_str() },
            "ports": [{ "port": 80, "targetPort": PORT }],
        },
    })
}

fn dual_stack_service() -> Value {
    let mut service = service(App::DualStack, DUAL_STACK_SERVICES[0]);
    service["spec"]["clusterIPs"] = json!(DUAL_STACK_SERVICES);
    service["spec"]["ipFamilyPolicy"] = json!("RequireDualStack");
    service
}

fn deployment(app: App, mut template: Value) -> Value {
    template["metadata"]["labels"] = json!({ "app": app.as_str() });
    json!({
        "apiVersion": "apps/v1", "kind": "Deployment",
        "metadata": { "name": app.as_str(), "namespace": NAMESPACE },
        "spec": { "selector": { "matchLabels": { "app": app.as_str() } }, "template": template },
    })
}

fn job(containers: &Value) -> Value {
    let mut template = injected(containers, Template::Sidecar);
    template["metadata"]["labels"] = json!({ "app": App::Job.as_str() });
    template["spec"]["restartPolicy"] = json!("Never");
    json!({
        "apiVersion": "batch/v1", "kind": "Job",
        "metadata": { "name": App::Job.as_str(), "namespace": NAMESPACE },
        "spec": { "backoffLimit": 0, "template": template },
    })
}

fn pod(containers: &Value) -> Value {
    json!({ "metadata": {}, "spec": {
        "containers": containers,
        // The client's shell does not wait to be killed.
        "terminationGracePeriodSeconds": 1,
    } })
}

/// As the webhook of Istio with `pilot.cni.enabled` leaves a pod.
fn injected(containers: &Value, template: Template) -> Value {
    let mut injected = pod(containers);
    let mut proxy = proxy_container(template);
    let mut containers = containers.as_array().cloned().unwrap_or_default();
    let mut annotations = json!({ "istio.io/rev": "default", "prometheus.io/scrape": "true" });
    let status = |init: Value| {
        json!({ "initContainers": init, "containers": ["istio-proxy"], "revision": "default" }).to_string()
    };
    if template == Template::Gateway {
        annotations["inject.istio.io/templates"] = json!("gateway");
        annotations["sidecar.istio.io/status"] = json!(status(Value::Null));
    } else {
        annotations["sidecar.istio.io/interceptionMode"] = json!(template.mode());
        annotations["sidecar.istio.io/status"] = json!(status(json!(["istio-validation"])));
        for (name, value) in [
            ("includeOutboundIPRanges", "*"),
            ("excludeOutboundIPRanges", ""),
            ("includeInboundPorts", "*"),
            ("excludeInboundPorts", "15020,15021,15090"),
        ] {
            annotations[format!("traffic.sidecar.istio.io/{name}")] = json!(value);
        }
        injected["spec"]["initContainers"] = json!([validation(template)]);
    }
    if template == Template::SidecarFirst {
        proxy["lifecycle"] = json!({ "postStart": { "exec": { "command": ["pilot-agent", "wait"] } } });
        containers.insert(0, proxy);
    } else {
        containers.push(proxy);
    }
    injected["metadata"]["annotations"] = annotations;
    injected["spec"]["containers"] = json!(containers);
    injected
}

impl Template {
    fn mode(self) -> &'static str {
        if self == Self::Transparent { "TPROXY" } else { "REDIRECT" }
    }
}

/// As whom the proxy runs.
fn security_of_proxy(template: Template) -> Value {
    let mut security = security();
    if template == Template::Transparent {
        security["capabilities"]["add"] = json!(["NET_ADMIN"]);
        security["runAsNonRoot"] = json!(false);
        security["runAsUser"] = json!(0);
    }
    security
}

/// As whom its probe runs.
fn security() -> Value {
    json!({
        "allowPrivilegeEscalation": false, "capabilities": { "drop": ["ALL"] }, "privileged": false,
        "readOnlyRootFilesystem": true, "runAsGroup": 1337, "runAsNonRoot": true, "runAsUser": 1337,
    })
}

fn validation(template: Template) -> Value {
    json!({
        "name": "istio-validation", "image": image::PROXY,
        "args": [
            "istio-iptables", "-p", "15001", "-z", "15006", "-u", "1337", "-m", template.mode(), "-i", "*", "-x", "",
            "-b", "*", "-d", "15090,15021,15020", "--log_output_level=default:info", "--run-validation",
            "--skip-rule-apply",
        ],
        "securityContext": security(),
    })
}

fn proxy_container(template: Template) -> Value {
    let kind = if template == Template::Gateway { "router" } else { "sidecar" };
    let mut environment = vec![json!({ "name": "ISTIO_META_INTERCEPTION_MODE", "value": template.mode() })];
    if template == Template::DualStack {
        environment.push(json!({ "name": "ISTIO_DUAL_STACK", "value": "true" }));
    }
    json!({
        "name": "istio-proxy", "image": image::PROXY,
        "args": ["proxy", kind, "--domain", "shop.svc.cluster.local", "--proxyLogLevel=warning"],
        "env": environment,
        "ports": [{ "containerPort": 15090, "protocol": "TCP", "name": "http-envoy-prom" }],
        "readinessProbe": {
            "httpGet": { "path": "/healthz/ready", "port": proxy::READY },
            "periodSeconds": 1, "timeoutSeconds": 3, "failureThreshold": 30,
        },
        "securityContext": security_of_proxy(template),
    })
}
