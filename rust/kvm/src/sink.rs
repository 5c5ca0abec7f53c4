//! Interrupt messages to the LAPICs in the kernel.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, Weak};

use kvm_bindings::{KVM_IRQ_ROUTING_MSI, KvmIrqRouting, kvm_irq_routing_entry, kvm_irq_routing_msi, kvm_msi};
use kvm_ioctls::VmFd;
use vcpu::{IrqSink, ioapic};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

type Message = (u64, u32);

/// Bit 15 of a message's data: level-triggered.
const LEVEL: u32 = 1 << 15;
/// Routes below are the I/O APIC's pins.
const FIRST_GSI: u32 = ioapic::PINS as u32;
/// Messages that have a route at a time. A guest that sends more different ones begins anew; KVM has room for 4096.
const ROUTES: usize = 512;

/// One message of an MSI-X vector, sent by writing to an eventfd.
struct Route {
    gsi: u32,
    fd: EventFd,
    /// Whether KVM listens to `fd`.
    bound: bool,
}

#[derive(Default)]
struct Stage {
    running: bool,
    waiting: Vec<Message>,
    /// Level-triggered pins of the I/O APIC, masked or not.
    pins: Vec<Message>,
    routes: BTreeMap<Message, Route>,
}

/// Messages go straight to KVM while the machine runs, and wait otherwise: a paused vCPU's state is what was captured,
/// until it runs or is looked at again.
///
/// Guarantees: a message is in a LAPIC when [`Sink::hold`] has returned, or waits.
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
        let Some(vm) = self.vm.upgrade() else { return };
        let mut stage = self.stage();
        stage.running = running;
        for message in std::mem::take(&mut stage.waiting) {
            signal(&vm, message);
        }
    }

    pub fn hold(&self) {
        let mut stage = self.stage();
        stage.running = false;
        let Some(vm) = self.vm.upgrade() else { return };
        // What KVM could not deliver at once is with a kernel thread: unbinding waits for that one.
        for route in stage.routes.values_mut().filter(|r| r.bound) {
            let _ = vm.unregister_irqfd(&route.fd, route.gsi);
            route.bound = false;
        }
    }
}

/// Delivers a message before it returns.
fn signal(vm: &VmFd, (address, data): Message) {
    let message = kvm_msi { address_lo: address as u32, address_hi: (address >> 32) as u32, data, ..kvm_msi::default() };
    // A message that no LAPIC takes (a guest's own mistake) is reported as an error, and lost, as on a real bus.
    let _ = vm.signal_msi(message);
}

fn entry(gsi: u32, (address, data): Message) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_MSI, ..Default::default() };
    entry.u.msi =
        kvm_irq_routing_msi { address_lo: address as u32, address_hi: (address >> 32) as u32, data, ..Default::default() };
    entry
}

impl Stage {
    /// Tells KVM all routes at once: each call waits for those who read the table.
    fn tell(&self, vm: &VmFd) -> bool {
        let pins = self.pins.iter().zip(0..FIRST_GSI).map(|(&message, gsi)| entry(gsi, message));
        let vectors = self.routes.iter().map(|(&message, route)| entry(route.gsi, message));
        let entries: Vec<_> = pins.chain(vectors).collect();
        KvmIrqRouting::from_entries(&entries).is_ok_and(|routing| vm.set_gsi_routing(&routing).is_ok())
    }

    /// The eventfd that sends this message; made, with one change of the table, when it is new. `None` where it has to be
    /// signalled directly.
    fn route(&mut self, vm: &VmFd, message: Message) -> Option<&EventFd> {
        // Level-triggered ones are the I/O APIC's; others go nowhere.
        if message.1 & LEVEL != 0 || message.0 >> 20 != 0xfee {
            return None;
        }
        if !self.routes.contains_key(&message) {
            if self.routes.len() == ROUTES {
                for route in std::mem::take(&mut self.routes).into_values().filter(|r| r.bound) {
                    let _ = vm.unregister_irqfd(&route.fd, route.gsi);
                }
            }
            let gsi = FIRST_GSI + self.routes.len() as u32;
            let fd = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).ok()?;
            self.routes.insert(message, Route { gsi, fd, bound: false });
            if !self.tell(vm) {
                self.routes.remove(&message);
                return None;
            }
        }
        let route = self.routes.get_mut(&message)?;
        if !route.bound {
            vm.register_irqfd(&route.fd, route.gsi).ok()?;
            route.bound = true;
        }
        Some(&route.fd)
    }
}

impl IrqSink for Sink {
    fn msi(&self, address: u64, data: u32) {
        let mut stage = self.stage();
        if !stage.running {
            stage.waiting.push((address, data));
            return;
        }
        let Some(vm) = self.vm.upgrade() else { return };
        let sent = stage.route(&vm, (address, data)).is_some_and(|fd| fd.write(1).is_ok());
        if !sent {
            signal(&vm, (address, data));
        }
    }

    fn level_pins(&self, messages: &[(u64, u32)]) {
        let Some(vm) = self.vm.upgrade() else { return };
        let mut stage = self.stage();
        // Never used for sending: from these routes KVM knows which vectors' ends to report (KVM_EXIT_IOAPIC_EOI).
        stage.pins = messages.to_vec();
        stage.tell(&vm);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    /// A virtual machine with one LAPIC that is switched on.
    fn machine() -> Option<(Arc<VmFd>, kvm_ioctls::VcpuFd)> {
        let host = crate::host::Host::open().map_err(|e| eprintln!("SKIPPED: {e}")).ok()?;
        let memory = memory::GuestMemory::new(&[memory::RegionLayout { gpa: 0, size: 1 << 20 }]).unwrap();
        let vm = crate::vm::create(&host.kvm, &memory).unwrap();
        let cpu = vm.create_vcpu(0).unwrap();
        let mut page = cpu.get_lapic().unwrap();
        (page.regs[0xf0], page.regs[0xf1]) = (-1, 1);
        cpu.set_lapic(&page).unwrap();
        Some((vm, cpu))
    }

    fn requested(cpu: &kvm_ioctls::VcpuFd, vector: usize) -> bool {
        let page = cpu.get_lapic().unwrap();
        page.regs[0x200 + vector / 32 * 16 + vector % 32 / 8] as u8 >> (vector % 8) & 1 != 0
    }

    #[test]
    fn every_message_is_in_the_lapic_after_a_hold() {
        let Some((vm, cpu)) = machine() else { return };
        let sink = Sink::new(Arc::downgrade(&vm));
        sink.level_pins(&[(0xfee0_0000, 0xc031)]);
        sink.deliver(true);
        // More than there are routes: half of them for LAPICs that do not exist.
        for turn in 0..4u64 {
            for vector in 32..=255 {
                sink.msi(0xfee0_0000 | (turn & 1) << 12 | turn >> 1 << 2, vector);
            }
        }
        sink.msi(0xfee0_0000, 0xc031);
        sink.msi(0x1234_5678_9abc, 7);
        sink.hold();
        for vector in 32..=255 {
            assert!(requested(&cpu, vector), "{vector:#x}");
        }
        assert_eq!(sink.stage().routes.len(), (4 * 224) % ROUTES);
        assert!(sink.stage().routes.values().all(|r| !r.bound));
    }

    #[test]
    fn messages_wait_for_a_machine_that_stands() {
        let Some((vm, cpu)) = machine() else { return };
        let sink = Sink::new(Arc::downgrade(&vm));
        sink.msi(0xfee0_0000, 0x51);
        assert!(sink.has_waiting() && !requested(&cpu, 0x51));
        sink.deliver(true);
        assert!(!sink.has_waiting() && requested(&cpu, 0x51));
        sink.msi(0xfee0_0000, 0x52);
        sink.hold();
        assert!(requested(&cpu, 0x52));
        sink.msi(0xfee0_0000, 0x53);
        assert!(sink.has_waiting() && !requested(&cpu, 0x53));
        // Bound again by the next message.
        sink.deliver(true);
        sink.msi(0xfee0_0000, 0x54);
        sink.hold();
        assert!(requested(&cpu, 0x53) && requested(&cpu, 0x54));
    }
}
