//! BT BTS BTR BTC BSF BSR.

use iced_x86::{Instruction, Mnemonic as N};

use super::operand::{I, Int, Kind, M, Place, R, Source, kind, place, size, wide};
use crate::core::Core;
use crate::insn::{AddrSize, Fault, Flow, Handler, Insn};

const TEST: u8 = 0;
const SET: u8 = 1;
const RESET: u8 = 2;

#[inline(always)]
fn change<T: Int, const OP: u8>(v: T, bit: u64) -> T {
    let mask = 1u64 << bit;
    T::of(match OP {
        TEST => v.zext(),
        SET => v.zext() | mask,
        RESET => v.zext() & !mask,
        _ => v.zext() ^ mask,
    })
}

/// Register, or memory with an immediate: the bit number is taken modulo the width. Only CF changes.
fn bit<T: Int, D: Place, S: Source, const OP: u8>(core: &mut Core, i: &Insn) -> Result<Flow, Fault> {
    let n: T = S::get(core, i)?;
    let n = n.zext() & u64::from(T::BITS - 1);
    let old: T = if OP == TEST { D::get(core, i)? } else { D::modify(core, i, |v: T| (change::<T, OP>(v, n), v))? };
    core.cpu.set_cf(old.zext() >> n & 1 != 0);
    Ok(Flow::Next)
}

/// Memory with a register: the bit number is signed and reaches any distance from the operand.
fn bit_string<T: Int, const OP: u8>(core: &mut Core, i: &Insn) -> Result<Flow, Fault> {
    let n = T::get(&core.cpu, i.r[1]).sext() as i64;
    let units = n >> T::BITS.trailing_zeros();
    let offset = core.offset(i).wrapping_add((units as u64).wrapping_mul(T::SIZE));
    let offset = match i.asize {
        AddrSize::A64 => offset,
        AddrSize::A32 => offset & 0xffff_ffff,
        AddrSize::A16 => offset & 0xffff,
    };
    let at = core.address(usize::from(i.seg), offset, T::SIZE, OP != TEST);
    let n = n as u64 & u64::from(T::BITS - 1);
    let old: T = if OP == TEST { core.load(at)? } else { core.modify(at, |v: T| (change::<T, OP>(v, n), v))? };
    core.cpu.set_cf(old.zext() >> n & 1 != 0);
    Ok(Flow::Next)
}

/// A zero source sets ZF and leaves the destination alone (AMD defines it, Intel does it). PF follows the result as on Zen,
/// the other flags are clear.
#[inline(always)]
fn scanned<T: Int>(core: &mut Core, i: &Insn, source: u64, position: u32) {
    use crate::state::flags::{PF, ZF};
    if source == 0 {
        core.cpu.set_arith(ZF | PF);
        return;
    }
    T::set(&mut core.cpu, i.r[0], T::of(u64::from(position)));
    core.cpu.set_arith(if position.count_ones() & 1 == 0 { PF } else { 0 });
}

fn bsf<T: Int, S: Source>(core: &mut Core, i: &Insn) -> Result<Flow, Fault> {
    let v: T = S::get(core, i)?;
    scanned::<T>(core, i, v.zext(), v.zext().trailing_zeros());
    Ok(Flow::Next)
}

fn bsr<T: Int, S: Source>(core: &mut Core, i: &Insn) -> Result<Flow, Fault> {
    let v: T = S::get(core, i)?;
    scanned::<T>(core, i, v.zext(), v.zext().leading_zeros() ^ 63);
    Ok(Flow::Next)
}

/// Constant generic operations do not fit `wide!`, so they are types here.
macro_rules! bits {
    ($instr:expr, $op:expr) => {{
        fn rr<T: Int>(core: &mut Core, i: &Insn) -> Result<Flow, Fault> {
            bit::<T, R<0>, R<1>, { $op }>(core, i)
        }
        fn ri<T: Int>(core: &mut Core, i: &Insn) -> Result<Flow, Fault> {
            bit::<T, R<0>, I, { $op }>(core, i)
        }
        fn mi<T: Int>(core: &mut Core, i: &Insn) -> Result<Flow, Fault> {
            bit::<T, M<false>, I, { $op }>(core, i)
        }
        fn mr<T: Int>(core: &mut Core, i: &Insn) -> Result<Flow, Fault> {
            bit_string::<T, { $op }>(core, i)
        }
        match (kind($instr, 0), kind($instr, 1)) {
            (Kind::Reg, Kind::Reg) => wide!(size($instr, 0), rr),
            (Kind::Reg, _) => wide!(size($instr, 0), ri),
            (_, Kind::Imm) => wide!(size($instr, 0), mi),
            _ => wide!(size($instr, 0), mr),
        }
    }};
}

pub fn select(instr: &Instruction) -> Option<Handler> {
    Some(match instr.mnemonic() {
        N::Bt => bits!(instr, TEST),
        N::Bts => bits!(instr, SET),
        N::Btr => bits!(instr, RESET),
        N::Btc => bits!(instr, 3),
        // Without BMI the prefix means nothing: TZCNT and LZCNT run as BSF and BSR.
        N::Bsf | N::Tzcnt => place!(kind(instr, 1), 1, wide, (size(instr, 0), bsf)),
        N::Bsr | N::Lzcnt => place!(kind(instr, 1), 1, wide, (size(instr, 0), bsr)),
        _ => return None,
    })
}
