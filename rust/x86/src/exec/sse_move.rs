//! SSE moves.

use iced_x86::{Code, Instruction, OpKind};

use super::host::int as host;
use super::sse::{self, h, ld32, ld64, ld128, ld128u, st8, st16, st32, st64, st128, st128u, x};
use crate::core::Core;
use crate::insn::{Fault, Handler, Insn};

const LOW32: u128 = 0xffff_ffff;

/// GPR number of operand `n`.
#[inline(always)]
fn g(i: &Insn, n: usize) -> usize {
    (i.r[n] & 15) as usize
}

/// `xmm = op(xmm, xmm)`.
macro_rules! merge {
    ($op:path) => {
        h!(|c, i| c.cpu.xmm[x(i, 0)] = $op(c.cpu.xmm[x(i, 0)], c.cpu.xmm[x(i, 1)]))
    };
}

fn splat2_32(v: u128, odd: u32) -> u128 {
    let one = |n: u32| (v >> (64 * n + 32 * odd)) & LOW32;
    one(0) | one(0) << 32 | one(1) << 64 | one(1) << 96
}

pub fn select(i: &Instruction) -> Option<Handler> {
    use Code::*;
    let mem = (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Memory);
    Some(match i.code() {
        Movups_xmm_xmmm128 | Movupd_xmm_xmmm128 | Movdqu_xmm_xmmm128 | Lddqu_xmm_m128 if mem => {
            h!(|c, i| c.cpu.xmm[x(i, 0)] = ld128u(c, i)?)
        }
        Movaps_xmm_xmmm128 | Movapd_xmm_xmmm128 | Movdqa_xmm_xmmm128 | Movntdqa_xmm_m128 if mem => {
            h!(|c, i| c.cpu.xmm[x(i, 0)] = ld128(c, i)?)
        }
        Movups_xmmm128_xmm | Movupd_xmmm128_xmm | Movdqu_xmmm128_xmm if mem => {
            h!(|c, i| st128u(c, i, c.cpu.xmm[x(i, 1)])?)
        }
        Movaps_xmmm128_xmm | Movapd_xmmm128_xmm | Movdqa_xmmm128_xmm | Movntps_m128_xmm | Movntpd_m128_xmm | Movntdq_m128_xmm
            if mem =>
        {
            h!(|c, i| st128(c, i, c.cpu.xmm[x(i, 1)])?)
        }
        Movups_xmm_xmmm128 | Movupd_xmm_xmmm128 | Movdqu_xmm_xmmm128 | Movaps_xmm_xmmm128 | Movapd_xmm_xmmm128
        | Movdqa_xmm_xmmm128 | Movups_xmmm128_xmm | Movupd_xmmm128_xmm | Movdqu_xmmm128_xmm | Movaps_xmmm128_xmm
        | Movapd_xmmm128_xmm | Movdqa_xmmm128_xmm => h!(|c, i| c.cpu.xmm[x(i, 0)] = c.cpu.xmm[x(i, 1)]),

        Movss_xmm_xmmm32 if mem => h!(|c, i| c.cpu.xmm[x(i, 0)] = host::from32(ld32(c, i)?)),
        Movss_xmmm32_xmm if mem => h!(|c, i| st32(c, i, c.cpu.xmm[x(i, 1)] as u32)?),
        Movss_xmm_xmmm32 | Movss_xmmm32_xmm => merge!(host::movss),
        Movsd_xmm_xmmm64 | Movq_xmm_xmmm64 if mem => h!(|c, i| c.cpu.xmm[x(i, 0)] = host::from64(ld64(c, i)?)),
        Movsd_xmmm64_xmm | Movq_xmmm64_xmm | Movlps_m64_xmm | Movlpd_m64_xmm if mem => {
            h!(|c, i| st64(c, i, c.cpu.xmm[x(i, 1)] as u64)?)
        }
        Movsd_xmm_xmmm64 | Movsd_xmmm64_xmm => merge!(host::movsd),
        Movq_xmm_xmmm64 | Movq_xmmm64_xmm => h!(|c, i| c.cpu.xmm[x(i, 0)] = host::movq(0, c.cpu.xmm[x(i, 1)])),
        Movlps_xmm_m64 | Movlpd_xmm_m64 => h!(|c, i| {
            let v = host::from64(ld64(c, i)?);
            let d = &mut c.cpu.xmm[x(i, 0)];
            *d = host::movsd(*d, v);
        }),
        Movhps_xmm_m64 | Movhpd_xmm_m64 => h!(|c, i| {
            let v = host::from64(ld64(c, i)?);
            let d = &mut c.cpu.xmm[x(i, 0)];
            *d = host::movlhps(*d, v);
        }),
        Movhps_m64_xmm | Movhpd_m64_xmm => h!(|c, i| st64(c, i, (c.cpu.xmm[x(i, 1)] >> 64) as u64)?),
        Movhlps_xmm_xmm => merge!(host::movhlps),
        Movlhps_xmm_xmm => merge!(host::movlhps),
        Movddup_xmm_xmmm64 if mem => h!(|c, i| {
            let v = host::from64(ld64(c, i)?);
            c.cpu.xmm[x(i, 0)] = host::punpcklqdq(v, v);
        }),
        Movddup_xmm_xmmm64 => h!(|c, i| {
            let v = c.cpu.xmm[x(i, 1)];
            c.cpu.xmm[x(i, 0)] = host::punpcklqdq(v, v);
        }),
        Movsldup_xmm_xmmm128 if mem => h!(|c, i| c.cpu.xmm[x(i, 0)] = splat2_32(ld128(c, i)?, 0)),
        Movsldup_xmm_xmmm128 => h!(|c, i| c.cpu.xmm[x(i, 0)] = splat2_32(c.cpu.xmm[x(i, 1)], 0)),
        Movshdup_xmm_xmmm128 if mem => h!(|c, i| c.cpu.xmm[x(i, 0)] = splat2_32(ld128(c, i)?, 1)),
        Movshdup_xmm_xmmm128 => h!(|c, i| c.cpu.xmm[x(i, 0)] = splat2_32(c.cpu.xmm[x(i, 1)], 1)),

        Movd_xmm_rm32 if mem => h!(|c, i| c.cpu.xmm[x(i, 0)] = host::from32(ld32(c, i)?)),
        Movd_xmm_rm32 => h!(|c, i| c.cpu.xmm[x(i, 0)] = host::from32(c.cpu.gpr[g(i, 1)] as u32)),
        Movq_xmm_rm64 if mem => h!(|c, i| c.cpu.xmm[x(i, 0)] = host::from64(ld64(c, i)?)),
        Movq_xmm_rm64 => h!(|c, i| c.cpu.xmm[x(i, 0)] = host::from64(c.cpu.gpr[g(i, 1)])),
        Movd_rm32_xmm if mem => h!(|c, i| st32(c, i, c.cpu.xmm[x(i, 1)] as u32)?),
        Movd_rm32_xmm => h!(|c, i| c.cpu.gpr[g(i, 0)] = c.cpu.xmm[x(i, 1)] as u32 as u64),
        Movq_rm64_xmm if mem => h!(|c, i| st64(c, i, c.cpu.xmm[x(i, 1)] as u64)?),
        Movq_rm64_xmm => h!(|c, i| c.cpu.gpr[g(i, 0)] = c.cpu.xmm[x(i, 1)] as u64),

        Pmovmskb_r32_xmm | Pmovmskb_r64_xmm => h!(|c, i| c.cpu.gpr[g(i, 0)] = host::pmovmskb(c.cpu.xmm[x(i, 1)]) as u64),
        Movmskps_r32_xmm | Movmskps_r64_xmm => h!(|c, i| c.cpu.gpr[g(i, 0)] = host::movmskps(c.cpu.xmm[x(i, 1)]) as u64),
        Movmskpd_r32_xmm | Movmskpd_r64_xmm => h!(|c, i| c.cpu.gpr[g(i, 0)] = host::movmskpd(c.cpu.xmm[x(i, 1)]) as u64),
        Maskmovdqu_rDI_xmm_xmm => h!(|c, i| {
            let (v, m) = (c.cpu.xmm[x(i, 1)], host::pmovmskb(c.cpu.xmm[x(i, 2)]));
            sse::store_masked(c, i, v, m, 16)?;
        }),
        // Not an SSE-state instruction: no checks.
        Movnti_m32_r32 => {
            fn f(c: &mut Core, i: &Insn) -> Result<crate::insn::Flow, Fault> {
                st32(c, i, c.cpu.gpr[g(i, 1)] as u32)?;
                sse::NEXT
            }
            f
        }
        Movnti_m64_r64 => {
            fn f(c: &mut Core, i: &Insn) -> Result<crate::insn::Flow, Fault> {
                st64(c, i, c.cpu.gpr[g(i, 1)])?;
                sse::NEXT
            }
            f
        }

        Pextrb_r32m8_xmm_imm8 | Pextrb_r64m8_xmm_imm8 if mem => {
            h!(|c, i| st8(c, i, (c.cpu.xmm[x(i, 1)] >> (8 * (i.imm & 15))) as u8)?)
        }
        Pextrb_r32m8_xmm_imm8 | Pextrb_r64m8_xmm_imm8 => {
            h!(|c, i| c.cpu.gpr[g(i, 0)] = (c.cpu.xmm[x(i, 1)] >> (8 * (i.imm & 15))) as u8 as u64)
        }
        Pextrw_r32m16_xmm_imm8 | Pextrw_r64m16_xmm_imm8 if mem => {
            h!(|c, i| st16(c, i, (c.cpu.xmm[x(i, 1)] >> (16 * (i.imm & 7))) as u16)?)
        }
        Pextrw_r32m16_xmm_imm8 | Pextrw_r64m16_xmm_imm8 | Pextrw_r32_xmm_imm8 | Pextrw_r64_xmm_imm8 => {
            h!(|c, i| c.cpu.gpr[g(i, 0)] = (c.cpu.xmm[x(i, 1)] >> (16 * (i.imm & 7))) as u16 as u64)
        }
        Pextrd_rm32_xmm_imm8 | Extractps_rm32_xmm_imm8 | Extractps_r64m32_xmm_imm8 if mem => {
            h!(|c, i| st32(c, i, (c.cpu.xmm[x(i, 1)] >> (32 * (i.imm & 3))) as u32)?)
        }
        Pextrd_rm32_xmm_imm8 | Extractps_rm32_xmm_imm8 | Extractps_r64m32_xmm_imm8 => {
            h!(|c, i| c.cpu.gpr[g(i, 0)] = (c.cpu.xmm[x(i, 1)] >> (32 * (i.imm & 3))) as u32 as u64)
        }
        Pextrq_rm64_xmm_imm8 if mem => h!(|c, i| st64(c, i, (c.cpu.xmm[x(i, 1)] >> (64 * (i.imm & 1))) as u64)?),
        Pextrq_rm64_xmm_imm8 => h!(|c, i| c.cpu.gpr[g(i, 0)] = (c.cpu.xmm[x(i, 1)] >> (64 * (i.imm & 1))) as u64),
        _ => return None,
    })
}
