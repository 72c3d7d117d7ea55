use super::*;
use crate::options::{Config, Dns, InboundMode};

fn proxy() -> Container {
    Container { name: PROXY.into(), uid: Some(1337), gid: Some(1337), ..Container::default() }
}

fn app() -> Container {
    Container { name: "app".into(), ..Container::default() }
}

/// An injected pod with additional annotations, and with an app container besides these.
fn pod(annotations: &[(&str, &str)], containers: &[Container]) -> PodMetadata {
    let annotations = annotations.iter().chain(&[(STATUS, "{}")]);
    PodMetadata {
        namespace: "shop".into(),
        annotations: annotations.map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect(),
        containers: containers.iter().cloned().chain([app()]).collect(),
        ..PodMetadata::default()
    }
}

/// Returns the compiled policy, as in the daemon.
fn config(pod: &PodMetadata, defaults: &CaptureArgs) -> Config {
    match decide(pod, &Selection::default(), defaults).expect("sound") {
        PodVerdict::Capture(args) => args.given.check().expect("sound options"),
        PodVerdict::CaptureIfKept(_) => panic!("it captures itself"),
        PodVerdict::Ignore(why) => panic!("ignored: {}", why.as_str()),
    }
}

fn ignored(pod: &PodMetadata) -> &'static str {
    match decide(pod, &Selection::default(), &CaptureArgs::default()).expect("sound") {
        PodVerdict::Ignore(why) => why.as_str(),
        PodVerdict::CaptureIfKept(_) => "captures_itself",
        PodVerdict::Capture(args) => panic!("captured with {:?}", args.given.arguments),
    }
}

fn by_flags(flags: &str) -> Config {
    let arguments = flags.split_whitespace().map(str::to_owned).collect();
    CaptureArgs { arguments, ..CaptureArgs::default() }.check().expect("sound options")
}

#[test]
fn without_annotations_everything_is_captured_but_the_proxys_own_ports() {
    let expected = by_flags("-u 1337 -g 1337 -m REDIRECT -i * -b * -d 15020,15021,15090 -o 15020");
    assert_eq!(config(&pod(&[], &[proxy()]), &CaptureArgs::default()), expected);
    // By its annotations only, as a runtime passes them.
    let annotations = pod(&[(MODE, "REDIRECT")], &[]).annotations;
    let (verdict, _) =
        decide_by_annotations("shop", Some(&annotations), &Selection::default(), &CaptureArgs::default());
    let Ok(PodVerdict::Capture(args)) = verdict else { panic!("{verdict:?}") };
    assert_eq!(args.given.check().expect("sound options"), expected);
}

#[test]
fn each_annotation_is_its_flag() {
    for (annotation, value, flags) in [
        ("traffic.sidecar.istio.io/includeOutboundIPRanges", "10.0.0.0/8,fd00::/8", "-i 10.0.0.0/8,fd00::/8"),
        ("traffic.sidecar.istio.io/excludeOutboundIPRanges", "10.1.0.0/16", "-x 10.1.0.0/16"),
        ("traffic.sidecar.istio.io/includeInboundPorts", "80,443", "-b 80,443"),
        ("traffic.sidecar.istio.io/excludeInboundPorts", "9000, ", "-d 9000,15020,15021,15090"),
        ("traffic.sidecar.istio.io/includeOutboundPorts", "8443", "-q 8443"),
        ("traffic.sidecar.istio.io/excludeOutboundPorts", "3306,6379", "-o 3306,6379"),
        ("traffic.sidecar.istio.io/excludeInterfaces", "net1", "-c net1"),
        ("traffic.sidecar.istio.io/kubevirtInterfaces", "k6t-eth0", "-k k6t-eth0"),
        ("istio.io/reroute-virtual-interfaces", "k6t-eth0", "-k k6t-eth0"),
        ("sidecar.istio.io/interceptionMode", "TPROXY", "-m TPROXY"),
        (OPEN, "true", "--open-without-proxy"),
        (ACCELERATE, "true", "--accelerate"),
        (EXEMPT, "migrate, fetch", "--exempt-containers fetch,migrate"),
    ] {
        let base = "-u 1337 -g 1337 -i * -b * -d 15020,15021,15090 -o 15020";
        let expected = by_flags(&format!("{base} {flags}"));
        let got = config(&pod(&[(annotation, value)], &[proxy()]), &CaptureArgs::default());
        assert_eq!(got, expected, "{annotation}: {value}");
        assert_ne!(got, by_flags(base), "{annotation} changed nothing");
    }
}

#[test]
fn a_pod_can_switch_off_what_the_node_has_on() {
    for (annotation, flag) in SWITCHES {
        let defaults = CaptureArgs { arguments: vec![flag.to_owned()], ..CaptureArgs::default() };
        let on = config(&pod(&[], &[proxy()]), &defaults);
        let off = config(&pod(&[(annotation, "false")], &[proxy()]), &defaults);
        assert_ne!(on, off, "{annotation}");
        assert_eq!(off, config(&pod(&[], &[proxy()]), &CaptureArgs::default()), "{annotation}");
        let error = decide(&pod(&[(annotation, "maybe")], &[proxy()]), &Selection::default(), &defaults);
        let text = error.expect_err("neither").to_string();
        assert!(text.contains(annotation) && text.contains("maybe"), "{text}");
    }
}

#[test]
fn an_empty_annotation_is_not_an_absent_one() {
    let got = config(
        &pod(&[("traffic.sidecar.istio.io/includeInboundPorts", "")], &[proxy()]),
        &CaptureArgs::default(),
    );
    assert_eq!(got.inbound_ports, by_flags("-b ,").inbound_ports);
}

#[test]
fn a_wrong_annotation_is_named_with_its_value() {
    for (annotation, value) in [
        ("traffic.sidecar.istio.io/excludeOutboundIPRanges", "10.0.0.0/40"),
        ("traffic.sidecar.istio.io/includeInboundPorts", "80,http"),
        ("traffic.sidecar.istio.io/excludeInboundPorts", "99999"),
        ("sidecar.istio.io/interceptionMode", "NAT"),
    ] {
        let error =
            decide(&pod(&[(annotation, value)], &[proxy()]), &Selection::default(), &CaptureArgs::default())
                .expect_err(value);
        let text = error.to_string();
        let wrong = value.rsplit(',').next().expect("a part");
        assert!(text.contains(annotation) && text.contains(wrong), "{text}");
    }
}

#[test]
fn the_proxys_ids_come_from_its_container() {
    let custom = Container { uid: Some(2000), gid: Some(3000), ..proxy() };
    let got = config(&pod(&[], &[custom]), &CaptureArgs::default());
    assert_eq!((got.proxy_uids, got.proxy_gids), (vec![2000], vec![3000]));
    let root = Container { uid: Some(0), gid: None, ..proxy() };
    let got = config(&pod(&[], &[root]), &CaptureArgs::default());
    assert_eq!((got.proxy_uids, got.proxy_gids), (vec![1337], vec![1337]));
}

#[test]
fn dns_is_captured_where_the_proxy_says_so() {
    let environment = [("ISTIO_META_DNS_CAPTURE".to_owned(), "true".to_owned())].into();
    let got = config(&pod(&[], &[Container { environment, ..proxy() }]), &CaptureArgs::default());
    assert_eq!(got.dns, Dns::All);
    assert_eq!(config(&pod(&[], &[proxy()]), &CaptureArgs::default()).dns, Dns::Off);
}

#[test]
fn options_of_the_node_are_weaker_than_annotations() {
    let defaults = CaptureArgs {
        arguments: vec!["-m".into(), "TPROXY".into(), "-o".into(), "22".into()],
        ..CaptureArgs::default()
    };
    let got =
        config(&pod(&[("traffic.sidecar.istio.io/excludeOutboundPorts", "3306")], &[proxy()]), &defaults);
    assert_eq!(got.mode, InboundMode::Tproxy);
    assert_eq!(got.outbound_exclude_ports.to_string(), "3306");
}

#[test]
fn what_is_not_to_be_captured_is_ignored() {
    let injected = pod(&[], &[proxy()]);
    config(&injected, &CaptureArgs::default());
    assert_eq!(ignored(&pod(&[], &[])), "no_sidecar");
    assert_eq!(ignored(&PodMetadata { host_network: true, ..injected.clone() }), "host_network");
    assert_eq!(ignored(&PodMetadata { annotations: BTreeMap::new(), ..injected.clone() }), "not_injected");
    assert_eq!(ignored(&PodMetadata { containers: vec![proxy()], ..injected.clone() }), "only_proxy");
    // A terminated init container does not count as another container.
    let setup = Container { name: "setup".into(), init: true, ..Container::default() };
    assert_eq!(ignored(&PodMetadata { containers: vec![setup, proxy()], ..injected }), "only_proxy");
    assert_eq!(ignored(&pod(&[(INJECT, "false")], &[proxy()])), "inject_disabled");
    let init = Container { name: INIT.into(), init: true, ..Container::default() };
    assert_eq!(ignored(&pod(&[], &[init, proxy()])), "captures_itself");
    let environment = [("DISABLE_ENVOY".to_owned(), "1".to_owned())].into();
    assert_eq!(ignored(&pod(&[], &[Container { environment, ..proxy() }])), "proxy_disabled");
    let args = ["proxy", "router", "--domain", "x"].map(str::to_owned).to_vec();
    assert_eq!(ignored(&pod(&[], &[Container { args, ..proxy() }])), "gateway");
    assert_eq!(ignored(&pod(&[(MODE, "NONE")], &[proxy()])), "mode_none");
}

#[test]
fn excluded_namespaces_are_ignored_whoever_tells_of_them() {
    let selection = Selection { exclude_namespaces: ["shop".to_owned()].into(), ..Selection::default() };
    let pod = pod(&[(MODE, "REDIRECT")], &[proxy()]);
    let ignored = Ok(PodVerdict::Ignore(IgnoreReason::NamespaceExcluded));
    assert_eq!(decide(&pod, &selection, &CaptureArgs::default()), ignored);
    let by_annotations = |namespace| {
        decide_by_annotations(namespace, Some(&pod.annotations), &selection, &CaptureArgs::default())
    };
    assert_eq!(by_annotations("shop"), (ignored, Certainty::Certain));
    assert!(matches!(by_annotations("other").0, Ok(PodVerdict::Capture(_))));
}

/// As the injector writes them: its status names the containers that it has added.
#[test]
fn annotations_tell_a_sidecar_from_other_templates() {
    const LISTS: &str = r#""volumes":["istio-envoy"],"imagePullSecrets":null,"revision":"default""#;
    let status = |inits: &str, containers: &str| {
        format!(r#"{{"initContainers":{inits},"containers":{containers},{LISTS}}}"#)
    };
    let sidecar = status(r#"["istio-validation"]"#, r#"["istio-proxy"]"#);
    let native = status(r#"["istio-validation","istio-proxy"]"#, "null");
    let older = status("null", r#"["istio-proxy"]"#);
    for (what, status, others, expected) in [
        ("a sidecar", sidecar.as_str(), &[(MODE, "REDIRECT")][..], "captured"),
        ("a native sidecar", &native, &[(MODE, "TPROXY")], "captured"),
        ("a sidecar whose mode is not written", &sidecar, &[], "captured"),
        ("a sidecar without validation", &older, &[(MODE, "REDIRECT")], "captured"),
        ("a gateway, or gRPC without a proxy", &older, &[], "template_unknown"),
        ("another template", &status("null", r#"["logger"]"#), &[(MODE, "REDIRECT")], "no_sidecar"),
        (
            "one that captures itself",
            &status(r#"["istio-init"]"#, r#"["istio-proxy"]"#),
            &[(MODE, "REDIRECT")],
            "captures_itself",
        ),
        ("mode NONE", &sidecar, &[(MODE, "NONE")], "mode_none"),
        ("inject no", &sidecar, &[(MODE, "REDIRECT"), (INJECT, "false")], "inject_disabled"),
        ("a status that does not read", "yes", &[], "template_unknown"),
        ("a status that does not read, and the template's mark", "[1]", &[(MODE, "REDIRECT")], "captured"),
    ] {
        let own = [(STATUS, status)];
        let annotations = own.iter().chain(others);
        let annotations = annotations.map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        let (verdict, certainty) =
            decide_by_annotations("shop", Some(&annotations), &Selection::default(), &CaptureArgs::default());
        let word = match verdict.expect(what) {
            PodVerdict::Capture(_) => "captured",
            PodVerdict::CaptureIfKept(_) => "kept",
            PodVerdict::Ignore(why) => why.as_str(),
        };
        assert_eq!((word, certainty), (expected, Certainty::Provisional), "{what}");
        assert!(annotations.keys().all(|name| reads(name)), "{what}");
    }
    let none = |annotations| {
        decide_by_annotations("shop", annotations, &Selection::default(), &CaptureArgs::default())
    };
    // The API would not report more about a pod that was not injected.
    let plain = (Ok(PodVerdict::Ignore(IgnoreReason::NoSidecar)), Certainty::Certain);
    let no_annotations = BTreeMap::new();
    assert_eq!(none(Some(&no_annotations)), plain);
    let unknown = (Ok(PodVerdict::Ignore(IgnoreReason::AnnotationsUnknown)), Certainty::Provisional);
    assert_eq!(none(None), unknown);
}

#[test]
fn the_label_is_stronger_than_the_annotation() {
    let mut injected = pod(&[(INJECT, "false")], &[proxy()]);
    injected.inject_label = Some("true".into());
    config(&injected, &CaptureArgs::default());
}

#[test]
fn a_proxy_that_is_a_plain_init_container_is_none() {
    let init = Container { init: true, ..proxy() };
    assert_eq!(ignored(&pod(&[], &[init])), "no_sidecar");
}

#[test]
fn ipv6_is_captured_where_istio_captures_it() {
    let ipv4 = Some([10, 0, 0, 1].into());
    let ipv6 = Some("fd00::1".parse().expect("an address"));
    let dual =
        Container { environment: [("ISTIO_DUAL_STACK".to_owned(), "true".to_owned())].into(), ..proxy() };
    let always = Selection { ipv6: Ipv6::Always, ..Selection::default() };
    for (what, proxy, selection, first, left_alone) in [
        ("IPv4 first", proxy(), Selection::default(), ipv4, true),
        ("IPv6 first", proxy(), Selection::default(), ipv6, false),
        ("no address yet", proxy(), Selection::default(), None, false),
        ("a proxy for both", dual, Selection::default(), ipv4, false),
        ("strictly", proxy(), always, ipv4, false),
    ] {
        let verdict = decide(&pod(&[], &[proxy]), &selection, &CaptureArgs::default());
        let Ok(PodVerdict::Capture(args)) = verdict else { panic!("{what}: {verdict:?}") };
        let config = args.for_address(first).check().expect("sound options");
        assert_eq!(config.without_ipv6, left_alone, "{what}");
    }
}

#[test]
fn the_proxys_variables_are_known_from_its_annotation() {
    let config = |text: &str| {
        let annotations = pod(&[(MODE, "REDIRECT"), (PROXY_CONFIG, text)], &[]).annotations;
        assert!(reads(PROXY_CONFIG));
        let (verdict, _) =
            decide_by_annotations("shop", Some(&annotations), &Selection::default(), &CaptureArgs::default());
        let Ok(PodVerdict::Capture(args)) = verdict else { panic!("{text}: {verdict:?}") };
        args.for_address(Some([10, 0, 0, 1].into())).check().expect("sound options")
    };
    let both =
        "concurrency: 2\nproxyMetadata:\n  ISTIO_META_DNS_CAPTURE: \"true\"\n  ISTIO_DUAL_STACK: 'true'\n";
    let known = config(both);
    assert_eq!((known.dns, known.without_ipv6), (Dns::All, false));
    let json = config(r#"{"proxyMetadata": {"ISTIO_META_DNS_CAPTURE": "true"}}"#);
    assert_eq!((json.dns, json.without_ipv6), (Dns::All, true));
    for text in
        ["", "concurrency: 2", "proxyMetadata: [", "proxyMetadata: {ISTIO_META_DNS_CAPTURE: \"false\"}"]
    {
        let unknown = config(text);
        assert_eq!((unknown.dns, unknown.without_ipv6), (Dns::Off, true), "{text}");
    }
}
