//! x87 arithmetic and compares with two operands.

use iced_x86::{Code, Instruction};

use super::fpu::{BEFORE, C0, C1, C2, C3, INDEFINITE, blocked, empty, error, fm, fr, get, pop, set, stack_fault, status};
use super::host::x87 as host;
use super::sse_float::set_flags;
use crate::core::Core;
use crate::insn::{Handler, Insn};
use crate::state::{F80, Fpu, flags};

type Op = fn(u16, &F80, &F80) -> (F80, u16);

/// ST(`d`) = op(ST(`d`), ST(`s`)).
#[inline(always)]
fn arith(f: &mut Fpu, d: usize, s: usize, op: Op, pops: bool) {
    if empty(f, d) || empty(f, s) {
        if stack_fault(f, false) {
            set(f, d, INDEFINITE);
            if pops {
                pop(f);
            }
        }
        return;
    }
    let (r, sw) = op(f.fcw, &get(f, d), &get(f, s));
    status(f, sw, C1);
    if !blocked(f, sw, BEFORE) {
        set(f, d, r);
        if pops {
            pop(f);
        }
    }
}

/// ST0 = op(ST0, memory).
#[inline(always)]
fn arith_memory<M>(f: &mut Fpu, m: M, op: fn(u16, &F80, M) -> (F80, u16)) {
    if empty(f, 0) {
        if stack_fault(f, false) {
            set(f, 0, INDEFINITE);
        }
        return;
    }
    let (r, sw) = op(f.fcw, &get(f, 0), m);
    status(f, sw, C1);
    if !blocked(f, sw, BEFORE) {
        set(f, 0, r);
    }
}

/// After a compare: codes, then pops unless an unmasked exception forbids them.
#[inline(always)]
fn compared(f: &mut Fpu, sw: u16, pops: u8) {
    status(f, sw, C0 | C1 | C2 | C3);
    if !blocked(f, sw, BEFORE) {
        (0..pops).for_each(|_| pop(f));
    }
}

/// A compare with an empty register: unordered.
#[cold]
fn unordered(f: &mut Fpu, pops: u8) {
    f.fsw = f.fsw & !C1 | C0 | C2 | C3;
    if stack_fault(f, false) {
        (0..pops).for_each(|_| pop(f));
    }
}

#[inline(always)]
fn compare(f: &mut Fpu, s: usize, op: Op, pops: u8) {
    if empty(f, 0) || empty(f, s) {
        return unordered(f, pops);
    }
    let (_, sw) = op(f.fcw, &get(f, 0), &get(f, s));
    compared(f, sw, pops);
}

#[inline(always)]
fn compare_memory<M>(f: &mut Fpu, m: M, op: fn(u16, &F80, M) -> (F80, u16), pops: u8) {
    if empty(f, 0) {
        return unordered(f, pops);
    }
    let (_, sw) = op(f.fcw, &get(f, 0), m);
    compared(f, sw, pops);
}

type CompareFlags = fn(u16, &F80, &F80) -> ((bool, bool, bool), u16);

/// FCOMI and its kin.
fn compare_flags(c: &mut Core, i: &Insn, op: CompareFlags, pops: bool) {
    let f = &mut c.cpu.fpu;
    let s = st(i, 1);
    let r = if empty(f, 0) || empty(f, s) {
        stack_fault(f, false);
        (true, true, true)
    } else {
        let (r, sw) = op(f.fcw, &get(f, 0), &get(f, s));
        status(f, sw, 0);
        r
    };
    // The flags are written (AMD) even where an unmasked exception keeps the register from being popped.
    if pops && !error(f) {
        pop(f);
    }
    set_flags(c, r);
}

/// Number of the ST register that operand `n` is.
#[inline(always)]
pub fn st(i: &Insn, n: usize) -> usize {
    (i.r[n] & 7) as usize
}

macro_rules! registers {
    ($op:ident, $pops:literal) => {
        fr!(|c, i| arith(&mut c.cpu.fpu, st(i, 0), st(i, 1), host::$op, $pops))
    };
}

macro_rules! memory {
    ($load:ident, $op:ident) => {
        fm!(|c, _i, a| {
            let m = c.$load(a)?;
            arith_memory(&mut c.cpu.fpu, m, host::$op);
        })
    };
}

macro_rules! compares {
    ($op:ident, $pops:literal) => {
        fr!(|c, i| compare(&mut c.cpu.fpu, st(i, 1), host::$op, $pops))
    };
}

macro_rules! compares_memory {
    ($load:ident, $op:ident, $pops:literal) => {
        fm!(|c, _i, a| {
            let m = c.$load(a)?;
            compare_memory(&mut c.cpu.fpu, m, host::$op, $pops);
        })
    };
}

macro_rules! flags {
    ($op:ident, $pops:literal) => {
        fr!(|c, i| compare_flags(c, i, host::$op, $pops))
    };
}

/// FCMOVcc. An empty register is a fault whatever the condition.
fn move_if(c: &mut Core, i: &Insn, condition: bool) {
    let f = &mut c.cpu.fpu;
    let s = st(i, 1);
    if empty(f, 0) || empty(f, s) {
        if stack_fault(f, false) {
            set(f, 0, INDEFINITE);
        }
    } else if condition {
        set(f, 0, get(f, s));
    }
}

macro_rules! moves {
    ($bits:expr, $when:literal) => {
        fr!(|c, i| {
            let on = c.cpu.arith() & $bits != 0;
            move_if(c, i, on == $when);
        })
    };
}

pub fn select(i: &Instruction) -> Option<Handler> {
    use Code::*;
    Some(match i.code() {
        Fadd_st0_sti | Fadd_sti_st0 => registers!(fadd, false),
        Fmul_st0_sti | Fmul_sti_st0 => registers!(fmul, false),
        Fsub_st0_sti | Fsub_sti_st0 => registers!(fsub, false),
        Fsubr_st0_sti | Fsubr_sti_st0 => registers!(fsubr, false),
        Fdiv_st0_sti | Fdiv_sti_st0 => registers!(fdiv, false),
        Fdivr_st0_sti | Fdivr_sti_st0 => registers!(fdivr, false),
        Faddp_sti_st0 => registers!(fadd, true),
        Fmulp_sti_st0 => registers!(fmul, true),
        Fsubp_sti_st0 => registers!(fsub, true),
        Fsubrp_sti_st0 => registers!(fsubr, true),
        Fdivp_sti_st0 => registers!(fdiv, true),
        Fdivrp_sti_st0 => registers!(fdivr, true),
        Fadd_m32fp => memory!(load32, fadd_m32),
        Fmul_m32fp => memory!(load32, fmul_m32),
        Fsub_m32fp => memory!(load32, fsub_m32),
        Fsubr_m32fp => memory!(load32, fsubr_m32),
        Fdiv_m32fp => memory!(load32, fdiv_m32),
        Fdivr_m32fp => memory!(load32, fdivr_m32),
        Fadd_m64fp => memory!(load64, fadd_m64),
        Fmul_m64fp => memory!(load64, fmul_m64),
        Fsub_m64fp => memory!(load64, fsub_m64),
        Fsubr_m64fp => memory!(load64, fsubr_m64),
        Fdiv_m64fp => memory!(load64, fdiv_m64),
        Fdivr_m64fp => memory!(load64, fdivr_m64),
        Fiadd_m16int => memory!(load16, fiadd_m16),
        Fimul_m16int => memory!(load16, fimul_m16),
        Fisub_m16int => memory!(load16, fisub_m16),
        Fisubr_m16int => memory!(load16, fisubr_m16),
        Fidiv_m16int => memory!(load16, fidiv_m16),
        Fidivr_m16int => memory!(load16, fidivr_m16),
        Fiadd_m32int => memory!(load32, fiadd_m32),
        Fimul_m32int => memory!(load32, fimul_m32),
        Fisub_m32int => memory!(load32, fisub_m32),
        Fisubr_m32int => memory!(load32, fisubr_m32),
        Fidiv_m32int => memory!(load32, fidiv_m32),
        Fidivr_m32int => memory!(load32, fidivr_m32),

        Fcom_st0_sti | Fcom_st0_sti_DCD0 => compares!(fcom, 0),
        Fcomp_st0_sti | Fcomp_st0_sti_DCD8 | Fcomp_st0_sti_DED0 => compares!(fcom, 1),
        Fucom_st0_sti => compares!(fucom, 0),
        Fucomp_st0_sti => compares!(fucom, 1),
        Fcompp => fr!(|c, _i| compare(&mut c.cpu.fpu, 1, host::fcom, 2)),
        Fucompp => fr!(|c, _i| compare(&mut c.cpu.fpu, 1, host::fucom, 2)),
        Fcom_m32fp => compares_memory!(load32, fcom_m32, 0),
        Fcomp_m32fp => compares_memory!(load32, fcom_m32, 1),
        Fcom_m64fp => compares_memory!(load64, fcom_m64, 0),
        Fcomp_m64fp => compares_memory!(load64, fcom_m64, 1),
        Ficom_m16int => compares_memory!(load16, ficom_m16, 0),
        Ficomp_m16int => compares_memory!(load16, ficom_m16, 1),
        Ficom_m32int => compares_memory!(load32, ficom_m32, 0),
        Ficomp_m32int => compares_memory!(load32, ficom_m32, 1),
        Fcomi_st0_sti => flags!(fcomi, false),
        Fcomip_st0_sti => flags!(fcomi, true),
        Fucomi_st0_sti => flags!(fucomi, false),
        Fucomip_st0_sti => flags!(fucomi, true),

        Fcmovb_st0_sti => moves!(flags::CF, true),
        Fcmovnb_st0_sti => moves!(flags::CF, false),
        Fcmove_st0_sti => moves!(flags::ZF, true),
        Fcmovne_st0_sti => moves!(flags::ZF, false),
        Fcmovbe_st0_sti => moves!(flags::CF | flags::ZF, true),
        Fcmovnbe_st0_sti => moves!(flags::CF | flags::ZF, false),
        Fcmovu_st0_sti => moves!(flags::PF, true),
        Fcmovnu_st0_sti => moves!(flags::PF, false),
        _ => return None,
    })
}
