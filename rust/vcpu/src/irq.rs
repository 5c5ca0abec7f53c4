//! Interrupt plumbing shared by the engines.

/// Where message-signalled interrupts go: an engine's LAPICs. `address` and `data` as a PCI device writes them
/// (Intel SDM vol. 3, 11.11): 0xFEExxxxx, destination in bits 19:12, vector in data bits 7:0.
/// May be called from any thread; it wakes the target vCPU.
pub trait IrqSink: Send + Sync {
    fn msi(&self, address: u64, data: u32);
}

/// Told by a LAPIC of the end of a level-triggered interrupt (the IOAPIC listens).
pub trait EoiListener: Send + Sync {
    fn eoi(&self, vector: u8);
}
