//! The instructions: one module a family, each with `select(&Instruction) -> Option<Handler>`.

pub mod fpu;
mod fpu_arith;
mod fpu_env;
mod fpu_move;
mod fpu_special;
pub mod host;
pub mod integer;
pub mod mmx;
#[cfg(test)]
mod simd_tests;
pub mod sse;
mod sse_convert;
mod sse_exact;
mod sse_float;
mod sse_int;
mod sse_lane;
mod sse_move;
mod sse_state;
mod sse_string;
pub mod system;

use iced_x86::{CpuidFeature as F, Instruction};

/// Whether the CPU profile shows the guest everything that this instruction needs. What it does not show is #UD.
pub fn claimed(instr: &Instruction) -> bool {
    instr.cpuid_features().iter().all(|f| {
        matches!(
            f,
            F::INTEL8086
                | F::INTEL8086_ONLY
                | F::INTEL186
                | F::INTEL286
                | F::INTEL386
                | F::INTEL486
                | F::X64
                | F::CLFSH
                | F::CMOV
                | F::CMPXCHG16B
                | F::CPUID
                | F::CX8
                | F::FPU
                | F::FPU287
                | F::FPU387
                | F::FXSR
                | F::MMX
                | F::MSR
                | F::MULTIBYTENOP
                | F::PAUSE
                | F::POPCNT
                | F::PREFETCHW
                | F::RDTSCP
                | F::FSGSBASE
                | F::SEP
                | F::SSE
                | F::SSE2
                | F::SSE3
                | F::SSE4_1
                | F::SSE4_2
                | F::SSSE3
                | F::SYSCALL
                | F::TSC
        )
    })
}
