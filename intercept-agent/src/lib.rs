//! The agent as a library, so that tests can look at its parts; the binary is a command line around it.

pub mod compile;
pub mod kernel;
pub mod mirror;
pub mod offsets;
pub mod options;
pub mod programs;
pub mod store;
pub mod tables;
