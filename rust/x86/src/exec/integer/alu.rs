//! ADD OR ADC SBB AND SUB XOR CMP TEST.

use iced_x86::{Instruction, Mnemonic as N};

use super::operand::{I, Int, Kind, M, Place, R, Source, aux, kind, size, sized};
use crate::core::Core;
use crate::insn::{Fault, Flow, Handler, Insn};

/// What a two-operand operation computes: the result, and `lf_aux`.
pub trait Op {
    const CARRY_IN: bool = false;
    fn run<T: Int>(a: T, b: T, carry: u64) -> (T, u64);
}

pub struct Add;
pub struct Adc;
pub struct Sub;
pub struct Sbb;
pub struct And;
pub struct Or;
pub struct Xor;

#[inline(always)]
pub fn add<T: Int>(a: T, b: T, carry: u64) -> (T, u64) {
    let (a, b) = (a.zext(), b.zext());
    let r = a.wrapping_add(b).wrapping_add(carry);
    (T::of(r), aux::<T>(a & b | (a | b) & !r))
}

#[inline(always)]
pub fn sub<T: Int>(a: T, b: T, carry: u64) -> (T, u64) {
    let (a, b) = (a.zext(), b.zext());
    let r = a.wrapping_sub(b).wrapping_sub(carry);
    (T::of(r), aux::<T>(!a & b | (!a | b) & r))
}

impl Op for Add {
    #[inline(always)]
    fn run<T: Int>(a: T, b: T, _: u64) -> (T, u64) {
        add(a, b, 0)
    }
}
impl Op for Adc {
    const CARRY_IN: bool = true;
    #[inline(always)]
    fn run<T: Int>(a: T, b: T, carry: u64) -> (T, u64) {
        add(a, b, carry)
    }
}
impl Op for Sub {
    #[inline(always)]
    fn run<T: Int>(a: T, b: T, _: u64) -> (T, u64) {
        sub(a, b, 0)
    }
}
impl Op for Sbb {
    const CARRY_IN: bool = true;
    #[inline(always)]
    fn run<T: Int>(a: T, b: T, carry: u64) -> (T, u64) {
        sub(a, b, carry)
    }
}
impl Op for And {
    #[inline(always)]
    fn run<T: Int>(a: T, b: T, _: u64) -> (T, u64) {
        (T::of(a.zext() & b.zext()), 0)
    }
}
impl Op for Or {
    #[inline(always)]
    fn run<T: Int>(a: T, b: T, _: u64) -> (T, u64) {
        (T::of(a.zext() | b.zext()), 0)
    }
}
impl Op for Xor {
    #[inline(always)]
    fn run<T: Int>(a: T, b: T, _: u64) -> (T, u64) {
        (T::of(a.zext() ^ b.zext()), 0)
    }
}

/// `D = D op S`.
fn binary<T: Int, O: Op, D: Place, S: Source>(core: &mut Core, i: &Insn) -> Result<Flow, Fault> {
    let b: T = S::get(core, i)?;
    let carry = if O::CARRY_IN { core.cpu.lf_aux >> 63 } else { 0 };
    let (r, aux) = D::modify(core, i, |a: T| {
        let (r, aux) = O::run(a, b, carry);
        (r, (r, aux))
    })?;
    core.cpu.lf_res = r.sext();
    core.cpu.lf_aux = aux;
    Ok(Flow::Next)
}

/// Flags of `D op S`.
fn compare<T: Int, O: Op, D: Source, S: Source>(core: &mut Core, i: &Insn) -> Result<Flow, Fault> {
    let b: T = S::get(core, i)?;
    let a: T = D::get(core, i)?;
    let (r, aux) = O::run(a, b, 0);
    core.cpu.lf_res = r.sext();
    core.cpu.lf_aux = aux;
    Ok(Flow::Next)
}

/// `XOR r, r` and `SUB r, r`.
fn zero<T: Int>(core: &mut Core, i: &Insn) -> Result<Flow, Fault> {
    T::set(&mut core.cpu, i.r[0], T::of(0));
    core.cpu.lf_res = 0;
    core.cpu.lf_aux = 0;
    Ok(Flow::Next)
}

macro_rules! forms {
    ($f:ident, $instr:expr, $op:ty) => {
        match (kind($instr, 0), kind($instr, 1)) {
            (Kind::Reg, Kind::Reg) => sized!(size($instr, 0), $f, $op, R<0>, R<1>),
            (Kind::Reg, Kind::Imm) => sized!(size($instr, 0), $f, $op, R<0>, I),
            (Kind::Reg, Kind::Flat) => sized!(size($instr, 0), $f, $op, R<0>, M<true>),
            (Kind::Reg, Kind::Mem) => sized!(size($instr, 0), $f, $op, R<0>, M<false>),
            (Kind::Flat, Kind::Reg) => sized!(size($instr, 0), $f, $op, M<true>, R<1>),
            (Kind::Mem, Kind::Reg) => sized!(size($instr, 0), $f, $op, M<false>, R<1>),
            (Kind::Flat, Kind::Imm) => sized!(size($instr, 0), $f, $op, M<true>, I),
            (Kind::Mem, Kind::Imm) => sized!(size($instr, 0), $f, $op, M<false>, I),
            _ => return None,
        }
    };
}

pub fn select(instr: &Instruction) -> Option<Handler> {
    let same = instr.op_count() == 2
        && kind(instr, 0) == Kind::Reg
        && kind(instr, 1) == Kind::Reg
        && instr.op0_register() == instr.op1_register();
    Some(match instr.mnemonic() {
        N::Xor | N::Sub if same => sized!(size(instr, 0), zero),
        N::Add => forms!(binary, instr, Add),
        N::Or => forms!(binary, instr, Or),
        N::Adc => forms!(binary, instr, Adc),
        N::Sbb => forms!(binary, instr, Sbb),
        N::And => forms!(binary, instr, And),
        N::Sub => forms!(binary, instr, Sub),
        N::Xor => forms!(binary, instr, Xor),
        N::Cmp => forms!(compare, instr, Sub),
        N::Test => forms!(compare, instr, And),
        _ => return None,
    })
}
