//! Agent.
pub mod cgroup;
pub mod mirror;
pub mod netns;
pub mod options;
pub mod userns;
