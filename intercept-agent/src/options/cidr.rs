//! Address ranges as iptables' `-d` takes them.

use std::net::IpAddr;

use ipnet::IpNet;

use super::OptionProblem;
use super::go_syntax::parse_decimal;

/// `10.0.0.0/8`, `fd00::/8`, or an address alone (/32, /128). Host bits are kept: they are cleared by the
/// caller, who may first want to know which address was written.
pub(super) fn parse(text: &str) -> Result<IpNet, OptionProblem> {
    let (address, prefix) = match text.split_once('/') {
        Some((address, prefix)) => (address, Some(prefix)),
        None => (text, None),
    };
    let address: IpAddr = address.parse().map_err(|_| OptionProblem::Cidr)?;
    let Some(prefix) = prefix else { return Ok(IpNet::from(address)) };
    let prefix = parse_decimal(prefix).and_then(|bits| u8::try_from(bits).ok()).ok_or(OptionProblem::Cidr)?;
    IpNet::new(address, prefix).map_err(|_| OptionProblem::Cidr)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_iptables_reads() {
        for (text, network) in [
            ("10.0.0.0/8", "10.0.0.0/8"),
            ("10.1.2.3/8", "10.0.0.0/8"),
            ("10.1.2.3", "10.1.2.3/32"),
            ("0.0.0.0/0", "0.0.0.0/0"),
            ("fd00::1/8", "fd00::/8"),
            ("::1", "::1/128"),
            ("::/0", "::/0"),
        ] {
            assert_eq!(parse(text).expect(text).trunc().to_string(), network);
        }
    }

    #[test]
    fn refuses_the_rest() {
        for text in [
            "",
            "*",
            "10.0.0.0/33",
            "::/129",
            "10.0.0/8",
            "10.0.0.0/",
            "10.0.0.0/08",
            "10.0.0.0/+8",
            "10.0.0.0/255.0.0.0",
            "10.00.0.0/8",
            "fe80::1%eth0/64",
            "10.0.0.0/8/8",
            "/8",
            "10.0.0.0 /8",
            "localhost",
        ] {
            assert_eq!(parse(text), Err(OptionProblem::Cidr), "{text}");
        }
    }
}
