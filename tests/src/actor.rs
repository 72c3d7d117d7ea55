//! The actor: a process in a pod or its neighbour that makes and answers thousands of flows as any user.
//!
//! The process is the binary `actor` of this package. It reads and writes lines of JSON (see [`protocol`]) and ends when
//! its input ends. [`Actor`] starts the process and talks to it.

pub mod binary;
mod client;
pub mod protocol;

pub use client::{Actor, BINARY, Listening};
pub use protocol::{
    Answer, Bind, Dial, DialOutcome, Dialled, FlowStage, Listen, OriginalDst, Queried, Query, QueryReply,
    Relay, RelayDirection, Relayed, Sending, Transport,
};
