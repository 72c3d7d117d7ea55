//! Agent.
pub mod cgroup;
pub mod netns;
pub mod options;
pub mod userns;
