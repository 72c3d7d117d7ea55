//! The name of an interface, or the beginning of several names.

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use super::OptionProblem;

/// IFNAMSIZ without its terminating zero.
const MAX_LEN: usize = 15;

/// An interface as `-i` of iptables takes it: `eth0`, or `eth+` for every name that begins with `eth`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum InterfacePattern {
    /// This name.
    Exact(String),
    /// Every name that begins so; all of them when empty.
    Prefix(String),
}

impl InterfacePattern {
    /// Whether the interface called `name` is meant.
    pub fn matches(&self, name: &str) -> bool {
        match self {
            Self::Exact(exact) => name == exact,
            Self::Prefix(prefix) => name.starts_with(prefix.as_str()),
        }
    }

    /// `text` as iptables would take it, if the kernel can have an interface of that name (dev_valid_name).
    pub(super) fn parse(text: &str) -> Result<Self, OptionProblem> {
        let bad = |c: char| c == '/' || c == ':' || c.is_whitespace() || c.is_control();
        if text.is_empty() || text.len() > MAX_LEN || matches!(text, "." | "..") || text.contains(bad) {
            return Err(OptionProblem::InterfacePattern);
        }
        Ok(match text.strip_suffix('+') {
            Some(prefix) => Self::Prefix(prefix.to_owned()),
            None => Self::Exact(text.to_owned()),
        })
    }
}

impl fmt::Display for InterfacePattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exact(name) => f.write_str(name),
            Self::Prefix(prefix) => write!(f, "{prefix}+"),
        }
    }
}

/// As a string, `"eth+"`.
impl Serialize for InterfacePattern {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for InterfacePattern {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        Self::parse(&text).map_err(|problem| de::Error::custom(format!("interface `{text}`: {problem}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn matches_as_iptables_does() {
        for (pattern, name, expected) in [
            ("eth0", "eth0", true),
            ("eth0", "eth01", false),
            ("eth+", "eth0", true),
            ("eth+", "eth", true),
            ("eth+", "veth0", false),
            ("+", "anything", true),
            ("net1.5", "net1.5", true),
        ] {
            let parsed = InterfacePattern::parse(pattern).expect(pattern);
            assert_eq!(parsed.matches(name), expected, "{pattern} {name}");
            assert_eq!(parsed.to_string(), pattern);
        }
    }

    #[test]
    fn refuses_names_no_interface_can_have() {
        InterfacePattern::parse("abcdefghijklmno").expect("15 bytes are a name");
        for name in ["", "abcdefghijklmnop", "a/b", "a b", "a:b", ".", "..", "a\tb", "a\u{0}b"] {
            assert_eq!(InterfacePattern::parse(name), Err(OptionProblem::InterfacePattern), "{name:?}");
        }
    }
}
