//! MOV and its kin: moves, extensions, LEA, exchanges, conditional moves.

use iced_x86::{Instruction, Mnemonic as N};

use super::operand::{I, Int, Kind, M, Place, R, Source, kind, place, size, sized, wide};
use crate::core::Core;
use crate::insn::{Fault, Flow, Handler, Insn};
use crate::state::{RAX, RBX};

pub fn select(instr: &Instruction) -> Option<Handler> {
    let mnemonic = instr.mnemonic();
    Some(match mnemonic {
        N::Mov => match (kind(instr, 0), kind(instr, 1)) {
            (Kind::Reg, k @ (Kind::Reg | Kind::Mem | Kind::Flat)) => place!(k, 1, sized, (size(instr, 0), mov, R<0>)),
            (Kind::Flat, Kind::Reg) => sized!(size(instr, 0), mov, M<true>, R<1>),
            (Kind::Mem, Kind::Reg) => sized!(size(instr, 0), mov, M<false>, R<1>),
            (Kind::Reg, Kind::Imm) => sized!(size(instr, 0), mov, R<0>, I),
            (Kind::Flat, Kind::Imm) => sized!(size(instr, 0), mov, M<true>, I),
            (Kind::Mem, Kind::Imm) => sized!(size(instr, 0), mov, M<false>, I),
            _ => return None,
        },
        N::Movnti => match kind(instr, 0) {
            Kind::Flat | Kind::Mem => sized!(size(instr, 0), mov, M<false>, R<1>),
            _ => return None,
        },
        N::Movzx => match size(instr, 1) {
            1 => place!(kind(instr, 1), 1, wide, (size(instr, 0), movzx, u8)),
            _ => place!(kind(instr, 1), 1, wide, (size(instr, 0), movzx, u16)),
        },
        N::Movsx | N::Movsxd => match size(instr, 1) {
            1 => place!(kind(instr, 1), 1, wide, (size(instr, 0), movsx, u8)),
            2 => place!(kind(instr, 1), 1, wide, (size(instr, 0), movsx, u16)),
            _ => place!(kind(instr, 1), 1, wide, (size(instr, 0), movsx, u32)),
        },
        N::Lea => wide!(size(instr, 0), lea),
        N::Xchg => match (kind(instr, 0), kind(instr, 1)) {
            (k, Kind::Reg) => place!(k, 0, sized, (size(instr, 0), xchg)),
            _ => return None,
        },
        N::Bswap => wide!(size(instr, 0), bswap),
        N::Xlatb => xlat,
        N::Cmpxchg8b => cmpxchg8b,
        N::Cmpxchg16b => cmpxchg16b,
        // 0F 0D is a prefetch and wants memory.
        N::Reservednop if instr.op0_kind() == iced_x86::OpKind::Register && is_0f0d(instr) => {
            return Some(crate::decode::invalid);
        }
        // Hints that processors without the feature take for no-operations; libgcc's unwinder relies on it for RDSSP.
        N::Rdsspd | N::Rdsspq | N::Cldemote | N::Prefetchit0 | N::Prefetchit1 => nop,
        N::Nop | N::Endbr64 | N::Endbr32 | N::Prefetchnta | N::Prefetcht0 | N::Prefetcht1 | N::Prefetcht2 | N::Prefetchw => nop,
        N::Prefetch | N::Prefetchwt1 | N::Reservednop | N::Lfence | N::Mfence | N::Sfence => nop,
        N::Pause => pause,
        N::Cbw => cbw,
        N::Cwde => cwde,
        N::Cdqe => cdqe,
        N::Cwd => cwd,
        N::Cdq => cdq,
        N::Cqo => cqo,
        _ => {
            let cc = condition(mnemonic, CMOV)?;
            return cmov_handler(instr, cc);
        }
    })
}

fn is_0f0d(instr: &Instruction) -> bool {
    use iced_x86::Code;
    matches!(instr.code(), Code::Reservednop_rm16_r16_0F0D | Code::Reservednop_rm32_r32_0F0D | Code::Reservednop_rm64_r64_0F0D)
}

fn mov<T: Int, D: Place, S: Source>(core: &mut Core, i: &Insn) -> Result<Flow, Fault> {
    let v: T = S::get(core, i)?;
    D::set(core, i, v)?;
    Ok(Flow::Next)
}

fn movzx<T: Int, F: Int, S: Source>(core: &mut Core, i: &Insn) -> Result<Flow, Fault> {
    let v: F = S::get(core, i)?;
    T::set(&mut core.cpu, i.r[0], T::of(v.zext()));
    Ok(Flow::Next)
}

fn movsx<T: Int, F: Int, S: Source>(core: &mut Core, i: &Insn) -> Result<Flow, Fault> {
    let v: F = S::get(core, i)?;
    T::set(&mut core.cpu, i.r[0], T::of(v.sext()));
    Ok(Flow::Next)
}

fn lea<T: Int>(core: &mut Core, i: &Insn) -> Result<Flow, Fault> {
    use crate::insn::AddrSize;
    let v = core.offset(i);
    let v = match i.asize {
        AddrSize::A64 => v,
        AddrSize::A32 => v & 0xffff_ffff,
        AddrSize::A16 => v & 0xffff,
    };
    T::set(&mut core.cpu, i.r[0], T::of(v));
    Ok(Flow::Next)
}

fn xchg<T: Int, D: Place>(core: &mut Core, i: &Insn) -> Result<Flow, Fault> {
    let new = T::get(&core.cpu, i.r[1]);
    let old = D::modify(core, i, |old: T| (new, old))?;
    T::set(&mut core.cpu, i.r[1], old);
    Ok(Flow::Next)
}

/// The 16-bit form is undefined; silicon gives 0 for it.
fn bswap<T: Int>(core: &mut Core, i: &Insn) -> Result<Flow, Fault> {
    let v = T::get(&core.cpu, i.r[0]).zext();
    let v = if T::BITS == 16 { 0 } else { v.swap_bytes() >> (64 - T::BITS) };
    T::set(&mut core.cpu, i.r[0], T::of(v));
    Ok(Flow::Next)
}

fn xlat(core: &mut Core, i: &Insn) -> Result<Flow, Fault> {
    use crate::insn::AddrSize;
    let offset = core.cpu.gpr[RBX].wrapping_add(core.cpu.gpr[RAX] & 0xff);
    let offset = match i.asize {
        AddrSize::A64 => offset,
        AddrSize::A32 => offset & 0xffff_ffff,
        AddrSize::A16 => offset & 0xffff,
    };
    let v = core.load8(core.address(usize::from(i.seg), offset, 1, false))?;
    core.cpu.set_r8(0, v);
    Ok(Flow::Next)
}

fn cmpxchg8b(core: &mut Core, i: &Insn) -> Result<Flow, Fault> {
    let cpu = &core.cpu;
    let want = cpu.gpr[2] << 32 | cpu.gpr[0] & 0xffff_ffff;
    let new = cpu.gpr[1] << 32 | cpu.gpr[3] & 0xffff_ffff;
    let old = core.modify(core.ea(i), |old: u64| (if old == want { new } else { old }, old))?;
    if old != want {
        core.cpu.set_r32(0, old as u32);
        core.cpu.set_r32(2, (old >> 32) as u32);
    }
    set_zf(core, old == want);
    Ok(Flow::Next)
}

fn cmpxchg16b(core: &mut Core, i: &Insn) -> Result<Flow, Fault> {
    let lin = core.ea(i);
    if lin & 15 != 0 {
        return Err(core.raise(crate::core::GP, Some(0)));
    }
    let cpu = &core.cpu;
    let want = u128::from(cpu.gpr[2]) << 64 | u128::from(cpu.gpr[0]);
    let new = u128::from(cpu.gpr[1]) << 64 | u128::from(cpu.gpr[3]);
    let old = core.modify(lin, |old: u128| (if old == want { new } else { old }, old))?;
    if old != want {
        core.cpu.gpr[0] = old as u64;
        core.cpu.gpr[2] = (old >> 64) as u64;
    }
    set_zf(core, old == want);
    Ok(Flow::Next)
}

/// Replaces ZF only.
pub fn set_zf(core: &mut Core, zero: bool) {
    let bits = core.cpu.arith();
    let zf = crate::state::flags::ZF;
    core.cpu.set_arith(if zero { bits | zf } else { bits & !zf });
}

fn nop(_: &mut Core, _: &Insn) -> Result<Flow, Fault> {
    Ok(Flow::Next)
}

/// Ends the turn of a spinning vCPU.
fn pause(core: &mut Core, _: &Insn) -> Result<Flow, Fault> {
    core.yielded = true;
    Ok(Flow::Leave)
}

fn cbw(core: &mut Core, _: &Insn) -> Result<Flow, Fault> {
    let v = core.cpu.r8(0) as i8;
    core.cpu.set_r16(0, v as u16);
    Ok(Flow::Next)
}
fn cwde(core: &mut Core, _: &Insn) -> Result<Flow, Fault> {
    let v = core.cpu.r16(0) as i16;
    core.cpu.set_r32(0, v as u32);
    Ok(Flow::Next)
}
fn cdqe(core: &mut Core, _: &Insn) -> Result<Flow, Fault> {
    let v = core.cpu.r32(0) as i32;
    core.cpu.set_r64(0, v as u64);
    Ok(Flow::Next)
}
fn cwd(core: &mut Core, _: &Insn) -> Result<Flow, Fault> {
    let v = core.cpu.r16(0) as i16;
    core.cpu.set_r16(2, (v >> 15) as u16);
    Ok(Flow::Next)
}
fn cdq(core: &mut Core, _: &Insn) -> Result<Flow, Fault> {
    let v = core.cpu.r32(0) as i32;
    core.cpu.set_r32(2, (v >> 31) as u32);
    Ok(Flow::Next)
}
fn cqo(core: &mut Core, _: &Insn) -> Result<Flow, Fault> {
    let v = core.cpu.r64(0) as i64;
    core.cpu.set_r64(2, (v >> 63) as u64);
    Ok(Flow::Next)
}

/// A 32-bit CMOV clears the upper half whether it moves or not; a memory operand is read in any case.
fn cmov<T: Int, S: Source, const CC: u8>(core: &mut Core, i: &Insn) -> Result<Flow, Fault> {
    let v: T = S::get(core, i)?;
    let v = if super::branch::holds::<CC>(&core.cpu) { v } else { T::get(&core.cpu, i.r[0]) };
    T::set(&mut core.cpu, i.r[0], v);
    Ok(Flow::Next)
}

pub const CMOV: [N; 16] = [
    N::Cmovo,
    N::Cmovno,
    N::Cmovb,
    N::Cmovae,
    N::Cmove,
    N::Cmovne,
    N::Cmovbe,
    N::Cmova,
    N::Cmovs,
    N::Cmovns,
    N::Cmovp,
    N::Cmovnp,
    N::Cmovl,
    N::Cmovge,
    N::Cmovle,
    N::Cmovg,
];

/// Condition number of a mnemonic, given the sixteen of its family.
pub fn condition(mnemonic: N, family: [N; 16]) -> Option<usize> {
    family.iter().position(|&m| m == mnemonic)
}

fn cmov_handler(instr: &Instruction, cc: usize) -> Option<Handler> {
    macro_rules! of {
        ($($n:literal)*) => {
            [$({
                fn pick(size: usize, kind: Kind) -> Option<Handler> {
                    Some(match (kind, size) {
                        (Kind::Reg, 2) => cmov::<u16, R<1>, $n>,
                        (Kind::Reg, 4) => cmov::<u32, R<1>, $n>,
                        (Kind::Reg, 8) => cmov::<u64, R<1>, $n>,
                        (_, 2) => cmov::<u16, M<false>, $n>,
                        (_, 4) => cmov::<u32, M<false>, $n>,
                        (_, 8) => cmov::<u64, M<false>, $n>,
                        _ => return None,
                    })
                }
                pick as fn(usize, Kind) -> Option<Handler>
            }),*]
        };
    }
    let table = of!(0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15);
    table[cc](size(instr, 0), kind(instr, 1))
}
