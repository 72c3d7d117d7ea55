//! Where the running kernel keeps the credentials of a socket's file, from its own type information.

use btf_rs::{Btf, Type};

/// Offsets in bytes, by the names of the programs' globals.
pub type Offsets = [(&'static str, u32); 4];

/// One step from a socket to the credentials: the global to fill, a struct and its member.
const STEPS: [(&str, &str, &str); 4] = [
    ("SOCK_SOCKET_OFF", "sock", "sk_socket"),
    ("SOCKET_FILE_OFF", "socket", "file"),
    ("FILE_CRED_OFF", "file", "f_cred"),
    ("CRED_FSUID_OFF", "cred", "fsuid"),
];

/// Where the kernel publishes its types.
pub const VMLINUX_BTF: &str = "/sys/kernel/btf/vmlinux";

/// Why the offsets are not known. Owners are then those of the task that connects.
#[derive(Debug, thiserror::Error)]
pub enum OffsetError {
    /// No type information, or not readable.
    #[error("reading the kernel's types from {VMLINUX_BTF} (CONFIG_DEBUG_INFO_BTF)")]
    Read(#[source] btf_rs::Error),
    /// This kernel lays it out otherwise.
    #[error("looking for {member} in the kernel's struct {name}")]
    Missing {
        /// Name of the struct.
        name: &'static str,
        /// Name of the member.
        member: &'static str,
    },
}

/// Look them up. Takes some tens of milliseconds, so only when the programs are loaded.
pub fn find() -> Result<Offsets, OffsetError> {
    let btf = Btf::from_file(VMLINUX_BTF).map_err(OffsetError::Read)?;
    let mut offsets = [("", 0); 4];
    for (slot, (global, name, member)) in offsets.iter_mut().zip(STEPS) {
        let offset = member_offset(&btf, name, member).ok_or(OffsetError::Missing { name, member })?;
        *slot = (global, offset);
    }
    Ok(offsets)
}

fn member_offset(btf: &Btf, name: &str, member: &str) -> Option<u32> {
    btf.resolve_types_by_name(name).ok()?.into_iter().find_map(|ty| match ty {
        Type::Struct(ty) => ty
            .members
            .iter()
            .find(|m| btf.resolve_name(*m).is_ok_and(|found| found == member))
            .map(|m| m.bit_offset() / 8),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    #[test]
    fn this_kernel_tells_where_credentials_are() {
        let offsets = super::find().expect("offsets");
        assert!(offsets.iter().all(|(name, offset)| !name.is_empty() && *offset > 0), "{offsets:?}");
    }
}
