//! One vCPU of the software engine: architectural state, TLBs, and what its handlers may call.

use std::sync::Arc;

use memory::{GuestMemory, MemoryError};
use vcpu::{Bus, Clock, Control};

use crate::insn::Fault;
use crate::state::Cpu;

pub const DE: u8 = 0;
pub const DB: u8 = 1;
pub const BP: u8 = 3;
pub const OF: u8 = 4;
pub const BR: u8 = 5;
pub const UD: u8 = 6;
pub const NM: u8 = 7;
pub const DF: u8 = 8;
pub const TS: u8 = 10;
pub const NP: u8 = 11;
pub const SS: u8 = 12;
pub const GP: u8 = 13;
pub const PF: u8 = 14;
pub const MF: u8 = 16;
pub const AC: u8 = 17;
pub const XM: u8 = 19;

/// An exception on its way, with its error code where the vector has one. `cr2` is set for #PF only.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exception {
    pub vector: u8,
    pub error: Option<u32>,
    pub cr2: u64,
}

/// Why an instruction did not complete.
#[derive(Debug, Clone)]
pub enum Pending {
    Exception(Exception),
    /// The host side failed: damaged snapshot memory. The engine stops here, before the instruction.
    Memory(MemoryError),
}

/// What all vCPUs of a machine share.
pub struct Shared {
    pub memory: Arc<GuestMemory>,
    pub bus: Arc<Bus>,
    pub clock: Arc<Clock>,
    pub control: Arc<Control>,
}

/// One vCPU. Handlers get `&mut Core`; they never see the block cache.
pub struct Core {
    pub cpu: Cpu,
    pub shared: Arc<Shared>,
    /// Set together with returning [`Fault`].
    pub fault: Option<Pending>,
}

impl Core {
    /// `return Err(core.raise(GP, Some(0)))`.
    #[cold]
    pub fn raise(&mut self, vector: u8, error: Option<u32>) -> Fault {
        self.fault = Some(Pending::Exception(Exception { vector, error, cr2: 0 }));
        Fault
    }
}
