//! The device's side of a split virtqueue (virtio 1.2, section 2.7).
//!
//! Every access goes through [`GuestMemory`], a broken ring is a [`Fault`] and never a loop or a panic, and where we
//! are in the rings is state of our own: nothing is guessed from guest memory after a restore.

use std::sync::atomic::{Ordering, fence};

use memory::{GuestMemory, PAGE_SIZE};

use crate::Fault;
use crate::chain::{Chain, Segment, load_u16, store_u16};
use crate::state::QueueState;

pub const F_INDIRECT_DESC: u64 = 1 << 28;
pub const F_EVENT_IDX: u64 = 1 << 29;

const DESC_NEXT: u16 = 1;
const DESC_WRITE: u16 = 2;
const DESC_INDIRECT: u16 = 4;
const AVAIL_NO_INTERRUPT: u16 = 1;

/// Longest chain taken, whatever the queue's size: what an indirect table may hold.
pub const MAX_CHAIN: u32 = 1024;

/// A descriptor as it lies in memory.
struct Descriptor {
    gpa: u64,
    len: u32,
    flags: u16,
    next: u16,
}

impl Descriptor {
    fn read(memory: &GuestMemory, gpa: u64) -> Result<Self, Fault> {
        let mut b = [0; 16];
        memory.read(gpa, &mut b)?;
        let [a0, a1, a2, a3, a4, a5, a6, a7, l0, l1, l2, l3, f0, f1, n0, n1] = b;
        Ok(Self {
            gpa: u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7]),
            len: u32::from_le_bytes([l0, l1, l2, l3]),
            flags: u16::from_le_bytes([f0, f1]),
            next: u16::from_le_bytes([n0, n1]),
        })
    }
}

/// One queue: its registers and positions are all in [`QueueState`].
pub struct Queue {
    pub state: QueueState,
    pub max_size: u16,
    pub event_idx: bool,
    pub indirect: bool,
}

impl Queue {
    pub fn new(state: QueueState, max_size: u16, features: u64) -> Self {
        let mut queue = Self { state, max_size, event_idx: false, indirect: false };
        queue.set_features(features);
        queue
    }

    pub fn set_features(&mut self, features: u64) {
        self.event_idx = features & F_EVENT_IDX != 0;
        self.indirect = features & F_INDIRECT_DESC != 0;
    }

    pub fn reset(&mut self) {
        *self = Self::new(QueueState::cold(self.max_size), self.max_size, 0);
    }

    /// Whether the three rings lie in RAM, aligned as section 2.7 asks.
    pub fn check_rings(state: &QueueState, memory: &GuestMemory) -> Result<(), (&'static str, String)> {
        let size = u64::from(state.size);
        let rings = [
            ("desc_table", state.desc_table, 16 * size, 16),
            ("avail_ring", state.avail_ring, 6 + 2 * size, 2),
            ("used_ring", state.used_ring, 6 + 8 * size, 4),
        ];
        for (name, base, len, align) in rings {
            if base % align != 0 {
                return Err((name, format!("{base:#x} is not aligned to {align} bytes")));
            }
            let Some(end) = base.checked_add(len) else { return Err((name, format!("{base:#x} wraps"))) };
            let mut page = base & !(PAGE_SIZE - 1);
            while page < end {
                if !memory.is_ram(page) {
                    return Err((name, format!("{base:#x}+{len:#x} is not RAM")));
                }
                page += PAGE_SIZE;
            }
        }
        Ok(())
    }

    /// Buffers that the driver has made available and we have not taken.
    pub fn available(&self, memory: &GuestMemory) -> Result<u16, Fault> {
        let index = load_u16(memory, self.state.avail_ring.wrapping_add(2))?;
        let count = index.wrapping_sub(self.state.next_avail);
        if count > self.state.size {
            let (next, size) = (self.state.next_avail, self.state.size);
            return Err(Fault::driver(format!("available index {index} is more than {size} ahead of {next}")));
        }
        Ok(count)
    }

    /// Takes the next chain; false when there is none, and then the driver will notify of the next one.
    pub fn pop(&mut self, memory: &GuestMemory, chain: &mut Chain) -> Result<bool, Fault> {
        if self.available(memory)? == 0 {
            if !self.event_idx {
                return Ok(false); // used.flags is never set: we always want to be told
            }
            let at = self.state.used_ring.wrapping_add(4 + 8 * u64::from(self.state.size));
            store_u16(memory, at, self.state.next_avail)?;
            // The driver publishes its index and then reads the event; we wrote the event and now read the index.
            fence(Ordering::SeqCst);
            if self.available(memory)? == 0 {
                return Ok(false);
            }
        }
        let slot = u64::from(self.state.next_avail % self.state.size);
        let head = load_u16(memory, self.state.avail_ring.wrapping_add(4 + 2 * slot))?;
        self.walk(memory, head, chain)?;
        self.state.next_avail = self.state.next_avail.wrapping_add(1);
        Ok(true)
    }

    fn walk(&self, memory: &GuestMemory, head: u16, chain: &mut Chain) -> Result<(), Fault> {
        chain.clear();
        chain.head = head;
        let (mut table, mut table_len, mut index) = (self.state.desc_table, u32::from(self.state.size), u32::from(head));
        let mut in_table = false;
        let mut left = table_len;
        loop {
            if index >= table_len {
                return Err(Fault::driver(format!("descriptor {index} is outside of a table of {table_len}")));
            }
            let d = Descriptor::read(memory, table.wrapping_add(16 * u64::from(index)))?;
            if d.flags & DESC_INDIRECT != 0 {
                if !self.indirect {
                    return Err(Fault::driver("an indirect descriptor that was not negotiated"));
                }
                if in_table || d.flags & DESC_NEXT != 0 {
                    return Err(Fault::driver("an indirect descriptor in a table or with a next one"));
                }
                if d.len == 0 || d.len % 16 != 0 || d.len / 16 > MAX_CHAIN {
                    return Err(Fault::driver(format!("an indirect table of {} bytes", d.len)));
                }
                (table, table_len, index, in_table) = (d.gpa, d.len / 16, 0, true);
                left = table_len;
                continue;
            }
            left -= 1;
            let list = if d.flags & DESC_WRITE != 0 { &mut chain.writable } else { &mut chain.readable };
            list.push(Segment { gpa: d.gpa, len: d.len });
            if d.flags & DESC_WRITE == 0 && !chain.writable.is_empty() {
                return Err(Fault::driver("a readable descriptor after a writable one"));
            }
            if d.flags & DESC_NEXT == 0 {
                return Ok(());
            }
            if left == 0 {
                return Err(Fault::driver(format!("the chain of descriptor {head} loops")));
            }
            index = u32::from(d.next);
        }
    }

    /// Gives a chain back; `len`: bytes written to its writable part.
    pub fn push(&mut self, memory: &GuestMemory, head: u16, len: u32) -> Result<(), Fault> {
        let slot = u64::from(self.state.next_used % self.state.size);
        let mut element = [0; 8];
        element[..4].copy_from_slice(&u32::from(head).to_le_bytes());
        element[4..].copy_from_slice(&len.to_le_bytes());
        memory.write(self.state.used_ring.wrapping_add(4 + 8 * slot), &element)?;
        self.state.next_used = self.state.next_used.wrapping_add(1);
        store_u16(memory, self.state.used_ring.wrapping_add(2), self.state.next_used)
    }

    /// Whether the driver wants to hear of what was used since the last call (2.7.7 and 2.7.10).
    pub fn take_signal(&mut self, memory: &GuestMemory) -> Result<bool, Fault> {
        let (new, old) = (self.state.next_used, self.state.signalled_used);
        if new == old {
            return Ok(false);
        }
        self.state.signalled_used = new;
        fence(Ordering::SeqCst);
        if self.event_idx {
            let at = self.state.avail_ring.wrapping_add(4 + 2 * u64::from(self.state.size));
            let event = load_u16(memory, at)?;
            return Ok(new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old));
        }
        Ok(load_u16(memory, self.state.avail_ring)? & AVAIL_NO_INTERRUPT == 0)
    }
}
