//! One vCPU and its state.

use kvm_ioctls::VcpuFd;
use vcpu::state::VcpuState;
use vcpu::{EngineError, msr};

use crate::convert::{self, msr_name};
use crate::fpu::XsaveArea;
use crate::lapic::Timer;
use crate::tsc;

pub(crate) struct Vcpu {
    pub fd: VcpuFd,
    pub number: usize,
    pub phys_bits: u8,
    pub xsave: XsaveArea,
    pub timer: Timer,
    /// The vCPU's state whenever it does not run. What KVM holds meanwhile does not count: its timers go on, and it is
    /// loaded anew before the vCPU runs.
    pub saved: VcpuState,
}

impl Vcpu {
    pub fn msr(&self, index: u32) -> u64 {
        self.saved.msrs.get(&msr_name(index)).copied().unwrap_or(0)
    }

    /// Whether KVM takes this state; the vCPU is loaded anew before it runs.
    pub fn try_state(&self, state: &VcpuState) -> Result<(), EngineError> {
        convert::load(&self.fd, self.xsave, state, self.phys_bits)
            .map(drop)
            .map_err(|e| EngineError::new(e.code, format!("vCPU {}: {}", self.number, e.message)))
    }

    pub fn load(&mut self, offset: u64) -> Result<(), EngineError> {
        tsc::set_offset(&self.fd, offset.wrapping_add(self.msr(msr::TSC_ADJUST)))?;
        self.timer = convert::load(&self.fd, self.xsave, &self.saved, self.phys_bits)?;
        Ok(())
    }

    pub fn capture(&mut self, tsc: u64) -> Result<(), EngineError> {
        let mut state = convert::capture(&self.fd, self.xsave, self.timer, tsc)
            .map_err(|e| EngineError::new(e.code, format!("vCPU {}: {}", self.number, e.message)))?;
        // KVM was not given this one (see `convert::load`); what the guest has written since is newer.
        let wall = self.msr(msr::KVM_WALL_CLOCK);
        if let Some(value) = state.msrs.get_mut(&msr_name(msr::KVM_WALL_CLOCK)).filter(|v| **v == 0) {
            *value = wall;
        }
        self.saved = state;
        Ok(())
    }
}
