use std::collections::HashSet;

use serde_json::{Value, json};

use super::*;
use crate::daemon::{
    desired::{CaptureArgs, Key},
    kubernetes::{self, InheritingPod},
    mode,
    sidecar::{self, Selection},
};

/// Beside the fields of a pod: the label of its namespace.
const NAMESPACE_MODE: &str = "namespaceMode";

const UID: &str = "5f0c8a52-52f6-4c0e-9d0e-2f4f7f2a1f10";
const HASH: &str = "0123456789abcdef0123456789abcdef";
const STATUS: &str = r#"{"initContainers":["istio-validation"],"containers":["istio-proxy"]}"#;
const OTHER_TEMPLATE: &str = r#"{"initContainers":null,"containers":["istio-proxy"]}"#;

fn pod_uid(uid: &str) -> PodUid {
    PodUid(uid.to_owned())
}

/// A pod as an API object.
fn pod(annotations: &Value, proxy: &Value) -> Value {
    let mut proxy = proxy.clone();
    proxy["name"] = json!("istio-proxy");
    json!({
        "metadata": { "uid": UID, "namespace": "shop", "name": "cart", "annotations": annotations },
        "spec": { "containers": [{ "name": "app" }, proxy] },
        "status": { "phase": "Pending" },
    })
}

fn object(pod: &Value) -> ObjectClaim {
    let mode = pod[NAMESPACE_MODE].as_str().map(str::to_owned);
    let pod = InheritingPod { pod: serde_json::from_value(pod.clone()).expect("a pod"), mode };
    let (_, claim) =
        kubernetes::claim(&pod, &Selection::default(), &CaptureArgs::default()).expect("a claim");
    ObjectClaim { place: ObjectPlace::Cgroup("/kubepods/pod".into()), ..claim }
}

/// The plugin's input for the same pod.
fn sandbox(pod: &Value, id: &str) -> SandboxClaim {
    let annotations = serde_json::from_value(pod["metadata"]["annotations"].clone()).expect("annotations");
    let (verdict, certainty) = sidecar::decide_by_annotations(
        "shop",
        Some(&annotations),
        &Selection::default(),
        &CaptureArgs::default(),
    );
    SandboxClaim {
        id: id.into(),
        namespace: "shop".into(),
        name: "cart".into(),
        netns: "/run/netns/cart".into(),
        cgroup: Ok("/kubepods/pod".into()),
        first_address: None,
        verdict,
        certainty,
    }
}

/// Returns a short text.
fn as_str(resolution: &Resolution) -> String {
    match resolution {
        Resolution::Capture(desired) => {
            let CaptureOptions::Args(given) = &desired.options else { panic!("{desired:?}") };
            let uid = given.arguments.iter().position(|flag| flag == "-u").map(|at| &given.arguments[at + 1]);
            let dns = given.arguments.iter().any(|flag| flag == "--redirect-dns");
            let netns = desired.netns.is_some();
            let joined = match given.check().expect("valid options").accelerate.as_slice() {
                [] => "",
                _ => " joined",
            };
            let shadow = if given.is_shadow() { " in shadow" } else { "" };
            format!("captured as {}{joined} dns={dns}{shadow} netns={netns}", uid.expect("a user"))
        }
        Resolution::Ignore(why) => why.as_str().to_owned(),
        Resolution::CaptureIfKept(_) => "captures_itself".to_owned(),
        Resolution::Refuse(_) => "refused".to_owned(),
        other => format!("{other:?}"),
    }
}

/// A pod, and the resolution for each source alone and for all together.
struct ClaimKind {
    what: &'static str,
    pod: Value,
    by_annotations: &'static str,
    by_api: &'static str,
}

fn kinds() -> Vec<ClaimKind> {
    let status =
        json!({ "sidecar.istio.io/status": STATUS, "sidecar.istio.io/interceptionMode": "REDIRECT" });
    let other = json!({ "sidecar.istio.io/status": OTHER_TEMPLATE });
    let with = |name: &str, value: &str| {
        let mut annotations = status.clone();
        annotations[name] = json!(value);
        annotations
    };
    let proxy = json!({ "args": ["proxy", "sidecar"] });
    let kind = |what, pod, by_annotations, by_api| ClaimKind { what, pod, by_annotations, by_api };
    let captured = "captured as 1337 dns=false";
    let joined = "captured as 1337 joined dns=false";
    let shadowed = "captured as 1337 dns=false in shadow";
    let in_namespace = |mode: &str, mut pod: Value| {
        pod[NAMESPACE_MODE] = json!(mode);
        pod
    };
    let mut labelled = pod(&with("sidecar.istio.io/inject", "false"), &proxy);
    labelled["metadata"]["labels"] = json!({ "sidecar.istio.io/inject": "true" });
    let mut with_init = pod(&status, &proxy);
    with_init["spec"]["initContainers"] = json!([{ "name": "istio-init" }]);
    let mut native = pod(&status, &proxy);
    native["spec"] = json!({ "containers": [{ "name": "app" }],
        "initContainers": [{ "name": "istio-proxy", "restartPolicy": "Always", "args": ["proxy", "sidecar"] }] });
    let mut plain = pod(&json!({}), &proxy);
    plain["spec"] = json!({ "containers": [{ "name": "app" }] });
    let dns = json!({ "args": ["proxy", "sidecar"], "securityContext": { "runAsUser": 1444, "runAsGroup": 1444 },
                      "env": [{ "name": "ISTIO_META_DNS_CAPTURE", "value": "true" }] });
    let grpc = json!({ "args": ["proxy", "sidecar"], "env": [{ "name": "DISABLE_ENVOY", "value": "true" }] });
    vec![
        kind("a sidecar", pod(&status, &proxy), captured, captured),
        kind("a native sidecar", native, captured, captured),
        kind("a user of its own, and DNS", pod(&status, &dns), captured, "captured as 1444 dns=true"),
        kind("accelerated", pod(&with(sidecar::ACCELERATE, "true"), &proxy), joined, joined),
        kind("not accelerated", pod(&with(sidecar::ACCELERATE, "false"), &proxy), captured, captured),
        kind("accelerated perhaps", pod(&with(sidecar::ACCELERATE, "perhaps"), &proxy), "refused", "refused"),
        kind("no sidecar", plain, "no_sidecar", "no_sidecar"),
        kind(
            "a gateway",
            pod(&other, &json!({ "args": ["proxy", "router"] })),
            "template_unknown",
            "gateway",
        ),
        kind(
            "a gateway with a mode",
            pod(&status, &json!({ "args": ["proxy", "router"] })),
            captured,
            "gateway",
        ),
        kind("gRPC without a proxy", pod(&other, &grpc), "template_unknown", "proxy_disabled"),
        kind("with istio-init", with_init.clone(), captured, "captures_itself"),
        kind("in shadow", pod(&with(mode::NAME, "shadow"), &proxy), shadowed, shadowed),
        kind("enforced", pod(&with(mode::NAME, "enforce"), &proxy), captured, captured),
        kind("in a namespace in shadow", in_namespace("shadow", pod(&status, &proxy)), captured, shadowed),
        kind(
            "enforced in such a namespace",
            in_namespace("shadow", pod(&with(mode::NAME, "enforce"), &proxy)),
            captured,
            captured,
        ),
        kind(
            "in shadow in an enforced namespace",
            in_namespace("enforce", pod(&with(mode::NAME, "shadow"), &proxy)),
            shadowed,
            shadowed,
        ),
        kind("with istio-init, in shadow", in_namespace("shadow", with_init.clone()), captured, shadowed),
        kind("a mode that is none", pod(&with(mode::NAME, "on"), &proxy), "refused", "refused"),
        kind("a label that is none", in_namespace("on", pod(&status, &proxy)), captured, "refused"),
        kind("with istio-init, and neither", in_namespace("on", with_init), captured, "refused"),
        kind(
            "inject no",
            pod(&with("sidecar.istio.io/inject", "false"), &proxy),
            "inject_disabled",
            "inject_disabled",
        ),
        kind("inject no, labelled yes", labelled, "inject_disabled", captured),
        kind(
            "mode NONE",
            pod(&with("sidecar.istio.io/interceptionMode", "NONE"), &proxy),
            "mode_none",
            "mode_none",
        ),
        kind(
            "a wrong annotation",
            pod(&with("traffic.sidecar.istio.io/includeInboundPorts", "http"), &proxy),
            "refused",
            "refused",
        ),
    ]
}

#[test]
fn the_order_of_sources_decides_nothing() {
    type ViewStep = fn(&mut PodView, &ClaimKind);
    let api: ViewStep = |view, kind| view.set_object(object(&kind.pod));
    let add: ViewStep = |view, kind| view.set_sandbox(sandbox(&kind.pod, "s"), ApiWait::Running);
    let late: ViewStep = |view, _| _ = view.end_api_wait("s");
    let readd: ViewStep = |view, kind| view.set_sandbox(sandbox(&kind.pod, "s"), ApiWait::Over);
    // An earlier daemon has captured it by its annotations.
    let adopt: ViewStep = |view, kind| {
        let mut alone = PodView::default();
        alone.set_sandbox(sandbox(&kind.pod, "s"), ApiWait::Over);
        if let Resolution::Capture(desired) = alone.resolve(&pod_uid(UID)) {
            view.set_applied_before(*desired);
        } else {
            view.set_sandbox(sandbox(&kind.pod, "s"), ApiWait::Over);
        }
    };
    let deleted: ViewStep = |view, kind| view.remove_object(&object(&kind.pod).id);
    let unlisted: ViewStep = |view, _| view.retain_objects(&HashSet::new());
    for kind in kinds() {
        let resolve = |steps: &[ViewStep]| {
            let mut view = PodView::default();
            steps.iter().for_each(|step| step(&mut view, &kind));
            as_str(&view.resolve(&pod_uid(UID)))
        };
        let placed = |word: &str, netns: &str| {
            if word.starts_with("captured") { format!("{word} netns={netns}") } else { word.to_owned() }
        };
        let what = kind.what;
        for (order, steps) in [
            ("API, ADD", &[api, add][..]),
            ("ADD, API", &[add, api]),
            ("ADD, silence, API", &[add, late, api]),
            ("API, ADD twice", &[api, add, readd]),
            ("ADD twice, API", &[add, readd, api]),
            ("an earlier daemon, API", &[adopt, api]),
            ("an earlier daemon, ADD, API", &[adopt, add, api]),
            ("an earlier daemon, API, ADD", &[adopt, api, add]),
            ("the object goes before its sandbox", &[api, add, deleted]),
            ("the list has it no more before its sandbox goes", &[add, api, unlisted]),
        ] {
            assert_eq!(resolve(steps), placed(kind.by_api, "true"), "{what}: {order}");
        }
        assert_eq!(resolve(&[api]), placed(kind.by_api, "false"), "{what}: the API alone");
        assert_eq!(resolve(&[add]), "AwaitApi", "{what}: nothing is decided yet");
        for (order, steps) in [("ADD, silence", &[add, late][..]), ("no API", &[readd])] {
            assert_eq!(resolve(steps), placed(kind.by_annotations, "true"), "{what}: {order}");
        }
    }
}

#[test]
fn the_runtime_alone_ends_a_sandbox() {
    let kind = &kinds()[0];
    let claim = object(&kind.pod);
    let mut view = PodView::default();
    view.set_object(claim.clone());
    view.set_sandbox(sandbox(&kind.pod, "s2"), ApiWait::Over);
    assert!(!view.end_sandbox("s1"), "an earlier sandbox");
    view.set_object(ObjectClaim { stage: Stage::Finished, ..claim.clone() });
    assert!(
        matches!(view.resolve(&pod_uid(UID)), Resolution::Capture(_)),
        "though the API says it has ended"
    );
    view.remove_object(&claim.id);
    assert!(matches!(view.resolve(&pod_uid(UID)), Resolution::Capture(_)));
    assert!(view.end_sandbox("s2"));
    assert_eq!(view.resolve(&pod_uid(UID)), Resolution::Absent);
    assert!(view.is_empty());

    // Without the plugin the API reports the end.
    view.set_object(ObjectClaim { stage: Stage::Finished, ..claim.clone() });
    assert_eq!(view.resolve(&pod_uid(UID)), Resolution::Ignore(IgnoreReason::Finished));
    view.set_object(claim.clone());
    view.set_object(ObjectClaim {
        stage: Stage::Terminating,
        verdict: Ok(PodVerdict::Ignore(IgnoreReason::NoSidecar)),
        ..claim.clone()
    });
    assert!(matches!(view.resolve(&pod_uid(UID)), Resolution::Capture(_)), "an applied capture stays");
    view.remove_object(&claim.id);
    assert!(view.is_empty());
}

/// The next sandbox may be placed elsewhere, and the processes of this one are ending.
#[test]
fn after_a_sandbox_the_api_alone_does_not_begin_again_until_it_has_news() {
    let kind = &kinds()[0];
    let mut view = PodView::default();
    view.set_object(object(&kind.pod));
    view.set_sandbox(sandbox(&kind.pod, "s"), ApiWait::Over);
    assert!(view.end_sandbox("s"));
    assert_eq!(view.resolve(&pod_uid(UID)), Resolution::Unplaced);
    view.set_object(object(&kind.pod));
    assert!(matches!(view.resolve(&pod_uid(UID)), Resolution::Capture(_)));
}

#[test]
fn a_mirror_pod_of_another_name_neither_changes_nor_releases_a_static_pod() {
    let mirror = |uid: &str, namespace: &str, created: &str, ports: &str| {
        let pod = json!({
            "metadata": {
                "uid": uid, "namespace": namespace, "name": "static-node-1", "creationTimestamp": created,
                "annotations": { "kubernetes.io/config.mirror": HASH, "sidecar.istio.io/status": STATUS,
                                 "traffic.sidecar.istio.io/excludeOutboundPorts": ports },
                "ownerReferences": [{ "apiVersion": "v1", "kind": "Node", "name": "node-1", "uid": "n" }],
            },
            "spec": { "containers": [{ "name": "app" }, { "name": "istio-proxy" }] },
            "status": { "phase": "Running" },
        });
        let pod = InheritingPod { pod: serde_json::from_value(pod).expect("a pod"), mode: None };
        let (key, claim) =
            kubernetes::claim(&pod, &Selection::default(), &CaptureArgs::default()).expect("a claim");
        assert_eq!(key, Key::Pod(pod_uid(HASH)));
        ObjectClaim { place: ObjectPlace::Cgroup("/kubepods/static".into()), ..claim }
    };
    let real = mirror("u-real", "kube-shop", "2026-01-01T00:00:00Z", "1");
    let evil = mirror("u-evil", "evil", "2026-01-02T00:00:00Z", "1:65535");
    let sandbox = SandboxClaim {
        namespace: "kube-shop".into(),
        name: "static-node-1".into(),
        ..sandbox(&kinds()[0].pod, "s")
    };
    let mut alone = PodView::default();
    alone.set_sandbox(sandbox.clone(), ApiWait::Running);
    alone.set_object(real.clone());
    let expected = alone.resolve(&pod_uid(HASH));
    assert!(matches!(expected, Resolution::Capture(_)), "{expected:?}");

    // The runtime identifies the pod, whichever object the daemon learns of first.
    for claims in [[&real, &evil], [&evil, &real]] {
        let mut view = PodView::default();
        view.set_object(claims[0].clone());
        view.set_sandbox(sandbox.clone(), ApiWait::Running);
        view.set_object(claims[1].clone());
        assert_eq!(view.resolve(&pod_uid(HASH)), expected);
        view.remove_object(&evil.id);
        assert_eq!(view.resolve(&pod_uid(HASH)), expected, "it released nothing");
    }
    let mut view = PodView::default();
    view.set_object(evil.clone());
    assert_eq!(view.resolve(&pod_uid(HASH)), Resolution::Unplaced, "it has no effect by itself");
    view.set_sandbox(sandbox, ApiWait::Running);
    assert_eq!(view.resolve(&pod_uid(HASH)), Resolution::AwaitApi, "nor in place of the real one");

    // The kubelet recreates the real one after a deletion.
    let mut view = alone;
    view.remove_object(&real.id);
    let again = mirror("u-again", "kube-shop", "2026-01-03T00:00:00Z", "2");
    view.set_object(again.clone());
    assert_eq!(view.speaker().map(|object| &object.id), Some(&again.id));

    // It does not release what an earlier daemon has applied for the real one.
    let Resolution::Capture(applied) = expected else { panic!("{expected:?}") };
    let mut view = PodView::default();
    view.set_applied_before(*applied.clone());
    view.set_object(evil.clone());
    view.remove_object(&evil.id);
    assert_eq!(view.resolve(&pod_uid(HASH)), Resolution::Capture(applied.clone()));
    view.retain_objects(&HashSet::from([evil.id.uid.clone()]));
    assert_eq!(view.resolve(&pod_uid(HASH)), Resolution::Capture(applied), "the runtime has not ended it");
    assert!(view.end_sandbox("s"));
    assert_eq!(view.resolve(&pod_uid(HASH)), Resolution::Absent);
}
