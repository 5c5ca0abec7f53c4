//! Every access of the CPU to memory: segment and page translation, the TLB's fast paths, what happens off them.

use memory::PAGE_SIZE;
use vcpu::Space;

use crate::core::{AC, Core, Exception, GP, PF, Pending};
use crate::insn::{AddrSize, Fault, Insn};
use crate::state::{CodeSize, Cpu, GPR_BLOCK, Segment, flags};
use crate::tlb::{self, EXEC, GLOBAL, HUGE, LARGE, Tlb};

const OFFSET: u64 = PAGE_SIZE - 1;

const P: u64 = 1;
const W: u64 = 1 << 1;
const U: u64 = 1 << 2;
const A: u64 = 1 << 5;
const D: u64 = 1 << 6;
const PS: u64 = 1 << 7;
const G: u64 = 1 << 8;
const NX: u64 = 1 << 63;

const CR0_WP: u64 = 1 << 16;
const CR4_PSE: u64 = 1 << 4;
const CR4_PAE: u64 = 1 << 5;
const CR4_PGE: u64 = 1 << 7;
const CR4_SMEP: u64 = 1 << 20;
const CR4_SMAP: u64 = 1 << 21;
const CR4_PKE: u64 = 1 << 22;
const CR4_PKS: u64 = 1 << 24;
const EFER_NXE: u64 = 1 << 11;

/// Outside 64-bit code: a linear address with this bit stands for one that its segment forbids. It is in no TLB entry, so that
/// the access comes to [`Core::translate`], which raises #GP (#SS for the stack).
const FORBIDDEN: u64 = 1 << 63;

/// What an access wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Read,
    Write,
    Fetch,
}

/// Who asks. `System` accesses (descriptor tables, TSS, interrupt frames) have supervisor rights at any CPL and ignore AC.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rights {
    Current,
    System,
}

/// A page's translation.
#[derive(Debug, Clone, Copy)]
struct Page {
    phys: u64,
    user: bool,
    exec: bool,
    global: bool,
    /// [`LARGE`] or [`HUGE`] or neither.
    size: u64,
}

/// An unsigned integer that memory accesses are made of.
pub trait Data: Copy {
    const SIZE: u64;
    fn wide(self) -> u128;
    fn narrow(v: u128) -> Self;
}

macro_rules! data {
    ($($t:ty)*) => { $(impl Data for $t {
        const SIZE: u64 = size_of::<$t>() as u64;
        #[inline(always)]
        fn wide(self) -> u128 { self as u128 }
        #[inline(always)]
        fn narrow(v: u128) -> Self { v as $t }
    })* };
}
data!(u8 u16 u32 u64 u128);

/// The sizes by name, for handlers that have one.
impl Core {
    #[inline(always)]
    pub fn load8(&mut self, lin: u64) -> Result<u8, Fault> {
        self.load(lin)
    }
    #[inline(always)]
    pub fn load16(&mut self, lin: u64) -> Result<u16, Fault> {
        self.load(lin)
    }
    #[inline(always)]
    pub fn load32(&mut self, lin: u64) -> Result<u32, Fault> {
        self.load(lin)
    }
    #[inline(always)]
    pub fn load64(&mut self, lin: u64) -> Result<u64, Fault> {
        self.load(lin)
    }
    #[inline(always)]
    pub fn load128(&mut self, lin: u64) -> Result<u128, Fault> {
        self.load(lin)
    }
    #[inline(always)]
    pub fn store8(&mut self, lin: u64, v: u8) -> Result<(), Fault> {
        self.store(lin, v)
    }
    #[inline(always)]
    pub fn store16(&mut self, lin: u64, v: u16) -> Result<(), Fault> {
        self.store(lin, v)
    }
    #[inline(always)]
    pub fn store32(&mut self, lin: u64, v: u32) -> Result<(), Fault> {
        self.store(lin, v)
    }
    #[inline(always)]
    pub fn store64(&mut self, lin: u64, v: u64) -> Result<(), Fault> {
        self.store(lin, v)
    }
    #[inline(always)]
    pub fn store128(&mut self, lin: u64, v: u128) -> Result<(), Fault> {
        self.store(lin, v)
    }
}

impl Core {
    /// Linear address of the instruction's memory operand, segment base included.
    #[inline(always)]
    pub fn ea(&self, i: &Insn) -> u64 {
        let offset = self.offset(i);
        let seg = self.cpu.seg_base[usize::from(i.seg & 7)];
        if i.asize == AddrSize::A64 { offset.wrapping_add(seg) } else { self.narrow_ea(i, offset, seg) }
    }

    /// `base + index * scale + disp`, not cut to the address size.
    #[inline(always)]
    pub fn offset(&self, i: &Insn) -> u64 {
        let gpr = &self.cpu.gpr;
        gpr[usize::from(i.base & 31)].wrapping_add(gpr[usize::from(i.index & 31)] << (i.shift & 3)).wrapping_add(i.disp as u64)
    }

    #[inline(never)]
    fn narrow_ea(&self, i: &Insn, offset: u64, base: u64) -> u64 {
        let offset = if i.asize == AddrSize::A16 { offset & 0xffff } else { offset & 0xffff_ffff };
        if self.cpu.code_size == CodeSize::Bits64 {
            return base.wrapping_add(offset);
        }
        // `Insn::shift` says what the access is outside 64-bit code.
        let len = if i.shift >> 4 == 0 { 1 } else { 1 << ((i.shift >> 4) - 1) };
        self.segmented(usize::from(i.seg), offset, len, i.shift & 8 != 0)
    }

    /// Linear address of `len` bytes at `offset` of segment `seg` (as [`Insn::seg`] has it) in any mode.
    #[inline(always)]
    pub fn address(&self, seg: usize, offset: u64, len: u64, write: bool) -> u64 {
        if self.cpu.code_size == CodeSize::Bits64 {
            return self.cpu.seg_base[seg & 7].wrapping_add(offset);
        }
        self.segmented(seg, offset, len, write)
    }

    /// Linear address of `len` bytes at `offset` of a segment outside 64-bit code. What the segment forbids becomes an address
    /// that no access survives: see [`FORBIDDEN`].
    pub fn segmented(&self, seg: usize, offset: u64, len: u64, write: bool) -> u64 {
        let s = &self.cpu.seg[seg % 6];
        // Writable data, expanding up, 4 GiB: nothing to check.
        let flat = s.limit == u32::MAX && s.attr & (Segment::UNUSABLE | 0xe) == 2;
        if flat || self.permits(s, offset, len, write) {
            return s.base.wrapping_add(offset) & 0xffff_ffff;
        }
        FORBIDDEN | offset
    }

    fn permits(&self, s: &Segment, offset: u64, len: u64, write: bool) -> bool {
        if self.cpu.protected() && !self.cpu.v8086() {
            let (code, bit1) = (s.type_() & 8 != 0, s.type_() & 2 != 0);
            // Code is never written and read only when readable; data is written only when writable.
            let right = if code { !write && bit1 } else { !write || bit1 };
            if s.attr & Segment::UNUSABLE != 0 || !right {
                return false;
            }
        }
        s.holds(offset, len)
    }

    /// `base + offset`, cut to 32 bits outside 64-bit code.
    #[inline(always)]
    pub fn linear(&self, base: u64, offset: u64) -> u64 {
        let lin = base.wrapping_add(offset);
        if self.cpu.code_size == CodeSize::Bits64 { lin } else { lin & 0xffff_ffff }
    }

    #[inline(always)]
    pub fn load<T: Data>(&mut self, lin: u64) -> Result<T, Fault> {
        let e = self.tlb.entry(Tlb::index(lin, self.half));
        let offset = lin ^ e.tag_r;
        if offset <= PAGE_SIZE - T::SIZE {
            // SAFETY: a TLB hit means that `host` is the page's host address and the access stays inside the page.
            return Ok(unsafe { ((e.host + offset as usize) as *const T).read_unaligned() });
        }
        self.load_slow(lin, T::SIZE, Rights::Current).map(T::narrow)
    }

    #[inline(always)]
    pub fn store<T: Data>(&mut self, lin: u64, v: T) -> Result<(), Fault> {
        let e = self.tlb.entry(Tlb::index(lin, self.half));
        let offset = lin ^ e.tag_w;
        if offset <= PAGE_SIZE - T::SIZE {
            // SAFETY: as in `load`; a write tag also means that the page may be written without telling anybody.
            unsafe { ((e.host + offset as usize) as *mut T).write_unaligned(v) };
            return Ok(());
        }
        self.store_slow(lin, T::SIZE, v.wide(), Rights::Current)
    }

    /// Read, compute, write back. Faults as a write, before `f` is called; cannot fault after.
    #[inline(always)]
    pub fn modify<T: Data, R>(&mut self, lin: u64, f: impl FnOnce(T) -> (T, R)) -> Result<R, Fault> {
        let e = self.tlb.entry(Tlb::index(lin, self.half));
        let offset = lin ^ e.tag_w;
        if offset <= PAGE_SIZE - T::SIZE {
            let host = (e.host + offset as usize) as *mut T;
            // SAFETY: as in `store`; who may be written may be read.
            let (v, r) = f(unsafe { host.read_unaligned() });
            // SAFETY: as above.
            unsafe { host.write_unaligned(v) };
            return Ok(r);
        }
        if self.aligned {
            self.check_alignment(lin, T::SIZE, Rights::Current)?;
        }
        self.probe_write(lin, T::SIZE)?;
        let old = self.load_slow(lin, T::SIZE, Rights::Current)?;
        let (v, r) = f(T::narrow(old));
        self.store_slow(lin, T::SIZE, v.wide(), Rights::Current)?;
        Ok(r)
    }

    /// Host address of `lin` when the TLB says that the rest of its page may be read as plain RAM.
    #[inline]
    pub(crate) fn plain_read(&mut self, lin: u64) -> Option<*const u8> {
        let e = self.tlb.entry(Tlb::index(lin, self.half));
        let offset = lin ^ e.tag_r;
        (offset < PAGE_SIZE).then(|| (e.host + offset as usize) as *const u8)
    }

    /// As [`Core::plain_read`] for writing.
    #[inline]
    pub(crate) fn plain_write(&mut self, lin: u64) -> Option<*mut u8> {
        let e = self.tlb.entry(Tlb::index(lin, self.half));
        let offset = lin ^ e.tag_w;
        (offset < PAGE_SIZE).then(|| (e.host + offset as usize) as *mut u8)
    }

    /// Host address of `lin` for writing `len` bytes of one page that holds decoded code, which dies at the end of the instruction:
    /// clearing a recycled page costs one round of the loop instead of one for each element. Not the page of the instruction `i`
    /// itself: the element that changes it must be its last.
    #[cold]
    pub(crate) fn code_write(&mut self, i: &Insn, lin: u64, len: u64) -> Option<*mut u8> {
        if self.aligned {
            // What is not aligned faults before the page is looked up, which marks it as written.
            return None;
        }
        let phys = match self.translate(lin, Kind::Write, Rights::Current) {
            Ok(phys) => phys,
            Err(Fault) => {
                // The store itself says what is wrong.
                self.fault = None;
                return None;
            }
        };
        let special = phys & !OFFSET == self.lapic_page || self.breakpoints.data;
        if special || !self.shared.memory.is_code(phys) {
            return None;
        }
        let own = self.cpu.gpr[usize::from(GPR_BLOCK)].wrapping_add(i.off.into());
        for at in [own, own.wrapping_add(u64::from(i.len) - 1)] {
            let at = self.linear(self.fetch_base, at);
            if self.peek(at).is_none_or(|own| own & !OFFSET == phys & !OFFSET) {
                return None;
            }
        }
        let host = self.shared.memory.host_page(phys).ok()??;
        self.shared.memory.mark_dirty(phys);
        self.code_written.push((phys, len));
        self.leave();
        Some((host.as_ptr() as usize + (phys & OFFSET) as usize) as *mut u8)
    }

    /// Faults where a store of `len` bytes would; changes nothing but A and D bits.
    pub fn probe_write(&mut self, lin: u64, len: u64) -> Result<(), Fault> {
        if self.aligned {
            self.check_alignment(lin, len, Rights::Current)?;
        }
        self.probe(lin, len, Kind::Write, Rights::Current)
    }

    /// Faults where a load of `len` bytes would.
    pub fn probe_read(&mut self, lin: u64, len: u64) -> Result<(), Fault> {
        self.probe(lin, len, Kind::Read, Rights::Current)
    }

    fn probe(&mut self, lin: u64, len: u64, kind: Kind, rights: Rights) -> Result<(), Fault> {
        self.canonical_end(lin, len.max(1))?;
        let mut at = lin;
        let last = self.wrap(lin.wrapping_add(len.max(1) - 1));
        loop {
            self.translate(at, kind, rights)?;
            if at & !OFFSET == last & !OFFSET {
                return Ok(());
            }
            at = self.wrap((at & !OFFSET).wrapping_add(PAGE_SIZE));
        }
    }

    /// Reads `data.len()` bytes with the rights of the current CPL.
    pub fn load_bytes(&mut self, lin: u64, data: &mut [u8]) -> Result<(), Fault> {
        if self.aligned {
            self.check_alignment(lin, data.len() as u64, Rights::Current)?;
        }
        for (n, chunk) in data.chunks_mut(16).enumerate() {
            let at = self.wrap(lin.wrapping_add(16 * n as u64));
            let v = self.load_piece(at, chunk.len() as u64, Rights::Current)?;
            chunk.copy_from_slice(&v.to_le_bytes()[..chunk.len()]);
        }
        Ok(())
    }

    /// Writes `data` with the rights of the current CPL; everything is probed before the first byte is written.
    pub fn store_bytes(&mut self, lin: u64, data: &[u8]) -> Result<(), Fault> {
        self.probe_write(lin, data.len() as u64)?;
        for (n, chunk) in data.chunks(16).enumerate() {
            let mut bytes = [0; 16];
            bytes[..chunk.len()].copy_from_slice(chunk);
            let at = self.wrap(lin.wrapping_add(16 * n as u64));
            self.store_piece(at, chunk.len() as u64, u128::from_le_bytes(bytes), Rights::Current)?;
        }
        Ok(())
    }

    /// Reads with supervisor rights whatever CPL is: descriptor tables, TSS.
    pub fn read_system<T: Data>(&mut self, lin: u64) -> Result<T, Fault> {
        self.load_slow(self.wrap(lin), T::SIZE, Rights::System).map(T::narrow)
    }

    /// Writes with supervisor rights whatever CPL is: accessed and busy bits, interrupt frames.
    pub fn write_system<T: Data>(&mut self, lin: u64, v: T) -> Result<(), Fault> {
        self.store_slow(self.wrap(lin), T::SIZE, v.wide(), Rights::System)
    }

    /// Faults where `write_system` of `len` bytes would.
    pub fn probe_system_write(&mut self, lin: u64, len: u64) -> Result<(), Fault> {
        self.probe(self.wrap(lin), len, Kind::Write, Rights::System)
    }

    /// An operand whose last byte is not at a canonical address faults for that before any page is looked up.
    fn canonical_end(&mut self, lin: u64, len: u64) -> Result<(), Fault> {
        let end = lin.wrapping_add(len - 1);
        if self.cpu.long_mode() && (end as i64) << 16 >> 16 != end as i64 {
            self.noncanonical = true;
            return Err(self.raise(GP, Some(0)));
        }
        Ok(())
    }

    /// Linear addresses have 32 bits unless long mode is active.
    #[inline(always)]
    fn wrap(&self, lin: u64) -> u64 {
        if self.cpu.long_mode() { lin } else { lin & (FORBIDDEN | 0xffff_ffff) }
    }

    #[cold]
    #[inline(never)]
    fn load_slow(&mut self, lin: u64, len: u64, rights: Rights) -> Result<u128, Fault> {
        if self.aligned {
            self.check_alignment(lin, len, rights)?;
        }
        self.load_piece(lin, len, rights)
    }

    /// All or a part of an operand whose alignment has been looked at.
    fn load_piece(&mut self, lin: u64, len: u64, rights: Rights) -> Result<u128, Fault> {
        let value = self.load_unwatched(lin, len, rights)?;
        if self.breakpoints.data {
            self.watch_access(lin, len, false);
        }
        Ok(value)
    }

    /// #AC for an operand of ring 3 that is not aligned to its size.
    #[cold]
    fn check_alignment(&mut self, lin: u64, len: u64, rights: Rights) -> Result<(), Fault> {
        let alignment = match len {
            2 | 4 | 8 | 16 => len,
            10 => 8,
            // x87 environments and states of 16 and 32 bits.
            14 | 94 => 2,
            28 | 108 => 4,
            _ => 1,
        };
        if rights == Rights::Current && lin & (alignment - 1) != 0 {
            self.canonical_end(lin, 1)?;
            self.canonical_end(lin, len)?;
            return Err(self.raise(AC, Some(0)));
        }
        Ok(())
    }

    fn load_unwatched(&mut self, lin: u64, len: u64, rights: Rights) -> Result<u128, Fault> {
        let first = PAGE_SIZE - (lin & OFFSET);
        if len <= first {
            let phys = self.translate(lin, Kind::Read, rights)?;
            return self.phys_load(phys, len);
        }
        self.canonical_end(lin, len)?;
        let a = self.translate(lin, Kind::Read, rights)?;
        let b = self.translate(self.wrap(lin.wrapping_add(first)), Kind::Read, rights)?;
        let low = self.phys_load(a, first)?;
        let high = self.phys_load(b, len - first)?;
        Ok(low | high << (8 * first))
    }

    #[cold]
    #[inline(never)]
    fn store_slow(&mut self, lin: u64, len: u64, v: u128, rights: Rights) -> Result<(), Fault> {
        if self.aligned {
            self.check_alignment(lin, len, rights)?;
        }
        self.store_piece(lin, len, v, rights)
    }

    /// As `load_piece`.
    fn store_piece(&mut self, lin: u64, len: u64, v: u128, rights: Rights) -> Result<(), Fault> {
        self.store_unwatched(lin, len, v, rights)?;
        if self.breakpoints.data {
            self.watch_access(lin, len, true);
        }
        Ok(())
    }

    fn store_unwatched(&mut self, lin: u64, len: u64, v: u128, rights: Rights) -> Result<(), Fault> {
        let first = PAGE_SIZE - (lin & OFFSET);
        if len <= first {
            let phys = self.translate(lin, Kind::Write, rights)?;
            return self.phys_store(phys, len, v);
        }
        self.canonical_end(lin, len)?;
        let a = self.translate(lin, Kind::Write, rights)?;
        let b = self.translate(self.wrap(lin.wrapping_add(first)), Kind::Write, rights)?;
        // Damaged memory must stop the store before its first byte, and so must a device that wants to know the time.
        if self.host(b)?.is_none() || b & !OFFSET == self.lapic_page {
            self.at_known_count()?;
        }
        self.phys_store(a, first, v & ((1 << (8 * first)) - 1))?;
        self.phys_store(b, len - first, v >> (8 * first))
    }

    /// Host address of the page, `None` when it is not RAM.
    fn host(&mut self, phys: u64) -> Result<Option<usize>, Fault> {
        match self.shared.memory.host_page(phys) {
            Ok(page) => Ok(page.map(|p| p.as_ptr() as usize)),
            Err(error) => {
                self.fault = Some(Pending::Memory(error));
                Err(Fault)
            }
        }
    }

    /// Reads up to 16 bytes inside one page of physical memory.
    fn phys_load(&mut self, phys: u64, len: u64) -> Result<u128, Fault> {
        let mut bytes = [0u8; 16];
        if phys & !OFFSET != self.lapic_page {
            if let Some(host) = self.host(phys)? {
                let from = (host + (phys & OFFSET) as usize) as *const u8;
                // SAFETY: `host` is a whole mapped page and the caller keeps `len` inside it.
                unsafe { std::ptr::copy_nonoverlapping(from, bytes.as_mut_ptr(), len as usize) };
                return Ok(u128::from_le_bytes(bytes));
            }
        }
        self.at_known_count()?;
        self.leave();
        let mut done = 0;
        while done < len {
            let n = mmio_width(len - done);
            let part = &mut bytes[done as usize..(done + n) as usize];
            if phys & !OFFSET == self.lapic_page {
                let v = self.lapic_read((phys + done) & OFFSET, n as u8);
                part.copy_from_slice(&v.to_le_bytes()[..n as usize]);
            } else {
                self.shared.bus.read(Space::Mmio, phys + done, part);
            }
            done += n;
        }
        Ok(u128::from_le_bytes(bytes))
    }

    /// Writes up to 16 bytes inside one page of physical memory.
    fn phys_store(&mut self, phys: u64, len: u64, v: u128) -> Result<(), Fault> {
        let bytes = v.to_le_bytes();
        if phys & !OFFSET != self.lapic_page {
            if let Some(host) = self.host(phys)? {
                let to = (host + (phys & OFFSET) as usize) as *mut u8;
                // SAFETY: `host` is a whole mapped page and the caller keeps `len` inside it.
                unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, len as usize) };
                self.shared.memory.mark_dirty(phys);
                if self.shared.memory.is_code(phys) {
                    self.code_written.push((phys, len));
                    self.leave();
                }
                return Ok(());
            }
        }
        self.at_known_count()?;
        self.leave();
        let mut done = 0;
        while done < len {
            let n = mmio_width(len - done);
            let part = &bytes[done as usize..(done + n) as usize];
            if phys & !OFFSET == self.lapic_page {
                let mut word = [0; 8];
                word[..n as usize].copy_from_slice(part);
                self.lapic_write((phys + done) & OFFSET, n as u8, u64::from_le_bytes(word));
            } else {
                self.shared.bus.write(Space::Mmio, phys + done, part);
            }
            done += n;
        }
        Ok(())
    }

    /// Physical address of `lin`, checked for one access; fills the TLB where it may.
    pub(crate) fn translate(&mut self, lin: u64, kind: Kind, rights: Rights) -> Result<u64, Fault> {
        let user = rights == Rights::Current && self.cpu.cpl == 3;
        let half = if user { tlb::USER } else { 0 };
        let page = lin & !OFFSET;
        let e = self.tlb.entry(Tlb::index(lin, half));
        let hit = match kind {
            Kind::Read => e.tag_r == page,
            Kind::Write => e.tag_w == page,
            Kind::Fetch => e.tag_r == page && e.phys & EXEC != 0,
        };
        if hit {
            return Ok(e.phys & !OFFSET | lin & OFFSET);
        }
        if lin & FORBIDDEN != 0 && !self.cpu.long_mode() {
            self.noncanonical = true;
            return Err(self.raise(GP, Some(0)));
        }
        let found = self.walk(lin, kind, user, rights)?;
        let phys = found.phys & !OFFSET | lin & OFFSET;
        // With SMAP the right to touch a user page changes with AC, so such a translation is never kept.
        let watched = self.breakpoints.data && self.watched_page(lin);
        let keep = !(watched || user && self.aligned)
            && phys & !OFFSET != self.lapic_page
            && !(found.user && !user && self.cpu.cr4 & CR4_SMAP != 0);
        if keep {
            if let Some(host) = self.host(phys)? {
                let write = kind == Kind::Write && !self.shared.memory.is_code(phys);
                if kind == Kind::Write {
                    self.shared.memory.mark_dirty(phys);
                }
                let bits = if found.exec { EXEC } else { 0 } | if found.global { GLOBAL } else { 0 } | found.size;
                self.tlb.fill(lin, half, host, phys & !OFFSET, bits, write);
            }
        }
        Ok(phys)
    }

    /// Translation for INT, debuggers and tests: no rights, no A bits; `None` where nothing is mapped.
    pub fn peek(&mut self, lin: u64) -> Option<u64> {
        let kept = self.fault.take();
        let found = self.walk_with(lin, Kind::Read, false, Rights::System, false).ok();
        self.fault = kept;
        found.map(|p| p.phys & !OFFSET | lin & OFFSET)
    }

    fn walk(&mut self, lin: u64, kind: Kind, user: bool, rights: Rights) -> Result<Page, Fault> {
        self.walk_with(lin, kind, user, rights, true)
    }

    #[cold]
    fn page_fault(&mut self, lin: u64, kind: Kind, user: bool, present: bool, reserved: bool) -> Fault {
        let fetch_bit = self.cpu.efer & EFER_NXE != 0 || self.cpu.cr4 & CR4_SMEP != 0;
        let error = u32::from(present)
            | u32::from(kind == Kind::Write) << 1
            | u32::from(user) << 2
            | u32::from(reserved) << 3
            | u32::from(kind == Kind::Fetch && fetch_bit) << 4;
        self.fault = Some(Pending::Exception(Exception { vector: PF, error: Some(error), cr2: lin }));
        Fault
    }

    fn walk_with(&mut self, lin: u64, kind: Kind, user: bool, rights: Rights, mark: bool) -> Result<Page, Fault> {
        if !self.cpu.paging() {
            let phys = lin & ((1 << self.shared.phys_bits) - 1);
            return Ok(Page { phys, user: false, exec: true, global: false, size: 0 });
        }
        let nxe = self.cpu.efer & EFER_NXE != 0;
        let (mut table, mut level, wide) = if self.cpu.long_mode() {
            if (lin as i64) << 16 >> 16 != lin as i64 {
                self.noncanonical = true;
                return Err(self.raise(GP, Some(0)));
            }
            (self.cpu.cr3 & 0x000f_ffff_ffff_f000, 4, true)
        } else if self.cpu.cr4 & CR4_PAE != 0 {
            (self.cpu.cr3 & 0xffff_ffe0, 3, true)
        } else {
            (self.cpu.cr3 & 0xffff_f000, 2, false)
        };
        let (mut writable, mut allows_user, mut no_exec) = (true, true, false);
        let reserved_high = 0x000f_ffff_ffff_ffff & !((1u64 << self.shared.phys_bits) - 1) | if nxe { 0 } else { NX };
        loop {
            let (bits, size) = if wide { (9, 8) } else { (10, 4) };
            let shift = 12 + (level - 1) * bits;
            let index = lin >> shift & ((1 << bits) - 1);
            let index = if wide && level == 3 && !self.cpu.long_mode() { index & 3 } else { index };
            let at = table + index * size;
            let entry = self.read_entry(at, size)?;
            if entry & P == 0 {
                return Err(self.page_fault(lin, kind, user, false, false));
            }
            let pdpte = wide && level == 3 && !self.cpu.long_mode();
            if pdpte {
                // PAE: four entries with neither rights nor A; R/W, U/S, PS, NX and high bits are reserved.
                if entry & (reserved_high | NX | 0x1e6) != 0 {
                    return Err(self.page_fault(lin, kind, user, true, true));
                }
                table = entry & 0x000f_ffff_ffff_f000;
                level -= 1;
                continue;
            }
            let large = entry & PS != 0 && level > 1 && (wide || self.cpu.cr4 & CR4_PSE != 0);
            if wide {
                let mut reserved = reserved_high;
                if large {
                    // PS is reserved in a PML4E; bits between the address and PAT are in a large page.
                    reserved |= if level == 4 { PS } else { ((1u64 << shift) - 1) & !0x1fff };
                }
                if entry & reserved != 0 {
                    return Err(self.page_fault(lin, kind, user, true, true));
                }
            } else if large && entry & (1 << 21) != 0 {
                return Err(self.page_fault(lin, kind, user, true, true));
            }
            writable &= entry & W != 0;
            allows_user &= entry & U != 0;
            no_exec |= wide && nxe && entry & NX != 0;
            if level > 1 && !large {
                if mark && entry & A == 0 {
                    self.mark_entry(at, size, entry | A)?;
                }
                table = if wide { entry & 0x000f_ffff_ffff_f000 } else { entry & 0xffff_f000 };
                level -= 1;
                continue;
            }
            // The error code tells of the key also where the page forbids the access anyhow.
            if mark && self.key_forbids(entry, kind, user, allows_user) {
                return Err(self.key_fault(lin, kind, user));
            }
            if mark && !self.permitted(kind, user, rights, writable, allows_user, no_exec) {
                return Err(self.page_fault(lin, kind, user, true, false));
            }
            if mark {
                let want = entry | A | if kind == Kind::Write { D } else { 0 };
                if want != entry {
                    self.mark_entry(at, size, want)?;
                }
            }
            let phys = if !large {
                if wide { entry & 0x000f_ffff_ffff_f000 } else { entry & 0xffff_f000 }
            } else if wide {
                entry & 0x000f_ffff_ffff_f000 & !((1 << shift) - 1) | lin & ((1 << shift) - 1)
            } else {
                // PSE-36: bits 20:13 of the entry are bits 39:32 of the address.
                entry & 0xffc0_0000 | (entry >> 13 & 0xff) << 32 | lin & 0x3f_ffff
            };
            let exec = !no_exec && (user || !allows_user || self.cpu.cr4 & CR4_SMEP == 0);
            let global = entry & G != 0 && self.cpu.cr4 & CR4_PGE != 0;
            let size = match shift {
                12 => 0,
                30 => HUGE,
                _ => LARGE,
            };
            return Ok(Page { phys, user: allows_user, exec, global, size });
        }
    }

    fn permitted(&self, kind: Kind, user: bool, rights: Rights, writable: bool, allows_user: bool, no_exec: bool) -> bool {
        let cpu: &Cpu = &self.cpu;
        if user {
            return allows_user && (kind != Kind::Write || writable) && !(kind == Kind::Fetch && no_exec);
        }
        if kind == Kind::Fetch {
            return !no_exec && (!allows_user || cpu.cr4 & CR4_SMEP == 0);
        }
        if allows_user && cpu.cr4 & CR4_SMAP != 0 {
            let explicit = rights == Rights::Current;
            if !(explicit && cpu.flags & flags::AC != 0) {
                return false;
            }
        }
        kind != Kind::Write || writable || cpu.cr0 & CR0_WP == 0
    }

    /// Whether the page's protection key forbids an access, whatever else says of it (SDM vol. 3, 4.6.2).
    #[inline]
    fn key_forbids(&self, entry: u64, kind: Kind, user: bool, allows_user: bool) -> bool {
        let cpu = &self.cpu;
        if cpu.cr4 & (CR4_PKE | CR4_PKS) == 0 || kind == Kind::Fetch || !cpu.long_mode() {
            return false;
        }
        let rights = match (allows_user, cpu.cr4 & CR4_PKE != 0, cpu.cr4 & CR4_PKS != 0) {
            (true, true, _) => cpu.pkru,
            (false, _, true) => cpu.pkrs,
            _ => return false,
        };
        let key = rights >> (2 * (entry >> 59 & 15));
        key & 1 != 0 || key & 2 != 0 && kind == Kind::Write && (user || cpu.cr0 & CR0_WP != 0)
    }

    #[cold]
    fn key_fault(&mut self, lin: u64, kind: Kind, user: bool) -> Fault {
        let fault = self.page_fault(lin, kind, user, true, false);
        if let Some(Pending::Exception(exception)) = &mut self.fault {
            exception.error = exception.error.map(|e| e | 1 << 5);
        }
        fault
    }

    /// A paging structure entry; where there is no RAM the bus answers all ones, whose reserved bits fault.
    fn read_entry(&mut self, at: u64, size: u64) -> Result<u64, Fault> {
        match self.host(at)? {
            // SAFETY: entries are naturally aligned, so inside the mapped page.
            Some(host) if size == 8 => Ok(unsafe { ((host + (at & OFFSET) as usize) as *const u64).read_unaligned() }),
            // SAFETY: as above.
            Some(host) => Ok(u64::from(unsafe { ((host + (at & OFFSET) as usize) as *const u32).read_unaligned() })),
            None => Ok(u64::MAX),
        }
    }

    fn mark_entry(&mut self, at: u64, size: u64, entry: u64) -> Result<(), Fault> {
        // Where there is no RAM the walk has already faulted on reserved bits (32-bit tables have none: the write vanishes).
        if self.host(at)?.is_some() { self.phys_store(at, size, u128::from(entry)) } else { Ok(()) }
    }
}

/// The widest access that a device is asked for.
fn mmio_width(len: u64) -> u64 {
    match len {
        8.. => 8,
        4.. => 4,
        2.. => 2,
        _ => 1,
    }
}
