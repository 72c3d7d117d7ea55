//! Programs of iptables that fail or take long.

use std::{env, fs, os::unix::fs::PermissionsExt as _};

use tempfile::TempDir;

/// A folder with the programs of iptables, which do something else first if they are told so.
#[derive(Debug)]
pub struct WrappedTools(TempDir);

impl WrappedTools {
    /// Programs that do nothing else yet.
    ///
    /// # Panics
    /// If they cannot be written.
    #[expect(clippy::new_without_default, reason = "it makes files")]
    pub fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().display();
        for name in ["iptables-nft", "ip6tables-nft", "iptables-legacy", "ip6tables-legacy"] {
            for action in ["save", "restore"] {
                let program = format!("{name}-{action}");
                // Standard input is in a variable, so that it can be looked at.
                let script = format!(
                    "#!/bin/sh\n[ {action} = restore ] && INPUT=$(cat)\n[ -e {path}/{action} ] && . {path}/{action}\n\
                     printf '%s\\n' \"$INPUT\" | /usr/sbin/{program} \"$@\"\n"
                );
                let file = folder.path().join(program);
                fs::write(&file, script).expect("written");
                fs::set_permissions(&file, fs::Permissions::from_mode(0o755)).expect("executable");
            }
        }
        Self(folder)
    }

    /// The variable PATH with which they are found first.
    ///
    /// # Panics
    /// If PATH is not text.
    pub fn path(&self) -> String {
        format!("{}:{}", self.0.path().display(), env::var("PATH").expect("text"))
    }

    /// Has all programs for `save` or `restore` run these commands of a shell first. `$INPUT` has their input.
    ///
    /// # Panics
    /// If that cannot be written.
    pub fn set(&self, action: &str, commands: &str) {
        fs::write(self.0.path().join(action), commands).expect("written");
    }

    /// Has them do nothing else any more.
    ///
    /// # Panics
    /// If they did nothing else before.
    pub fn reset(&self, action: &str) {
        fs::remove_file(self.0.path().join(action)).expect("removed");
    }
}
