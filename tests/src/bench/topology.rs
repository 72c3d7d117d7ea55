//! What is between the two pods.

use std::fmt::Write as _;
use std::io::Write as _;
use std::net::Ipv4Addr;
use std::process::Stdio;

use anyhow::{Context, Result, ensure};
use ipnet::{IpNet, Ipv4Net};

use crate::testbed::netlink::{RouteSpec, TABLE_MAIN};
use crate::testbed::{Namespace, Sandbox};

/// The path between the pods.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Topology {
    /// One veth pair.
    Veth,
    /// A node: two veth pairs and a namespace that forwards, with conntrack and the rules of kube-proxy.
    Node,
}

/// Services in the node's rules. Each has five rules.
const SERVICES: u8 = 80;

/// Connects two pods with these addresses. Returns the node's namespace, if there is one.
pub fn connect(
    topology: Topology,
    client: (&Namespace, &[Ipv4Addr]),
    server: (&Namespace, &[Ipv4Addr]),
) -> Result<Option<Sandbox>> {
    match topology {
        Topology::Veth => {
            client.0.veth("eth0", server.0, "eth0")?;
            for (pod, addresses) in [client, server] {
                add_addresses(pod, addresses, 24)?;
            }
            Ok(None)
        }
        Topology::Node => {
            let node = Sandbox::new("node")?;
            for ((pod, addresses), far) in [(client, "client"), (server, "server")] {
                pod.veth("eth0", &node.netns, far)?;
                add_addresses(pod, addresses, 26)?;
                let first = *addresses.first().context("a pod without addresses")?;
                // The network is a quarter of 10.66.0.0/24; the node has the first address in it.
                let network = Ipv4Net::new(first, 26)?.network();
                let gateway = Ipv4Addr::from(u32::from(network) + 1);
                node.netns.add_address(far, net(gateway, 26))?;
                pod.add_route(RouteSpec {
                    to: net(Ipv4Addr::UNSPECIFIED, 0),
                    via: Some(gateway.into()),
                    dev: Some("eth0"),
                    table: TABLE_MAIN,
                    local: false,
                })?;
            }
            node.netns.sysctl("net/ipv4/ip_forward", "1")?;
            load_rules(&node)?;
            Ok(Some(node))
        }
    }
}

fn add_addresses(pod: &Namespace, addresses: &[Ipv4Addr], length: u8) -> Result<()> {
    addresses.iter().try_for_each(|address| pod.add_address("eth0", net(*address, length)))
}

fn net(address: Ipv4Addr, length: u8) -> IpNet {
    Ipv4Net::new_assert(address, length).into()
}

fn load_rules(node: &Sandbox) -> Result<()> {
    let mut restore = node
        .command("iptables-nft-restore")?
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .context("starting iptables-nft-restore; is its package installed?")?;
    restore.stdin.take().context("no standard input")?.write_all(kube_proxy_rules().as_bytes())?;
    let output = restore.wait_with_output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "iptables-nft-restore refused the node's rules: {}", said.trim());
    Ok(())
}

/// The rules of kube-proxy in its iptables mode, for [`SERVICES`] services with one endpoint each. The first packet of
/// a connection passes the nat table; every packet passes conntrack and the chain FORWARD.
fn kube_proxy_rules() -> String {
    let mut chains = String::new();
    let mut rules = String::new();
    for n in 0..SERVICES {
        let (service, endpoint) = (format!("10.96.0.{n}"), format!("10.67.0.{n}"));
        write!(
            chains,
            ":KUBE-SVC-{n} - [0:0]\n\
             :KUBE-SEP-{n} - [0:0]\n"
        )
        .expect("strings take everything");
        write!(
            rules,
            "-A KUBE-SERVICES -d {service}/32 -p tcp -m tcp --dport 80 -j KUBE-SVC-{n}\n\
             -A KUBE-SVC-{n} ! -s 10.66.0.0/15 -d {service}/32 -p tcp -m tcp --dport 80 -j KUBE-MARK-MASQ\n\
             -A KUBE-SVC-{n} -j KUBE-SEP-{n}\n\
             -A KUBE-SEP-{n} -s {endpoint}/32 -j KUBE-MARK-MASQ\n\
             -A KUBE-SEP-{n} -p tcp -m tcp -j DNAT --to-destination {endpoint}:8080\n"
        )
        .expect("strings take everything");
    }
    format!(
        "*nat\n\
         :KUBE-SERVICES - [0:0]\n:KUBE-POSTROUTING - [0:0]\n:KUBE-MARK-MASQ - [0:0]\n{chains}\
         -A PREROUTING -j KUBE-SERVICES\n\
         -A OUTPUT -j KUBE-SERVICES\n\
         -A POSTROUTING -j KUBE-POSTROUTING\n\
         -A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000\n\
         -A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN\n\
         -A KUBE-POSTROUTING -j MARK --set-xmark 0x4000/0x0\n\
         -A KUBE-POSTROUTING -j MASQUERADE --random-fully\n\
         {rules}COMMIT\n\
         *filter\n\
         :KUBE-FORWARD - [0:0]\n:KUBE-SERVICES - [0:0]\n:KUBE-PROXY-FIREWALL - [0:0]\n:KUBE-EXTERNAL-SERVICES - [0:0]\n\
         -A FORWARD -m conntrack --ctstate NEW -j KUBE-PROXY-FIREWALL\n\
         -A FORWARD -j KUBE-FORWARD\n\
         -A FORWARD -m conntrack --ctstate NEW -j KUBE-SERVICES\n\
         -A FORWARD -m conntrack --ctstate NEW -j KUBE-EXTERNAL-SERVICES\n\
         -A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP\n\
         -A KUBE-FORWARD -m mark --mark 0x4000/0x4000 -j ACCEPT\n\
         -A KUBE-FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT\n\
         COMMIT\n"
    )
}
