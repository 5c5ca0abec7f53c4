//! SSE floating-point instructions under the guest's MXCSR.
//!
//! `csr` must have all exceptions masked and no reserved bits; the caller sees to both.

use std::arch::asm;

use super::int::{u, v};

/// What Rust code runs with.
const DEFAULT: u32 = 0x1f80;

macro_rules! ops {
    ($($name:ident)*) => {$(
        #[inline(always)]
        pub fn $name(a: u128, b: u128, csr: &mut u32) -> u128 {
            let mut x = v(a);
            // SAFETY: masked, so no trap; MXCSR is back at Rust's default at the end; memory operands are ours.
            unsafe {
                asm!("ldmxcsr dword ptr [{m}]", concat!(stringify!($name), " {x}, {y}"), "stmxcsr dword ptr [{m}]",
                     "ldmxcsr dword ptr [{d}]", m = in(reg) csr, d = in(reg) &DEFAULT,
                     x = inout(xmm_reg) x, y = in(xmm_reg) v(b), options(nostack, preserves_flags));
            }
            u(x)
        }
    )*};
}

ops! {
    addps addpd addss addsd subps subpd subss subsd mulps mulpd mulss mulsd divps divpd divss divsd
    minps minpd minss minsd maxps maxpd maxss maxsd sqrtps sqrtpd sqrtss sqrtsd
    haddps haddpd hsubps hsubpd addsubps addsubpd
    rcpps rcpss rsqrtps rsqrtss
    cvtps2pd cvtpd2ps cvtss2sd cvtsd2ss cvtdq2ps cvtdq2pd cvtps2dq cvttps2dq cvtpd2dq cvttpd2dq
}

macro_rules! imm {
    ($($name:ident = $ins:literal $imm:literal;)*) => {$(
        #[inline(always)]
        pub fn $name(a: u128, b: u128, csr: &mut u32) -> u128 {
            let mut x = v(a);
            // SAFETY: as above.
            unsafe {
                asm!("ldmxcsr dword ptr [{m}]", concat!($ins, " {x}, {y}, ", $imm), "stmxcsr dword ptr [{m}]",
                     "ldmxcsr dword ptr [{d}]", m = in(reg) csr, d = in(reg) &DEFAULT,
                     x = inout(xmm_reg) x, y = in(xmm_reg) v(b), options(nostack, preserves_flags));
            }
            u(x)
        }
    )*};
}

imm! {
    cmpps0 = "cmpps" 0; cmpps1 = "cmpps" 1; cmpps2 = "cmpps" 2; cmpps3 = "cmpps" 3;
    cmpps4 = "cmpps" 4; cmpps5 = "cmpps" 5; cmpps6 = "cmpps" 6; cmpps7 = "cmpps" 7;
    cmppd0 = "cmppd" 0; cmppd1 = "cmppd" 1; cmppd2 = "cmppd" 2; cmppd3 = "cmppd" 3;
    cmppd4 = "cmppd" 4; cmppd5 = "cmppd" 5; cmppd6 = "cmppd" 6; cmppd7 = "cmppd" 7;
    cmpss0 = "cmpss" 0; cmpss1 = "cmpss" 1; cmpss2 = "cmpss" 2; cmpss3 = "cmpss" 3;
    cmpss4 = "cmpss" 4; cmpss5 = "cmpss" 5; cmpss6 = "cmpss" 6; cmpss7 = "cmpss" 7;
    cmpsd0 = "cmpsd" 0; cmpsd1 = "cmpsd" 1; cmpsd2 = "cmpsd" 2; cmpsd3 = "cmpsd" 3;
    cmpsd4 = "cmpsd" 4; cmpsd5 = "cmpsd" 5; cmpsd6 = "cmpsd" 6; cmpsd7 = "cmpsd" 7;
    // Immediate 4: rounding as MXCSR says; the caller puts the instruction's own mode there.
    roundps = "roundps" 4; roundpd = "roundpd" 4; roundss = "roundss" 4; roundsd = "roundsd" 4;
    // All elements in, all out; the caller zeroes what the immediate leaves out.
    dpps = "dpps" 0xff; dppd = "dppd" 0x33;
}

macro_rules! compare {
    ($($name:ident)*) => {$(
        /// (ZF, PF, CF).
        #[inline(always)]
        pub fn $name(a: u128, b: u128, csr: &mut u32) -> (bool, bool, bool) {
            let (z, p, c): (u8, u8, u8);
            // SAFETY: as above; the arithmetic flags are clobbered.
            unsafe {
                asm!("ldmxcsr dword ptr [{m}]", concat!(stringify!($name), " {x}, {y}"), "setz {z}", "setp {p}", "setc {c}",
                     "stmxcsr dword ptr [{m}]", "ldmxcsr dword ptr [{d}]", m = in(reg) csr, d = in(reg) &DEFAULT,
                     x = in(xmm_reg) v(a), y = in(xmm_reg) v(b), z = out(reg_byte) z, p = out(reg_byte) p, c = out(reg_byte) c,
                     options(nostack));
            }
            (z != 0, p != 0, c != 0)
        }
    )*};
}

compare! { comiss comisd ucomiss ucomisd }

macro_rules! to_int {
    ($($name:ident $ty:ty, $ins:literal;)*) => {$(
        #[inline(always)]
        pub fn $name(b: u128, csr: &mut u32) -> $ty {
            let r: $ty;
            // SAFETY: as above.
            unsafe {
                asm!("ldmxcsr dword ptr [{m}]", $ins, "stmxcsr dword ptr [{m}]", "ldmxcsr dword ptr [{d}]",
                     m = in(reg) csr, d = in(reg) &DEFAULT, r = out(reg) r, y = in(xmm_reg) v(b),
                     options(nostack, preserves_flags));
            }
            r
        }
    )*};
}

to_int! {
    cvtss2si32 u32, "cvtss2si {r:e}, {y}"; cvtss2si64 u64, "cvtss2si {r}, {y}";
    cvtsd2si32 u32, "cvtsd2si {r:e}, {y}"; cvtsd2si64 u64, "cvtsd2si {r}, {y}";
    cvttss2si32 u32, "cvttss2si {r:e}, {y}"; cvttss2si64 u64, "cvttss2si {r}, {y}";
    cvttsd2si32 u32, "cvttsd2si {r:e}, {y}"; cvttsd2si64 u64, "cvttsd2si {r}, {y}";
}

macro_rules! from_int {
    ($($name:ident $ty:ty, $ins:literal;)*) => {$(
        #[inline(always)]
        pub fn $name(a: u128, b: $ty, csr: &mut u32) -> u128 {
            let mut x = v(a);
            // SAFETY: as above.
            unsafe {
                asm!("ldmxcsr dword ptr [{m}]", $ins, "stmxcsr dword ptr [{m}]", "ldmxcsr dword ptr [{d}]",
                     m = in(reg) csr, d = in(reg) &DEFAULT, x = inout(xmm_reg) x, y = in(reg) b,
                     options(nostack, preserves_flags));
            }
            u(x)
        }
    )*};
}

from_int! {
    cvtsi2ss32 u32, "cvtsi2ss {x}, {y:e}"; cvtsi2ss64 u64, "cvtsi2ss {x}, {y}";
    cvtsi2sd32 u32, "cvtsi2sd {x}, {y:e}"; cvtsi2sd64 u64, "cvtsi2sd {x}, {y}";
}
