//! A descriptor chain as two lists of guest ranges, and cursors over them.

use std::sync::atomic::{AtomicU16, Ordering};

use memory::{GuestMemory, PAGE_SIZE};

use crate::Fault;

/// One buffer of a chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    pub gpa: u64,
    pub len: u32,
}

/// What the driver put into the ring under one head. Reused from request to request to spare the allocations.
#[derive(Debug, Default)]
pub struct Chain {
    pub head: u16,
    /// The device reads these, in order.
    pub readable: Vec<Segment>,
    /// The device writes these, in order.
    pub writable: Vec<Segment>,
}

impl Chain {
    pub(crate) fn clear(&mut self) {
        self.readable.clear();
        self.writable.clear();
    }
}

/// Bytes in a list of segments.
pub fn total(segments: &[Segment]) -> u64 {
    segments.iter().map(|s| u64::from(s.len)).sum()
}

/// The part `skip..skip + len` of a list of segments, as (GPA, bytes).
pub fn slice(segments: &[Segment], mut skip: u64, mut len: u64) -> impl Iterator<Item = (u64, u64)> {
    segments.iter().filter_map(move |s| {
        let size = u64::from(s.len);
        if skip >= size {
            skip -= size;
            return None;
        }
        let (at, n) = (s.gpa.wrapping_add(skip), (size - skip).min(len));
        skip = 0;
        len -= n;
        (n > 0).then_some((at, n))
    })
}

/// Copies out of the guest, from `skip` on; gives the number of bytes copied (less than asked for at the end of the list).
pub fn read(memory: &GuestMemory, segments: &[Segment], skip: u64, data: &mut [u8]) -> Result<usize, Fault> {
    let mut done = 0;
    for (gpa, n) in slice(segments, skip, data.len() as u64) {
        memory.read(gpa, &mut data[done..done + n as usize])?;
        done += n as usize;
    }
    Ok(done)
}

/// Copies into the guest, from `skip` on; gives the number of bytes copied.
pub fn write(memory: &GuestMemory, segments: &[Segment], skip: u64, data: &[u8]) -> Result<usize, Fault> {
    let mut done = 0;
    for (gpa, n) in slice(segments, skip, data.len() as u64) {
        memory.write(gpa, &data[done..done + n as usize])?;
        done += n as usize;
    }
    Ok(done)
}

/// Host ranges of the part `skip..skip + len` for `preadv`/`pwritev`. All of it is RAM and loaded.
pub fn iovecs(memory: &GuestMemory, segments: &[Segment], skip: u64, len: u64) -> Result<Vec<libc::iovec>, Fault> {
    slice(segments, skip, len)
        .map(|(gpa, n)| Ok(libc::iovec { iov_base: memory.host_range(gpa, n)?.as_ptr().cast(), iov_len: n as usize }))
        .collect()
}

/// Says that the part `skip..skip + len` was written through [`iovecs`].
pub fn written(memory: &GuestMemory, segments: &[Segment], skip: u64, len: u64) {
    for (gpa, n) in slice(segments, skip, len) {
        memory.written(gpa, n);
    }
}

/// A 16-bit ring field that both sides use at once.
fn field(memory: &GuestMemory, gpa: u64) -> Result<&AtomicU16, Fault> {
    if gpa % 2 != 0 {
        return Err(Fault::driver(format!("ring field {gpa:#x} is not aligned")));
    }
    let page = memory.host_page(gpa)?.ok_or_else(|| Fault::driver(format!("ring field {gpa:#x} is not RAM")))?;
    // SAFETY: the page stays mapped while `memory` lives, the offset is inside it and even; the guest and we only
    // touch this field by 16-bit accesses (the guest's may be plain stores of its own CPU, as on hardware).
    Ok(unsafe { AtomicU16::from_ptr(page.as_ptr().add((gpa % PAGE_SIZE) as usize).cast()) })
}

pub(crate) fn load_u16(memory: &GuestMemory, gpa: u64) -> Result<u16, Fault> {
    Ok(u16::from_le(field(memory, gpa)?.load(Ordering::Acquire)))
}

pub(crate) fn store_u16(memory: &GuestMemory, gpa: u64, value: u16) -> Result<(), Fault> {
    field(memory, gpa)?.store(value.to_le(), Ordering::Release);
    memory.written(gpa, 2);
    Ok(())
}
