//! SSE floating-point arithmetic and compares.

use iced_x86::{Code, Instruction, OpKind};

use super::host::sse as host;
use super::sse::{MXCSR_MASK, float, h, ld32, ld64, ld128, never, x};
use super::sse_exact as exact;
use crate::core::Core;
use crate::insn::{Fault, Handler, Insn};
use crate::state::flags;

/// Runs `$op` at once where all exceptions are masked. The other way reads operands and writes the result for itself: kept apart
/// like this, the common one has them in vector registers.
macro_rules! masked {
    ($c:ident, |$m:ident| $op:expr, else $other:expr) => {
        if $crate::exec::sse::masked($c) {
            let mut csr = $c.cpu.mxcsr & $crate::exec::sse::MXCSR_MASK;
            let $m = &mut csr;
            let r = $op;
            $c.cpu.mxcsr = csr;
            r
        } else {
            $other
        }
    };
}
pub(super) use masked;

#[cold]
#[inline(never)]
pub fn unmasked(
    c: &mut Core,
    d: usize,
    b: u128,
    op: fn(u128, u128, &mut u32) -> u128,
    judge: exact::Judge,
) -> Result<u128, Fault> {
    let a = c.cpu.xmm[d];
    float(c, |m| op(a, b, m), |r, csr| judge(a, b, r, csr))
}

#[cold]
#[inline(never)]
pub fn unmasked_registers(
    c: &mut Core,
    d: usize,
    s: usize,
    op: fn(u128, u128, &mut u32) -> u128,
    judge: exact::Judge,
) -> Result<u128, Fault> {
    unmasked(c, d, c.cpu.xmm[s], op, judge)
}

/// `xmm op= xmm/m` with the memory operand read by `$ld`.
macro_rules! arith {
    ($mem:expr, $ld:ident, $op:path, $judge:path) => {
        if $mem {
            h!(|c, i| {
                let (d, b) = (x(i, 0), $ld(c, i)? as u128);
                masked!(c, |m| c.cpu.xmm[d] = $op(c.cpu.xmm[d], b, m), else c.cpu.xmm[d] = unmasked(c, d, b, $op, $judge)?);
            })
        } else {
            h!(|c, i| {
                let (d, s) = (x(i, 0), x(i, 1));
                masked!(c, |m| c.cpu.xmm[d] = $op(c.cpu.xmm[d], c.cpu.xmm[s], m),
                    else c.cpu.xmm[d] = unmasked_registers(c, d, s, $op, $judge)?);
            })
        }
    };
}
pub(super) use arith;

/// Operations that have no exceptions and do not read MXCSR.
macro_rules! plain {
    ($mem:expr, $ld:ident, $op:path) => {
        if $mem {
            h!(|c, i| {
                let (a, b) = (c.cpu.xmm[x(i, 0)], $ld(c, i)? as u128);
                c.cpu.xmm[x(i, 0)] = $op(a, b, &mut (c.cpu.mxcsr & MXCSR_MASK | 0x1f80));
            })
        } else {
            h!(|c, i| {
                let (a, b) = (c.cpu.xmm[x(i, 0)], c.cpu.xmm[x(i, 1)]);
                c.cpu.xmm[x(i, 0)] = $op(a, b, &mut (c.cpu.mxcsr & MXCSR_MASK | 0x1f80));
            })
        }
    };
}

macro_rules! compare {
    ($mem:expr, $ld:ident, $op:path) => {
        if $mem {
            h!(|c, i| {
                let (d, b) = (x(i, 0), $ld(c, i)? as u128);
                let r = masked!(c, |m| $op(c.cpu.xmm[d], b, m), else {
                    let a = c.cpu.xmm[d];
                    float(c, |m| $op(a, b, m), never)?
                });
                set_flags(c, r);
            })
        } else {
            h!(|c, i| {
                let (d, s) = (x(i, 0), x(i, 1));
                let r = masked!(c, |m| $op(c.cpu.xmm[d], c.cpu.xmm[s], m), else {
                    let (a, b) = (c.cpu.xmm[d], c.cpu.xmm[s]);
                    float(c, |m| $op(a, b, m), never)?
                });
                set_flags(c, r);
            })
        }
    };
}

/// What (U)COMISx leaves: ZF PF CF as compared, the others clear.
pub fn set_flags(c: &mut Core, (z, p, cf): (bool, bool, bool)) {
    let on = |b: bool, f: u64| if b { f } else { 0 };
    c.cpu.set_arith(on(z, flags::ZF) | on(p, flags::PF) | on(cf, flags::CF));
}

/// CMPxx: one handler per predicate, chosen when decoding; only the low three bits count.
macro_rules! predicates {
    ($i:expr, $mem:expr, $ld:ident, $($op:path),*) => {{
        let all: [Handler; 8] = [$(arith!($mem, $ld, $op, exact::none)),*];
        all[($i.immediate8() & 7) as usize]
    }};
}

/// ROUNDxx: immediate bit 2 takes the mode from MXCSR, bit 3 keeps the precision flag out.
fn round(c: &mut Core, i: &Insn, b: u128, op: fn(u128, u128, &mut u32) -> u128) -> Result<(), Fault> {
    const RC: u32 = 3 << 13;
    const PE: u32 = 1 << 5;
    const PM: u32 = 1 << 12;
    let a = c.cpu.xmm[x(i, 0)];
    let imm = i.imm as u32;
    let before = c.cpu.mxcsr;
    if imm & 8 != 0 {
        c.cpu.mxcsr |= PM; // so that an unmasked one does not trap either
    }
    let r = float(
        c,
        |m| {
            let rc = *m & RC;
            if imm & 4 == 0 {
                *m = *m & !RC | (imm & 3) << 13;
            }
            let r = op(a, b, m);
            *m = *m & !RC | rc;
            r
        },
        never,
    );
    if imm & 8 != 0 {
        c.cpu.mxcsr = c.cpu.mxcsr & !(PE | PM) | before & (PE | PM);
    }
    c.cpu.xmm[x(i, 0)] = r?;
    Ok(())
}

macro_rules! rounds {
    ($mem:expr, $ld:ident, $op:path) => {
        if $mem {
            h!(|c, i| {
                let b = $ld(c, i)? as u128;
                round(c, i, b, $op)?;
            })
        } else {
            h!(|c, i| {
                let b = c.cpu.xmm[x(i, 1)];
                round(c, i, b, $op)?;
            })
        }
    };
}

/// DPPS/DPPD: elements that the high immediate bits leave out count as +0; the low bits say which results are stored.
fn dot(c: &mut Core, i: &Insn, b: u128, single: bool) -> Result<(), Fault> {
    let a = c.cpu.xmm[x(i, 0)];
    let keep = |bits: u64| {
        let (width, lanes) = if single { (32, 4) } else { (64, 2) };
        (0..lanes).filter(|n| bits >> n & 1 != 0).fold(0u128, |m, n| m | ((1u128 << width) - 1) << (n * width))
    };
    let (a, b) = (a & keep(i.imm >> 4), b & keep(i.imm >> 4));
    let r = if c.cpu.mxcsr & 0x1f80 == 0x1f80 {
        if single { float(c, |m| host::dpps(a, b, m), never)? } else { float(c, |m| host::dppd(a, b, m), never)? }
    } else if single {
        // With exceptions that count: multiply, then add pairs, each with its own.
        let products = float(c, |m| host::mulps(a, b, m), |r, csr| exact::mul_ps(a, b, r, csr))?;
        let pairs = float(c, |m| host::haddps(products, products, m), |r, csr| exact::hadd_ps(products, products, r, csr))?;
        float(c, |m| host::haddps(pairs, pairs, m), |r, csr| exact::hadd_ps(pairs, pairs, r, csr))?
    } else {
        let products = float(c, |m| host::mulpd(a, b, m), |r, csr| exact::mul_pd(a, b, r, csr))?;
        float(c, |m| host::haddpd(products, products, m), |r, csr| exact::hadd_pd(products, products, r, csr))?
    };
    c.cpu.xmm[x(i, 0)] = r & keep(i.imm);
    Ok(())
}

macro_rules! dots {
    ($mem:expr, $single:literal) => {
        if $mem {
            h!(|c, i| {
                let b = ld128(c, i)?;
                dot(c, i, b, $single)?;
            })
        } else {
            h!(|c, i| dot(c, i, c.cpu.xmm[x(i, 1)], $single)?)
        }
    };
}

macro_rules! table {
    ($code:expr, $mem:expr; $($name:ident $ld:ident $op:ident $judge:ident,)*) => {
        match $code {
            $(Code::$name => Some(arith!($mem, $ld, host::$op, exact::$judge)),)*
            _ => None,
        }
    };
}

pub fn select(i: &Instruction) -> Option<Handler> {
    let mem = (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Memory);
    let code = i.code();
    let found = table! { code, mem;
        Addps_xmm_xmmm128 ld128 addps add_ps, Addpd_xmm_xmmm128 ld128 addpd add_pd,
        Addss_xmm_xmmm32 ld32 addss add_ss, Addsd_xmm_xmmm64 ld64 addsd add_sd,
        Subps_xmm_xmmm128 ld128 subps sub_ps, Subpd_xmm_xmmm128 ld128 subpd sub_pd,
        Subss_xmm_xmmm32 ld32 subss sub_ss, Subsd_xmm_xmmm64 ld64 subsd sub_sd,
        Mulps_xmm_xmmm128 ld128 mulps mul_ps, Mulpd_xmm_xmmm128 ld128 mulpd mul_pd,
        Mulss_xmm_xmmm32 ld32 mulss mul_ss, Mulsd_xmm_xmmm64 ld64 mulsd mul_sd,
        Divps_xmm_xmmm128 ld128 divps div_ps, Divpd_xmm_xmmm128 ld128 divpd div_pd,
        Divss_xmm_xmmm32 ld32 divss div_ss, Divsd_xmm_xmmm64 ld64 divsd div_sd,
        Minps_xmm_xmmm128 ld128 minps none, Minpd_xmm_xmmm128 ld128 minpd none,
        Minss_xmm_xmmm32 ld32 minss none, Minsd_xmm_xmmm64 ld64 minsd none,
        Maxps_xmm_xmmm128 ld128 maxps none, Maxpd_xmm_xmmm128 ld128 maxpd none,
        Maxss_xmm_xmmm32 ld32 maxss none, Maxsd_xmm_xmmm64 ld64 maxsd none,
        Sqrtps_xmm_xmmm128 ld128 sqrtps none, Sqrtpd_xmm_xmmm128 ld128 sqrtpd none,
        Sqrtss_xmm_xmmm32 ld32 sqrtss none, Sqrtsd_xmm_xmmm64 ld64 sqrtsd none,
        Haddps_xmm_xmmm128 ld128 haddps hadd_ps, Haddpd_xmm_xmmm128 ld128 haddpd hadd_pd,
        Hsubps_xmm_xmmm128 ld128 hsubps hsub_ps, Hsubpd_xmm_xmmm128 ld128 hsubpd hsub_pd,
        Addsubps_xmm_xmmm128 ld128 addsubps addsub_ps, Addsubpd_xmm_xmmm128 ld128 addsubpd addsub_pd,
    };
    found.or_else(|| {
        Some(match code {
            Code::Rcpps_xmm_xmmm128 => plain!(mem, ld128, host::rcpps),
            Code::Rcpss_xmm_xmmm32 => plain!(mem, ld32, host::rcpss),
            Code::Rsqrtps_xmm_xmmm128 => plain!(mem, ld128, host::rsqrtps),
            Code::Rsqrtss_xmm_xmmm32 => plain!(mem, ld32, host::rsqrtss),
            Code::Comiss_xmm_xmmm32 => compare!(mem, ld32, host::comiss),
            Code::Ucomiss_xmm_xmmm32 => compare!(mem, ld32, host::ucomiss),
            Code::Comisd_xmm_xmmm64 => compare!(mem, ld64, host::comisd),
            Code::Ucomisd_xmm_xmmm64 => compare!(mem, ld64, host::ucomisd),
            Code::Cmpps_xmm_xmmm128_imm8 => predicates!(
                i,
                mem,
                ld128,
                host::cmpps0,
                host::cmpps1,
                host::cmpps2,
                host::cmpps3,
                host::cmpps4,
                host::cmpps5,
                host::cmpps6,
                host::cmpps7
            ),
            Code::Cmppd_xmm_xmmm128_imm8 => predicates!(
                i,
                mem,
                ld128,
                host::cmppd0,
                host::cmppd1,
                host::cmppd2,
                host::cmppd3,
                host::cmppd4,
                host::cmppd5,
                host::cmppd6,
                host::cmppd7
            ),
            Code::Cmpss_xmm_xmmm32_imm8 => predicates!(
                i,
                mem,
                ld32,
                host::cmpss0,
                host::cmpss1,
                host::cmpss2,
                host::cmpss3,
                host::cmpss4,
                host::cmpss5,
                host::cmpss6,
                host::cmpss7
            ),
            Code::Cmpsd_xmm_xmmm64_imm8 => predicates!(
                i,
                mem,
                ld64,
                host::cmpsd0,
                host::cmpsd1,
                host::cmpsd2,
                host::cmpsd3,
                host::cmpsd4,
                host::cmpsd5,
                host::cmpsd6,
                host::cmpsd7
            ),
            Code::Roundps_xmm_xmmm128_imm8 => rounds!(mem, ld128, host::roundps),
            Code::Roundpd_xmm_xmmm128_imm8 => rounds!(mem, ld128, host::roundpd),
            Code::Roundss_xmm_xmmm32_imm8 => rounds!(mem, ld32, host::roundss),
            Code::Roundsd_xmm_xmmm64_imm8 => rounds!(mem, ld64, host::roundsd),
            Code::Dpps_xmm_xmmm128_imm8 => dots!(mem, true),
            Code::Dppd_xmm_xmmm128_imm8 => dots!(mem, false),
            _ => return None,
        })
    })
}
