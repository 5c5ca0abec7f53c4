//! The software engine: x86-64 in plain Rust, no privilege, no device file, any host.
//!
//! Who does what (see docs/design/engine.md): [`state`] what is architectural; [`insn`] the decoded form and
//! the handlers' contract; [`core`] one vCPU with its TLBs; [`mmu`] every access to guest memory; [`decode`] and
//! [`cache`] from bytes to blocks; [`run`] the block loop; [`exec`] the handlers; [`events`] exceptions and interrupts.

// Bit expressions follow the manuals: shifts before ands before ors, without a parenthesis around each.
#![allow(clippy::precedence)]

pub mod apics;
pub mod cache;
pub mod convert;
pub mod core;
pub mod debug;
pub mod decode;
pub mod engine;
pub mod events;
pub mod exec;
pub mod flags;
pub mod insn;
pub mod jit;
pub mod kvmclock;
pub mod lapic;
pub mod listing;
pub mod mmu;
pub mod msr;
pub mod run;
pub mod segments;
pub mod state;
pub mod task;
pub mod tier;
pub mod tlb;

pub use engine::SoftwareEngine;
pub use tier::Tier;
pub use vcpu::EngineConfig;
// Both engines show the same CPU: what it is made of belongs to neither.
pub use vcpu::{cpuid, profile};
