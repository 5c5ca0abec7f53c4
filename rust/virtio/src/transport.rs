//! BAR 0 of a virtio-pci 1.x function (virtio 1.2, section 4.1), laid out as Cloud Hypervisor does
//! (`virtio-devices/src/transport/pci_device.rs`). Modern only.

use std::sync::{Arc, Mutex, MutexGuard};

use memory::{GuestMemory, MemoryError};
use vcpu::{Control, Device, EngineError, IrqSink, Stop};

use crate::chain::Chain;
use crate::irq::IrqLine;
use crate::msix::Msix;
use crate::queue::{F_EVENT_IDX, F_INDIRECT_DESC, Queue};
use crate::state::{QueueState, VirtioState};
use crate::{Fault, StateError};

/// Bytes of BAR 0, and where its parts are.
pub const BAR_SIZE: u64 = 0x8_0000;
pub const COMMON: u64 = 0;
pub const COMMON_SIZE: u64 = 56;
pub const ISR: u64 = 0x2000;
pub const CONFIG: u64 = 0x4000;
pub const CONFIG_SIZE: u64 = 0x1000;
pub const NOTIFY: u64 = 0x6000;
pub const NOTIFY_SIZE: u64 = 0x1000;
pub const NOTIFY_MULTIPLIER: u64 = 4;
pub const MSIX_TABLE: u64 = 0x8000;
pub const MSIX_TABLE_SIZE: u64 = 0x4_0000;
pub const MSIX_PBA: u64 = 0x4_8000;
pub const MSIX_PBA_SIZE: u64 = 0x800;

/// `VIRTIO_MSI_NO_VECTOR`.
pub const NO_VECTOR: u16 = 0xffff;
pub const F_VERSION_1: u64 = 1 << 32;
/// What the transport adds to every device's features.
pub const TRANSPORT_FEATURES: u64 = F_VERSION_1 | F_EVENT_IDX | F_INDIRECT_DESC;

const CONFIG_END: u64 = CONFIG + CONFIG_SIZE;
const NOTIFY_END: u64 = NOTIFY + NOTIFY_SIZE;
const MSIX_TABLE_END: u64 = MSIX_TABLE + MSIX_TABLE_SIZE;
const MSIX_PBA_END: u64 = MSIX_PBA + MSIX_PBA_SIZE;

const ISR_QUEUE: u8 = 1;
const ISR_CONFIG: u8 = 2;

/// Device status bits (2.1).
pub mod status {
    pub const ACKNOWLEDGE: u8 = 1;
    pub const DRIVER: u8 = 2;
    pub const DRIVER_OK: u8 = 4;
    pub const FEATURES_OK: u8 = 8;
    pub const NEEDS_RESET: u8 = 0x40;
    pub const FAILED: u8 = 0x80;
    pub const ALL: u8 = ACKNOWLEDGE | DRIVER | DRIVER_OK | FEATURES_OK | NEEDS_RESET | FAILED;
}

/// The queues of a device during one pass.
pub struct Queues<'a> {
    pub memory: &'a GuestMemory,
    queues: &'a mut [Queue],
}

impl Queues<'_> {
    /// Takes the next chain of a ready queue; false when there is none or the queue is not ready.
    pub fn pop(&mut self, queue: usize, chain: &mut Chain) -> Result<bool, Fault> {
        match self.queues.get_mut(queue) {
            Some(q) if q.state.ready => q.pop(self.memory, chain),
            _ => Ok(false),
        }
    }

    /// Gives the chain that began with `head` back, with `len` bytes written.
    pub fn push(&mut self, queue: usize, head: u16, len: u32) -> Result<(), Fault> {
        match self.queues.get_mut(queue) {
            Some(q) if q.state.ready => q.push(self.memory, head, len),
            _ => Ok(()),
        }
    }
}

/// What a device adds to the transport. All of it runs under the transport's lock.
pub trait VirtioDevice: Send {
    /// Offered features, without the transport's.
    fn features(&self) -> u64;
    /// Size limit of each queue.
    fn queue_sizes(&self) -> &[u16];
    /// The device-specific configuration as the driver reads it.
    fn config(&self) -> &[u8];
    fn write_config(&mut self, _offset: usize, _data: &[u8]) {}
    /// The driver has accepted these features and set DRIVER_OK.
    fn activate(&mut self, _features: u64) {}
    /// Back to the cold device. What the host gave (a file, unread input) stays.
    fn reset(&mut self) {}
    /// Works until queue `queue` is empty, or until there is nothing to put into it.
    fn process(&mut self, queue: usize, queues: &mut Queues<'_>) -> Result<(), Fault>;
    /// Gives back the chains of requests that went on elsewhere and have ended.
    fn complete(&mut self, _queues: &mut Queues<'_>) -> Result<(), Fault> {
        Ok(())
    }
}

struct Inner<D> {
    device: D,
    registers: VirtioState, // its `queues` and `msix` are empty: the live ones are below
    queues: Vec<Queue>,
    msix: Msix,
    intx: Option<Box<dyn IrqLine>>,
    intx_high: bool,
    intx_disabled: bool,
    fault: Option<String>,
}

/// One virtio function's registers, queues and interrupts around a device.
///
/// Guarantees: any access returns; nothing that a driver writes can do more than stop this device (NEEDS_RESET).
pub struct Transport<D> {
    memory: Arc<GuestMemory>,
    control: Arc<Control>,
    features: u64,
    sizes: Vec<u16>,
    inner: Mutex<Inner<D>>,
}

impl<D: VirtioDevice> Transport<D> {
    /// The only constructor: [`VirtioState::cold`] makes a cold function. `state` is checked against the device and memory.
    pub fn from_state(
        device: D,
        state: VirtioState,
        memory: Arc<GuestMemory>,
        sink: Arc<dyn IrqSink>,
        control: Arc<Control>,
    ) -> Result<Self, StateError> {
        let features = device.features() | TRANSPORT_FEATURES;
        let sizes = device.queue_sizes().to_vec();
        state.check(&sizes, features, &memory)?;
        let mut registers = state;
        let msix =
            Msix::from_state(std::mem::take(&mut registers.msix), sizes.len() as u16 + 1, sink).map_err(|e| e.inside("msix"))?;
        let saved = std::mem::take(&mut registers.queues);
        let queues = saved.into_iter().zip(&sizes).map(|(q, &max)| Queue::new(q, max, registers.driver_features)).collect();
        let inner = Inner { device, registers, queues, msix, intx: None, intx_high: false, intx_disabled: false, fault: None };
        let transport = Self { memory, control, features, sizes, inner: Mutex::new(inner) };
        {
            let inner = &mut *transport.lock();
            if inner.registers.device_status & status::DRIVER_OK != 0 {
                inner.device.activate(inner.registers.driver_features);
            }
        }
        Ok(transport)
    }

    fn lock(&self) -> MutexGuard<'_, Inner<D>> {
        self.inner.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Complete, and without side effects.
    pub fn state(&self) -> VirtioState {
        let inner = self.lock();
        let queues = inner.queues.iter().map(|q| q.state.clone()).collect();
        VirtioState { queues, msix: inner.msix.state.clone(), ..inner.registers.clone() }
    }

    /// The device itself, under the transport's lock.
    pub fn device<R>(&self, f: impl FnOnce(&mut D) -> R) -> R {
        f(&mut self.lock().device)
    }

    /// Why the device stopped with NEEDS_RESET, for people.
    pub fn fault(&self) -> Option<String> {
        let inner = self.lock();
        let stopped = inner.registers.device_status & status::NEEDS_RESET != 0;
        stopped.then(|| inner.fault.clone().unwrap_or_else(|| "it had stopped when it was saved".into()))
    }

    pub fn features(&self) -> u64 {
        self.features
    }

    pub fn vectors(&self) -> u16 {
        self.sizes.len() as u16 + 1
    }

    /// Message control bits (enable, function mask) of the MSI-X capability in configuration space.
    pub fn set_msix_control(&self, enabled: bool, masked: bool) {
        let mut inner = self.lock();
        inner.msix.set_control(enabled, masked);
        inner.update_intx();
    }

    pub fn msix_control(&self) -> (bool, bool) {
        let inner = self.lock();
        (inner.msix.state.enabled, inner.msix.state.masked)
    }

    /// The pin used while MSI-X is off, brought to its right level at once.
    pub fn set_intx(&self, line: Option<Box<dyn IrqLine>>) {
        let mut inner = self.lock();
        inner.intx = line;
        inner.intx_high = false;
        inner.update_intx();
    }

    /// The command register's interrupt-disable bit.
    pub fn set_intx_disabled(&self, disabled: bool) {
        let mut inner = self.lock();
        inner.intx_disabled = disabled;
        inner.update_intx();
    }

    /// The status register's interrupt bit.
    pub fn intx_pending(&self) -> bool {
        let inner = self.lock();
        inner.registers.isr != 0 && !inner.msix.state.enabled
    }

    /// Works on one queue because of something on the host's side.
    pub fn process(&self, queue: usize) {
        let mut inner = self.lock();
        self.run(&mut inner, queue);
    }

    /// Gives back what the device did elsewhere and has ended.
    pub fn complete(&self) {
        let mut inner = self.lock();
        if inner.live() {
            self.pass(&mut inner, |device, queues| device.complete(queues));
        }
    }

    /// Once before a machine runs again: works on what the driver made available without our having seen its notification,
    /// and sends interrupts for what was used without one.
    pub fn resume(&self) {
        let mut inner = self.lock();
        for queue in 0..inner.queues.len() {
            self.run(&mut inner, queue);
        }
    }

    /// Tells the driver that the configuration is another one now.
    pub fn config_changed(&self) {
        let mut inner = self.lock();
        inner.registers.config_generation = inner.registers.config_generation.wrapping_add(1);
        if inner.registers.device_status & status::DRIVER_OK != 0 {
            let vector = inner.registers.config_vector;
            inner.interrupt(ISR_CONFIG, vector);
        }
    }

    /// Power-on state (a reset of the whole function: MSI-X too).
    pub fn reset(&self) {
        let mut inner = self.lock();
        inner.reset();
        inner.msix.state = VirtioState::cold(&self.sizes).msix;
        inner.update_intx();
    }

    fn run(&self, inner: &mut Inner<D>, queue: usize) {
        if !inner.live() || !inner.queues.get(queue).is_some_and(|q| q.state.ready) {
            return;
        }
        self.pass(inner, |device, queues| device.process(queue, queues));
    }

    /// Device work on the queues, and what follows from it.
    fn pass(&self, inner: &mut Inner<D>, work: impl FnOnce(&mut D, &mut Queues<'_>) -> Result<(), Fault>) {
        let mut queues = Queues { memory: &self.memory, queues: &mut inner.queues };
        let mut result = work(&mut inner.device, &mut queues);
        for i in 0..inner.queues.len() {
            if !inner.queues[i].state.ready {
                continue;
            }
            match inner.queues[i].take_signal(&self.memory) {
                Ok(false) => {}
                Ok(true) => {
                    let vector = inner.queues[i].state.vector;
                    inner.interrupt(ISR_QUEUE, vector);
                }
                Err(e) => result = result.and(Err(e)),
            }
        }
        match result {
            Ok(()) => {}
            Err(Fault::Driver(reason)) => inner.needs_reset(reason),
            Err(Fault::Machine(error)) => {
                inner.settle();
                let code = if matches!(error, MemoryError::Damaged { .. }) { "damaged" } else { "host" };
                self.control.request_stop(Stop::Failed(EngineError::new(code, error.to_string())));
            }
        }
    }

    fn set_status(&self, inner: &mut Inner<D>, value: u8) {
        if value == 0 {
            inner.reset();
            return;
        }
        let old = inner.registers.device_status;
        // The driver may only add bits (2.1.1), and NEEDS_RESET is ours.
        let mut new = old | value & (status::ALL & !status::NEEDS_RESET);
        if new & !old & status::FEATURES_OK != 0 {
            let accepted = inner.registers.driver_features;
            if new & status::DRIVER == 0 || accepted & F_VERSION_1 == 0 || accepted & !self.features != 0 {
                new &= !status::FEATURES_OK;
            } else {
                inner.queues.iter_mut().for_each(|q| q.set_features(accepted));
            }
        }
        if new & status::FEATURES_OK == 0 {
            new &= !status::DRIVER_OK;
        }
        inner.registers.device_status = new;
        if new & !old & status::DRIVER_OK != 0 {
            inner.device.activate(inner.registers.driver_features);
            for queue in 0..inner.queues.len() {
                self.run(inner, queue);
            }
        }
    }

    fn read_common(&self, inner: &Inner<D>) -> [u8; COMMON_SIZE as usize] {
        let r = &inner.registers;
        let window = |features: u64, select: u32| match select {
            0 => features as u32,
            1 => (features >> 32) as u32,
            _ => 0,
        };
        let absent = QueueState { size: 0, ..QueueState::cold(0) };
        let queue = inner.queues.get(usize::from(r.queue_select));
        let q = queue.map_or(&absent, |q| &q.state);
        let mut image = [0; COMMON_SIZE as usize];
        let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
        put(0x00, &r.device_feature_select.to_le_bytes());
        put(0x04, &window(self.features, r.device_feature_select).to_le_bytes());
        put(0x08, &r.driver_feature_select.to_le_bytes());
        put(0x0c, &window(r.driver_features, r.driver_feature_select).to_le_bytes());
        put(0x10, &r.config_vector.to_le_bytes());
        put(0x12, &(inner.queues.len() as u16).to_le_bytes());
        put(0x14, &[r.device_status, r.config_generation]);
        put(0x16, &r.queue_select.to_le_bytes());
        put(0x18, &q.size.to_le_bytes());
        put(0x1a, &q.vector.to_le_bytes());
        put(0x1c, &u16::from(q.ready).to_le_bytes());
        put(0x1e, &queue.map_or(0, |_| r.queue_select).to_le_bytes());
        put(0x20, &q.desc_table.to_le_bytes());
        put(0x28, &q.avail_ring.to_le_bytes());
        put(0x30, &q.used_ring.to_le_bytes());
        image
    }

    /// Only accesses of the field's own width count (4.1.3.1); 64-bit fields may be written in halves.
    fn write_common(&self, inner: &mut Inner<D>, offset: u64, data: &[u8]) {
        let mut bytes = [0; 8];
        bytes[..data.len()].copy_from_slice(data);
        let value = u64::from_le_bytes(bytes);
        let vector = if value < u64::from(self.vectors()) { value as u16 } else { NO_VECTOR };
        let r = &mut inner.registers;
        match (offset, data.len()) {
            (0x00, 4) => return r.device_feature_select = value as u32,
            (0x08, 4) => return r.driver_feature_select = value as u32,
            (0x0c, 4) => {
                if r.device_status & status::FEATURES_OK == 0 && r.driver_feature_select < 2 {
                    let shift = 32 * r.driver_feature_select;
                    r.driver_features = r.driver_features & !(0xffff_ffff << shift) | value << shift;
                }
                return;
            }
            (0x10, 2) => return r.config_vector = vector,
            (0x14, 1) => return self.set_status(inner, value as u8),
            (0x16, 2) => return r.queue_select = value as u16,
            _ => {}
        }
        let Some(queue) = inner.queues.get_mut(usize::from(r.queue_select)) else { return };
        let q = &mut queue.state;
        if (offset, data.len()) == (0x1a, 2) {
            q.vector = vector;
            return;
        }
        if q.ready {
            return; // the driver must not change an enabled queue (4.1.4.3.2)
        }
        let half = |old: &mut u64, at: u64| match data.len() {
            8 if at == 0 => *old = value,
            4 => *old = *old & !(0xffff_ffff << (8 * at)) | value << (8 * at),
            _ => {}
        };
        match (offset, data.len()) {
            (0x18, 2) if (value as u16).is_power_of_two() && value as u16 <= queue.max_size => q.size = value as u16,
            (0x1c, 2) if value == 1 => match Queue::check_rings(q, &self.memory) {
                Ok(()) => q.ready = true,
                Err((field, why)) => {
                    let index = r.queue_select;
                    inner.needs_reset(format!("queue {index}: {field}: {why}"));
                }
            },
            (0x20 | 0x24, _) => half(&mut q.desc_table, offset - 0x20),
            (0x28 | 0x2c, _) => half(&mut q.avail_ring, offset - 0x28),
            (0x30 | 0x34, _) => half(&mut q.used_ring, offset - 0x30),
            _ => {}
        }
    }
}

impl<D: VirtioDevice> Inner<D> {
    /// Whether the device may touch its queues.
    fn live(&self) -> bool {
        let stopped = status::NEEDS_RESET | status::FAILED;
        self.registers.device_status & (status::DRIVER_OK | stopped) == status::DRIVER_OK
    }

    fn reset(&mut self) {
        self.device.reset();
        self.queues.iter_mut().for_each(Queue::reset);
        let config_generation = self.registers.config_generation;
        self.registers = VirtioState { config_generation, ..VirtioState::cold(&[]) };
        self.registers.msix.table.clear();
        self.msix.state.pending.clear();
        self.fault = None;
        self.update_intx();
    }

    /// After a fault no chain counts as in flight any more.
    fn settle(&mut self) {
        self.queues.iter_mut().for_each(|q| q.state.next_avail = q.state.next_used);
    }

    fn needs_reset(&mut self, reason: String) {
        self.settle();
        self.fault = Some(reason);
        self.registers.device_status |= status::NEEDS_RESET;
        if self.registers.device_status & status::DRIVER_OK != 0 {
            let vector = self.registers.config_vector;
            self.interrupt(ISR_CONFIG, vector);
        }
    }

    fn interrupt(&mut self, cause: u8, vector: u16) {
        if self.msix.state.enabled {
            self.msix.raise(vector);
        } else {
            self.registers.isr |= cause;
            self.update_intx();
        }
    }

    fn update_intx(&mut self) {
        let high = self.registers.isr != 0 && !self.msix.state.enabled && !self.intx_disabled;
        if let Some(line) = &self.intx
            && high != self.intx_high
        {
            self.intx_high = high;
            line.set_level(high);
        }
    }
}

/// `data` from `image`, `offset` bytes in; zeros behind its end.
fn copy_window(image: &[u8], offset: u64, data: &mut [u8]) {
    for (at, byte) in (offset as usize..).zip(data.iter_mut()) {
        *byte = image.get(at).copied().unwrap_or(0);
    }
}

impl<D: VirtioDevice> Device for Transport<D> {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let inner = &mut *self.lock();
        match offset {
            COMMON..COMMON_SIZE => copy_window(&self.read_common(inner), offset - COMMON, data),
            ISR if !data.is_empty() => {
                data[0] = std::mem::take(&mut inner.registers.isr);
                inner.update_intx();
            }
            CONFIG..CONFIG_END => copy_window(inner.device.config(), offset - CONFIG, data),
            MSIX_TABLE..MSIX_TABLE_END => inner.msix.read_table(offset - MSIX_TABLE, data),
            MSIX_PBA..MSIX_PBA_END => inner.msix.read_pba(offset - MSIX_PBA, data),
            _ => {}
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if data.is_empty() || data.len() > 8 {
            return;
        }
        let inner = &mut *self.lock();
        match offset {
            COMMON..COMMON_SIZE => self.write_common(inner, offset - COMMON, data),
            CONFIG..CONFIG_END => inner.device.write_config((offset - CONFIG) as usize, data),
            NOTIFY..NOTIFY_END => self.run(inner, ((offset - NOTIFY) / NOTIFY_MULTIPLIER) as usize),
            MSIX_TABLE..MSIX_TABLE_END => inner.msix.write_table(offset - MSIX_TABLE, data),
            _ => {}
        }
    }

    fn doorbells(&self) -> Vec<u64> {
        (0..self.sizes.len() as u64).map(|queue| NOTIFY + NOTIFY_MULTIPLIER * queue).collect()
    }
}
