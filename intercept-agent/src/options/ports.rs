//! A set of ports, as lists of ports and of iptables' `low:high` ranges give it.

use std::fmt;
use std::ops::RangeInclusive;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use super::OptionProblem;

/// A set of ports from 1 to 65535. Kept as ranges that neither touch nor overlap, in ascending order.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Ports {
    ranges: Vec<RangeInclusive<u16>>,
}

impl Ports {
    /// Whether no port is in the set.
    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    /// Whether `port` is in the set.
    pub fn contains(&self, port: u16) -> bool {
        self.ranges.iter().any(|range| range.contains(&port))
    }

    /// The ranges, ascending; a single port is a range of one.
    pub fn ranges(&self) -> &[RangeInclusive<u16>] {
        &self.ranges
    }

    /// One item of a list: `80`, `8000:9000`, `:1024` or `9000:`, as iptables' `--dport` takes it.
    pub(super) fn parse_item(item: &str) -> Result<RangeInclusive<u16>, OptionProblem> {
        let Some((low, high)) = item.split_once(':') else {
            let port = parse_port(item)?;
            return Ok(port..=port);
        };
        let bound = |text: &str, open: u16| if text.is_empty() { Ok(open) } else { parse_bound(text) };
        // No packet has port 0, so a range that starts there starts at 1.
        let (low, high) = (bound(low, 1)?.max(1), bound(high, u16::MAX)?);
        if low > high { Err(OptionProblem::PortRange) } else { Ok(low..=high) }
    }
}

/// One port, decimal. iptables would also read `010` as octal and `http` as a service; neither is meant.
pub(super) fn parse_port(text: &str) -> Result<u16, OptionProblem> {
    match parse_bound(text)? {
        0 => Err(OptionProblem::Port),
        port => Ok(port),
    }
}

fn parse_bound(text: &str) -> Result<u16, OptionProblem> {
    super::go_syntax::parse_decimal(text)
        .and_then(|number| u16::try_from(number).ok())
        .ok_or(OptionProblem::Port)
}

impl FromIterator<RangeInclusive<u16>> for Ports {
    fn from_iter<T: IntoIterator<Item = RangeInclusive<u16>>>(iter: T) -> Self {
        let mut given: Vec<_> = iter.into_iter().filter(|range| !range.is_empty()).collect();
        given.sort_by_key(|range| *range.start());
        let mut ranges: Vec<RangeInclusive<u16>> = Vec::new();
        for range in given {
            match ranges.last_mut() {
                Some(last) if u32::from(*range.start()) <= u32::from(*last.end()) + 1 => {
                    *last = *last.start()..=*last.end().max(range.end());
                }
                _ => ranges.push(range),
            }
        }
        Self { ranges }
    }
}

impl FromIterator<u16> for Ports {
    fn from_iter<T: IntoIterator<Item = u16>>(iter: T) -> Self {
        iter.into_iter().map(|port| port..=port).collect()
    }
}

/// As an option's value: `80,8000:9000`.
impl fmt::Display for Ports {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, range) in self.ranges.iter().enumerate() {
            let comma = if index == 0 { "" } else { "," };
            if range.start() == range.end() {
                write!(f, "{comma}{}", range.start())?;
            } else {
                write!(f, "{comma}{}:{}", range.start(), range.end())?;
            }
        }
        Ok(())
    }
}

/// As a string, `"80,8000:9000"`: a range need not be spelt out.
impl Serialize for Ports {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Ports {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.split(',')
            .filter(|item| !item.is_empty())
            .map(|item| {
                Self::parse_item(item)
                    .map_err(|problem| de::Error::custom(format!("port `{item}`: {problem}")))
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ports(items: &[&str]) -> Ports {
        items.iter().map(|item| Ports::parse_item(item).expect(item)).collect()
    }

    #[test]
    fn merges_what_overlaps_or_touches() {
        for (items, shown, len) in [
            (&[] as &[&str], "", 0),
            (&["80"], "80", 1),
            (&["80", "80"], "80", 1),
            (&["82", "80", "81"], "80:82", 3),
            (&["8000:9000", "8500:8600"], "8000:9000", 1001),
            (&["8000:8100", "8050:8200"], "8000:8200", 201),
            (&["443", "80", "8000:8001"], "80,443,8000:8001", 4),
            (&[":2"], "1:2", 2),
            (&["0:2"], "1:2", 2),
            (&["65534:"], "65534:65535", 2),
            (&[":"], "1:65535", 65535),
            (&["65535", "1"], "1,65535", 2),
        ] {
            let set = ports(items);
            let contained = (0..=u16::MAX).filter(|port| set.contains(*port)).count();
            assert_eq!((set.to_string().as_str(), contained), (shown, len), "{items:?}");
            assert_eq!(set.is_empty(), len == 0, "{items:?}");
        }
    }

    #[test]
    fn contains_exactly_its_ports() {
        let set = ports(&["80", "8000:8010"]);
        let inside: Vec<u16> = (0..=u16::MAX).filter(|port| set.contains(*port)).collect();
        assert_eq!(inside, [vec![80], (8000..=8010).collect()].concat());
    }

    #[test]
    fn refuses_what_is_no_port() {
        for item in [
            "0",
            "0:0",
            "65536",
            "70000",
            "-1",
            "+80",
            "010",
            "0x50",
            "http",
            "80-90",
            "9000:8000",
            "*",
            "1:2:3",
        ] {
            assert!(Ports::parse_item(item).is_err(), "{item}");
        }
    }

    #[test]
    fn json_round_trip() {
        let set = ports(&["80", "8000:9000"]);
        let json = serde_json::to_string(&set).expect("serialises");
        assert_eq!(json, r#""80,8000:9000""#);
        assert_eq!(serde_json::from_str::<Ports>(&json).expect("parses"), set);
        assert!(serde_json::from_str::<Ports>(r#""70000""#).is_err());
    }
}
