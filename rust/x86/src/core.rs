//! One vCPU of the software engine: architectural state, TLBs, and what its handlers may call.

use std::sync::Arc;

use memory::{GuestMemory, MemoryError};
use vcpu::profile::Switches;
use vcpu::{Bus, Clock, Control, EngineError, EoiListener};

use crate::apics::Apics;
use crate::cache::JumpCache;
use crate::debug::Breakpoints;
use crate::events::Reinject;
use crate::insn::{Fault, HIGH8, Insn};
use crate::jit;
use crate::kvmclock::KvmClock;
use crate::lapic::Lapic;
use crate::run::End;
use crate::state::{CS, CodeSize, Cpu, flags};
use crate::tier::Tier;

const CR0_AM: u64 = 1 << 18;
use crate::tlb::{self, Tlb};

pub const DE: u8 = 0;
pub const DB: u8 = 1;
pub const BP: u8 = 3;
pub const OF: u8 = 4;
pub const BR: u8 = 5;
pub const UD: u8 = 6;
pub const NM: u8 = 7;
pub const DF: u8 = 8;
pub const TS: u8 = 10;
pub const NP: u8 = 11;
pub const SS: u8 = 12;
pub const GP: u8 = 13;
pub const PF: u8 = 14;
pub const MF: u8 = 16;
pub const AC: u8 = 17;
pub const XM: u8 = 19;

/// An exception on its way, with its error code where the vector has one. `cr2` is set for #PF only.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exception {
    pub vector: u8,
    pub error: Option<u32>,
    pub cr2: u64,
}

/// Why an instruction did not complete.
#[derive(Debug, Clone)]
pub enum Pending {
    Exception(Exception),
    /// The host side failed: damaged snapshot memory. The engine stops here, before the instruction.
    Memory(MemoryError),
    /// The engine cannot execute this instruction; it stops before it.
    Failed(EngineError),
    /// The machine is to be reset.
    TripleFault,
    /// Time is a count of instructions and this one wants to know it (see [`Core::at_known_count`]): the loop executes it again,
    /// by itself.
    Count,
}

/// What all vCPUs of a machine share.
pub struct Shared {
    pub memory: Arc<GuestMemory>,
    pub bus: Arc<Bus>,
    pub clock: Arc<Clock>,
    pub control: Arc<Control>,
    pub apics: Arc<Apics>,
    /// Physical address bits that CPUID shows and page tables may use.
    pub phys_bits: u8,
    /// Changes of the CPU profile.
    pub switches: Switches,
    /// What runs decoded blocks.
    pub tier: Tier,
}

impl Shared {
    /// `eoi` is told of the end of level-triggered interrupts. Profile and tier are the default ones.
    pub fn new(
        memory: Arc<GuestMemory>,
        bus: Arc<Bus>,
        clock: Arc<Clock>,
        control: Arc<Control>,
        vcpus: usize,
        phys_bits: u8,
        eoi: Option<Arc<dyn EoiListener>>,
    ) -> Self {
        let apics = Arc::new(Apics::new(vcpus, control.clone(), eoi));
        Self { memory, bus, clock, control, apics, phys_bits, switches: Switches::default(), tier: Tier::default() }
    }
}

/// One vCPU. Handlers get `&mut Core`; they never see the block cache.
pub struct Core {
    pub cpu: Cpu,
    pub shared: Arc<Shared>,
    /// Number of this vCPU = its APIC id.
    pub vcpu: usize,
    pub lapic: Lapic,
    pub kvmclock: KvmClock,
    /// IA32_TSC_ADJUST: guest TSC = the machine's clock + this.
    pub tsc_adjust: u64,
    /// AMD HWCR as far as the guest may write it.
    pub hwcr: u64,
    /// An event whose delivery a snapshot interrupted (only KVM makes such ones): comes before anything else.
    pub reinject: Option<Reinject>,
    /// Mail was taken over into the state before the vCPU ran: by whoever saved it.
    pub(crate) mail_read: bool,
    /// What the debug registers watch.
    pub breakpoints: Breakpoints,
    /// Set together with returning [`Fault`].
    pub fault: Option<Pending>,
    /// The #GP in `fault` is of a non-canonical address: the loop turns it into #SS for stack references.
    pub(crate) noncanonical: bool,
    /// PAUSE was executed: the loop gives the turn back.
    pub(crate) yielded: bool,
    /// The machine's time is the count of instructions ([`vcpu::Count`]).
    pub(crate) counted: bool,
    /// What `cpu.icount` is behind the machine's count: set by the engine before each turn.
    pub(crate) count_base: u64,
    /// `cpu.icount` is right for the instruction being executed. False only inside a block of a counted machine.
    pub(crate) count_known: bool,
    /// The next instruction is executed by itself.
    pub(crate) alone: bool,
    /// Guest physical page of this vCPU's xAPIC registers; `u64::MAX` when disabled or in x2APIC mode.
    pub lapic_page: u64,
    pub(crate) tlb: Tlb,
    /// Which half of the TLB instructions use now: 0 or [`tlb::USER`]. Follows CPL.
    pub(crate) half: usize,
    /// Ring 3 with EFLAGS.AC and CR0.AM: every access must be aligned. Then no translation of user code is kept, so that all its
    /// accesses take the slow path, which checks.
    pub(crate) aligned: bool,
    /// Where the loop stops in the running block: one past the last instruction it may execute. Null once something asked to
    /// leave at the next instruction boundary (see [`Core::leave`]).
    pub(crate) stop_at: *const Insn,
    /// Instructions that the run loop may still execute, as seen by REP handlers (each iteration counts one).
    pub(crate) budget: u64,
    /// Guest physical ranges with decoded code that were written: the loop drops the blocks at the next boundary.
    pub(crate) code_written: Vec<(u64, u64)>,
    /// Number of the current set of translations as far as fetching goes; jump cache entries of others are stale.
    pub(crate) epoch: u64,
    pub(crate) jumps: JumpCache,
    /// As `epoch`, for pages that are global: a CR3 write leaves them.
    pub(crate) epoch_global: u64,
    /// The epochs with the mode: one of them is what a jump cache entry must match.
    pub(crate) jump_key: u64,
    pub(crate) jump_key_global: u64,
    /// CS base, 0 in 64-bit code.
    pub(crate) fetch_base: u64,
    /// First instruction of the running block.
    pub(crate) block_at: *const Insn,
    /// How far this vCPU has followed the block cache.
    pub(crate) generation: u64,
    pub(crate) marks_seen: usize,
    pub(crate) scratch: Vec<Insn>,
    /// What translated code needs: its table of jump targets, the machine's, the table of instructions that it lets functions execute,
    /// its budget when it was entered (or last counted), how an instruction left it, and a panic on its way through it.
    pub(crate) codes: jit::Codes,
    pub(crate) places: *const jit::Places,
    pub(crate) sites: *const jit::Site,
    pub(crate) entered: u64,
    pub(crate) ended: Option<End>,
    /// Entries of translated code that begin with the guest's MXCSR loaded.
    pub(crate) floats: u8,
    /// The guest's x87 registers on their way; after how many x87 instructions they are loaded, and how many there were.
    pub(crate) x87: jit::X87Image,
    pub(crate) x87_after: u8,
    pub(crate) x87_count: u8,
    pub(crate) panic: Option<Box<dyn std::any::Any + Send>>,
}

// SAFETY: `stop_at`, `block_at`, `places` and `sites` are used while the core runs only, and host addresses in the TLB stay valid while `shared.memory` lives, which is as long as
// the core does; neither is tied to a thread.
unsafe impl Send for Core {}

impl Core {
    /// vCPU number `vcpu` after power-on.
    pub fn new(shared: Arc<Shared>, vcpu: usize) -> Self {
        let mut cpu = Cpu::default();
        cpu.reset(false, vcpu as u32);
        let counted = shared.clock.count().is_some();
        let lapic = Lapic::new(vcpu as u32);
        lapic.publish(&shared.apics);
        Self {
            cpu,
            shared,
            vcpu,
            kvmclock: KvmClock::default(),
            tsc_adjust: 0,
            hwcr: 0,
            reinject: None,
            mail_read: false,
            breakpoints: Breakpoints::default(),
            fault: None,
            noncanonical: false,
            yielded: false,
            counted,
            count_base: 0,
            count_known: true,
            alone: false,
            lapic_page: lapic.mmio_page().unwrap_or(u64::MAX),
            lapic,
            tlb: Tlb::default(),
            half: 0,
            aligned: false,
            stop_at: std::ptr::null(),
            budget: 0,
            code_written: Vec::new(),
            epoch: 3,
            jumps: JumpCache::default(),
            epoch_global: 2,
            jump_key: 0,
            jump_key_global: 0,
            fetch_base: 0,
            block_at: std::ptr::null(),
            generation: 0,
            marks_seen: 0,
            scratch: Vec::new(),
            codes: jit::Codes::default(),
            places: std::ptr::null(),
            sites: std::ptr::null(),
            entered: 0,
            ended: None,
            floats: 0,
            x87: jit::X87Image::default(),
            x87_after: 0,
            x87_count: 0,
            panic: None,
        }
    }

    /// `return Err(core.raise(GP, Some(0)))`.
    #[cold]
    pub fn raise(&mut self, vector: u8, error: Option<u32>) -> Fault {
        self.fault = Some(Pending::Exception(Exception { vector, error, cr2: 0 }));
        Fault
    }

    /// `return Err(core.unsupported(message))`: stops the machine before this instruction.
    #[cold]
    pub fn unsupported(&mut self, message: String) -> Fault {
        self.fault = Some(Pending::Failed(EngineError::new("unsupported-instruction", message)));
        Fault
    }

    /// To be called before time is looked at and before a device is touched, which may do so; no effect may come before it. Where time
    /// is a count of instructions, the exact count is then in the machine's clock, whatever way the instruction is executed.
    #[inline]
    pub(crate) fn at_known_count(&mut self) -> Result<(), Fault> {
        if !self.counted {
            return Ok(());
        }
        if !self.count_known {
            self.fault = Some(Pending::Count);
            return Err(Fault);
        }
        self.tell_count();
        Ok(())
    }

    /// Brings the machine's count of instructions up to this vCPU's.
    pub(crate) fn tell_count(&self) {
        if let Some(count) = self.shared.clock.count() {
            count.set_retired(self.count_base.wrapping_add(self.cpu.icount));
        }
    }

    /// Makes the loop leave the running block at the end of this instruction, whatever [`Flow`](crate::insn::Flow) it returns.
    #[inline(always)]
    pub fn leave(&mut self) {
        self.stop_at = std::ptr::null();
    }

    /// Whether [`Core::leave`] was called during this block.
    #[inline(always)]
    pub(crate) fn leaving(&self) -> bool {
        self.stop_at.is_null()
    }

    /// Recomputes what is derived from CPL and the segments. The loop calls it after every `Leave`, `LeaveJump` and delivered
    /// exception; a handler needs it only when it goes on to access memory after it changed CPL.
    pub fn refresh(&mut self) {
        self.half = if self.cpu.cpl == 3 { tlb::USER } else { 0 };
        let aligned = self.cpu.cpl == 3 && self.cpu.flags & flags::AC != 0 && self.cpu.cr0 & CR0_AM != 0;
        if aligned != self.aligned {
            self.aligned = aligned;
            self.flush_tlb_all();
        }
        for i in 0..6 {
            self.cpu.seg_base[i] = self.cpu.seg[i].base;
        }
        self.fetch_base = if self.cpu.code_size == CodeSize::Bits64 { 0 } else { self.cpu.seg[CS].base };
        self.set_jump_key();
    }

    /// CR3 was written: drops translations that are not global.
    pub fn flush_tlb(&mut self) {
        self.tlb.flush();
        self.codes.flush();
        self.epoch += 2;
        self.set_jump_key();
    }

    /// CR0, CR4 or EFER paging bits were written, or the state was replaced: drops all translations.
    pub fn flush_tlb_all(&mut self) {
        self.tlb.flush_all();
        self.new_epoch();
    }

    /// INVLPG.
    pub fn flush_page(&mut self, linear: u64) {
        if self.tlb.drop_page(linear) {
            self.new_epoch();
        }
    }

    /// Makes the whole jump cache stale.
    pub(crate) fn new_epoch(&mut self) {
        self.epoch += 2;
        self.epoch_global += 2;
        self.tlb.clear_fetched();
        self.codes.clear();
        self.set_jump_key();
    }

    /// The epochs are odd and even numbers, so that the two keys never meet.
    fn set_jump_key(&mut self) {
        let mode = (self.cpu.code_size as u64) << 1 | u64::from(self.half != 0);
        self.jump_key = self.epoch << 3 | mode;
        self.jump_key_global = self.epoch_global << 3 | mode;
    }
}

impl Cpu {
    /// 8-bit register by operand number: 0–15 low byte, `HIGH8 | n` second byte of register n.
    #[inline(always)]
    pub fn r8(&self, r: u8) -> u8 {
        (self.gpr[usize::from(r & 15)] >> ((r & HIGH8) >> 2)) as u8
    }
    #[inline(always)]
    pub fn r16(&self, r: u8) -> u16 {
        self.gpr[usize::from(r & 31)] as u16
    }
    #[inline(always)]
    pub fn r32(&self, r: u8) -> u32 {
        self.gpr[usize::from(r & 31)] as u32
    }
    #[inline(always)]
    pub fn r64(&self, r: u8) -> u64 {
        self.gpr[usize::from(r & 31)]
    }
    #[inline(always)]
    pub fn set_r8(&mut self, r: u8, v: u8) {
        let shift = (r & HIGH8) >> 2;
        let g = &mut self.gpr[usize::from(r & 15)];
        *g = *g & !(0xff << shift) | u64::from(v) << shift;
    }
    #[inline(always)]
    pub fn set_r16(&mut self, r: u8, v: u16) {
        let g = &mut self.gpr[usize::from(r & 31)];
        *g = *g & !0xffff | u64::from(v);
    }
    /// Zero-extends, as in 64-bit mode.
    #[inline(always)]
    pub fn set_r32(&mut self, r: u8, v: u32) {
        self.gpr[usize::from(r & 31)] = u64::from(v);
    }
    #[inline(always)]
    pub fn set_r64(&mut self, r: u8, v: u64) {
        self.gpr[usize::from(r & 31)] = v;
    }
}
