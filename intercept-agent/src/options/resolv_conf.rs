//! The name servers of a resolv.conf.

use std::net::IpAddr;

/// What a resolv.conf says of servers.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Nameservers {
    /// The servers, sorted, each once. A scope (`fe80::1%eth0`) is dropped: no packet carries it.
    pub(super) addresses: Vec<IpAddr>,
    /// What stood behind `nameserver` and is no address.
    pub(super) unusable: Vec<String>,
}

/// Reads every `nameserver` line; unlike a C library, istio-iptables does not stop after three.
pub(super) fn parse(text: &str) -> Nameservers {
    let mut servers = Nameservers::default();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        if words.next() != Some("nameserver") {
            continue;
        }
        let Some(word) = words.next() else { continue };
        let address = word.split_once('%').map_or(word, |(address, _)| address);
        match address.parse() {
            Ok(address) => servers.addresses.push(address),
            Err(_) => servers.unusable.push(word.to_owned()),
        }
    }
    servers.addresses.sort_unstable();
    servers.addresses.dedup();
    servers
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_servers_of_both_families() {
        let text = "# nameserver 9.9.9.9\n;nameserver 9.9.9.9\nsearch nameserver.local\n\
                    nameserver 10.96.0.10\n\tnameserver\tfd00::a # the second\nnameserver fe80::1%eth0\n\
                    nameserver 10.96.0.10\nnameserver\nnameserver one.example\nnameservers 1.1.1.1\n\
                    nameserver: 1.1.1.1\noptions ndots:5\nnameserver 127.0.0.1\r\n";
        let servers = parse(text);
        let expected: Vec<IpAddr> =
            ["10.96.0.10", "127.0.0.1", "fd00::a", "fe80::1"].map(|a| a.parse().expect(a)).into();
        assert_eq!(servers.addresses, expected);
        assert_eq!(servers.unusable, ["one.example"]);
        assert_eq!(parse(""), Nameservers::default());
    }
}
