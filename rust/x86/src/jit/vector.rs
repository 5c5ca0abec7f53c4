//! SSE to SSE4.2: the host's own instruction, its registers loaded from and stored to the guest's.
//!
//! Floating point runs under the guest's MXCSR, which stays loaded from the first such instruction to the way out (see
//! [`super::float`]); a guest that has exceptions unmasked is left to the functions. Whether SSE may be used at all
//! (CR0.EM, CR0.TS, CR4.OSFXSR) cannot change inside a block and is looked at once.

use iced_x86::{Instruction, Mnemonic as N, OpKind, Register};

use super::asm::{Mem, RAX, RBP};
use super::block::{Flags, Result, Translator, Unsupported};
use super::frame::{self, FLOATING, MAP, SSE, word};
use super::integer::{encode, place, redirect};
use super::operand::{self, guest, sized};

/// What an instruction needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Class {
    /// Bits and integers.
    Bits,
    /// MXCSR.
    Float,
}

fn class(mnemonic: N) -> Option<Class> {
    use N::*;
    Some(match mnemonic {
        Movaps | Movups | Movapd | Movupd | Movdqa | Movdqu | Lddqu | Movss | Movsd | Movd | Movq | Movlps | Movhps | Movlpd
        | Movhpd | Movlhps | Movhlps | Movddup | Movshdup | Movsldup | Movmskps | Movmskpd | Pmovmskb | Andps | Andpd
        | Andnps | Andnpd | Orps | Orpd | Xorps | Xorpd | Pand | Pandn | Por | Pxor | Shufps | Shufpd | Unpcklps | Unpcklpd
        | Unpckhps | Unpckhpd | Punpcklbw | Punpcklwd | Punpckldq | Punpcklqdq | Punpckhbw | Punpckhwd | Punpckhdq
        | Punpckhqdq | Packsswb | Packssdw | Packuswb | Packusdw | Pshufd | Pshuflw | Pshufhw | Pshufb | Palignr | Paddb
        | Paddw | Paddd | Paddq | Psubb | Psubw | Psubd | Psubq | Paddsb | Paddsw | Paddusb | Paddusw | Psubsb | Psubsw
        | Psubusb | Psubusw | Pmullw | Pmulld | Pmulhw | Pmulhuw | Pmuludq | Pmuldq | Pmaddwd | Pmaddubsw | Pavgb | Pavgw
        | Psadbw | Pminub | Pminsw | Pminuw | Pminud | Pminsb | Pminsd | Pmaxub | Pmaxsw | Pmaxuw | Pmaxud | Pmaxsb | Pmaxsd
        | Pcmpeqb | Pcmpeqw | Pcmpeqd | Pcmpeqq | Pcmpgtb | Pcmpgtw | Pcmpgtd | Pcmpgtq | Psllw | Pslld | Psllq | Psrlw
        | Psrld | Psrlq | Psraw | Psrad | Pslldq | Psrldq | Pabsb | Pabsw | Pabsd | Phaddw | Phaddd | Phsubw | Phsubd
        | Psignb | Psignw | Psignd | Pmovzxbw | Pmovzxbd | Pmovzxbq | Pmovzxwd | Pmovzxwq | Pmovzxdq | Pmovsxbw | Pmovsxbd
        | Pmovsxbq | Pmovsxwd | Pmovsxwq | Pmovsxdq => Class::Bits,
        Addss | Addsd | Addps | Addpd | Subss | Subsd | Subps | Subpd | Mulss | Mulsd | Mulps | Mulpd | Divss | Divsd | Divps
        | Divpd | Minss | Minsd | Minps | Minpd | Maxss | Maxsd | Maxps | Maxpd | Sqrtss | Sqrtsd | Sqrtps | Sqrtpd | Cmpss
        | Cmpsd | Cmpps | Cmppd | Comiss | Comisd | Ucomiss | Ucomisd | Cvtsi2ss | Cvtsi2sd | Cvtss2si | Cvtsd2si | Cvttss2si
        | Cvttsd2si | Cvtss2sd | Cvtsd2ss | Cvtps2pd | Cvtpd2ps | Cvtdq2ps | Cvtdq2pd | Cvtps2dq | Cvttps2dq | Cvtpd2dq
        | Cvttpd2dq | Haddps | Haddpd | Hsubps | Hsubpd | Addsubps | Addsubpd => Class::Float,
        _ => return None,
    })
}

/// Whether the instruction computes under MXCSR.
pub fn floats(ins: &Instruction) -> bool {
    class(ins.mnemonic()) == Some(Class::Float)
}

/// Whether the old value of an XMM destination does not matter.
fn overwrites(ins: &Instruction) -> bool {
    use N::*;
    let whole = matches!(
        ins.mnemonic(),
        Movaps
            | Movups
            | Movapd
            | Movupd
            | Movdqa
            | Movdqu
            | Lddqu
            | Movd
            | Movq
            | Pshufd
            | Pshuflw
            | Pshufhw
            | Cvtdq2ps
            | Cvtps2dq
            | Cvttps2dq
            | Cvtdq2pd
            | Cvtpd2dq
            | Cvttpd2dq
            | Cvtps2pd
            | Cvtpd2ps
            | Sqrtps
            | Sqrtpd
    );
    whole || matches!(ins.mnemonic(), Movss | Movsd) && ins.op1_kind() == OpKind::Memory
}

/// 16-byte operands in memory that may be anywhere.
fn unaligned(mnemonic: N) -> bool {
    matches!(mnemonic, N::Movups | N::Movupd | N::Movdqu | N::Lddqu)
}

fn slot(register: Register) -> Mem {
    Mem::at(RBP, frame::xmm(register.number()))
}

/// MOVAPS between host XMM register `n` and a guest register.
fn load(t: &mut Translator<'_>, n: u8, register: Register) {
    t.asm.rm(false, &[0x0f, 0x28], n, slot(register));
}
fn store(t: &mut Translator<'_>, n: u8, register: Register) {
    t.asm.rm(false, &[0x0f, 0x29], n, slot(register));
}

pub fn template(t: &mut Translator<'_>, ins: &Instruction) -> Result {
    let class = class(ins.mnemonic()).ok_or(Unsupported)?;
    operands(ins)?;
    let access = operand::memory(ins);
    if access.is_some() || class == Class::Float || !t.sse_checked {
        t.spoil_flags();
    }
    if !t.sse_checked {
        t.refuse_unless(SSE);
        t.sse_checked = true;
    }
    if class == Class::Float {
        t.refuse_unless(FLOATING);
    }
    let mut host = *ins;
    if let Some(access) = access {
        let from_slot = (0..ins.op_count()).any(|n| ins.op_register(n).is_gpr());
        let m = place(t, ins, access, from_slot)?;
        if access.size == 16 && !unaligned(ins.mnemonic()) {
            // test r11b / al, 15: the page's own address is aligned.
            if from_slot {
                return Err(Unsupported);
            }
            t.asm.bytes(&[0xa8, 15]);
            let slow = t.asm.jcc_forward(5);
            t.slow(slow);
        }
        redirect(&mut host, m);
    }
    let result = rename(t, ins, &mut host)?;
    encode(t, &mut host)?;
    match result {
        Some(register) if register.is_xmm() => store(t, 0, register),
        Some(register) => {
            let number = guest(register)?;
            if MAP[number].is_none() {
                t.asm.store(word(number), RAX);
            }
        }
        None => {}
    }
    if ins.rflags_modified() != 0 {
        t.flags = Flags::Host;
    }
    Ok(())
}

/// Only XMM, general registers, memory and immediates.
fn operands(ins: &Instruction) -> Result {
    for n in 0..ins.op_count() {
        let register = ins.op_register(n);
        let known = match ins.op_kind(n) {
            OpKind::Register => register.is_xmm() || guest(register).is_ok(),
            OpKind::Memory | OpKind::Immediate8 => true,
            // String instructions share the names MOVSD and CMPSD.
            _ => false,
        };
        if !known {
            return Err(Unsupported);
        }
    }
    Ok(())
}

/// Puts operands into host registers; the result is the register that the instruction writes.
fn rename(t: &mut Translator<'_>, ins: &Instruction, host: &mut Instruction) -> Result<Option<Register>> {
    let compares = matches!(ins.mnemonic(), N::Comiss | N::Comisd | N::Ucomiss | N::Ucomisd);
    for n in 0..ins.op_count() {
        if ins.op_kind(n) != OpKind::Register {
            continue;
        }
        let register = ins.op_register(n);
        if register.is_xmm() {
            if n > 0 || !overwrites(ins) {
                load(t, n as u8, register);
            }
            host.set_op_register(n, Register::XMM0 + n);
            continue;
        }
        let number = guest(register)?;
        let to = match MAP[number] {
            Some(to) => to,
            None => {
                if n > 0 {
                    t.asm.load(RAX, word(number));
                }
                RAX
            }
        };
        host.set_op_register(n, sized(to, register));
    }
    Ok(if ins.op0_kind() == OpKind::Register && !compares { Some(ins.op0_register()) } else { None })
}
