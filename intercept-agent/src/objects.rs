//! The compiled programs, as ELF objects in this executable.

/// The programs that capture pods.
pub static CAPTURE: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/intercept.o"));

/// The programs that join connections between proxies.
pub static JOIN: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/join.o"));

/// The program of [`CAPTURE`] of which each pod has an instance, alone, with the maps that it uses.
pub static LOOKUP: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/lookup.o"));

/// A digest of all of them for a path, without dots, which bpffs does not allow. It distinguishes builds and is no protection.
pub static DIGEST: &str = env!("INTERCEPT_OBJECTS_DIGEST");
