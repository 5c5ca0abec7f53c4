//! Arithmetic done by the host's own instructions: the one place of SIMD and x87 code that is tied to x86-64 hosts.
//!
//! Interface, for whoever writes the soft-float version for other hosts:
//! - integer SIMD: `fn(a: u128, b: u128) -> u128`, `a` the destination operand, `b` the source, no state;
//! - SSE floating point ([`sse`]): the same plus `csr: &mut u32`, the guest's MXCSR with *all exceptions masked*; new sticky flags are
//!   ORed into it. Unmasked exceptions are judged by the caller from the flags;
//! - x87 ([`x87`]): operands as [`crate::state::F80`], the guest's control word as it is, out comes the result and the status word
//!   of that one instruction alone (with unmasked responses as the hardware gives them).
//!
//! The host must have SSE4.1 ([`supported`]). RCPPS, RSQRTPS and the transcendental x87 instructions give what the host's maker
//! chose: AMD and Intel differ there in the last bits, as they do for a guest on KVM.

#[cfg(not(target_arch = "x86_64"))]
compile_error!("the software engine needs an x86-64 host: there is no soft-float implementation of exec::host yet");

pub mod int;
pub mod sse;
pub mod x87;

/// Err(what the host lacks).
pub fn supported() -> Result<(), &'static str> {
    if std::arch::is_x86_feature_detected!("sse4.1") { Ok(()) } else { Err("SSE4.1") }
}
