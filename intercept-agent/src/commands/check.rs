//! `check`: what this kernel can do, found out by doing it.

use std::{fs, path::Path};

use anyhow::{Result, bail};
use intercept_agent::{cgroup, confinement::explained, offsets, programs, store::Store};
use serde::Serialize;

use super::{accelerate, say};
use crate::cli::CheckArgs;

#[derive(Serialize)]
struct Finding {
    what: &'static str,
    ok: bool,
    detail: String,
}

/// The capabilities that attaching needs: the bit in CapEff, and what for.
const CAPABILITIES: [(u32, &str, &str); 4] = [
    (12, "CAP_NET_ADMIN", "to load and attach network programs"),
    (21, "CAP_SYS_ADMIN", "to enter namespaces and mount bpffs"),
    (19, "CAP_SYS_PTRACE", "to look at the pod's processes and take over its listeners"),
    (1, "CAP_DAC_OVERRIDE", "to open the pod's files"),
];

fn missing_capabilities() -> Vec<String> {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok())
        .unwrap_or(0);
    CAPABILITIES
        .iter()
        .filter(|(bit, ..)| effective & (1 << bit) == 0)
        .map(|(_, name, why)| format!("{name} ({why})"))
        .collect()
}

/// Refuse before anything is changed.
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
    let findings = findings(&args.bpffs.bpffs);
    if args.json {
        say!("{}", serde_json::to_string_pretty(&findings)?);
    } else {
        for Finding { what, ok, detail } in &findings {
            say!("{} {what}: {detail}", if *ok { "ok     " } else { "MISSING" });
        }
    }
    let missing = findings.iter().filter(|finding| !finding.ok).count();
    if missing > 0 {
        bail!("{missing} of {} requirements are not met", findings.len());
    }
    Ok(())
}

fn findings(bpffs: &Path) -> Vec<Finding> {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let missing = missing_capabilities();
    let mounts = cgroup::mounts();
    let offsets = offsets::find();
    vec![
        Finding {
            what: "kernel",
            ok: true,
            detail: format!("{} (5.15 is the oldest with all hooks)", release.trim()),
        },
        Finding {
            what: "capabilities",
            ok: missing.is_empty(),
            detail: if missing.is_empty() { "all there".to_owned() } else { missing.join(", ") },
        },
        Finding {
            what: "cgroup2",
            ok: !mounts.is_empty(),
            detail: match mounts.first() {
                Some(path) => format!("mounted on {}", path.display()),
                None => "not mounted: mount -t cgroup2 none /sys/fs/cgroup".to_owned(),
            },
        },
        Finding {
            what: "owners",
            ok: offsets.is_ok(),
            detail: match offsets {
                Ok(_) => "as iptables sees them".to_owned(),
                Err(error) => format!("{error}: owners would be those of the task that connects"),
            },
        },
        programs(bpffs),
    ]
}

/// Load everything into a store of its own, and take it away again.
fn programs(bpffs: &Path) -> Finding {
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
            .and_then(|()| Ok(programs::Lookup::prepare(&store.maps())?.load(1).map(drop)?));
        store.remove_all()?;
        loaded
    };
    match load() {
        Ok(()) => Finding { what: "programs", ok: true, detail: "the verifier takes all of them".to_owned() },
        Err(error) => Finding { what: "programs", ok: false, detail: explained(error.as_ref()) },
    }
}
