use std::collections::BTreeMap;

use super::*;
use crate::daemon::{
    mesh::Mesh,
    sidecar::{self, Container, PodMetadata, Selection},
    takeover::Takeover,
};

fn defaults(arguments: &[&str]) -> CaptureArgs {
    let arguments = arguments.iter().map(|argument| (*argument).to_owned()).collect();
    CaptureArgs { arguments, ..CaptureArgs::default() }
}

fn enforced(percent: u8, listed: &[&str]) -> EnforcedWorkloads {
    let listed = listed.iter().map(|text| WorkloadRef::parse(text).expect("a workload")).collect();
    EnforcedWorkloads { percent, listed }
}

#[test]
fn the_annotation_decides_before_the_label_and_that_before_the_options() {
    use PodMode::{Enforce, Shadow};
    for (annotation, label, options, expected) in [
        (None, None, &[][..], Enforce),
        (None, None, &["--shadow"], Shadow),
        (None, None, &["--shadow=false"], Enforce),
        (None, Some("shadow"), &[], Shadow),
        (None, Some("enforce"), &["--shadow"], Enforce),
        (Some("shadow"), None, &[], Shadow),
        (Some(" enforce "), None, &["--shadow"], Enforce),
        (Some("shadow"), Some("enforce"), &[], Shadow),
        (Some("enforce"), Some("shadow"), &["--shadow"], Enforce),
        // Nothing depends on the label then.
        (Some("shadow"), Some("wrong"), &[], Shadow),
    ] {
        let claims = ModeClaims { annotation, label, workload: None, enforced: &enforced(0, &[]) };
        let mode = claims.decide(&defaults(options)).map(|decision| decision.mode);
        assert_eq!(mode, Ok(expected), "{annotation:?} {label:?} {options:?}");
    }
}

/// The percentile of shop/Deployment/cart is 24.
#[test]
fn annotation_label_list_and_percentage_decide_in_this_order() {
    use ModeRule::{Annotation, Default, EnforcePercent, EnforceWorkloads, NamespaceLabel};
    use PodMode::{Enforce, Shadow};
    const CART: &str = "shop/Deployment/cart";
    let (none, listed) = (&[][..], &["bank/CronJob/bill", "shop/deployment/cart"][..]);
    let other = &["shop/StatefulSet/cart", "bank/Deployment/cart"][..];
    for (annotation, label, list, percent, expected) in [
        (None, None, none, 0, (Shadow, Default)),
        (None, None, none, 24, (Shadow, Default)),
        (None, None, none, 25, (Enforce, EnforcePercent)),
        (None, None, none, 100, (Enforce, EnforcePercent)),
        (None, None, other, 0, (Shadow, Default)),
        (None, None, other, 25, (Enforce, EnforcePercent)),
        (None, None, listed, 0, (Enforce, EnforceWorkloads)),
        (None, None, listed, 100, (Enforce, EnforceWorkloads)),
        (None, Some("shadow"), listed, 100, (Shadow, NamespaceLabel)),
        (None, Some("enforce"), listed, 0, (Enforce, NamespaceLabel)),
        (Some("shadow"), Some("enforce"), listed, 100, (Shadow, Annotation)),
        (Some("enforce"), Some("shadow"), none, 0, (Enforce, Annotation)),
    ] {
        let workload = WorkloadRef::parse(CART).expect("a workload");
        let enforced = enforced(percent, list);
        let claims = ModeClaims { annotation, label, workload: Some(&workload), enforced: &enforced };
        let found = claims.decide(&defaults(&["--shadow"])).expect("sound");
        let case = format!("{annotation:?} {label:?} {list:?} {percent}");
        assert_eq!((found.mode, found.rule), expected, "{case}");
        assert_eq!((found.workload.as_deref(), found.percentile), (Some(CART), Some(24)), "{case}");
    }
}

#[test]
fn a_higher_percentage_adds_and_an_unknown_workload_is_in_the_whole_alone() {
    let workloads: Vec<WorkloadRef> = (0..200)
        .map(|number| WorkloadRef::parse(&format!("shop/Deployment/app-{number}")).expect("a workload"))
        .collect();
    let mut before = BTreeSet::new();
    for percent in 0..=100 {
        let enforced = enforced(percent, &[]);
        let now: BTreeSet<WorkloadRef> =
            workloads.iter().filter(|workload| enforced.rule(Some(workload)).is_some()).cloned().collect();
        assert!(now.is_superset(&before), "{percent}");
        assert_eq!(enforced.rule(None).is_some(), percent == 100, "{percent}");
        before = now;
        if percent == 0 {
            assert!(before.is_empty());
        }
    }
    assert_eq!(before.len(), workloads.len());
}

#[test]
fn the_text_says_which_rule_decides() {
    let workload = WorkloadRef::parse("shop/Deployment/cart").expect("a workload");
    let text = |annotation, percent, list: &[&str], workload| {
        let enforced = enforced(percent, list);
        let claims = ModeClaims { annotation, label: None, workload, enforced: &enforced };
        claims.decide(&defaults(&["--shadow"])).expect("sound").to_string()
    };
    let cart = "(workload shop/Deployment/cart, percentile 24)";
    for (found, expected) in [
        (text(None, 0, &[], Some(&workload)), format!("shadow, by default {cart}")),
        (
            text(None, 10, &[], Some(&workload)),
            format!("shadow, by default, with --enforce-percent 10 {cart}"),
        ),
        (text(None, 50, &[], Some(&workload)), format!("enforce, by --enforce-percent 50 {cart}")),
        (
            text(None, 50, &["shop/Deployment/cart"], Some(&workload)),
            format!("enforce, by --enforce-workloads {cart}"),
        ),
        (
            text(Some("enforce"), 0, &[], Some(&workload)),
            format!("enforce, by its annotation intercept/mode {cart}"),
        ),
        (
            text(None, 0, &[], None),
            "shadow, by default (only the Kubernetes API tells its workload)".to_owned(),
        ),
    ] {
        assert_eq!(found, expected);
    }
}

#[test]
fn a_wrong_value_names_its_place_and_the_values() {
    let text = |annotation, label| {
        let claims = ModeClaims { annotation, label, workload: None, enforced: &enforced(0, &[]) };
        claims.asked().expect_err("wrong").to_string()
    };
    let said = "intercept/mode: `yes` is no mode; give shadow or enforce";
    assert_eq!(text(Some("yes"), Some("shadow")), format!("annotation {said}"));
    assert_eq!(text(None, Some("yes")), format!("label of the namespace {said}"));
}

#[test]
fn with_every_mesh_an_init_container_and_shadow_mode_go_together() {
    for (mesh, proxy, init, injected) in [
        (Mesh::Istio, "istio-proxy", "istio-init", ("sidecar.istio.io/status", "{}")),
        (Mesh::Linkerd, "linkerd-proxy", "linkerd-init", ("linkerd.io/proxy-version", "1")),
        (Mesh::Kuma, "kuma-sidecar", "kuma-init", ("kuma.io/sidecar-injected", "true")),
    ] {
        let container = |name: &str, init| Container { name: name.into(), init, ..Container::default() };
        let pod = |mode: Option<&str>| PodMetadata {
            namespace: "shop".into(),
            annotations: [Some(injected), mode.map(|mode| (NAME, mode))]
                .into_iter()
                .flatten()
                .map(|(name, value)| (name.to_owned(), value.to_owned()))
                .collect::<BTreeMap<_, _>>(),
            containers: vec![container("app", false), container(proxy, false), container(init, true)],
            ..PodMetadata::default()
        };
        let selection = Selection { mesh, ..Selection::default() };
        let decide =
            |mode, options: &[&str]| match sidecar::decide(&pod(mode), &selection, &defaults(options))
                .expect("sound")
            {
                PodVerdict::Capture(args) if args.given.is_shadow() => "shadow",
                PodVerdict::Capture(args) if args.takeover == Takeover::Agreed => "cut over",
                PodVerdict::Capture(_) => "captured",
                PodVerdict::CaptureIfKept(args) if args.takeover == Takeover::Agreed => "captures itself",
                PodVerdict::CaptureIfKept(_) => "kept",
                PodVerdict::Ignore(why) => why.as_str(),
            };
        assert_eq!(decide(None, &[]), "captures itself", "{mesh:?}");
        assert_eq!(decide(Some("enforce"), &[]), "cut over", "{mesh:?}");
        assert_eq!(decide(Some("enforce"), &["--shadow"]), "cut over", "{mesh:?}");
        assert_eq!(decide(Some("shadow"), &[]), "shadow", "{mesh:?}");
        assert_eq!(decide(None, &["--shadow"]), "shadow", "{mesh:?}");
        let workload = WorkloadRef::parse("shop/Deployment/cart").ok();
        let in_percentage = |percent| {
            let selection = Selection { enforced: enforced(percent, &[]), ..selection.clone() };
            let pod = PodMetadata { workload: workload.clone(), ..pod(None) };
            match sidecar::decide(&pod, &selection, &defaults(&["--shadow"])).expect("sound") {
                PodVerdict::Capture(args) => (args.given.is_shadow(), args.takeover),
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(in_percentage(24), (true, Takeover::None), "{mesh:?}");
        assert_eq!(in_percentage(25), (false, Takeover::Agreed), "{mesh:?}");
    }
}
