//! Integer SIMD instructions, one function each, named as the instruction.

use std::arch::asm;
use std::arch::x86_64::__m128i;

#[inline(always)]
pub(super) fn v(x: u128) -> __m128i {
    // SAFETY: both are 16 bytes of plain data.
    unsafe { std::mem::transmute::<u128, __m128i>(x) }
}

#[inline(always)]
pub(super) fn u(x: __m128i) -> u128 {
    // SAFETY: both are 16 bytes of plain data.
    unsafe { std::mem::transmute::<__m128i, u128>(x) }
}

macro_rules! ops {
    ($($name:ident)*) => {$(
        #[inline(always)]
        pub fn $name(a: u128, b: u128) -> u128 {
            let mut x = v(a);
            // SAFETY: one instruction between two registers, without faults (the host has SSE4.1) or side effects.
            unsafe {
                asm!(concat!(stringify!($name), " {x}, {y}"), x = inout(xmm_reg) x, y = in(xmm_reg) v(b),
                     options(pure, nomem, nostack, preserves_flags));
            }
            u(x)
        }
    )*};
}

ops! {
    paddb paddw paddd paddq psubb psubw psubd psubq
    paddsb paddsw paddusb paddusw psubsb psubsw psubusb psubusw
    pcmpeqb pcmpeqw pcmpeqd pcmpgtb pcmpgtw pcmpgtd
    pmullw pmulhw pmulhuw pmuludq pmaddwd psadbw pavgb pavgw
    pminub pmaxub pminsw pmaxsw
    psrlw psrld psrlq psraw psrad psllw pslld psllq
    punpcklbw punpcklwd punpckldq punpcklqdq punpckhbw punpckhwd punpckhdq punpckhqdq
    packsswb packssdw packuswb
    pshufb phaddw phaddd phaddsw phsubw phsubd phsubsw pmaddubsw pmulhrsw psignb psignw psignd pabsb pabsw pabsd
    pcmpeqq packusdw pmulld pmuldq pminsb pminsd pminuw pminud pmaxsb pmaxsd pmaxuw pmaxud phminposuw
    movss movsd movhlps movlhps movq
    pmovsxbw pmovsxbd pmovsxbq pmovsxwd pmovsxwq pmovsxdq pmovzxbw pmovzxbd pmovzxbq pmovzxwd pmovzxwq pmovzxdq
}

/// A value from a general register, upper part zero. (Written as a whole register, so that the next instruction's 16-byte load can
/// be forwarded from the store.)
#[inline(always)]
pub fn from64(v: u64) -> u128 {
    let x: __m128i;
    // SAFETY: register to register, no faults or side effects.
    unsafe {
        asm!("movq {x}, {r}", x = out(xmm_reg) x, r = in(reg) v, options(pure, nomem, nostack, preserves_flags));
    }
    u(x)
}

#[inline(always)]
pub fn from32(v: u32) -> u128 {
    from64(v.into())
}

macro_rules! mask {
    ($($name:ident)*) => {$(
        /// The sign bits of the lanes.
        #[inline(always)]
        pub fn $name(a: u128) -> u32 {
            let r: u32;
            // SAFETY: register to register, no faults or side effects.
            unsafe {
                asm!(concat!(stringify!($name), " {r:e}, {x}"), x = in(xmm_reg) v(a), r = out(reg) r,
                     options(pure, nomem, nostack, preserves_flags));
            }
            r
        }
    )*};
}

mask! { pmovmskb movmskps movmskpd }

// PCMPGTQ is SSE4.2, which the host need not have.
pub fn pcmpgtq(a: u128, b: u128) -> u128 {
    let one = |sh: u32| if (a >> sh) as i64 > (b >> sh) as i64 { u64::MAX as u128 } else { 0 };
    one(0) | one(64) << 64
}

/// PBLENDVB: bytes of `b` where the mask byte's top bit is set.
#[inline(always)]
pub fn select_bytes(a: u128, b: u128, mask: u128) -> u128 {
    let m = pcmpgtb(0, mask);
    a & !m | b & m
}
