//! What an engine and the devices say to each other: bus, interrupts, clock, control, vCPU state, and the CPU that every guest sees. No backend.

// Bit expressions follow the manuals: shifts before ands before ors, without a parenthesis around each.
#![allow(clippy::precedence)]

pub mod bus;
pub mod clock;
pub mod control;
pub mod count;
pub mod cpuid;
pub mod engine;
pub mod ioapic;
pub mod irq;
pub mod msr;
pub mod profile;
pub mod state;

pub use bus::{Bus, Device, Doorbell, Space};
pub use clock::{Clock, ClockState};
pub use control::{Control, Work};
pub use count::Count;
pub use engine::{Engine, EngineConfig, EngineError, Stop};
pub use ioapic::{Ioapic, IoapicState};
pub use irq::{EoiListener, IrqSink, MsiRelay};
pub use state::VcpuState;
