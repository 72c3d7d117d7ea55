//! From the options as given to a policy that is known to be sound.

use std::collections::BTreeSet;
use std::fmt;
use std::io;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use intercept_common::acceleration::ProxyName;
use ipnet::IpNet;

use super::setting::{self, Setting, SettingOrigin};
use super::{
    Cidrs, Config, Dns, InboundMode, InboundPorts, InterfacePattern, KNOWN_PROXY, MAX_OWNER_GROUPS,
    MAX_PROXY_IDS, MAX_RESOLVERS, NameSource, OptionError, OptionProblem, OwnerGroups, Ports, RawOptions,
    RunOptions, cidr, go_syntax, names, ports, resolv_conf,
};

/// The user whose id istio takes when `ENVOY_USER` is not there.
const ENVOY_USER: &str = "istio-proxy";
/// The ids of the tables default, main and local.
const KERNEL_TABLES: std::ops::RangeInclusive<u32> = 253..=255;

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
    /// `names`. The first option at fault is the error; nothing is changed anywhere.
    pub fn validate(&self, names: &dyn NameSource) -> Result<(Config, RunOptions, Vec<Note>), OptionError> {
        let mut reader = Reader { raw: self, names, notes: Vec::new() };
        let switches = reader.switches()?;
        let config = reader.config()?;
        Ok((config, switches, reader.notes))
    }
}

struct Reader<'a> {
    raw: &'a RawOptions,
    names: &'a dyn NameSource,
    notes: Vec<Note>,
}

impl<'a> Reader<'a> {
    fn config(&mut self) -> Result<Config, OptionError> {
        let default = Config::default();
        let (proxy_uids, proxy_gids) = self.proxy_ids()?;
        let (inbound_ports, inbound_exclude) = self.inbound_ports()?;
        Ok(Config {
            proxy_port: self.value(&setting::ENVOY_PORT, default.proxy_port, ports::parse_port)?,
            inbound_port: self.value(
                &setting::INBOUND_CAPTURE_PORT,
                default.inbound_port,
                ports::parse_port,
            )?,
            tunnel_port: self.value(&setting::INBOUND_TUNNEL_PORT, default.tunnel_port, ports::parse_port)?,
            proxy_uids,
            proxy_gids,
            mode: self.value(&setting::INBOUND_MODE, default.mode, parse_mode)?,
            tproxy_mark: self.value(&setting::TPROXY_MARK, default.tproxy_mark, parse_mark)?,
            tproxy_table: self.value(&setting::TPROXY_TABLE, default.tproxy_table, parse_table)?,
            inbound_ports,
            inbound_exclude,
            exclude_interfaces: self.interfaces(&setting::EXCLUDE_INTERFACES)?,
            virt_interfaces: self.virt_interfaces()?,
            include: self.include()?,
            exclude: self.exclude()?,
            outbound_ports: self.ports(&setting::OUTBOUND_PORTS)?,
            outbound_exclude_ports: self.ports(&setting::OUTBOUND_PORTS_EXCLUDE)?,
            owner_groups: self.owner_groups()?,
            loopback_v4: self.value(&setting::LOOPBACK_CIDR, default.loopback_v4, parse_loopback)?,
            dns: self.dns()?,
            open_without_proxy: self.switch(&setting::OPEN_WITHOUT_PROXY)?,
            without_ipv6: self.switch(&setting::WITHOUT_IPV6)?,
            accelerate: self.accelerate()?,
        })
    }

    fn switches(&mut self) -> Result<RunOptions, OptionError> {
        let default = RunOptions::default();
        let switches = RunOptions {
            dry_run: self.switch(&setting::DRY_RUN)?,
            skip_rule_apply: self.switch(&setting::SKIP_RULE_APPLY)?,
            run_validation: self.switch(&setting::RUN_VALIDATION)?,
            probe_port: self.value(&setting::PROBE_PORT, default.probe_port, ports::parse_port)?,
            probe_timeout: self.value(&setting::PROBE_TIMEOUT, default.probe_timeout, parse_timeout)?,
            cleanup_only: self.switch(&setting::CLEANUP_ONLY)?,
            reconcile: self.switch(&setting::RECONCILE)?,
            force_apply: self.switch(&setting::FORCE_APPLY)?,
            network_namespace: self.text(&setting::NETWORK_NAMESPACE).map(|(_, path)| PathBuf::from(path)),
            cni_mode: self.switch(&setting::CNI_MODE)?,
            dual_stack: self.switch(&setting::DUAL_STACK)?,
            drop_invalid: self.switch(&setting::DROP_INVALID)?,
            native_nftables: self.switch(&setting::NATIVE_NFTABLES)?,
            force_iptables_binary: self
                .text(&setting::FORCE_IPTABLES_BINARY)
                .map(|(_, name)| name.to_owned()),
            log_output_level: self.text(&setting::LOG_OUTPUT_LEVEL).map(|(_, levels)| levels.to_owned()),
            log_as_json: self.switch(&setting::LOG_AS_JSON)?,
        };
        for (set, setting, why) in [
            (
                switches.dual_stack,
                &setting::DUAL_STACK,
                "nothing to do, because both address families are captured unless --without-ipv6 says otherwise",
            ),
            (
                switches.drop_invalid,
                &setting::DROP_INVALID,
                "nothing to do, because no connection tracking is involved",
            ),
            (
                switches.native_nftables,
                &setting::NATIVE_NFTABLES,
                "nothing to do, because no netfilter rules are installed",
            ),
            (
                switches.force_iptables_binary.is_some(),
                &setting::FORCE_IPTABLES_BINARY,
                "nothing to do, because iptables is not called",
            ),
            (
                switches.reconcile,
                &setting::RECONCILE,
                "nothing to do, because what is in force and differs is always replaced, in one step",
            ),
            (
                switches.log_output_level.is_some(),
                &setting::LOG_OUTPUT_LEVEL,
                "not used, because the scopes are istio's; --log or INTERCEPT_LOG say what is logged",
            ),
            (
                switches.log_as_json,
                &setting::LOG_AS_JSON,
                "not used; --log-format json or INTERCEPT_LOG_FORMAT=json do that",
            ),
            (
                switches.cni_mode,
                &setting::CNI_MODE,
                "nothing to do, because the pod's namespace is entered from wherever the agent runs",
            ),
        ] {
            if set {
                self.note(setting, why);
            }
        }
        Ok(switches)
    }

    /// The users and groups of the proxy. Without -g, the text of -u names the groups too, as in istio.
    fn proxy_ids(&mut self) -> Result<(Vec<u32>, Vec<u32>), OptionError> {
        let uids = self.text(&setting::PROXY_UID);
        let gids = self.text(&setting::PROXY_GID);
        let proxy_uids = match uids {
            Some((origin, list)) => self.proxy_id_list(origin, list, Self::user)?,
            None => vec![self.envoy_user()?],
        };
        let proxy_gids = match gids.or(uids) {
            Some((origin, list)) => self.proxy_id_list(origin, list, Self::group)?,
            None => proxy_uids.clone(),
        };
        match uids {
            Some((origin, list)) if proxy_uids.is_empty() && proxy_gids.is_empty() => {
                Err(refuse(origin, list, OptionProblem::NoProxy))
            }
            _ => Ok((proxy_uids, proxy_gids)),
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
        let given = self.text(&setting::ENVOY_USER);
        let (origin, name) = given.unwrap_or((SettingOrigin::Default(&setting::ENVOY_USER), ENVOY_USER));
        let found = self.names.user(name).map_err(|error| refuse(origin, name, lookup(&error)))?;
        if found.is_none() && given.is_some() {
            self.note(
                &setting::ENVOY_USER,
                format!("no user `{name}` in this pod, so the proxy's id is 1337"),
            );
        }
        Ok(found.unwrap_or(1337))
    }

    fn user(&self, item: &str) -> Result<u32, OptionProblem> {
        parse_id(item, OptionProblem::User, |name| self.names.user(name))
    }

    fn group(&self, item: &str) -> Result<u32, OptionProblem> {
        parse_id(item, OptionProblem::Group, |name| self.names.group(name))
    }

    fn inbound_ports(&mut self) -> Result<(InboundPorts, Ports), OptionError> {
        let exclude = self.ports(&setting::LOCAL_EXCLUDE_PORTS)?;
        if let Some((_, "*")) = self.text(&setting::INBOUND_PORTS) {
            return Ok((InboundPorts::All, exclude));
        }
        if !exclude.is_empty() {
            self.note(&setting::LOCAL_EXCLUDE_PORTS, "nothing to do, because it applies to -b '*' only");
        }
        Ok((InboundPorts::Only(self.ports(&setting::INBOUND_PORTS)?), Ports::default()))
    }

    fn ports(&self, setting: &'static Setting) -> Result<Ports, OptionError> {
        let item =
            |item: &str| if item == "*" { Err(OptionProblem::PortWildcard) } else { Ports::parse_item(item) };
        self.list(setting, item).map(Ports::from_iter)
    }

    fn interfaces(&self, setting: &'static Setting) -> Result<Vec<InterfacePattern>, OptionError> {
        let mut interfaces = self.list(setting, InterfacePattern::parse)?;
        interfaces.sort_unstable();
        interfaces.dedup();
        Ok(interfaces)
    }

    fn virt_interfaces(&mut self) -> Result<Vec<InterfacePattern>, OptionError> {
        let interfaces = self.interfaces(&setting::VIRT_INTERFACES)?;
        if !interfaces.is_empty() {
            self.note(
                &setting::VIRT_INTERFACES,
                "IPv4 for addresses that are not the pod's is answered by a listener of -p that is IP_TRANSPARENT: \
                 one that listens already is made so, for one that comes later attach again (or let it set the option)",
            );
        }
        Ok(interfaces)
    }

    fn include(&self) -> Result<Cidrs, OptionError> {
        if let Some((_, "*")) = self.text(&setting::SERVICE_CIDR) {
            return Ok(Cidrs { all: true, ..Cidrs::default() });
        }
        let written = self.list(&setting::SERVICE_CIDR, |item| match item {
            "*" => Err(OptionProblem::CidrWildcard),
            _ => cidr::parse(item),
        })?;
        let loopback = written.iter().any(|network| network.addr().is_loopback());
        Ok(Cidrs { all: false, list: canonical(written), loopback })
    }

    fn exclude(&self) -> Result<Vec<IpNet>, OptionError> {
        let written = self.list(&setting::SERVICE_EXCLUDE_CIDR, |item| match item {
            "*" => Err(OptionProblem::ExcludeEverything),
            _ => cidr::parse(item),
        })?;
        Ok(canonical(written))
    }

    fn owner_groups(&self) -> Result<OwnerGroups, OptionError> {
        let only = self.text(&setting::OWNER_GROUPS).filter(|(_, list)| *list != "*");
        let except = self.text(&setting::OWNER_GROUPS_EXCLUDE);
        match (only, except) {
            (Some(_), Some((origin, list))) => Err(refuse(origin, list, OptionProblem::ExcludeWithoutAll)),
            (Some((origin, list)), None) => {
                Ok(OwnerGroups::Only(self.group_set(origin, list)?.into_iter().collect()))
            }
            (None, Some((origin, list))) => Ok(OwnerGroups::except(self.group_set(origin, list)?)),
            (None, None) => Ok(OwnerGroups::All),
        }
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
    fn accelerate(&mut self) -> Result<Vec<String>, OptionError> {
        let names = match self.text(&setting::ACCELERATE_PROXIES) {
            None => vec![KNOWN_PROXY.to_owned()],
            Some((origin, list)) => items(list)
                .map(|name| match ProxyName::new(0, name) {
                    Some(_) => Ok(name.to_owned()),
                    None => Err(refuse(origin, name, OptionProblem::Executable)),
                })
                .collect::<Result<BTreeSet<_>, _>>()?
                .into_iter()
                .collect(),
        };
        Ok(if self.switch(&setting::ACCELERATE)? { names } else { Vec::new() })
    }

    fn dns(&mut self) -> Result<Dns, OptionError> {
        let redirect = self.switch(&setting::REDIRECT_DNS)?;
        let all = self.switch(&setting::CAPTURE_ALL_DNS)?;
        match (redirect, all) {
            (true, true) => Ok(Dns::All),
            (true, false) => self.resolvers(),
            (false, true) => {
                self.note(&setting::CAPTURE_ALL_DNS, "nothing to do, because it needs --redirect-dns");
                Ok(Dns::Off)
            }
            (false, false) => Ok(Dns::Off),
        }
    }

    fn resolvers(&mut self) -> Result<Dns, OptionError> {
        let given = self.text(&setting::RESOLV_CONF);
        let text = match given {
            Some((_, path)) => names::read_resolv_conf(path),
            None => self.names.resolv_conf(),
        };
        let (origin, path) =
            given.unwrap_or((SettingOrigin::Default(&setting::RESOLV_CONF), "/etc/resolv.conf"));
        let text =
            text.map_err(|error| refuse(origin, path, OptionProblem::ResolvConf(error.to_string())))?;
        let servers = resolv_conf::parse(&text);
        for server in servers.unusable {
            self.note(
                &setting::REDIRECT_DNS,
                format!("`{server}` in {path} is not an address and is left out"),
            );
        }
        if servers.addresses.is_empty() {
            let why =
                format!("nothing to do, because {path} lists no server; --capture-all-dns would need none");
            self.note(&setting::REDIRECT_DNS, why);
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

    fn value<T>(
        &self,
        setting: &'static Setting,
        default: T,
        parse: impl Fn(&str) -> Result<T, OptionProblem>,
    ) -> Result<T, OptionError> {
        let Some((origin, value)) = self.raw.get(setting) else { return Ok(default) };
        parse(value).map_err(|problem| refuse(origin, value, problem))
    }

    fn switch(&self, setting: &'static Setting) -> Result<bool, OptionError> {
        self.value(setting, false, |value| go_syntax::parse_bool(value).ok_or(OptionProblem::Bool))
    }

    fn list<T>(
        &self,
        setting: &'static Setting,
        parse: impl Fn(&str) -> Result<T, OptionProblem>,
    ) -> Result<Vec<T>, OptionError> {
        let Some((origin, list)) = self.raw.get(setting) else { return Ok(Vec::new()) };
        items(list).map(|item| parse(item).map_err(|problem| refuse(origin, item, problem))).collect()
    }

    fn note(&mut self, setting: &'static Setting, why: impl Into<String>) {
        let origin = self.raw.get(setting).map_or(SettingOrigin::Default(setting), |(origin, _)| origin);
        self.notes.push(Note { origin, why: why.into() });
    }
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

/// An id, or a name that `look_up` knows. The greatest id means "none" to the kernel.
fn parse_id(
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
    look_up(item).map_err(|error| lookup(&error))?.ok_or(problem)
}

fn parse_mode(value: &str) -> Result<InboundMode, OptionProblem> {
    match value {
        "" | "REDIRECT" => Ok(InboundMode::Redirect),
        "TPROXY" => Ok(InboundMode::Tproxy),
        _ => Err(OptionProblem::Mode),
    }
}

/// A mark of 0 is what every unmarked packet has.
fn parse_mark(value: &str) -> Result<u32, OptionProblem> {
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

fn parse_table(value: &str) -> Result<u32, OptionProblem> {
    let table = go_syntax::parse_decimal(value);
    table.filter(|table| *table != 0 && !KERNEL_TABLES.contains(table)).ok_or(OptionProblem::Table)
}

fn parse_timeout(value: &str) -> Result<Duration, OptionProblem> {
    go_syntax::parse_duration(value).filter(|timeout| !timeout.is_zero()).ok_or(OptionProblem::Duration)
}

fn parse_loopback(value: &str) -> Result<ipnet::Ipv4Net, OptionProblem> {
    match cidr::parse(value) {
        Ok(IpNet::V4(network)) if IpAddr::V4(network.addr()).is_loopback() && network.prefix_len() >= 8 => {
            Ok(network.trunc())
        }
        _ => Err(OptionProblem::Loopback),
    }
}
