//! MUL IMUL DIV IDIV.
//!
//! Undefined, as on Zen: multiplications write CF and OF only; divisions set AF, clear ZF, SF and PF, and keep CF and OF.

use iced_x86::{Instruction, Mnemonic as N};

use super::operand::{I, Int, M, R, Source, kind, place, size, sized, wide};
use crate::core::{Core, DE};
use crate::insn::{Fault, Flow, HIGH8, Handler, Insn};

/// The double-width accumulator.
fn pair<T: Int>(core: &Core) -> u128 {
    let cpu = &core.cpu;
    if T::BITS == 8 {
        return u128::from(cpu.r16(0));
    }
    u128::from(T::get(cpu, 2).zext()) << T::BITS | u128::from(T::get(cpu, 0).zext())
}

fn set_halves<T: Int>(core: &mut Core, low: u64, high: u64) {
    T::set(&mut core.cpu, 0, T::of(low));
    T::set(&mut core.cpu, if T::BITS == 8 { HIGH8 } else { 2 }, T::of(high));
}

#[inline(always)]
fn product_flags(core: &mut Core, overflow: bool) {
    core.cpu.set_cf_of(overflow, overflow);
}

#[inline(always)]
fn division_flags(core: &mut Core) {
    // A positive result of odd parity.
    core.cpu.lf_res = 1;
    core.cpu.lf_aux = core.cpu.lf_aux & 3 << 62 | 8;
}

fn mul<T: Int, S: Source>(core: &mut Core, i: &Insn) -> Result<Flow, Fault> {
    let b: T = S::get(core, i)?;
    let product = u128::from(T::get(&core.cpu, 0).zext()) * u128::from(b.zext());
    let (low, high) = (product as u64, (product >> T::BITS) as u64);
    set_halves::<T>(core, low, high);
    product_flags(core, high != 0);
    Ok(Flow::Next)
}

fn imul<T: Int, S: Source>(core: &mut Core, i: &Insn) -> Result<Flow, Fault> {
    let b: T = S::get(core, i)?;
    let a = T::get(&core.cpu, 0);
    let product = i128::from(a.sext() as i64) * i128::from(b.sext() as i64);
    let low = T::of(product as u64);
    set_halves::<T>(core, product as u64, (product >> T::BITS) as u64);
    product_flags(core, i128::from(low.sext() as i64) != product);
    Ok(Flow::Next)
}

/// Two and three operands: `r0 = A * B`.
fn imul_into<T: Int, A: Source, B: Source>(core: &mut Core, i: &Insn) -> Result<Flow, Fault> {
    let a: T = A::get(core, i)?;
    let b: T = B::get(core, i)?;
    let (low, overflow) = if T::BITS == 64 {
        let (low, overflow) = (a.sext() as i64).overflowing_mul(b.sext() as i64);
        (T::of(low as u64), overflow)
    } else {
        let product = (a.sext() as i64).wrapping_mul(b.sext() as i64);
        let low = T::of(product as u64);
        (low, low.sext() as i64 != product)
    };
    T::set(&mut core.cpu, i.r[0], low);
    product_flags(core, overflow);
    Ok(Flow::Next)
}

fn div<T: Int, S: Source>(core: &mut Core, i: &Insn) -> Result<Flow, Fault> {
    let b: T = S::get(core, i)?;
    let b = b.zext();
    let a = pair::<T>(core);
    if b == 0 || (a >> T::BITS) as u64 >= b {
        return Err(core.raise(DE, None));
    }
    let (quotient, rest) = if a >> 64 == 0 {
        (a as u64 / b, a as u64 % b)
    } else {
        let b = u128::from(b);
        ((a / b) as u64, (a % b) as u64)
    };
    set_halves::<T>(core, quotient, rest);
    division_flags(core);
    Ok(Flow::Next)
}

fn idiv<T: Int, S: Source>(core: &mut Core, i: &Insn) -> Result<Flow, Fault> {
    let b: T = S::get(core, i)?;
    let b = i128::from(b.sext() as i64);
    let shift = 128 - 2 * T::BITS;
    let a = (pair::<T>(core) << shift) as i128 >> shift;
    if b == 0 {
        return Err(core.raise(DE, None));
    }
    let (quotient, rest) = (a.wrapping_div(b), a.wrapping_rem(b));
    let fits = i128::from(T::of(quotient as u64).sext() as i64) == quotient && !(a == i128::MIN && b == -1);
    if !fits {
        return Err(core.raise(DE, None));
    }
    set_halves::<T>(core, quotient as u64, rest as u64);
    division_flags(core);
    Ok(Flow::Next)
}

pub fn select(instr: &Instruction) -> Option<Handler> {
    use super::operand::Kind;
    Some(match instr.mnemonic() {
        N::Mul => place!(kind(instr, 0), 0, sized, (size(instr, 0), mul)),
        N::Div => place!(kind(instr, 0), 0, sized, (size(instr, 0), div)),
        N::Idiv => place!(kind(instr, 0), 0, sized, (size(instr, 0), idiv)),
        N::Imul => match (instr.op_count(), kind(instr, 1)) {
            (1, _) => place!(kind(instr, 0), 0, sized, (size(instr, 0), imul)),
            (2, Kind::Reg) => wide!(size(instr, 0), imul_into, R<0>, R<1>),
            (2, _) => wide!(size(instr, 0), imul_into, R<0>, M<false>),
            (_, Kind::Reg) => wide!(size(instr, 0), imul_into, R<1>, I),
            _ => wide!(size(instr, 0), imul_into, M<false>, I),
        },
        _ => return None,
    })
}
