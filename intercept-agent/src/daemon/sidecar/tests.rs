use super::*;
use crate::options::{Config, Dns, InboundMode};

fn proxy() -> Container {
    Container { name: PROXY.into(), uid: Some(1337), gid: Some(1337), ..Container::default() }
}

fn facts(annotations: &[(&str, &str)], containers: &[Container]) -> Facts {
    Facts {
        annotations: annotations.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect(),
        containers: Some(containers.to_vec()),
        ..Facts::default()
    }
}

/// The policy that comes of it, as the daemon would compile it.
fn config(facts: &Facts, defaults: &Given) -> Config {
    match decide(facts, defaults).expect("sound") {
        Verdict::Capture(given) => given.check().expect("sound options"),
        Verdict::LeaveAlone(why) => panic!("left alone: {why}"),
    }
}

fn left_alone(facts: &Facts) -> &'static str {
    match decide(facts, &Given::default()).expect("sound") {
        Verdict::LeaveAlone(why) => why,
        Verdict::Capture(given) => panic!("captured with {:?}", given.arguments),
    }
}

fn by_flags(flags: &str) -> Config {
    let arguments = flags.split_whitespace().map(str::to_owned).collect();
    Given { arguments, ..Given::default() }.check().expect("sound options")
}

#[test]
fn without_annotations_everything_is_captured_but_the_proxys_own_ports() {
    let expected = by_flags("-u 1337 -g 1337 -m REDIRECT -i * -b * -d 15020,15021,15090 -o 15020");
    assert_eq!(config(&facts(&[], &[proxy()]), &Given::default()), expected);
    // Known by its annotation alone, as a runtime tells it.
    let only = Facts { containers: None, ..facts(&[(STATUS, "{}")], &[]) };
    assert_eq!(config(&only, &Given::default()), expected);
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
    ] {
        let base = "-u 1337 -g 1337 -i * -b * -d 15020,15021,15090 -o 15020";
        let expected = by_flags(&format!("{base} {flags}"));
        let got = config(&facts(&[(annotation, value)], &[proxy()]), &Given::default());
        assert_eq!(got, expected, "{annotation}: {value}");
        assert_ne!(got, by_flags(base), "{annotation} changed nothing");
    }
}

#[test]
fn an_empty_annotation_is_not_an_absent_one() {
    let got = config(
        &facts(&[("traffic.sidecar.istio.io/includeInboundPorts", "")], &[proxy()]),
        &Given::default(),
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
        let error = decide(&facts(&[(annotation, value)], &[proxy()]), &Given::default()).expect_err(value);
        let text = error.to_string();
        let wrong = value.rsplit(',').next().expect("a part");
        assert!(text.contains(annotation) && text.contains(wrong), "{text}");
    }
}

#[test]
fn the_proxys_ids_come_from_its_container() {
    let custom = Container { uid: Some(2000), gid: Some(3000), ..proxy() };
    let got = config(&facts(&[], &[custom]), &Given::default());
    assert_eq!((got.proxy_uids, got.proxy_gids), (vec![2000], vec![3000]));
    let root = Container { uid: Some(0), gid: None, ..proxy() };
    let got = config(&facts(&[], &[root]), &Given::default());
    assert_eq!((got.proxy_uids, got.proxy_gids), (vec![1337], vec![1337]));
}

#[test]
fn dns_is_captured_where_the_proxy_says_so() {
    let environment = [("ISTIO_META_DNS_CAPTURE".to_owned(), "true".to_owned())].into();
    let got = config(&facts(&[], &[Container { environment, ..proxy() }]), &Given::default());
    assert_eq!(got.dns, Dns::All);
    assert_eq!(config(&facts(&[], &[proxy()]), &Given::default()).dns, Dns::Off);
}

#[test]
fn options_of_the_node_are_weaker_than_annotations() {
    let defaults =
        Given { arguments: vec!["-m".into(), "TPROXY".into(), "-o".into(), "22".into()], ..Given::default() };
    let got =
        config(&facts(&[("traffic.sidecar.istio.io/excludeOutboundPorts", "3306")], &[proxy()]), &defaults);
    assert_eq!(got.mode, InboundMode::Tproxy);
    assert_eq!(got.outbound_exclude_ports.to_string(), "3306");
}

#[test]
fn what_is_not_to_be_captured_is_left_alone() {
    let app = Container { name: "app".into(), ..Container::default() };
    assert_eq!(left_alone(&facts(&[], &[app])), "no_sidecar");
    assert_eq!(left_alone(&Facts { containers: None, ..facts(&[], &[]) }), "no_sidecar");
    assert_eq!(left_alone(&Facts { host_network: true, ..facts(&[], &[proxy()]) }), "host_network");
    assert_eq!(left_alone(&Facts { finished: true, ..facts(&[], &[proxy()]) }), "finished");
    assert_eq!(left_alone(&facts(&[(INJECT, "false")], &[proxy()])), "inject_disabled");
    let init = Container { name: INIT.into(), init: true, ..Container::default() };
    assert_eq!(left_alone(&facts(&[], &[init, proxy()])), "captures_itself");
    let environment = [("DISABLE_ENVOY".to_owned(), "1".to_owned())].into();
    assert_eq!(left_alone(&facts(&[], &[Container { environment, ..proxy() }])), "proxy_disabled");
    let args = ["proxy", "router", "--domain", "x"].map(str::to_owned).to_vec();
    assert_eq!(left_alone(&facts(&[], &[Container { args, ..proxy() }])), "gateway");
}

#[test]
fn the_label_is_stronger_than_the_annotation() {
    let mut pod = facts(&[(INJECT, "false")], &[proxy()]);
    pod.inject_label = Some("true".into());
    config(&pod, &Given::default());
}

#[test]
fn a_proxy_that_is_a_plain_init_container_is_none() {
    let init = Container { init: true, ..proxy() };
    assert_eq!(left_alone(&facts(&[], &[init])), "no_sidecar");
}
