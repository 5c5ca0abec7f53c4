//! MSI-X table and pending bits of one function (PCI 3.0, section 6.8.2).

use std::sync::Arc;

use vcpu::IrqSink;

use crate::StateError;
use crate::state::{MsixEntry, MsixState};

/// Bit 0 of an entry's vector control.
const ENTRY_MASKED: u32 = 1;

pub struct Msix {
    pub state: MsixState,
    sink: Arc<dyn IrqSink>,
}

impl Msix {
    /// `vectors` is the table's size; `state` must have been made for it.
    pub fn from_state(state: MsixState, vectors: u16, sink: Arc<dyn IrqSink>) -> Result<Self, StateError> {
        if state.table.len() != usize::from(vectors) {
            return Err(StateError::new("table", format!("{} entries where the function has {vectors}", state.table.len())));
        }
        if let Some(bad) = state.pending.iter().find(|&&v| v >= vectors) {
            return Err(StateError::new("pending", format!("vector {bad} of {vectors}")));
        }
        if !state.pending.is_sorted_by(|a, b| a < b) {
            return Err(StateError::new("pending", format!("{:?} does not ascend", state.pending)));
        }
        Ok(Self { state, sink })
    }

    /// Message control's enable and function-mask bits, as written to configuration space.
    pub fn set_control(&mut self, enabled: bool, masked: bool) {
        self.state.enabled = enabled;
        self.state.masked = masked;
        self.deliver_pending();
    }

    fn open(&self, vector: u16) -> bool {
        let entry = self.state.table.get(usize::from(vector));
        self.state.enabled && !self.state.masked && entry.is_some_and(|e| e.control & ENTRY_MASKED == 0)
    }

    fn deliver_pending(&mut self) {
        for vector in std::mem::take(&mut self.state.pending) {
            self.raise(vector);
        }
    }

    /// Sends the vector's message, or remembers it while it is masked.
    pub fn raise(&mut self, vector: u16) {
        let Some(&entry) = self.state.table.get(usize::from(vector)) else { return };
        if self.open(vector) {
            self.sink.msi(entry.address, entry.data);
        } else if let Err(at) = self.state.pending.binary_search(&vector) {
            self.state.pending.insert(at, vector);
        }
    }

    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        for (at, byte) in (offset..).zip(data.iter_mut()) {
            *byte = self.state.table.get((at / 16) as usize).map_or(0, |e| e.bytes()[(at % 16) as usize]);
        }
    }

    /// Aligned accesses of four or eight bytes; the specification leaves the others undefined and we drop them.
    pub fn write_table(&mut self, offset: u64, data: &[u8]) {
        if !matches!(data.len(), 4 | 8) || offset % data.len() as u64 != 0 {
            return;
        }
        let Some(entry) = self.state.table.get_mut((offset / 16) as usize) else { return };
        let mut bytes = entry.bytes();
        let at = (offset % 16) as usize;
        bytes[at..at + data.len()].copy_from_slice(data);
        *entry = MsixEntry::from_bytes(bytes);
        self.deliver_pending();
    }

    pub fn read_pba(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        for &vector in &self.state.pending {
            if let Some(byte) = (u64::from(vector) / 8).checked_sub(offset).and_then(|i| data.get_mut(i as usize)) {
                *byte |= 1 << (vector % 8);
            }
        }
    }
}
