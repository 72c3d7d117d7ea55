//! Names of the objects that the testbed makes: `intercept-test.PID.N.LABEL`.

use std::io;
use std::sync::atomic::{AtomicU32, Ordering};

use tempfile::TempDir;

/// The prefix of these names.
pub const PREFIX: &str = "intercept-test.";

static NEXT: AtomicU32 = AtomicU32::new(0);

/// A unique name with a readable label, such as a part of the test's name.
pub fn fresh(label: &str) -> String {
    let n = NEXT.fetch_add(1, Ordering::Relaxed);
    let label: String =
        label.chars().map(|c| if c.is_ascii_alphanumeric() || c == '-' { c } else { '-' }).collect();
    format!("{PREFIX}{}.{n}.{label}", std::process::id())
}

/// A temporary folder with such a name, with mode 0700.
pub fn scratch(label: &str) -> io::Result<TempDir> {
    tempfile::Builder::new().prefix(&format!("{}.", fresh(label))).tempdir()
}

/// The pid in `name`, if the testbed made it.
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
