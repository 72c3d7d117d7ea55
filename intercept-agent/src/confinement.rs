//! What the node's security modules make of this process, for the errors that come of it.
//!
//! A refusal by AppArmor or SELinux is a plain "permission denied", also for root with every capability.

use std::{error::Error, fmt, fs, iter};

/// The error with its causes, each after a colon; if a call was refused and this process is confined, by what, and the way
/// out.
pub fn explained(error: &(dyn Error + 'static)) -> String {
    let causes = iter::successors(Some(error), |&error| error.source());
    let mut text = causes.map(ToString::to_string).collect::<Vec<_>>().join(": ");
    // Some errors have a refusal in their text alone.
    let refused = [libc::EACCES, libc::EPERM].iter().any(|code| text.contains(&format!("(os error {code})")));
    if let Some(confinement) = refused.then(Confinement::of_this_process).flatten() {
        text.push_str(&format!("; {confinement}"));
    }
    text
}

/// Domains of SELinux that may do everything: a container's, a shell's, a service's, the first process's.
const UNCONFINED: [&str; 5] = ["spc_t", "unconfined_t", "unconfined_service_t", "init_t", "kernel_t"];

/// The security module that confines this process.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Confinement {
    /// By a profile that is enforced.
    AppArmor {
        /// Its name.
        profile: String,
    },
    /// In a domain that is not an unconfined one.
    SeLinux {
        /// Its name.
        domain: String,
    },
}

impl Confinement {
    /// `None` if the process is unconfined, or the kernel has neither module.
    fn of_this_process() -> Option<Self> {
        // The first is there where several modules are active (Linux 5.8).
        let files = ["/proc/self/attr/apparmor/current", "/proc/self/attr/current"];
        files.iter().find_map(|file| Self::parse(&fs::read_to_string(file).ok()?))
    }

    /// Reads `PROFILE (MODE)` of AppArmor or `USER:ROLE:DOMAIN:LEVEL` of SELinux.
    fn parse(text: &str) -> Option<Self> {
        let text = text.trim_end_matches(['\0', '\n']);
        if let Some((profile, mode)) = text.rsplit_once(" (") {
            // In the modes `complain` and `unconfined` nothing is refused.
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
        let error = Failed(std::io::Error::from_raw_os_error(libc::ENOENT));
        assert_eq!(explained(&error), "creating /a: No such file or directory (os error 2)");
    }

    #[derive(Debug, thiserror::Error)]
    #[error("creating /a")]
    struct Failed(#[source] std::io::Error);
}
