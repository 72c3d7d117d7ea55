//! The compiled programs, as ELF objects in this executable.

/// The programs that capture pods.
pub static CAPTURE: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/intercept.o"));

/// The programs that join connections between proxies.
pub static JOIN: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/join.o"));
