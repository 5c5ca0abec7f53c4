//! Interrupt messages to the LAPICs in the kernel.

use std::sync::{Mutex, MutexGuard, Weak};

use kvm_bindings::{KVM_IRQ_ROUTING_MSI, KvmIrqRouting, kvm_irq_routing_entry, kvm_irq_routing_msi, kvm_msi};
use kvm_ioctls::VmFd;
use vcpu::IrqSink;

#[derive(Default)]
struct Stage {
    running: bool,
    waiting: Vec<(u64, u32)>,
}

/// Messages go straight to KVM while the machine runs, and wait otherwise: a paused vCPU's state is what was captured,
/// until it runs or is looked at again.
pub(crate) struct Sink {
    // Weak: devices keep the sink, and the virtual machine ends with its engine.
    vm: Weak<VmFd>,
    stage: Mutex<Stage>,
}

impl Sink {
    pub fn new(vm: Weak<VmFd>) -> Self {
        Self { vm, stage: Mutex::default() }
    }

    fn stage(&self) -> MutexGuard<'_, Stage> {
        self.stage.lock().unwrap_or_else(|e| e.into_inner())
    }

    pub fn has_waiting(&self) -> bool {
        !self.stage().waiting.is_empty()
    }

    /// Hands over what waits, and from now on everything at once or not.
    pub fn deliver(&self, running: bool) {
        let mut stage = self.stage();
        stage.running = running;
        for (address, data) in std::mem::take(&mut stage.waiting) {
            self.send(address, data);
        }
    }

    pub fn hold(&self) {
        self.stage().running = false;
    }

    fn send(&self, address: u64, data: u32) {
        let Some(vm) = self.vm.upgrade() else { return };
        let message = kvm_msi { address_lo: address as u32, address_hi: (address >> 32) as u32, data, ..kvm_msi::default() };
        // A message that no LAPIC takes (a guest's own mistake) is reported as an error, and lost, as on a real bus.
        let _ = vm.signal_msi(message);
    }
}

impl IrqSink for Sink {
    fn msi(&self, address: u64, data: u32) {
        let mut stage = self.stage();
        if stage.running {
            self.send(address, data);
        } else {
            stage.waiting.push((address, data));
        }
    }

    fn level_pins(&self, messages: &[(u64, u32)]) {
        let Some(vm) = self.vm.upgrade() else { return };
        // Never used for sending: from these routes KVM knows which vectors' ends to report (KVM_EXIT_IOAPIC_EOI).
        let entries: Vec<_> = messages
            .iter()
            .zip(0..)
            .map(|(&(address, data), gsi)| {
                let mut entry = kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_MSI, ..Default::default() };
                entry.u.msi = kvm_irq_routing_msi {
                    address_lo: address as u32,
                    address_hi: (address >> 32) as u32,
                    data,
                    ..Default::default()
                };
                entry
            })
            .collect();
        if let Ok(routing) = KvmIrqRouting::from_entries(&entries) {
            let _ = vm.set_gsi_routing(&routing);
        }
    }
}
