//! x87 loads, stores, exchanges and constants.

use iced_x86::{Code, Instruction};

use super::fpu::{
    self, C1, INDEFINITE, NO_STORE, blocked, empty, fm, fr, free, get, pop, push, rotate, set, stack_fault, status,
};
use super::fpu_arith::st;
use super::host::x87 as host;
use crate::core::Core;
use crate::insn::{Fault, Handler};
use crate::state::{F80, Fpu};

const ONE: F80 = F80 { mantissa: 1 << 63, sign_exp: 0x3fff };
const ZERO: F80 = F80 { mantissa: 0, sign_exp: 0 };

/// An integer, exact.
pub fn from_int(v: i64) -> F80 {
    if v == 0 {
        return ZERO;
    }
    let m = v.unsigned_abs();
    let shift = m.leading_zeros();
    F80 { mantissa: m << shift, sign_exp: (0x3fff + 63 - shift as u16) | if v < 0 { 0x8000 } else { 0 } }
}

/// A double that needs no care (normal or zero): exact, no exception.
#[inline(always)]
fn from_double(v: u64) -> Option<F80> {
    let sign = (v >> 48) as u16 & 0x8000;
    match (v >> 52 & 0x7ff, v << 12) {
        (0, 0) => Some(F80 { mantissa: 0, sign_exp: sign }),
        (0 | 0x7ff, _) => None,
        (exp, fraction) => Some(F80 { mantissa: 1 << 63 | fraction >> 1, sign_exp: sign | (exp as u16 + 0x3c00) }),
    }
}

/// The way back, for values that a double holds exactly as a normal number.
#[inline(always)]
fn to_double(v: &F80) -> Option<u64> {
    let exp = (v.sign_exp & 0x7fff).wrapping_sub(0x3c00);
    let fits = v.mantissa >> 63 == 1 && v.mantissa & 0x7ff == 0 && exp.wrapping_sub(1) < 0x7fe;
    fits.then(|| u64::from(v.sign_exp >> 15) << 63 | u64::from(exp) << 52 | v.mantissa << 1 >> 12)
}

fn load_double(cw: u16, v: u64) -> (F80, u16) {
    match from_double(v) {
        Some(v) => (v, 7 << 11),
        None => host::fld_m64(cw, v),
    }
}

fn store_double(cw: u16, v: &F80) -> (u64, u16) {
    match to_double(v) {
        Some(v) => (v, 0),
        None => host::fst_m64(cw, v),
    }
}

/// Pushes what a converting load gives; an unmasked invalid operand is not pushed.
#[inline(always)]
fn load<M>(f: &mut Fpu, m: M, op: fn(u16, M) -> (F80, u16)) {
    if !empty(f, 7) {
        return push(f, INDEFINITE); // overflow
    }
    let (v, sw) = op(f.fcw, m);
    status(f, sw, C1);
    if sw >> 11 & 7 == 7 {
        rotate(f, 7);
        set(f, 0, v);
    }
}

fn constant(f: &mut Fpu, op: fn(u16) -> F80) {
    push(f, op(f.fcw));
}

/// ST0 converted, stored, popped: the store comes before every other effect.
#[inline(always)]
fn store<M: Copy>(
    c: &mut Core,
    indefinite: M,
    op: fn(u16, &F80) -> (M, u16),
    pops: bool,
    at: u64,
    to_memory: impl FnOnce(&mut Core, M) -> Result<(), Fault>,
) -> Result<(), Fault> {
    // What is not stored because of an unmasked exception must be writable all the same.
    let size = size_of::<M>() as u64;
    let f = &c.cpu.fpu;
    if empty(f, 0) {
        if f.fcw & fpu::IE != 0 {
            to_memory(c, indefinite)?;
        } else {
            c.probe_write(at, size)?;
        }
        let f = &mut c.cpu.fpu;
        if stack_fault(f, false) && pops {
            pop(f);
        }
        return Ok(());
    }
    let (m, sw) = op(f.fcw, &get(f, 0));
    let stop = blocked(f, sw, NO_STORE);
    if stop {
        c.probe_write(at, size)?;
    } else {
        to_memory(c, m)?;
    }
    let f = &mut c.cpu.fpu;
    status(f, sw, C1);
    if pops && !stop {
        pop(f);
    }
    Ok(())
}

fn bytes10(v: &F80) -> [u8; 10] {
    let mut b = [0; 10];
    b[..8].copy_from_slice(&v.mantissa.to_le_bytes());
    b[8..].copy_from_slice(&v.sign_exp.to_le_bytes());
    b
}

fn raw(_: u16, v: &F80) -> ([u8; 10], u16) {
    (bytes10(v), 0)
}

/// FST ST(i).
fn copy(f: &mut Fpu, to: usize, pops: bool) {
    if empty(f, 0) {
        if !stack_fault(f, false) {
            return;
        }
        set(f, to, INDEFINITE);
    } else {
        f.fsw &= !C1;
        set(f, to, get(f, 0));
    }
    if pops {
        pop(f);
    }
}

/// FLD ST(i).
fn duplicate(f: &mut Fpu, from: usize) {
    if empty(f, from) {
        if stack_fault(f, false) {
            rotate(f, 7);
            set(f, 0, INDEFINITE);
        }
    } else {
        push(f, get(f, from));
    }
}

fn exchange(f: &mut Fpu, with: usize) {
    f.fsw &= !C1;
    if empty(f, 0) || empty(f, with) {
        if !stack_fault(f, false) {
            return;
        }
        for n in [0, with] {
            if empty(f, n) {
                set(f, n, INDEFINITE);
            }
        }
    }
    let (a, b) = (get(f, 0), get(f, with));
    set(f, 0, b);
    set(f, with, a);
}

macro_rules! loads {
    ($load:ident, $op:path) => {
        fm!(|c, _i, a| {
            let m = c.$load(a)?;
            load(&mut c.cpu.fpu, m, $op);
        })
    };
}

macro_rules! loads_int {
    ($load:ident, $ty:ty) => {
        fm!(|c, _i, a| {
            let m = c.$load(a)?;
            push(&mut c.cpu.fpu, from_int(m as $ty as i64));
        })
    };
}

macro_rules! stores {
    ($store:ident, $indefinite:expr, $op:path, $pops:literal) => {
        fm!(|c, _i, a| store(c, $indefinite, $op, $pops, a, |c, m| c.$store(a, m))?)
    };
}

const INT16: u16 = 1 << 15;
const INT32: u32 = 1 << 31;
const INT64: u64 = 1 << 63;
const NAN32: u32 = 0xffc0_0000;
const NAN64: u64 = 0xfff8 << 48;
const BCD: [u8; 10] = [0, 0, 0, 0, 0, 0, 0, 0xc0, 0xff, 0xff];

pub fn select(i: &Instruction) -> Option<Handler> {
    use Code::*;
    Some(match i.code() {
        Fld_m32fp => loads!(load32, host::fld_m32),
        Fld_m64fp => loads!(load64, load_double),
        Fld_m80fp => fm!(|c, _i, a| {
            let mut b = [0; 10];
            c.load_bytes(a, &mut b)?;
            let [m @ .., x, y] = b;
            push(&mut c.cpu.fpu, F80 { mantissa: u64::from_le_bytes(m), sign_exp: u16::from_le_bytes([x, y]) });
        }),
        Fbld_m80bcd => fm!(|c, _i, a| {
            let mut b = [0; 10];
            c.load_bytes(a, &mut b)?;
            load(&mut c.cpu.fpu, b, host::fbld);
        }),
        Fild_m16int => loads_int!(load16, i16),
        Fild_m32int => loads_int!(load32, i32),
        Fild_m64int => loads_int!(load64, i64),
        Fld_sti => fr!(|c, i| duplicate(&mut c.cpu.fpu, st(i, 0))),
        Fld1 => fr!(|c, _i| push(&mut c.cpu.fpu, ONE)),
        Fldz => fr!(|c, _i| push(&mut c.cpu.fpu, ZERO)),
        Fldl2t => fr!(|c, _i| constant(&mut c.cpu.fpu, host::fldl2t)),
        Fldl2e => fr!(|c, _i| constant(&mut c.cpu.fpu, host::fldl2e)),
        Fldpi => fr!(|c, _i| constant(&mut c.cpu.fpu, host::fldpi)),
        Fldlg2 => fr!(|c, _i| constant(&mut c.cpu.fpu, host::fldlg2)),
        Fldln2 => fr!(|c, _i| constant(&mut c.cpu.fpu, host::fldln2)),

        Fst_m32fp => stores!(store32, NAN32, host::fst_m32, false),
        Fstp_m32fp => stores!(store32, NAN32, host::fst_m32, true),
        Fst_m64fp => stores!(store64, NAN64, store_double, false),
        Fstp_m64fp => stores!(store64, NAN64, store_double, true),
        Fstp_m80fp => fm!(|c, _i, a| store(c, bytes10(&INDEFINITE), raw, true, a, |c, m| c.store_bytes(a, &m))?),
        Fbstp_m80bcd => fm!(|c, _i, a| store(c, BCD, host::fbstp, true, a, |c, m| c.store_bytes(a, &m))?),
        Fist_m16int => stores!(store16, INT16, host::fist_m16, false),
        Fistp_m16int => stores!(store16, INT16, host::fist_m16, true),
        Fist_m32int => stores!(store32, INT32, host::fist_m32, false),
        Fistp_m32int => stores!(store32, INT32, host::fist_m32, true),
        Fistp_m64int => stores!(store64, INT64, host::fist_m64, true),
        Fisttp_m16int => stores!(store16, INT16, host::fisttp_m16, true),
        Fisttp_m32int => stores!(store32, INT32, host::fisttp_m32, true),
        Fisttp_m64int => stores!(store64, INT64, host::fisttp_m64, true),

        Fst_sti => fr!(|c, i| copy(&mut c.cpu.fpu, st(i, 0), false)),
        Fstp_sti | Fstp_sti_DFD0 | Fstp_sti_DFD8 => fr!(|c, i| copy(&mut c.cpu.fpu, st(i, 0), true)),
        // As FSTP, but an empty ST0 is popped without a word.
        Fstpnce_sti => fr!(|c, i| {
            let f = &mut c.cpu.fpu;
            if empty(f, 0) {
                f.fsw &= !C1;
                pop(f);
            } else {
                copy(f, st(i, 0), true);
            }
        }),
        Fxch_st0_sti | Fxch_st0_sti_DDC8 | Fxch_st0_sti_DFC8 => fr!(|c, i| exchange(&mut c.cpu.fpu, st(i, 1))),
        Ffree_sti => fr!(|c, i| {
            let f = &mut c.cpu.fpu;
            free(f, st(i, 0));
            f.fsw &= !C1;
        }),
        Ffreep_sti => fr!(|c, i| {
            let f = &mut c.cpu.fpu;
            free(f, st(i, 0));
            pop(f);
            f.fsw &= !C1;
        }),
        Fincstp => fr!(|c, _i| {
            let f = &mut c.cpu.fpu;
            rotate(f, 1);
            f.fsw &= !C1;
        }),
        Fdecstp => fr!(|c, _i| {
            let f = &mut c.cpu.fpu;
            rotate(f, 7);
            f.fsw &= !C1;
        }),
        Fnop => fr!(|_c, _i| {}),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn integers() {
        assert_eq!(from_int(1), ONE);
        assert_eq!(from_int(0), ZERO);
        assert_eq!(from_int(-3), F80 { mantissa: 3 << 62, sign_exp: 0xc000 });
        assert_eq!(from_int(i64::MIN), F80 { mantissa: 1 << 63, sign_exp: 0xc03e });
        for v in [5i64, 1 << 40, -(1 << 62) + 7, i64::MAX] {
            assert_eq!(host::fist_m64(0x37f, &from_int(v)).0 as i64, v);
        }
    }

    #[test]
    fn doubles_as_the_host_converts_them() {
        let mut seed = 1u64;
        let mut exact = 0;
        for n in 0..100_000u64 {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let v = if n & 1 == 0 { seed } else { (n as f64 * 0.125).to_bits() };
            if let Some(f) = from_double(v) {
                assert_eq!(f, host::fld_m64(0x37f, v).0, "{v:x}");
            }
            let exp = 0x3bf0 + (seed >> 40) as u16 % 0x820;
            let f = F80 { mantissa: seed | 1 << 63, sign_exp: exp | (seed >> 7) as u16 & 0x8000 };
            for f in [f, F80 { mantissa: f.mantissa & !0x7ff, ..f }, F80 { mantissa: 1 << 63, ..f }] {
                if let Some(v) = to_double(&f) {
                    let (want, sw) = host::fst_m64(0x37f, &f);
                    assert_eq!((v, 0), (want, sw & 0x23f), "{f:x?}");
                    exact += 1;
                }
            }
        }
        assert!(exact > 100_000, "{exact}");
    }
}
