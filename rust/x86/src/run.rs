//! The block loop of one vCPU.

use vcpu::EngineError;

/// Why [`Core::run`](crate::core::Core::run) came back; the vCPU is exact at an instruction boundary.
#[derive(Debug, Clone)]
pub enum RunExit {
    /// Exactly the budget was executed.
    Budget,
    /// HLT: nothing to do until an event.
    Halted,
    /// PAUSE: another vCPU should go on.
    Pause,
    /// Somebody asked for attention: look at interrupts, posted work and stop requests, then go on.
    Events,
    TripleFault,
    Failed(EngineError),
}

impl crate::core::Core {
    /// Executes at most `budget` instructions.
    pub fn run(&mut self, cache: &mut crate::cache::Cache, budget: u64) -> RunExit {
        let _ = (cache, budget);
        RunExit::Failed(EngineError::new("unsupported-instruction", "the block loop is not written yet"))
    }
}
