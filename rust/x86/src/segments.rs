//! Segment registers and descriptors (SDM vol. 3, chapters 3 and 5; AMD vol. 2, chapter 4). Instructions that load them
//! are in `exec::segment`, far transfers in `exec::far`.

use crate::core::{Core, GP, NP, SS as STACK_FAULT, TS};
use crate::insn::Fault;
use crate::state::{CS, CodeSize, SS, Segment};

/// System descriptor types.
pub const TSS16: u8 = 1;
pub const LDT: u8 = 2;
pub const TSS16_BUSY: u8 = 3;
pub const CALL16: u8 = 4;
pub const TASK_GATE: u8 = 5;
pub const INT16: u8 = 6;
pub const TRAP16: u8 = 7;
pub const TSS32: u8 = 9;
pub const TSS32_BUSY: u8 = 11;
pub const CALL32: u8 = 12;
pub const INT32: u8 = 14;
pub const TRAP32: u8 = 15;

/// Sign-extended from bit 47.
#[inline(always)]
pub fn canonical(address: u64) -> bool {
    ((address << 16) as i64 >> 16) as u64 == address
}

/// Eight bytes of a descriptor table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Descriptor(pub u64);

impl Descriptor {
    pub fn base(self) -> u64 {
        self.0 >> 16 & 0xff_ffff | self.0 >> 56 << 24
    }
    /// In bytes.
    pub fn limit(self) -> u32 {
        let limit = (self.0 & 0xffff | self.0 >> 32 & 0xf_0000) as u32;
        if self.attr() & Segment::G != 0 { limit << 12 | 0xfff } else { limit }
    }
    /// As in [`Segment::attr`].
    pub fn attr(self) -> u32 {
        (self.0 >> 40) as u32 & 0xf0ff
    }
    pub fn type_(self) -> u8 {
        (self.attr() & 15) as u8
    }
    pub fn is_system(self) -> bool {
        self.attr() & Segment::S == 0
    }
    pub fn is_code(self) -> bool {
        !self.is_system() && self.attr() & 8 != 0
    }
    pub fn conforming(self) -> bool {
        self.is_code() && self.attr() & 4 != 0
    }
    pub fn readable(self) -> bool {
        !self.is_system() && (self.attr() & 8 == 0 || self.attr() & 2 != 0)
    }
    pub fn writable_data(self) -> bool {
        !self.is_system() && self.attr() & 10 == 2
    }
    pub fn dpl(self) -> u8 {
        (self.attr() >> 5 & 3) as u8
    }
    pub fn present(self) -> bool {
        self.attr() & Segment::P != 0
    }
    pub fn long(self) -> bool {
        self.attr() & Segment::L != 0
    }
    pub fn big(self) -> bool {
        self.attr() & Segment::DB != 0
    }
    pub fn segment(self, selector: u16) -> Segment {
        Segment { base: self.base(), limit: self.limit(), selector, attr: self.attr() }
    }
    /// Gate fields: target selector.
    pub fn gate_selector(self) -> u16 {
        (self.0 >> 16) as u16
    }
    /// Gate fields: target offset, low 32 bits.
    pub fn gate_offset(self) -> u64 {
        self.0 & 0xffff | self.0 >> 48 << 16
    }
}

/// A segment register after a null selector was loaded: the base reads as zero (CPUID 8000_0021 NullSelectorClearsBase).
pub fn null_segment(selector: u16) -> Segment {
    Segment { base: 0, limit: 0, selector, attr: Segment::UNUSABLE }
}

/// What real mode and virtual-8086 mode make of a selector.
pub fn v8086_segment(selector: u16) -> Segment {
    Segment { base: u64::from(selector) << 4, limit: 0xffff, selector, attr: 0xf3 }
}

impl Core {
    /// Puts a segment register and what is derived from it.
    pub fn set_segment(&mut self, seg: usize, value: Segment) {
        self.cpu.seg[seg] = value;
        self.cpu.seg_base[seg] = value.base;
        if seg == CS {
            self.cpu.code_size = self.cpu.code_size_of(&value);
        }
    }

    /// Table entry of `selector`; `None` when it is beyond the limit or there is no table.
    pub fn descriptor(&mut self, selector: u16) -> Result<Option<Descriptor>, Fault> {
        let Some(at) = self.descriptor_address(selector, 8) else { return Ok(None) };
        Ok(Some(Descriptor(self.read_system(at)?)))
    }

    /// Linear address of the entry, checked for `size` bytes.
    pub fn descriptor_address(&self, selector: u16, size: u32) -> Option<u64> {
        let (base, limit) = if selector & 4 != 0 {
            if self.cpu.ldtr.attr & Segment::UNUSABLE != 0 || self.cpu.ldtr.attr & Segment::P == 0 {
                return None;
            }
            (self.cpu.ldtr.base, self.cpu.ldtr.limit)
        } else {
            (self.cpu.gdtr.base, u32::from(self.cpu.gdtr.limit))
        };
        let offset = u32::from(selector & !7);
        (offset + size - 1 <= limit).then(|| base.wrapping_add(u64::from(offset)))
    }

    /// The descriptor or a fault `vector(selector)`.
    pub fn descriptor_or(&mut self, selector: u16, vector: u8, ext: u32) -> Result<Descriptor, Fault> {
        match self.descriptor(selector)? {
            Some(d) => Ok(d),
            None => Err(self.raise(vector, Some(u32::from(selector & !3) | ext))),
        }
    }

    /// Sets the accessed bit in memory where it is clear.
    pub fn mark_accessed(&mut self, selector: u16, d: Descriptor) -> Result<Descriptor, Fault> {
        if d.attr() & 1 != 0 {
            return Ok(d);
        }
        let marked = Descriptor(d.0 | 1 << 40);
        if let Some(at) = self.descriptor_address(selector, 8) {
            self.write_system::<u8>(at.wrapping_add(5), (marked.0 >> 40) as u8)?;
        }
        Ok(marked)
    }

    /// MOV/POP/Lxx to ES, SS, DS, FS, GS. Precise: on a fault nothing has changed.
    pub fn load_segment(&mut self, seg: usize, selector: u16) -> Result<(), Fault> {
        if !self.cpu.protected() {
            // Limit and rights stay: "unreal" mode depends on it.
            let old = self.cpu.seg[seg];
            let (limit, attr) = if old.attr & Segment::UNUSABLE != 0 { (0xffff, 0x93) } else { (old.limit, old.attr) };
            self.set_segment(seg, Segment { base: u64::from(selector) << 4, selector, limit, attr });
            return Ok(());
        }
        if self.cpu.v8086() {
            self.set_segment(seg, v8086_segment(selector));
            return Ok(());
        }
        let value = if seg == SS {
            self.check_stack_segment(selector, self.cpu.cpl, GP, 0)?
        } else {
            self.check_data_segment(selector, GP, 0)?
        };
        self.set_segment(seg, value);
        Ok(())
    }

    /// `vector` is #GP, or #TS where the selector came from a TSS.
    pub(crate) fn check_data_segment(&mut self, selector: u16, vector: u8, ext: u32) -> Result<Segment, Fault> {
        if selector & !3 == 0 {
            return Ok(null_segment(selector));
        }
        let d = self.descriptor_or(selector, vector, ext)?;
        let error = Some(u32::from(selector & !3) | ext);
        if !d.readable() {
            return Err(self.raise(vector, error));
        }
        let rpl = (selector & 3) as u8;
        if !d.conforming() && d.dpl() < rpl.max(self.cpu.cpl) {
            return Err(self.raise(vector, error));
        }
        if !d.present() {
            return Err(self.raise(NP, error));
        }
        Ok(self.mark_accessed(selector, d)?.segment(selector))
    }

    /// Checks a stack segment for use at privilege `cpl`. `vector` is #GP, or #TS where the selector came from a TSS.
    pub fn check_stack_segment(&mut self, selector: u16, cpl: u8, vector: u8, ext: u32) -> Result<Segment, Fault> {
        let rpl = (selector & 3) as u8;
        if selector & !3 == 0 {
            if self.cpu.code_size == CodeSize::Bits64 && cpl != 3 && rpl == cpl && vector == GP {
                let mut segment = null_segment(selector);
                segment.attr |= u32::from(cpl) << 5;
                return Ok(segment);
            }
            return Err(self.raise(vector, Some(ext)));
        }
        let error = Some(u32::from(selector & !3) | ext);
        let d = self.descriptor_or(selector, vector, ext)?;
        if rpl != cpl || !d.writable_data() || d.dpl() != cpl {
            return Err(self.raise(vector, error));
        }
        if !d.present() {
            return Err(self.raise(STACK_FAULT, error));
        }
        Ok(self.mark_accessed(selector, d)?.segment(selector))
    }

    /// LLDT.
    pub fn load_ldtr(&mut self, selector: u16) -> Result<(), Fault> {
        if selector & !3 == 0 {
            self.cpu.ldtr = null_segment(selector);
            return Ok(());
        }
        let (d, segment) = self.system_descriptor(selector, GP)?;
        let error = Some(u32::from(selector & !3));
        if !d.is_system() || d.type_() != LDT {
            return Err(self.raise(GP, error));
        }
        if !d.present() {
            return Err(self.raise(NP, error));
        }
        if !canonical(segment.base) {
            return Err(self.raise(GP, error));
        }
        self.cpu.ldtr = segment;
        Ok(())
    }

    /// LTR.
    pub fn load_tr(&mut self, selector: u16) -> Result<(), Fault> {
        if selector & !3 == 0 {
            return Err(self.raise(GP, Some(0)));
        }
        let (d, mut segment) = self.system_descriptor(selector, GP)?;
        let error = Some(u32::from(selector & !3));
        let available = d.type_() == TSS32 || d.type_() == TSS16 && !self.cpu.long_mode();
        if !d.is_system() || !available {
            return Err(self.raise(GP, error));
        }
        if !d.present() {
            return Err(self.raise(NP, error));
        }
        if !canonical(segment.base) {
            return Err(self.raise(GP, error));
        }
        let Some(at) = self.descriptor_address(selector, 8) else { return Err(self.raise(GP, error)) };
        self.write_system::<u8>(at.wrapping_add(5), (d.0 >> 40) as u8 | 2)?;
        segment.attr |= 2;
        self.cpu.tr = segment;
        Ok(())
    }

    /// An LDT or TSS descriptor: 16 bytes in long mode. The selector must name the GDT.
    fn system_descriptor(&mut self, selector: u16, vector: u8) -> Result<(Descriptor, Segment), Fault> {
        let error = Some(u32::from(selector & !3));
        let long = self.cpu.long_mode();
        let at = if selector & 4 != 0 { None } else { self.descriptor_address(selector, if long { 16 } else { 8 }) };
        let Some(at) = at else { return Err(self.raise(vector, error)) };
        let d = Descriptor(self.read_system(at)?);
        let mut segment = d.segment(selector);
        if long {
            let high: u64 = self.read_system(at.wrapping_add(8))?;
            if high >> 40 & 0x1f != 0 {
                return Err(self.raise(vector, error));
            }
            segment.base |= high << 32;
        }
        Ok((d, segment))
    }

    /// A return to less privilege makes unusable what the new level may not see.
    pub fn drop_privileged_segments(&mut self) {
        for seg in [crate::state::ES, crate::state::DS, crate::state::FS, crate::state::GS] {
            let s = self.cpu.seg[seg];
            let conforming = s.attr & 0x1c == 0x1c;
            if s.attr & Segment::UNUSABLE == 0 && !conforming && s.dpl() < self.cpu.cpl {
                // The base survives: FS and GS go on addressing with it in 64-bit code.
                self.cpu.seg[seg] = Segment { selector: 0, attr: Segment::UNUSABLE, ..s };
            }
        }
    }

    /// Width mask of the stack pointer: SS.B outside 64-bit code.
    pub fn stack_mask(&self) -> u64 {
        if self.cpu.code_size == CodeSize::Bits64 { u64::MAX } else { self.cpu.seg[SS].stack_mask() }
    }

    /// Linear address of stack offset `sp`.
    pub fn stack_address(&self, sp: u64) -> u64 {
        if self.cpu.code_size == CodeSize::Bits64 {
            return sp;
        }
        let s = &self.cpu.seg[SS];
        s.base.wrapping_add(sp & s.stack_mask()) & 0xffff_ffff
    }

    /// RSP with its low part replaced, as wide as the stack is.
    pub fn set_stack_pointer(&mut self, sp: u64) {
        let mask = self.stack_mask();
        let old = self.cpu.gpr[crate::state::RSP];
        // A 32-bit stack pointer zero-extends.
        self.cpu.gpr[crate::state::RSP] = if mask == 0xffff { old & !mask | sp & mask } else { sp & mask };
    }

    /// Reads `size` bytes (2, 4, 8) of the stack at offset `sp`.
    pub fn peek_stack(&mut self, sp: u64, size: u8) -> Result<u64, Fault> {
        let at = self.stack_address(sp);
        let read = match size {
            2 => self.load16(at).map(u64::from),
            4 => self.load32(at).map(u64::from),
            _ => self.load64(at),
        };
        read.map_err(|f| self.stack_fault(f))
    }

    /// Writes `size` bytes of the stack at offset `sp`.
    pub fn poke_stack(&mut self, sp: u64, size: u8, value: u64) -> Result<(), Fault> {
        let at = self.stack_address(sp);
        let written = match size {
            2 => self.store16(at, value as u16),
            4 => self.store32(at, value as u32),
            _ => self.store64(at, value),
        };
        written.map_err(|f| self.stack_fault(f))
    }

    /// A non-canonical stack reference is #SS(0), not #GP(0).
    fn stack_fault(&mut self, fault: Fault) -> Fault {
        if std::mem::take(&mut self.noncanonical) { self.raise(STACK_FAULT, Some(0)) } else { fault }
    }

    /// Stack pointer (and selector, outside long mode) for privilege `cpl` from the TSS.
    pub fn tss_stack(&mut self, cpl: u8, ext: u32) -> Result<(u64, u16), Fault> {
        let tr = self.cpu.tr;
        let error = Some(u32::from(tr.selector & !3) | ext);
        let (offset, size) = match (self.cpu.long_mode(), tr.type_() & 8 != 0) {
            (true, _) => (4 + 8 * u64::from(cpl), 8),
            (false, true) => (4 + 8 * u64::from(cpl), 6),
            (false, false) => (2 + 4 * u64::from(cpl), 4),
        };
        if tr.attr & Segment::UNUSABLE != 0 || offset + size - 1 > u64::from(tr.limit) {
            return Err(self.raise(TS, error));
        }
        let at = tr.base.wrapping_add(offset);
        Ok(match size {
            8 => (self.read_system::<u64>(at)?, 0),
            6 => (u64::from(self.read_system::<u32>(at)?), self.read_system::<u16>(at.wrapping_add(4))?),
            _ => (u64::from(self.read_system::<u16>(at)?), self.read_system::<u16>(at.wrapping_add(2))?),
        })
    }

    /// Stack pointer number `ist` (1–7) of a 64-bit TSS.
    pub fn tss_ist(&mut self, ist: u8, ext: u32) -> Result<u64, Fault> {
        let tr = self.cpu.tr;
        let offset = 0x24 + 8 * u64::from(ist - 1);
        if offset + 7 > u64::from(tr.limit) {
            return Err(self.raise(TS, Some(u32::from(tr.selector & !3) | ext)));
        }
        self.read_system(tr.base.wrapping_add(offset))
    }

    /// Whether the TSS's I/O bitmap lets `width` bytes at `port` through. Called when CPL > IOPL or in virtual-8086 mode.
    pub fn io_bitmap_allows(&mut self, port: u16, width: u8) -> Result<bool, Fault> {
        let tr = self.cpu.tr;
        // A 16-bit TSS has no bitmap.
        if tr.attr & Segment::UNUSABLE != 0 || tr.type_() & 8 == 0 || tr.limit < 0x67 {
            return Ok(false);
        }
        let map: u16 = self.read_system(tr.base.wrapping_add(0x66))?;
        let at = u64::from(map) + u64::from(port >> 3);
        if at + 1 > u64::from(tr.limit) {
            return Ok(false);
        }
        let bits: u16 = self.read_system(tr.base.wrapping_add(at))?;
        Ok(bits >> (port & 7) & ((1 << width) - 1) == 0)
    }
}

impl Segment {
    fn stack_mask(&self) -> u64 {
        if self.attr & Segment::DB != 0 { 0xffff_ffff } else { 0xffff }
    }
}

impl crate::state::Cpu {
    /// How code of this CS is decoded in the current mode.
    pub fn code_size_of(&self, cs: &Segment) -> CodeSize {
        if self.long_mode() && cs.attr & Segment::L != 0 {
            CodeSize::Bits64
        } else if cs.attr & Segment::DB != 0 {
            CodeSize::Bits32
        } else {
            CodeSize::Bits16
        }
    }

    /// Replaces RFLAGS where `mask` is set.
    pub fn merge_rflags(&mut self, value: u64, mask: u64) {
        self.set_rflags(self.rflags() & !mask | value & mask);
    }
}
