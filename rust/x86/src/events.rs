//! Exceptions and interrupts: from "it happened" to the first instruction of the guest's routine
//! (SDM vol. 3, chapter 6; AMD vol. 2, chapter 8).

use crate::apics::{SIGNAL_INIT, SIGNAL_INTR, SIGNAL_IRR, SIGNAL_NMI, SIGNAL_SIPI};
use crate::core::{BP, Core, DB, DE, DF, Exception, GP, NP, OF, PF, Pending, SS as STACK_FAULT, TS};
use crate::insn::Fault;
use crate::lapic::EXTINT;
use crate::segments::{Descriptor, INT16, INT32, TASK_GATE, TRAP16, TRAP32, canonical, null_segment};
use crate::state::{Activity, CS, CodeSize, DS, ES, FS, GS, RSP, SS, Segment, flags};
use crate::task::Way;

/// What [`Core::deliver`] and [`Core::poll_events`] did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Delivered {
    /// Nothing to do.
    Nothing,
    /// The guest's routine is next: RIP, CS, SS, RSP, flags are set.
    Entered,
}

/// An event that had left its source but not reached the guest when the state was saved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reinject {
    Exception(Exception),
    Interrupt(u8),
    /// NMIs are masked already.
    Nmi,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Source {
    /// INT n, INT3, INTO: gate privilege is checked and EXT is 0.
    Software,
    /// Everything else.
    Hardware,
}

/// Exceptions that make a double fault out of a second one.
fn contributory(vector: u8) -> bool {
    matches!(vector, DE | TS | NP | STACK_FAULT | GP)
}

impl Core {
    /// Delivers an exception through the IDT, double faults included. `Err` with [`Pending::TripleFault`], or for failures of
    /// the host side.
    pub fn deliver(&mut self, exception: Exception) -> Result<Delivered, Fault> {
        let mut current = exception;
        loop {
            if current.vector == PF {
                self.cpu.cr2 = current.cr2;
            }
            // Faults restart their instruction: RF keeps an instruction breakpoint from hitting twice.
            let rf = !matches!(current.vector, DB | BP | OF | DF);
            match self.enter(current.vector, Source::Hardware, current.error, rf) {
                Ok(()) => return self.entered(),
                Err(Fault) => match self.fault.take() {
                    Some(Pending::Exception(second)) => {
                        self.noncanonical = false;
                        let (a, b) = (current.vector, second.vector);
                        if a == DF && (contributory(b) || b == PF) {
                            self.fault = Some(Pending::TripleFault);
                            return Err(Fault);
                        }
                        current = if contributory(a) && contributory(b) || a == PF && (contributory(b) || b == PF) {
                            Exception { vector: DF, error: Some(0), cr2: 0 }
                        } else {
                            second
                        };
                    }
                    other => {
                        self.fault = other;
                        return Err(Fault);
                    }
                },
            }
        }
    }

    /// INT n, INT3, INTO, with the software interrupt's privilege rules. RIP is already the next instruction's.
    /// On a fault RIP is put back by the loop.
    pub fn soft_interrupt(&mut self, vector: u8) -> Result<(), Fault> {
        self.enter(vector, Source::Software, None, false)
    }

    /// INT1 (ICEBP): a #DB without the gate's privilege check. RIP is already the next instruction's.
    pub fn icebp(&mut self) -> Result<(), Fault> {
        self.enter(DB, Source::Hardware, None, false)?;
        // A data breakpoint that MOV SS held back comes with it.
        let held = std::mem::take(&mut self.breakpoints.hit);
        if held != 0 {
            self.cpu.dr[6] = self.cpu.dr[6] & !0xf | held;
        }
        Ok(())
    }

    /// #DB for a single step that has just been completed.
    pub fn single_step_trap(&mut self) -> Result<(), Fault> {
        self.cpu.dr[6] = self.cpu.dr[6] & !0xf | 1 << 14;
        self.deliver(Exception { vector: DB, error: None, cr2: 0 }).map(|_| ())
    }

    /// An interrupt or NMI: what goes wrong on the way in is delivered instead.
    fn interrupt(&mut self, vector: u8) -> Result<Delivered, Fault> {
        match self.enter(vector, Source::Hardware, None, false) {
            Ok(()) => self.entered(),
            Err(Fault) => match self.fault.take() {
                Some(Pending::Exception(e)) => self.deliver(e),
                other => {
                    self.fault = other;
                    Err(Fault)
                }
            },
        }
    }

    /// A frame was written. Where it met a data breakpoint #DB follows at once: nothing is left pending between instructions.
    fn entered(&mut self) -> Result<Delivered, Fault> {
        let hit = std::mem::take(&mut self.breakpoints.hit);
        if hit == 0 || self.breakpoints.muted {
            return Ok(Delivered::Entered);
        }
        self.cpu.dr[6] = self.cpu.dr[6] & !0xf | hit;
        // The frame of this #DB does not raise another.
        self.breakpoints.muted = true;
        let delivered = self.deliver(Exception { vector: DB, error: None, cr2: 0 });
        self.breakpoints.muted = false;
        self.breakpoints.hit = 0;
        delivered
    }

    /// Whether [`Core::poll_events`] would do something. Cheap: called between blocks.
    #[inline(always)]
    pub fn event_pending(&self) -> bool {
        self.has_mail() || self.deliverable() || self.reinject.is_some()
    }

    /// Something was posted to this vCPU since it last ran.
    pub(crate) fn has_mail(&self) -> bool {
        self.mail_read || self.shared.apics.mailbox(self.vcpu).posted()
    }

    /// Something that has already arrived can be taken now.
    #[inline(always)]
    fn deliverable(&self) -> bool {
        let cpu = &self.cpu;
        cpu.flags & flags::IF != 0 && cpu.shadow == 0 && self.lapic.deliverable().is_some()
            || cpu.nmi_pending != 0 && !cpu.nmi_masked && cpu.shadow == 0
    }

    /// Takes over what was posted to this vCPU, then the most urgent NMI or interrupt that may be taken now. Wakes from HLT.
    pub fn poll_events(&mut self) -> Result<Delivered, Fault> {
        self.mail_read = false;
        if self.shared.apics.mailbox(self.vcpu).posted() {
            self.take_mail();
        }
        if self.reinject.is_some() {
            return self.reinject();
        }
        if !matches!(self.cpu.activity, Activity::Running | Activity::Halted) || !self.deliverable() {
            return Ok(Delivered::Nothing);
        }
        self.cpu.activity = Activity::Running;
        if self.cpu.nmi_pending != 0 && !self.cpu.nmi_masked {
            self.cpu.nmi_pending -= 1;
            self.cpu.nmi_masked = true;
            return self.interrupt(2);
        }
        match self.lapic.acknowledge() {
            Some(EXTINT) => {
                // The level follows at the next boundary; the 8259s have changed it by now.
                let vector = self.shared.apics.acknowledge_intr();
                self.lapic.set_intr(self.shared.apics.intr());
                vector.map_or(Ok(Delivered::Nothing), |vector| self.interrupt(vector))
            }
            Some(vector) => self.interrupt(vector),
            None => Ok(Delivered::Nothing),
        }
    }

    #[cold]
    fn reinject(&mut self) -> Result<Delivered, Fault> {
        match self.reinject.take() {
            Some(Reinject::Exception(e)) => self.deliver(e),
            Some(Reinject::Interrupt(vector)) => self.interrupt(vector),
            Some(Reinject::Nmi) => self.interrupt(2),
            None => Ok(Delivered::Nothing),
        }
    }

    /// Takes over what other threads and vCPUs posted.
    pub fn take_mail(&mut self) {
        let shared = self.shared.clone();
        let mail = shared.apics.mailbox(self.vcpu).take();
        if mail.signals & SIGNAL_INIT != 0 {
            self.init_signal();
        }
        if mail.signals & SIGNAL_SIPI != 0 && self.cpu.activity == Activity::WaitSipi {
            self.start(mail.sipi_vector());
        }
        if mail.signals & SIGNAL_NMI != 0 && self.cpu.activity != Activity::WaitSipi {
            // One being served (masked) and one waiting is all that the CPU remembers, two when none is served.
            let room = if self.cpu.nmi_masked { 1 } else { 2 };
            self.cpu.nmi_pending = mail.nmis.saturating_add(u32::from(self.cpu.nmi_pending)).min(room) as u8;
        }
        if mail.signals & SIGNAL_INTR != 0 {
            self.lapic.set_intr(shared.apics.intr());
        }
        if mail.signals & SIGNAL_IRR != 0 {
            self.lapic.accept_all(&mail.irr, &mail.level);
        }
    }

    /// INIT: the BSP starts at its reset vector, the others wait for SIPI.
    fn init_signal(&mut self) {
        self.cpu.reset(true, self.vcpu as u32);
        self.lapic.init(&self.shared.apics.clone());
        self.cpu.activity =
            if self.lapic.base & crate::lapic::APIC_BASE_BSP != 0 { Activity::Running } else { Activity::WaitSipi };
        self.flush_tlb_all();
        self.refresh();
        self.refresh_breakpoints();
        self.leave();
    }

    /// SIPI: real mode at `vector`:0000.
    fn start(&mut self, vector: u8) {
        let selector = u16::from(vector) << 8;
        let cs = Segment { base: u64::from(vector) << 12, limit: 0xffff, selector, attr: 0x9b };
        self.set_segment(CS, cs);
        self.cpu.rip = 0;
        self.cpu.activity = Activity::Running;
        self.refresh();
        self.leave();
    }

    /// Enters the handler of `vector`. On a fault nothing has changed but memory below the stack pointer.
    fn enter(&mut self, vector: u8, source: Source, error: Option<u32>, rf: bool) -> Result<(), Fault> {
        // RF lasts for one instruction; only with breakpoints does anybody ask, so only then is it kept exactly.
        let kept = if self.breakpoints.active { self.cpu.flags & flags::RF } else { 0 };
        let image = self.cpu.rflags() & !flags::RF | if rf { flags::RF } else { kept };
        if !self.cpu.protected() {
            return self.enter_real(vector);
        }
        let ext = u32::from(source == Source::Hardware);
        let idt_error = Some(u32::from(vector) << 3 | 2 | ext);
        let long = self.cpu.long_mode();
        if self.cpu.v8086() && source == Source::Software && vector != BP && self.cpu.flags & flags::IOPL != flags::IOPL {
            return Err(self.raise(GP, Some(0)));
        }
        let size: u32 = if long { 16 } else { 8 };
        let offset = u32::from(vector) * size;
        if offset + size - 1 > u32::from(self.cpu.idtr.limit) {
            return Err(self.raise(GP, idt_error));
        }
        let at = self.cpu.idtr.base.wrapping_add(u64::from(offset));
        let gate = Descriptor(self.read_system(at)?);
        let high = if long { self.read_system::<u64>(at.wrapping_add(8))? } else { 0 };
        let kind = gate.type_();
        let fits = gate.is_system()
            && match kind {
                INT32 | TRAP32 => true,
                INT16 | TRAP16 | TASK_GATE => !long,
                _ => false,
            };
        if !fits || source == Source::Software && gate.dpl() < self.cpu.cpl {
            return Err(self.raise(GP, idt_error));
        }
        if !gate.present() {
            return Err(self.raise(NP, idt_error));
        }
        if kind == TASK_GATE {
            return self.switch_task(gate.gate_selector(), Way::Call, error, ext);
        }
        let selector = gate.gate_selector();
        if selector & !3 == 0 {
            return Err(self.raise(GP, Some(ext)));
        }
        let cs_error = Some(u32::from(selector & !3) | ext);
        let code = self.descriptor_or(selector, GP, ext)?;
        if !code.is_code() || code.dpl() > self.cpu.cpl || long && (!code.long() || code.big()) {
            return Err(self.raise(GP, cs_error));
        }
        if !code.present() {
            return Err(self.raise(NP, cs_error));
        }
        let inner = !code.conforming() && code.dpl() < self.cpu.cpl;
        let cpl = if inner { code.dpl() } else { self.cpu.cpl };
        let v8086 = self.cpu.v8086();
        if v8086 && (!inner || cpl != 0) {
            return Err(self.raise(GP, cs_error));
        }
        let target = if long {
            gate.gate_offset() | high << 32
        } else if kind < TSS32_GATES {
            gate.gate_offset() & 0xffff
        } else {
            gate.gate_offset()
        };
        let code = self.mark_accessed(selector, code)?;

        if long {
            self.enter_long(Entry { cpl, inner, target, image, error, ext, ist: (gate.0 >> 32 & 7) as u8 })?;
        } else {
            let width = if kind == INT16 || kind == TRAP16 { 2 } else { 4 };
            if target > u64::from(code.limit()) {
                return Err(self.raise(GP, Some(ext)));
            }
            self.enter_legacy(width, cpl, inner, target, image, error, ext)?;
        }
        let mut cs = code.segment(selector & !3 | u16::from(cpl));
        cs.attr |= 1;
        self.cpu.cpl = cpl;
        self.set_segment(CS, cs);
        self.cpu.rip = target;
        // A single-step trap after HLT ends the halt.
        self.cpu.activity = Activity::Running;
        let mut off = flags::TF | flags::NT | flags::RF | flags::VM;
        if kind == INT16 || kind == INT32 {
            off |= flags::IF;
        }
        self.cpu.flags &= !off;
        self.cpu.shadow = 0;
        self.refresh();
        self.leave();
        Ok(())
    }

    fn enter_long(&mut self, e: Entry) -> Result<(), Fault> {
        let mut rsp = if e.ist != 0 {
            self.tss_ist(e.ist, e.ext)?
        } else if e.inner {
            self.tss_stack(e.cpl, e.ext)?.0
        } else {
            self.cpu.gpr[RSP]
        };
        if !canonical(rsp) {
            return Err(self.raise(STACK_FAULT, Some(e.ext)));
        }
        if !canonical(e.target) {
            return Err(self.raise(GP, Some(e.ext)));
        }
        rsp &= !15;
        let cs = u64::from(self.cpu.seg[CS].selector);
        let ss = u64::from(self.cpu.seg[SS].selector);
        let frame = [ss, self.cpu.gpr[RSP], e.image, cs, self.cpu.rip];
        for value in frame.into_iter().chain(e.error.map(u64::from)) {
            rsp = rsp.wrapping_sub(8);
            let written = if e.cpl == 3 { self.store64(rsp, value) } else { self.write_system(rsp, value) };
            if let Err(f) = written {
                return Err(if std::mem::take(&mut self.noncanonical) { self.raise(STACK_FAULT, Some(e.ext)) } else { f });
            }
        }
        self.cpu.gpr[RSP] = rsp;
        if e.inner {
            let mut ss = null_segment(u16::from(e.cpl));
            ss.attr |= u32::from(e.cpl) << 5;
            self.set_segment(SS, ss);
        }
        Ok(())
    }

    #[allow(clippy::too_many_arguments)]
    fn enter_legacy(
        &mut self,
        width: u8,
        cpl: u8,
        inner: bool,
        _target: u64,
        image: u64,
        error: Option<u32>,
        ext: u32,
    ) -> Result<(), Fault> {
        let v8086 = self.cpu.v8086();
        let cpu = &self.cpu;
        let selector = |s: usize| u64::from(cpu.seg[s].selector);
        let mut frame = Vec::with_capacity(10);
        if v8086 {
            frame.extend([selector(GS), selector(FS), selector(DS), selector(ES)]);
        }
        if inner {
            frame.extend([selector(SS), cpu.gpr[RSP]]);
        }
        frame.extend([image, selector(CS), cpu.rip]);
        frame.extend(error.map(u64::from));
        let (mut sp, stack) = if inner {
            let (sp, ss) = self.tss_stack(cpl, ext)?;
            (sp, Some(self.check_stack_segment(ss, cpl, TS, ext)?))
        } else {
            (self.cpu.gpr[RSP], None)
        };
        let ss = stack.unwrap_or(self.cpu.seg[SS]);
        let mask = if ss.attr & Segment::DB != 0 { 0xffff_ffff } else { 0xffff };
        for value in frame {
            sp = sp.wrapping_sub(u64::from(width)) & mask;
            let at = ss.base.wrapping_add(sp) & 0xffff_ffff;
            match (width, cpl) {
                (2, 3) => self.store16(at, value as u16)?,
                (2, _) => self.write_system(at, value as u16)?,
                (_, 3) => self.store32(at, value as u32)?,
                (_, _) => self.write_system(at, value as u32)?,
            }
        }
        if let Some(stack) = stack {
            self.set_segment(SS, stack);
        }
        let old = self.cpu.gpr[RSP];
        self.cpu.gpr[RSP] = if mask == 0xffff { old & !mask | sp } else { sp };
        if v8086 {
            for seg in [ES, DS, FS, GS] {
                self.set_segment(seg, null_segment(0));
            }
        }
        Ok(())
    }

    /// Through the interrupt vector table.
    fn enter_real(&mut self, vector: u8) -> Result<(), Fault> {
        let offset = u32::from(vector) * 4;
        if offset + 3 > u32::from(self.cpu.idtr.limit) {
            return Err(self.raise(GP, None));
        }
        let entry: u32 = self.read_system(self.cpu.idtr.base.wrapping_add(u64::from(offset)))?;
        let image = self.cpu.rflags();
        let mut sp = self.cpu.gpr[RSP];
        for value in [image, u64::from(self.cpu.seg[CS].selector), self.cpu.rip] {
            sp = sp.wrapping_sub(2);
            self.poke_stack(sp, 2, value)?;
        }
        self.set_stack_pointer(sp);
        let selector = (entry >> 16) as u16;
        let old = self.cpu.seg[CS];
        self.set_segment(CS, Segment { base: u64::from(selector) << 4, selector, ..old });
        self.cpu.rip = u64::from(entry & 0xffff);
        self.cpu.flags &= !(flags::IF | flags::TF | flags::AC | flags::RF);
        self.cpu.shadow = 0;
        self.refresh();
        self.leave();
        Ok(())
    }
}

/// Gate types below this are 16-bit.
const TSS32_GATES: u8 = 8;

struct Entry {
    cpl: u8,
    inner: bool,
    target: u64,
    image: u64,
    error: Option<u32>,
    ext: u32,
    ist: u8,
}

impl crate::state::Cpu {
    /// Power-on (`init` false) or INIT (true: FPU, SSE and most MSRs stay).
    pub fn reset(&mut self, init: bool, vcpu: u32) {
        use crate::state::{Cpu, Table};
        let old = std::mem::take(self);
        let data = Segment { base: 0, limit: 0xffff, selector: 0, attr: 0x93 };
        *self = Cpu {
            rip: 0xfff0,
            flags: flags::FIXED,
            cr0: if init { 0x10 | old.cr0 & 0x6000_0000 } else { 0x6000_0010 },
            seg: [data; 6],
            ldtr: Segment { attr: 0x82, limit: 0xffff, ..Segment::default() },
            tr: Segment { attr: 0x8b, limit: 0xffff, ..Segment::default() },
            gdtr: Table { base: 0, limit: 0xffff },
            idtr: Table { base: 0, limit: 0xffff },
            mxcsr: 0x1f80,
            code_size: CodeSize::Bits16,
            icount: old.icount,
            ..Cpu::default()
        };
        self.dr[6] = 0xffff_0ff0;
        self.dr[7] = 0x400;
        self.set_arith(0);
        self.gpr[crate::state::RDX] = u64::from(crate::profile::SIGNATURE);
        self.seg[CS] = Segment { base: 0xffff_0000, limit: 0xffff, selector: 0xf000, attr: 0x9b };
        self.seg_base[CS] = 0xffff_0000;
        if init {
            (self.xmm, self.mxcsr, self.fpu, self.msr) = (old.xmm, old.mxcsr, old.fpu, old.msr);
        } else {
            self.msr = crate::msr::power_on();
            self.fpu.fcw = 0x40;
            self.fpu.ftw = 0xff;
            self.activity = if vcpu == 0 { Activity::Running } else { Activity::WaitSipi };
        }
    }
}
