//! Packed integer operations of SSE2 to SSE4.2 with two full-width operands, shifts and conversions between lane widths.

use iced_x86::{Code, Instruction, OpKind};

use super::host::int as host;
use super::sse::{h, ld16, ld32, ld64, ld128, x};
use crate::insn::Handler;

/// `xmm op= xmm/m128`.
macro_rules! two {
    ($mem:expr, $op:path) => {
        if $mem {
            h!(|c, i| {
                let b = ld128(c, i)?;
                let d = &mut c.cpu.xmm[x(i, 0)];
                *d = $op(*d, b);
            })
        } else {
            h!(|c, i| {
                let b = c.cpu.xmm[x(i, 1)];
                let d = &mut c.cpu.xmm[x(i, 0)];
                *d = $op(*d, b);
            })
        }
    };
}

/// `xmm = op(xmm/m)`, the memory operand narrower than a register.
macro_rules! widen {
    ($mem:expr, $ld:ident, $op:path) => {
        if $mem {
            h!(|c, i| c.cpu.xmm[x(i, 0)] = $op(0, $ld(c, i)? as u128))
        } else {
            h!(|c, i| c.cpu.xmm[x(i, 0)] = $op(0, c.cpu.xmm[x(i, 1)]))
        }
    };
}

/// `xmm op= imm8`.
macro_rules! shift {
    ($op:path) => {
        h!(|c, i| {
            let d = &mut c.cpu.xmm[x(i, 0)];
            *d = $op(*d, (i.imm & 0xff) as u128);
        })
    };
}

fn and(a: u128, b: u128) -> u128 {
    a & b
}
fn andn(a: u128, b: u128) -> u128 {
    !a & b
}
fn or(a: u128, b: u128) -> u128 {
    a | b
}
fn xor(a: u128, b: u128) -> u128 {
    a ^ b
}
fn srldq(a: u128, bytes: u128) -> u128 {
    if bytes > 15 { 0 } else { a >> (8 * bytes as u32) }
}
fn slldq(a: u128, bytes: u128) -> u128 {
    if bytes > 15 { 0 } else { a << (8 * bytes as u32) }
}

macro_rules! table {
    ($code:expr, $mem:expr; $($name:ident => $op:path,)*) => {
        match $code {
            $(Code::$name => Some(two!($mem, $op)),)*
            _ => None,
        }
    };
}

pub fn select(i: &Instruction) -> Option<Handler> {
    let mem = (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Memory);
    let code = i.code();
    let full = table! { code, mem;
        Andps_xmm_xmmm128 => and, Andpd_xmm_xmmm128 => and, Pand_xmm_xmmm128 => and,
        Andnps_xmm_xmmm128 => andn, Andnpd_xmm_xmmm128 => andn, Pandn_xmm_xmmm128 => andn,
        Orps_xmm_xmmm128 => or, Orpd_xmm_xmmm128 => or, Por_xmm_xmmm128 => or,
        Xorps_xmm_xmmm128 => xor, Xorpd_xmm_xmmm128 => xor, Pxor_xmm_xmmm128 => xor,
        Paddb_xmm_xmmm128 => host::paddb, Paddw_xmm_xmmm128 => host::paddw,
        Paddd_xmm_xmmm128 => host::paddd, Paddq_xmm_xmmm128 => host::paddq,
        Psubb_xmm_xmmm128 => host::psubb, Psubw_xmm_xmmm128 => host::psubw,
        Psubd_xmm_xmmm128 => host::psubd, Psubq_xmm_xmmm128 => host::psubq,
        Paddsb_xmm_xmmm128 => host::paddsb, Paddsw_xmm_xmmm128 => host::paddsw,
        Paddusb_xmm_xmmm128 => host::paddusb, Paddusw_xmm_xmmm128 => host::paddusw,
        Psubsb_xmm_xmmm128 => host::psubsb, Psubsw_xmm_xmmm128 => host::psubsw,
        Psubusb_xmm_xmmm128 => host::psubusb, Psubusw_xmm_xmmm128 => host::psubusw,
        Pcmpeqb_xmm_xmmm128 => host::pcmpeqb, Pcmpeqw_xmm_xmmm128 => host::pcmpeqw,
        Pcmpeqd_xmm_xmmm128 => host::pcmpeqd, Pcmpeqq_xmm_xmmm128 => host::pcmpeqq,
        Pcmpgtb_xmm_xmmm128 => host::pcmpgtb, Pcmpgtw_xmm_xmmm128 => host::pcmpgtw,
        Pcmpgtd_xmm_xmmm128 => host::pcmpgtd, Pcmpgtq_xmm_xmmm128 => host::pcmpgtq,
        Pmullw_xmm_xmmm128 => host::pmullw, Pmulhw_xmm_xmmm128 => host::pmulhw, Pmulhuw_xmm_xmmm128 => host::pmulhuw,
        Pmuludq_xmm_xmmm128 => host::pmuludq, Pmuldq_xmm_xmmm128 => host::pmuldq, Pmulld_xmm_xmmm128 => host::pmulld,
        Pmaddwd_xmm_xmmm128 => host::pmaddwd, Psadbw_xmm_xmmm128 => host::psadbw,
        Pavgb_xmm_xmmm128 => host::pavgb, Pavgw_xmm_xmmm128 => host::pavgw,
        Pminub_xmm_xmmm128 => host::pminub, Pmaxub_xmm_xmmm128 => host::pmaxub,
        Pminsw_xmm_xmmm128 => host::pminsw, Pmaxsw_xmm_xmmm128 => host::pmaxsw,
        Pminsb_xmm_xmmm128 => host::pminsb, Pmaxsb_xmm_xmmm128 => host::pmaxsb,
        Pminsd_xmm_xmmm128 => host::pminsd, Pmaxsd_xmm_xmmm128 => host::pmaxsd,
        Pminuw_xmm_xmmm128 => host::pminuw, Pmaxuw_xmm_xmmm128 => host::pmaxuw,
        Pminud_xmm_xmmm128 => host::pminud, Pmaxud_xmm_xmmm128 => host::pmaxud,
        Phminposuw_xmm_xmmm128 => host::phminposuw,
        Psrlw_xmm_xmmm128 => host::psrlw, Psrld_xmm_xmmm128 => host::psrld, Psrlq_xmm_xmmm128 => host::psrlq,
        Psraw_xmm_xmmm128 => host::psraw, Psrad_xmm_xmmm128 => host::psrad,
        Psllw_xmm_xmmm128 => host::psllw, Pslld_xmm_xmmm128 => host::pslld, Psllq_xmm_xmmm128 => host::psllq,
        Punpcklbw_xmm_xmmm128 => host::punpcklbw, Punpckhbw_xmm_xmmm128 => host::punpckhbw,
        Punpcklwd_xmm_xmmm128 => host::punpcklwd, Punpckhwd_xmm_xmmm128 => host::punpckhwd,
        Punpckldq_xmm_xmmm128 => host::punpckldq, Punpckhdq_xmm_xmmm128 => host::punpckhdq,
        Punpcklqdq_xmm_xmmm128 => host::punpcklqdq, Punpckhqdq_xmm_xmmm128 => host::punpckhqdq,
        Unpcklps_xmm_xmmm128 => host::punpckldq, Unpckhps_xmm_xmmm128 => host::punpckhdq,
        Unpcklpd_xmm_xmmm128 => host::punpcklqdq, Unpckhpd_xmm_xmmm128 => host::punpckhqdq,
        Packsswb_xmm_xmmm128 => host::packsswb, Packssdw_xmm_xmmm128 => host::packssdw,
        Packuswb_xmm_xmmm128 => host::packuswb, Packusdw_xmm_xmmm128 => host::packusdw,
        Pshufb_xmm_xmmm128 => host::pshufb,
        Phaddw_xmm_xmmm128 => host::phaddw, Phaddd_xmm_xmmm128 => host::phaddd, Phaddsw_xmm_xmmm128 => host::phaddsw,
        Phsubw_xmm_xmmm128 => host::phsubw, Phsubd_xmm_xmmm128 => host::phsubd, Phsubsw_xmm_xmmm128 => host::phsubsw,
        Pmaddubsw_xmm_xmmm128 => host::pmaddubsw, Pmulhrsw_xmm_xmmm128 => host::pmulhrsw,
        Psignb_xmm_xmmm128 => host::psignb, Psignw_xmm_xmmm128 => host::psignw, Psignd_xmm_xmmm128 => host::psignd,
        Pabsb_xmm_xmmm128 => host::pabsb, Pabsw_xmm_xmmm128 => host::pabsw, Pabsd_xmm_xmmm128 => host::pabsd,
    };
    full.or_else(|| {
        Some(match code {
            Code::Pmovsxbw_xmm_xmmm64 => widen!(mem, ld64, host::pmovsxbw),
            Code::Pmovsxbd_xmm_xmmm32 => widen!(mem, ld32, host::pmovsxbd),
            Code::Pmovsxbq_xmm_xmmm16 => widen!(mem, ld16, host::pmovsxbq),
            Code::Pmovsxwd_xmm_xmmm64 => widen!(mem, ld64, host::pmovsxwd),
            Code::Pmovsxwq_xmm_xmmm32 => widen!(mem, ld32, host::pmovsxwq),
            Code::Pmovsxdq_xmm_xmmm64 => widen!(mem, ld64, host::pmovsxdq),
            Code::Pmovzxbw_xmm_xmmm64 => widen!(mem, ld64, host::pmovzxbw),
            Code::Pmovzxbd_xmm_xmmm32 => widen!(mem, ld32, host::pmovzxbd),
            Code::Pmovzxbq_xmm_xmmm16 => widen!(mem, ld16, host::pmovzxbq),
            Code::Pmovzxwd_xmm_xmmm64 => widen!(mem, ld64, host::pmovzxwd),
            Code::Pmovzxwq_xmm_xmmm32 => widen!(mem, ld32, host::pmovzxwq),
            Code::Pmovzxdq_xmm_xmmm64 => widen!(mem, ld64, host::pmovzxdq),
            Code::Psrlw_xmm_imm8 => shift!(host::psrlw),
            Code::Psrld_xmm_imm8 => shift!(host::psrld),
            Code::Psrlq_xmm_imm8 => shift!(host::psrlq),
            Code::Psraw_xmm_imm8 => shift!(host::psraw),
            Code::Psrad_xmm_imm8 => shift!(host::psrad),
            Code::Psllw_xmm_imm8 => shift!(host::psllw),
            Code::Pslld_xmm_imm8 => shift!(host::pslld),
            Code::Psllq_xmm_imm8 => shift!(host::psllq),
            Code::Psrldq_xmm_imm8 => shift!(srldq),
            Code::Pslldq_xmm_imm8 => shift!(slldq),
            _ => return None,
        })
    })
}
