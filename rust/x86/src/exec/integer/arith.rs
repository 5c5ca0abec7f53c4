//! INC DEC NEG NOT XADD CMPXCHG CRC32 POPCNT.

use iced_x86::{Instruction, Mnemonic as N};

use super::alu::{add, sub};
use super::operand::{Int, M, Place, R, Source, kind, place, size, sized, wide};
use crate::core::Core;
use crate::insn::{Fault, Flow, Handler, Insn};

/// INC and DEC leave CF alone.
#[inline(always)]
fn keep_carry(core: &mut Core, res: u64, aux: u64) {
    let carry = core.cpu.cf();
    core.cpu.lf_res = res;
    core.cpu.lf_aux = aux;
    core.cpu.set_cf(carry);
}

fn inc<T: Int, D: Place>(core: &mut Core, i: &Insn) -> Result<Flow, Fault> {
    let (res, aux) = D::modify(core, i, |v: T| {
        let (r, aux) = add(v, T::of(1), 0);
        (r, (r.sext(), aux))
    })?;
    keep_carry(core, res, aux);
    Ok(Flow::Next)
}

fn dec<T: Int, D: Place>(core: &mut Core, i: &Insn) -> Result<Flow, Fault> {
    let (res, aux) = D::modify(core, i, |v: T| {
        let (r, aux) = sub(v, T::of(1), 0);
        (r, (r.sext(), aux))
    })?;
    keep_carry(core, res, aux);
    Ok(Flow::Next)
}

fn neg<T: Int, D: Place>(core: &mut Core, i: &Insn) -> Result<Flow, Fault> {
    let (res, aux) = D::modify(core, i, |v: T| {
        let (r, aux) = sub(T::of(0), v, 0);
        (r, (r.sext(), aux))
    })?;
    core.cpu.lf_res = res;
    core.cpu.lf_aux = aux;
    Ok(Flow::Next)
}

fn not<T: Int, D: Place>(core: &mut Core, i: &Insn) -> Result<Flow, Fault> {
    D::modify(core, i, |v: T| (T::of(!v.zext()), ()))?;
    Ok(Flow::Next)
}

/// The sum goes to the place, its old value to the register; with `XADD r, r` of one register the sum stays.
fn xadd<T: Int, D: Place>(core: &mut Core, i: &Insn) -> Result<Flow, Fault> {
    let b = T::get(&core.cpu, i.r[1]);
    let (old, sum, aux) = D::modify(core, i, |a: T| {
        let (r, aux) = add(a, b, 0);
        (r, (a, r, aux))
    })?;
    T::set(&mut core.cpu, i.r[1], old);
    D::set(core, i, sum)?;
    core.cpu.lf_res = sum.sext();
    core.cpu.lf_aux = aux;
    Ok(Flow::Next)
}

/// Memory: one read-modify-write.
fn xadd_memory<T: Int>(core: &mut Core, i: &Insn) -> Result<Flow, Fault> {
    let b = T::get(&core.cpu, i.r[1]);
    let (old, sum, aux) = core.modify(core.ea(i), |a: T| {
        let (r, aux) = add(a, b, 0);
        (r, (a, r, aux))
    })?;
    T::set(&mut core.cpu, i.r[1], old);
    core.cpu.lf_res = sum.sext();
    core.cpu.lf_aux = aux;
    Ok(Flow::Next)
}

/// Registers: only one of the two is written, so that the other keeps its upper half.
fn cmpxchg_register<T: Int>(core: &mut Core, i: &Insn) -> Result<Flow, Fault> {
    let want = T::get(&core.cpu, 0);
    let old = T::get(&core.cpu, i.r[0]);
    if old == want {
        let new = T::get(&core.cpu, i.r[1]);
        T::set(&mut core.cpu, i.r[0], new);
    } else {
        T::set(&mut core.cpu, 0, old);
    }
    let (r, aux) = sub(want, old, 0);
    core.cpu.lf_res = r.sext();
    core.cpu.lf_aux = aux;
    Ok(Flow::Next)
}

/// Writes the place in any case (so it faults as a write); the accumulator only on failure.
fn cmpxchg<T: Int, D: Place>(core: &mut Core, i: &Insn) -> Result<Flow, Fault> {
    let want = T::get(&core.cpu, 0);
    let new = T::get(&core.cpu, i.r[1]);
    let old = D::modify(core, i, |old: T| (if old == want { new } else { old }, old))?;
    if old != want {
        T::set(&mut core.cpu, 0, old);
    }
    let (r, aux) = sub(want, old, 0);
    core.cpu.lf_res = r.sext();
    core.cpu.lf_aux = aux;
    Ok(Flow::Next)
}

/// CRC-32C (Castagnoli), bit-reflected.
fn crc32<T: Int, S: Source>(core: &mut Core, i: &Insn) -> Result<Flow, Fault> {
    let v: T = S::get(core, i)?;
    let mut crc = core.cpu.r32(i.r[0]);
    for byte in &v.zext().to_le_bytes()[..T::SIZE as usize] {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = crc >> 1 ^ if crc & 1 != 0 { 0x82f6_3b78 } else { 0 };
        }
    }
    core.cpu.set_r64(i.r[0], u64::from(crc));
    Ok(Flow::Next)
}

fn popcnt<T: Int, S: Source>(core: &mut Core, i: &Insn) -> Result<Flow, Fault> {
    let v: T = S::get(core, i)?;
    let n = u64::from(v.zext().count_ones());
    T::set(&mut core.cpu, i.r[0], T::of(n));
    // Only ZF may be set.
    core.cpu.set_arith(if n == 0 { crate::state::flags::ZF } else { 0 });
    Ok(Flow::Next)
}

pub fn select(instr: &Instruction) -> Option<Handler> {
    let register = kind(instr, 0) == super::operand::Kind::Reg;
    Some(match instr.mnemonic() {
        N::Inc => place!(kind(instr, 0), 0, sized, (size(instr, 0), inc)),
        N::Dec => place!(kind(instr, 0), 0, sized, (size(instr, 0), dec)),
        N::Neg => place!(kind(instr, 0), 0, sized, (size(instr, 0), neg)),
        N::Not => place!(kind(instr, 0), 0, sized, (size(instr, 0), not)),
        N::Xadd if register => sized!(size(instr, 0), xadd, R<0>),
        N::Xadd => sized!(size(instr, 0), xadd_memory),
        N::Cmpxchg if register => sized!(size(instr, 0), cmpxchg_register),
        N::Cmpxchg => place!(kind(instr, 0), 0, sized, (size(instr, 0), cmpxchg)),
        N::Crc32 => place!(kind(instr, 1), 1, sized, (size(instr, 1), crc32)),
        N::Popcnt => place!(kind(instr, 1), 1, wide, (size(instr, 0), popcnt)),
        _ => return None,
    })
}
