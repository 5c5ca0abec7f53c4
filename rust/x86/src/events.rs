//! Exceptions and interrupts: from "it happened" to the first instruction of the guest's routine.

use crate::core::{Core, Exception, Pending};
use crate::insn::Fault;

impl Core {
    /// Delivers an exception through the IDT, turning into double and triple faults as it must. `Err` only with
    /// [`Pending::TripleFault`], [`Pending::Memory`] or [`Pending::Failed`].
    pub fn deliver(&mut self, _exception: Exception) -> Result<(), Fault> {
        self.fault = Some(Pending::TripleFault);
        Err(Fault)
    }

    /// INT n, INT3, INTO (not INT1): with the software interrupt's privilege rules. `return_to` is the next instruction's RIP.
    /// On `Ok` CS:RIP is the routine's first instruction.
    pub fn soft_interrupt(&mut self, _vector: u8, _return_to: u64) -> Result<(), Fault> {
        Err(self.raise(crate::core::UD, None))
    }

    /// Takes the most urgent NMI or interrupt that may be taken now (IF, shadow, TPR). Called by the loop at instruction
    /// boundaries: when it starts, after every `Leave`, and after instructions that touched a device. `Err` as for `deliver`.
    pub fn poll_events(&mut self) -> Result<(), Fault> {
        Ok(())
    }
}
