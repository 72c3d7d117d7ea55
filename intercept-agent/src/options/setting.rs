//! What a row of the table of settings consists of.

use std::fmt::{self, Display};

use super::reader::{OptionReader, ReadOptions};
use super::render::joined;
use super::{Config, OptionError};

/// One setting of istio-iptables: a flag, variables, or both.
pub struct Setting {
    /// The long flag; absent where istio-iptables has a variable only.
    pub(super) flag: Option<&'static str>,
    /// The short flag.
    pub(super) letter: Option<char>,
    /// The variables, the strongest first.
    pub(super) variables: &'static [&'static str],
    /// What its value is called in the help; nothing for a switch.
    pub(super) takes: Option<&'static str>,
    /// The value that counts when neither flag nor variable is given, or what it is in words.
    pub(super) default: &'static str,
    /// One line of help.
    pub(super) help: &'static str,
    /// What whoever gives it is told, because it does not do here what it does in istio-iptables.
    pub(super) note: Option<&'static str>,
    /// The field that it is for.
    pub(super) binding: FieldBinding,
}

/// The two ways between a setting and the field that it is for.
#[derive(Clone, Copy)]
pub(super) struct FieldBinding {
    /// Sets the field from what was given, or to the default.
    pub(super) read: fn(&mut OptionReader<'_>, &'static Setting, &mut ReadOptions) -> Result<(), OptionError>,
    /// What gives the field its value, from a policy and the default one.
    pub(super) write: fn(&Config, &Config) -> Written,
}

impl FieldBinding {
    /// Of a setting that another one's row looks at. It is not written either.
    pub(super) const READ_BY_ANOTHER: Self = Self { read: |_, _, _| Ok(()), write: |_, _| Written::Nothing };
}

/// How a setting stands in a command line that gives a policy.
pub(super) enum Written {
    /// Not at all: the default is meant.
    Nothing,
    /// Without a value.
    Switch,
    /// With this value.
    Value(String),
}

impl Written {
    pub(super) fn switch(on: bool) -> Self {
        if on { Self::Switch } else { Self::Nothing }
    }

    pub(super) fn unless_empty(value: String) -> Self {
        if value.is_empty() { Self::Nothing } else { Self::Value(value) }
    }

    pub(super) fn differing<T: Display + PartialEq>(value: &T, default: &T) -> Self {
        if value == default { Self::Nothing } else { Self::Value(value.to_string()) }
    }

    /// A list that must not vanish when it is empty: nothing at all would mean the default.
    pub(super) fn of_ids(ids: &[u32]) -> Self {
        Self::Value(if ids.is_empty() { ",".to_owned() } else { joined(ids) })
    }
}

/// A row of the table as far as it is written: a [`Setting`] once it is bound to a field.
pub(super) struct UnboundSetting(Setting);

/// A setting with a flag that takes a value.
pub(super) const fn flag(name: &'static str) -> UnboundSetting {
    UnboundSetting(Setting { flag: Some(name), ..UNNAMED })
}

/// A setting with a flag that is true or false.
pub(super) const fn switch_flag(name: &'static str) -> UnboundSetting {
    UnboundSetting(Setting { flag: Some(name), default: "false", ..UNNAMED })
}

/// A setting without a flag.
pub(super) const fn variable(names: &'static [&'static str]) -> UnboundSetting {
    UnboundSetting(Setting { variables: names, ..UNNAMED })
}

const UNNAMED: Setting = Setting {
    flag: None,
    letter: None,
    variables: &[],
    takes: None,
    default: "none",
    help: "",
    note: None,
    binding: FieldBinding::READ_BY_ANOTHER,
};

impl UnboundSetting {
    pub(super) const fn letter(self, letter: char) -> Self {
        Self(Setting { letter: Some(letter), ..self.0 })
    }

    pub(super) const fn variables(self, variables: &'static [&'static str]) -> Self {
        Self(Setting { variables, ..self.0 })
    }

    pub(super) const fn takes(self, name: &'static str) -> Self {
        Self(Setting { takes: Some(name), ..self.0 })
    }

    pub(super) const fn default(self, default: &'static str) -> Self {
        Self(Setting { default, ..self.0 })
    }

    pub(super) const fn help(self, help: &'static str) -> Self {
        Self(Setting { help, ..self.0 })
    }

    pub(super) const fn note(self, note: &'static str) -> Self {
        Self(Setting { note: Some(note), ..self.0 })
    }

    pub(super) const fn bound(self, binding: FieldBinding) -> Setting {
        Setting { binding, ..self.0 }
    }
}

/// A setting is its flag, or its first variable where it has none.
impl PartialEq for Setting {
    fn eq(&self, other: &Self) -> bool {
        (self.flag, self.variables) == (other.flag, other.variables)
    }
}

impl Eq for Setting {}

impl fmt::Debug for Setting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Setting({self})")
    }
}

impl Display for Setting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.letter, self.flag) {
            (Some(letter), Some(flag)) => write!(f, "-{letter}/--{flag}"),
            (None, Some(flag)) => write!(f, "--{flag}"),
            (_, None) => f.write_str(self.variables.first().copied().unwrap_or_default()),
        }
    }
}

/// Where a value came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SettingOrigin {
    /// The flag.
    Flag(&'static Setting),
    /// The variable of this name.
    Variable(&'static str),
    /// Neither was given, and the default does not do.
    Default(&'static Setting),
}

impl Display for SettingOrigin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Flag(setting) | Self::Default(setting) => setting.fmt(f),
            Self::Variable(name) => write!(f, "environment variable {name}"),
        }
    }
}
