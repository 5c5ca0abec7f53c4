//! What is saved of a virtio function's transport: plain, named and not to be trusted.

use memory::GuestMemory;
use serde::{Deserialize, Serialize};

use crate::StateError;
use crate::queue::Queue;
use crate::transport::{F_VERSION_1, NO_VECTOR, status};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MsixEntry {
    pub address: u64,
    pub data: u32,
    /// Vector control: bit 0 masks.
    pub control: u32,
}

impl Default for MsixEntry {
    /// Masked, as after a reset of the function.
    fn default() -> Self {
        Self { address: 0, data: 0, control: 1 }
    }
}

impl MsixEntry {
    pub(crate) fn bytes(&self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.address.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.data.to_le_bytes());
        bytes[12..].copy_from_slice(&self.control.to_le_bytes());
        bytes
    }

    pub(crate) fn from_bytes(b: [u8; 16]) -> Self {
        Self {
            address: u64::from_le_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]]),
            data: u32::from_le_bytes([b[8], b[9], b[10], b[11]]),
            control: u32::from_le_bytes([b[12], b[13], b[14], b[15]]),
        }
    }
}

/// `pending`: vectors whose PBA bit is set, ascending.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MsixState {
    pub enabled: bool,
    pub masked: bool,
    pub table: Vec<MsixEntry>,
    pub pending: Vec<u16>,
}

/// Registers of one queue, and where we stand in its rings (free-running 16-bit indices).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QueueState {
    pub size: u16,
    pub ready: bool,
    pub vector: u16,
    pub desc_table: u64,
    pub avail_ring: u64,
    pub used_ring: u64,
    pub next_avail: u16,
    pub next_used: u16,
    /// `next_used` when the driver was last considered for an interrupt.
    pub signalled_used: u16,
}

impl QueueState {
    pub fn cold(max_size: u16) -> Self {
        Self {
            size: max_size,
            ready: false,
            vector: NO_VECTOR,
            desc_table: 0,
            avail_ring: 0,
            used_ring: 0,
            next_avail: 0,
            next_used: 0,
            signalled_used: 0,
        }
    }

    fn check(&self, max_size: u16, vectors: u16, memory: &GuestMemory) -> Result<(), StateError> {
        if !self.size.is_power_of_two() || self.size > max_size {
            return Err(StateError::new("size", format!("{} is not a power of two up to {max_size}", self.size)));
        }
        check_vector("vector", self.vector, vectors)?;
        if self.ready {
            Queue::check_rings(self, memory).map_err(|(field, why)| StateError::new(field, why))?;
        }
        // Every chain is given back in the pass that takes it: between passes none is in flight.
        if self.next_used != self.next_avail {
            return Err(StateError::new("next_used", format!("{} where next_avail is {}", self.next_used, self.next_avail)));
        }
        if self.next_used.wrapping_sub(self.signalled_used) > self.size {
            let why = format!("{} is more than the queue's size behind {}", self.signalled_used, self.next_used);
            return Err(StateError::new("signalled_used", why));
        }
        Ok(())
    }
}

fn check_vector(field: &str, vector: u16, vectors: u16) -> Result<(), StateError> {
    if vector != NO_VECTOR && vector >= vectors {
        return Err(StateError::new(field, format!("vector {vector} of {vectors}")));
    }
    Ok(())
}

/// Everything that the guest can see or cause in BAR 0, the device's own part excepted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VirtioState {
    pub device_status: u8,
    pub device_feature_select: u32,
    pub driver_feature_select: u32,
    pub driver_features: u64,
    pub queue_select: u16,
    pub config_vector: u16,
    pub config_generation: u8,
    pub isr: u8,
    pub queues: Vec<QueueState>,
    pub msix: MsixState,
}

impl VirtioState {
    /// A function after power-on.
    pub fn cold(queue_sizes: &[u16]) -> Self {
        Self {
            device_status: 0,
            device_feature_select: 0,
            driver_feature_select: 0,
            driver_features: 0,
            queue_select: 0,
            config_vector: NO_VECTOR,
            config_generation: 0,
            isr: 0,
            queues: queue_sizes.iter().map(|&max| QueueState::cold(max)).collect(),
            msix: MsixState { table: vec![MsixEntry::default(); queue_sizes.len() + 1], ..MsixState::default() },
        }
    }

    /// Whether a device with these queues and features, on this memory, can be in this state. Guest memory is not read.
    pub fn check(&self, queue_sizes: &[u16], features: u64, memory: &GuestMemory) -> Result<(), StateError> {
        let unknown = self.device_status & !status::ALL;
        if unknown != 0 {
            return Err(StateError::new("device_status", format!("unknown bits {unknown:#x}")));
        }
        let has = |bits| self.device_status & bits == bits;
        if has(status::DRIVER_OK) && !has(status::FEATURES_OK) || has(status::FEATURES_OK) && !has(status::DRIVER) {
            return Err(StateError::new("device_status", format!("{:#x} skips a step", self.device_status)));
        }
        if has(status::FEATURES_OK) && self.driver_features & !features != 0 {
            let extra = self.driver_features & !features;
            return Err(StateError::new("driver_features", format!("bits {extra:#x} are not offered by this device")));
        }
        if has(status::FEATURES_OK) && self.driver_features & F_VERSION_1 == 0 {
            return Err(StateError::new("driver_features", "accepted without VERSION_1"));
        }
        if self.isr & !3 != 0 {
            return Err(StateError::new("isr", format!("unknown bits {:#x}", self.isr & !3)));
        }
        if self.queues.len() != queue_sizes.len() {
            let why = format!("{} queues where the device has {}", self.queues.len(), queue_sizes.len());
            return Err(StateError::new("queues", why));
        }
        let vectors = queue_sizes.len() as u16 + 1;
        check_vector("config_vector", self.config_vector, vectors)?;
        for (i, (queue, &max)) in self.queues.iter().zip(queue_sizes).enumerate() {
            queue.check(max, vectors, memory).map_err(|e| e.inside(&format!("queues[{i}]")))?;
        }
        Ok(())
    }
}
