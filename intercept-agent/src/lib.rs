//! Agent.
pub mod options;
