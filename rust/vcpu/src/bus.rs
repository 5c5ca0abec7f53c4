//! Port and memory-mapped I/O: sorted ranges, each bound to one device. Both engines use the same bus.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, RwLock};

/// A device's registers. Offsets are relative to the range's base; `data` is 1, 2, 4 or 8 bytes, little endian.
///
/// Guarantee wanted from implementers: any access of any width at any offset returns; what is not a register
/// reads as zero (or the device's own idle value) and ignores writes.
pub trait Device: Send + Sync {
    fn read(&self, offset: u64, data: &mut [u8]);
    fn write(&self, offset: u64, data: &[u8]);

    /// Offsets at which a write is but a signal, whatever is written: an engine may note several as one, and pass that on a
    /// little later from another thread.
    fn doorbells(&self) -> Vec<u64> {
        Vec::new()
    }
}

/// A device's doorbell where the guest sees it.
#[derive(Clone)]
pub struct Doorbell {
    pub address: u64,
    pub device: Arc<dyn Device>,
    pub offset: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Space {
    Pio,
    Mmio,
}

#[derive(Debug, thiserror::Error)]
#[error("{space:?} range {base:#x}+{len:#x} overlaps another device or wraps")]
pub struct Overlap {
    pub space: Space,
    pub base: u64,
    pub len: u64,
}

struct Range {
    base: u64,
    len: u64,
    device: Arc<dyn Device>,
}

/// A machine's two address spaces. Unclaimed reads give all ones; unclaimed writes vanish.
#[derive(Default)]
pub struct Bus {
    pio: RwLock<Vec<Range>>,
    mmio: RwLock<Vec<Range>>,
    generation: AtomicU64,
}

impl Bus {
    fn ranges(&self, space: Space) -> &RwLock<Vec<Range>> {
        match space {
            Space::Pio => &self.pio,
            Space::Mmio => &self.mmio,
        }
    }

    fn changed(&self) {
        self.generation.fetch_add(1, Ordering::Release);
    }

    /// Another number after each change of ranges.
    pub fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    /// All doorbells in memory, at their addresses of this moment.
    pub fn doorbells(&self) -> Vec<Doorbell> {
        let ranges = self.mmio.read().unwrap_or_else(|e| e.into_inner());
        let of = |range: &Range| {
            let (base, len, device) = (range.base, range.len, range.device.clone());
            let inside = range.device.doorbells().into_iter().filter(move |offset| *offset < len);
            inside.map(move |offset| Doorbell { address: base + offset, device: device.clone(), offset }).collect::<Vec<_>>()
        };
        ranges.iter().flat_map(of).collect()
    }

    /// Claims `base..base + len`.
    pub fn insert(&self, space: Space, base: u64, len: u64, device: Arc<dyn Device>) -> Result<(), Overlap> {
        let overlap = Overlap { space, base, len };
        let Some(end) = base.checked_add(len).filter(|_| len > 0) else { return Err(overlap) };
        let mut ranges = self.ranges(space).write().unwrap_or_else(|e| e.into_inner());
        let at = ranges.partition_point(|r| r.base < base);
        if ranges.get(at).is_some_and(|r| r.base < end) || at > 0 && ranges[at - 1].base + ranges[at - 1].len > base {
            return Err(overlap);
        }
        ranges.insert(at, Range { base, len, device });
        drop(ranges);
        self.changed();
        Ok(())
    }

    /// Frees the range that starts at `base`; true when there was one.
    pub fn remove(&self, space: Space, base: u64) -> bool {
        let mut ranges = self.ranges(space).write().unwrap_or_else(|e| e.into_inner());
        let before = ranges.len();
        ranges.retain(|r| r.base != base);
        let found = ranges.len() != before;
        drop(ranges);
        self.changed();
        found
    }

    /// Frees every range, and with them the bus's hold on the devices.
    pub fn clear(&self) {
        for space in [Space::Pio, Space::Mmio] {
            // Dropped after the lock: a device's end may come back to the bus.
            let ranges = std::mem::take(&mut *self.ranges(space).write().unwrap_or_else(|e| e.into_inner()));
            drop(ranges);
        }
        self.changed();
    }

    fn find(&self, space: Space, address: u64) -> Option<(Arc<dyn Device>, u64)> {
        let ranges = self.ranges(space).read().unwrap_or_else(|e| e.into_inner());
        let at = ranges.partition_point(|r| r.base <= address).checked_sub(1)?;
        let range = &ranges[at];
        (address - range.base < range.len).then(|| (range.device.clone(), address - range.base))
    }

    /// `data` keeps all ones where nobody answers. The bus's lock is not held while the device works, so a
    /// device may move ranges.
    pub fn read(&self, space: Space, address: u64, data: &mut [u8]) {
        match self.find(space, address) {
            Some((device, offset)) => device.read(offset, data),
            None => data.fill(0xff),
        }
    }

    pub fn write(&self, space: Space, address: u64, data: &[u8]) {
        if let Some((device, offset)) = self.find(space, address) {
            device.write(offset, data);
        }
    }
}
