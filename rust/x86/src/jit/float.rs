//! MXCSR while translated code runs: the guest's own from its first floating-point instruction on, Rust's otherwise.

use std::arch::asm;

use super::frame::{FLOATING, SSE};
use crate::core::Core;
use crate::exec::sse::{CR0_EM, CR0_TS, CR4_OSFXSR};

/// What Rust code runs with.
const DEFAULT: u32 = 0x1f80;
const MASKS: u32 = 0x1f80;
const STICKY: u32 = 0x3f;

fn set(csr: u32) {
    // SAFETY: all exceptions are masked in every value that is passed, and reserved bits are clear.
    unsafe { asm!("ldmxcsr dword ptr [{}]", in(reg) &csr, options(nostack, preserves_flags, readonly)) };
}

fn get() -> u32 {
    let mut csr = 0u32;
    // SAFETY: stores four bytes to a local variable.
    unsafe { asm!("stmxcsr dword ptr [{}]", in(reg) &mut csr, options(nostack, preserves_flags)) };
    csr
}

impl Core {
    /// On the way into translated code.
    pub(super) fn allow_sse(&mut self) {
        let closed = self.cpu.cr0 & (CR0_EM | CR0_TS) != 0 || self.cpu.cr4 & CR4_OSFXSR == 0;
        self.cpu.gpr[SSE] = u64::from(!closed);
        self.cpu.gpr[FLOATING] = 0;
        // What has just computed will do so again.
        if self.floats > 0 && !closed {
            self.floats -= 1;
            self.resume_floating();
        }
    }

    /// An instruction that computes under MXCSR was left to its function.
    pub(super) fn note_floating(&mut self) {
        self.floats = 64;
    }

    /// Before Rust code runs: its MXCSR, and the guest's with the flags that were raised. Gives whether the guest's was loaded.
    pub(super) fn suspend_floating(&mut self) -> bool {
        let loaded = self.cpu.gpr[FLOATING] != 0;
        if loaded {
            self.cpu.mxcsr |= get() & STICKY;
            set(DEFAULT);
            self.cpu.gpr[FLOATING] = 0;
        }
        loaded
    }

    /// Before translated code goes on after a floating-point instruction.
    pub(super) fn resume_floating(&mut self) {
        if self.cpu.mxcsr & MASKS == MASKS {
            set(self.cpu.mxcsr & 0xffff);
            self.cpu.gpr[FLOATING] = 1;
        }
    }
}
