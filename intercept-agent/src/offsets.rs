//! Where the running kernel keeps what the programs read of its own structs, and whether it has a helper that they can
//! do without, from its own type information.

use btf_rs::{Btf, Type};

/// Offsets in bytes, by the names of the programs' globals.
pub type Offsets = [(&'static str, u32); 6];

/// The global to fill, a struct and its member: the steps from a socket to the credentials of its file, and the next
/// sequence number that a connection sends.
const MEMBERS: [(&str, &str, &str); 5] = [
    ("SOCK_SOCKET_OFF", "sock", "sk_socket"),
    ("SOCKET_FILE_OFF", "socket", "file"),
    ("FILE_CRED_OFF", "file", "f_cred"),
    ("CRED_FSUID_OFF", "cred", "fsuid"),
    ("TCP_WRITE_SEQ_OFF", "tcp_sock", "write_seq"),
];

/// The global to set to 1 where the kernel has a helper, and the helper.
const HELPER: (&str, &str) = ("HAS_SET_RETVAL", "BPF_FUNC_set_retval");

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
    let mut offsets = [("", 0); 6];
    for (slot, (global, name, member)) in offsets.iter_mut().zip(MEMBERS) {
        let offset = member_offset(&btf, name, member).ok_or(OffsetError::Missing { name, member })?;
        *slot = (global, offset);
    }
    offsets[MEMBERS.len()] = (HELPER.0, has_helper(&btf, HELPER.1).into());
    Ok(offsets)
}

fn has_helper(btf: &Btf, helper: &str) -> bool {
    let types = btf.resolve_types_by_name("bpf_func_id").unwrap_or_default();
    types.iter().any(|ty| match ty {
        Type::Enum(helpers) => {
            helpers.members.iter().any(|member| btf.resolve_name(member).is_ok_and(|name| name == helper))
        }
        _ => false,
    })
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
