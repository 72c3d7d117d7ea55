use super::{consul::CONFIG as CONSUL_CONFIG, *};
use crate::{
    daemon::sidecar::{self, Container, Selection},
    options::Config,
};

fn selection(mesh: Mesh) -> Selection {
    Selection { mesh, ..Selection::default() }
}

fn pod(proxy: &str, annotations: &[(&str, &str)]) -> PodMetadata {
    let container = |name: &str| Container { name: name.into(), ..Container::default() };
    PodMetadata {
        annotations: annotations.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect(),
        containers: vec![container("app"), container(proxy)],
        ..PodMetadata::default()
    }
}

fn by_flags(flags: &str) -> Config {
    let arguments = flags.split_whitespace().map(str::to_owned).collect();
    CaptureArgs { arguments, ..CaptureArgs::default() }.check().expect("sound options")
}

fn config(verdict: Result<PodVerdict, AnnotationError>) -> Config {
    let Ok(PodVerdict::Capture(args)) = verdict else { panic!("{verdict:?}") };
    args.for_address(Some([10, 0, 0, 1].into())).check().expect("sound options")
}

const KUMA_CONFIG: &str = "traffic.kuma.io/transparent-proxy-config";
const LINKERD_FLAGS: &str = "-p 4140 -z 4143 -u 2102 -g 999999 -e 1 -c lo -i * -b * -d 4190,4191,4567,4568 -o 4567,4568 --without-ipv6";
const KUMA_FLAGS: &str = "-p 15001 -z 15006 -u 5678 -g 999999 -e 1 -i * -b *";
const KUMA_DNS: &str = "--redirect-dns --capture-all-dns --dns-over-udp-only";
const CONSUL_FLAGS: &str = "-p 15001 -z 20000 -u 5995,5996 -g 999999 -e 1 -i 0.0.0.0/0,::/0,127.0.0.0/8 -b * \
                            --without-self-capture --without-ipv6";

/// A mesh's pod, its annotations, and the resulting flags.
type MeshCase = (Mesh, &'static str, Vec<(&'static str, &'static str)>, String);

fn cases() -> Vec<MeshCase> {
    let linkerd = ("linkerd.io/proxy-version", "edge-26.1.1");
    let kuma = ("kuma.io/sidecar-injected", "true");
    let consul = r#"{"ConsulDNSIP":"","ConsulDNSPort":0,"ProxyUserID":"5995","ProxyInboundPort":20000,
        "ProxyOutboundPort":15001,"ExcludeInboundPorts":["20200"],"ExcludeOutboundPorts":null,
        "ExcludeOutboundCIDRs":["10.9.0.0/16"],"ExcludeUIDs":["5996"],"NetNS":"","IptablesProvider":null}"#;
    vec![
        (Mesh::Linkerd, "linkerd-proxy", vec![linkerd], LINKERD_FLAGS.to_owned()),
        (
            Mesh::Linkerd,
            "linkerd-proxy",
            vec![
                linkerd,
                ("config.linkerd.io/skip-inbound-ports", "25, 8100-8102"),
                ("config.linkerd.io/skip-outbound-ports", "3306"),
                ("config.linkerd.io/skip-subnets", "10.1.0.0/16,192.168.0.0/24"),
                ("config.linkerd.io/proxy-uid", "3000"),
                ("config.linkerd.io/proxy-gid", "3001"),
            ],
            format!(
                "{LINKERD_FLAGS} -d 4190,4191,25,8100:8102 -o 3306 \
                 --exclude-inbound-cidr 10.1.0.0/16,192.168.0.0/24 -u 3000 -g 3001"
            ),
        ),
        (Mesh::Kuma, "kuma-sidecar", vec![kuma], KUMA_FLAGS.to_owned()),
        (
            Mesh::Kuma,
            "kuma-sidecar",
            vec![kuma, ("kuma.io/builtin-dns", "enabled"), ("kuma.io/gateway", "enabled")],
            format!("{KUMA_FLAGS} -b= {KUMA_DNS}"),
        ),
        (
            Mesh::Kuma,
            "kuma-sidecar",
            vec![
                kuma,
                (KUMA_CONFIG, "redirect: { dns: { enabled: true }, outbound: { excludePorts: [53, 80] } }"),
            ],
            format!("{KUMA_FLAGS} {KUMA_DNS} -o 80"),
        ),
        (
            Mesh::Kuma,
            "kuma-sidecar",
            vec![
                kuma,
                (
                    KUMA_CONFIG,
                    "{kumaDPUser: 5700, ipFamilyMode: ipv4, redirect: {inbound: {enabled: false}, outbound: \
                     {port: 16001, excludePortsForIPs: [10.0.0.1, 'fd00::/8']}}}",
                ),
            ],
            format!("{KUMA_FLAGS} -u 5700 -b= -p 16001 -x 10.0.0.1,fd00::/8 --without-ipv6"),
        ),
        (
            Mesh::Kuma,
            "kuma-sidecar",
            vec![
                kuma,
                ("kuma.io/sidecar-uid", "5700"),
                ("traffic.kuma.io/exclude-inbound-ports", "1234,1235"),
                ("traffic.kuma.io/exclude-outbound-ports", "5678-5680"),
                ("traffic.kuma.io/exclude-outbound-ips", "10.0.0.1,fd00::/8"),
                ("traffic.kuma.io/exclude-inbound-ips", "10.0.0.2"),
                ("kuma.io/application-probe-proxy-port", "9001"),
                ("kuma.io/transparent-proxying-ip-family-mode", "ipv4"),
            ],
            format!(
                "{KUMA_FLAGS} -u 5700 -d 1234,1235,9001 -o 5678:5680 -x 10.0.0.1,fd00::/8 \
                 --exclude-inbound-cidr 10.0.0.2 --without-ipv6"
            ),
        ),
        (
            Mesh::Consul,
            "consul-dataplane",
            vec![
                ("consul.hashicorp.com/transparent-proxy-status", "enabled"),
                ("consul.hashicorp.com/redirect-traffic-config", consul),
            ],
            format!("{CONSUL_FLAGS} -d 20200 -x 10.9.0.0/16"),
        ),
        (
            Mesh::Consul,
            "consul-dataplane",
            vec![
                ("consul.hashicorp.com/transparent-proxy-status", "enabled"),
                (
                    "consul.hashicorp.com/redirect-traffic-config",
                    r#"{"ConsulDNSPort":8600,"ProxyUserID":"5995","ProxyInboundPort":20000,"ExcludeUIDs":["5996"]}"#,
                ),
            ],
            format!("{CONSUL_FLAGS} --redirect-dns --dns-servers 127.0.0.1,::1 --dns-capture-port 8600"),
        ),
    ]
}

#[test]
fn options_of_each_mesh_are_flags_for_the_api_and_for_the_plugin() {
    for (mesh, proxy, annotations, flags) in cases() {
        let pod = pod(proxy, &annotations);
        let expected = by_flags(&flags);
        let selection = selection(mesh);
        assert_eq!(
            config(sidecar::decide(&pod, &selection, &CaptureArgs::default())),
            expected,
            "{annotations:?}"
        );
        let (verdict, _) = sidecar::decide_by_annotations(
            "shop",
            Some(&pod.annotations),
            &selection,
            &CaptureArgs::default(),
        );
        assert_eq!(config(verdict), expected, "{annotations:?}");
        assert!(pod.annotations.keys().all(|name| sidecar::reads(name)), "{annotations:?}");
        // Pods of one mesh are ignored for another.
        for other in [Mesh::Istio, Mesh::Linkerd, Mesh::Kuma, Mesh::Consul].into_iter().filter(|m| *m != mesh)
        {
            let selection = Selection { mesh: other, ..selection.clone() };
            let ignored = Ok(PodVerdict::Ignore(IgnoreReason::NoSidecar));
            assert_eq!(
                sidecar::decide(&pod, &selection, &CaptureArgs::default()),
                ignored,
                "{mesh:?} as {other:?}"
            );
            let told = sidecar::decide_by_annotations(
                "shop",
                Some(&pod.annotations),
                &selection,
                &CaptureArgs::default(),
            );
            assert_eq!(told, (ignored, Certainty::Certain), "{mesh:?} as {other:?}");
        }
    }
}

#[test]
fn the_proxys_user_is_that_of_its_container_unless_an_annotation_says_otherwise() {
    let mut linkerd = pod("linkerd-proxy", &[]);
    linkerd.containers[1].uid = Some(4000);
    let decide =
        |pod: &PodMetadata| config(sidecar::decide(pod, &selection(Mesh::Linkerd), &CaptureArgs::default()));
    assert_eq!(decide(&linkerd).proxy_uids, [4000]);
    linkerd.annotations.insert("config.linkerd.io/proxy-uid".into(), "4001".into());
    assert_eq!(decide(&linkerd).proxy_uids, [4001]);
}

#[test]
fn linkerds_ipv6_and_control_plane_are_as_the_api_says() {
    let mut linkerd = pod("linkerd-proxy", &[("config.linkerd.io/skip-outbound-ports", "25")]);
    let decide =
        |pod: &PodMetadata| config(sidecar::decide(pod, &selection(Mesh::Linkerd), &CaptureArgs::default()));
    assert!(decide(&linkerd).without_ipv6);
    let listen = |address: &str| [("LINKERD2_PROXY_INBOUND_LISTEN_ADDR".to_owned(), address.to_owned())];
    linkerd.containers[1].environment = listen("[::]:4143").into();
    assert!(!decide(&linkerd).without_ipv6);
    linkerd.containers[1].environment = listen("0.0.0.0:4143").into();
    assert!(decide(&linkerd).without_ipv6);
    assert_eq!(decide(&linkerd).outbound_exclude_ports.to_string(), "25");
    linkerd.control_plane = true;
    assert_eq!(decide(&linkerd).outbound_exclude_ports.to_string(), "25,443,6443");
}

#[test]
fn pods_that_are_not_to_be_captured_are_ignored() {
    let ignored =
        |mesh, pod: &PodMetadata| match sidecar::decide(pod, &selection(mesh), &CaptureArgs::default()) {
            Ok(PodVerdict::Ignore(why)) => why.as_str(),
            Ok(PodVerdict::CaptureIfKept(_)) => "captures_itself",
            other => panic!("{other:?}"),
        };
    let all = cases();
    let consul = all.iter().find(|(mesh, ..)| *mesh == Mesh::Consul).expect("a case");
    let (name, text) = consul.2[1];
    let consul = pod("consul-dataplane", &[(name, text)]);
    assert_eq!(ignored(Mesh::Consul, &consul), "proxy_disabled");
    for (mesh, proxy, init) in
        [(Mesh::Linkerd, "linkerd-proxy", "linkerd-init"), (Mesh::Kuma, "kuma-sidecar", "kuma-init")]
    {
        let mut pod = pod(proxy, &[]);
        pod.containers.push(Container { name: init.into(), init: true, ..Container::default() });
        assert_eq!(ignored(mesh, &pod), "captures_itself");
        pod.host_network = true;
        assert_eq!(ignored(mesh, &pod), "host_network");
    }
}

#[test]
fn what_no_flag_is_like_is_refused_by_name() {
    for (mesh, proxy, name, value) in [
        (Mesh::Linkerd, "linkerd-proxy", "config.linkerd.io/skip-subnets", "everywhere"),
        (Mesh::Kuma, "kuma-sidecar", "traffic.kuma.io/exclude-outbound-ports-for-uids", "tcp:80:7"),
        (Mesh::Kuma, "kuma-sidecar", "traffic.kuma.io/exclude-inbound-ips", "everywhere"),
        (Mesh::Kuma, "kuma-sidecar", "kuma.io/transparent-proxying-ip-family-mode", "ipv6"),
        (Mesh::Kuma, "kuma-sidecar", KUMA_CONFIG, "redirect: ["),
        (Mesh::Kuma, "kuma-sidecar", KUMA_CONFIG, "redirect: { inbound: { port: http } }"),
        (
            Mesh::Kuma,
            "kuma-sidecar",
            KUMA_CONFIG,
            "redirect: { outbound: { excludePortsForUIDs: ['tcp:80:7'] } }",
        ),
        (Mesh::Kuma, "kuma-sidecar", KUMA_CONFIG, "redirect: { vnet: { networks: ['br0:10.0.0.0/8'] } }"),
        (Mesh::Consul, "consul-dataplane", CONSUL_CONFIG, "{}"),
        (
            Mesh::Consul,
            "consul-dataplane",
            CONSUL_CONFIG,
            r#"{"ConsulDNSIP":"10.96.0.10","ProxyUserID":"5995","ProxyInboundPort":20000}"#,
        ),
        (
            Mesh::Consul,
            "consul-dataplane",
            CONSUL_CONFIG,
            r#"{"ConsulDNSIP":"10.96.0.10","ConsulDNSPort":8600,"ProxyUserID":"5995","ProxyInboundPort":20000}"#,
        ),
    ] {
        let pod = pod(proxy, &[(name, value), (super::consul::STATUS, "enabled")]);
        let error =
            sidecar::decide(&pod, &selection(mesh), &CaptureArgs::default()).expect_err(name).to_string();
        assert!(error.contains(name), "{error}");
    }
}
