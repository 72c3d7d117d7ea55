//! Pods of other meshes: the verdicts of the mesh's own rules, and those of the agent by the mesh's annotations.
//!
//! `tests/rules` has the rules as each mesh installs them. docs/other-meshes.md has the figures.

use std::collections::{BTreeMap, BTreeSet};

use intercept_agent::facade::daemon::{
    CaptureArgs, Container, Ipv6, Mesh, PodMetadata, PodVerdict, Selection, decide,
};
use tests::{
    differential::{
        Capture, End, Flow, FlowKind, Observed, compare,
        meshes::{Ipv6Rules, MeshCapture, MeshPod, flows, observe_mesh},
        observed::Connection,
    },
    testbed::Ids,
};

/// A pod, its expected differences by flow, and its line in the document.
struct Comparison {
    pod: MeshPod,
    users: Vec<Ids>,
    known: fn(&Flow) -> Option<&'static str>,
}

const fn user(uid: u32) -> Ids {
    Ids { uid, gid: 1000 }
}

/// The flags that the daemon gives a pod with these annotations.
fn flags(mesh: Mesh, ipv6: Ipv6, proxy: &str, annotations: &[(&str, &str)]) -> Vec<String> {
    let container = |name: &str| Container { name: name.into(), ..Container::default() };
    let pod = PodMetadata {
        annotations: annotations.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect(),
        containers: vec![container("app"), container(proxy)],
        ..PodMetadata::default()
    };
    let selection = Selection { mesh, ipv6, ..Selection::default() };
    match decide(&pod, &selection, &CaptureArgs::default()) {
        Ok(PodVerdict::Capture(args)) => args.for_address(Some([10, 66, 0, 2].into())).arguments,
        other => panic!("{proxy}: {other:?}"),
    }
}

fn nothing(_: &Flow) -> Option<&'static str> {
    None
}

fn is_dns(flow: &Flow) -> bool {
    flow.end == End::Pod && flow.to.port() == 53
}

fn is_udp(flow: &Flow) -> bool {
    matches!(flow.kind, FlowKind::Udp(_))
}

fn is_passthrough(flow: &Flow) -> bool {
    flow.end == End::Pod && flow.from.is_some()
}

fn is_excluded(flow: &Flow) -> bool {
    ["198.51.100.7", "2001:db8::7"].contains(&flow.to.ip().to_string().as_str())
}

fn linkerd() -> Vec<Comparison> {
    let pod = |name, rules, ipv6, proxy: Ids, annotations: &[(&str, &str)]| MeshPod {
        name,
        rules,
        ipv6,
        ports: [4140, 4143, 15053],
        proxy,
        arguments: flags(
            Mesh::Linkerd,
            if ipv6 == Ipv6Rules::Installed { Ipv6::Always } else { Ipv6::AsIstio },
            "linkerd-proxy",
            annotations,
        ),
    };
    let plain = pod("Linkerd", include_str!("../rules/linkerd.rules"), Ipv6Rules::Absent, user(2102), &[]);
    let options = pod(
        "Linkerd, options",
        include_str!("../rules/linkerd-options.rules"),
        Ipv6Rules::Installed,
        user(3000),
        &[
            ("config.linkerd.io/skip-inbound-ports", "22,8080-9090"),
            ("config.linkerd.io/skip-outbound-ports", "3306,442-444"),
            ("config.linkerd.io/skip-subnets", "198.51.100.0/24,2001:db8::/32"),
            ("config.linkerd.io/proxy-uid", "3000"),
            ("config.linkerd.io/proxy-gid", "3001"),
        ],
    );
    vec![
        Comparison { pod: plain, users: vec![Ids::APP, Ids::ROOT, user(2102)], known: nothing },
        Comparison {
            pod: options,
            users: vec![Ids::APP, user(3000), Ids { uid: 1000, gid: 3001 }],
            known: nothing,
        },
    ]
}

const KUMA_CONFIG: &str = "
kumaDPUser: \"5678\"
ipFamilyMode: ipv4
redirect:
  dns: { enabled: false, port: 15053, captureAll: true }
  inbound: { enabled: true, port: 15006, includePorts: [80, 15008] }
  outbound: { enabled: true, port: 15001, includePorts: \"443,3306\" }
  vnet: {}
retry: { maxRetries: 4 }
";

fn kuma() -> Vec<Comparison> {
    let pod = |name, rules, ipv6, ports, proxy, annotations: &[(&str, &str)]| MeshPod {
        name,
        rules,
        ipv6,
        ports,
        proxy,
        arguments: flags(Mesh::Kuma, Ipv6::AsIstio, "kuma-sidecar", annotations),
    };
    let plain = pod(
        "Kuma",
        include_str!("../rules/kuma.rules"),
        Ipv6Rules::Installed,
        [15001, 15006, 15053],
        user(5678),
        &[("kuma.io/builtin-dns", "enabled"), ("kuma.io/builtin-dns-port", "15053")],
    );
    let options = pod(
        "Kuma, options",
        include_str!("../rules/kuma-options.rules"),
        Ipv6Rules::Installed,
        [16001, 16006, 16053],
        user(5700),
        &[
            ("kuma.io/builtin-dns", "enabled"),
            ("kuma.io/builtin-dns-port", "16053"),
            ("kuma.io/sidecar-uid", "5700"),
            ("kuma.io/transparent-proxying-outbound-port", "16001"),
            ("kuma.io/transparent-proxying-inbound-port", "16006"),
            ("kuma.io/application-probe-proxy-port", "9090"),
            ("traffic.kuma.io/exclude-inbound-ports", "22,8080"),
            ("traffic.kuma.io/exclude-outbound-ports", "443"),
            ("traffic.kuma.io/exclude-inbound-ips", "198.51.100.7,2001:db8::7"),
            ("traffic.kuma.io/exclude-outbound-ips", "198.51.100.0/24,2001:db8::/32"),
        ],
    );
    let include = pod(
        "Kuma, configuration",
        include_str!("../rules/kuma-include.rules"),
        Ipv6Rules::Absent,
        [15001, 15006, 15053],
        user(5678),
        &[("traffic.kuma.io/transparent-proxy-config", KUMA_CONFIG)],
    );
    let passthrough =
        |flow: &Flow| (is_passthrough(flow) && is_udp(flow)).then_some("DNS from 127.0.0.6 or ::6");
    vec![
        Comparison { pod: plain, users: vec![Ids::APP, Ids::ROOT, user(5678)], known: passthrough },
        Comparison {
            pod: options,
            users: vec![Ids::APP, user(5700)],
            known: |flow| {
                if is_passthrough(flow) && is_udp(flow) {
                    Some("DNS from 127.0.0.6 or ::6")
                } else {
                    (is_dns(flow) && is_udp(flow) && is_excluded(flow))
                        .then_some("DNS to an address that exclude-outbound-ips names")
                }
            },
        },
        Comparison { pod: include, users: vec![Ids::APP, user(5678)], known: nothing },
    ]
}

const CONSUL_PLAIN: &str = r#"{"ConsulDNSIP":"","ConsulDNSPort":0,"ProxyUserID":"5995","ProxyInboundPort":20000,
    "ProxyOutboundPort":15001,"ExcludeInboundPorts":null,"ExcludeUIDs":["5996"]}"#;
const CONSUL_OPTIONS: &str = r#"{"ConsulDNSIP":"","ConsulDNSPort":8600,"ProxyUserID":"5995","ProxyInboundPort":20000,
    "ProxyOutboundPort":0,"ExcludeInboundPorts":["22","8080"],"ExcludeOutboundPorts":["443"],
    "ExcludeOutboundCIDRs":["198.51.100.0/24","2001:db8::/32"],"ExcludeUIDs":["5996"]}"#;

fn consul() -> Vec<Comparison> {
    let pod = |name, rules, ipv6, dns, config| MeshPod {
        name,
        rules,
        ipv6,
        ports: [15001, 20000, dns],
        proxy: user(5995),
        arguments: flags(
            Mesh::Consul,
            if ipv6 == Ipv6Rules::Installed { Ipv6::Always } else { Ipv6::AsIstio },
            "consul-dataplane",
            &[
                ("consul.hashicorp.com/transparent-proxy-status", "enabled"),
                ("consul.hashicorp.com/redirect-traffic-config", config),
            ],
        ),
    };
    let plain = pod("Consul", include_str!("../rules/consul.rules"), Ipv6Rules::Absent, 8600, CONSUL_PLAIN);
    let rules = include_str!("../rules/consul-options.rules");
    let options = pod("Consul, options", rules, Ipv6Rules::Installed, 8600, CONSUL_OPTIONS);
    let users = || vec![Ids::APP, user(5995), user(5996)];
    vec![
        Comparison {
            pod: plain,
            users: users(),
            known: |flow| is_passthrough(flow).then_some("from 127.0.0.6 or ::6"),
        },
        Comparison {
            pod: options,
            users: users(),
            known: |flow| {
                if is_passthrough(flow) {
                    Some("from 127.0.0.6 or ::6")
                } else {
                    let own =
                        is_dns(flow) && [5995, 5996].contains(&flow.ids.uid) && flow.to.ip().is_loopback();
                    own.then_some("DNS of the proxy's user or an excluded user to 127.0.0.1 or ::1")
                }
            },
        },
    ]
}

/// Without a rule of its family a namespace tracks no connections, and the kernel knows no original destination.
fn without_original(seen: &Observed) -> Observed {
    match seen.clone() {
        Observed::Connection(connection) => {
            Observed::Connection(Connection { original_dst: None, ..connection })
        }
        other => other,
    }
}

/// Compares a pod, and returns what the document is to say of it.
fn compare_pod(Comparison { pod, users, known }: &Comparison) -> String {
    let Capture::Agent(agent) = Capture::agent().expect("the agent") else { unreachable!("it is the agent") };
    let flows = flows(pod, users);
    let observe =
        |by: &MeshCapture| observe_mesh(pod, by, &flows).unwrap_or_else(|e| panic!("{}: {e:#}", pod.name));
    let own = observe(&MeshCapture::OwnRules);
    let ours = observe(&MeshCapture::Agent(agent));
    let mut differ = BTreeMap::new();
    let mut unknown = Vec::new();
    for ((flow, own), ours) in flows.iter().zip(&own).zip(&ours) {
        let untracked = pod.ipv6 == Ipv6Rules::Absent && flow.to.is_ipv6();
        let lines = if untracked {
            compare::differences(&without_original(own), &without_original(ours))
        } else {
            compare::differences(own, ours)
        };
        if lines.is_empty() {
            continue;
        }
        match known(flow) {
            Some(why) => *differ.entry(why).or_insert(0) += 1,
            None => unknown.push(format!("{flow}: {}\n  {own:?}\n  {ours:?}", lines.join(", "))),
        }
    }
    let shown = unknown.len().min(12);
    assert!(
        unknown.is_empty(),
        "{}: {} of {} flows:\n{}",
        pod.name,
        unknown.len(),
        flows.len(),
        unknown[..shown].join("\n")
    );
    let expected: BTreeSet<_> = flows.iter().filter_map(known).collect();
    assert!(differ.keys().copied().eq(expected), "{}: differences that are gone: {differ:?}", pod.name);
    // A capture that does nothing would agree in nothing of this.
    let servers: BTreeSet<_> = own.iter().filter_map(|seen| seen.server()).collect();
    assert!(["outbound", "inbound", "app", "world"].iter().all(|name| servers.contains(name)), "{servers:?}");
    let equal = flows.len() - differ.values().sum::<usize>();
    let why: Vec<_> = differ.iter().map(|(why, count)| format!("{count}: {why}")).collect();
    format!("| {} | {} | {equal} | {} |", pod.name, flows.len(), why.join("; "))
}

fn compare_all(comparisons: &[Comparison]) {
    let document = include_str!("../../docs/other-meshes.md");
    let lines: Vec<_> = comparisons.iter().map(compare_pod).collect();
    println!("{}", lines.join("\n"));
    for line in lines {
        assert!(document.contains(&line), "docs/other-meshes.md does not have\n{line}");
    }
}

#[test]
fn linkerds_pods_as_under_its_own_rules() {
    compare_all(&linkerd());
}

#[test]
fn kumas_pods_as_under_its_own_rules() {
    compare_all(&kuma());
}

#[test]
fn consuls_pods_as_under_its_own_rules() {
    compare_all(&consul());
}

/// The comparison finds a pod that is captured with a wrong flag.
#[test]
#[should_panic(expected = "Linkerd: ")]
fn a_wrong_flag_is_found() {
    let mut comparison = linkerd().remove(0);
    comparison.pod.arguments.extend(["-o".to_owned(), "80".to_owned()]);
    compare_pod(&comparison);
}
