//! The names of everything the testbed makes: `intercept-test.PID.N.LABEL`.

use std::io;
use std::sync::atomic::{AtomicU32, Ordering};

use tempfile::TempDir;

/// What every name made here starts with.
pub const PREFIX: &str = "intercept-test.";

static NEXT: AtomicU32 = AtomicU32::new(0);

/// A name nobody else uses, from a readable label (the test's name, or a part of it).
pub fn fresh(label: &str) -> String {
    let n = NEXT.fetch_add(1, Ordering::Relaxed);
    let label: String =
        label.chars().map(|c| if c.is_ascii_alphanumeric() || c == '-' { c } else { '-' }).collect();
    format!("{PREFIX}{}.{n}.{label}", std::process::id())
}

/// A folder of such a name below the system's one for temporary files. Its owner alone may look into it.
pub fn scratch(label: &str) -> io::Result<TempDir> {
    tempfile::Builder::new().prefix(&format!("{}.", fresh(label))).tempdir()
}

/// The process that made `name`, if it is one of ours.
pub fn owner(name: &str) -> Option<u32> {
    let rest = name.strip_prefix(PREFIX)?;
    rest.split('.').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_lead_back_to_their_maker() {
        let name = fresh("a::strange name/..");
        assert_eq!(owner(&name), Some(std::process::id()));
        assert!(!name.contains('/'));
        assert_ne!(name, fresh("a::strange name/.."));
        assert_eq!(owner("intercept-test.x.0.y"), None);
        assert_eq!(owner("something-else.1.0.y"), None);
    }
}
