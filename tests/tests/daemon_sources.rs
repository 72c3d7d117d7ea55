//! Pods that both the API and the CNI plugin announce. The result does not depend on the order.

use std::{
    fs,
    net::{IpAddr, SocketAddr},
    process::Command,
    thread,
};

use intercept_agent::facade::daemon::PodState;
use intercept_common::Family;
use serde_json::{Value, json};
use tests::{
    actor::{Actor, Bind, Dial, DialOutcome, Listen, Transport},
    agent::Agent,
    api::{ApiNode, pod},
    daemon::{answers, proxy, service},
    plugin::{CniSandbox, RuntimePlugin},
    testbed::{Ids, Pod, PodSpec},
};

const MODE: &str = "sidecar.istio.io/interceptionMode";
const EXCLUDED: &str = "traffic.sidecar.istio.io/excludeOutboundPorts";

const PATIENT: [&str; 2] = ["--api-wait", "10"];

/// A pod on the node: its object, cgroup and namespace.
struct SourcePod<'a> {
    node: &'a ApiNode<'a>,
    object: Value,
    uid: String,
    actor: Actor,
    sandbox: Pod,
    /// The first address from the earlier plugins of the chain.
    first_address: &'static str,
}

impl<'a> SourcePod<'a> {
    fn new(node: &'a ApiNode<'a>, kind: &PodKind, uid: String) -> Self {
        let sandbox = Pod::new(PodSpec::new("source")).expect("a pod");
        let actor = proxy(&sandbox);
        let cgroup = node.kubelet.path().join(format!("kubepods/burstable/pod{uid}"));
        fs::create_dir_all(&cgroup).expect("made");
        for pid in sandbox.cgroup.processes().expect("listed") {
            fs::write(cgroup.join("cgroup.procs"), pid.to_string()).expect("moved");
        }
        let mut object = kind.object.clone();
        object["metadata"]["uid"] = json!(uid);
        object["metadata"]["name"] = json!(uid);
        Self { node, object, uid, actor, sandbox, first_address: "10.66.0.2/24" }
    }

    /// Calls the plugin as a runtime does.
    fn call(&self, command: &str) -> Result<(), String> {
        let sandbox = CniSandbox {
            object: &self.object,
            uid: &self.uid,
            netns: self.sandbox.netns.path(),
            address: self.first_address,
        };
        RuntimePlugin::new(self.node.agent, &self.node.daemon).call(command, &sandbox).expect("called")
    }

    fn tell(&self, kind: &str) {
        self.node.api.event(kind, self.object.clone());
    }

    /// The arguments of the capture. `None` if there is none.
    fn arguments(&self) -> Option<String> {
        let name = format!("pod{}", self.uid);
        let pods = self.node.agent.pods().expect("status");
        let pod = pods.into_iter().find(|pod| pod.cgroup.ends_with(&name))?;
        Some(pod.arguments.join(" "))
    }

    /// Whether the kernel's state and a connection are as expected.
    fn is(&self, expected: &ExpectedState) -> bool {
        let proxied = answers(&self.actor, service()).as_deref() == Some("proxy");
        match (self.arguments(), expected) {
            (Some(arguments), ExpectedState::Captured(flags)) => {
                proxied && flags.iter().all(|flag| arguments.contains(flag))
            }
            (None, ExpectedState::Ignored(why)) => {
                let report = self.node.report(&self.uid);
                !proxied && report.is_some_and(|report| report.left_alone.as_deref() == Some(*why))
            }
            (None, ExpectedState::Refused(_)) => !proxied,
            _ => false,
        }
    }

    fn assert_is(&self, expected: &ExpectedState, what: &str) {
        assert!(
            self.is(expected),
            "{what}: {expected:?}, but it has {:?}, {:?}",
            self.arguments(),
            self.node.report(&self.uid)
        );
    }

    /// The answer to ADD is as expected, and so is the pod at that time.
    fn assert_added(&self, answer: &Result<(), String>, expected: &ExpectedState, what: &str) {
        match (answer, expected) {
            (Err(error), ExpectedState::Refused(text)) => assert!(error.contains(text), "{what}: {error}"),
            (Ok(()), ExpectedState::Captured(_) | ExpectedState::Ignored(_)) => {}
            _ => panic!("{what}: {answer:?}"),
        }
        self.assert_is(expected, what);
    }

    fn end(self, what: &str) {
        assert_eq!(self.call("DEL"), Ok(()), "{what}");
        assert_eq!(self.arguments(), None, "{what}");
        self.tell("DELETED");
        self.node.wait(what, || self.node.report(&self.uid).is_none());
    }
}

#[derive(Debug)]
enum ExpectedState {
    Captured(&'static [&'static str]),
    Ignored(&'static str),
    Refused(&'static str),
}

struct PodKind {
    what: &'static str,
    object: Value,
    by_api: ExpectedState,
    by_annotations: ExpectedState,
}

fn kinds() -> Vec<PodKind> {
    use ExpectedState::{Captured, Ignored, Refused};
    let proxy = json!({ "name": "istio-proxy", "args": ["proxy", "sidecar"] });
    let with = |proxy: &Value| json!({ "containers": [{ "name": "app" }, proxy] });
    let redirect = json!({ MODE: "REDIRECT" });
    let kind = |what, spec: &Value, annotations: &Value, by_api, by_annotations| PodKind {
        what,
        object: pod("pod", "uid", spec, annotations),
        by_api,
        by_annotations,
    };
    let user = json!({ "name": "istio-proxy", "args": ["proxy", "sidecar"],
                       "securityContext": { "runAsUser": 1444, "runAsGroup": 1445 },
                       "env": [{ "name": "ISTIO_META_DNS_CAPTURE", "value": "true" }] });
    let router = json!({ "name": "istio-proxy", "args": ["proxy", "router"] });
    let grpc = json!({ "name": "istio-proxy", "env": [{ "name": "DISABLE_ENVOY", "value": "true" }] });
    let native = json!({ "name": "istio-proxy", "restartPolicy": "Always", "args": ["proxy", "sidecar"] });
    let native = json!({ "containers": [{ "name": "app" }], "initContainers": [native] });
    let with_init =
        json!({ "containers": [{ "name": "app" }, proxy], "initContainers": [{ "name": "istio-init" }] });
    let mut plain = kind(
        "no sidecar",
        &json!({ "containers": [{ "name": "app" }] }),
        &json!({}),
        Ignored("no_sidecar"),
        Ignored("no_sidecar"),
    );
    plain.object["metadata"]["annotations"] = json!({});
    let mut system = kind(
        "an excluded namespace",
        &with(&proxy),
        &redirect,
        Ignored("namespace_excluded"),
        Ignored("namespace_excluded"),
    );
    system.object["metadata"]["namespace"] = json!("kube-system");
    let mut labelled =
        kind("labelled no", &with(&proxy), &redirect, Ignored("inject_disabled"), Captured(&["-u 1337"]));
    labelled.object["metadata"]["labels"] = json!({ "sidecar.istio.io/inject": "false" });
    vec![
        kind("a sidecar", &with(&proxy), &redirect, Captured(&["-u 1337"]), Captured(&["-u 1337"])),
        kind("a native sidecar", &native, &redirect, Captured(&["-u 1337"]), Captured(&["-u 1337"])),
        kind(
            "a user of its own, and DNS",
            &with(&user),
            &redirect,
            Captured(&["-u 1444", "-g 1445", "--redirect-dns", "--capture-all-dns"]),
            Captured(&["-u 1337"]),
        ),
        kind("a gateway", &with(&router), &redirect, Ignored("gateway"), Captured(&["-u 1337"])),
        kind(
            "gRPC without a proxy",
            &with(&grpc),
            &redirect,
            Ignored("proxy_disabled"),
            Captured(&["-u 1337"]),
        ),
        kind("with istio-init", &with_init, &redirect, Ignored("captures_itself"), Captured(&["-u 1337"])),
        kind(
            "mode NONE",
            &with(&proxy),
            &json!({ MODE: "NONE" }),
            Ignored("mode_none"),
            Ignored("mode_none"),
        ),
        kind(
            "a wrong annotation",
            &with(&proxy),
            &json!({ MODE: "REDIRECT", EXCLUDED: "https" }),
            Refused(EXCLUDED),
            Refused(EXCLUDED),
        ),
        labelled,
        plain,
        system,
    ]
}

/// A UID for each pod.
fn uid(order: u32, kind: usize) -> String {
    format!("00000000-0000-4000-8000-{order:06}{kind:06}")
}

#[test]
fn the_api_decides_in_either_order() {
    let agent = Agent::new("d-sources").expect("the agent");
    let node = ApiNode::new(&agent, &PATIENT).expect("a node");
    for (at, kind) in kinds().iter().enumerate() {
        // The API first: the pod is captured as soon as it has a process, and ADD only adds the sandbox.
        let what = format!("{}, the API first", kind.what);
        let running = SourcePod::new(&node, kind, uid(1, at));
        running.tell("ADDED");
        node.wait(&what, || {
            node.report(&running.uid).is_some_and(|report| report.state != PodState::Pending)
        });
        running.assert_is(&kind.by_api, &what);
        running.assert_added(&running.call("ADD"), &kind.by_api, &what);
        running.end(&what);

        // The plugin first: it waits for the API, unless the object is known already.
        let what = format!("{}, the plugin first", kind.what);
        let running = SourcePod::new(&node, kind, uid(2, at));
        let answer = thread::scope(|scope| {
            let add = scope.spawn(|| running.call("ADD"));
            node.wait(&what, || node.report(&running.uid).is_some() || add.is_finished());
            running.tell("ADDED");
            add.join().expect("no panic")
        });
        running.assert_added(&answer, &kind.by_api, &what);
        running.tell("MODIFIED");
        running.end(&what);
    }
}

#[test]
fn annotations_decide_until_the_api_answers() {
    let agent = Agent::new("d-silent-api").expect("the agent");
    let node = ApiNode::new(&agent, &["--api-wait", "0.05"]).expect("a node");
    for (at, kind) in kinds().iter().enumerate() {
        let what = format!("{}, the API silent", kind.what);
        let running = SourcePod::new(&node, kind, uid(3, at));
        running.assert_added(&running.call("ADD"), &kind.by_annotations, &what);
        running.tell("ADDED");
        node.wait(&format!("{what}, then not"), || running.is(&kind.by_api));
        running.end(&what);
    }
}

#[test]
fn an_object_of_the_api_only_affects_its_own_pod() {
    let agent = Agent::new("d-identity").expect("the agent");
    let node = ApiNode::new(&agent, &PATIENT).expect("a node");
    let kind = &kinds()[0];
    let victim = SourcePod::new(&node, kind, uid(4, 0));
    victim.tell("ADDED");
    assert_eq!(victim.call("ADD"), Ok(()));
    let before = victim.arguments().expect("captured");

    // Any user who can create pods can create this one: the API does not check these annotations.
    let mut evil = pod("evil", &uid(4, 1), &kind.object["spec"], &json!({ EXCLUDED: "1:65535" }));
    evil["metadata"]["namespace"] = json!("evil");
    evil["metadata"]["annotations"]["kubernetes.io/config.mirror"] = json!(victim.uid);
    evil["metadata"]["ownerReferences"] =
        json!([{ "apiVersion": "v1", "kind": "Node", "name": "node-1", "uid": "n", "controller": true }]);
    node.api.event("ADDED", evil.clone());
    node.wait("the daemon has heard of it", || node.report(&uid(4, 1)).is_some());
    assert_eq!(victim.arguments().as_ref(), Some(&before));
    node.api.event("DELETED", evil.clone());
    node.wait("it is gone", || node.report(&uid(4, 1)).is_none());
    victim.assert_is(&kind.by_api, "the other object is gone");

    // A static pod, whose UID is the hash of its manifest for the kubelet and the runtime.
    let hash = "0123456789abcdef0123456789abcdef";
    let running = SourcePod::new(&node, kind, hash.to_owned());
    let mut mirror = running.object.clone();
    mirror["metadata"]["uid"] = json!(uid(4, 2));
    mirror["metadata"]["annotations"]["kubernetes.io/config.mirror"] = json!(hash);
    mirror["metadata"]["ownerReferences"] = evil["metadata"]["ownerReferences"].clone();
    evil["metadata"]["annotations"]["kubernetes.io/config.mirror"] = json!(hash);
    node.api.event("ADDED", evil.clone());
    node.wait("it has nothing to say", || node.report(hash).is_some_and(|r| r.state == PodState::Pending));
    node.api.event("ADDED", mirror.clone());
    assert_eq!(running.call("ADD"), Ok(()));
    running.assert_is(&kind.by_api, "a static pod");
    assert!(!running.arguments().is_some_and(|arguments| arguments.contains("65535")));
    node.api.event("DELETED", evil);
    mirror["metadata"]["annotations"][EXCLUDED] = json!("81");
    node.api.event("MODIFIED", mirror.clone());
    node.wait("its own object changes it", || running.arguments().is_some_and(|a| a.contains("-o 81")));
    assert_eq!(running.call("DEL"), Ok(()));
    assert_eq!(running.arguments(), None);
    victim.end("at last");
}

/// The kubelet makes the pod's cgroup and then waits for its volumes.
#[test]
fn a_pod_without_a_process_yet_has_no_event() {
    let agent = Agent::new("d-early").expect("the agent");
    let node = ApiNode::new(&agent, &PATIENT).expect("a node");
    let kind = &kinds()[0];
    let uid = uid(5, 0);
    let cgroup = node.kubelet.path().join(format!("kubepods/burstable/pod{uid}"));
    fs::create_dir_all(&cgroup).expect("made");
    let mut object = kind.object.clone();
    object["metadata"]["uid"] = json!(uid);
    object["status"]["phase"] = json!("Pending");
    node.api.event("ADDED", object.clone());
    node.wait("it is tried", || node.report(&uid).is_some_and(|report| report.failures > 2));
    let report = node.report(&uid).expect("known");
    assert_eq!((report.state, report.failure), (PodState::Pending, None));
    // The runtime's process enters the cgroup before it enters its namespace.
    let mut early = Command::new("sleep").arg("600").spawn().expect("started");
    fs::write(cgroup.join("cgroup.procs"), early.id().to_string()).expect("moved");
    let tried = report.failures;
    node.wait("it is tried again", || node.report(&uid).is_some_and(|report| report.failures > tried + 1));
    early.kill().and_then(|()| early.wait()).expect("killed");
    let running = SourcePod::new(&node, kind, uid.clone());
    node.wait("captured", || running.is(&kind.by_api));
    assert_eq!(node.api.shared().posted, Vec::<Value>::new());
    node.api.event("DELETED", object);
    node.wait("released", || running.arguments().is_none());
}

/// As in Istio, IPv6 is not captured for a proxy without IPv6 listeners, unless the pod is declared dual-stack.
#[test]
fn ipv6_is_captured_as_under_istio_or_always() {
    let sidecar = |env: &Value| {
        let proxy = json!({ "name": "istio-proxy", "args": ["proxy", "sidecar"], "env": env });
        let object = pod(
            "pod",
            "uid",
            &json!({ "containers": [{ "name": "app" }, proxy] }),
            &json!({ MODE: "REDIRECT" }),
        );
        PodKind {
            what: "IPv6",
            object,
            by_api: ExpectedState::Captured(&[]),
            by_annotations: ExpectedState::Captured(&[]),
        }
    };
    let dual = json!([{ "name": "ISTIO_DUAL_STACK", "value": "true" }]);
    // Whether the pod's first address is IPv6, and whether IPv6 is captured.
    for (at, (flags, env, first, captured)) in [
        (&PATIENT[..], json!([]), "10.66.0.2/24", false),
        (&PATIENT[..], dual, "10.66.0.2/24", true),
        (&PATIENT[..], json!([]), "fd66::2/64", true),
        (&["--api-wait", "10", "--ipv6", "always"], json!([]), "10.66.0.2/24", true),
    ]
    .into_iter()
    .enumerate()
    {
        let agent = Agent::new("d-ipv6").expect("the agent");
        let node = ApiNode::new(&agent, flags).expect("a node");
        let mut running = SourcePod::new(&node, &sidecar(&env), uid(6, at));
        running.first_address = first;
        running.tell("ADDED");
        assert_eq!(running.call("ADD"), Ok(()));
        let world = Actor::start(running.sandbox.neighbour()).expect("an actor");
        let listen = |actor: &Actor, name: &str, port| {
            let bind = Bind::new(Ids::APP, SocketAddr::new(IpAddr::from([0_u16; 8]), port));
            actor.listen(Listen { name: name.into(), transport: Transport::Tcp, bind }).expect("a server")
        };
        listen(&world, "the world", 80);
        listen(&running.actor, "app", 8080);
        let what = format!("{flags:?} {env} {first}");
        let dialled = |actor: &Actor, to: SocketAddr| match actor
            .dial(Dial::new(Ids::APP, to))
            .expect("dialled")
            .outcome
        {
            DialOutcome::Answered(answer) => Some(answer.server),
            _ => None,
        };
        let uncaptured = |name: &str| (!captured).then(|| name.to_owned());
        let outside = "[fd00:96::10]:80".parse().expect("an address");
        assert_eq!(dialled(&running.actor, outside), uncaptured("the world"), "{what}");
        let inside = SocketAddr::new(running.sandbox.address(Family::V6), 8080);
        assert_eq!(dialled(&world, inside), uncaptured("app"), "{what}");
        // IPv4 always is. Nothing listens on 15006.
        assert_eq!(dialled(&running.actor, service()).as_deref(), Some("proxy"), "{what}");
        assert_eq!(
            dialled(&world, SocketAddr::new(running.sandbox.address(Family::V4), 8080)),
            None,
            "{what}"
        );
        // The API reports the address later, which changes nothing.
        let address = first.split('/').next().expect("an address");
        running.object["status"]["podIPs"] = json!([{ "ip": address }]);
        running.tell("MODIFIED");
        assert_eq!(dialled(&running.actor, outside), uncaptured("the world"), "{what}");
        running.end(&what);
    }
}
