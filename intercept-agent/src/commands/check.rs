//! `check`: probes what this kernel supports.

use std::{collections::BTreeSet, fs, path::Path};

use anyhow::{Result, bail};
use rustix::thread::CapabilitySet;
use serde::Serialize;

use super::{accelerate, print_line};
use crate::{
    btf_offsets, cgroup,
    cli::CheckArgs,
    confinement::explained,
    ids::NetnsCookie,
    programs,
    store::Store,
    support::{self, Lacking, Missing, Need},
};

#[derive(Serialize)]
struct CheckFinding {
    what: String,
    ok: bool,
    /// The option that needs it. `None` if every capture does.
    #[serde(skip_serializing_if = "Option::is_none")]
    only: Option<&'static str>,
    detail: String,
}

impl CheckFinding {
    fn new(what: &str, ok: bool, detail: String) -> Self {
        Self { what: what.to_owned(), ok, only: None, detail }
    }

    fn met(what: &str, detail: String) -> Self {
        Self::new(what, true, detail)
    }

    fn unmet(what: &str, detail: String) -> Self {
        Self::new(what, false, detail)
    }

    fn of(missing: &Missing) -> Self {
        let only = match missing.need() {
            Need::Never => Some("precise errors of connect()"),
            need => need.option(),
        };
        Self { what: missing.name(), ok: false, only, detail: missing.lost() }
    }

    fn is_fatal(&self) -> bool {
        !self.ok && self.only.is_none()
    }

    fn line(&self) -> String {
        let Self { what, ok, only, detail } = self;
        match (ok, only) {
            (true, _) => format!("ok      {what}: {detail}"),
            (false, None) => format!("MISSING {what}: {detail}"),
            (false, Some(only)) => format!("MISSING {what}, needed for {only} only: {detail}"),
        }
    }
}

/// The capabilities that attaching needs, with their names and what each is for.
const CAPABILITIES: [(CapabilitySet, &str, &str); 4] = [
    (CapabilitySet::NET_ADMIN, "CAP_NET_ADMIN", "to load and attach network programs"),
    (CapabilitySet::SYS_ADMIN, "CAP_SYS_ADMIN", "to enter namespaces and mount bpffs"),
    (CapabilitySet::SYS_PTRACE, "CAP_SYS_PTRACE", "to read the pod's processes and take over its listeners"),
    (CapabilitySet::DAC_OVERRIDE, "CAP_DAC_OVERRIDE", "to open the pod's files"),
];

fn missing_capabilities() -> Vec<String> {
    let effective = rustix::thread::capabilities(None).map_or(CapabilitySet::empty(), |sets| sets.effective);
    CAPABILITIES
        .iter()
        .filter(|(capability, ..)| !effective.contains(*capability))
        .map(|(_, name, why)| format!("{name} ({why})"))
        .collect()
}

/// Fails before anything is changed if this process lacks a capability.
pub(super) fn require_privileges() -> Result<()> {
    let missing = missing_capabilities();
    if !missing.is_empty() {
        bail!(
            "this process lacks {}: run it as root, or give the container these capabilities",
            missing.join(", ")
        );
    }
    Ok(())
}

pub(super) fn check(args: &CheckArgs) -> Result<()> {
    if args.accelerate {
        return accelerate::check(args.json);
    }
    let missing = support::missing();
    let findings = findings(&args.bpffs.bpffs, &missing);
    if args.json {
        print_line!("{}", serde_json::to_string_pretty(&findings)?);
    } else {
        for finding in &findings {
            print_line!("{}", finding.line());
        }
    }
    if let Some(lacking) = missing.ok().and_then(|missing| Lacking::for_any(&missing)) {
        bail!(lacking);
    }
    let fatal = findings.iter().filter(|finding| finding.is_fatal()).count();
    if fatal > 0 {
        bail!("{fatal} of {} requirements are not met", findings.len());
    }
    if !args.json {
        let options: BTreeSet<_> = findings.iter().filter_map(|finding| finding.only).collect();
        let options: Vec<_> = options.into_iter().collect();
        match options.as_slice() {
            [] => print_line!("captures, with every option"),
            options => print_line!("captures, except: {}", options.join(", ")),
        }
    }
    Ok(())
}

fn findings(bpffs: &Path, missing: &Result<Vec<Missing>, support::ProbeError>) -> Vec<CheckFinding> {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let capabilities = missing_capabilities();
    let mounts = cgroup::mounts();
    let offsets = btf_offsets::find();
    let mut findings = vec![
        CheckFinding::met("kernel", release.trim().to_owned()),
        CheckFinding::new(
            "capabilities",
            capabilities.is_empty(),
            if capabilities.is_empty() { "all present".to_owned() } else { capabilities.join(", ") },
        ),
        CheckFinding::new(
            "cgroup2",
            !mounts.is_empty(),
            match mounts.first() {
                Some(path) => format!("mounted on {}", path.display()),
                None => "not mounted: mount -t cgroup2 none /sys/fs/cgroup".to_owned(),
            },
        ),
        CheckFinding::new(
            "owners",
            offsets.is_ok(),
            match offsets {
                Ok(_) => "the creators of sockets, as with iptables".to_owned(),
                Err(error) => format!("{error}: the owner would be the task that connects"),
            },
        ),
    ];
    match missing {
        Ok(missing) => findings.extend(missing.iter().map(CheckFinding::of)),
        Err(error) => {
            let cause =
                std::error::Error::source(error).map_or_else(String::new, |cause| format!(": {cause}"));
            findings.push(CheckFinding::unmet("hooks and helpers", format!("{error}{cause}")));
        }
    }
    // Programs that cannot be loaded then are not a separate finding.
    if !findings.iter().skip(4).any(CheckFinding::is_fatal) {
        findings.push(programs(bpffs));
    }
    findings
}

/// Loads all programs into a scratch store and removes it again.
fn programs(bpffs: &Path) -> CheckFinding {
    let load = || -> Result<()> {
        let store = Store::scratch(bpffs)?;
        let loaded = store
            .create(&store.maps())
            .and_then(|()| store.create(&store.programs()))
            .map_err(anyhow::Error::from)
            .and_then(|()| {
                Ok(programs::load_shared(
                    &store.maps(),
                    &store.programs(),
                    programs::DEFAULT_MAX_CONNECTIONS,
                )?)
            })
            .and_then(|()| Ok(programs::Lookup::prepare(&store.maps())?.load(NetnsCookie(1)).map(drop)?));
        store.remove_all()?;
        loaded
    };
    match load() {
        Ok(()) => CheckFinding::met(
            "programs",
            "the verifier accepts every program that this kernel supports".to_owned(),
        ),
        Err(error) => CheckFinding::unmet("programs", explained(error.as_ref())),
    }
}
