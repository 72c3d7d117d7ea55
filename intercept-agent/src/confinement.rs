//! Explains permission errors that AppArmor or SELinux causes.
//!
//! Their refusal is a plain "permission denied", even for root with every capability.

use std::{error::Error, fmt, fs, iter};

/// Returns the error and its causes, separated by colons. If a call was refused and this process is confined, it also
/// says by what, and how to change that.
pub fn explained(error: &(dyn Error + 'static)) -> String {
    let causes = iter::successors(Some(error), |&error| error.source());
    let mut text = causes.map(ToString::to_string).collect::<Vec<_>>().join(": ");
    // Some errors carry the refusal only in their text.
    let refused = [libc::EACCES, libc::EPERM].iter().any(|code| text.contains(&format!("(os error {code})")));
    if let Some(confinement) = refused.then(Confinement::of_this_process).flatten() {
        text.push_str(&format!("; {confinement}"));
    }
    text
}

/// SELinux domains without restrictions: of privileged containers, shells, services, PID 1 and the kernel.
const UNCONFINED: [&str; 5] = ["spc_t", "unconfined_t", "unconfined_service_t", "init_t", "kernel_t"];

/// The security module that confines this process.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Confinement {
    /// An AppArmor profile in enforce or kill mode.
    AppArmor {
        /// The profile's name.
        profile: String,
    },
    /// An SELinux domain that is not unconfined.
    SeLinux {
        /// The domain's name.
        domain: String,
    },
}

impl Confinement {
    /// Returns `None` if the process is unconfined or the kernel has neither module.
    fn of_this_process() -> Option<Self> {
        // The first exists since Linux 5.8 and is not shared with other modules.
        let files = ["/proc/self/attr/apparmor/current", "/proc/self/attr/current"];
        files.iter().find_map(|file| Self::parse(&fs::read_to_string(file).ok()?))
    }

    /// Parses `PROFILE (MODE)` of AppArmor or `USER:ROLE:DOMAIN:LEVEL` of SELinux.
    fn parse(text: &str) -> Option<Self> {
        let text = text.trim_end_matches(['\0', '\n']);
        if let Some((profile, mode)) = text.rsplit_once(" (") {
            // The modes `complain` and `unconfined` refuse nothing.
            let enforced = matches!(mode, "enforce)" | "kill)");
            return enforced.then(|| Self::AppArmor { profile: profile.to_owned() });
        }
        let domain = text.split(':').nth(2)?;
        (!UNCONFINED.contains(&domain)).then(|| Self::SeLinux { domain: domain.to_owned() })
    }
}

impl fmt::Display for Confinement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AppArmor { profile } => write!(
                f,
                "the AppArmor profile {profile} confines this process: run its container unconfined \
                 (securityContext.appArmorProfile.type: Unconfined; before Kubernetes 1.30 the annotation \
                 container.apparmor.security.beta.kubernetes.io/CONTAINER: unconfined)"
            ),
            Self::SeLinux { domain } => write!(
                f,
                "SELinux confines this process to {domain}: run its container as spc_t \
                 (securityContext.seLinuxOptions.type: spc_t)"
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn enforced_profiles_and_confined_domains_are_named() {
        let apparmor = |profile: &str| Some(Confinement::AppArmor { profile: profile.to_owned() });
        let selinux = |domain: &str| Some(Confinement::SeLinux { domain: domain.to_owned() });
        for (text, expected) in [
            ("cri-containerd.apparmor.d (enforce)\n", apparmor("cri-containerd.apparmor.d")),
            ("a b (kill)\n", apparmor("a b")),
            ("docker-default (complain)\n", None),
            ("snap.x (unconfined)\n", None),
            ("unconfined\n", None),
            ("system_u:system_r:container_t:s0:c1,c2\0", selinux("container_t")),
            ("system_u:system_r:spc_t:s0\0", None),
            ("kernel", None),
            ("", None),
        ] {
            assert_eq!(Confinement::parse(text), expected, "{text:?}");
        }
    }

    #[test]
    fn causes_follow_one_another() {
        let error = CreateError(std::io::Error::from_raw_os_error(libc::ENOENT));
        assert_eq!(explained(&error), "creating /a: No such file or directory (os error 2)");
    }

    #[derive(Debug, thiserror::Error)]
    #[error("creating /a")]
    struct CreateError(#[source] std::io::Error);
}
