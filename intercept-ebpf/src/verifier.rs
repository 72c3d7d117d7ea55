//! Values whose origin is hidden from the compiler or shown to the verifier.

/// Hides from the compiler what it knows about a value. It would omit checks that the verifier, which knows nothing about the
/// result of a global function, needs.
#[inline(always)]
#[cfg_attr(not(target_arch = "bpf"), expect(unused_mut, reason = "changed by assembly only"))]
pub(crate) fn opaque(mut value: u64) -> u64 {
    #[cfg(target_arch = "bpf")]
    // SAFETY: does nothing.
    unsafe {
        // A comment as its text would get a line number, at the place of the next instruction. The kernel refuses two.
        core::arch::asm!("", inout("r0") value, options(pure, nomem, nostack, preserves_flags));
    }
    value
}

/// Loads a constant at this place. The compiler would load it early and keep it on the stack. There the verifier forgets it
/// if something beside it is passed to a function, and refuses the program for what it might return.
#[inline(always)]
pub(crate) fn constant<const VALUE: i32>() -> i32 {
    #[cfg(target_arch = "bpf")]
    {
        let value: u64;
        // SAFETY: loads a constant.
        unsafe { core::arch::asm!("{0} = {1}", out(reg) value, const VALUE, options(nomem, nostack)) };
        value as i32
    }
    #[cfg(not(target_arch = "bpf"))]
    VALUE
}
