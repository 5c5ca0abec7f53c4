//! Runs cases on the software engine: one `Core` in ring 3 of a small world with the same linear addresses as the native side.
//! Exceptions go through an IDT whose routines only halt, so what is compared is what a guest's kernel would be told.

use std::sync::Arc;

use memory::{GuestMemory, RegionLayout};
use vcpu::{Bus, Clock, Control};
use x86::cache::Cache;
use x86::core::{Core, Pending, Shared};
use x86::decode::{self, Decoded};
use x86::insn::Flow;
use x86::run::RunExit;
use x86::state::{CS, CodeSize, Cpu, DS, ES, F80, FS, GPR_BLOCK, GS, SS, Segment, Table};

use crate::case::{CODE, CODE_LEN, Case, DATA, DATA_LEN, INT3, Outcome, READ_ONLY, State, USER_CS32, USER_CS64, USER_DS, fx};

/// Supervisor's view of physical memory.
const KERNEL: u64 = 0xffff_8000_0000_0000;
const PML4: u64 = 0x1000;
const LOW: u64 = 0x2000;
const PD: u64 = 0x3000;
const PT_CODE: u64 = 0x4000;
const PT_DATA: u64 = 0x5000;
const HIGH: u64 = 0x6000;
const PD_HIGH: u64 = 0x7000;
const PT_HIGH: u64 = 0x8000;
const IDT: u64 = 0x9000;
const GDT: u64 = 0xa000;
const TSS: u64 = 0xb000;
const ROUTINES: u64 = 0xc000;
const STACK_TOP: u64 = 0xe000;
const CODE_PHYS: u64 = 0x1_0000;
const DATA_PHYS: u64 = 0x2_0000;
const RAM: u64 = 0x4_0000;

const P: u64 = 1;
const W: u64 = 2;
const U: u64 = 4;
const A: u64 = 0x20;
const D: u64 = 0x40;
const NX: u64 = 1 << 63;

const KERNEL_CS: u16 = 0x10;
const TR: u16 = 0x40;
/// Instructions (REP iterations) after which a case is taken for a loop.
const BUDGET: u64 = 1 << 20;

/// How our side ended when it did not end like a processor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Trouble {
    /// The engine said so: an instruction that it lacks.
    Unsupported(String),
    Other(String),
}

pub struct Ours {
    core: Core,
    cache: Cache,
    memory: Arc<GuestMemory>,
}

impl Ours {
    pub fn new() -> Self {
        let memory = Arc::new(GuestMemory::new(&[RegionLayout { gpa: 0, size: RAM }]).expect("256 KiB of guest memory"));
        build_world(&memory);
        let clock = Arc::new(Clock::new(1_000_000, 0));
        let shared = Shared::new(memory.clone(), Arc::new(Bus::default()), clock, Arc::new(Control::default()), 1, 40, None);
        Self { core: Core::new(Arc::new(shared), 0), cache: Cache::new(), memory }
    }

    /// With every block translated at its first execution.
    pub fn translating() -> Self {
        let mut ours = Self::new();
        ours.cache.translate_after(0).expect("this host does not let us translate");
        ours
    }

    pub fn run(&mut self, case: &Case) -> Result<Outcome, Trouble> {
        let at = case.state.rip - CODE;
        let len = case.bytes.len().min(CODE_LEN - at as usize);
        self.write(CODE_PHYS + at, &case.bytes[..len]);
        self.write(DATA_PHYS, &case.data[..]);
        load(&mut self.core.cpu, case);
        self.core.refresh();
        let mut exit = self.core.run(&mut self.cache, BUDGET);
        while matches!(exit, RunExit::Pause) {
            exit = self.core.run(&mut self.cache, BUDGET);
        }
        self.write(CODE_PHYS + at, &vec![INT3; len]);
        match exit {
            RunExit::Halted => self.outcome(),
            RunExit::Failed(e) if e.code == "unsupported-instruction" => Err(Trouble::Unsupported(e.message)),
            other => Err(Trouble::Other(format!("{other:?}"))),
        }
    }

    /// The same with nothing but decoder and instruction functions: no block loop, no delivery. For work on those alone.
    pub fn run_handlers(&mut self, case: &Case) -> Result<Outcome, Trouble> {
        let mut code = [INT3; CODE_LEN];
        let at = (case.state.rip - CODE) as usize;
        let len = case.bytes.len().min(CODE_LEN - at);
        code[at..at + len].copy_from_slice(&case.bytes[..len]);
        self.write(DATA_PHYS, &case.data[..]);
        load(&mut self.core.cpu, case);
        self.core.refresh();
        let size = self.core.cpu.code_size;
        let mut insns = Vec::new();
        for _ in 0..BUDGET {
            let rip = self.core.cpu.rip;
            let offset = rip.wrapping_sub(CODE);
            if offset >= CODE_LEN as u64 {
                let canonical = (rip as i64) << 16 >> 16 == rip as i64;
                return Ok(if canonical { self.ended(14, 0x14, rip) } else { self.ended(13, 0, 0) });
            }
            if code[offset as usize] == INT3 {
                self.core.cpu.rip += 1;
                return Ok(self.ended(3, 0, 0));
            }
            if decode::block(&code[offset as usize..], size, &mut insns) == Decoded::Short {
                return Ok(self.ended(14, 0x14, CODE + CODE_LEN as u64));
            }
            let insn = insns[0];
            self.core.cpu.gpr[usize::from(GPR_BLOCK)] = rip;
            self.core.fault = None;
            let next = rip.wrapping_add(insn.len.into());
            match (insn.f)(&mut self.core, &insn) {
                Ok(Flow::Next | Flow::Leave) => self.core.cpu.rip = next,
                Ok(Flow::Jump | Flow::Jump2 | Flow::LeaveJump | Flow::Again | Flow::Stale) => {}
                Err(_) => match self.core.fault.take() {
                    Some(Pending::Exception(e)) => return Ok(self.ended(e.vector, e.error.unwrap_or(0), e.cr2)),
                    Some(Pending::Failed(e)) if e.code == "unsupported-instruction" => {
                        return Err(Trouble::Unsupported(e.message));
                    }
                    other => return Err(Trouble::Other(format!("{other:?}"))),
                },
            }
            if case.state.rflags & 0x100 != 0 {
                return Ok(self.ended(1, 0, 0));
            }
        }
        Err(Trouble::Other("does not end".into()))
    }

    /// The outcome of an exception that has not been delivered.
    fn ended(&self, vector: u8, error: u32, cr2: u64) -> Outcome {
        let cpu = &self.core.cpu;
        let mut state = registers(cpu);
        state.rip = cpu.rip;
        state.rflags = cpu.rflags();
        Outcome { state, vector, error, cr2, data: self.data() }
    }

    fn data(&self) -> Box<[u8; DATA_LEN]> {
        let mut data = Box::new([0; DATA_LEN]);
        self.memory.read(DATA_PHYS, &mut data[..]).expect("inside guest memory");
        data
    }

    fn write(&self, gpa: u64, data: &[u8]) {
        self.memory.write(gpa, data).expect("inside guest memory");
    }

    fn read64(&self, gpa: u64) -> u64 {
        let mut b = [0; 8];
        self.memory.read(gpa, &mut b).expect("inside guest memory");
        u64::from_le_bytes(b)
    }

    /// Reads the exception frame that the routine found.
    fn outcome(&self) -> Result<Outcome, Trouble> {
        let cpu = &self.core.cpu;
        let routine = cpu.rip.wrapping_sub(KERNEL + ROUTINES);
        if routine >= 32 * 16 {
            return Err(Trouble::Other(format!("halted at {:#x}", cpu.rip)));
        }
        let vector = (routine / 16) as u8;
        let mut frame = cpu.gpr[4].wrapping_sub(KERNEL);
        let mut error = 0;
        if matches!(vector, 8 | 10..=14 | 17) {
            error = self.read64(frame) as u32;
            frame += 8;
        }
        let mut state = registers(cpu);
        state.rip = self.read64(frame);
        state.rflags = self.read64(frame + 16);
        state.gpr[4] = self.read64(frame + 24);
        state.selectors[CS] = self.read64(frame + 8) as u16;
        state.selectors[SS] = self.read64(frame + 32) as u16;
        Ok(Outcome { state, vector, error, cr2: cpu.cr2, data: self.data() })
    }
}

impl Default for Ours {
    fn default() -> Self {
        Self::new()
    }
}

fn registers(cpu: &Cpu) -> State {
    let mut state = State { gpr: cpu.gpr[..16].try_into().expect("16 registers"), ..State::default() };
    state.fs_base = cpu.seg[FS].base;
    state.gs_base = cpu.seg[GS].base;
    for (to, from) in state.selectors.iter_mut().zip(&cpu.seg) {
        *to = from.selector;
    }
    state.set_u16(fx::FCW, cpu.fpu.fcw);
    state.set_u16(fx::FSW, cpu.fpu.fsw);
    state.fx[fx::FTW] = cpu.fpu.ftw;
    state.set_mxcsr(cpu.mxcsr);
    let top = usize::from(cpu.fpu.fsw >> 11 & 7);
    for n in 0..8 {
        let r = cpu.fpu.st[(top + n) & 7];
        state.set_st(n, r.mantissa, r.sign_exp);
    }
    for n in 0..16 {
        state.set_xmm(n, cpu.xmm[n]);
    }
    state
}

fn load(cpu: &mut Cpu, case: &Case) {
    let s = &case.state;
    *cpu = Cpu::default();
    cpu.gpr[..16].copy_from_slice(&s.gpr);
    cpu.rip = s.rip;
    cpu.set_rflags(s.rflags);
    let flat = |selector, attr| Segment { base: 0, limit: u32::MAX, selector, attr };
    for i in [ES, SS, DS] {
        cpu.seg[i] = flat(USER_DS, 0xc0f3);
    }
    cpu.seg[CS] = if case.bits == 64 { flat(USER_CS64, 0xa0fb) } else { flat(USER_CS32, 0xc0fb) };
    for (i, base) in [(FS, s.fs_base), (GS, s.gs_base)] {
        let null = Segment { base, attr: Segment::UNUSABLE, ..Segment::default() };
        cpu.seg[i] = if case.bits == 64 { null } else { flat(USER_DS, 0xc0f3) };
    }
    cpu.ldtr = Segment { attr: Segment::UNUSABLE, ..Segment::default() };
    cpu.tr = Segment { base: KERNEL + TSS, limit: 0x67, selector: TR, attr: 0x8b };
    cpu.gdtr = Table { base: KERNEL + GDT, limit: 0x4f };
    cpu.idtr = Table { base: KERNEL + IDT, limit: 0xfff };
    cpu.cr0 = 0x8005_0033;
    cpu.cr3 = PML4;
    cpu.cr4 = 0x1_0620;
    cpu.efer = 0xd01;
    cpu.cpl = 3;
    cpu.code_size = if case.bits == 64 { CodeSize::Bits64 } else { CodeSize::Bits32 };
    cpu.fpu.fcw = s.u16(fx::FCW);
    cpu.fpu.fsw = s.u16(fx::FSW);
    cpu.fpu.ftw = s.fx[fx::FTW];
    let top = usize::from(cpu.fpu.fsw >> 11 & 7);
    for n in 0..8 {
        let (mantissa, sign_exp) = s.st(n);
        cpu.fpu.st[(top + n) & 7] = F80 { mantissa, sign_exp };
    }
    cpu.mxcsr = s.mxcsr();
    for n in 0..16 {
        cpu.xmm[n] = s.xmm(n);
    }
}

/// Page tables, descriptor tables and exception routines.
fn build_world(memory: &GuestMemory) {
    let put = |gpa: u64, v: u64| memory.write(gpa, &v.to_le_bytes()).expect("inside guest memory");
    let table = P | W | U | A;
    put(PML4, LOW | table);
    put(LOW, PD | table);
    put(PD + 8 * (CODE >> 21), PT_CODE | table);
    put(PD + 8 * (DATA >> 21), PT_DATA | table);
    for page in 0..CODE_LEN as u64 / 0x1000 {
        put(PT_CODE + 8 * page, (CODE_PHYS + 0x1000 * page) | P | U | A);
    }
    for page in 0..DATA_LEN as u64 / 0x1000 {
        let write = if DATA + 0x1000 * page < READ_ONLY { W } else { 0 };
        put(PT_DATA + 8 * page, (DATA_PHYS + 0x1000 * page) | P | U | A | D | NX | write);
    }
    put(PML4 + 8 * 256, HIGH | P | W | A);
    put(HIGH, PD_HIGH | P | W | A);
    put(PD_HIGH, PT_HIGH | P | W | A);
    for page in IDT / 0x1000..STACK_TOP / 0x1000 {
        put(PT_HIGH + 8 * page, (0x1000 * page) | P | W | A | D);
    }
    memory.write(CODE_PHYS, &vec![INT3; CODE_LEN]).expect("inside guest memory");

    // Linux's layout: 0x10 kernel code, 0x23 32-bit user code, 0x2b user data, 0x33 64-bit user code, 0x40 TSS.
    let descriptors = [0, 0x00cf_9b00_0000_ffff, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];
    let user = [0x00cf_fb00_0000_ffff, 0x00cf_f300_0000_ffff, 0x00af_fb00_0000_ffff];
    for (i, d) in descriptors.into_iter().chain(user).enumerate() {
        put(GDT + 8 * i as u64, d);
    }
    let base = KERNEL + TSS;
    put(GDT + u64::from(TR), 0x67 | (base & 0xff_ffff) << 16 | 0x8b << 40 | (base >> 24 & 0xff) << 56);
    put(GDT + u64::from(TR) + 8, base >> 32);
    put(TSS + 4, KERNEL + STACK_TOP);
    put(TSS + 36, KERNEL + STACK_TOP);
    // No I/O bitmap.
    memory.write(TSS + 102, &0x68u16.to_le_bytes()).expect("inside guest memory");
    for vector in 0..32 {
        let at = KERNEL + ROUTINES + 16 * vector;
        let dpl = if vector == 3 || vector == 4 { 3 } else { 0 };
        let low = at & 0xffff | u64::from(KERNEL_CS) << 16 | 1 << 32 | (0x8e | dpl << 5) << 40 | (at >> 16 & 0xffff) << 48;
        put(IDT + 16 * vector, low);
        put(IDT + 16 * vector + 8, at >> 32);
        put(ROUTINES + 16 * vector, 0xf4f4_f4f4_f4f4_f4f4);
    }
}
