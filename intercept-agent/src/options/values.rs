//! Values of single options, from text.

use std::io;
use std::net::IpAddr;
use std::time::Duration;

use ipnet::{IpNet, Ipv4Net};

use super::{InboundMode, OptionProblem, cidr, go_syntax};

/// The ids of the tables default, main and local.
const KERNEL_TABLES: std::ops::RangeInclusive<u32> = 253..=255;

/// An id, or a name that `look_up` knows. The greatest id means "none" to the kernel.
pub(super) fn parse_id(
    item: &str,
    problem: OptionProblem,
    look_up: impl Fn(&str) -> io::Result<Option<u32>>,
) -> Result<u32, OptionProblem> {
    if let Some(id) = go_syntax::parse_decimal(item) {
        return if id == u32::MAX { Err(problem) } else { Ok(id) };
    }
    let number = |text: &str| go_syntax::parse_decimal(text).is_some();
    if item.split_once('-').is_some_and(|(low, high)| number(low) && number(high)) {
        return Err(OptionProblem::IdRange);
    }
    look_up(item).map_err(|error| OptionProblem::Lookup(error.to_string()))?.ok_or(problem)
}

pub(super) fn parse_mode(value: &str) -> Result<InboundMode, OptionProblem> {
    match value {
        "" | "REDIRECT" => Ok(InboundMode::Redirect),
        "TPROXY" => Ok(InboundMode::Tproxy),
        _ => Err(OptionProblem::Mode),
    }
}

/// A mark of 0 is what every unmarked packet has.
pub(super) fn parse_mark(value: &str) -> Result<u32, OptionProblem> {
    let hexadecimal = |digits: &str| {
        let digits = Some(digits).filter(|digits| digits.bytes().all(|byte| byte.is_ascii_hexdigit()))?;
        u32::from_str_radix(digits, 16).ok()
    };
    let mark = match value.strip_prefix("0x") {
        Some(digits) => hexadecimal(digits),
        None => go_syntax::parse_decimal(value),
    };
    mark.filter(|mark| *mark != 0).ok_or(OptionProblem::Mark)
}

pub(super) fn parse_table(value: &str) -> Result<u32, OptionProblem> {
    let table = go_syntax::parse_decimal(value);
    table.filter(|table| *table != 0 && !KERNEL_TABLES.contains(table)).ok_or(OptionProblem::Table)
}

pub(super) fn parse_timeout(value: &str) -> Result<Duration, OptionProblem> {
    go_syntax::parse_duration(value).filter(|timeout| !timeout.is_zero()).ok_or(OptionProblem::Duration)
}

pub(super) fn parse_loopback(value: &str) -> Result<Ipv4Net, OptionProblem> {
    match cidr::parse(value) {
        Ok(IpNet::V4(network)) if IpAddr::V4(network.addr()).is_loopback() && network.prefix_len() >= 8 => {
            Ok(network.trunc())
        }
        _ => Err(OptionProblem::Loopback),
    }
}
