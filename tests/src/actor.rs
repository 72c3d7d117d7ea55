//! The actor: one process inside a pod or its neighbour that makes and answers thousands of flows, as any user.
//!
//! The process is this package's binary `actor`; it is driven by lines of JSON, [`protocol`], and ends when its
//! input does. [`Actor`] starts one and speaks with it.

pub mod binary;
mod client;
pub mod protocol;

pub use client::{Actor, BINARY, Listening};
pub use protocol::{
    Answer, Bind, Dial, DialOutcome, Dialled, FlowStage, Listen, OriginalDst, Queried, Query, QueryReply,
    Relay, RelayDirection, Relayed, Sending, Transport,
};
