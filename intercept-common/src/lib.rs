//! What the programs in the kernel and the agent in user space share: the layouts of the maps, the names of
//! maps and programs, and the decision itself.
//!
//! `decide` is a pure function of a pod's policy, a flow and a few look-ups behind a trait. The programs call it
//! with the maps behind that trait, `explain` with the same entries read from user space, so there is one rule
//! order and it lives in [`decide`].
#![no_std]
#![forbid(unsafe_code)]

pub mod acceleration;
pub mod addr;
pub mod decide;
pub mod failure;
pub mod ids;
pub mod layout;
pub mod names;
pub mod reason;

pub use addr::{Addr, Family, StandIn};
pub use decide::{InboundFlow, OutboundFlow, PolicyLookup, decide_inbound, decide_outbound};
pub use ids::{NetnsCookie, PolicyId, Slot};
pub use reason::{Decision, ProxyListener, Reason, Verdict};
