//! What an *unmasked* overflow or underflow of an SSE operation reports, which a masked run does not tell: underflow counts also
//! where the tiny result is exact, and the precision flag belongs to the result with an unbounded exponent. The x87 unit knows
//! the latter: same precision, much wider exponents.

use super::host::x87;
use crate::state::F80;

type Op = fn(u16, &F80, &F80) -> (F80, u16);

/// (a result is subnormal, a result is inexact with an unbounded exponent) of operation on `a`, `b` with result `r`.
pub type Judge = fn(a: u128, b: u128, r: &u128, csr: u32) -> (bool, bool);

const DAZ: u32 = 1 << 6;
const PE: u16 = 1 << 5;

trait Width {
    const BITS: u32;
    const FRACTION: u32;
    /// Precision control of the x87 control word.
    const PRECISION: u16;
    fn load(raw: u64) -> F80;

    fn raw(v: u128, n: u32) -> u64 {
        (v >> (n * Self::BITS)) as u64 & (u64::MAX >> (64 - Self::BITS))
    }
    fn tiny(raw: u64) -> bool {
        let magnitude = raw << (65 - Self::BITS);
        magnitude != 0 && magnitude >> (65 - Self::BITS) >> Self::FRACTION == 0
    }
    fn lane(v: u128, n: u32, csr: u32) -> F80 {
        let raw = Self::raw(v, n);
        if csr & DAZ != 0 && Self::tiny(raw) { F80::default() } else { Self::load(raw) }
    }
}

struct Single;
struct Double;

impl Width for Single {
    const BITS: u32 = 32;
    const FRACTION: u32 = 23;
    const PRECISION: u16 = 0;
    fn load(raw: u64) -> F80 {
        x87::fld_m32(0x37f, raw as u32).0
    }
}

impl Width for Double {
    const BITS: u32 = 64;
    const FRACTION: u32 = 52;
    const PRECISION: u16 = 0x200;
    fn load(raw: u64) -> F80 {
        x87::fld_m64(0x37f, raw).0
    }
}

fn inexact<W: Width>(op: Op, a: F80, b: F80, csr: u32) -> bool {
    let cw = 0x7f | W::PRECISION | ((csr >> 13 & 3) as u16) << 10;
    op(cw, &a, &b).1 & PE != 0
}

fn tiny<W: Width>(r: u128, lanes: u32) -> bool {
    (0..lanes).any(|n| W::tiny(W::raw(r, n)))
}

/// Lane by lane.
fn vertical<W: Width>(op: Op, lanes: u32, a: u128, b: u128, r: u128, csr: u32) -> (bool, bool) {
    (tiny::<W>(r, lanes), (0..lanes).any(|n| inexact::<W>(op, W::lane(a, n, csr), W::lane(b, n, csr), csr)))
}

/// Neighbours of `a`, then of `b`.
fn horizontal<W: Width>(op: Op, a: u128, b: u128, r: u128, csr: u32) -> (bool, bool) {
    let lanes = 128 / W::BITS;
    let pairs = |v: u128| (0..lanes / 2).any(|n| inexact::<W>(op, W::lane(v, 2 * n, csr), W::lane(v, 2 * n + 1, csr), csr));
    (tiny::<W>(r, lanes), pairs(a) || pairs(b))
}

fn alternating<W: Width>(a: u128, b: u128, r: u128, csr: u32) -> (bool, bool) {
    let lanes = 128 / W::BITS;
    let one = |n: u32| {
        let op = if n & 1 == 0 { x87::fsub } else { x87::fadd };
        inexact::<W>(op, W::lane(a, n, csr), W::lane(b, n, csr), csr)
    };
    (tiny::<W>(r, lanes), (0..lanes).any(one))
}

/// Doubles to singles.
fn narrowing(lanes: u32, b: u128, r: u128, csr: u32) -> (bool, bool) {
    let one = |n| inexact::<Single>(x87::fadd, Double::lane(b, n, csr), F80::default(), csr);
    (tiny::<Single>(r, lanes), (0..lanes).any(one))
}

macro_rules! judges {
    ($($name:ident $body:expr;)*) => {$(
        pub fn $name(a: u128, b: u128, r: &u128, csr: u32) -> (bool, bool) {
            let judge: fn(u128, u128, u128, u32) -> (bool, bool) = $body;
            judge(a, b, *r, csr)
        }
    )*};
}

judges! {
    add_ps |a, b, r, csr| vertical::<Single>(x87::fadd, 4, a, b, r, csr);
    add_pd |a, b, r, csr| vertical::<Double>(x87::fadd, 2, a, b, r, csr);
    add_ss |a, b, r, csr| vertical::<Single>(x87::fadd, 1, a, b, r, csr);
    add_sd |a, b, r, csr| vertical::<Double>(x87::fadd, 1, a, b, r, csr);
    sub_ps |a, b, r, csr| vertical::<Single>(x87::fsub, 4, a, b, r, csr);
    sub_pd |a, b, r, csr| vertical::<Double>(x87::fsub, 2, a, b, r, csr);
    sub_ss |a, b, r, csr| vertical::<Single>(x87::fsub, 1, a, b, r, csr);
    sub_sd |a, b, r, csr| vertical::<Double>(x87::fsub, 1, a, b, r, csr);
    mul_ps |a, b, r, csr| vertical::<Single>(x87::fmul, 4, a, b, r, csr);
    mul_pd |a, b, r, csr| vertical::<Double>(x87::fmul, 2, a, b, r, csr);
    mul_ss |a, b, r, csr| vertical::<Single>(x87::fmul, 1, a, b, r, csr);
    mul_sd |a, b, r, csr| vertical::<Double>(x87::fmul, 1, a, b, r, csr);
    div_ps |a, b, r, csr| vertical::<Single>(x87::fdiv, 4, a, b, r, csr);
    div_pd |a, b, r, csr| vertical::<Double>(x87::fdiv, 2, a, b, r, csr);
    div_ss |a, b, r, csr| vertical::<Single>(x87::fdiv, 1, a, b, r, csr);
    div_sd |a, b, r, csr| vertical::<Double>(x87::fdiv, 1, a, b, r, csr);
    hadd_ps |a, b, r, csr| horizontal::<Single>(x87::fadd, a, b, r, csr);
    hadd_pd |a, b, r, csr| horizontal::<Double>(x87::fadd, a, b, r, csr);
    hsub_ps |a, b, r, csr| horizontal::<Single>(x87::fsub, a, b, r, csr);
    hsub_pd |a, b, r, csr| horizontal::<Double>(x87::fsub, a, b, r, csr);
    addsub_ps |a, b, r, csr| alternating::<Single>(a, b, r, csr);
    addsub_pd |a, b, r, csr| alternating::<Double>(a, b, r, csr);
    narrow_pd |_, b, r, csr| narrowing(2, b, r, csr);
    narrow_sd |_, b, r, csr| narrowing(1, b, r, csr);
    none |_, _, _, _| (false, false);
}
