//! The containers of a pod that its options name, as cgroups below the pod's.

use std::path::PathBuf;

use intercept_common::layout::{MAX_CONTAINERS, PodPolicy, container};
use rustix::process::Pid;

use crate::{
    cgroup::{CgroupDir, CgroupError},
    options::Config,
};

/// The cgroups of the containers that the options of a pod name.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct ContainerCgroups {
    level: u32,
    /// Ids of cgroups, with bits of `layout::container`.
    members: Vec<(u64, u32)>,
}

/// Why a container's cgroup is refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ContainerError {
    /// It cannot be opened.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// It is not in the pod.
    #[error(
        "cgroup {} of a container is not below the pod's, {}; give a folder in that one", container.display(), pod.display()
    )]
    Outside {
        /// The container's cgroup.
        container: PathBuf,
        /// The pod's.
        pod: PathBuf,
    },
    /// Not all are equally deep.
    #[error(
        "cgroup {} of a container is at level {level} of the hierarchy and another one at level {other}; give cgroups of \
         the same level, as a runtime makes for the containers of a pod", container.display()
    )]
    Levels {
        /// The container's cgroup.
        container: PathBuf,
        /// Its level.
        level: u32,
        /// The level of the one before.
        other: u32,
    },
    /// More than the policy has room for.
    #[error("{0} cgroups of containers are named, and there is room for {MAX_CONTAINERS}; give fewer")]
    TooMany(usize),
}

impl ContainerCgroups {
    /// Opens the cgroups that `config` names, all of which must be below `pod`.
    pub fn find(config: &Config, pod: &CgroupDir) -> Result<Self, ContainerError> {
        let proxy = config.proxy_cgroups.iter().map(|path| (path, container::PROXY));
        let exempt = config.exempt_cgroups.iter().map(|path| (path, container::EXEMPT));
        let mut found = Self::default();
        for (path, kind) in proxy.chain(exempt) {
            let cgroup = CgroupDir::open(path)?;
            if !cgroup.lineage()?.contains(&pod.id()) {
                return Err(ContainerError::Outside { container: path.clone(), pod: pod.path().to_owned() });
            }
            let level = cgroup.level()?;
            if !found.members.is_empty() && level != found.level {
                return Err(ContainerError::Levels { container: path.clone(), level, other: found.level });
            }
            found.level = level;
            found.members.push((cgroup.id(), kind));
        }
        match found.members.len() {
            count if count > MAX_CONTAINERS => Err(ContainerError::TooMany(count)),
            _ => Ok(found),
        }
    }

    /// Enters the cgroups into a compiled policy.
    pub fn write(&self, policy: &mut PodPolicy) {
        policy.cgroup_level = self.level;
        let places = policy.cgroup_ids.iter_mut().zip(&mut policy.cgroup_kinds);
        for ((id, kind), member) in places.zip(&self.members) {
            (*id, *kind) = *member;
        }
    }
}

/// The processes of the proxy's container. `None` if the options name no such container, so that any process of the pod may
/// be the proxy.
pub fn proxy_processes(config: &Config) -> Result<Option<Vec<Pid>>, CgroupError> {
    if config.proxy_cgroups.is_empty() {
        return Ok(None);
    }
    let mut processes = Vec::new();
    for path in &config.proxy_cgroups {
        match CgroupDir::open(path).and_then(|cgroup| cgroup.processes()) {
            Ok(found) => processes.extend(found),
            // The container has ended since the options were validated.
            Err(CgroupError::Open { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(Some(processes))
}

#[cfg(test)]
mod tests {
    use std::{fs, slice::from_ref};

    use super::*;
    use crate::testing::TestCgroup;

    fn config(proxy: &[PathBuf], exempt: &[PathBuf]) -> Config {
        Config { proxy_cgroups: proxy.to_vec(), exempt_cgroups: exempt.to_vec(), ..Config::default() }
    }

    #[test]
    fn containers_are_below_the_pod_and_of_one_level() {
        let (pod, other) = (TestCgroup::new(), TestCgroup::new());
        let make = |pod: &TestCgroup, name: &str| {
            let path = pod.cgroup.path().join(name);
            fs::create_dir_all(&path).expect("a cgroup");
            path
        };
        let (proxy, init, deep) = (make(&pod, "proxy"), make(&pod, "init"), make(&pod, "init/deep"));
        let find = |proxy: &[PathBuf], exempt: &[PathBuf]| {
            ContainerCgroups::find(&config(proxy, exempt), &pod.cgroup)
        };
        let id = |path: &PathBuf| CgroupDir::open(path).expect("a cgroup").id();

        let found = find(from_ref(&proxy), from_ref(&init)).expect("found");
        let level = pod.cgroup.level().expect("a level") + 1;
        let members = vec![(id(&proxy), container::PROXY), (id(&init), container::EXEMPT)];
        assert_eq!(found, ContainerCgroups { level, members });

        let outside = make(&other, "proxy");
        for path in [outside, other.cgroup.path().to_owned(), pod.cgroup.path().to_owned()] {
            let error = find(&[path], &[]).expect_err("not in the pod");
            assert!(matches!(error, ContainerError::Outside { .. }), "{error}");
        }
        let error = find(from_ref(&proxy), &[deep]).expect_err("two levels");
        assert!(matches!(error, ContainerError::Levels { .. }), "{error}");
        let error = find(&[pod.cgroup.path().join("gone")], &[]).expect_err("no such cgroup");
        assert!(matches!(error, ContainerError::Cgroup(CgroupError::Open { .. })), "{error}");

        let many: Vec<_> = (0..MAX_CONTAINERS).map(|n| make(&pod, &format!("c{n}"))).collect();
        assert_eq!(find(&many, &[]).expect("room").members.len(), MAX_CONTAINERS);
        let error = find(&many, &[proxy]).expect_err("too many");
        assert!(matches!(error, ContainerError::TooMany(9)), "{error}");
    }
}
