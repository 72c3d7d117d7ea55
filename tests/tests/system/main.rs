//! The agent as a whole: its commands on pods of the testbed, with real connections.

mod bed;
mod crowd;
mod lifecycle;
mod originals;
