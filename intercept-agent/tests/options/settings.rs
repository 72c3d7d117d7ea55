//! Every setting by flag and by variable, which source wins, and what depends on what.

use clap::CommandFactory;
use intercept_agent::facade::options::{
    Cidrs, Config, Dns, InboundMode, InboundPorts, Note, OwnerGroups, Ports, RunOptions,
};

use crate::pod::{CaptureCli, NamesOfPod, outcome, raw, valid};

/// What no options mean in the pod above.
fn base() -> Config {
    Config { proxy_uids: vec![1400], proxy_gids: vec![1400], ..Config::default() }
}

fn cidrs(list: &[&str]) -> Vec<ipnet::IpNet> {
    list.iter().map(|item| item.parse().expect(item)).collect()
}

fn ports(list: &[u16]) -> Ports {
    list.iter().copied().collect()
}

fn only(list: &[&str], loopback: bool) -> Cidrs {
    Cidrs { all: false, list: cidrs(list), loopback }
}

#[test]
fn no_options() {
    let (config, switches, notes) = valid(&[], &[]);
    assert_eq!(config, base());
    assert_eq!(switches, RunOptions::default());
    assert_eq!(notes, [] as [&str; 0]);
    let nobody = NamesOfPod { users: Vec::new(), resolv_conf: None };
    assert_eq!(outcome(&[], &[], &nobody).expect("valid").0, Config::default(), "1337 without such a user");
}

/// Flag (long and short) and variable give the same; each row is the setting, its value and the change it makes.
#[test]
fn every_setting_by_flag_and_variable() {
    type Change = fn(&mut Config, &mut RunOptions);
    let rows: &[(&str, &str, &str, &str, Change)] = &[
        ("-p", "--envoy-port", "ENVOY_PORT", "16001", |c, _| c.proxy_port = 16001),
        ("-z", "--inbound-capture-port", "INBOUND_CAPTURE_PORT", "16006", |c, _| c.inbound_port = 16006),
        ("-e", "--inbound-tunnel-port", "INBOUND_TUNNEL_PORT", "65535", |c, _| c.tunnel_port = 65535),
        ("-u", "--proxy-uid", "PROXY_UID", "7,app,7,3", |c, _| {
            (c.proxy_uids, c.proxy_gids) = (vec![7, 1000, 3], vec![7, 1001, 3]);
        }),
        ("-g", "--proxy-gid", "PROXY_GID", "9,app,0", |c, _| c.proxy_gids = vec![9, 1001, 0]),
        ("-m", "--istio-inbound-interception-mode", "ISTIO_INBOUND_INTERCEPTION_MODE", "TPROXY", |c, _| {
            c.mode = InboundMode::Tproxy;
        }),
        ("-m", "--istio-inbound-interception-mode", "ISTIO_INBOUND_INTERCEPTION_MODE", "REDIRECT", |_, _| ()),
        ("-t", "--istio-inbound-tproxy-mark", "ISTIO_INBOUND_TPROXY_MARK", "1400", |c, _| {
            c.tproxy_mark = 1400
        }),
        ("-t", "--istio-inbound-tproxy-mark", "ISTIO_INBOUND_TPROXY_MARK", "0xff", |c, _| {
            c.tproxy_mark = 255
        }),
        ("-r", "--istio-inbound-tproxy-route-table", "ISTIO_INBOUND_TPROXY_ROUTE_TABLE", "200", |c, _| {
            c.tproxy_table = 200;
        }),
        ("-b", "--istio-inbound-ports", "ISTIO_INBOUND_PORTS", "*", |c, _| {
            c.inbound_ports = InboundPorts::All
        }),
        ("-b", "--istio-inbound-ports", "ISTIO_INBOUND_PORTS", "6000,7000,", |c, _| {
            c.inbound_ports = InboundPorts::Only(ports(&[6000, 7000]));
        }),
        ("-b", "--istio-inbound-ports", "ISTIO_INBOUND_PORTS", ",,82, 80:81", |c, _| {
            c.inbound_ports = InboundPorts::Only(ports(&[80, 81, 82]));
        }),
        ("-c", "--istio-exclude-interfaces", "ISTIO_EXCLUDE_INTERFACES", "net1,eth+,net1", |c, _| {
            c.exclude_interfaces = serde_json::from_str(r#"["net1", "eth+"]"#).expect("interfaces");
        }),
        ("-k", "--kube-virt-interfaces", "KUBE_VIRT_INTERFACES", "k6t-net0", |c, _| {
            c.virt_interfaces = serde_json::from_str(r#"["k6t-net0"]"#).expect("interfaces");
        }),
        ("-i", "--istio-service-cidr", "ISTIO_SERVICE_CIDR", "*", |c, _| {
            c.include = Cidrs { all: true, ..Cidrs::default() };
        }),
        (
            "-i",
            "--istio-service-cidr",
            "ISTIO_SERVICE_CIDR",
            "10.9.9.9/8,fd00::/8,10.0.0.0/8,1.2.3.4",
            |c, _| {
                c.include = only(&["1.2.3.4/32", "10.0.0.0/8", "fd00::/8"], false);
            },
        ),
        ("-i", "--istio-service-cidr", "ISTIO_SERVICE_CIDR", "127.1.2.3/8", |c, _| {
            c.include = only(&["127.0.0.0/8"], true);
        }),
        ("-i", "--istio-service-cidr", "ISTIO_SERVICE_CIDR", "127.0.0.1/1", |c, _| {
            c.include = only(&["0.0.0.0/1"], true);
        }),
        ("-i", "--istio-service-cidr", "ISTIO_SERVICE_CIDR", "0.0.0.0/0,::/0", |c, _| {
            c.include = only(&["0.0.0.0/0", "::/0"], false);
        }),
        ("-i", "--istio-service-cidr", "ISTIO_SERVICE_CIDR", "::1", |c, _| {
            c.include = only(&["::1/128"], true)
        }),
        ("-x", "--istio-service-exclude-cidr", "ISTIO_SERVICE_EXCLUDE_CIDR", "10.1.1.1/16,::1,", |c, _| {
            c.exclude = cidrs(&["10.1.0.0/16", "::1/128"]);
        }),
        ("-q", "--istio-outbound-ports", "ISTIO_OUTBOUND_PORTS", "443,15021", |c, _| {
            c.outbound_ports = ports(&[443, 15021]);
        }),
        ("-o", "--istio-local-outbound-ports-exclude", "ISTIO_LOCAL_OUTBOUND_PORTS_EXCLUDE", "53", |c, _| {
            c.outbound_exclude_ports = ports(&[53]);
        }),
        ("-n", "--dry-run", "DRY_RUN", "true", |_, s| s.dry_run = true),
        ("", "--iptables-probe-port", "IPTABLES_PROBE_PORT", "1", |_, s| s.probe_port = 1),
        ("", "--probe-timeout", "PROBE_TIMEOUT", "1m30s", |_, s| {
            s.probe_timeout = std::time::Duration::from_secs(90)
        }),
        ("", "--run-validation", "RUN_VALIDATION", "1", |_, s| s.run_validation = true),
        ("", "--skip-rule-apply", "SKIP_RULE_APPLY", "T", |_, s| s.skip_rule_apply = true),
        ("", "--redirect-dns", "REDIRECT_DNS", "t", |c, _| {
            c.dns = Dns::Resolvers(vec!["10.96.0.10".parse().expect("address")]);
        }),
        ("", "--accelerate", "ACCELERATE", "true", |c, _| c.accelerate = vec!["envoy".into()]),
        ("", "--open-without-proxy", "OPEN_WITHOUT_PROXY", "true", |c, _| c.open_without_proxy = true),
        ("", "--without-ipv6", "WITHOUT_IPV6", "true", |c, _| c.without_ipv6 = true),
        ("", "--proxy-cgroup", "PROXY_CGROUP", "/cg/proxy", |c, _| {
            c.proxy_cgroups = vec!["/cg/proxy".into()]
        }),
        ("", "--exempt-cgroup", "EXEMPT_CGROUP", "/cg/b, /cg/a,/cg/b", |c, _| {
            c.exempt_cgroups = vec!["/cg/a".into(), "/cg/b".into()];
        }),
        ("", "--proxy-container", "PROXY_CONTAINER", "istio-proxy", |c, _| {
            c.proxy_containers = vec!["istio-proxy".into()];
        }),
        ("", "--exempt-containers", "EXEMPT_CONTAINERS", "init-b,init-a", |c, _| {
            c.exempt_containers = vec!["init-a".into(), "init-b".into()];
        }),
        ("", "--shadow", "SHADOW", "true", |c, _| c.shadow = true),
        ("", "--without-self-capture", "WITHOUT_SELF_CAPTURE", "true", |c, _| c.without_self_capture = true),
        ("", "--exclude-inbound-cidr", "EXCLUDE_INBOUND_CIDR", "10.1.1.1/16,fd00::1", |c, _| {
            c.exclude_sources = cidrs(&["10.1.0.0/16", "fd00::1/128"]);
        }),
        ("", "--network-namespace", "NETWORK_NAMESPACE", "/run/netns/a", |_, s| {
            s.network_namespace = Some("/run/netns/a".into());
        }),
        ("", "--cni-mode", "CNI_MODE", "True", |_, s| s.cni_mode = true),
        ("", "--reconcile", "RECONCILE", "TRUE", |_, s| s.reconcile = true),
        ("", "--cleanup-only", "CLEANUP_ONLY", "true", |_, s| s.cleanup_only = true),
        ("", "--force-apply", "FORCE_APPLY", "true", |_, s| s.force_apply = true),
    ];
    for (short, long, variable, value, change) in rows {
        let (mut config, mut switches) = (base(), RunOptions::default());
        change(&mut config, &mut switches);
        let expected = (config, switches);
        // Which of them are answered by a note is another test's.
        let valid = |args: &[&str], env: &[(&str, &str)]| {
            let (config, switches, _) = valid(args, env);
            (config, switches)
        };
        let joined = format!("{long}={value}");
        assert_eq!(valid(&[joined.as_str()], &[]), expected, "{joined}");
        if !short.is_empty() {
            assert_eq!(valid(&[&format!("{short}={value}")], &[]), expected, "{short}={value}");
        }
        let is_switch = CaptureCli::command()
            .get_arguments()
            .find(|arg| arg.get_long() == long.strip_prefix("--"))
            .expect("a known flag")
            .is_require_equals_set();
        if is_switch {
            let bare = if short.is_empty() { long } else { short };
            assert_eq!(valid(&[bare], &[]), expected, "{bare}");
        } else {
            assert_eq!(valid(&[long, value], &[]), expected, "{long} {value}");
        }
        assert_eq!(valid(&[], &[(variable, value)]), expected, "{variable}={value}");
    }
}

#[test]
fn settings_that_are_variables_only() {
    for (env, expected) in [
        (&[("ISTIO_OUTBOUND_OWNER_GROUPS", "*")] as &[(&str, &str)], OwnerGroups::All),
        (&[("ISTIO_OUTBOUND_OWNER_GROUPS", "")], OwnerGroups::All),
        (&[("ISTIO_OUTBOUND_OWNER_GROUPS", ",")], OwnerGroups::Only(vec![])),
        (&[("ISTIO_OUTBOUND_OWNER_GROUPS", "app,7,,7,202")], OwnerGroups::Only(vec![7, 202, 1001])),
        (&[("ISTIO_OUTBOUND_OWNER_GROUPS_EXCLUDE", "202,app")], OwnerGroups::Except(vec![202, 1001])),
        (&[("ISTIO_OUTBOUND_OWNER_GROUPS_EXCLUDE", ",")], OwnerGroups::All),
        (
            &[("ISTIO_OUTBOUND_OWNER_GROUPS", "*"), ("ISTIO_OUTBOUND_OWNER_GROUPS_EXCLUDE", "1")],
            OwnerGroups::Except(vec![1]),
        ),
    ] {
        assert_eq!(valid(&[], env).0.owner_groups, expected, "{env:?}");
    }
    for (value, expected) in
        [("127.0.0.0/8", "127.0.0.0/8"), ("127.1.2.3/16", "127.1.0.0/16"), ("127.0.0.1/32", "127.0.0.1/32")]
    {
        let (config, ..) = valid(&[], &[("ISTIO_OUTBOUND_IPV4_LOOPBACK_CIDR", value)]);
        assert_eq!(config.loopback_v4.to_string(), expected);
    }
    let (config, _, notes) = valid(&[], &[("ENVOY_USER", "app")]);
    assert_eq!((config.proxy_uids, config.proxy_gids, notes.len()), (vec![1000], vec![1000], 0));
    let (config, _, notes) = valid(&[], &[("ENVOY_USER", "gone")]);
    assert_eq!(config.proxy_uids, [1337]);
    assert_eq!(
        notes,
        ["environment variable ENVOY_USER: no user `gone` in this pod, so the proxy's id is 1337"]
    );
    assert_eq!(
        valid(&["-u", "5"], &[("ENVOY_USER", "unreadable")]).0.proxy_uids,
        [5],
        "not looked up when -u is given"
    );
}

/// A Service `envoy` in the pod's namespace is enough, and nobody has meant it as an option.
#[test]
fn variables_that_kubernetes_makes_for_services_do_not_count() {
    for name in ["ENVOY_PORT", "INBOUND_CAPTURE_PORT", "INBOUND_TUNNEL_PORT", "IPTABLES_PROBE_PORT"] {
        for value in ["tcp://10.96.0.7:80", "udp://10.96.0.7:53", "sctp://[fd00::7]:80"] {
            assert_eq!(valid(&[], &[(name, value)]), valid(&[], &[]), "{name}={value}");
        }
        let error = outcome(&[], &[(name, "http://10.96.0.7")], &NamesOfPod::default()).expect_err(name);
        assert!(error.to_string().contains(name), "{error}");
    }
}

#[test]
fn flag_over_variable_over_default() {
    let port = |args: &[&str], env: &[(&str, &str)]| valid(args, env).0.proxy_port;
    assert_eq!(port(&["-p", "1"], &[("ENVOY_PORT", "2")]), 1);
    assert_eq!(port(&[], &[("ENVOY_PORT", "2")]), 2);
    assert_eq!(port(&[], &[("ENVOY_PORT", "")]), 15001, "an empty variable is unset");
    assert_eq!(port(&["-p", "1", "--envoy-port=3"], &[]), 3, "the last one of a flag counts");
    assert_eq!(
        port(&["-p", "1"], &[("ENVOY_PORT", "nonsense")]),
        1,
        "an overridden variable is not looked at"
    );

    let all = [("ISTIO_SERVICE_CIDR", "*")];
    assert!(valid(&[], &all).0.include.all);
    assert_eq!(valid(&["-i", ""], &all).0.include, Cidrs::default(), "an empty flag is a value");

    let dns = |args: &[&str], env: &[(&str, &str)]| valid(args, env).0.dns != Dns::Off;
    assert!(dns(&[], &[("ISTIO_META_DNS_CAPTURE", "true")]));
    assert!(!dns(&["--redirect-dns=false"], &[("ISTIO_META_DNS_CAPTURE", "true")]));
    assert!(
        !dns(&[], &[("ISTIO_META_DNS_CAPTURE", "false"), ("REDIRECT_DNS", "true")]),
        "the alias is stronger"
    );
    assert!(valid(&[], &[("ISTIO_DUAL_STACK", "1"), ("DUAL_STACK", "0")]).1.dual_stack);
    assert!(valid(&[], &[("INVALID_DROP", "1"), ("DROP_INVALID", "0")]).1.drop_invalid);
    assert!(valid(&[], &[("DROP_INVALID", "1")]).1.drop_invalid);
    assert!(valid(&[], &[("DUAL_STACK", "1")]).1.dual_stack);
}

#[test]
fn users_and_groups_follow_each_other() {
    let ids = |args: &[&str]| {
        let (config, ..) = valid(args, &[]);
        (config.proxy_uids, config.proxy_gids)
    };
    assert_eq!(ids(&["-u", ""]), (vec![1400], vec![1400]), "empty is the default");
    assert_eq!(
        ids(&["-u", "app"]),
        (vec![1000], vec![1001]),
        "the name, not the id, is looked up as a group"
    );
    assert_eq!(ids(&["-u", "1", "-g", ""]), (vec![1], vec![1]));
    assert_eq!(ids(&["-u", "1", "-g", ","]), (vec![1], vec![]), "a list of nothing is none");
    assert_eq!(ids(&["-u", ",", "-g", "2"]), (vec![], vec![2]));
    assert_eq!(ids(&["-u", "4294967294"]), (vec![4294967294], vec![4294967294]));
    let sixteen: Vec<String> = (1..=16).map(|id| id.to_string()).collect();
    assert_eq!(ids(&["-u", &sixteen.join(",")]).0.len(), 16);
}

#[test]
fn dns_capture() {
    let resolvers = |list: &[&str]| Dns::Resolvers(list.iter().map(|a| a.parse().expect(a)).collect());
    let dns = |args: &[&str], resolv_conf| {
        let (config, _, notes) =
            outcome(args, &[], &NamesOfPod { resolv_conf, ..NamesOfPod::default() }).expect("valid");
        (config.dns, notes.iter().map(Note::to_string).collect::<Vec<_>>().join("\n"))
    };
    let both = Some("nameserver fd00::a\nnameserver 10.96.0.10\n");
    assert_eq!(dns(&["--redirect-dns"], both), (resolvers(&["10.96.0.10", "fd00::a"]), String::new()));
    assert_eq!(dns(&[], both), (Dns::Off, String::new()));
    assert_eq!(
        dns(&["--redirect-dns", "--capture-all-dns"], None),
        (Dns::All, String::new()),
        "the file is not read"
    );
    let (config, notes) = dns(&["--capture-all-dns"], both);
    assert_eq!(config, Dns::Off);
    assert!(notes.contains("--capture-all-dns: nothing to do"), "{notes}");
    let (config, notes) = dns(&["--redirect-dns"], Some("search a.example\nnameserver b.example\n"));
    assert_eq!(config, Dns::Off);
    assert!(notes.contains("`b.example`") && notes.contains("lists no server"), "{notes}");

    let servers = ["--redirect-dns", "--dns-servers", "fd00::b, 127.0.0.1,fd00::b"];
    assert_eq!(dns(&servers, None), (resolvers(&["127.0.0.1", "fd00::b"]), String::new()));
    let captured = ["--redirect-dns", "--dns-capture-port", "8600", "--dns-over-udp-only"];
    let (config, ..) = valid(&captured, &[]);
    assert_eq!((config.dns_port, config.dns_over_udp_only), (8600, true));
    // They mean nothing without DNS capture.
    assert_eq!(valid(&captured[1..], &[]).0, base());

    let file = tempfile::NamedTempFile::new().expect("a file");
    std::fs::write(file.path(), "nameserver 9.9.9.9\n").expect("written");
    let path = file.path().to_str().expect("UTF-8");
    assert_eq!(dns(&["--redirect-dns", "--resolv-conf", path], both).0, resolvers(&["9.9.9.9"]));
}

#[test]
fn what_changes_nothing_is_said() {
    for (args, env, note) in [
        (
            &["--drop-invalid"] as &[&str],
            None,
            "--drop-invalid: nothing to do, because no connection tracking",
        ),
        (&[], Some(("INVALID_DROP", "true")), "environment variable INVALID_DROP: nothing to do"),
        (&["--dual-stack"], None, "--dual-stack: nothing to do, because both address families"),
        (&["--native-nftables"], None, "--native-nftables: nothing to do, because no netfilter"),
        (
            &["--force-iptables-binary=iptables-nft"],
            None,
            "--force-iptables-binary: nothing to do, because iptables",
        ),
        (
            &["-d", "15020"],
            None,
            "-d/--istio-local-exclude-ports: nothing to do, because it applies to -b '*' only",
        ),
        (&["-b", "80", "-d", "15020"], None, "-d/--istio-local-exclude-ports: nothing to do"),
    ] {
        let (config, _, notes) = valid(args, env.as_slice());
        assert!(notes.len() == 1 && notes[0].starts_with(note), "{args:?} {env:?}: {notes:?}");
        assert!(config.inbound_exclude.is_empty(), "{args:?}");
    }
    let (config, _, notes) = valid(&["-b", "*", "-d", "15020,15021"], &[]);
    assert_eq!((config.inbound_exclude, notes.len()), (ports(&[15020, 15021]), 0));
}

#[test]
fn a_switch_takes_no_separate_value() {
    let error = raw(&["--redirect-dns", "false"], &[]).expect_err("not a value of the switch");
    assert_eq!(error.exit_code(), 2);
    assert!(!valid(&["-nq80", "-n=false"], &[]).1.dry_run);
}

#[test]
fn the_command_line_of_an_init_container() {
    let args = [
        "-p",
        "15001",
        "-z",
        "15006",
        "-u",
        "1337",
        "-m",
        "REDIRECT",
        "-i",
        "*",
        "-x",
        "",
        "-b",
        "*",
        "-d",
        "15090,15021,15020",
        "--log_output_level=default:info",
        "--log_as_json",
    ];
    let (config, switches, notes) = valid(&args, &[("ISTIO_META_DNS_CAPTURE", "true")]);
    let expected = Config {
        include: Cidrs { all: true, ..Cidrs::default() },
        inbound_ports: InboundPorts::All,
        inbound_exclude: ports(&[15020, 15021, 15090]),
        dns: Dns::Resolvers(vec!["10.96.0.10".parse().expect("address")]),
        ..Config::default()
    };
    assert_eq!(config, expected);
    assert!(notes.len() == 2 && notes.iter().all(|note| note.starts_with("--log_")), "{notes:?}");
    assert_eq!(switches.log_output_level.as_deref(), Some("default:info"));
    assert!(switches.log_as_json);
}

#[test]
fn other_executables_are_vouched_for_by_name() {
    let accelerated = |args: &[&str]| valid(args, &[]).0.accelerate;
    assert_eq!(accelerated(&["--accelerate-proxies", "mine"]), [""; 0], "not asked for");
    assert_eq!(accelerated(&["--accelerate", "--accelerate-proxies", "mine,envoy,mine"]), ["envoy", "mine"]);
}

/// The help names every flag and every variable once, with a default.
#[test]
fn help_is_complete() {
    CaptureCli::command().debug_assert();
    // Where lines break depends on the terminal.
    let help = CaptureCli::command().render_help().to_string();
    let help = help.split_whitespace().collect::<Vec<_>>().join(" ");
    for variable in [
        "ENVOY_PORT",
        "ISTIO_META_DNS_CAPTURE, REDIRECT_DNS",
        "INVALID_DROP, DROP_INVALID",
        "ISTIO_DUAL_STACK, DUAL_STACK",
        "ISTIO_OUTBOUND_OWNER_GROUPS ",
        "ISTIO_OUTBOUND_OWNER_GROUPS_EXCLUDE ",
        "ISTIO_OUTBOUND_IPV4_LOOPBACK_CIDR",
        "ENVOY_USER ",
    ] {
        assert!(help.contains(variable), "{variable} in {help}");
    }
    let command = CaptureCli::command();
    let flags: Vec<_> = command.get_arguments().filter(|arg| arg.get_id() != "help").collect();
    assert_eq!(flags.len(), 49);
    for flag in flags {
        let text = flag.get_help().expect("help").to_string();
        let long = flag.get_long().expect("a long flag");
        assert!(text.contains("[default: "), "{long}: {text}");
        if !long.starts_with("log_") {
            assert!(text.contains(&long.replace('-', "_").to_uppercase()), "{long}: {text}");
        }
    }
}
