//! What an engine and the devices say to each other: bus, interrupts, clock, control, vCPU state. No backend.

pub mod bus;
pub mod clock;
pub mod control;
pub mod engine;
pub mod ioapic;
pub mod irq;
pub mod state;

pub use bus::{Bus, Device, Space};
pub use clock::{Clock, ClockState};
pub use control::{Control, Work};
pub use engine::{Engine, EngineError, Stop};
pub use ioapic::{Ioapic, IoapicState};
pub use irq::{EoiListener, IrqSink, MsiRelay};
pub use state::VcpuState;
