//! x87 instructions on the host's x87 unit.
//!
//! Every function takes the guest's control word as it is: exceptions that it does not mask leave the hardware's unmasked response
//! (scaled results, nothing pushed or popped) and are cleared before any instruction that would report them. The status word
//! returned is that of this one instruction, started with a clear one; its TOP counts from 0 = the state before the operands were
//! loaded. Rust keeps the x87 stack empty and the control word at 0x37f between.

use std::arch::asm;

use crate::state::F80;

const DEFAULT: u16 = 0x37f;

/// Runs instructions with the x87 state as working area. The first `fnclex` drops sticky flags that other code of this thread, or a
/// surplus pop in `$after`, may have left.
macro_rules! x87 {
    ($cw:ident, [$($before:literal),*] $ins:expr, [$($after:literal),*], $($operands:tt)*) => {{
        let sw: u16;
        if $cw == DEFAULT {
            // Rust's own control word: no exception is ever reported. Loading another one twice costs more than all the rest.
            // SAFETY: as below.
            unsafe {
                asm!("fnclex", $($before,)* $ins, "fnstsw ax", $($after,)*
                     $($operands)*, out("ax") sw,
                     out("st(0)") _, out("st(1)") _, out("st(2)") _, out("st(3)") _,
                     out("st(4)") _, out("st(5)") _, out("st(6)") _, out("st(7)") _, options(nostack));
            }
        } else {
            // SAFETY: the x87 stack is empty here (all of it is declared clobbered) and is empty again at the end; no exception can
            // be reported since only no-wait instructions run between `$ins` and `fnclex`; the pointers are to our own variables.
            unsafe {
                asm!("fnclex", $($before,)* "fldcw word ptr [{cw}]", $ins, "fnstsw ax", "fnclex", "fldcw word ptr [{default}]",
                     $($after,)*
                     $($operands)*, cw = in(reg) &$cw, default = in(reg) &DEFAULT, out("ax") sw,
                     out("st(0)") _, out("st(1)") _, out("st(2)") _, out("st(3)") _,
                     out("st(4)") _, out("st(5)") _, out("st(6)") _, out("st(7)") _, options(nostack));
            }
        }
        sw
    }};
}

macro_rules! binary {
    ($($name:ident $ins:literal;)*) => {$(
        /// ST0 = `a`, ST1 = `b`; what ST0 becomes.
        pub fn $name(cw: u16, a: &F80, b: &F80) -> (F80, u16) {
            let mut r = F80::default();
            let sw = x87!(cw, ["fld tbyte ptr [{b}]", "fld tbyte ptr [{a}]"] $ins, ["fstp tbyte ptr [{r}]", "fstp st(0)"],
                          a = in(reg) a, b = in(reg) b, r = in(reg) &mut r);
            (r, sw)
        }
    )*};
}

binary! {
    fadd "fadd st, st(1)"; fmul "fmul st, st(1)"; fsub "fsub st, st(1)"; fsubr "fsubr st, st(1)";
    fdiv "fdiv st, st(1)"; fdivr "fdivr st, st(1)"; fscale "fscale"; fprem "fprem"; fprem1 "fprem1";
    // These two leave ST0 and give condition codes.
    fcom "fcom st(1)"; fucom "fucom st(1)";
}

macro_rules! popping {
    ($($name:ident $ins:literal;)*) => {$(
        /// ST0 = `a`, ST1 = `b`; what ST1 becomes (the new top).
        pub fn $name(cw: u16, a: &F80, b: &F80) -> (F80, u16) {
            let mut r = F80::default();
            let sw = x87!(cw, ["fld tbyte ptr [{b}]", "fld tbyte ptr [{a}]"] $ins, ["fstp tbyte ptr [{r}]", "ffree st(0)"],
                          a = in(reg) a, b = in(reg) b, r = in(reg) &mut r);
            // An unmasked exception keeps both operands: one is still there. The next user finds an empty stack again.
            if sw >> 11 & 7 == 6 {
                init();
            }
            (r, sw)
        }
    )*};
}

popping! { fyl2x "fyl2x"; fyl2xp1 "fyl2xp1"; fpatan "fpatan"; }

/// Empties the host's x87 stack.
fn init() {
    // SAFETY: FNINIT leaves what Rust expects: empty stack, control word 0x37f.
    unsafe {
        asm!("fninit", out("st(0)") _, out("st(1)") _, out("st(2)") _, out("st(3)") _, out("st(4)") _, out("st(5)") _,
             out("st(6)") _, out("st(7)") _, options(nostack, nomem));
    }
}

macro_rules! unary {
    ($($name:ident $ins:literal;)*) => {$(
        /// ST0 = `a`; what it becomes.
        pub fn $name(cw: u16, a: &F80) -> (F80, u16) {
            let mut r = F80::default();
            let sw = x87!(cw, ["fld tbyte ptr [{a}]"] $ins, ["fstp tbyte ptr [{r}]"],
                          a = in(reg) a, r = in(reg) &mut r);
            (r, sw)
        }
    )*};
}

unary! { fsqrt "fsqrt"; f2xm1 "f2xm1"; frndint "frndint"; fsin "fsin"; fcos "fcos"; ftst "ftst"; fxam "fxam"; }

macro_rules! pair {
    ($($name:ident $ins:literal;)*) => {$(
        /// ST0 = `a`; the new ST0 and ST1. The status word's TOP is 6 if something was pushed, else 7 and ST1 is without meaning.
        pub fn $name(cw: u16, a: &F80) -> (F80, F80, u16) {
            let (mut r, mut s) = (F80::default(), F80::default());
            let sw = x87!(cw, ["fld tbyte ptr [{a}]"] $ins, ["fstp tbyte ptr [{r}]", "fstp tbyte ptr [{s}]"],
                          a = in(reg) a, r = in(reg) &mut r, s = in(reg) &mut s);
            if sw >> 11 & 7 != 6 {
                init();
            }
            (r, s, sw)
        }
    )*};
}

pair! { fsincos "fsincos"; fptan "fptan"; fxtract "fxtract"; }

macro_rules! memory {
    ($($name:ident $ty:ty, $ins:literal;)*) => {$(
        /// ST0 = `a`; what it becomes, or condition codes.
        pub fn $name(cw: u16, a: &F80, m: $ty) -> (F80, u16) {
            let mut r = F80::default();
            let sw = x87!(cw, ["fld tbyte ptr [{a}]"] $ins, ["fstp tbyte ptr [{r}]"],
                          a = in(reg) a, m = in(reg) &m, r = in(reg) &mut r);
            (r, sw)
        }
    )*};
}

memory! {
    fadd_m32 u32, "fadd dword ptr [{m}]"; fadd_m64 u64, "fadd qword ptr [{m}]";
    fmul_m32 u32, "fmul dword ptr [{m}]"; fmul_m64 u64, "fmul qword ptr [{m}]";
    fsub_m32 u32, "fsub dword ptr [{m}]"; fsub_m64 u64, "fsub qword ptr [{m}]";
    fsubr_m32 u32, "fsubr dword ptr [{m}]"; fsubr_m64 u64, "fsubr qword ptr [{m}]";
    fdiv_m32 u32, "fdiv dword ptr [{m}]"; fdiv_m64 u64, "fdiv qword ptr [{m}]";
    fdivr_m32 u32, "fdivr dword ptr [{m}]"; fdivr_m64 u64, "fdivr qword ptr [{m}]";
    fcom_m32 u32, "fcom dword ptr [{m}]"; fcom_m64 u64, "fcom qword ptr [{m}]";
    fiadd_m16 u16, "fiadd word ptr [{m}]"; fiadd_m32 u32, "fiadd dword ptr [{m}]";
    fimul_m16 u16, "fimul word ptr [{m}]"; fimul_m32 u32, "fimul dword ptr [{m}]";
    fisub_m16 u16, "fisub word ptr [{m}]"; fisub_m32 u32, "fisub dword ptr [{m}]";
    fisubr_m16 u16, "fisubr word ptr [{m}]"; fisubr_m32 u32, "fisubr dword ptr [{m}]";
    fidiv_m16 u16, "fidiv word ptr [{m}]"; fidiv_m32 u32, "fidiv dword ptr [{m}]";
    fidivr_m16 u16, "fidivr word ptr [{m}]"; fidivr_m32 u32, "fidivr dword ptr [{m}]";
    ficom_m16 u16, "ficom word ptr [{m}]"; ficom_m32 u32, "ficom dword ptr [{m}]";
}

macro_rules! compare {
    ($($name:ident $ins:literal;)*) => {$(
        /// (ZF, PF, CF) of ST0 = `a` against ST1 = `b`.
        pub fn $name(cw: u16, a: &F80, b: &F80) -> ((bool, bool, bool), u16) {
            let (z, p, c): (u8, u8, u8);
            let sw = x87!(cw, ["fld tbyte ptr [{b}]", "fld tbyte ptr [{a}]"] concat!($ins, "\nsetz {z}\nsetp {p}\nsetc {c}"),
                          ["fstp st(0)", "fstp st(0)"], a = in(reg) a, b = in(reg) b,
                          z = out(reg_byte) z, p = out(reg_byte) p, c = out(reg_byte) c);
            ((z != 0, p != 0, c != 0), sw)
        }
    )*};
}

compare! { fcomi "fcomi st, st(1)"; fucomi "fucomi st, st(1)"; }

macro_rules! load {
    ($($name:ident $ty:ty, $ins:literal;)*) => {$(
        /// What is pushed. The status word's TOP is 7 if it was pushed, else 0.
        pub fn $name(cw: u16, m: $ty) -> (F80, u16) {
            let mut r = F80::default();
            let sw = x87!(cw, [] $ins, ["fstp tbyte ptr [{r}]"], m = in(reg) &m, r = in(reg) &mut r);
            if sw >> 11 & 7 == 0 {
                init();
            }
            (r, sw)
        }
    )*};
}

load! { fld_m32 u32, "fld dword ptr [{m}]"; fld_m64 u64, "fld qword ptr [{m}]"; fbld [u8; 10], "fbld tbyte ptr [{m}]"; }

macro_rules! constant {
    ($($name:ident $ins:literal;)*) => {$(
        /// A constant, rounded as the control word says.
        pub fn $name(cw: u16) -> F80 {
            let mut r = F80::default();
            x87!(cw, [] $ins, ["fstp tbyte ptr [{r}]"], r = in(reg) &mut r);
            r
        }
    )*};
}

constant! { fldl2t "fldl2t"; fldl2e "fldl2e"; fldpi "fldpi"; fldlg2 "fldlg2"; fldln2 "fldln2"; }

macro_rules! store {
    ($($name:ident $ty:ty, $zero:expr, $ins:literal;)*) => {$(
        /// ST0 = `a`; what is stored (without meaning if an unmasked exception forbids the store).
        pub fn $name(cw: u16, a: &F80) -> ($ty, u16) {
            let mut m: $ty = $zero;
            let sw = x87!(cw, ["fld tbyte ptr [{a}]"] $ins, ["fstp st(0)"],
                          a = in(reg) a, m = in(reg) &mut m);
            (m, sw)
        }
    )*};
}

store! {
    fst_m32 u32, 0, "fst dword ptr [{m}]"; fst_m64 u64, 0, "fst qword ptr [{m}]";
    fist_m16 u16, 0, "fist word ptr [{m}]"; fist_m32 u32, 0, "fist dword ptr [{m}]";
}

macro_rules! store_popping {
    ($($name:ident $ty:ty, $zero:expr, $ins:literal;)*) => {$(
        /// As the others, for instructions that only exist with a pop.
        pub fn $name(cw: u16, a: &F80) -> ($ty, u16) {
            let mut m: $ty = $zero;
            let sw = x87!(cw, ["fld tbyte ptr [{a}]"] $ins, [], a = in(reg) a, m = in(reg) &mut m);
            if sw >> 11 & 7 != 0 {
                init();
            }
            (m, sw)
        }
    )*};
}

store_popping! {
    fist_m64 u64, 0, "fistp qword ptr [{m}]"; fisttp_m16 u16, 0, "fisttp word ptr [{m}]";
    fisttp_m32 u32, 0, "fisttp dword ptr [{m}]"; fisttp_m64 u64, 0, "fisttp qword ptr [{m}]";
    fbstp [u8; 10], [0; 10], "fbstp tbyte ptr [{m}]";
}
