//! Decimal adjustments (not in 64-bit code) and SALC.

use iced_x86::{Instruction, Mnemonic as N};

use crate::core::{Core, DE};
use crate::insn::{Fault, Flow, HIGH8, Handler, Insn};
use crate::state::flags::{AF, CF, OF, PF, SF, ZF};

/// ZF, SF, PF of a byte.
fn of_byte(v: u8) -> u64 {
    (if v == 0 { ZF } else { 0 }) | (if v & 0x80 != 0 { SF } else { 0 }) | (if v.count_ones() & 1 == 0 { PF } else { 0 })
}

/// OF of `a + b` or `a - b` that gave `r`; `top` is the sign bit.
fn overflow(sub: bool, a: u16, b: u16, r: u16, top: u16) -> u64 {
    let b = if sub { !b } else { b };
    if (a ^ r) & (b ^ r) & top != 0 { OF } else { 0 }
}

/// OF is undefined; here that of adding (subtracting) the whole correction at once.
fn das_daa<const SUB: bool>(core: &mut Core, _: &Insn) -> Result<Flow, Fault> {
    let (old, old_cf) = (core.cpu.r8(0), core.cpu.cf());
    let mut correction = 0u8;
    let (mut cf, mut af) = (false, false);
    if old & 15 > 9 || core.cpu.af() {
        correction = 6;
        cf = SUB && (old_cf || old < 6);
        af = true;
    }
    if old > 0x99 || old_cf {
        correction += 0x60;
        cf = true;
    }
    let al = if SUB { old.wrapping_sub(correction) } else { old.wrapping_add(correction) };
    core.cpu.set_r8(0, al);
    let of = overflow(SUB, old.into(), correction.into(), al.into(), 0x80);
    core.cpu.set_arith(of_byte(al) | u64::from(cf) * CF | u64::from(af) * AF | of);
    Ok(Flow::Next)
}

/// ZF, SF, PF and OF are undefined; here those of adjusting AX before its second digit is cut.
fn aaa_aas<const SUB: bool>(core: &mut Core, _: &Insn) -> Result<Flow, Fault> {
    let adjust = core.cpu.r8(0) & 15 > 9 || core.cpu.af();
    let old = core.cpu.r16(0);
    let by = if adjust { 0x106 } else { 0 };
    let ax = if SUB { old.wrapping_sub(by) } else { old.wrapping_add(by) };
    core.cpu.set_r16(0, ax & 0xff0f);
    let flags = of_byte(ax as u8) & PF
        | (if ax == 0 { ZF } else { 0 })
        | (if ax & 0x8000 != 0 { SF } else { 0 })
        | overflow(SUB, old, by, ax, 0x8000);
    core.cpu.set_arith(flags | if adjust { CF | AF } else { 0 });
    Ok(Flow::Next)
}

fn aam(core: &mut Core, i: &Insn) -> Result<Flow, Fault> {
    let base = i.imm as u8;
    if base == 0 {
        return Err(core.raise(DE, None));
    }
    let al = core.cpu.r8(0);
    core.cpu.set_r8(HIGH8, al / base);
    core.cpu.set_r8(0, al % base);
    core.cpu.set_arith(of_byte(al % base));
    Ok(Flow::Next)
}

/// CF, AF and OF are undefined; here those of the byte addition.
fn aad(core: &mut Core, i: &Insn) -> Result<Flow, Fault> {
    let (low, high) = (core.cpu.r8(0), core.cpu.r8(HIGH8).wrapping_mul(i.imm as u8));
    let (al, carry) = low.overflowing_add(high);
    core.cpu.set_r16(0, u16::from(al));
    let half = (low & 15) + (high & 15) > 15;
    let of = overflow(false, low.into(), high.into(), al.into(), 0x80);
    core.cpu.set_arith(of_byte(al) | u64::from(carry) * CF | u64::from(half) * AF | of);
    Ok(Flow::Next)
}

fn salc(core: &mut Core, _: &Insn) -> Result<Flow, Fault> {
    let v = if core.cpu.cf() { 0xff } else { 0 };
    core.cpu.set_r8(0, v);
    Ok(Flow::Next)
}

pub fn select(instr: &Instruction) -> Option<Handler> {
    Some(match instr.mnemonic() {
        N::Daa => das_daa::<false>,
        N::Das => das_daa::<true>,
        N::Aaa => aaa_aas::<false>,
        N::Aas => aaa_aas::<true>,
        N::Aam => aam,
        N::Aad => aad,
        N::Salc => salc,
        _ => return None,
    })
}
