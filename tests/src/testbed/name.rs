//! Names of the objects that the testbed makes: `intercept-test.MAKER.N.LABEL`.

use std::{
    fs, io,
    path::Path,
    sync::{
        LazyLock,
        atomic::{AtomicU32, Ordering},
    },
};

use tempfile::TempDir;

/// The prefix of these names.
pub const PREFIX: &str = "intercept-test.";

/// The inode of the first PID namespace, which the kernel never changes (`PROC_PID_INIT_INO`).
const FIRST: u64 = 0xEFFF_FFFC;

static NEXT: AtomicU32 = AtomicU32::new(0);
static OWN_NAMESPACE: LazyLock<u64> =
    LazyLock::new(|| pid_namespace(Path::new("/proc/self")).expect("reading /proc/self/ns/pid"));

/// The process that made an object: `PID` in names, or `PID-NAMESPACE` if it is not of the first PID namespace. Two PID
/// namespaces have processes with the same pid, but often share the host's folders and cgroups.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Maker {
    pid: u32,
    /// The inode of its PID namespace.
    namespace: u64,
}

impl Maker {
    /// This process.
    pub fn this() -> Self {
        Self::of(std::process::id())
    }

    /// A process of this PID namespace.
    pub fn of(pid: u32) -> Self {
        Self { pid, namespace: *OWN_NAMESPACE }
    }

    fn parse(text: &str) -> Option<Self> {
        match text.split_once('-') {
            Some((pid, namespace)) => {
                Some(Self { pid: pid.parse().ok()?, namespace: namespace.parse().ok()? })
            }
            None => Some(Self { pid: text.parse().ok()?, namespace: FIRST }),
        }
    }

    /// Whether it runs. A process of another PID namespace runs as long as its namespace has any process, and always as far as
    /// this can be seen from a namespace that is not the first.
    pub fn is_alive(self) -> bool {
        if self.namespace == *OWN_NAMESPACE {
            let pid = i32::try_from(self.pid).ok().and_then(rustix::process::Pid::from_raw);
            return pid
                .is_some_and(|pid| rustix::process::test_kill_process(pid) != Err(rustix::io::Errno::SRCH));
        }
        let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
        *OWN_NAMESPACE != FIRST
            || processes.into_iter().any(|process| pid_namespace(&process.path()) == Some(self.namespace))
    }
}

impl std::fmt::Display for Maker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.namespace {
            FIRST => write!(f, "{}", self.pid),
            namespace => write!(f, "{}-{namespace}", self.pid),
        }
    }
}

/// The inode of a process's PID namespace.
fn pid_namespace(process: &Path) -> Option<u64> {
    let link = fs::read_link(process.join("ns/pid")).ok()?;
    link.to_str()?.strip_prefix("pid:[")?.strip_suffix(']')?.parse().ok()
}

/// A unique name with a readable label, such as a part of the test's name.
pub fn fresh(label: &str) -> String {
    let n = NEXT.fetch_add(1, Ordering::Relaxed);
    let label: String =
        label.chars().map(|c| if c.is_ascii_alphanumeric() || c == '-' { c } else { '-' }).collect();
    format!("{PREFIX}{}.{n}.{label}", Maker::this())
}

/// A temporary folder with such a name, with mode 0700.
pub fn scratch(label: &str) -> io::Result<TempDir> {
    tempfile::Builder::new().prefix(&format!("{}.", fresh(label))).tempdir()
}

/// The maker in `name`, if the testbed made it.
pub fn maker(name: &str) -> Option<Maker> {
    Maker::parse(name.strip_prefix(PREFIX)?.split('.').next()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_lead_back_to_their_maker() {
        let name = fresh("a::strange name/..");
        assert_eq!(maker(&name), Some(Maker::this()));
        assert!(!name.contains('/'));
        assert_ne!(name, fresh("a::strange name/.."));
        assert_eq!(maker("intercept-test.x.0.y"), None);
        assert_eq!(maker("intercept-test.1-x.0.y"), None);
        assert_eq!(maker("something-else.1.0.y"), None);
    }

    #[test]
    fn makers_of_different_pid_namespaces_are_different() {
        let first = Maker { pid: 1, namespace: FIRST };
        let other = Maker { pid: 1, namespace: 4_026_532_200 };
        assert_eq!([first, other].map(|maker| maker.to_string()), ["1", "1-4026532200"]);
        for made in [first, other] {
            assert_eq!(maker(&format!("{PREFIX}{made}.0.label")), Some(made));
            assert_eq!(maker(&format!("{PREFIX}{made}")), Some(made));
        }
    }

    #[test]
    fn makers_that_have_ended_are_not_alive() {
        assert!(Maker::this().is_alive());
        let mut ended = std::process::Command::new("true").spawn().expect("started");
        ended.wait().expect("waited");
        assert!(!Maker::of(ended.id()).is_alive());
        // No process has this number as its namespace.
        let gone = Maker { pid: 1, namespace: 1 };
        assert_eq!(gone.is_alive(), *OWN_NAMESPACE != FIRST);
    }
}
