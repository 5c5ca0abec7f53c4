//! x87 instructions with ST0 (and ST1) as implied operands: roots, remainders, transcendentals, classification.

use iced_x86::{Code, Instruction};

use super::fpu::{
    BEFORE, C0, C1, C2, C3, CONDITIONS, INDEFINITE, blocked, empty, fr, get, pop, rotate, set, stack_fault, status,
};
use super::host::x87 as host;
use crate::insn::Handler;
use crate::state::{F80, Fpu};

/// ST0 = op(ST0).
fn unary(f: &mut Fpu, op: fn(u16, &F80) -> (F80, u16), codes: u16) {
    if empty(f, 0) {
        f.fsw &= !(codes & C2);
        if stack_fault(f, false) {
            set(f, 0, INDEFINITE);
        }
        return;
    }
    let (r, sw) = op(f.fcw, &get(f, 0));
    status(f, sw, codes);
    if !blocked(f, sw, BEFORE) {
        set(f, 0, r);
    }
}

/// ST0 = op(ST0, ST1).
fn binary(f: &mut Fpu, op: fn(u16, &F80, &F80) -> (F80, u16), codes: u16) {
    if empty(f, 0) || empty(f, 1) {
        if stack_fault(f, false) {
            set(f, 0, INDEFINITE);
        }
        return;
    }
    let (r, sw) = op(f.fcw, &get(f, 0), &get(f, 1));
    status(f, sw, codes);
    if !blocked(f, sw, BEFORE) {
        set(f, 0, r);
    }
}

/// FPREM, FPREM1. Without a quotient (NaN, invalid or not done) C0 and C3 keep what they had.
fn remainder(f: &mut Fpu, op: fn(u16, &F80, &F80) -> (F80, u16)) {
    if empty(f, 0) || empty(f, 1) {
        f.fsw &= !C2;
        if stack_fault(f, false) {
            set(f, 0, INDEFINITE);
        }
        return;
    }
    let (r, sw) = op(f.fcw, &get(f, 0), &get(f, 1));
    let stopped = blocked(f, sw, BEFORE);
    let nan = r.sign_exp & 0x7fff == 0x7fff && r.mantissa << 1 != 0;
    if stopped || nan {
        status(f, sw & !(C1 | C2), C1 | C2);
    } else {
        status(f, sw, CONDITIONS);
    }
    if !stopped {
        set(f, 0, r);
    }
}

/// ST1 = op(ST0, ST1), popped.
fn popping(f: &mut Fpu, op: fn(u16, &F80, &F80) -> (F80, u16)) {
    if empty(f, 0) || empty(f, 1) {
        if stack_fault(f, false) {
            set(f, 1, INDEFINITE);
            pop(f);
        }
        return;
    }
    let (r, sw) = op(f.fcw, &get(f, 0), &get(f, 1));
    status(f, sw, C1);
    if !blocked(f, sw, BEFORE) {
        set(f, 1, r);
        pop(f);
    }
}

/// ST0 becomes two values, one pushed.
fn pair(f: &mut Fpu, op: fn(u16, &F80) -> (F80, F80, u16), codes: u16) {
    let underflow = empty(f, 0);
    if underflow || !empty(f, 7) {
        f.fsw &= !(codes & C2);
        if stack_fault(f, !underflow) {
            set(f, 0, INDEFINITE);
            rotate(f, 7);
            set(f, 0, INDEFINITE);
        }
        return;
    }
    let (top, below, sw) = op(f.fcw, &get(f, 0));
    status(f, sw, codes);
    if blocked(f, sw, BEFORE) {
        return;
    }
    if sw >> 11 & 7 == 6 {
        set(f, 0, below);
        rotate(f, 7);
    }
    set(f, 0, top);
}

/// FCHS, FABS: the sign only, whatever the rest is.
fn sign(f: &mut Fpu, of: fn(u16) -> u16) {
    f.fsw &= !C1;
    if empty(f, 0) {
        if stack_fault(f, false) {
            set(f, 0, INDEFINITE);
        }
        return;
    }
    let v = get(f, 0);
    set(f, 0, F80 { sign_exp: of(v.sign_exp), ..v });
}

fn test(f: &mut Fpu) {
    if empty(f, 0) {
        f.fsw |= C0 | C2 | C3;
        stack_fault(f, false);
        return;
    }
    let (_, sw) = host::ftst(f.fcw, &get(f, 0));
    status(f, sw, CONDITIONS);
}

fn examine(f: &mut Fpu) {
    let v = get(f, 0);
    let codes =
        if empty(f, 0) { C3 | C0 | if v.sign_exp >> 15 != 0 { C1 } else { 0 } } else { host::fxam(f.fcw, &v).1 & CONDITIONS };
    f.fsw = f.fsw & !CONDITIONS | codes;
}

pub fn select(i: &Instruction) -> Option<Handler> {
    use Code::*;
    Some(match i.code() {
        Fchs => fr!(|c, _i| sign(&mut c.cpu.fpu, |s| s ^ 0x8000)),
        Fabs => fr!(|c, _i| sign(&mut c.cpu.fpu, |s| s & 0x7fff)),
        Ftst => fr!(|c, _i| test(&mut c.cpu.fpu)),
        Fxam => fr!(|c, _i| examine(&mut c.cpu.fpu)),
        Fsqrt => fr!(|c, _i| unary(&mut c.cpu.fpu, host::fsqrt, C1)),
        Frndint => fr!(|c, _i| unary(&mut c.cpu.fpu, host::frndint, C1)),
        F2xm1 => fr!(|c, _i| unary(&mut c.cpu.fpu, host::f2xm1, C1)),
        Fsin => fr!(|c, _i| unary(&mut c.cpu.fpu, host::fsin, C1 | C2)),
        Fcos => fr!(|c, _i| unary(&mut c.cpu.fpu, host::fcos, C1 | C2)),
        Fscale => fr!(|c, _i| binary(&mut c.cpu.fpu, host::fscale, C1)),
        Fprem => fr!(|c, _i| remainder(&mut c.cpu.fpu, host::fprem)),
        Fprem1 => fr!(|c, _i| remainder(&mut c.cpu.fpu, host::fprem1)),
        Fyl2x => fr!(|c, _i| popping(&mut c.cpu.fpu, host::fyl2x)),
        Fyl2xp1 => fr!(|c, _i| popping(&mut c.cpu.fpu, host::fyl2xp1)),
        Fpatan => fr!(|c, _i| popping(&mut c.cpu.fpu, host::fpatan)),
        Fsincos => fr!(|c, _i| pair(&mut c.cpu.fpu, host::fsincos, C1 | C2)),
        Fptan => fr!(|c, _i| pair(&mut c.cpu.fpu, host::fptan, C1 | C2)),
        Fxtract => fr!(|c, _i| pair(&mut c.cpu.fpu, host::fxtract, C1)),
        _ => return None,
    })
}
