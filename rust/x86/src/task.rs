//! Hardware task switches of legacy protected mode (SDM vol. 3, 8.2–8.3): through TSS descriptors, task gates and IRET with NT.

use crate::core::{Core, DB, Exception, GP, NP, Pending, TS};
use crate::insn::Fault;
use crate::segments::{Descriptor, LDT, TASK_GATE, TSS16, TSS16_BUSY, TSS32, TSS32_BUSY, null_segment, v8086_segment};
use crate::state::{CS, DS, ES, FS, GS, RSP, SS, Segment, flags};

const CR0_TS: u64 = 1 << 3;
/// DR6.BT: the new task's T flag.
const DR6_BT: u64 = 1 << 15;

/// What leads to a task.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    Jump,
    /// CALL, or an interrupt or exception through a task gate.
    Call,
    Return,
}

/// Where a TSS keeps things; `word` is 2 or 4 bytes.
struct Layout {
    word: u64,
    cr3: Option<u64>,
    ip: u64,
    segments: u64,
    count: usize,
    ldt: u64,
    trap: Option<u64>,
    size: u32,
}

const LAYOUT16: Layout = Layout { word: 2, cr3: None, ip: 0x0e, segments: 0x22, count: 4, ldt: 0x2a, trap: None, size: 0x2c };
const LAYOUT32: Layout =
    Layout { word: 4, cr3: Some(0x1c), ip: 0x20, segments: 0x48, count: 6, ldt: 0x60, trap: Some(0x64), size: 0x68 };
/// Order of the selectors in a TSS.
const ORDER: [usize; 6] = [ES, CS, SS, DS, FS, GS];

fn layout(type_: u8) -> &'static Layout {
    if type_ & 8 != 0 { &LAYOUT32 } else { &LAYOUT16 }
}

/// What the new task's TSS says.
struct Task {
    cr3: u64,
    ip: u64,
    flags: u64,
    gpr: [u64; 8],
    selectors: [u16; 6],
    ldt: u16,
    trap: bool,
}

impl Core {
    /// The TSS that a far jump or call to `selector` leads to, its privilege checked; `None` when `d` is neither a TSS nor
    /// a task gate, or in long mode.
    pub fn task_target(&mut self, selector: u16, d: Descriptor) -> Result<Option<u16>, Fault> {
        if !d.is_system() || !matches!(d.type_(), TASK_GATE | TSS16 | TSS32) || self.cpu.long_mode() {
            return Ok(None);
        }
        let error = Some(u32::from(selector & !3));
        if d.dpl() < self.cpu.cpl.max((selector & 3) as u8) {
            return Err(self.raise(GP, error));
        }
        if d.type_() != TASK_GATE {
            return Ok(Some(selector));
        }
        if !d.present() {
            return Err(self.raise(NP, error));
        }
        Ok(Some(d.gate_selector()))
    }

    fn read_word(&mut self, at: u64, size: u64) -> Result<u64, Fault> {
        if size == 2 { self.read_system::<u16>(at).map(u64::from) } else { self.read_system::<u32>(at).map(u64::from) }
    }

    fn write_word(&mut self, at: u64, size: u64, value: u64) -> Result<(), Fault> {
        if size == 2 { self.write_system(at, value as u16) } else { self.write_system(at, value as u32) }
    }

    fn read_task(&mut self, base: u64, l: &Layout) -> Result<Task, Fault> {
        let mut task = Task {
            cr3: match l.cr3 {
                Some(offset) => u64::from(self.read_system::<u32>(base.wrapping_add(offset))?),
                None => self.cpu.cr3,
            },
            ip: self.read_word(base.wrapping_add(l.ip), l.word)?,
            flags: self.read_word(base.wrapping_add(l.ip + l.word), l.word)?,
            gpr: [0; 8],
            selectors: [0; 6],
            ldt: self.read_system(base.wrapping_add(l.ldt))?,
            trap: match l.trap {
                Some(offset) => self.read_system::<u16>(base.wrapping_add(offset))? & 1 != 0,
                None => false,
            },
        };
        for n in 0..8 {
            task.gpr[n] = self.read_word(base.wrapping_add(l.ip + (2 + n as u64) * l.word), l.word)?;
        }
        for n in 0..l.count {
            task.selectors[n] = self.read_system(base.wrapping_add(l.segments + n as u64 * l.word))?;
        }
        Ok(task)
    }

    /// Writes the running task into its TSS.
    fn write_task(&mut self, base: u64, l: &Layout, flags: u64) -> Result<(), Fault> {
        self.write_word(base.wrapping_add(l.ip), l.word, self.cpu.rip)?;
        self.write_word(base.wrapping_add(l.ip + l.word), l.word, flags)?;
        for n in 0..8 {
            self.write_word(base.wrapping_add(l.ip + (2 + n as u64) * l.word), l.word, self.cpu.gpr[n])?;
        }
        for (n, &seg) in ORDER.iter().enumerate().take(l.count) {
            self.write_system(base.wrapping_add(l.segments + n as u64 * l.word), self.cpu.seg[seg].selector)?;
        }
        Ok(())
    }

    fn set_busy(&mut self, selector: u16, busy: bool) -> Result<(), Fault> {
        let Some(at) = self.descriptor_address(selector, 8) else { return Ok(()) };
        let byte: u8 = self.read_system(at.wrapping_add(5))?;
        self.write_system(at.wrapping_add(5), if busy { byte | 2 } else { byte & !2 })
    }

    /// Switches to the task of TSS `selector`. RIP is what the old task goes on with. `error` is pushed on the new task's stack.
    /// Faults come before any change, but those that belong to the new task, which are delivered in it.
    pub fn switch_task(&mut self, selector: u16, way: Way, error: Option<u32>, ext: u32) -> Result<(), Fault> {
        let bad = if way == Way::Return { TS } else { GP };
        let code = Some(u32::from(selector & !3) | ext);
        if selector & 4 != 0 || selector & !3 == 0 {
            return Err(self.raise(bad, code));
        }
        let d = self.descriptor_or(selector, bad, ext)?;
        let fits = match way {
            Way::Return => matches!(d.type_(), TSS16_BUSY | TSS32_BUSY),
            _ => matches!(d.type_(), TSS16 | TSS32),
        };
        if !d.is_system() || !fits {
            return Err(self.raise(bad, code));
        }
        if !d.present() {
            return Err(self.raise(NP, code));
        }
        let new = layout(d.type_());
        if d.limit() < new.size - 1 {
            return Err(self.raise(TS, code));
        }
        let (old_tr, old) = (self.cpu.tr, layout(self.cpu.tr.type_()));
        if old_tr.attr & Segment::UNUSABLE != 0 || old_tr.limit < old.size - 1 {
            return Err(self.raise(TS, Some(u32::from(old_tr.selector & !3) | ext)));
        }
        let task = self.read_task(d.base(), new)?;
        self.probe_system_write(old_tr.base, u64::from(old.size))?;
        if way == Way::Call {
            self.probe_system_write(d.base(), 2)?;
        }

        let mut saved = self.cpu.rflags();
        if way == Way::Return {
            saved &= !flags::NT;
        }
        self.write_task(old_tr.base, old, saved)?;
        if way != Way::Call {
            self.set_busy(old_tr.selector, false)?;
        }
        if way == Way::Call {
            self.write_system(d.base(), old_tr.selector)?;
        }
        if way != Way::Return {
            self.set_busy(selector, true)?;
        }
        self.cpu.tr = d.segment(selector);
        self.cpu.tr.attr |= 2;
        self.cpu.cr0 |= CR0_TS;
        if self.cpu.paging() && task.cr3 != self.cpu.cr3 {
            self.cpu.cr3 = task.cr3;
            self.flush_tlb();
        }
        // The local enable bits of DR7 end with the task.
        if self.cpu.dr[7] & 0x155 != 0 {
            self.cpu.dr[7] &= !0x155;
            self.refresh_breakpoints();
        }
        let high = if new.word == 2 { 0xffff_0000 } else { 0 };
        for n in 0..8 {
            self.cpu.gpr[n] = task.gpr[n] | high;
        }
        self.cpu.rip = task.ip;
        let loaded = task.flags & 0x003f_7fd7;
        let nested = if way == Way::Call { flags::NT } else { 0 };
        self.cpu.set_rflags((if new.word == 2 { loaded & 0xffff } else { loaded }) | nested);
        self.cpu.shadow = 0;

        // From here on faults are the new task's.
        let entered = self.load_task_segments(&task, ext).and_then(|()| match error {
            None => Ok(()),
            Some(error) => {
                let sp = self.cpu.gpr[RSP].wrapping_sub(new.word);
                self.poke_stack(sp, new.word as u8, u64::from(error))?;
                self.set_stack_pointer(sp);
                Ok(())
            }
        });
        self.refresh();
        self.leave();
        match entered {
            Ok(()) if task.trap => {
                self.cpu.dr[6] |= DR6_BT;
                self.deliver(Exception { vector: DB, error: None, cr2: 0 }).map(|_| ())
            }
            Ok(()) => Ok(()),
            Err(Fault) => match self.fault.take() {
                Some(Pending::Exception(e)) => self.deliver(e).map(|_| ()),
                other => {
                    self.fault = other;
                    Err(Fault)
                }
            },
        }
    }

    fn load_task_segments(&mut self, task: &Task, ext: u32) -> Result<(), Fault> {
        // Until it is loaded and checked a register holds its selector only.
        for (n, &seg) in ORDER.iter().enumerate() {
            self.set_segment(seg, null_segment(task.selectors[n]));
        }
        self.cpu.ldtr = null_segment(task.ldt);
        let fault = |core: &mut Core, selector: u16| Err(core.raise(TS, Some(u32::from(selector & !3) | ext)));
        if task.ldt & !3 != 0 {
            let found = if task.ldt & 4 != 0 { None } else { self.descriptor(task.ldt)? };
            match found {
                Some(d) if d.is_system() && d.type_() == LDT && d.present() => self.cpu.ldtr = d.segment(task.ldt),
                _ => return fault(self, task.ldt),
            }
        }
        if self.cpu.v8086() {
            self.cpu.cpl = 3;
            for (n, &seg) in ORDER.iter().enumerate() {
                self.set_segment(seg, v8086_segment(task.selectors[n]));
            }
            return Ok(());
        }
        let cs = task.selectors[1];
        self.cpu.cpl = (cs & 3) as u8;
        if cs & !3 == 0 {
            return fault(self, cs);
        }
        let d = self.descriptor_or(cs, TS, ext)?;
        let fits = if d.conforming() { d.dpl() <= self.cpu.cpl } else { d.dpl() == self.cpu.cpl };
        if !d.is_code() || !fits {
            return fault(self, cs);
        }
        if !d.present() {
            return Err(self.raise(NP, Some(u32::from(cs & !3) | ext)));
        }
        let code = self.mark_accessed(cs, d)?.segment(cs);
        self.set_segment(CS, code);
        let stack = self.check_stack_segment(task.selectors[2], self.cpu.cpl, TS, ext)?;
        self.set_segment(SS, stack);
        self.refresh();
        for (n, &seg) in ORDER.iter().enumerate() {
            if seg != CS && seg != SS {
                let value = self.check_data_segment(task.selectors[n], TS, ext)?;
                self.set_segment(seg, value);
            }
        }
        if self.cpu.rip > u64::from(self.cpu.seg[CS].limit) {
            return Err(self.raise(GP, Some(ext)));
        }
        Ok(())
    }
}
