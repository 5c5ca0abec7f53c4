//! SSE to SSE4.2: what the families share (availability checks, operands, unmasked exceptions) and [`select`].
//!
//! Order of checks, as silicon has it: #UD (CR0.EM, CR4.OSFXSR), #NM (CR0.TS), #MF where MMX registers take part, memory
//! operand (#GP for alignment before #PF), then the operation and #XM.

use iced_x86::Instruction;

use crate::core::{Core, GP, NM, UD, XM};
use crate::insn::{AddrSize, Fault, Flow, Handler, Insn};
use crate::state::RDI;

pub const CR0_MP: u64 = 1 << 1;
pub const CR0_EM: u64 = 1 << 2;
pub const CR0_TS: u64 = 1 << 3;
pub const CR4_OSFXSR: u64 = 1 << 9;
pub const CR4_OSXMMEXCPT: u64 = 1 << 10;

/// MXCSR bits that exist (FXSAVE's MXCSR_MASK): no misaligned-SSE bit in the profile.
pub const MXCSR_MASK: u32 = 0xffff;
const MXCSR_MASKS: u32 = 0x1f80;
const MXCSR_FLAGS: u32 = 0x3f;

/// The handler for an SSE instruction, `None` for what is not one.
pub fn select(i: &Instruction) -> Option<Handler> {
    super::sse_move::select(i)
        .or_else(|| super::sse_int::select(i))
        .or_else(|| super::sse_float::select(i))
        .or_else(|| super::sse_convert::select(i))
        .or_else(|| super::sse_lane::select(i))
        .or_else(|| super::sse_string::select(i))
        .or_else(|| super::sse_state::select(i))
}

/// XMM register number of operand `n`.
#[inline(always)]
pub fn x(i: &Insn, n: usize) -> usize {
    (i.r[n] & 15) as usize
}

/// #UD and #NM.
#[inline(always)]
pub fn gate(c: &mut Core) -> Result<(), Fault> {
    if c.cpu.cr0 & (CR0_EM | CR0_TS) != 0 || c.cpu.cr4 & CR4_OSFXSR == 0 { closed(c) } else { Ok(()) }
}

#[cold]
fn closed(c: &mut Core) -> Result<(), Fault> {
    let ud = c.cpu.cr0 & CR0_EM != 0 || c.cpu.cr4 & CR4_OSFXSR == 0;
    Err(c.raise(if ud { UD } else { NM }, None))
}

/// Address of a 16-byte operand that must be aligned.
#[inline(always)]
fn aligned(c: &mut Core, i: &Insn) -> Result<u64, Fault> {
    let a = c.ea(i);
    if a & 15 != 0 { Err(c.raise(GP, Some(0))) } else { Ok(a) }
}

/// Address of MASKMOVQ's and MASKMOVDQU's implied operand.
pub fn rdi(c: &Core, i: &Insn) -> u64 {
    let offset = match i.asize {
        AddrSize::A64 => c.cpu.gpr[RDI],
        AddrSize::A32 => c.cpu.gpr[RDI] & 0xffff_ffff,
        AddrSize::A16 => c.cpu.gpr[RDI] & 0xffff,
    };
    c.linear(c.cpu.seg_base[(i.seg & 7) as usize], offset)
}

/// MASKMOVQ and MASKMOVDQU: the bytes of `v` that `mask` selects. As on AMD all must be writable, selected or not.
pub fn store_masked(c: &mut Core, i: &Insn, v: u128, mask: u32, len: u64) -> Result<(), Fault> {
    let a = rdi(c, i);
    c.probe_write(a, len)?;
    for n in (0..len).filter(|n| mask >> n & 1 != 0) {
        c.store8(c.linear(a, n), (v >> (8 * n)) as u8)?;
    }
    Ok(())
}

/// 16 bytes, aligned.
#[inline(always)]
pub fn ld128(c: &mut Core, i: &Insn) -> Result<u128, Fault> {
    let a = aligned(c, i)?;
    c.load128(a)
}

/// 16 bytes, any address.
#[inline(always)]
pub fn ld128u(c: &mut Core, i: &Insn) -> Result<u128, Fault> {
    let a = c.ea(i);
    c.load128(a)
}

#[inline(always)]
pub fn ld64(c: &mut Core, i: &Insn) -> Result<u64, Fault> {
    let a = c.ea(i);
    c.load64(a)
}

#[inline(always)]
pub fn ld32(c: &mut Core, i: &Insn) -> Result<u32, Fault> {
    let a = c.ea(i);
    c.load32(a)
}

#[inline(always)]
pub fn ld16(c: &mut Core, i: &Insn) -> Result<u16, Fault> {
    let a = c.ea(i);
    c.load16(a)
}

#[inline(always)]
pub fn ld8(c: &mut Core, i: &Insn) -> Result<u8, Fault> {
    let a = c.ea(i);
    c.load8(a)
}

#[inline(always)]
pub fn st128(c: &mut Core, i: &Insn, v: u128) -> Result<(), Fault> {
    let a = aligned(c, i)?;
    c.store128(a, v)
}

#[inline(always)]
pub fn st128u(c: &mut Core, i: &Insn, v: u128) -> Result<(), Fault> {
    let a = c.ea(i);
    c.store128(a, v)
}

#[inline(always)]
pub fn st64(c: &mut Core, i: &Insn, v: u64) -> Result<(), Fault> {
    let a = c.ea(i);
    c.store64(a, v)
}

#[inline(always)]
pub fn st32(c: &mut Core, i: &Insn, v: u32) -> Result<(), Fault> {
    let a = c.ea(i);
    c.store32(a, v)
}

#[inline(always)]
pub fn st16(c: &mut Core, i: &Insn, v: u16) -> Result<(), Fault> {
    let a = c.ea(i);
    c.store16(a, v)
}

#[inline(always)]
pub fn st8(c: &mut Core, i: &Insn, v: u8) -> Result<(), Fault> {
    let a = c.ea(i);
    c.store8(a, v)
}

/// All SIMD exceptions are masked.
#[inline(always)]
pub fn masked(c: &Core) -> bool {
    c.cpu.mxcsr & MXCSR_MASKS == MXCSR_MASKS
}

/// Runs a floating-point operation under the guest's MXCSR. `judge` is asked when overflow or underflow are not masked, see
/// `sse_exact`.
#[inline(always)]
pub fn float<T>(c: &mut Core, op: impl FnOnce(&mut u32) -> T, judge: impl FnOnce(&T, u32) -> (bool, bool)) -> Result<T, Fault> {
    let csr = c.cpu.mxcsr & MXCSR_MASK;
    if csr & MXCSR_MASKS == MXCSR_MASKS {
        let mut now = csr;
        let r = op(&mut now);
        c.cpu.mxcsr = now;
        Ok(r)
    } else {
        unmasked(c, csr, op, judge)
    }
}

#[cold]
fn unmasked<T>(
    c: &mut Core,
    csr: u32,
    op: impl FnOnce(&mut u32) -> T,
    judge: impl FnOnce(&T, u32) -> (bool, bool),
) -> Result<T, Fault> {
    const PRE: u32 = 7; // IE DE ZE come before the operation
    const OE: u32 = 1 << 3;
    const UE: u32 = 1 << 4;
    const PE: u32 = 1 << 5;
    const FTZ: u32 = 1 << 15;
    let mut now = (csr | MXCSR_MASKS) & !MXCSR_FLAGS;
    let want = !(csr >> 7) & MXCSR_FLAGS;
    if want & UE != 0 {
        now &= !FTZ; // flush to zero is the masked response
    }
    let r = op(&mut now);
    let mut new = now & MXCSR_FLAGS;
    if want & (OE | UE) != 0 {
        let (tiny, inexact) = judge(&r, csr);
        if tiny && want & UE != 0 {
            new |= UE;
        }
        if new & want & (OE | UE) != 0 && !inexact && new & !want & OE == 0 {
            new &= !PE;
        }
    }
    if new & want & PRE != 0 {
        new &= PRE;
    }
    c.cpu.mxcsr = csr | new;
    if new & want == 0 {
        return Ok(r);
    }
    Err(c.raise(if c.cpu.cr4 & CR4_OSXMMEXCPT != 0 { XM } else { UD }, None))
}

/// For operations that neither overflow nor underflow.
pub fn never<T>(_: &T, _: u32) -> (bool, bool) {
    (false, false)
}

pub(super) const NEXT: Result<Flow, Fault> = Ok(Flow::Next);

/// A handler from a body that ends in `Result<(), Fault>`.
macro_rules! h {
    (|$c:ident, $i:ident| $b:expr) => {{
        fn f($c: &mut crate::core::Core, $i: &crate::insn::Insn) -> Result<crate::insn::Flow, crate::insn::Fault> {
            $crate::exec::sse::gate($c)?;
            $b;
            $crate::exec::sse::NEXT
        }
        f as crate::insn::Handler
    }};
}
pub(super) use h;
