//! What is refused, and how the refusal reads.

use intercept_agent::facade::options::OptionError;

use crate::pod::{NamesOfPod, outcome};

type Variables<'a> = &'a [(&'a str, &'a str)];

/// Each refusal names the option, the value at fault and a way out, and nothing else is at fault in its row.
#[test]
fn refusals() {
    let many = |count: u32| (1..=count).map(|id| id.to_string()).collect::<Vec<_>>().join(",");
    let (seventeen, sixty_five) = (many(17), many(65));
    let by_flag: &[(&str, &str, &str, &str)] = &[
        ("--envoy-port", "0", "`0`", "from 1 to 65535"),
        ("--accelerate-proxies", "envoy,/usr/bin/envoy", "`/usr/bin/envoy`", "last part of its path"),
        (
            "--accelerate-proxies",
            "a-name-that-is-too-long-for-the-map",
            "`a-name-that-is-too-long-for-the-map`",
            "31 bytes",
        ),
        ("--proxy-cgroup", "/cg/proxy,cg/other", "`cg/other`", "below the pod's"),
        ("--proxy-container", "istio-proxy,Proxy", "`Proxy`", "name of a container"),
        ("--exempt-cgroup", "init", "`init`", "absolute path"),
        ("--envoy-port", "70000", "`70000`", "from 1 to 65535"),
        ("--envoy-port", "", "``", "from 1 to 65535"),
        ("--envoy-port", "http", "`http`", "from 1 to 65535"),
        ("--envoy-port", "15001:15002", "`15001:15002`", "from 1 to 65535"),
        ("--inbound-capture-port", "-1", "`-1`", "from 1 to 65535"),
        ("--inbound-tunnel-port", "+80", "`+80`", "from 1 to 65535"),
        ("--iptables-probe-port", "65536", "`65536`", "from 1 to 65535"),
        ("--istio-inbound-ports", "80,0,81", "`0`", "from 1 to 65535"),
        ("--istio-inbound-ports", "80,*", "`*`", "stands alone in -b"),
        ("--istio-inbound-ports", "90:80", "`90:80`", "lower port first"),
        ("--istio-local-exclude-ports", "*", "`*`", "stands alone in -b"),
        ("--istio-outbound-ports", "*", "`*`", "stands alone in -b"),
        ("--istio-outbound-ports", "70000", "`70000`", "from 1 to 65535"),
        ("--istio-local-outbound-ports-exclude", "dns", "`dns`", "from 1 to 65535"),
        ("--istio-service-cidr", "10.0.0.0/8,*", "`*`", "without it"),
        ("--istio-service-cidr", "10.0.0.0/33", "`10.0.0.0/33`", "10.0.0.0/8"),
        ("--istio-service-cidr", "example.com", "`example.com`", "10.0.0.0/8"),
        ("--istio-service-exclude-cidr", "*", "`*`", "leave -i empty"),
        ("--istio-service-exclude-cidr", "::/0,*", "`*`", "leave -i empty"),
        ("--istio-service-exclude-cidr", "10.0.0.0.0/8", "`10.0.0.0.0/8`", "10.0.0.0/8"),
        ("--istio-inbound-interception-mode", "FOO", "`FOO`", "REDIRECT or TPROXY"),
        ("--istio-inbound-interception-mode", "tproxy", "`tproxy`", "in capitals"),
        ("--istio-inbound-tproxy-mark", "0", "`0`", "from 1 to 4294967295"),
        ("--istio-inbound-tproxy-mark", "1337/0xff", "`1337/0xff`", "from 1 to 4294967295"),
        ("--istio-inbound-tproxy-mark", "0x", "`0x`", "from 1 to 4294967295"),
        ("--istio-inbound-tproxy-mark", "0x+1", "`0x+1`", "from 1 to 4294967295"),
        ("--istio-inbound-tproxy-route-table", "0", "`0`", "253 to 255"),
        ("--istio-inbound-tproxy-route-table", "255", "`255`", "253 to 255"),
        ("--istio-inbound-tproxy-route-table", "main", "`main`", "253 to 255"),
        ("--proxy-uid", "nobody-here", "`nobody-here`", "/etc/passwd"),
        ("--proxy-uid", "4294967295", "`4294967295`", "/etc/passwd"),
        ("--proxy-uid", "-1", "`-1`", "/etc/passwd"),
        ("--proxy-uid", "1000-1010", "`1000-1010`", "one by one"),
        ("--proxy-uid", "unreadable", "`unreadable`", "give the numeric id"),
        ("--proxy-uid", ",", "`,`", "its own traffic"),
        ("--proxy-uid", &seventeen, "17 ids", "room for 16"),
        ("--proxy-gid", "app,nobody-here", "`nobody-here`", "/etc/group"),
        ("--proxy-gid", &seventeen, "17 ids", "room for 16"),
        ("--istio-exclude-interfaces", "eth0,a/b", "`a/b`", "1 to 15 bytes"),
        ("--istio-exclude-interfaces", "abcdefghijklmnop", "`abcdefghijklmnop`", "1 to 15 bytes"),
        ("--kube-virt-interfaces", "a b", "`a b`", "1 to 15 bytes"),
        ("--probe-timeout", "5", "`5`", "5s, 1m30s"),
        ("--probe-timeout", "0", "`0`", "5s, 1m30s"),
        ("--probe-timeout", "-5s", "`-5s`", "5s, 1m30s"),
        ("--dry-run", "yes", "`yes`", "give true, false"),
        ("--redirect-dns", "", "``", "give true, false"),
    ];
    for (flag, value, at_fault, way_out) in by_flag {
        let error =
            outcome(&[&format!("{flag}={value}")], &[], &NamesOfPod::default()).expect_err(value).to_string();
        for part in [flag, at_fault, way_out] {
            assert!(error.contains(part), "{flag}={value}: no `{part}` in: {error}");
        }
    }
    let by_variable: &[(Variables<'_>, &str, &str)] = &[
        (&[("ENVOY_PORT", "x")], "ENVOY_PORT: `x`", "from 1 to 65535"),
        (&[("ISTIO_DUAL_STACK", "yes")], "ISTIO_DUAL_STACK: `yes`", "give true, false"),
        (&[("ISTIO_OUTBOUND_OWNER_GROUPS", "1,*")], "ISTIO_OUTBOUND_OWNER_GROUPS: `*`", "without it"),
        (&[("ISTIO_OUTBOUND_OWNER_GROUPS", "x")], "ISTIO_OUTBOUND_OWNER_GROUPS: `x`", "/etc/group"),
        (&[("ISTIO_OUTBOUND_OWNER_GROUPS", "1-5")], "ISTIO_OUTBOUND_OWNER_GROUPS: `1-5`", "one by one"),
        (&[("ISTIO_OUTBOUND_OWNER_GROUPS", &sixty_five)], "ISTIO_OUTBOUND_OWNER_GROUPS: ", "room for 64"),
        (&[("ISTIO_OUTBOUND_OWNER_GROUPS_EXCLUDE", &sixty_five)], "GROUPS_EXCLUDE: ", "room for 64"),
        (
            &[("ISTIO_OUTBOUND_OWNER_GROUPS", "1"), ("ISTIO_OUTBOUND_OWNER_GROUPS_EXCLUDE", "2")],
            "ISTIO_OUTBOUND_OWNER_GROUPS_EXCLUDE: `2`",
            "keep one of the two",
        ),
        (&[("ISTIO_OUTBOUND_IPV4_LOOPBACK_CIDR", "127.0.0.0/7")], "`127.0.0.0/7`", "from 8 to 32"),
        (&[("ISTIO_OUTBOUND_IPV4_LOOPBACK_CIDR", "10.0.0.0/8")], "`10.0.0.0/8`", "from 8 to 32"),
        (&[("ISTIO_OUTBOUND_IPV4_LOOPBACK_CIDR", "::1/128")], "`::1/128`", "from 8 to 32"),
        (&[("ENVOY_USER", "unreadable")], "ENVOY_USER: `unreadable`", "give the numeric id"),
        (
            &[("REDIRECT_DNS", "1"), ("RESOLV_CONF", "/nonexistent")],
            "RESOLV_CONF: `/nonexistent`",
            "--resolv-conf",
        ),
    ];
    for (args, way_out) in [
        (["--redirect-dns", "--dns-servers", "dns.example"], "write it as 10.96.0.10"),
        (["--redirect-dns", "--dns-capture-port", "0"], "from 1 to 65535"),
        (["--redirect-dns", "--exclude-inbound-cidr", "*"], "list the ranges to exclude"),
    ] {
        let error = outcome(&args, &[], &NamesOfPod::default()).expect_err(args[1]).to_string();
        assert!(error.starts_with(args[1]) && error.contains(way_out), "{error}");
    }
    for (env, at_fault, way_out) in by_variable {
        let error = outcome(&[], env, &NamesOfPod::default()).expect_err(at_fault).to_string();
        for part in [at_fault, way_out] {
            assert!(error.contains(part), "{env:?}: no `{part}` in: {error}");
        }
    }
    let no_file = NamesOfPod { resolv_conf: None, ..NamesOfPod::default() };
    let error = outcome(&["--redirect-dns"], &[], &no_file).expect_err("no resolv.conf").to_string();
    assert!(error.starts_with("--resolv-conf: `/etc/resolv.conf` cannot be read"), "{error}");
    let servers = |count: usize| -> &'static str {
        (0..count).map(|n| format!("nameserver 10.0.0.{n}\n")).collect::<String>().leak()
    };
    let listing = |count| NamesOfPod { resolv_conf: Some(servers(count)), ..NamesOfPod::default() };
    outcome(&["--redirect-dns"], &[], &listing(64)).expect("as many as there is room for");
    let error = outcome(&["--redirect-dns"], &[], &listing(65)).expect_err("too many").to_string();
    assert!(error.contains("lists 65 servers, and there is room for 64"), "{error}");
    assert_eq!(OptionError::EXIT_CODE, 2);
}

/// Whatever the order in which they are given.
#[test]
fn of_several_options_at_fault_the_first_of_the_help_is_named() {
    for args in [["-p", "0", "-i", "x"], ["-i", "x", "-p", "0"]] {
        let error = outcome(&args, &[], &NamesOfPod::default()).expect_err("both are at fault").to_string();
        assert!(error.starts_with("-p/--envoy-port: "), "{error}");
    }
}
