//! The local APIC's registers as memory.

use crate::core::Core;

impl Core {
    /// Reads `size` bytes at `offset` of the xAPIC page.
    pub fn lapic_read(&mut self, _offset: u64, _size: u8) -> u64 {
        0
    }

    /// Writes `size` bytes at `offset` of the xAPIC page.
    pub fn lapic_write(&mut self, _offset: u64, _size: u8, _value: u64) {}
}
