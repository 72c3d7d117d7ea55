//! The benchmark: the same work through pods that are captured in different ways, interleaved.

pub mod capture;
pub mod cpu;
pub mod crew;
pub mod envoy;
pub mod interrupt;
pub mod mode;
pub mod nft;
pub mod plan;
pub mod progress;
pub mod rig;
pub mod rounds;
pub mod statistics;
pub mod work;
pub mod worker;
pub mod wrk;
