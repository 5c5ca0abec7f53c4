//! CMP or TEST together with the conditional jump after it: a fifth of all instructions are such pairs, and one call for both is
//! cheaper than two.

use iced_x86::{Instruction, Mnemonic as N, OpKind};

use super::alu::{And, Op, Sub};
use super::branch::{JCC, holds};
use super::mov::condition;
use super::operand::{I, Int, Kind, M, R, Source, kind, size};
use crate::core::Core;
use crate::insn::{Fault, Flow, Handler, Insn};
use crate::state::GPR_BLOCK;

/// Flags of `D op S`, then the jump, unless the budget ends between the two or the comparison touched a device.
fn compare<T: Int, O: Op, D: Source, S: Source, const CC: u8>(core: &mut Core, i: &Insn) -> Result<Flow, Fault> {
    let b: T = S::get(core, i)?;
    let a: T = D::get(core, i)?;
    let (r, aux) = O::run(a, b, 0);
    core.cpu.lf_res = r.sext();
    core.cpu.lf_aux = aux;
    let jump = std::ptr::from_ref(i).wrapping_add(1);
    if jump >= core.stop_at {
        return Ok(Flow::Next);
    }
    // SAFETY: the decoder chooses this function only for an instruction whose successor in the block is a jump, and an address below
    // `stop_at` is inside the running block.
    let jump = unsafe { &*jump };
    let block = core.cpu.gpr[usize::from(GPR_BLOCK)];
    let offset = if holds::<CC>(&core.cpu) { jump.imm } else { u64::from(jump.off) + u64::from(jump.len) };
    core.cpu.rip = block.wrapping_add(offset);
    Ok(Flow::Jump2)
}

macro_rules! conditions {
    ($t:ty, $op:ty, $d:ty, $s:ty) => {
        [
            compare::<$t, $op, $d, $s, 0> as Handler,
            compare::<$t, $op, $d, $s, 1>,
            compare::<$t, $op, $d, $s, 2>,
            compare::<$t, $op, $d, $s, 3>,
            compare::<$t, $op, $d, $s, 4>,
            compare::<$t, $op, $d, $s, 5>,
            compare::<$t, $op, $d, $s, 6>,
            compare::<$t, $op, $d, $s, 7>,
            compare::<$t, $op, $d, $s, 8>,
            compare::<$t, $op, $d, $s, 9>,
            compare::<$t, $op, $d, $s, 10>,
            compare::<$t, $op, $d, $s, 11>,
            compare::<$t, $op, $d, $s, 12>,
            compare::<$t, $op, $d, $s, 13>,
            compare::<$t, $op, $d, $s, 14>,
            compare::<$t, $op, $d, $s, 15>,
        ]
    };
}

macro_rules! widths {
    ($bytes:expr, $cc:expr, $op:ty, $d:ty, $s:ty) => {
        match $bytes {
            1 => conditions!(u8, $op, $d, $s)[$cc],
            4 => conditions!(u32, $op, $d, $s)[$cc],
            8 => conditions!(u64, $op, $d, $s)[$cc],
            _ => return None,
        }
    };
}

/// The function for `first` when `jump` follows it in its block (64-bit code only).
pub fn pair(first: &Instruction, jump: &Instruction) -> Option<Handler> {
    if jump.op_count() != 1 || jump.op0_kind() != OpKind::NearBranch64 {
        return None;
    }
    let test = match first.mnemonic() {
        N::Cmp => false,
        N::Test => true,
        _ => return None,
    };
    let cc = condition(jump.mnemonic(), JCC)?;
    let bytes = size(first, 0);
    Some(match (test, kind(first, 0), kind(first, 1)) {
        (false, Kind::Reg, Kind::Reg) => widths!(bytes, cc, Sub, R<0>, R<1>),
        (false, Kind::Reg, Kind::Imm) => widths!(bytes, cc, Sub, R<0>, I),
        (false, Kind::Reg, Kind::Flat) => widths!(bytes, cc, Sub, R<0>, M<true>),
        (false, Kind::Flat, Kind::Imm) => widths!(bytes, cc, Sub, M<true>, I),
        (false, Kind::Flat, Kind::Reg) => widths!(bytes, cc, Sub, M<true>, R<1>),
        (false, Kind::Mem, Kind::Imm) => widths!(bytes, cc, Sub, M<false>, I),
        (true, Kind::Reg, Kind::Reg) => widths!(bytes, cc, And, R<0>, R<1>),
        (true, Kind::Reg, Kind::Imm) => widths!(bytes, cc, And, R<0>, I),
        (true, Kind::Flat, Kind::Imm) => widths!(bytes, cc, And, M<true>, I),
        _ => return None,
    })
}
