//! Shifts, rotates, double shifts.
//!
//! Undefined, as on Zen: shifts set AF; OF for counts above 1 is what a last step by 1 would give; a 16-bit double shift by more
//! than 16 takes further bits from the source and clears CF.

use iced_x86::{Instruction, Mnemonic as N, OpKind};

use super::operand::{I, Int, Kind, M, Place, R, aux_cf_of, kind, size, sized, wide};
use crate::core::Core;
use crate::insn::{Fault, Flow, Handler, Insn};
use crate::state::RCX;

/// The count: an immediate or CL, as a masked number.
pub trait Count {
    fn get(core: &Core, i: &Insn) -> u32;
}
impl Count for I {
    #[inline(always)]
    fn get(_: &Core, i: &Insn) -> u32 {
        i.imm as u32
    }
}
pub struct Cl;
impl Count for Cl {
    #[inline(always)]
    fn get(core: &Core, _: &Insn) -> u32 {
        core.cpu.gpr[RCX] as u32
    }
}

#[inline(always)]
fn masked<T: Int, C: Count>(core: &Core, i: &Insn) -> u32 {
    C::get(core, i) & if T::BITS == 64 { 63 } else { 31 }
}

#[inline(always)]
fn top<T: Int>(v: u64) -> bool {
    v >> (T::BITS - 1) & 1 != 0
}

#[inline(always)]
fn shifted(cf: bool, of: bool) -> u64 {
    aux_cf_of(cf, of) | 8
}

/// A count of 0 still needs write access to the place but leaves flags and a register's upper half... cleared as any 32-bit write.
fn untouched<T: Int, D: Place>(core: &mut Core, i: &Insn) -> Result<Flow, Fault> {
    D::modify(core, i, |v: T| (v, ()))?;
    Ok(Flow::Next)
}

fn shl<T: Int, D: Place, C: Count>(core: &mut Core, i: &Insn) -> Result<Flow, Fault> {
    let n = masked::<T, C>(core, i);
    if n == 0 {
        return untouched::<T, D>(core, i);
    }
    let (res, aux) = D::modify(core, i, |v: T| {
        let wide = u128::from(v.zext()) << n;
        let r = wide as u64;
        let cf = wide >> T::BITS & 1 != 0;
        (T::of(r), (T::of(r).sext(), shifted(cf, cf != top::<T>(r))))
    })?;
    core.cpu.lf_res = res;
    core.cpu.lf_aux = aux;
    Ok(Flow::Next)
}

fn shr<T: Int, D: Place, C: Count>(core: &mut Core, i: &Insn) -> Result<Flow, Fault> {
    let n = masked::<T, C>(core, i);
    if n == 0 {
        return untouched::<T, D>(core, i);
    }
    let (res, aux) = D::modify(core, i, |v: T| {
        let before = v.zext() >> (n - 1);
        let r = before >> 1;
        // For a count of 1 OF is the old sign.
        (T::of(r), (T::of(r).sext(), shifted(before & 1 != 0, top::<T>(before))))
    })?;
    core.cpu.lf_res = res;
    core.cpu.lf_aux = aux;
    Ok(Flow::Next)
}

fn sar<T: Int, D: Place, C: Count>(core: &mut Core, i: &Insn) -> Result<Flow, Fault> {
    let n = masked::<T, C>(core, i);
    if n == 0 {
        return untouched::<T, D>(core, i);
    }
    let (res, aux) = D::modify(core, i, |v: T| {
        let before = (v.sext() as i64) >> (n - 1);
        let r = (before >> 1) as u64;
        (T::of(r), (T::of(r).sext(), shifted(before & 1 != 0, false)))
    })?;
    core.cpu.lf_res = res;
    core.cpu.lf_aux = aux;
    Ok(Flow::Next)
}

/// Rotates change CF and OF only.
fn rol<T: Int, D: Place, C: Count>(core: &mut Core, i: &Insn) -> Result<Flow, Fault> {
    let n = masked::<T, C>(core, i);
    if n == 0 {
        return untouched::<T, D>(core, i);
    }
    let k = n % T::BITS;
    let r = D::modify(core, i, |v: T| {
        let v = v.zext();
        let r = T::of(if k == 0 { v } else { v << k | v >> (T::BITS - k) });
        (r, r.zext())
    })?;
    let cf = r & 1 != 0;
    core.cpu.set_cf_of(cf, cf != top::<T>(r));
    Ok(Flow::Next)
}

fn ror<T: Int, D: Place, C: Count>(core: &mut Core, i: &Insn) -> Result<Flow, Fault> {
    let n = masked::<T, C>(core, i);
    if n == 0 {
        return untouched::<T, D>(core, i);
    }
    let k = n % T::BITS;
    let r = D::modify(core, i, |v: T| {
        let v = v.zext();
        let r = T::of(if k == 0 { v } else { v >> k | v << (T::BITS - k) });
        (r, r.zext())
    })?;
    let cf = top::<T>(r);
    core.cpu.set_cf_of(cf, cf != (r >> (T::BITS - 2) & 1 != 0));
    Ok(Flow::Next)
}

fn rcl<T: Int, D: Place, C: Count>(core: &mut Core, i: &Insn) -> Result<Flow, Fault> {
    let n = masked::<T, C>(core, i);
    if n == 0 {
        return untouched::<T, D>(core, i);
    }
    // A full turn changes nothing but OF.
    let n = n % (T::BITS + 1);
    let carry = u128::from(core.cpu.cf());
    let (cf, sign) = D::modify(core, i, |v: T| {
        let all = carry << T::BITS | u128::from(v.zext());
        let width = T::BITS + 1;
        let turned = all << n | all >> (width - n);
        let r = T::of(turned as u64);
        (r, (turned >> T::BITS & 1 != 0, top::<T>(r.zext())))
    })?;
    core.cpu.set_cf_of(cf, cf != sign);
    Ok(Flow::Next)
}

fn rcr<T: Int, D: Place, C: Count>(core: &mut Core, i: &Insn) -> Result<Flow, Fault> {
    let n = masked::<T, C>(core, i);
    if n == 0 {
        return untouched::<T, D>(core, i);
    }
    // A full turn changes nothing but OF.
    let n = n % (T::BITS + 1);
    let carry = u128::from(core.cpu.cf());
    let (cf, of) = D::modify(core, i, |v: T| {
        let all = carry << T::BITS | u128::from(v.zext());
        let width = T::BITS + 1;
        let turned = all >> n | all << (width - n);
        let r = T::of(turned as u64);
        (r, (turned >> T::BITS & 1 != 0, (r.zext() >> (T::BITS - 1) ^ r.zext() >> (T::BITS - 2)) & 1 != 0))
    })?;
    core.cpu.set_cf_of(cf, of);
    Ok(Flow::Next)
}

fn shld<T: Int, D: Place, C: Count>(core: &mut Core, i: &Insn) -> Result<Flow, Fault> {
    let n = masked::<T, C>(core, i);
    if n == 0 {
        return untouched::<T, D>(core, i);
    }
    let low = T::get(&core.cpu, i.r[1]).zext();
    let (res, aux) = D::modify(core, i, |v: T| {
        let old = v.zext();
        let (r, cf) = if T::BITS == 16 {
            let all = old << 32 | low << 16 | low;
            ((all << n >> 32) as u16 as u64, n <= 16 && all >> (48 - n) & 1 != 0)
        } else {
            let all = u128::from(old) << T::BITS | u128::from(low);
            ((all << n >> T::BITS) as u64, old >> (T::BITS - n) & 1 != 0)
        };
        let r = T::of(r);
        (r, (r.sext(), shifted(cf, if T::BITS == 16 && n >= 16 { cf } else { top::<T>(r.zext()) != cf })))
    })?;
    core.cpu.lf_res = res;
    core.cpu.lf_aux = aux;
    Ok(Flow::Next)
}

fn shrd<T: Int, D: Place, C: Count>(core: &mut Core, i: &Insn) -> Result<Flow, Fault> {
    let n = masked::<T, C>(core, i);
    if n == 0 {
        return untouched::<T, D>(core, i);
    }
    let high = T::get(&core.cpu, i.r[1]).zext();
    let (res, aux) = D::modify(core, i, |v: T| {
        let old = v.zext();
        let (r, cf) = if T::BITS == 16 {
            let all = high << 32 | high << 16 | old;
            ((all >> n) as u16 as u64, n <= 16 && all >> (n - 1) & 1 != 0)
        } else {
            let all = u128::from(high) << T::BITS | u128::from(old);
            ((all >> n) as u64, old >> (n - 1) & 1 != 0)
        };
        let r = T::of(r);
        (r, (r.sext(), shifted(cf, (r.zext() >> (T::BITS - 1) ^ r.zext() >> (T::BITS - 2)) & 1 != 0)))
    })?;
    core.cpu.lf_res = res;
    core.cpu.lf_aux = aux;
    Ok(Flow::Next)
}

macro_rules! shift {
    ($f:ident, $instr:expr) => {
        match (kind($instr, 0), $instr.op1_kind() == OpKind::Register) {
            (Kind::Reg, true) => sized!(size($instr, 0), $f, R<0>, Cl),
            (Kind::Reg, false) => sized!(size($instr, 0), $f, R<0>, I),
            (_, true) => sized!(size($instr, 0), $f, M<false>, Cl),
            (_, false) => sized!(size($instr, 0), $f, M<false>, I),
        }
    };
}
macro_rules! double {
    ($f:ident, $instr:expr) => {
        match (kind($instr, 0), $instr.op2_kind() == OpKind::Register) {
            (Kind::Reg, true) => wide!(size($instr, 0), $f, R<0>, Cl),
            (Kind::Reg, false) => wide!(size($instr, 0), $f, R<0>, I),
            (_, true) => wide!(size($instr, 0), $f, M<false>, Cl),
            (_, false) => wide!(size($instr, 0), $f, M<false>, I),
        }
    };
}

pub fn select(instr: &Instruction) -> Option<Handler> {
    Some(match instr.mnemonic() {
        N::Shl | N::Sal => shift!(shl, instr),
        N::Shr => shift!(shr, instr),
        N::Sar => shift!(sar, instr),
        N::Rol => shift!(rol, instr),
        N::Ror => shift!(ror, instr),
        N::Rcl => shift!(rcl, instr),
        N::Rcr => shift!(rcr, instr),
        N::Shld => double!(shld, instr),
        N::Shrd => double!(shrd, instr),
        _ => return None,
    })
}
