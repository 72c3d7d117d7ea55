//! The agent's commands on pods of the testbed, with real connections.

mod crowd;
mod fixture;
mod lifecycle;
mod originals;
