//! x87: the register stack, availability and pending exceptions, and [`select`].
//!
//! Pointers as on AMD: every instruction but the control ones (FLDCW, FNSTCW, FNSTSW, FNCLEX, FNINIT, environment and state)
//! records FIP and FOP, those with a memory operand FDP. Code and data selectors are not kept (FCS/FDS read as zero). A pending
//! exception raises #MF at the next waiting instruction also with CR0.NE = 0: FERR# is wired to nothing.

use iced_x86::Instruction;

use super::sse::{CR0_EM, CR0_TS};
use crate::core::{Core, MF, NM};
use crate::insn::{Fault, Handler, Insn};
use crate::state::{CodeSize, F80, Fpu, GPR_BLOCK};

pub const IE: u16 = 1;
pub const DE: u16 = 1 << 1;
pub const ZE: u16 = 1 << 2;
pub const OE: u16 = 1 << 3;
pub const UE: u16 = 1 << 4;
pub const EXCEPTIONS: u16 = 0x3f;
pub const SF: u16 = 1 << 6;
pub const ES: u16 = 1 << 7;
pub const C0: u16 = 1 << 8;
pub const C1: u16 = 1 << 9;
pub const C2: u16 = 1 << 10;
pub const TOP: u16 = 7 << 11;
pub const C3: u16 = 1 << 14;
pub const B: u16 = 1 << 15;
pub const CONDITIONS: u16 = C0 | C1 | C2 | C3;
/// Unmasked, these keep the operation from happening at all.
pub const BEFORE: u16 = IE | DE | ZE;
/// Unmasked, these keep a store to memory from happening.
pub const NO_STORE: u16 = IE | DE | ZE | OE | UE;

/// The masked answer to an invalid operation.
pub const INDEFINITE: F80 = F80 { mantissa: 0xc000_0000_0000_0000, sign_exp: 0xffff };

pub fn select(i: &Instruction) -> Option<Handler> {
    super::fpu_arith::select(i)
        .or_else(|| super::fpu_move::select(i))
        .or_else(|| super::fpu_special::select(i))
        .or_else(|| super::fpu_env::select(i))
}

/// FOP of an instruction: low three bits of the escape byte and ModRM. `None` if `bytes` do not start an x87 instruction.
pub fn opcode(bytes: &[u8], size: CodeSize) -> Option<u16> {
    let long = size == CodeSize::Bits64;
    let prefix = |b: &u8| matches!(b, 0x26 | 0x2e | 0x36 | 0x3e | 0x64..=0x67 | 0xf0 | 0xf2 | 0xf3) || long && b & 0xf0 == 0x40;
    let at = bytes.iter().position(|b| !prefix(b))?;
    match bytes[at..] {
        [escape @ 0xd8..=0xdf, modrm, ..] => Some(u16::from(escape & 7) << 8 | u16::from(modrm)),
        _ => None,
    }
}

/// Physical number of ST(`n`).
#[inline(always)]
pub fn phys(f: &Fpu, n: usize) -> usize {
    ((f.fsw >> 11) as usize + n) & 7
}

#[inline(always)]
pub fn empty(f: &Fpu, n: usize) -> bool {
    f.ftw >> phys(f, n) & 1 == 0
}

#[inline(always)]
pub fn get(f: &Fpu, n: usize) -> F80 {
    f.st[phys(f, n)]
}

/// Writes ST(`n`) and marks it in use.
#[inline(always)]
pub fn set(f: &mut Fpu, n: usize, v: F80) {
    let p = phys(f, n);
    f.st[p] = v;
    f.ftw |= 1 << p;
}

/// Marks ST(`n`) empty.
#[inline(always)]
pub fn free(f: &mut Fpu, n: usize) {
    f.ftw &= !(1 << phys(f, n));
}

/// Adds to TOP.
#[inline(always)]
pub fn rotate(f: &mut Fpu, by: u16) {
    f.fsw = f.fsw & !TOP | f.fsw.wrapping_add(by << 11) & TOP;
}

#[inline(always)]
pub fn pop(f: &mut Fpu) {
    free(f, 0);
    rotate(f, 1);
}

/// An unmasked exception waits to be reported.
#[inline(always)]
pub fn error(f: &Fpu) -> bool {
    f.fsw & ES != 0
}

/// ES and B follow from flags and masks.
#[inline(always)]
pub fn update_error(f: &mut Fpu) {
    f.fsw &= !(ES | B);
    if f.fsw & !f.fcw & EXCEPTIONS != 0 {
        f.fsw |= ES | B;
    }
}

/// What of a control word sticks.
pub fn control(v: u16) -> u16 {
    v & 0x1f3f | 0x40
}

/// FIP and FDP have 57 bits, sign-extended.
pub fn pointer(v: u64) -> u64 {
    ((v << 7) as i64 >> 7) as u64
}

/// Takes over flags and the condition codes in `codes` from the status word of one instruction.
#[inline(always)]
pub fn status(f: &mut Fpu, sw: u16, codes: u16) {
    f.fsw = f.fsw & !codes | sw & (codes | EXCEPTIONS | SF);
    update_error(f);
}

/// Whether one of `kinds` happened in `sw` and is not masked.
#[inline(always)]
pub fn blocked(f: &Fpu, sw: u16, kinds: u16) -> bool {
    sw & !f.fcw & kinds != 0
}

/// Stack overflow or underflow. True if the masked response is to follow.
#[cold]
pub fn stack_fault(f: &mut Fpu, overflow: bool) -> bool {
    f.fsw = f.fsw & !C1 | IE | SF | if overflow { C1 } else { 0 };
    update_error(f);
    f.fcw & IE != 0
}

/// Pushes a value that is already converted.
#[inline(always)]
pub fn push(f: &mut Fpu, v: F80) {
    f.fsw &= !C1;
    if empty(f, 7) {
        rotate(f, 7);
        set(f, 0, v);
    } else if stack_fault(f, true) {
        rotate(f, 7);
        set(f, 0, INDEFINITE);
    }
}

/// #NM for all x87 instructions.
#[inline(always)]
pub fn available(c: &mut Core) -> Result<(), Fault> {
    if c.cpu.cr0 & (CR0_EM | CR0_TS) != 0 { Err(c.raise(NM, None)) } else { Ok(()) }
}

/// #NM and #MF: all but the no-wait instructions.
#[inline(always)]
pub fn gate(c: &mut Core) -> Result<(), Fault> {
    available(c)?;
    if error(&c.cpu.fpu) { Err(c.raise(MF, None)) } else { Ok(()) }
}

/// FIP and FOP. (`imm` of an x87 instruction is its FOP.)
#[inline(always)]
pub fn record(c: &mut Core, i: &Insn) {
    let ip = c.cpu.gpr[GPR_BLOCK as usize].wrapping_add(i.off.into());
    c.cpu.fpu.fip = if c.cpu.code_size == CodeSize::Bits64 { pointer(ip) } else { ip & 0xffff_ffff };
    c.cpu.fpu.fop = (i.imm & 0x7ff) as u16;
}

/// FDP: the offset of the memory operand.
#[inline(always)]
pub fn record_data(c: &mut Core, i: &Insn, linear: u64) {
    let offset = linear.wrapping_sub(c.cpu.seg_base[(i.seg & 7) as usize]);
    c.cpu.fpu.fdp = if c.cpu.code_size == CodeSize::Bits64 { pointer(offset) } else { offset & 0xffff_ffff };
}

/// A handler of an instruction on registers.
macro_rules! fr {
    (|$c:ident, $i:ident| $b:expr) => {{
        fn f($c: &mut crate::core::Core, $i: &crate::insn::Insn) -> Result<crate::insn::Flow, crate::insn::Fault> {
            $crate::exec::fpu::gate($c)?;
            $b;
            $crate::exec::fpu::record($c, $i);
            Ok(crate::insn::Flow::Next)
        }
        f as crate::insn::Handler
    }};
}

/// A handler of an instruction with a memory operand, `$a` its linear address.
macro_rules! fm {
    (|$c:ident, $i:ident, $a:ident| $b:expr) => {{
        fn f($c: &mut crate::core::Core, $i: &crate::insn::Insn) -> Result<crate::insn::Flow, crate::insn::Fault> {
            $crate::exec::fpu::gate($c)?;
            let $a = $c.ea($i);
            $b;
            $crate::exec::fpu::record($c, $i);
            $crate::exec::fpu::record_data($c, $i, $a);
            Ok(crate::insn::Flow::Next)
        }
        f as crate::insn::Handler
    }};
}

pub(super) use {fm, fr};
