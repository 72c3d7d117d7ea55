//! The benchmark: the same work through pods with different modes of capture, interleaved.

pub mod agent;
pub mod capture;
pub mod check;
pub mod cpu;
pub mod envoy;
pub mod goals;
pub mod install;
pub mod interrupt;
pub mod machine;
pub mod memory;
pub mod mode;
pub mod nft;
pub mod plan;
pub mod pool;
pub mod programs;
pub mod progress;
pub mod report;
pub mod rig;
pub mod rounds;
pub mod session;
pub mod statistics;
pub mod summary;
pub mod topology;
pub mod work;
pub mod worker;
pub mod wrk;
