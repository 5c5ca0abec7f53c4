//! MXCSR and the x87 registers while translated code runs: the guest's own once it computes, Rust's otherwise.
//!
//! The x87 registers are loaded and saved by the code at the region's start ([`super::frame::thunks`]), from and to [`X87Image`]; whether is
//! decided here. It costs as much as three x87 instructions by their functions, so that as many are waited for: whatever follows,
//! that is at most twice what would have been best. With an unmasked exception they are never loaded.

use std::arch::asm;

use super::frame::{FLOATING, SSE, X87};
use crate::core::Core;
use crate::exec::fpu::{EXCEPTIONS, TOP};
use crate::exec::sse::{CR0_EM, CR0_TS, CR4_OSFXSR};
use crate::state::Fpu;

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

/// x87 instructions left to functions before the registers are loaded.
const X87_AFTER: u8 = 3;

/// What FNSAVE writes and FRSTOR reads in 64-bit code.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub(crate) struct X87Image {
    control: u32,
    status: u32,
    /// Two bits a physical register; 3: empty.
    tags: u32,
    pointers: [u32; 4],
    /// ST0 first.
    registers: [[u16; 5]; 8],
}

/// Two bits a register, 3: empty, of one bit a register, 0: empty.
fn full_tags(in_use: u8) -> u32 {
    let spread = |v: u32| {
        let v = (v | v << 4) & 0x0f0f;
        let v = (v | v << 2) & 0x3333;
        (v | v << 1) & 0x5555
    };
    spread(u32::from(!in_use)) * 3
}
fn in_use(tags: u32) -> u8 {
    let v = tags & tags >> 1 & 0x5555;
    let v = (v | v >> 1) & 0x3333;
    let v = (v | v >> 2) & 0x0f0f;
    !((v | v >> 4) as u8)
}

impl X87Image {
    fn put(&mut self, f: &Fpu) {
        (self.control, self.status, self.tags) = (f.fcw.into(), f.fsw.into(), full_tags(f.ftw));
        let top = usize::from((f.fsw & TOP) >> 11);
        for (n, register) in self.registers.iter_mut().enumerate() {
            let r = &f.st[(top + n) & 7];
            let m = r.mantissa;
            *register = [m as u16, (m >> 16) as u16, (m >> 32) as u16, (m >> 48) as u16, r.sign_exp];
        }
    }

    fn take(&self, f: &mut Fpu) {
        (f.fcw, f.fsw, f.ftw) = (self.control as u16, self.status as u16, in_use(self.tags));
        let top = usize::from((f.fsw & TOP) >> 11);
        for (n, &[a, b, c, d, sign_exp]) in self.registers.iter().enumerate() {
            let r = &mut f.st[(top + n) & 7];
            r.mantissa = u64::from(a) | u64::from(b) << 16 | u64::from(c) << 32 | u64::from(d) << 48;
            r.sign_exp = sign_exp;
        }
    }
}

impl Core {
    /// On the way into translated code. `eager`: the registers are loaded now, and again after every x87 instruction's function.
    pub(super) fn allow_x87(&mut self, eager: bool) {
        self.cpu.gpr[X87] = 0;
        self.x87_count = 0;
        self.x87_after = if eager { 0 } else { X87_AFTER };
        if eager {
            self.load_x87();
        }
    }

    /// After translated code has saved the registers, if they were loaded.
    pub(super) fn suspend_x87(&mut self) {
        if self.cpu.gpr[X87] != 0 {
            self.cpu.gpr[X87] = 0;
            self.x87.take(&mut self.cpu.fpu);
            self.x87_count = 0;
        }
    }

    /// An x87 instruction that has a template was left to its function.
    pub(super) fn note_x87(&mut self) {
        self.x87_count += 1;
        if self.x87_count >= self.x87_after {
            self.x87_count = 0;
            self.load_x87();
        }
    }

    /// Translated code will find the registers loaded, if it may.
    fn load_x87(&mut self) {
        let closed = self.cpu.cr0 & (CR0_EM | CR0_TS) != 0 || self.cpu.fpu.fcw & EXCEPTIONS != EXCEPTIONS;
        if !closed {
            self.x87.put(&self.cpu.fpu);
            self.cpu.gpr[X87] = 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_both_ways() {
        assert_eq!(full_tags(0xff), 0);
        assert_eq!(full_tags(0x80), 0x3fff);
        for n in 0..=255 {
            assert_eq!(in_use(full_tags(n)), n);
        }
        assert_eq!(in_use(0b11_10_01_00_00_00_00_11), 0b0111_1110);
    }
}
