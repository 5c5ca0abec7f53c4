//! The contract of a CPU engine. It runs *all* vCPUs of a machine: the software engine takes turns on one
//! thread, KVM gives each its own.

use std::sync::Arc;

use memory::GuestMemory;

use crate::bus::Bus;
use crate::clock::Clock;
use crate::control::Control;
use crate::irq::{EoiListener, IntrAcknowledge, IntrLine, IrqSink};
use crate::profile::Switches;
use crate::state::VcpuState;

/// What an engine is made for, whichever it is.
pub struct EngineConfig {
    pub memory: Arc<GuestMemory>,
    pub bus: Arc<Bus>,
    pub clock: Arc<Clock>,
    pub control: Arc<Control>,
    pub vcpus: usize,
    /// Physical address bits that the guest sees (32–52).
    pub phys_bits: u8,
    /// Told of the end of level-triggered interrupts: the I/O APIC.
    pub eoi: Option<Arc<dyn EoiListener>>,
    /// Changes of the CPU profile.
    pub switches: Switches,
}

/// Why [`Engine::run`] came back. All vCPUs stand at an instruction boundary.
#[derive(Debug, Clone)]
pub enum Stop {
    /// Somebody asked for a pause.
    Paused,
    /// The guest switched itself off (ACPI S5).
    PowerOff,
    /// The guest asked for a reset (i8042, ACPI reset register, triple fault).
    Reset,
    /// The engine cannot go on: damaged snapshot memory, an instruction that it cannot run, a failing device.
    Failed(EngineError),
}

/// Why a machine cannot run on. `code` is stable: `damaged`, `unsupported-instruction`, `device`, `host`, `state`.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{message}")]
pub struct EngineError {
    pub code: &'static str,
    pub message: String,
}

impl EngineError {
    pub fn new(code: &'static str, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }
}

/// An engine with its vCPUs, paused whenever `run` is not on the stack.
pub trait Engine: Send {
    /// `software` or `kvm`.
    fn name(&self) -> &'static str;
    fn vcpus(&self) -> usize;
    /// Runs until something in `Control` asks for a stop, the guest ends itself, or the engine fails.
    fn run(&mut self) -> Stop;
    /// Complete state of one vCPU. No side effects.
    fn state(&mut self, vcpu: usize) -> Result<VcpuState, EngineError>;
    /// Validates and takes over; on error nothing has changed. Untrusted input.
    fn set_state(&mut self, vcpu: usize, state: &VcpuState) -> Result<(), EngineError>;
    /// Where devices and the IOAPIC send their interrupts.
    fn irq_sink(&self) -> Arc<dyn IrqSink>;
    /// Wires a pair of 8259s to the boot CPU. An engine without such an input refuses.
    fn connect_pic(&mut self, _line: Arc<IntrLine>, _acknowledge: IntrAcknowledge) -> Result<(), EngineError> {
        Err(EngineError::new("host", format!("the {} engine has no input for an 8259 interrupt controller", self.name())))
    }
}
