//! From the options as given to a policy that is known to be sound.

use std::collections::BTreeSet;
use std::fmt;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use intercept_common::{NetnsCookie, acceleration::ProxyName};
use ipnet::IpNet;

use super::config::{DEFAULT_DNS_PORT, Nameless};
use super::ports::parse_port;
use super::setting::{Setting, SettingOrigin};
use super::values::parse_id;
use super::{
    Cidrs, Config, Dns, InboundPorts, InterfacePattern, MAX_OWNER_GROUPS, MAX_PROXY_IDS, MAX_RESOLVERS,
    NameSource, OptionError, OptionProblem, OwnerGroups, Ports, RawOptions, RunOptions, cidr, go_syntax,
    names, resolv_conf, table,
};

/// An option that was accepted and changes nothing, or not what it may seem to, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Note {
    /// The flag or the variable.
    pub origin: SettingOrigin,
    /// Why.
    pub why: String,
}

impl fmt::Display for Note {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.origin, self.why)
    }
}

impl RawOptions {
    /// Checks every option and gives what they say, with the names of users, groups and servers looked up in
    /// `names`. Of several options at fault, the first in the order of the help is the error; nothing is changed
    /// anywhere.
    pub fn validate(&self, names: &dyn NameSource) -> Result<(Config, RunOptions, Vec<Note>), OptionError> {
        let mut reader = OptionReader { raw: self, names, notes: Vec::new() };
        let mut options = ReadOptions { config: Config::unread(), run: RunOptions::unread() };
        for setting in table::ALL {
            (setting.binding.read)(&mut reader, setting, &mut options)?;
        }
        Ok((options.config, options.run, reader.notes))
    }

    /// Whether shadow mode is on. The other options are not checked, so that this needs no names.
    pub fn is_shadow(&self) -> Result<bool, OptionError> {
        OptionReader { raw: self, names: &Nameless, notes: Vec::new() }.switch(&table::SHADOW)
    }
}

/// What the rows of the table have read so far.
pub(super) struct ReadOptions {
    pub(super) config: Config,
    pub(super) run: RunOptions,
}

/// Reads settings for the rows of the table.
pub(super) struct OptionReader<'a> {
    raw: &'a RawOptions,
    names: &'a dyn NameSource,
    notes: Vec<Note>,
}

impl<'a> OptionReader<'a> {
    pub(super) fn proxy_uids(&mut self, config: &mut Config) -> Result<(), OptionError> {
        config.proxy_uids = match self.text(&table::PROXY_UID) {
            Some((origin, list)) => self.proxy_id_list(origin, list, Self::user)?,
            None => vec![self.envoy_user()?],
        };
        Ok(())
    }

    /// Without -g, the text of -u names the groups too, as in istio.
    pub(super) fn proxy_gids(&mut self, config: &mut Config) -> Result<(), OptionError> {
        let uids = self.text(&table::PROXY_UID);
        config.proxy_gids = match self.text(&table::PROXY_GID).or(uids) {
            Some((origin, list)) => self.proxy_id_list(origin, list, Self::group)?,
            None => config.proxy_uids.clone(),
        };
        match uids {
            Some((origin, list)) if config.proxy_uids.is_empty() && config.proxy_gids.is_empty() => {
                Err(refuse(origin, list, OptionProblem::NoProxy))
            }
            _ => Ok(()),
        }
    }

    /// The ids of a list, each once: the first mention decides, and a second one never matches anything.
    fn proxy_id_list(
        &self,
        origin: SettingOrigin,
        list: &'a str,
        look_up: impl Fn(&Self, &str) -> Result<u32, OptionProblem>,
    ) -> Result<Vec<u32>, OptionError> {
        let mut ids = Vec::new();
        for item in items(list) {
            let id = look_up(self, item).map_err(|problem| refuse(origin, item, problem))?;
            if !ids.contains(&id) {
                ids.push(id);
            }
        }
        if ids.len() > MAX_PROXY_IDS {
            return Err(refuse(origin, list, OptionProblem::TooManyIds(ids.len())));
        }
        Ok(ids)
    }

    fn envoy_user(&mut self) -> Result<u32, OptionError> {
        let given = self.text(&table::ENVOY_USER);
        let (origin, name) = given.unwrap_or_else(|| default(&table::ENVOY_USER));
        let found = self.names.user(name).map_err(|error| refuse(origin, name, lookup(&error)))?;
        if found.is_none() && given.is_some() {
            self.note(&table::ENVOY_USER, format!("no user `{name}` in this pod, so the proxy's id is 1337"));
        }
        Ok(found.unwrap_or(1337))
    }

    fn user(&self, item: &str) -> Result<u32, OptionProblem> {
        parse_id(item, OptionProblem::User, |name| self.names.user(name))
    }

    fn group(&self, item: &str) -> Result<u32, OptionProblem> {
        parse_id(item, OptionProblem::Group, |name| self.names.group(name))
    }

    pub(super) fn inbound_ports(&mut self, setting: &'static Setting) -> Result<InboundPorts, OptionError> {
        match self.text(setting) {
            Some((_, "*")) => Ok(InboundPorts::All),
            _ => self.ports(setting).map(InboundPorts::Only),
        }
    }

    pub(super) fn inbound_exclude(
        &mut self,
        setting: &'static Setting,
        config: &mut Config,
    ) -> Result<(), OptionError> {
        let exclude = self.ports(setting)?;
        if config.inbound_ports == InboundPorts::All {
            config.inbound_exclude = exclude;
        } else if !exclude.is_empty() {
            self.note(setting, "nothing to do, because it applies to -b '*' only");
        }
        Ok(())
    }

    pub(super) fn ports(&mut self, setting: &'static Setting) -> Result<Ports, OptionError> {
        let item =
            |item: &str| if item == "*" { Err(OptionProblem::PortWildcard) } else { Ports::parse_item(item) };
        self.list(setting, item).map(Ports::from_iter)
    }

    pub(super) fn interfaces(
        &mut self,
        setting: &'static Setting,
    ) -> Result<Vec<InterfacePattern>, OptionError> {
        let mut interfaces = self.list(setting, InterfacePattern::parse)?;
        interfaces.sort_unstable();
        interfaces.dedup();
        if !interfaces.is_empty() {
            self.note_use(setting);
        }
        Ok(interfaces)
    }

    pub(super) fn cgroups(&mut self, setting: &'static Setting) -> Result<Vec<PathBuf>, OptionError> {
        let mut paths = self.list(setting, |item| match Path::new(item) {
            path if path.is_absolute() => Ok(path.to_owned()),
            _ => Err(OptionProblem::CgroupPath),
        })?;
        paths.sort_unstable();
        paths.dedup();
        Ok(paths)
    }

    pub(super) fn containers(&mut self, setting: &'static Setting) -> Result<Vec<String>, OptionError> {
        let is_sound = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit() || c == b'-';
        let mut names = self.list(setting, |item| match item {
            name if name.len() <= 63 && name.bytes().all(is_sound) => Ok(name.to_owned()),
            _ => Err(OptionProblem::ContainerName),
        })?;
        names.sort_unstable();
        names.dedup();
        Ok(names)
    }

    pub(super) fn include(&mut self, setting: &'static Setting) -> Result<Cidrs, OptionError> {
        if let Some((_, "*")) = self.text(setting) {
            return Ok(Cidrs { all: true, ..Cidrs::default() });
        }
        let written = self.list(setting, |item| match item {
            "*" => Err(OptionProblem::CidrWildcard),
            _ => cidr::parse(item),
        })?;
        let loopback = written.iter().any(|network| network.addr().is_loopback());
        Ok(Cidrs { all: false, list: canonical(written), loopback })
    }

    pub(super) fn exclude(&mut self, setting: &'static Setting) -> Result<Vec<IpNet>, OptionError> {
        let written = self.list(setting, |item| match item {
            "*" => Err(OptionProblem::ExcludeEverything),
            _ => cidr::parse(item),
        })?;
        Ok(canonical(written))
    }

    pub(super) fn owner_groups(&mut self, config: &mut Config) -> Result<(), OptionError> {
        let only = self.text(&table::OWNER_GROUPS).filter(|(_, list)| *list != "*");
        let except = self.text(&table::OWNER_GROUPS_EXCLUDE);
        config.owner_groups = match (only, except) {
            (Some(_), Some((origin, list))) => {
                return Err(refuse(origin, list, OptionProblem::ExcludeWithoutAll));
            }
            (Some((origin, list)), None) => {
                OwnerGroups::Only(self.group_set(origin, list)?.into_iter().collect())
            }
            (None, Some((origin, list))) => OwnerGroups::except(self.group_set(origin, list)?),
            (None, None) => OwnerGroups::All,
        };
        Ok(())
    }

    fn group_set(&self, origin: SettingOrigin, list: &str) -> Result<BTreeSet<u32>, OptionError> {
        let mut groups = BTreeSet::new();
        for item in items(list) {
            let group = if item == "*" { Err(OptionProblem::GroupWildcard) } else { self.group(item) };
            groups.insert(group.map_err(|problem| refuse(origin, item, problem))?);
        }
        if groups.len() > MAX_OWNER_GROUPS {
            return Err(refuse(origin, list, OptionProblem::TooManyGroups(groups.len())));
        }
        Ok(groups)
    }

    /// The names of the executables; none unless acceleration is asked for.
    pub(super) fn accelerate(
        &mut self,
        setting: &'static Setting,
        config: &mut Config,
    ) -> Result<(), OptionError> {
        let given = self.text(&table::ACCELERATE_PROXIES);
        let (origin, list) = given.unwrap_or_else(|| default(&table::ACCELERATE_PROXIES));
        let names = items(list).map(|name| match ProxyName::new(NetnsCookie::default(), name) {
            Some(_) => Ok(name.to_owned()),
            None => Err(refuse(origin, name, OptionProblem::Executable)),
        });
        let names = names.collect::<Result<BTreeSet<_>, _>>()?;
        if self.switch(setting)? {
            config.accelerate = names.into_iter().collect();
        }
        Ok(())
    }

    pub(super) fn dns(&mut self, setting: &'static Setting, config: &mut Config) -> Result<(), OptionError> {
        let redirect = self.switch(setting)?;
        let all = self.switch(&table::CAPTURE_ALL_DNS)?;
        config.dns = match (redirect, all) {
            (true, true) => Dns::All,
            (true, false) => self.resolvers()?,
            (false, true) => {
                self.note(&table::CAPTURE_ALL_DNS, "nothing to do, because it needs --redirect-dns");
                Dns::Off
            }
            (false, false) => Dns::Off,
        };
        Ok(())
    }

    /// The default without DNS capture, which makes the port meaningless.
    pub(super) fn dns_port(&self, setting: &'static Setting, config: &mut Config) -> Result<(), OptionError> {
        let given = self.value(setting, parse_port)?;
        config.dns_port = if config.dns == Dns::Off { DEFAULT_DNS_PORT } else { given };
        Ok(())
    }

    pub(super) fn dns_over_udp_only(
        &mut self,
        setting: &'static Setting,
        config: &mut Config,
    ) -> Result<(), OptionError> {
        config.dns_over_udp_only = self.switch(setting)? && config.dns != Dns::Off;
        Ok(())
    }

    fn resolvers(&mut self) -> Result<Dns, OptionError> {
        if let Some((origin, list)) = self.text(&table::DNS_SERVERS) {
            let servers = items(list).map(|item| {
                let address: Result<IpAddr, _> = item.parse();
                address.map_err(|_| refuse(origin, item, OptionProblem::Address))
            });
            let servers: BTreeSet<IpAddr> = servers.collect::<Result<_, _>>()?;
            return match servers.len() {
                0 => Ok(Dns::Off),
                1..=MAX_RESOLVERS => Ok(Dns::Resolvers(servers.into_iter().collect())),
                more => Err(refuse(origin, list, OptionProblem::TooManyServers(more))),
            };
        }
        let given = self.text(&table::RESOLV_CONF);
        let text = match given {
            Some((_, path)) => names::read_resolv_conf(path),
            None => self.names.resolv_conf(),
        };
        let (origin, path) =
            given.unwrap_or((SettingOrigin::Default(&table::RESOLV_CONF), "/etc/resolv.conf"));
        let text =
            text.map_err(|error| refuse(origin, path, OptionProblem::ResolvConf(error.to_string())))?;
        let servers = resolv_conf::parse(&text);
        for server in servers.unusable {
            self.note(
                &table::REDIRECT_DNS,
                format!("`{server}` in {path} is not an address and is left out"),
            );
        }
        if servers.addresses.is_empty() {
            let why =
                format!("nothing to do, because {path} lists no server; --capture-all-dns would need none");
            self.note(&table::REDIRECT_DNS, why);
            return Ok(Dns::Off);
        }
        if servers.addresses.len() > MAX_RESOLVERS {
            return Err(refuse(origin, path, OptionProblem::TooManyServers(servers.addresses.len())));
        }
        Ok(Dns::Resolvers(servers.addresses))
    }

    /// The value of a setting, unless it is empty.
    fn text(&self, setting: &'static Setting) -> Option<(SettingOrigin, &'a str)> {
        self.raw.get(setting).filter(|(_, value)| !value.is_empty())
    }

    /// Text that is given, with the setting's note.
    pub(super) fn noted_text(&mut self, setting: &'static Setting) -> Option<&'a str> {
        let (_, value) = self.text(setting)?;
        self.note_use(setting);
        Some(value)
    }

    pub(super) fn value<T>(
        &self,
        setting: &'static Setting,
        parse: impl Fn(&str) -> Result<T, OptionProblem>,
    ) -> Result<T, OptionError> {
        let (origin, value) = self.raw.get(setting).unwrap_or_else(|| default(setting));
        parse(value).map_err(|problem| refuse(origin, value, problem))
    }

    pub(super) fn switch(&mut self, setting: &'static Setting) -> Result<bool, OptionError> {
        let on = self.value(setting, |value| go_syntax::parse_bool(value).ok_or(OptionProblem::Bool))?;
        if on {
            self.note_use(setting);
        }
        Ok(on)
    }

    fn list<T>(
        &self,
        setting: &'static Setting,
        parse: impl Fn(&str) -> Result<T, OptionProblem>,
    ) -> Result<Vec<T>, OptionError> {
        let Some((origin, list)) = self.raw.get(setting) else { return Ok(Vec::new()) };
        items(list).map(|item| parse(item).map_err(|problem| refuse(origin, item, problem))).collect()
    }

    /// The note of the table, if it has one.
    fn note_use(&mut self, setting: &'static Setting) {
        if let Some(note) = setting.note {
            self.note(setting, note);
        }
    }

    fn note(&mut self, setting: &'static Setting, why: impl Into<String>) {
        let origin = self.raw.get(setting).map_or(SettingOrigin::Default(setting), |(origin, _)| origin);
        self.notes.push(Note { origin, why: why.into() });
    }
}

fn default(setting: &'static Setting) -> (SettingOrigin, &'static str) {
    (SettingOrigin::Default(setting), setting.default)
}

fn refuse(origin: SettingOrigin, value: &str, problem: OptionProblem) -> OptionError {
    OptionError { origin, value: value.to_owned(), problem }
}

fn lookup(error: &io::Error) -> OptionProblem {
    OptionProblem::Lookup(error.to_string())
}

/// The items of a list. Empty ones are skipped; space around one is none of it, as iptables-restore has it.
fn items(list: &str) -> impl Iterator<Item = &str> {
    list.split(',').map(str::trim).filter(|item| !item.is_empty())
}

fn canonical(written: Vec<IpNet>) -> Vec<IpNet> {
    let cleared: BTreeSet<IpNet> = written.iter().map(IpNet::trunc).collect();
    cleared.into_iter().collect()
}
