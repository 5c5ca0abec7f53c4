//! Near branches, conditions, SETcc, loops, software interrupts.

use iced_x86::{Code, Instruction, Mnemonic as N, OpKind};

use super::mov::condition;
use super::operand::{Int, Kind, M, Place, R, Source, code64, kind, place, size};
use super::stack::{Legacy, Long, Stack};
use crate::core::{BR, Core, GP, OF, UD};
use crate::insn::{Fault, Flow, Handler, Insn, REP, REPNE};
use crate::state::{CodeSize, Cpu, GPR_BLOCK, RCX};

/// Whether condition `CC` (the low four bits of the opcodes) holds.
#[inline(always)]
pub fn holds<const CC: u8>(cpu: &Cpu) -> bool {
    let yes = match CC >> 1 {
        0 => cpu.of(),
        1 => cpu.cf(),
        2 => cpu.zf(),
        3 => cpu.cf() | cpu.zf(),
        4 => cpu.sf(),
        5 => cpu.pf(),
        6 => cpu.sf() != cpu.of(),
        _ => cpu.zf() | (cpu.sf() != cpu.of()),
    };
    yes != (CC & 1 != 0)
}

/// RIP of the instruction after `i`, not cut.
#[inline(always)]
pub fn next(cpu: &Cpu, i: &Insn) -> u64 {
    cpu.gpr[usize::from(GPR_BLOCK)].wrapping_add(u64::from(i.off) + u64::from(i.len))
}

/// Goes to `i`'s target, cut to the operand size of the branch.
#[inline(always)]
fn take<T: Int>(cpu: &mut Cpu, i: &Insn) {
    cpu.rip = T::of(cpu.gpr[usize::from(GPR_BLOCK)].wrapping_add(i.imm)).zext();
}

/// Goes on; `T` is the branch's operand size.
#[inline(always)]
fn pass<T: Int>(cpu: &mut Cpu, i: &Insn) {
    let next = next(cpu, i);
    cpu.rip = if T::BITS == 64 || cpu.code_size == CodeSize::Bits64 { next } else { next & 0xffff_ffff };
}

fn jcc<T: Int, const CC: u8>(core: &mut Core, i: &Insn) -> Result<Flow, Fault> {
    if holds::<CC>(&core.cpu) {
        take::<T>(&mut core.cpu, i);
    } else {
        pass::<T>(&mut core.cpu, i);
    }
    Ok(Flow::Jump)
}

fn setcc<D: Place, const CC: u8>(core: &mut Core, i: &Insn) -> Result<Flow, Fault> {
    let v = u8::from(holds::<CC>(&core.cpu));
    D::set(core, i, v)?;
    Ok(Flow::Next)
}

fn jmp<T: Int>(core: &mut Core, i: &Insn) -> Result<Flow, Fault> {
    take::<T>(&mut core.cpu, i);
    Ok(Flow::Jump)
}

/// A target that does not fit the mode faults at the branch.
#[inline(always)]
pub fn check_target<T: Int>(core: &mut Core, target: u64) -> Result<(), Fault> {
    if T::BITS == 64 && (target as i64) << 16 >> 16 != target as i64 {
        return Err(core.raise(GP, Some(0)));
    }
    if T::BITS != 64 && core.cpu.code_size != CodeSize::Bits64 && target > u64::from(core.cpu.seg[crate::state::CS].limit) {
        return Err(core.raise(GP, Some(0)));
    }
    Ok(())
}

fn jmp_indirect<T: Int, S: Source>(core: &mut Core, i: &Insn) -> Result<Flow, Fault> {
    let target: T = S::get(core, i)?;
    check_target::<T>(core, target.zext())?;
    core.cpu.rip = target.zext();
    Ok(Flow::Jump)
}

fn call<T: Int, K: Stack>(core: &mut Core, i: &Insn) -> Result<Flow, Fault> {
    let back = next(&core.cpu, i);
    K::push(core, T::of(back))?;
    take::<T>(&mut core.cpu, i);
    Ok(Flow::Jump)
}

fn call_indirect<T: Int, K: Stack, S: Source>(core: &mut Core, i: &Insn) -> Result<Flow, Fault> {
    let target: T = S::get(core, i)?;
    if let Err(fault) = check_target::<T>(core, target.zext()) {
        // The stack is looked at first.
        let pending = core.fault.take();
        K::probe(core, T::SIZE)?;
        core.fault = pending;
        return Err(fault);
    }
    let back = next(&core.cpu, i);
    K::push(core, T::of(back))?;
    core.cpu.rip = target.zext();
    Ok(Flow::Jump)
}

fn ret<T: Int, K: Stack, const POP: bool>(core: &mut Core, i: &Insn) -> Result<Flow, Fault> {
    let target: T = K::top(core, 0)?;
    check_target::<T>(core, target.zext())?;
    K::release(core, T::SIZE + if POP { i.imm & 0xffff } else { 0 });
    core.cpu.rip = target.zext();
    Ok(Flow::Jump)
}

/// The count register of LOOP and JCXZ has the address size.
fn count(core: &Core, i: &Insn) -> u64 {
    let c = core.cpu.gpr[RCX];
    match i.osize {
        2 => c & 0xffff,
        4 => c & 0xffff_ffff,
        _ => c,
    }
}

/// LOOP (0), LOOPE (1), LOOPNE (2), JCXZ (3).
fn looping<T: Int, const KIND: u8>(core: &mut Core, i: &Insn) -> Result<Flow, Fault> {
    let mut left = count(core, i);
    if KIND != 3 {
        left = left.wrapping_sub(1);
        match i.osize {
            2 => core.cpu.set_r16(RCX as u8, left as u16),
            4 => core.cpu.set_r32(RCX as u8, left as u32),
            _ => core.cpu.set_r64(RCX as u8, left),
        }
        left = count(core, i);
    }
    // On AMD a REP prefix decides which way ZF is tested.
    let kind = match (KIND, i.prefix & (REP | REPNE)) {
        (1 | 2, REP) => 1,
        (1 | 2, REPNE) => 2,
        _ => KIND,
    };
    let go = match kind {
        0 => left != 0,
        1 => left != 0 && core.cpu.zf(),
        2 => left != 0 && !core.cpu.zf(),
        _ => left == 0,
    };
    if go {
        take::<T>(&mut core.cpu, i);
    } else {
        pass::<T>(&mut core.cpu, i);
    }
    Ok(Flow::Jump)
}

fn ud(core: &mut Core, _: &Insn) -> Result<Flow, Fault> {
    Err(core.raise(UD, None))
}

fn int<const VECTOR: i16>(core: &mut Core, i: &Insn) -> Result<Flow, Fault> {
    let vector = if VECTOR < 0 { i.imm as u8 } else { VECTOR as u8 };
    // On a fault the loop puts RIP back.
    core.cpu.rip = next(&core.cpu, i);
    core.soft_interrupt(vector)?;
    Ok(Flow::LeaveJump)
}

fn into(core: &mut Core, i: &Insn) -> Result<Flow, Fault> {
    if !core.cpu.of() {
        return Ok(Flow::Leave);
    }
    core.cpu.rip = next(&core.cpu, i);
    core.soft_interrupt(OF)?;
    Ok(Flow::LeaveJump)
}

fn bound<T: Int>(core: &mut Core, i: &Insn) -> Result<Flow, Fault> {
    let at = core.ea(i);
    let low: T = core.load(at)?;
    let high: T = core.load(core.linear(0, at.wrapping_add(T::SIZE)))?;
    let v = T::get(&core.cpu, i.r[0]).sext() as i64;
    if v < low.sext() as i64 || v > high.sext() as i64 {
        return Err(core.raise(BR, None));
    }
    Ok(Flow::Next)
}

pub const JCC: [N; 16] =
    [N::Jo, N::Jno, N::Jb, N::Jae, N::Je, N::Jne, N::Jbe, N::Ja, N::Js, N::Jns, N::Jp, N::Jnp, N::Jl, N::Jge, N::Jle, N::Jg];
const SETCC: [N; 16] = [
    N::Seto,
    N::Setno,
    N::Setb,
    N::Setae,
    N::Sete,
    N::Setne,
    N::Setbe,
    N::Seta,
    N::Sets,
    N::Setns,
    N::Setp,
    N::Setnp,
    N::Setl,
    N::Setge,
    N::Setle,
    N::Setg,
];

macro_rules! conditions {
    (|$n:ident| $($c:literal)* => $e:expr) => { [$({ const $n: u8 = $c; $e }),*] };
}

/// Picks by the branch's operand size.
macro_rules! near {
    ($instr:expr, $f:ident $(, $g:tt)*) => {
        match $instr.op0_kind() {
            OpKind::NearBranch16 => $f::<u16 $(, $g)*> as Handler,
            OpKind::NearBranch32 => $f::<u32 $(, $g)*>,
            OpKind::NearBranch64 => $f::<u64 $(, $g)*>,
            _ => return None,
        }
    };
}

fn jcc_handler(instr: &Instruction, cc: usize) -> Option<Handler> {
    Some(match instr.op0_kind() {
        OpKind::NearBranch16 => conditions!(|CC| 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 => jcc::<u16, CC> as Handler)[cc],
        OpKind::NearBranch32 => conditions!(|CC| 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 => jcc::<u32, CC> as Handler)[cc],
        OpKind::NearBranch64 => conditions!(|CC| 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 => jcc::<u64, CC> as Handler)[cc],
        _ => return None,
    })
}

fn setcc_handler(instr: &Instruction, cc: usize) -> Option<Handler> {
    Some(match kind(instr, 0) {
        Kind::Reg => conditions!(|CC| 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 => setcc::<R<0>, CC> as Handler)[cc],
        _ => conditions!(|CC| 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 => setcc::<M<false>, CC> as Handler)[cc],
    })
}

fn jmp_handler(instr: &Instruction) -> Option<Handler> {
    use super::operand::wide;
    Some(match instr.op0_kind() {
        OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64 => near!(instr, jmp),
        _ if is_far(instr) => return None,
        _ => place!(kind(instr, 0), 0, wide, (size(instr, 0), jmp_indirect)),
    })
}

fn call_handler(instr: &Instruction) -> Option<Handler> {
    use super::operand::wide;
    let long = code64(instr);
    Some(match instr.op0_kind() {
        OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64 if long => near!(instr, call, Long),
        OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64 => near!(instr, call, Legacy),
        _ if is_far(instr) => return None,
        _ if long => place!(kind(instr, 0), 0, wide, (size(instr, 0), call_indirect, Long)),
        _ => place!(kind(instr, 0), 0, wide, (size(instr, 0), call_indirect, Legacy)),
    })
}

/// Far forms are in the system family.
fn is_far(instr: &Instruction) -> bool {
    matches!(
        instr.code(),
        Code::Jmp_m1616 | Code::Jmp_m1632 | Code::Jmp_m1664 | Code::Call_m1616 | Code::Call_m1632 | Code::Call_m1664
    ) || matches!(instr.op0_kind(), OpKind::FarBranch16 | OpKind::FarBranch32)
}

pub fn select(instr: &Instruction) -> Option<Handler> {
    Some(match instr.mnemonic() {
        N::Jmp => return jmp_handler(instr),
        N::Call => return call_handler(instr),
        N::Ret => match instr.code() {
            Code::Retnq => ret::<u64, Long, false>,
            Code::Retnq_imm16 => ret::<u64, Long, true>,
            Code::Retnd => ret::<u32, Legacy, false>,
            Code::Retnd_imm16 => ret::<u32, Legacy, true>,
            Code::Retnw if code64(instr) => ret::<u16, Long, false>,
            Code::Retnw_imm16 if code64(instr) => ret::<u16, Long, true>,
            Code::Retnw => ret::<u16, Legacy, false>,
            Code::Retnw_imm16 => ret::<u16, Legacy, true>,
            _ => return None,
        },
        N::Loop => near!(instr, looping, 0),
        N::Loope => near!(instr, looping, 1),
        N::Loopne => near!(instr, looping, 2),
        N::Jcxz | N::Jecxz | N::Jrcxz => near!(instr, looping, 3),
        N::Ud2 | N::Ud1 | N::Ud0 => ud,
        N::Int => int::<-1>,
        N::Int3 => int::<3>,
        N::Into => into,
        N::Bound => match size(instr, 0) {
            2 => bound::<u16>,
            _ => bound::<u32>,
        },
        mnemonic => {
            if let Some(cc) = condition(mnemonic, JCC) {
                return jcc_handler(instr, cc);
            }
            return setcc_handler(instr, condition(mnemonic, SETCC)?);
        }
    })
}

/// LOOP and JCXZ: bytes of their count register, for `Insn::osize`.
pub fn count_size(instr: &Instruction) -> u8 {
    match instr.code() {
        Code::Jcxz_rel8_16 | Code::Jcxz_rel8_32 => 2,
        Code::Jecxz_rel8_16 | Code::Jecxz_rel8_32 | Code::Jecxz_rel8_64 => 4,
        Code::Jrcxz_rel8_16 | Code::Jrcxz_rel8_64 => 8,
        code => {
            let name = format!("{code:?}");
            if name.ends_with("_CX") {
                2
            } else if name.ends_with("_ECX") {
                4
            } else {
                8
            }
        }
    }
}
