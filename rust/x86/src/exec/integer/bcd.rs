//! Decimal adjustments (not in 64-bit code) and SALC.

use iced_x86::{Instruction, Mnemonic as N};

use crate::core::{Core, DE};
use crate::insn::{Fault, Flow, HIGH8, Handler, Insn};
use crate::state::flags::{AF, CF, PF, SF, ZF};

/// ZF, SF, PF of a byte.
fn of_byte(v: u8) -> u64 {
    (if v == 0 { ZF } else { 0 }) | (if v & 0x80 != 0 { SF } else { 0 }) | (if v.count_ones() & 1 == 0 { PF } else { 0 })
}

fn das_daa<const SUB: bool>(core: &mut Core, _: &Insn) -> Result<Flow, Fault> {
    let (old, old_cf) = (core.cpu.r8(0), core.cpu.cf());
    let mut al = old;
    let (mut cf, mut af) = (false, false);
    if old & 15 > 9 || core.cpu.af() {
        let (v, borrow) = if SUB { al.overflowing_sub(6) } else { al.overflowing_add(6) };
        al = v;
        cf = old_cf || borrow;
        af = true;
    }
    if old > 0x99 || old_cf {
        al = if SUB { al.wrapping_sub(0x60) } else { al.wrapping_add(0x60) };
        cf = true;
    } else if !SUB {
        cf = false;
    }
    core.cpu.set_r8(0, al);
    core.cpu.set_arith(of_byte(al) | u64::from(cf) * CF | u64::from(af) * AF);
    Ok(Flow::Next)
}

fn aaa_aas<const SUB: bool>(core: &mut Core, _: &Insn) -> Result<Flow, Fault> {
    let adjust = core.cpu.r8(0) & 15 > 9 || core.cpu.af();
    let mut ax = core.cpu.r16(0);
    if adjust {
        ax = if SUB { ax.wrapping_sub(6).wrapping_sub(0x100) } else { ax.wrapping_add(0x106) };
    }
    ax &= 0xff0f;
    core.cpu.set_r16(0, ax);
    core.cpu.set_arith(of_byte(ax as u8) | if adjust { CF | AF } else { 0 });
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

fn aad(core: &mut Core, i: &Insn) -> Result<Flow, Fault> {
    let al = core.cpu.r8(0).wrapping_add(core.cpu.r8(HIGH8).wrapping_mul(i.imm as u8));
    core.cpu.set_r16(0, u16::from(al));
    core.cpu.set_arith(of_byte(al));
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
