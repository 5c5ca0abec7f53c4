//! Devices that move bytes: virtio-pci functions (transport, split queues, block, console, entropy), the 16550, and the
//! host ends of consoles. Configuration space and every decision about where a device sits belong to the caller.

pub mod blk;
pub mod chain;
pub mod console;
pub mod disk;
pub mod fault;
pub mod flush;
pub mod hex;
pub mod host;
pub mod irq;
pub mod msix;
pub mod overlay;
pub mod queue;
pub mod rng;
pub mod serial;
pub mod state;
pub mod transport;

pub use fault::{Fault, StateError};
pub use irq::{IrqLine, SharedLine};
pub use transport::{Transport, VirtioDevice};
