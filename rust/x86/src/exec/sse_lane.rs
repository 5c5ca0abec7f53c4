//! SSE lane shuffles, inserts and blends that an immediate or XMM0 controls; PTEST.

use iced_x86::{Code, Instruction, OpKind};

use super::host::int as host;
use super::sse::{h, ld8, ld16, ld32, ld64, ld128, x};
use crate::insn::Handler;
use crate::state::flags;

/// PSHUFB control per immediate: which dwords (`WORD` = 4) or words of one half (`WORD` = 2, the other half kept).
const fn controls(word: usize, base: usize) -> [u128; 256] {
    let mut t = [0; 256];
    let mut imm = 0;
    while imm < 256 {
        let mut v = 0u128;
        let mut byte = 0;
        while byte < 16 {
            let from = if byte < base || byte >= base + 4 * word {
                byte
            } else {
                let lane = (byte - base) / word;
                base + (imm >> (2 * lane) & 3) * word + (byte - base) % word
            };
            v |= (from as u128) << (8 * byte);
            byte += 1;
        }
        t[imm] = v;
        imm += 1;
    }
    t
}

static DWORDS: [u128; 256] = controls(4, 0);
static LOW_WORDS: [u128; 256] = controls(2, 0);
static HIGH_WORDS: [u128; 256] = controls(2, 8);

#[inline(always)]
fn index(imm: u64) -> usize {
    (imm & 0xff) as usize
}

pub fn pshufd(v: u128, imm: u64) -> u128 {
    host::pshufb(v, DWORDS[index(imm)])
}
pub fn pshuflw(v: u128, imm: u64) -> u128 {
    host::pshufb(v, LOW_WORDS[index(imm)])
}
pub fn pshufhw(v: u128, imm: u64) -> u128 {
    host::pshufb(v, HIGH_WORDS[index(imm)])
}

pub fn shufps(a: u128, b: u128, imm: u64) -> u128 {
    host::punpcklqdq(pshufd(a, imm), pshufd(b, imm >> 4))
}

pub fn shufpd(a: u128, b: u128, imm: u64) -> u128 {
    let pick = |v: u128, bit: u64| (v >> (64 * (bit & 1))) as u64 as u128;
    pick(a, imm) | pick(b, imm >> 1) << 64
}

pub fn palignr(a: u128, b: u128, imm: u64) -> u128 {
    match 8 * index(imm) as u32 {
        0 => b,
        n @ ..128 => b >> n | a << (128 - n),
        n @ 128..256 => a >> (n - 128),
        _ => 0,
    }
}

/// A mask with `width`-bit lanes all ones where `imm` has a bit.
fn lanes(imm: u64, width: u32) -> u128 {
    let one = (1u128 << width) - 1;
    (0..128 / width).filter(|n| imm >> n & 1 != 0).fold(0, |m, n| m | one << (n * width))
}

fn blend(a: u128, b: u128, mask: u128) -> u128 {
    a & !mask | b & mask
}

pub fn insertps(a: u128, v: u32, imm: u64) -> u128 {
    put(a, v as u128, 32, imm >> 4 & 3) & !lanes(imm & 15, 32)
}

/// `v` (`width` bits) into lane `n`.
fn put(a: u128, v: u128, width: u32, n: u64) -> u128 {
    let at = n as u32 * width;
    let one = (1u128 << width) - 1;
    a & !(one << at) | (v & one) << at
}

pub fn mpsadbw(a: u128, b: u128, imm: u64) -> u128 {
    let (a, b) = (a.to_le_bytes(), b.to_le_bytes());
    let (ao, bo) = ((imm >> 2 & 1) as usize * 4, (imm & 3) as usize * 4);
    (0..8).fold(0, |r, n| {
        let sum: u16 = (0..4).map(|k| a[ao + n + k].abs_diff(b[bo + k]) as u16).sum();
        r | (sum as u128) << (16 * n)
    })
}

/// Spreads each lane's sign bit over the lane.
fn signs32(m: u128) -> u128 {
    host::psrad(m, 31)
}
fn signs64(m: u128) -> u128 {
    pshufd(host::psrad(m, 31), 0xf5)
}

/// `xmm = op(xmm/m128, imm)`.
macro_rules! one_imm {
    ($mem:expr, $op:path) => {
        if $mem {
            h!(|c, i| c.cpu.xmm[x(i, 0)] = $op(ld128(c, i)?, i.imm))
        } else {
            h!(|c, i| c.cpu.xmm[x(i, 0)] = $op(c.cpu.xmm[x(i, 1)], i.imm))
        }
    };
}

/// `xmm = op(xmm, xmm/m128, imm)`.
macro_rules! two_imm {
    ($mem:expr, $op:expr) => {
        if $mem {
            h!(|c, i| {
                let b = ld128(c, i)?;
                let d = &mut c.cpu.xmm[x(i, 0)];
                *d = $op(*d, b, i.imm);
            })
        } else {
            h!(|c, i| {
                let b = c.cpu.xmm[x(i, 1)];
                let d = &mut c.cpu.xmm[x(i, 0)];
                *d = $op(*d, b, i.imm);
            })
        }
    };
}

/// `xmm = op(xmm, xmm/m128, xmm0)`.
macro_rules! by_xmm0 {
    ($mem:expr, $op:expr) => {
        if $mem {
            h!(|c, i| {
                let (b, m) = (ld128(c, i)?, c.cpu.xmm[0]);
                let d = &mut c.cpu.xmm[x(i, 0)];
                *d = $op(*d, b, m);
            })
        } else {
            h!(|c, i| {
                let (b, m) = (c.cpu.xmm[x(i, 1)], c.cpu.xmm[0]);
                let d = &mut c.cpu.xmm[x(i, 0)];
                *d = $op(*d, b, m);
            })
        }
    };
}

macro_rules! insert {
    ($mem:expr, $ld:ident, $width:literal, $lanes:literal) => {
        if $mem {
            h!(|c, i| {
                let v = $ld(c, i)? as u128;
                let d = &mut c.cpu.xmm[x(i, 0)];
                *d = put(*d, v, $width, i.imm & $lanes);
            })
        } else {
            h!(|c, i| {
                let v = c.cpu.gpr[x(i, 1)] as u128;
                let d = &mut c.cpu.xmm[x(i, 0)];
                *d = put(*d, v, $width, i.imm & $lanes);
            })
        }
    };
}

fn ptest(c: &mut crate::core::Core, a: u128, b: u128) {
    let f = if a & b == 0 { flags::ZF } else { 0 } | if !a & b == 0 { flags::CF } else { 0 };
    c.cpu.set_arith(f);
}

pub fn select(i: &Instruction) -> Option<Handler> {
    use Code::*;
    let mem = (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Memory);
    Some(match i.code() {
        Pshufd_xmm_xmmm128_imm8 => one_imm!(mem, pshufd),
        Pshuflw_xmm_xmmm128_imm8 => one_imm!(mem, pshuflw),
        Pshufhw_xmm_xmmm128_imm8 => one_imm!(mem, pshufhw),
        Shufps_xmm_xmmm128_imm8 => two_imm!(mem, shufps),
        Shufpd_xmm_xmmm128_imm8 => two_imm!(mem, shufpd),
        Palignr_xmm_xmmm128_imm8 => two_imm!(mem, palignr),
        Mpsadbw_xmm_xmmm128_imm8 => two_imm!(mem, mpsadbw),
        Pblendw_xmm_xmmm128_imm8 => two_imm!(mem, |a, b, imm| blend(a, b, lanes(imm, 16))),
        Blendps_xmm_xmmm128_imm8 => two_imm!(mem, |a, b, imm| blend(a, b, lanes(imm & 15, 32))),
        Blendpd_xmm_xmmm128_imm8 => two_imm!(mem, |a, b, imm| blend(a, b, lanes(imm & 3, 64))),
        Pblendvb_xmm_xmmm128 => by_xmm0!(mem, host::select_bytes),
        Blendvps_xmm_xmmm128 => by_xmm0!(mem, |a, b, m| blend(a, b, signs32(m))),
        Blendvpd_xmm_xmmm128 => by_xmm0!(mem, |a, b, m| blend(a, b, signs64(m))),
        Pinsrb_xmm_r32m8_imm8 | Pinsrb_xmm_r64m8_imm8 => insert!(mem, ld8, 8, 15),
        Pinsrw_xmm_r32m16_imm8 | Pinsrw_xmm_r64m16_imm8 => insert!(mem, ld16, 16, 7),
        Pinsrd_xmm_rm32_imm8 => insert!(mem, ld32, 32, 3),
        Pinsrq_xmm_rm64_imm8 => insert!(mem, ld64, 64, 1),
        // From memory the source lane number is ignored.
        Insertps_xmm_xmmm32_imm8 if mem => h!(|c, i| {
            let v = ld32(c, i)?;
            let d = &mut c.cpu.xmm[x(i, 0)];
            *d = insertps(*d, v, i.imm);
        }),
        Insertps_xmm_xmmm32_imm8 => h!(|c, i| {
            let v = (c.cpu.xmm[x(i, 1)] >> (32 * (i.imm >> 6 & 3))) as u32;
            let d = &mut c.cpu.xmm[x(i, 0)];
            *d = insertps(*d, v, i.imm);
        }),
        Ptest_xmm_xmmm128 if mem => h!(|c, i| {
            let b = ld128(c, i)?;
            ptest(c, c.cpu.xmm[x(i, 0)], b);
        }),
        Ptest_xmm_xmmm128 => h!(|c, i| ptest(c, c.cpu.xmm[x(i, 0)], c.cpu.xmm[x(i, 1)])),
        _ => return None,
    })
}
