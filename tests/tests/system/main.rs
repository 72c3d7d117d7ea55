//! The agent as a whole: its commands on pods of the testbed, with real connections.

mod crowd;
mod fixture;
mod lifecycle;
mod originals;
