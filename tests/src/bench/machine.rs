//! Where the figures come from.

use std::fs;

use serde::{Deserialize, Serialize};

/// The machine and its kernel.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Machine {
    /// The kernel's release.
    pub kernel: String,
    /// The processor's name.
    pub processor: String,
    /// How many of them are online.
    pub processors: usize,
    /// MiB of memory.
    pub memory: u64,
    /// Whether it is a virtual one.
    pub virtual_machine: bool,
    /// The time of the run, in seconds since 1970.
    pub at: u64,
    /// Processes that were running or ready to, on average of a minute, when the run began.
    pub load: String,
}

impl Machine {
    /// This one, now.
    pub fn here() -> Self {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let cpuinfo = read("/proc/cpuinfo");
        let field = |name: &str| {
            let line = cpuinfo.lines().find(|line| line.starts_with(name));
            line.and_then(|line| line.split_once(':')).map(|(_, value)| value.trim().to_owned())
        };
        let memory = read("/proc/meminfo")
            .lines()
            .find_map(|line| line.strip_prefix("MemTotal:")?.trim().strip_suffix(" kB")?.parse::<u64>().ok());
        let at = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        Self {
            kernel: read("/proc/sys/kernel/osrelease").trim().into(),
            processor: field("model name").unwrap_or_else(|| std::env::consts::ARCH.into()),
            processors: std::thread::available_parallelism().map_or(1, usize::from),
            memory: memory.unwrap_or(0) / 1024,
            virtual_machine: field("flags")
                .is_some_and(|flags| flags.split(' ').any(|flag| flag == "hypervisor")),
            at: at.map_or(0, |at| at.as_secs()),
            load: read("/proc/loadavg").split(' ').next().unwrap_or_default().into(),
        }
    }
}
