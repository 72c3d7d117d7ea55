//! Probes each hook, helper, map type and instruction on its own.
//!
//! The list of those that the programs use is read from the programs, so it cannot miss one.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    io,
};

use aya::{
    maps::MapType,
    sys::{BpfHelper, is_map_supported},
};
use aya_obj::{
    Object,
    generated::{bpf_insn, bpf_map_type},
};
use intercept_common::names;

use super::{Feature, Missing, ProbeError};
use crate::{
    netns,
    objects::CAPTURE,
    programs,
    sys::{self, ProgramKind},
};

/// The names of the helpers that programs may use. The kernel knows helpers by number.
const HELPERS: [BpfHelper; 36] = [
    BpfHelper::BPF_FUNC_get_current_ancestor_cgroup_id,
    BpfHelper::BPF_FUNC_map_lookup_elem,
    BpfHelper::BPF_FUNC_map_update_elem,
    BpfHelper::BPF_FUNC_map_delete_elem,
    BpfHelper::BPF_FUNC_ktime_get_ns,
    BpfHelper::BPF_FUNC_ktime_get_boot_ns,
    BpfHelper::BPF_FUNC_get_smp_processor_id,
    BpfHelper::BPF_FUNC_tail_call,
    BpfHelper::BPF_FUNC_get_current_pid_tgid,
    BpfHelper::BPF_FUNC_get_current_uid_gid,
    BpfHelper::BPF_FUNC_get_current_comm,
    BpfHelper::BPF_FUNC_sock_ops_cb_flags_set,
    BpfHelper::BPF_FUNC_bind,
    BpfHelper::BPF_FUNC_sock_hash_update,
    BpfHelper::BPF_FUNC_sk_release,
    BpfHelper::BPF_FUNC_sk_fullsock,
    BpfHelper::BPF_FUNC_sk_storage_get,
    BpfHelper::BPF_FUNC_sk_storage_delete,
    BpfHelper::BPF_FUNC_probe_read_kernel,
    BpfHelper::BPF_FUNC_get_netns_cookie,
    BpfHelper::BPF_FUNC_get_socket_cookie,
    BpfHelper::BPF_FUNC_sk_assign,
    BpfHelper::BPF_FUNC_ringbuf_output,
    BpfHelper::BPF_FUNC_ringbuf_reserve,
    BpfHelper::BPF_FUNC_ringbuf_submit,
    BpfHelper::BPF_FUNC_ringbuf_discard,
    BpfHelper::BPF_FUNC_getsockopt,
    BpfHelper::BPF_FUNC_setsockopt,
    BpfHelper::BPF_FUNC_set_retval,
    BpfHelper::BPF_FUNC_sk_lookup_tcp,
    BpfHelper::BPF_FUNC_sk_lookup_udp,
    BpfHelper::BPF_FUNC_skc_to_tcp_sock,
    BpfHelper::BPF_FUNC_tcp_sock,
    BpfHelper::BPF_FUNC_jiffies64,
    BpfHelper::BPF_FUNC_map_push_elem,
    BpfHelper::BPF_FUNC_get_prandom_u32,
];

/// The programs in the order in which they are attached.
fn all_programs() -> impl Iterator<Item = &'static str> {
    names::CGROUP_PROGRAMS.into_iter().chain([names::SK_LOOKUP, names::STEER_INBOUND])
}

/// Returns what this kernel lacks: hooks first, features of all programs last.
pub fn missing() -> Result<Vec<Missing>, ProbeError> {
    let uses = Uses::of_object()?;
    let mut missing = Vec::new();
    let mut without_hook = BTreeSet::new();
    for program in all_programs() {
        let kind = programs::kind(program);
        // Both programs of sk_lookup use one hook.
        if program != names::STEER_INBOUND && !takes(kind, &[MOVE_1, EXIT], &format!("hook of {program}"))? {
            without_hook.insert(kind);
            missing.push(Missing { feature: Feature::Hook, programs: vec![program] });
        }
    }
    // A program type without a hook cannot be used to probe anything else.
    let can_be_tried = |program: &&'static str| !without_hook.contains(&programs::kind(program));
    for (helper, users) in &uses.helpers {
        let mut without = Vec::new();
        for program in users.iter().filter(|program| can_be_tried(program)) {
            if !knows_helper(programs::kind(program), *helper)? {
                without.push(*program);
            }
        }
        if !without.is_empty() {
            missing.push(Missing { feature: Feature::Helper(helper_name(*helper)), programs: without });
        }
    }
    let users: Vec<_> = uses.fetching_atomics.iter().copied().filter(can_be_tried).collect();
    if let Some(program) = users.first()
        && !takes(programs::kind(program), &FETCHING, "atomic operations that return the old value")?
    {
        missing.push(Missing { feature: Feature::FetchingAtomics, programs: users });
    }
    for kind in uses.maps {
        if !supports_map(kind)? {
            missing
                .push(Missing { feature: Feature::Map(map_name(kind)), programs: all_programs().collect() });
        }
    }
    if !netns::tells_cookies().map_err(|source| refused("SO_NETNS_COOKIE".to_owned(), source))? {
        missing.push(Missing { feature: Feature::NetnsCookie, programs: Vec::new() });
    }
    Ok(missing)
}

fn refused(what: String, source: io::Error) -> ProbeError {
    ProbeError::Refused { what, source }
}

/// Features that the programs use.
#[derive(Default)]
struct Uses {
    /// The programs that use a helper, by its number.
    helpers: BTreeMap<u32, Vec<&'static str>>,
    fetching_atomics: Vec<&'static str>,
    maps: BTreeSet<u32>,
}

impl Uses {
    fn of_object() -> Result<Self, ProbeError> {
        let failed = |error: Box<dyn std::error::Error + Send + Sync>| ProbeError::Object(error);
        let mut object = Object::parse(CAPTURE).map_err(|e| failed(e.into()))?;
        let text_sections: HashSet<usize> = object.functions.keys().map(|(section, _)| *section).collect();
        object.relocate_calls(&text_sections).map_err(|e| failed(e.into()))?;
        let mut uses = Self::default();
        for name in all_programs() {
            let program =
                object.programs.get(name).ok_or_else(|| failed(format!("no program {name}").into()))?;
            let function = object.functions.get(&program.function_key());
            let function = function.ok_or_else(|| failed(format!("no code of {name}").into()))?;
            uses.read(name, &function.instructions);
        }
        uses.maps = object.maps.values().map(aya_obj::Map::map_type).collect();
        Ok(uses)
    }

    fn read(&mut self, program: &'static str, instructions: &[bpf_insn]) {
        for instruction in instructions {
            if instruction.code == CALL && instruction.src_reg() == 0 {
                let users = self.helpers.entry(instruction.imm.cast_unsigned()).or_default();
                if !users.contains(&program) {
                    users.push(program);
                }
            }
        }
        let fetches = |instruction: &bpf_insn| {
            [ATOMIC_32, ATOMIC_64].contains(&instruction.code) && instruction.imm & i32::from(FETCH) != 0
        };
        if instructions.iter().any(fetches) {
            self.fetching_atomics.push(program);
        }
    }
}

const CALL: u8 = 0x85;
const ATOMIC_32: u8 = 0xc3;
const ATOMIC_64: u8 = 0xdb;
const FETCH: u8 = 0x01;
const OR: u8 = 0x40;

/// `r0 = 1`, a valid return value of every hook.
const MOVE_1: [u8; 8] = [0xb7, 0, 0, 0, 1, 0, 0, 0];
const EXIT: [u8; 8] = [0x95, 0, 0, 0, 0, 0, 0, 0];
/// Sets a word of the stack to 0 by an atomic fetch, and returns the old value, 0.
const FETCHING: [[u8; 8]; 5] = [
    [0xb7, 1, 0, 0, 0, 0, 0, 0],
    [0x7b, 0x1a, 0xf8, 0xff, 0, 0, 0, 0],
    [ATOMIC_64, 0x1a, 0xf8, 0xff, OR | FETCH, 0, 0, 0],
    MOVE_1,
    EXIT,
];

/// Whether the kernel accepts a program. A known type with valid code is accepted.
fn takes(kind: ProgramKind, code: &[[u8; 8]], what: &str) -> Result<bool, ProbeError> {
    match sys::try_program(kind, code.as_flattened()) {
        Ok(()) => Ok(true),
        // Refused before the code is verified (unknown type or hook), or by the verifier, whose log is then not empty.
        Err(rejection) if matches!(rejection.source.raw_os_error(), Some(libc::EINVAL | libc::E2BIG)) => {
            Ok(false)
        }
        Err(rejection) => Err(refused(what.to_owned(), rejection.source)),
    }
}

/// Whether programs of a type may call a helper, by the verifier's message, as libbpf probes it.
fn knows_helper(kind: ProgramKind, helper: u32) -> Result<bool, ProbeError> {
    const UNKNOWN: [&str; 3] = ["invalid func ", "unknown func ", "program of this type cannot use helper "];
    let [a, b, c, d] = helper.to_le_bytes();
    match sys::try_program(kind, [[CALL, 0, 0, 0, a, b, c, d], EXIT].as_flattened()) {
        Ok(()) => Ok(true),
        Err(rejection) if UNKNOWN.iter().any(|word| rejection.log.contains(word)) => Ok(false),
        // The verifier knows the helper and complains about its missing arguments.
        Err(rejection) if !rejection.log.is_empty() => Ok(true),
        Err(rejection) => Err(refused(format!("helper {}", helper_name(helper)), rejection.source)),
    }
}

/// Returns a name such as "bpf_map_lookup_elem".
fn helper_name(helper: u32) -> String {
    let known = HELPERS.iter().find(|known| **known as u32 == helper);
    known.map_or_else(
        || format!("number {helper}"),
        |known| format!("{known:?}").replacen("BPF_FUNC_", "bpf_", 1),
    )
}

fn map_type(kind: u32) -> Option<bpf_map_type> {
    bpf_map_type::try_from(kind).ok()
}

fn supports_map(kind: u32) -> Result<bool, ProbeError> {
    let Some(known) = map_type(kind).and_then(|kind| MapType::try_from(kind).ok()) else { return Ok(true) };
    is_map_supported(known)
        .map_err(|error| refused(format!("maps of type {}", map_name(kind)), io::Error::other(error)))
}

/// Returns a name such as "ringbuf".
fn map_name(kind: u32) -> String {
    let name = map_type(kind).map(|kind| format!("{kind:?}").replacen("BPF_MAP_TYPE_", "", 1).to_lowercase());
    name.unwrap_or_else(|| format!("number {kind}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_kernel_lacks_nothing() {
        assert_eq!(missing().expect("tried"), []);
    }

    #[test]
    fn what_the_programs_use_is_read_from_them() {
        let uses = Uses::of_object().expect("read");
        for (helper, users) in &uses.helpers {
            assert!(
                !helper_name(*helper).starts_with("number"),
                "helper {helper} of {users:?} has no name: add it"
            );
        }
        let cookie = &uses.helpers[&(BpfHelper::BPF_FUNC_get_netns_cookie as u32)];
        assert!(cookie.contains(&names::SOCK_OPS) && !cookie.contains(&names::SK_LOOKUP), "{cookie:?}");
        let names: Vec<_> = uses.maps.iter().map(|kind| map_name(*kind)).collect();
        assert!(names.iter().any(|name| name == "lpm_trie"), "{names:?}");
    }

    /// Probes a helper number and a hook that no kernel has.
    #[test]
    fn what_is_unknown_is_found_missing() {
        let kind = programs::kind(names::CONNECT4);
        assert!(knows_helper(kind, BpfHelper::BPF_FUNC_bind as u32).expect("tried"));
        assert!(!knows_helper(kind, 9999).expect("tried"));
        // The helper exists, but not for this program type.
        assert!(
            !knows_helper(programs::kind(names::SK_LOOKUP), BpfHelper::BPF_FUNC_get_netns_cookie as u32)
                .expect("tried")
        );
        assert!(
            !takes(ProgramKind { attach_type: 9999, ..kind }, &[MOVE_1, EXIT], "nothing").expect("tried")
        );
    }
}
