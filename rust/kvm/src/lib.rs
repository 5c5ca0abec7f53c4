//! The KVM engine: the same machine, state and devices as the software engine, run by the processor.
//!
//! [`engine`] all vCPUs of a machine; [`threads`] one host thread each while they run, pausing and kicking; [`vm`] making a
//! virtual machine; [`cpu`] one vCPU, [`convert`], [`fpu`], [`lapic`] where KVM's structures and `VcpuState` meet; [`exits`] what a vCPU thread does when the guest needs us; [`doorbells`] the guest's
//! signals to devices, [`sink`] interrupts to the guest; [`host`] whether a machine fits this host; [`tsc`] the guest's counter;
//! [`probe`] whether this host's KVM can run an operating system.

// Bit expressions follow the manuals: shifts before ands before ors, without a parenthesis around each.
#![allow(clippy::precedence)]

mod convert;
mod cpu;
mod doorbells;
mod engine;
mod exits;
mod fpu;
mod host;
mod lapic;
mod probe;
mod sink;
mod threads;
mod tsc;
mod vm;

pub use engine::KvmEngine;
pub use host::check;
pub use probe::{Probe, probe};
pub use tsc::TscControl;

use vcpu::EngineError;

/// A system call of KVM's that failed.
fn failed(what: &str, error: impl std::fmt::Display) -> EngineError {
    EngineError::new("host", format!("KVM: {what}: {error}"))
}
