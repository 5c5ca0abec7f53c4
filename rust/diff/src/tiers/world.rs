//! The little machine that both tiers run: 128 KiB of RAM, page tables with every kind of page, exception routines that take the
//! guest on, and one memory-mapped device that remembers what was done to it.

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use vcpu::Device;
use x86::apics::{Apics, FIXED, Message};
use x86::state::{CS, CodeSize, Cpu, DS, ES, FS, GS, SS, Segment, Table};

use super::routines::{BOOT, FIRST_INTERRUPT, Start};
use super::tables::ROOTS;
use super::{routines, tables};
use crate::rng::Rng;
use crate::values;

pub const RAM: usize = 0x2_0000;
const GDT: u64 = 0x5000;
/// One for each vCPU.
const TSS: u64 = 0x5800;
const TSS_LEN: u64 = 0x80;
const IDT: u64 = 0x6000;
/// Interrupt stacks of the vCPUs grow down from here; see `descriptors`.
const KERNEL_STACKS: [u64; 2] = [0x9000, 0xb000];

/// Addresses from here on are relative to [`Frame::base`].
pub const CODE: u64 = 0x1_0000;
pub const CODE_LEN: u64 = 0x4000;
pub const DATA: u64 = 0x1_4000;
pub const READ_ONLY: u64 = 0x1_6000;
pub const SUPERVISOR: u64 = 0x1_7000;
pub const HOLE: u64 = 0x1_8000;
pub const FRESH: u64 = 0x1_9000;
pub const STACK: u64 = 0x1_a000;
pub const DEVICE: u64 = 0x1_c000;
pub const NOBODY: u64 = 0x1_d000;
pub const LAST: u64 = 0x1_e000;
/// The LAPIC's registers.
pub const APIC: u64 = 0x3_0000;
/// The same code again.
pub const ALIAS: u64 = 0x11_0000;
/// All of RAM again, as one large page.
pub const LARGE: u64 = 0x20_0000;
/// Images that x87 and SSE state is loaded from: FXSAVE's, FSAVE's, environments, control words, MXCSRs.
pub const FX_IMAGES: u64 = DATA + 0x1400;
pub const FP_IMAGES: u64 = DATA + 0x1800;
pub const ENVIRONMENTS: u64 = DATA + 0x1900;
pub const CONTROLS: u64 = DATA + 0x1980;
pub const MXCSRS: u64 = DATA + 0x19a0;
/// Where the guest keeps addresses of its own code.
pub const JUMP_TABLE: u64 = DATA + 0x1f00;

/// Physical.
pub const DEVICE_GPA: u64 = 0x8000_0000;

pub const KERNEL_CS: u16 = 0x08;
pub const KERNEL_DS: u16 = 0x10;
pub const USER_CS32: u16 = 0x1b;
pub const USER_DS: u16 = 0x23;
pub const USER_CS64: u16 = 0x2b;
const TR: u16 = 0x30;
pub const KERNEL_CS32: u16 = 0x40;
pub const KERNEL_CS16: u16 = 0x48;
pub const USER_CS16: u16 = 0x53;

/// What a case's memory and state are made for.
#[derive(Debug, Clone, Copy)]
pub struct Frame {
    pub cpl: u8,
    /// What is added to all addresses of the guest's own: zero, or one of the upper half.
    pub base: u64,
    /// Pages have the global bit.
    pub global: bool,
    /// What is tried more than anything else.
    pub focus: Focus,
    pub vcpus: usize,
}

/// What a program is full of, besides everything.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Focus {
    None,
    /// Page tables change, with a flush.
    Paging,
    /// Interrupts, and what holds them off.
    Interrupts,
    /// x87, MMX, SSE and what switches between them.
    Floats,
    /// String instructions that fault half way.
    Strings,
    /// Compatibility mode, 16 and 32 bits; the other ring.
    Modes,
    /// Operands that reach into the next page.
    Edges,
}

impl Focus {
    fn any(rng: &mut Rng) -> Self {
        use Focus as F;
        rng.pick(&[
            F::None,
            F::None,
            F::Paging,
            F::Paging,
            F::Interrupts,
            F::Interrupts,
            F::Floats,
            F::Floats,
            F::Strings,
            F::Modes,
            F::Modes,
            F::Edges,
        ])
    }
}

impl Frame {
    pub fn any(rng: &mut Rng) -> Self {
        let cpl = if rng.chance(50) { 3 } else { 0 };
        let base = rng.pick(&[0, 0, 0xffff_8000_0000_0000, 0xffff_ffff_8000_0000]);
        let focus = Focus::any(rng);
        let global = rng.chance(if focus == Focus::Paging { 30 } else { 50 });
        Self { cpl, base, global, focus, vcpus: if rng.chance(12) { 2 } else { 1 } }
    }

    /// Selectors of code of `bits` bits at privilege level `cpl`, and of its stack.
    pub fn selectors(cpl: u8, bits: u32) -> (u16, u16) {
        match (cpl, bits) {
            (3, 16) => (USER_CS16, USER_DS),
            (3, 32) => (USER_CS32, USER_DS),
            (3, _) => (USER_CS64, USER_DS),
            (_, 16) => (KERNEL_CS16, KERNEL_DS),
            (_, 32) => (KERNEL_CS32, KERNEL_DS),
            _ => (KERNEL_CS, KERNEL_DS),
        }
    }
}

/// Physical address of the guest's `address` (without base): neighbouring pages are not neighbours there.
pub fn physical(address: u64) -> u64 {
    let page = match address >> 12 {
        0x11 => 0x12,
        0x12 => 0x11,
        0x14 => 0x15,
        0x15 => 0x14,
        0x1e => 0x1f,
        page => page,
    };
    page << 12 | address & 0xfff
}

/// A device whose registers are a function of every access so far, and which interrupts now and then when it is accessed.
#[derive(Default)]
pub struct Probe {
    state: Mutex<u64>,
    apics: Mutex<Option<Arc<Apics>>>,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Probe {
    fn next(&self, word: u64) -> u64 {
        let mut state = locked(&self.state);
        *state = (*state ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29);
        *state
    }
    pub fn state(&self) -> u64 {
        *locked(&self.state)
    }
    /// `apics`: where it sends interrupts, if it does.
    pub fn reset(&self, apics: Option<Arc<Apics>>) {
        *locked(&self.state) = 1;
        *locked(&self.apics) = apics;
    }
    fn interrupt(&self) {
        if let Some(apics) = &*locked(&self.apics) {
            let state = self.state();
            if state & 3 == 0 {
                let vcpu = (state >> 2) as usize % apics.count();
                apics.send_self(vcpu, Message { vector: FIRST_INTERRUPT | (state >> 8) as u8 & 0xbf, mode: FIXED, level: false });
            }
        }
    }
}

impl Device for Probe {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let v = self.next(offset << 8 | data.len() as u64).to_le_bytes();
        for (to, from) in data.iter_mut().zip(v) {
            *to = from;
        }
        self.interrupt();
    }
    fn write(&self, offset: u64, data: &[u8]) {
        self.next(offset << 8 | 0x80 | data.len() as u64);
        for &b in data {
            self.next(b.into());
        }
        self.interrupt();
    }
}

pub fn put(ram: &mut [u8], at: u64, v: u64) {
    ram[at as usize..at as usize + 8].copy_from_slice(&v.to_le_bytes());
}

pub fn get(ram: &[u8], at: u64) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&ram[at as usize..at as usize + 8]);
    u64::from_le_bytes(word)
}

/// Numbers at which arithmetic changes its mind: made once, since making them takes longer than most cases.
fn known() -> &'static [u64] {
    static KNOWN: OnceLock<Vec<u64>> = OnceLock::new();
    KNOWN.get_or_init(|| {
        let rng = &mut Rng::new(0, 0);
        let mut any = |n: u64| match n % 3 {
            0 => values::integer(rng),
            1 => values::float64(rng),
            _ => u64::from(values::float32(rng)) << 32 | u64::from(values::float32(rng)),
        };
        (0..1 << 13).map(&mut any).collect()
    })
}

/// Tables, routines and random data; no code yet.
pub fn memory(rng: &mut Rng, frame: Frame) -> Vec<u8> {
    let mut ram = vec![0; RAM];
    let known = known();
    for chunk in ram[DATA as usize..].chunks_exact_mut(8) {
        let random = rng.bits();
        let v = if random & 7 < 3 { known[(random >> 3) as usize % known.len()] } else { random };
        chunk.copy_from_slice(&v.to_le_bytes());
    }
    ram[CODE as usize..DATA as usize].fill(0xcc);
    tables::build(&mut ram, rng, frame);
    descriptors(&mut ram, rng, frame);
    routines::install(&mut ram, KERNEL_STACKS[0] - 0x900);
    put(&mut ram, routines::MXCSR, 0x1f80);
    for n in 0..32 {
        routines::set_resume(&mut ram, n, frame.base + CODE, stack(rng, frame), Frame::selectors(frame.cpl, 64));
    }
    images(&mut ram, rng);
    ram
}

/// A good stack pointer.
pub fn stack(rng: &mut Rng, frame: Frame) -> u64 {
    frame.base + STACK + if rng.chance(90) { 0x800 + rng.below(0x100) * 8 } else { 0xff0 + rng.below(0x20) }
}

/// Where exception routines take the guest on: instructions (address without base, bits of code), and what is in its table of jumps.
pub fn set_resume(ram: &mut [u8], rng: &mut Rng, frame: Frame, starts: &[(u64, u32)]) {
    for n in 0..32 {
        let (at, bits) = rng.pick(starts);
        let cpl = if frame.focus == Focus::Modes && rng.chance(30) { 3 - frame.cpl } else { frame.cpl };
        let rip = match bits {
            16 => at - CODE,
            32 => at,
            _ => at + frame.base,
        };
        routines::set_resume(ram, n, rip, stack(rng, frame), Frame::selectors(cpl, bits));
        put(ram, physical(JUMP_TABLE) + 8 * n, rng.pick(starts).0 + frame.base);
    }
}

fn descriptors(ram: &mut [u8], rng: &mut Rng, frame: Frame) {
    let entries: [(u16, u64); 8] = [
        (KERNEL_CS, 0x00af_9b00_0000_ffff),
        (KERNEL_DS, 0x00cf_9300_0000_ffff),
        (USER_CS32, 0x00cf_fb00_0000_ffff),
        (USER_DS, 0x00cf_f300_0000_ffff),
        (USER_CS64, 0x00af_fb00_0000_ffff),
        (KERNEL_CS32, 0x00cf_9b00_0000_ffff),
        // These begin where the code is.
        (KERNEL_CS16, 0x0000_9b01_0000_ffff),
        (USER_CS16, 0x0000_fb01_0000_ffff),
    ];
    for (selector, entry) in entries {
        put(ram, GDT + u64::from(selector & !7), entry);
    }
    put(ram, GDT + u64::from(TR), 0x67 | TSS << 16 | 0x8b << 40);
    for (n, stack) in KERNEL_STACKS.into_iter().enumerate() {
        let tss = TSS + TSS_LEN * n as u64;
        put(ram, tss + 4, stack - 0x400);
        for (ist, below) in [0, 0x600, 0x700].into_iter().enumerate() {
            put(ram, tss + 36 + 8 * ist as u64, stack - below);
        }
        ram[tss as usize + 102..tss as usize + 104].copy_from_slice(&0x68u16.to_le_bytes());
    }
    let any = u64::from(rng.chance(70));
    for vector in 0..=255 {
        let at = routines::entry(vector, frame.vcpus == 1);
        let ist = match vector {
            8 => 2,
            2 => 3,
            _ => any,
        };
        let dpl = if matches!(vector, 3 | 4 | 32..) { 3 } else { 0 };
        let low = at & 0xffff | u64::from(KERNEL_CS) << 16 | ist << 32 | (0x8e | dpl << 5) << 40 | (at >> 16 & 0xffff) << 48;
        put(ram, IDT + 16 * u64::from(vector), low);
        put(ram, IDT + 16 * u64::from(vector) + 8, at >> 32);
    }
}

/// Random registers; RIP is left to the caller.
pub fn registers(rng: &mut Rng, frame: Frame, vcpu: usize) -> Cpu {
    let mut cpu = Cpu::default();
    for g in &mut cpu.gpr[..16] {
        *g = values::integer(rng);
    }
    cpu.gpr[4] = stack(rng, frame);
    let flat = |selector, attr| Segment { base: 0, limit: u32::MAX, selector, attr };
    let user = frame.cpl == 3;
    cpu.seg[CS] = if user { flat(USER_CS64, 0xa0fb) } else { flat(KERNEL_CS, 0xa09b) };
    for i in [ES, SS, DS] {
        cpu.seg[i] = if user { flat(USER_DS, 0xc0f3) } else { flat(KERNEL_DS, 0xc093) };
    }
    let bases = [0, 0x1000, frame.base + DATA, frame.base.wrapping_sub(0x800)];
    for i in [FS, GS] {
        cpu.seg[i] = Segment { base: rng.pick(&bases), attr: Segment::UNUSABLE, ..Segment::default() };
    }
    cpu.ldtr = Segment { attr: Segment::UNUSABLE, ..Segment::default() };
    cpu.tr = Segment { base: TSS + TSS_LEN * vcpu as u64, limit: 0x67, selector: TR, attr: 0x8b };
    cpu.gdtr = Table { base: GDT, limit: 0x5f };
    cpu.idtr = Table { base: IDT, limit: 0xfff };
    cpu.cr0 = 0x8000_0031 | if rng.chance(60) { 1 << 16 } else { 0 } | if rng.chance(70) { 1 << 18 } else { 0 };
    cpu.cr0 |= if rng.chance(10) { 8 } else { 0 } | if rng.chance(2) { 4 } else { 0 } | if rng.chance(60) { 2 } else { 0 };
    cpu.cr3 = ROOTS[0];
    cpu.cr4 = 0x1_0020 | if rng.chance(97) { 0x200 } else { 0 } | if rng.chance(80) { 0x400 } else { 0 };
    cpu.cr4 |= if rng.chance(50) { 0x80 } else { 0 } | if rng.chance(20) { 8 } else { 0 } | if rng.chance(10) { 4 } else { 0 };
    cpu.efer = 0xd01;
    cpu.cpl = frame.cpl;
    cpu.code_size = CodeSize::Bits64;
    cpu.msr.star = u64::from(USER_CS32) << 48 | u64::from(KERNEL_CS) << 32;
    cpu.msr.lstar = routines::system_call(rng.below(4));
    cpu.msr.cstar = routines::system_call(2);
    cpu.msr.fmask = 0x4_7700;
    cpu.msr.kernel_gs_base = frame.base + DATA;
    let mut flags = 2 | rng.bits() & 0x8d5;
    for (percent, bit) in [(10, 1 << 10), (3, 1 << 18), (3, 1 << 8), (2, 1 << 14), (50, 1 << 9), (2, 1 << 16)] {
        flags |= if rng.chance(percent) { bit } else { 0 };
    }
    if rng.chance(if frame.focus == Focus::Interrupts { 70 } else { 30 }) {
        flags |= 0x3000;
    }
    cpu.set_rflags(flags);
    if rng.chance(4) {
        for n in 0..4 {
            cpu.dr[n] = frame.base
                + match rng.below(4) {
                    0 => CODE + rng.below(0x200),
                    1 => STACK + 0x800 + rng.below(0x800),
                    _ => DATA + rng.below(0x2000),
                };
        }
        cpu.dr[7] = 0x400 | rng.bits() & 0xffff_03ff;
    } else {
        cpu.dr[7] = 0x400;
    }
    cpu.dr[6] = 0xffff_0ff0;
    floats(rng, &mut cpu);
    cpu
}

/// Images of x87 and SSE state: valid ones, mostly with exceptions masked.
pub fn images(ram: &mut [u8], rng: &mut Rng) {
    let mut put = |at: u64, bytes: &[u8]| {
        let at = physical(at) as usize;
        ram[at..at + bytes.len()].copy_from_slice(bytes);
    };
    let control = |rng: &mut Rng| if rng.chance(50) { 0x37f } else { 0x40 | rng.bits() as u16 & 0xf3f };
    let mxcsr = |rng: &mut Rng| 0x1f80 & if rng.chance(60) { !0 } else { rng.bits() as u32 } | rng.bits() as u32 & 0xe03f;
    for n in 0..2 {
        let at = FX_IMAGES + 512 * n;
        put(
            at,
            &[control(rng), rng.bits() as u16 & 0x7f7f, rng.bits() as u16 & 0xff, rng.bits() as u16 & 0x7ff]
                .map(u16::to_le_bytes)
                .concat(),
        );
        put(at + 24, &mxcsr(rng).to_le_bytes());
        for r in 0..8 {
            let (mantissa, sign_exp) = values::float80(rng);
            put(at + 32 + 16 * r, &[&mantissa.to_le_bytes()[..], &sign_exp.to_le_bytes()].concat());
        }
        let status = [control(rng), 0, rng.bits() as u16 & 0x7f7f, 0, rng.bits() as u16, 0];
        put(FP_IMAGES + 128 * n, &status.map(u16::to_le_bytes).concat());
    }
    for n in 0..4 {
        let status = [control(rng), 0, rng.bits() as u16 & 0x7f7f, 0, rng.bits() as u16, 0];
        put(ENVIRONMENTS + 32 * n, &status.map(u16::to_le_bytes).concat());
    }
    for n in 0..16 {
        put(CONTROLS + 2 * n, &control(rng).to_le_bytes());
    }
    for n in 0..8 {
        put(MXCSRS + 4 * n, &mxcsr(rng).to_le_bytes());
    }
}

/// Makes registers that would begin at RIP in 64-bit code begin in real mode, on the way there.
pub fn from_real_mode(ram: &mut [u8], cpu: &mut Cpu, frame: Frame) {
    let (cs, ss) = Frame::selectors(frame.cpl, 64);
    let start = Start { cr0: cpu.cr0, cr4: cpu.cr4, rflags: cpu.rflags(), cs, ss, rip: cpu.rip, rsp: cpu.gpr[4] };
    routines::install_boot(ram, &start);
    let real = |attr| Segment { base: 0, limit: 0xffff, selector: 0, attr };
    for i in [ES, SS, DS] {
        cpu.seg[i] = real(0x93);
    }
    cpu.seg[CS] = real(0x9b);
    (cpu.cr0, cpu.cr3, cpu.cr4, cpu.efer, cpu.cpl) = (0x10, 0, 0, 0, 0);
    cpu.code_size = CodeSize::Bits16;
    cpu.set_rflags(2);
    cpu.rip = BOOT;
}

/// Makes registers begin in compatibility mode, at an address without base.
pub fn in_compatibility_mode(cpu: &mut Cpu, frame: Frame, at: u64, bits: u32) {
    let user = if frame.cpl == 3 { 0x60 } else { 0 };
    let selector = Frame::selectors(frame.cpl, bits).0;
    (cpu.seg[CS], cpu.code_size, cpu.rip) = if bits == 16 {
        (Segment { base: CODE, limit: 0xffff, selector, attr: 0x9b | user }, CodeSize::Bits16, at - CODE)
    } else {
        (Segment { base: 0, limit: u32::MAX, selector, attr: 0xc09b | user }, CodeSize::Bits32, at)
    };
}

fn floats(rng: &mut Rng, cpu: &mut Cpu) {
    let style = rng.pick(&[values::Style::Integer, values::Style::Float32, values::Style::Float64]);
    for x in &mut cpu.xmm {
        *x = u128::from(values::lane(rng, style)) << 64 | u128::from(values::lane(rng, style));
    }
    cpu.mxcsr = 0x1f80;
    if rng.chance(30) {
        cpu.mxcsr |= rng.bits() as u32 & 0xe040;
    }
    if rng.chance(20) {
        cpu.mxcsr &= !0x1f80 | rng.bits() as u32;
    }
    if rng.chance(20) {
        cpu.mxcsr |= rng.bits() as u32 & 0x3f;
    }
    for st in &mut cpu.fpu.st {
        (st.mantissa, st.sign_exp) = values::float80(rng);
    }
    cpu.fpu.fcw = 0x37f & !0xf00 | rng.bits() as u16 & 0xf00;
    if rng.chance(10) {
        cpu.fpu.fcw &= !0x3f | rng.bits() as u16;
    }
    cpu.fpu.fsw = rng.bits() as u16 & 0x7f00;
    cpu.fpu.ftw = rng.bits() as u8;
}
