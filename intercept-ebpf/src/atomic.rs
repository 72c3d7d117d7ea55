//! Atomic operations on map values. `core` has none for BPF (the target has no compare-and-swap as far as Rust
//! knows), the instruction set has since Linux 5.12.

/// `*word |= bits`, and what it was.
///
/// # Safety
/// `word` is aligned and inside a map value.
#[inline(always)]
pub(crate) unsafe fn fetch_or(word: *mut u64, bits: u64) -> u64 {
    let mut value = bits;
    #[cfg(target_arch = "bpf")]
    // SAFETY: one instruction on a word that the caller vouches for.
    unsafe {
        core::arch::asm!("{0} = atomic_fetch_or((u64 *)({1} + 0), {0})", inout(reg) value, in(reg) word);
    }
    #[cfg(not(target_arch = "bpf"))]
    // SAFETY: as the caller vouches.
    unsafe {
        value = core::sync::atomic::AtomicU64::from_ptr(word)
            .fetch_or(value, core::sync::atomic::Ordering::Relaxed);
    }
    value
}

/// `*word &= bits`, and what it was.
///
/// # Safety
/// `word` is aligned and inside a map value.
#[inline(always)]
pub(crate) unsafe fn fetch_and(word: *mut u64, bits: u64) -> u64 {
    let mut value = bits;
    #[cfg(target_arch = "bpf")]
    // SAFETY: one instruction on a word that the caller vouches for.
    unsafe {
        core::arch::asm!("{0} = atomic_fetch_and((u64 *)({1} + 0), {0})", inout(reg) value, in(reg) word);
    }
    #[cfg(not(target_arch = "bpf"))]
    // SAFETY: as the caller vouches.
    unsafe {
        value = core::sync::atomic::AtomicU64::from_ptr(word)
            .fetch_and(value, core::sync::atomic::Ordering::Relaxed);
    }
    value
}

/// `*word += more`, and what it was.
///
/// # Safety
/// `word` is aligned and inside a map value.
#[inline(always)]
pub(crate) unsafe fn fetch_add(word: *mut u64, more: u64) -> u64 {
    let mut value = more;
    #[cfg(target_arch = "bpf")]
    // SAFETY: one instruction on a word that the caller vouches for.
    unsafe {
        core::arch::asm!("{0} = atomic_fetch_add((u64 *)({1} + 0), {0})", inout(reg) value, in(reg) word);
    }
    #[cfg(not(target_arch = "bpf"))]
    // SAFETY: as the caller vouches.
    unsafe {
        value = core::sync::atomic::AtomicU64::from_ptr(word)
            .fetch_add(value, core::sync::atomic::Ordering::Relaxed);
    }
    value
}

/// Sets `*word`. Returns what it was.
///
/// # Safety
/// `word` is aligned and inside a map value.
#[inline(always)]
pub(crate) unsafe fn swap(word: *mut u64, new: u64) -> u64 {
    let mut value = new;
    #[cfg(target_arch = "bpf")]
    // SAFETY: one instruction on a word that the caller vouches for.
    unsafe {
        core::arch::asm!("{0} = xchg_64({1} + 0, {0})", inout(reg) value, in(reg) word);
    }
    #[cfg(not(target_arch = "bpf"))]
    // SAFETY: as the caller vouches.
    unsafe {
        value =
            core::sync::atomic::AtomicU64::from_ptr(word).swap(value, core::sync::atomic::Ordering::Relaxed);
    }
    value
}
