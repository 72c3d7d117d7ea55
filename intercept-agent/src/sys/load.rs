//! The `bpf()` calls that load programs and their types, and the verifier's log.

use std::{
    io,
    mem::size_of,
    os::fd::{BorrowedFd, OwnedFd},
};

use aya_obj::generated::{
    bpf_attach_type, bpf_attr, bpf_cmd, bpf_func_info, bpf_insn, bpf_line_info, bpf_prog_type,
};

use super::{call, call_for_fd, empty_attr, raw, write_name};

/// Type and hook of a program.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct ProgramKind {
    /// `BPF_PROG_TYPE_*`.
    pub program_type: u32,
    /// Expected attach type, `BPF_*`; 0 for hooks that the kernel does not check at load time.
    pub attach_type: u32,
}

/// The licence in the programs' ELF sections. Many helpers are reserved to GPL-compatible programs.
const LICENSE: &std::ffi::CStr = c"Dual MIT/GPL";

/// Sizes of the buffer for the verifier's log in bytes, tried in this order. A kernel before 6.4 gives no log that does not
/// fit; others give its end.
const LOG_SIZES: [usize; 2] = [256 << 10, 16 << 20];
/// Lines of the log that an error has: the verifier's reason is at its end.
const LOG_LINES: usize = 40;

/// The kernel refused a program or its types.
#[derive(Debug, thiserror::Error)]
#[error("the kernel refused it{}", self.text())]
pub struct Rejection {
    /// The error.
    #[source]
    pub source: io::Error,
    /// The end of the verifier's log, which is empty if it was refused before it was verified.
    pub log: String,
}

impl Rejection {
    fn text(&self) -> String {
        if self.log.is_empty() {
            String::new()
        } else {
            format!("; the end of the verifier's log:\n{}", self.log)
        }
    }
}

/// A program with the types of its functions. The verifier needs these for global functions.
pub struct ProgramLoad<'a> {
    /// Type and hook.
    pub kind: ProgramKind,
    /// Its name in the kernel, which keeps the first 15 bytes.
    pub name: &'a str,
    /// Its relocated instructions.
    pub instructions: &'a [bpf_insn],
    /// Its types, loaded with [`load_btf`].
    pub btf: BorrowedFd<'a>,
    /// The types of the functions.
    pub functions: &'a [bpf_func_info],
    /// The source lines, for the verifier's log.
    pub lines: &'a [bpf_line_info],
}

impl ProgramLoad<'_> {
    /// Loads it (BPF_PROG_LOAD).
    pub fn load(&self) -> Result<OwnedFd, Rejection> {
        with_log(|log| {
            let mut attr =
                program_attr(self.kind, self.instructions.as_ptr().cast(), self.instructions.len())?;
            // SAFETY: writes of integers to a variant of a union that is all zero.
            let load = unsafe { &mut attr.__bindgen_anon_3 };
            write_name(&mut load.prog_name, self.name);
            load.prog_btf_fd = raw(self.btf);
            load.func_info = self.functions.as_ptr() as u64;
            load.func_info_cnt = u32::try_from(self.functions.len()).map_err(io::Error::other)?;
            load.func_info_rec_size = size_u32::<bpf_func_info>()?;
            load.line_info = self.lines.as_ptr() as u64;
            load.line_info_cnt = u32::try_from(self.lines.len()).map_err(io::Error::other)?;
            load.line_info_rec_size = size_u32::<bpf_line_info>()?;
            if !log.is_empty() {
                load.log_buf = log.as_mut_ptr() as u64;
                load.log_size = u32::try_from(log.len()).map_err(io::Error::other)?;
                load.log_level = 1;
            }
            call_for_fd(bpf_cmd::BPF_PROG_LOAD, &mut attr)
        })
    }
}

/// Loads the types of an object's programs and maps (BPF_BTF_LOAD).
pub fn load_btf(types: &[u8]) -> Result<OwnedFd, Rejection> {
    with_log(|log| {
        let mut attr = empty_attr();
        // SAFETY: as above.
        let load = unsafe { &mut attr.__bindgen_anon_7 };
        load.btf = types.as_ptr() as u64;
        load.btf_size = u32::try_from(types.len()).map_err(io::Error::other)?;
        if !log.is_empty() {
            load.btf_log_buf = log.as_mut_ptr() as u64;
            load.btf_log_size = u32::try_from(log.len()).map_err(io::Error::other)?;
            load.btf_log_level = 1;
        }
        call_for_fd(bpf_cmd::BPF_BTF_LOAD, &mut attr)
    })
}

/// Calls without a log, which costs time. After a rejection, calls again to read why.
fn with_log(mut load: impl FnMut(&mut [u8]) -> io::Result<OwnedFd>) -> Result<OwnedFd, Rejection> {
    let source = match load(&mut []) {
        Ok(loaded) => return Ok(loaded),
        Err(error) => error,
    };
    for size in LOG_SIZES {
        let mut log = vec![0u8; size];
        match load(&mut log) {
            // A program that needed more memory than there was a moment ago.
            Ok(loaded) => return Ok(loaded),
            Err(error) if error.raw_os_error() == Some(libc::ENOSPC) => {}
            Err(_) => return Err(Rejection { source, log: last_lines(&text(&log)) }),
        }
    }
    Err(Rejection { source, log: String::new() })
}

/// The text before the first zero byte.
fn text(log: &[u8]) -> String {
    String::from_utf8_lossy(log.split(|byte| *byte == 0).next().unwrap_or_default()).into_owned()
}

fn last_lines(log: &str) -> String {
    let lines: Vec<_> = log.lines().collect();
    lines[lines.len().saturating_sub(LOG_LINES)..].join("\n")
}

fn size_u32<T>() -> io::Result<u32> {
    u32::try_from(size_of::<T>()).map_err(io::Error::other)
}

/// The attributes of a program without its name. `code` must outlive them.
pub(super) fn program_attr(kind: ProgramKind, code: *const u8, instructions: usize) -> io::Result<bpf_attr> {
    let mut attr = empty_attr();
    // SAFETY: as above.
    let load = unsafe { &mut attr.__bindgen_anon_3 };
    load.prog_type = kind.program_type;
    load.expected_attach_type = kind.attach_type;
    load.insn_cnt = u32::try_from(instructions).map_err(io::Error::other)?;
    load.insns = code as u64;
    load.license = LICENSE.as_ptr() as u64;
    Ok(attr)
}

/// Loads an `sk_lookup` program. Its BTF is omitted: nothing needs it, and each pod has an instance.
pub fn load_sk_lookup(name: &str, instructions: &[bpf_insn]) -> io::Result<OwnedFd> {
    let kind = ProgramKind {
        program_type: bpf_prog_type::BPF_PROG_TYPE_SK_LOOKUP as u32,
        attach_type: bpf_attach_type::BPF_SK_LOOKUP as u32,
    };
    let mut attr = program_attr(kind, instructions.as_ptr().cast(), instructions.len())?;
    // SAFETY: as above.
    let load = unsafe { &mut attr.__bindgen_anon_3 };
    write_name(&mut load.prog_name, name);
    call_for_fd(bpf_cmd::BPF_PROG_LOAD, &mut attr)
}

/// Runs a program of raw tracepoints once, on this thread (BPF_PROG_TEST_RUN), and returns what it returns.
pub(super) fn run(program: BorrowedFd<'_>, arguments: [u64; 2]) -> io::Result<u32> {
    let mut attr = empty_attr();
    attr.test.prog_fd = raw(program);
    attr.test.ctx_in = arguments.as_ptr() as u64;
    attr.test.ctx_size_in = u32::try_from(size_of_val(&arguments)).map_err(io::Error::other)?;
    call(bpf_cmd::BPF_PROG_TEST_RUN, &mut attr)?;
    // SAFETY: the kernel writes the result into the same variant.
    Ok(unsafe { attr.test.retval })
}

/// Checks whether the kernel accepts a program, given as its encoded instructions.
///
/// # Errors
/// The error with the verifier's log, which is empty if the program was refused before it was verified.
pub fn try_program(kind: ProgramKind, code: &[u8]) -> Result<(), Rejection> {
    let plain = |source| Rejection { source, log: String::new() };
    let mut log = vec![0u8; 4096];
    let mut attr = program_attr(kind, code.as_ptr(), code.len() / size_of::<bpf_insn>()).map_err(plain)?;
    // SAFETY: as above.
    let load = unsafe { &mut attr.__bindgen_anon_3 };
    load.log_buf = log.as_mut_ptr() as u64;
    load.log_size = u32::try_from(log.len()).map_err(io::Error::other).map_err(plain)?;
    load.log_level = 1;
    let loaded = call_for_fd(bpf_cmd::BPF_PROG_LOAD, &mut attr);
    loaded.map(drop).map_err(|source| Rejection { source, log: text(&log) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refused_program_is_named_with_the_verifiers_reason() {
        let kind = ProgramKind {
            program_type: bpf_prog_type::BPF_PROG_TYPE_SK_LOOKUP as u32,
            attach_type: bpf_attach_type::BPF_SK_LOOKUP as u32,
        };
        // exit, with no value in r0.
        const EXIT: [u8; 8] = [0x95, 0, 0, 0, 0, 0, 0, 0];
        let refused = try_program(kind, &EXIT).expect_err("refused");
        assert!(refused.to_string().contains("R0 !read_ok"), "{refused}");
    }

    #[test]
    fn types_that_are_none_are_refused_with_the_reason() {
        let refused = load_btf(&[0; 24]).expect_err("refused");
        assert!(refused.log.contains("magic"), "{refused}");
    }

    #[test]
    fn the_end_of_a_long_log_is_kept() {
        let log: String = (0..1000).map(|line| format!("{line}\n")).collect();
        let kept = last_lines(&log);
        assert_eq!((kept.lines().next(), kept.lines().last()), (Some("960"), Some("999")));
    }
}
