//! SSE conversions between integers, singles and doubles, those with MMX registers included.

use iced_x86::{Code, Instruction, OpKind};

use super::host::sse as host;
use super::mmx;
use super::sse::{float, h, ld32, ld64, ld128, never, x};
use super::sse_exact as exact;
use super::sse_float::{arith, masked, unmasked, unmasked_registers};
use crate::insn::Handler;

/// GPR = cvt(xmm/m).
macro_rules! to_gpr {
    ($mem:expr, $ld:ident, $op:path) => {
        if $mem {
            h!(|c, i| {
                let b = $ld(c, i)? as u128;
                c.cpu.gpr[x(i, 0)] = float(c, |m| $op(b, m), never)? as u64;
            })
        } else {
            h!(|c, i| {
                let s = x(i, 1);
                c.cpu.gpr[x(i, 0)] = masked!(c, |m| $op(c.cpu.xmm[s], m), else {
                    let b = c.cpu.xmm[s];
                    float(c, |m| $op(b, m), never)?
                }) as u64;
            })
        }
    };
}

/// xmm = cvt(GPR/m).
macro_rules! from_gpr {
    ($mem:expr, $ld:ident, $ty:ty, $op:path) => {
        if $mem {
            h!(|c, i| {
                let (d, b) = (x(i, 0), $ld(c, i)?);
                masked!(c, |m| c.cpu.xmm[d] = $op(c.cpu.xmm[d], b, m), else {
                    let a = c.cpu.xmm[d];
                    c.cpu.xmm[d] = float(c, |m| $op(a, b, m), never)?;
                });
            })
        } else {
            h!(|c, i| {
                let (d, b) = (x(i, 0), c.cpu.gpr[x(i, 1)] as $ty);
                masked!(c, |m| c.cpu.xmm[d] = $op(c.cpu.xmm[d], b, m), else {
                    let a = c.cpu.xmm[d];
                    c.cpu.xmm[d] = float(c, |m| $op(a, b, m), never)?;
                });
            })
        }
    };
}

/// MMX register = cvt(xmm/m), through the two low lanes of the 128-bit form; lanes that the instruction does not have are zero.
macro_rules! to_mm {
    ($mem:expr, $ld:ident, $mask:expr, $op:path) => {
        if $mem {
            h!(|c, i| {
                mmx::pending(c)?;
                let b = $ld(c, i)? as u128;
                mmx::touch(c);
                let r = float(c, |m| $op(0, b, m), never)?;
                mmx::set(c, i, r as u64);
            })
        } else {
            h!(|c, i| {
                mmx::pending(c)?;
                let b = c.cpu.xmm[x(i, 1)] & $mask;
                mmx::touch(c);
                let r = float(c, |m| $op(0, b, m), never)?;
                mmx::set(c, i, r as u64);
            })
        }
    };
}

const LOW64: u128 = u64::MAX as u128;

pub fn select(i: &Instruction) -> Option<Handler> {
    use Code::*;
    let mem = (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Memory);
    Some(match i.code() {
        Cvtsi2ss_xmm_rm32 => from_gpr!(mem, ld32, u32, host::cvtsi2ss32),
        Cvtsi2ss_xmm_rm64 => from_gpr!(mem, ld64, u64, host::cvtsi2ss64),
        Cvtsi2sd_xmm_rm32 => from_gpr!(mem, ld32, u32, host::cvtsi2sd32),
        Cvtsi2sd_xmm_rm64 => from_gpr!(mem, ld64, u64, host::cvtsi2sd64),
        Cvtss2si_r32_xmmm32 => to_gpr!(mem, ld32, host::cvtss2si32),
        Cvtss2si_r64_xmmm32 => to_gpr!(mem, ld32, host::cvtss2si64),
        Cvttss2si_r32_xmmm32 => to_gpr!(mem, ld32, host::cvttss2si32),
        Cvttss2si_r64_xmmm32 => to_gpr!(mem, ld32, host::cvttss2si64),
        Cvtsd2si_r32_xmmm64 => to_gpr!(mem, ld64, host::cvtsd2si32),
        Cvtsd2si_r64_xmmm64 => to_gpr!(mem, ld64, host::cvtsd2si64),
        Cvttsd2si_r32_xmmm64 => to_gpr!(mem, ld64, host::cvttsd2si32),
        Cvttsd2si_r64_xmmm64 => to_gpr!(mem, ld64, host::cvttsd2si64),
        Cvtss2sd_xmm_xmmm32 => arith!(mem, ld32, host::cvtss2sd, exact::none),
        Cvtsd2ss_xmm_xmmm64 => arith!(mem, ld64, host::cvtsd2ss, exact::narrow_sd),
        Cvtps2pd_xmm_xmmm64 => arith!(mem, ld64, host::cvtps2pd, exact::none),
        Cvtpd2ps_xmm_xmmm128 => arith!(mem, ld128, host::cvtpd2ps, exact::narrow_pd),
        Cvtdq2ps_xmm_xmmm128 => arith!(mem, ld128, host::cvtdq2ps, exact::none),
        Cvtdq2pd_xmm_xmmm64 => arith!(mem, ld64, host::cvtdq2pd, exact::none),
        Cvtps2dq_xmm_xmmm128 => arith!(mem, ld128, host::cvtps2dq, exact::none),
        Cvttps2dq_xmm_xmmm128 => arith!(mem, ld128, host::cvttps2dq, exact::none),
        Cvtpd2dq_xmm_xmmm128 => arith!(mem, ld128, host::cvtpd2dq, exact::none),
        Cvttpd2dq_xmm_xmmm128 => arith!(mem, ld128, host::cvttpd2dq, exact::none),

        Cvtps2pi_mm_xmmm64 => to_mm!(mem, ld64, LOW64, host::cvtps2dq),
        Cvttps2pi_mm_xmmm64 => to_mm!(mem, ld64, LOW64, host::cvttps2dq),
        Cvtpd2pi_mm_xmmm128 => to_mm!(mem, ld128, u128::MAX, host::cvtpd2dq),
        Cvttpd2pi_mm_xmmm128 => to_mm!(mem, ld128, u128::MAX, host::cvttpd2dq),
        // From memory these two leave the x87 state alone, also a pending exception.
        Cvtpi2ps_xmm_mmm64 if mem => h!(|c, i| {
            let b = ld64(c, i)? as u128;
            let r = float(c, |m| host::cvtdq2ps(0, b, m), never)?;
            let d = &mut c.cpu.xmm[x(i, 0)];
            *d = *d & !LOW64 | r & LOW64;
        }),
        Cvtpi2ps_xmm_mmm64 => h!(|c, i| {
            mmx::pending(c)?;
            let b = mmx::get(c, i, 1) as u128;
            mmx::touch(c);
            let r = float(c, |m| host::cvtdq2ps(0, b, m), never)?;
            let d = &mut c.cpu.xmm[x(i, 0)];
            *d = *d & !LOW64 | r & LOW64;
        }),
        Cvtpi2pd_xmm_mmm64 if mem => h!(|c, i| {
            let b = ld64(c, i)? as u128;
            c.cpu.xmm[x(i, 0)] = float(c, |m| host::cvtdq2pd(0, b, m), never)?;
        }),
        Cvtpi2pd_xmm_mmm64 => h!(|c, i| {
            mmx::pending(c)?;
            let b = mmx::get(c, i, 1) as u128;
            c.cpu.xmm[x(i, 0)] = float(c, |m| host::cvtdq2pd(0, b, m), never)?;
            mmx::touch(c);
        }),
        Movq2dq_xmm_mm => h!(|c, i| {
            mmx::pending(c)?;
            c.cpu.xmm[x(i, 0)] = mmx::get(c, i, 1) as u128;
            mmx::touch(c);
        }),
        Movdq2q_mm_xmm => h!(|c, i| {
            mmx::pending(c)?;
            mmx::set(c, i, c.cpu.xmm[x(i, 1)] as u64);
        }),
        _ => return None,
    })
}
