//! virtio-blk (virtio 1.2, section 5.2) on a raw image.

use std::time::Instant;

use serde::{Deserialize, Serialize};

use crate::chain::{self, Chain};
use crate::disk::{Disk, SECTOR};
use crate::flush::{Flusher, Flushes, Notify};
use crate::queue::MAX_CHAIN;
use crate::transport::{Queues, VirtioDevice};
use crate::{Fault, StateError};

pub const DEVICE_TYPE: u16 = 2;

const F_SEG_MAX: u64 = 1 << 2;
const F_RO: u64 = 1 << 5;
const F_BLK_SIZE: u64 = 1 << 6;
const F_FLUSH: u64 = 1 << 9;
const F_TOPOLOGY: u64 = 1 << 10;
const F_CONFIG_WCE: u64 = 1 << 11;
const F_MQ: u64 = 1 << 12;
const F_DISCARD: u64 = 1 << 13;
const F_WRITE_ZEROES: u64 = 1 << 14;

const T_IN: u32 = 0;
const T_OUT: u32 = 1;
const T_FLUSH: u32 = 4;
const T_GET_ID: u32 = 8;
const T_DISCARD: u32 = 11;
const T_WRITE_ZEROES: u32 = 13;

const S_OK: u8 = 0;
const S_IOERR: u8 = 1;
const S_UNSUPP: u8 = 2;

const ID_BYTES: usize = 20;
/// Offset of `writeback` in the configuration.
const WRITEBACK: usize = 32;
/// Ranges in one discard or write-zeroes request, and sectors in each.
const MAX_RANGES: u32 = 16;
const MAX_DISCARD_SECTORS: u32 = 1 << 22;
/// Kept small: where the file system has no such operation the zeros are really written.
const MAX_ZERO_SECTORS: u32 = 1 << 16;
/// Bytes in one read or write: far beyond what drivers ask for, and no more than the machine can wait for at a pause.
const MAX_TRANSFER: u64 = 256 << 20;

#[derive(Debug, Clone)]
pub struct BlkConfig {
    pub queues: u16,
    pub queue_size: u16,
    /// What GET_ID answers, at most 20 bytes.
    pub serial: String,
    /// Offer DISCARD and WRITE_ZEROES (CH's `sparse`).
    pub sparse: bool,
}

/// The device's own part of the state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BlkState {
    /// Capacity in sectors of 512 bytes; a restore on another size is refused.
    pub sectors: u64,
    pub writeback: bool,
    pub serial: String,
}

/// Operations and bytes since the device was made; latencies in microseconds.
#[derive(Debug, Clone, Copy, Default)]
pub struct Counters {
    pub read: OpCounters,
    pub write: OpCounters,
    pub errors: u64,
}

#[derive(Debug, Clone, Copy, Default)]
pub struct OpCounters {
    pub ops: u64,
    pub bytes: u64,
    pub latency_sum: u64,
    pub latency_min: u64,
    pub latency_max: u64,
}

impl OpCounters {
    fn count(&mut self, bytes: u64, started: Instant) {
        let latency = started.elapsed().as_micros() as u64;
        self.latency_min = if self.ops == 0 { latency } else { self.latency_min.min(latency) };
        self.latency_max = self.latency_max.max(latency);
        self.latency_sum += latency;
        self.ops += 1;
        self.bytes += bytes;
    }

    pub fn latency_avg(&self) -> u64 {
        self.latency_sum.checked_div(self.ops).unwrap_or(0)
    }
}

pub struct Blk {
    pub disk: Disk,
    pub counters: Counters,
    sizes: Vec<u16>,
    features: u64,
    accepted: u64,
    serial: String,
    sectors: u64,
    config: [u8; 60],
    chain: Chain,
    flusher: Option<Flusher>,
    flushing: Vec<Flushing>,
}

/// A flush that goes on elsewhere.
struct Flushing {
    ticket: u64,
    queue: usize,
    head: u16,
    /// Where its status byte goes.
    status: u64,
}

/// What became of a request.
enum Outcome {
    /// Bytes written into its writable part.
    Done(u32),
    Later,
}

impl Blk {
    /// `state`: none makes a cold device. The disk's size rounded down to sectors is its capacity.
    pub fn from_state(disk: Disk, config: &BlkConfig, state: Option<&BlkState>) -> Result<Self, StateError> {
        let sectors = disk.size() / SECTOR;
        if let Some(state) = state.filter(|s| s.sectors != sectors) {
            let why = format!("the disk had {} sectors of 512 bytes and has {sectors} now", state.sectors);
            return Err(StateError::new("sectors", why));
        }
        let serial = state.map_or(&config.serial, |s| &s.serial).clone();
        if serial.len() > ID_BYTES {
            return Err(StateError::new("serial", format!("{serial:?} is longer than {ID_BYTES} bytes")));
        }
        let mut features = F_SEG_MAX | F_BLK_SIZE | F_FLUSH | F_TOPOLOGY | F_CONFIG_WCE;
        if disk.read_only() {
            features |= F_RO;
        } else if config.sparse {
            features |= F_DISCARD | F_WRITE_ZEROES;
        }
        if config.queues > 1 {
            features |= F_MQ;
        }
        let mut image = [0; 60];
        let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
        // Two descriptors of a chain are the header and the status.
        let seg_max = (u32::from(config.queue_size).max(3) - 2).min(MAX_CHAIN - 2);
        put(0, &sectors.to_le_bytes());
        put(12, &seg_max.to_le_bytes());
        put(20, &(SECTOR as u32).to_le_bytes());
        put(26, &1u16.to_le_bytes()); // min_io_size, in blocks
        put(WRITEBACK, &[u8::from(state.is_none_or(|s| s.writeback))]);
        put(34, &config.queues.to_le_bytes());
        put(36, &MAX_DISCARD_SECTORS.to_le_bytes());
        put(40, &MAX_RANGES.to_le_bytes());
        put(44, &1u32.to_le_bytes()); // discard_sector_alignment
        put(48, &MAX_ZERO_SECTORS.to_le_bytes());
        put(52, &MAX_RANGES.to_le_bytes());
        put(56, &[1]); // write_zeroes_may_unmap
        Ok(Self {
            disk,
            counters: Counters::default(),
            sizes: vec![config.queue_size; usize::from(config.queues)],
            features,
            accepted: 0,
            serial,
            sectors,
            config: image,
            chain: Chain::default(),
            flusher: None,
            flushing: Vec::new(),
        })
    }

    /// Flushes on a thread of its own from now on; `notify` is to bring about a [`VirtioDevice::complete`].
    pub fn flush_elsewhere(&mut self, notify: Notify) -> std::io::Result<()> {
        self.flusher = Some(Flusher::new(self.disk.file()?, notify)?);
        Ok(())
    }

    /// To wait for, without the transport's lock.
    pub fn flushes(&self) -> Option<Flushes> {
        self.flusher.as_ref().map(Flusher::flushes)
    }

    pub fn state(&self) -> BlkState {
        BlkState { sectors: self.sectors, writeback: self.config[WRITEBACK] != 0, serial: self.serial.clone() }
    }

    /// Whether each write must be on the medium before it is answered: the driver switched the cache to write-through, or has
    /// no way to flush (5.2.6.2).
    fn write_through(&self) -> bool {
        let switched = self.accepted & F_CONFIG_WCE != 0 && self.config[WRITEBACK] == 0;
        switched || self.accepted & (F_FLUSH | F_CONFIG_WCE) == 0
    }

    /// Answers one request.
    fn request(&mut self, queue: usize, queues: &Queues<'_>, chain: &Chain) -> Result<Outcome, Fault> {
        let memory = queues.memory;
        let (input, output) = (chain::total(&chain.readable), chain::total(&chain.writable));
        if input < 16 || output < 1 || input.max(output) > u64::from(u32::MAX) {
            return Err(Fault::driver(format!("a block request of {input} readable and {output} writable bytes")));
        }
        let mut header = [0; 16];
        chain::read(memory, &chain.readable, 0, &mut header)?;
        let [k0, k1, k2, k3, _, _, _, _, s0, s1, s2, s3, s4, s5, s6, s7] = header;
        let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
        let (sent, room) = (input - 16, output - 1);
        let (status, filled) = match u32::from_le_bytes([k0, k1, k2, k3]) {
            T_IN => self.read(queues, chain, sector, room)?,
            T_OUT => (self.write(queues, chain, sector, sent)?, 0),
            T_FLUSH => {
                if let (Some(flusher), false) = (&mut self.flusher, self.disk.read_only())
                    && let Some((status, _)) = chain::slice(&chain.writable, room, 1).next()
                {
                    self.flushing.push(Flushing { ticket: flusher.start(), queue, head: chain.head, status });
                    return Ok(Outcome::Later);
                }
                (self.status(self.disk.flush()), 0)
            }
            T_GET_ID => {
                let mut id = [0; ID_BYTES];
                id[..self.serial.len()].copy_from_slice(self.serial.as_bytes());
                let n = room.min(ID_BYTES as u64) as usize;
                chain::write(memory, &chain.writable, 0, &id[..n])?;
                (S_OK, n as u64)
            }
            kind @ (T_DISCARD | T_WRITE_ZEROES) => (self.ranges(queues, chain, kind, sent)?, 0),
            _ => (S_UNSUPP, 0),
        };
        chain::write(memory, &chain.writable, room, &[status])?;
        // With the status behind it, all before counts as written (2.7.8.2 wants no more than that).
        Ok(Outcome::Done(if filled == room { output } else { filled.max(1) } as u32))
    }

    fn status(&mut self, result: std::io::Result<()>) -> u8 {
        match result {
            Ok(()) => S_OK,
            Err(_) => {
                self.counters.errors += 1;
                S_IOERR
            }
        }
    }

    /// The byte offset of a range that lies on the disk.
    fn offset(&self, sector: u64, len: u64) -> Option<u64> {
        let sectors = len / SECTOR;
        let inside = len % SECTOR == 0 && sector.checked_add(sectors).is_some_and(|end| end <= self.sectors);
        inside.then(|| sector * SECTOR)
    }

    fn read(&mut self, queues: &Queues<'_>, chain: &Chain, sector: u64, len: u64) -> Result<(u8, u64), Fault> {
        let Some(offset) = self.offset(sector, len).filter(|_| len <= MAX_TRANSFER) else { return Ok((S_IOERR, 0)) };
        let started = Instant::now();
        let mut ranges = chain::iovecs(queues.memory, &chain.writable, 0, len)?;
        let result = self.disk.read(&mut ranges, offset);
        // Also after an error: part of it may have been filled.
        chain::written(queues.memory, &chain.writable, 0, len);
        let good = result.is_ok();
        if good {
            self.counters.read.count(len, started);
        }
        Ok((self.status(result), if good { len } else { 0 }))
    }

    fn write(&mut self, queues: &Queues<'_>, chain: &Chain, sector: u64, len: u64) -> Result<u8, Fault> {
        let fits = len <= MAX_TRANSFER && !self.disk.read_only();
        let Some(offset) = self.offset(sector, len).filter(|_| fits) else { return Ok(S_IOERR) };
        let started = Instant::now();
        let mut ranges = chain::iovecs(queues.memory, &chain.readable, 16, len)?;
        let mut result = self.disk.write(&mut ranges, offset);
        if result.is_ok() && self.write_through() {
            result = self.disk.flush();
        }
        if result.is_ok() {
            self.counters.write.count(len, started);
        }
        Ok(self.status(result))
    }

    /// DISCARD and WRITE_ZEROES: all ranges are checked before the first is touched.
    fn ranges(&mut self, queues: &Queues<'_>, chain: &Chain, kind: u32, len: u64) -> Result<u8, Fault> {
        let (feature, max_sectors, flags_known) = match kind {
            T_DISCARD => (F_DISCARD, MAX_DISCARD_SECTORS, 0),
            _ => (F_WRITE_ZEROES, MAX_ZERO_SECTORS, 1),
        };
        if self.accepted & feature == 0 {
            return Ok(S_UNSUPP);
        }
        if len == 0 || len % 16 != 0 || len / 16 > u64::from(MAX_RANGES) {
            return Ok(S_IOERR);
        }
        let mut list = Vec::with_capacity((len / 16) as usize);
        for i in 0..len / 16 {
            let mut b = [0; 16];
            chain::read(queues.memory, &chain.readable, 16 + 16 * i, &mut b)?;
            let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, f0, f1, f2, f3] = b;
            let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
            let (count, flags) = (u32::from_le_bytes([n0, n1, n2, n3]), u32::from_le_bytes([f0, f1, f2, f3]));
            if flags & !flags_known != 0 {
                return Ok(S_UNSUPP);
            }
            let bytes = u64::from(count) * SECTOR;
            let Some(offset) = self.offset(sector, bytes).filter(|_| count <= max_sectors) else { return Ok(S_IOERR) };
            list.push((offset, bytes, flags & 1 != 0));
        }
        for (offset, bytes, free) in list.into_iter().filter(|r| r.1 > 0) {
            let result = match kind {
                T_DISCARD => self.disk.discard(offset, bytes),
                _ => self.disk.write_zeroes(offset, bytes, free),
            };
            let status = self.status(result);
            if status != S_OK {
                return Ok(status);
            }
        }
        let result = if self.write_through() { self.disk.flush() } else { Ok(()) };
        Ok(self.status(result))
    }
}

impl VirtioDevice for Blk {
    fn features(&self) -> u64 {
        self.features
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.sizes
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn write_config(&mut self, offset: usize, data: &[u8]) {
        if offset == WRITEBACK && data.len() == 1 && data[0] <= 1 && self.accepted & F_CONFIG_WCE != 0 {
            self.config[WRITEBACK] = data[0];
        }
    }

    fn activate(&mut self, features: u64) {
        self.accepted = features;
    }

    fn reset(&mut self) {
        self.flushing.clear(); // their tickets mean nothing any more when they end
        self.accepted = 0;
        self.config[WRITEBACK] = 1;
    }

    fn process(&mut self, queue: usize, queues: &mut Queues<'_>) -> Result<(), Fault> {
        let mut chain = std::mem::take(&mut self.chain);
        let mut pass = || -> Result<(), Fault> {
            while queues.pop(queue, &mut chain)? {
                if let Outcome::Done(written) = self.request(queue, queues, &chain)? {
                    queues.push(queue, chain.head, written)?;
                }
            }
            Ok(())
        };
        let result = pass();
        self.chain = chain;
        result
    }

    fn complete(&mut self, queues: &mut Queues<'_>) -> Result<(), Fault> {
        let Some(flusher) = &self.flusher else { return Ok(()) };
        for (ticket, worked) in flusher.finished() {
            let Some(at) = self.flushing.iter().position(|f| f.ticket == ticket) else { continue };
            let flush = self.flushing.swap_remove(at);
            let worked = worked && !self.disk.take_lost();
            self.counters.errors += u64::from(!worked);
            queues.memory.write(flush.status, &[if worked { S_OK } else { S_IOERR }])?;
            queues.push(flush.queue, flush.head, 1)?;
        }
        Ok(())
    }
}
