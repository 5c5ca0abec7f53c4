//! x87: the host's own instruction on the host's own register stack, which holds the guest's meanwhile (see [`super::float`]).
//!
//! FIP, FOP and FDP would name host code there, so that they are written to the guest's state as the functions do. While the guest's
//! registers are loaded all its exceptions are masked and x87 instructions are permitted: nothing can fault but a memory operand.

use iced_x86::{Instruction, Mnemonic as N, OpKind, Register};

use super::asm::{Mem, RAX, RBP};
use super::block::{Flags, Result, Translator, Unsupported};
use super::frame::{self, SCRATCH, X87, word};
use super::integer::{encode, place, redirect};
use super::operand::Access;
use crate::exec::fpu::EXCEPTIONS;

/// The guest's RAX.
const A: u8 = 8;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Class {
    /// Recorded in FIP and FOP, with a memory operand in FDP.
    Data,
    Control,
}

/// `None`: no template. `same`: the host's maker is the CPU profile's; others leave some condition codes otherwise.
fn class(mnemonic: N, same: bool) -> Option<Class> {
    use N::*;
    Some(match mnemonic {
        Fld | Fild | Fbld | Fst | Fstp | Fist | Fistp | Fisttp | Fbstp | Fadd | Faddp | Fiadd | Fsub | Fsubp | Fisub | Fsubr
        | Fsubrp | Fisubr | Fmul | Fmulp | Fimul | Fdiv | Fdivp | Fidiv | Fdivr | Fdivrp | Fidivr | Fcom | Fcomp | Fcompp
        | Ficom | Ficomp | Fucom | Fucomp | Fucompp | Fcomi | Fcomip | Fucomi | Fucomip | Fxch | Fchs | Fabs | Fld1 | Fldz
        | Fldl2t | Fldl2e | Fldpi | Fldlg2 | Fldln2 | Fsqrt | Frndint => Class::Data,
        Fcmovb | Fcmovnb | Fcmove | Fcmovne | Fcmovbe | Fcmovnbe | Fcmovu | Fcmovnu | Ffree | Ffreep | Fincstp | Fdecstp
        | Fnop | Ftst | Fxam | Fscale | Fprem | Fprem1 | F2xm1 | Fyl2x | Fyl2xp1 | Fpatan | Fptan | Fsin | Fcos | Fsincos
        | Fxtract
            if same =>
        {
            Class::Data
        }
        Fnstsw | Fnstcw | Fldcw | Fnclex | Wait => Class::Control,
        _ => return None,
    })
}

/// Whether the instruction has a template here.
pub fn computes(ins: &Instruction, same: bool) -> bool {
    class(ins.mnemonic(), same).is_some()
}

fn access(ins: &Instruction) -> Option<Access> {
    use N::*;
    let stores = matches!(ins.mnemonic(), Fst | Fstp | Fist | Fistp | Fisttp | Fbstp | Fnstsw | Fnstcw);
    let memory = ins.op_count() > 0 && ins.op0_kind() == OpKind::Memory || ins.op_count() > 1 && ins.op1_kind() == OpKind::Memory;
    memory.then(|| Access { write: stores, size: ins.memory_size().size() as u32 })
}

pub fn template(t: &mut Translator<'_>, ins: &Instruction) -> Result {
    let class = class(ins.mnemonic(), t.unit.same_flags).ok_or(Unsupported)?;
    t.spoil_flags();
    t.refuse_unless(X87);
    let access = access(ins);
    let mut host = *ins;
    if let Some(access) = access {
        // FDP is the offset in the segment.
        if matches!(ins.memory_segment(), Register::FS | Register::GS) {
            return Err(Unsupported);
        }
        let m = place(t, ins, access, false)?;
        if ins.mnemonic() == N::Fldcw {
            return load_control(t, m);
        }
        redirect(&mut host, m);
    }
    if moves_conditionally(ins.mnemonic()) {
        t.host_flags();
    }
    if ins.mnemonic() != N::Wait {
        encode(t, &mut host)?;
    }
    if matches!(ins.mnemonic(), N::Fcomi | N::Fcomip | N::Fucomi | N::Fucomip) {
        t.flags = Flags::Host;
    }
    match (class, ins.mnemonic()) {
        (Class::Data, _) => record(t, ins, access.is_some())?,
        // mov r8w, ax
        (_, N::Fnstsw) if access.is_none() => t.asm.bytes(&[0x66, 0x44, 0x8b, 0xc0]),
        _ => {}
    }
    debug_assert_eq!(frame::MAP[0], Some(A), "FNSTSW AX");
    Ok(())
}

fn moves_conditionally(mnemonic: N) -> bool {
    use N::*;
    matches!(mnemonic, Fcmovb | Fcmovnb | Fcmove | Fcmovne | Fcmovbe | Fcmovnbe | Fcmovu | Fcmovnu)
}

/// FLDCW: a control word that unmasks something is the function's business.
fn load_control(t: &mut Translator<'_>, m: Mem) -> Result {
    // movzx eax, word m
    t.asm.rm(false, &[0x0f, 0xb7], RAX, m);
    t.asm.store(word(SCRATCH), RAX);
    // and eax, EXCEPTIONS; cmp eax, EXCEPTIONS; jne slow
    t.asm.bytes(&[0x83, 0xe0, EXCEPTIONS as u8, 0x83, 0xf8, EXCEPTIONS as u8]);
    let slow = t.asm.jcc_forward(5);
    t.slow(slow);
    t.asm.rm(false, &[0xd9], 5, word(SCRATCH));
    Ok(())
}

/// Writes FIP and FOP, and FDP; no flag changes. What the next instruction overwrites in any case is left out.
fn record(t: &mut Translator<'_>, ins: &Instruction, memory: bool) -> Result {
    if memory {
        t.address(ins, false)?;
        t.asm.store(Mem::at(RBP, frame::fdp()), RAX);
    }
    let overwritten =
        t.following.is_some_and(|next| class(next.mnemonic(), true) == Some(Class::Data) && self::access(&next).is_none());
    if !overwritten {
        let insn = t.insn();
        let (at, fop) = (i32::from(t.unit.offset) + i32::from(insn.off), insn.imm as u16 & 0x7ff);
        t.linear(at);
        t.asm.store(Mem::at(RBP, frame::fip()), RAX);
        // mov word [fop], imm16
        t.asm.bytes(&[0x66]);
        t.asm.rm(false, &[0xc7], 0, Mem::at(RBP, frame::fop()));
        t.asm.bytes(&fop.to_le_bytes());
    }
    Ok(())
}
