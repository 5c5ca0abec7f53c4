//! MMX, on the mantissas of the x87 registers.
//!
//! Every MMX instruction sets TOP to 0 and all tags to valid (EMMS: to empty); a written register gets all ones as sign and
//! exponent. The lane operations are the low half of the 128-bit ones.

use iced_x86::{Code, Instruction, OpKind};

use super::fpu;
use super::host::int as host;
use super::sse::{self, CR0_EM, CR0_TS, ld32, ld64, st32, st64};
use super::sse_lane;
use crate::core::{Core, MF, NM, UD};
use crate::insn::{Fault, Handler, Insn};

const LOW64: u128 = u64::MAX as u128;

/// #UD, #NM, #MF.
#[inline(always)]
fn gate(c: &mut Core) -> Result<(), Fault> {
    if c.cpu.cr0 & (CR0_EM | CR0_TS) != 0 {
        let ud = c.cpu.cr0 & CR0_EM != 0;
        return Err(c.raise(if ud { UD } else { NM }, None));
    }
    pending(c)
}

/// #MF when an x87 exception waits.
#[inline(always)]
pub fn pending(c: &mut Core) -> Result<(), Fault> {
    if fpu::error(&c.cpu.fpu) { Err(c.raise(MF, None)) } else { Ok(()) }
}

/// MMX register that operand `n` names.
#[inline(always)]
pub fn get(c: &Core, i: &Insn, n: usize) -> u64 {
    c.cpu.fpu.st[(i.r[n] & 7) as usize].mantissa
}

/// What every MMX instruction does to the x87 state.
#[inline(always)]
pub fn touch(c: &mut Core) {
    c.cpu.fpu.fsw &= !fpu::TOP;
    c.cpu.fpu.ftw = 0xff;
}

/// Writes the MMX register of operand 0.
#[inline(always)]
pub fn set(c: &mut Core, i: &Insn, v: u64) {
    touch(c);
    let r = &mut c.cpu.fpu.st[(i.r[0] & 7) as usize];
    r.mantissa = v;
    r.sign_exp = 0xffff;
}

macro_rules! m {
    (|$c:ident, $i:ident| $b:expr) => {{
        fn f($c: &mut Core, $i: &Insn) -> Result<crate::insn::Flow, Fault> {
            gate($c)?;
            $b;
            sse::NEXT
        }
        f as Handler
    }};
}

/// `mm op= mm/m`.
macro_rules! two {
    ($mem:expr, $ld:ident, $op:expr) => {
        if $mem {
            m!(|c, i| {
                let b = $ld(c, i)? as u128;
                let a = get(c, i, 0) as u128;
                set(c, i, $op(a, b) as u64);
            })
        } else {
            m!(|c, i| {
                let (a, b) = (get(c, i, 0) as u128, get(c, i, 1) as u128);
                set(c, i, $op(a, b) as u64);
            })
        }
    };
}

macro_rules! two_imm {
    ($mem:expr, $op:expr) => {
        if $mem {
            m!(|c, i| {
                let b = ld64(c, i)? as u128;
                let a = get(c, i, 0) as u128;
                set(c, i, $op(a, b, i.imm) as u64);
            })
        } else {
            m!(|c, i| {
                let (a, b) = (get(c, i, 0) as u128, get(c, i, 1) as u128);
                set(c, i, $op(a, b, i.imm) as u64);
            })
        }
    };
}

macro_rules! shift {
    ($op:path) => {
        m!(|c, i| {
            let a = get(c, i, 0) as u128;
            set(c, i, $op(a, (i.imm & 0xff) as u128) as u64);
        })
    };
}

/// Both operands side by side: what packs and horizontal operations take.
fn join(a: u128, b: u128) -> u128 {
    a | b << 64
}

fn palignr(a: u128, b: u128, imm: u64) -> u128 {
    let n = 8 * (imm & 0xff) as u32;
    if n < 128 { join(b, a) >> n } else { 0 }
}

fn pinsrw(a: u128, b: u128, imm: u64) -> u128 {
    let at = 16 * (imm & 3) as u32;
    a & !(0xffff << at) | (b & 0xffff) << at
}

macro_rules! table {
    ($code:expr, $mem:expr; $($name:ident $ld:ident $op:expr,)*) => {
        match $code {
            $(Code::$name => Some(two!($mem, $ld, $op)),)*
            _ => None,
        }
    };
}

pub fn select(i: &Instruction) -> Option<Handler> {
    use Code::*;
    let mem = (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Memory);
    let code = i.code();
    let found = table! { code, mem;
        Pand_mm_mmm64 ld64 |a: u128, b: u128| a & b, Pandn_mm_mmm64 ld64 |a: u128, b: u128| !a & b,
        Por_mm_mmm64 ld64 |a: u128, b: u128| a | b, Pxor_mm_mmm64 ld64 |a: u128, b: u128| a ^ b,
        Paddb_mm_mmm64 ld64 host::paddb, Paddw_mm_mmm64 ld64 host::paddw,
        Paddd_mm_mmm64 ld64 host::paddd, Paddq_mm_mmm64 ld64 host::paddq,
        Psubb_mm_mmm64 ld64 host::psubb, Psubw_mm_mmm64 ld64 host::psubw,
        Psubd_mm_mmm64 ld64 host::psubd, Psubq_mm_mmm64 ld64 host::psubq,
        Paddsb_mm_mmm64 ld64 host::paddsb, Paddsw_mm_mmm64 ld64 host::paddsw,
        Paddusb_mm_mmm64 ld64 host::paddusb, Paddusw_mm_mmm64 ld64 host::paddusw,
        Psubsb_mm_mmm64 ld64 host::psubsb, Psubsw_mm_mmm64 ld64 host::psubsw,
        Psubusb_mm_mmm64 ld64 host::psubusb, Psubusw_mm_mmm64 ld64 host::psubusw,
        Pcmpeqb_mm_mmm64 ld64 host::pcmpeqb, Pcmpeqw_mm_mmm64 ld64 host::pcmpeqw, Pcmpeqd_mm_mmm64 ld64 host::pcmpeqd,
        Pcmpgtb_mm_mmm64 ld64 host::pcmpgtb, Pcmpgtw_mm_mmm64 ld64 host::pcmpgtw, Pcmpgtd_mm_mmm64 ld64 host::pcmpgtd,
        Pmullw_mm_mmm64 ld64 host::pmullw, Pmulhw_mm_mmm64 ld64 host::pmulhw, Pmulhuw_mm_mmm64 ld64 host::pmulhuw,
        Pmuludq_mm_mmm64 ld64 host::pmuludq, Pmaddwd_mm_mmm64 ld64 host::pmaddwd, Psadbw_mm_mmm64 ld64 host::psadbw,
        Pavgb_mm_mmm64 ld64 host::pavgb, Pavgw_mm_mmm64 ld64 host::pavgw,
        Pminub_mm_mmm64 ld64 host::pminub, Pmaxub_mm_mmm64 ld64 host::pmaxub,
        Pminsw_mm_mmm64 ld64 host::pminsw, Pmaxsw_mm_mmm64 ld64 host::pmaxsw,
        Psrlw_mm_mmm64 ld64 host::psrlw, Psrld_mm_mmm64 ld64 host::psrld, Psrlq_mm_mmm64 ld64 host::psrlq,
        Psraw_mm_mmm64 ld64 host::psraw, Psrad_mm_mmm64 ld64 host::psrad,
        Psllw_mm_mmm64 ld64 host::psllw, Pslld_mm_mmm64 ld64 host::pslld, Psllq_mm_mmm64 ld64 host::psllq,
        Punpcklbw_mm_mmm32 ld32 host::punpcklbw, Punpcklwd_mm_mmm32 ld32 host::punpcklwd,
        Punpckldq_mm_mmm32 ld32 host::punpckldq,
        Punpckhbw_mm_mmm64 ld64 |a, b| host::punpcklbw(a, b) >> 64, Punpckhwd_mm_mmm64 ld64 |a, b| host::punpcklwd(a, b) >> 64,
        Punpckhdq_mm_mmm64 ld64 |a, b| host::punpckldq(a, b) >> 64,
        Packsswb_mm_mmm64 ld64 |a, b| host::packsswb(join(a, b), 0), Packssdw_mm_mmm64 ld64 |a, b| host::packssdw(join(a, b), 0),
        Packuswb_mm_mmm64 ld64 |a, b| host::packuswb(join(a, b), 0),
        Pshufb_mm_mmm64 ld64 |a, b| host::pshufb(a, b & 0x8787_8787_8787_8787),
        Phaddw_mm_mmm64 ld64 |a, b| host::phaddw(join(a, b), 0), Phaddd_mm_mmm64 ld64 |a, b| host::phaddd(join(a, b), 0),
        Phaddsw_mm_mmm64 ld64 |a, b| host::phaddsw(join(a, b), 0), Phsubw_mm_mmm64 ld64 |a, b| host::phsubw(join(a, b), 0),
        Phsubd_mm_mmm64 ld64 |a, b| host::phsubd(join(a, b), 0), Phsubsw_mm_mmm64 ld64 |a, b| host::phsubsw(join(a, b), 0),
        Pmaddubsw_mm_mmm64 ld64 host::pmaddubsw, Pmulhrsw_mm_mmm64 ld64 host::pmulhrsw,
        Psignb_mm_mmm64 ld64 host::psignb, Psignw_mm_mmm64 ld64 host::psignw, Psignd_mm_mmm64 ld64 host::psignd,
        Pabsb_mm_mmm64 ld64 host::pabsb, Pabsw_mm_mmm64 ld64 host::pabsw, Pabsd_mm_mmm64 ld64 host::pabsd,
    };
    found.or_else(|| {
        Some(match code {
            Psrlw_mm_imm8 => shift!(host::psrlw),
            Psrld_mm_imm8 => shift!(host::psrld),
            Psrlq_mm_imm8 => shift!(host::psrlq),
            Psraw_mm_imm8 => shift!(host::psraw),
            Psrad_mm_imm8 => shift!(host::psrad),
            Psllw_mm_imm8 => shift!(host::psllw),
            Pslld_mm_imm8 => shift!(host::pslld),
            Psllq_mm_imm8 => shift!(host::psllq),
            Pshufw_mm_mmm64_imm8 => two_imm!(mem, |_: u128, b: u128, imm: u64| sse_lane::pshuflw(b, imm)),
            Palignr_mm_mmm64_imm8 => two_imm!(mem, palignr),
            Pinsrw_mm_r32m16_imm8 | Pinsrw_mm_r64m16_imm8 if mem => m!(|c, i| {
                let b = sse::ld16(c, i)? as u128;
                let a = get(c, i, 0) as u128;
                set(c, i, pinsrw(a, b, i.imm) as u64);
            }),
            Pinsrw_mm_r32m16_imm8 | Pinsrw_mm_r64m16_imm8 => m!(|c, i| {
                let (a, b) = (get(c, i, 0) as u128, c.cpu.gpr[sse::x(i, 1)] as u128);
                set(c, i, pinsrw(a, b, i.imm) as u64);
            }),
            Pextrw_r32_mm_imm8 | Pextrw_r64_mm_imm8 => m!(|c, i| {
                c.cpu.gpr[sse::x(i, 0)] = get(c, i, 1) >> (16 * (i.imm & 3)) & 0xffff;
                touch(c);
            }),
            Pmovmskb_r32_mm | Pmovmskb_r64_mm => m!(|c, i| {
                c.cpu.gpr[sse::x(i, 0)] = host::pmovmskb(get(c, i, 1) as u128 & LOW64) as u64;
                touch(c);
            }),
            Movd_mm_rm32 if mem => m!(|c, i| {
                let v = ld32(c, i)?;
                set(c, i, v as u64);
            }),
            Movd_mm_rm32 => m!(|c, i| set(c, i, c.cpu.gpr[sse::x(i, 1)] as u32 as u64)),
            Movq_mm_rm64 | Movq_mm_mmm64 if mem => m!(|c, i| {
                let v = ld64(c, i)?;
                set(c, i, v);
            }),
            Movq_mm_rm64 => m!(|c, i| set(c, i, c.cpu.gpr[sse::x(i, 1)])),
            Movq_mm_mmm64 | Movq_mmm64_mm if !mem => m!(|c, i| set(c, i, get(c, i, 1))),
            Movd_rm32_mm if mem => m!(|c, i| {
                st32(c, i, get(c, i, 1) as u32)?;
                touch(c);
            }),
            Movd_rm32_mm => m!(|c, i| {
                c.cpu.gpr[sse::x(i, 0)] = get(c, i, 1) as u32 as u64;
                touch(c);
            }),
            Movq_rm64_mm | Movq_mmm64_mm | Movntq_m64_mm if mem => m!(|c, i| {
                st64(c, i, get(c, i, 1))?;
                touch(c);
            }),
            Movq_rm64_mm => m!(|c, i| {
                c.cpu.gpr[sse::x(i, 0)] = get(c, i, 1);
                touch(c);
            }),
            Maskmovq_rDI_mm_mm => m!(|c, i| {
                // On this one and on conversions the x87 state changes also when they fault, as on AMD.
                touch(c);
                let (v, m) = (get(c, i, 1), get(c, i, 2));
                sse::store_masked(c, i, v.into(), host::pmovmskb(m.into()), 8)?;
            }),
            Emms => m!(|c, _i| {
                touch(c);
                c.cpu.fpu.ftw = 0;
            }),
            _ => return None,
        })
    })
}
