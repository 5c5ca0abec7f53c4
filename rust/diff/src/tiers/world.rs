//! The little machine that both tiers run: 128 KiB of RAM, page tables with every kind of page, exception routines that take the
//! guest on, and one memory-mapped device that remembers what was done to it.

use std::sync::{Mutex, PoisonError};

use vcpu::Device;
use x86::state::{CS, CodeSize, Cpu, DS, ES, FS, GS, SS, Segment, Table};

use crate::rng::Rng;
use crate::values;

pub const RAM: usize = 0x2_0000;
const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const PD: u64 = 0x3000;
const PT: u64 = 0x4000;
const GDT: u64 = 0x5000;
const TSS: u64 = 0x5800;
const IDT: u64 = 0x6000;
const ROUTINES: u64 = 0x7000;
/// Interrupt stacks grow down from here, and from half a page below.
const KERNEL_STACK: u64 = 0x9000;
/// What the exception routines count, log and go on with.
const LOG: u64 = 0x9000;
const RESUME: u64 = LOG + 0x100;
const STACKS: u64 = LOG + 0x200;
const SYSTEM_CALL: u64 = 0xa000;
const PLAIN_GATE: u64 = SYSTEM_CALL + 0x40;
/// PDPT for addresses in the last 2 GiB.
const PDPT_LAST: u64 = 0xb000;

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
/// The same code again.
pub const ALIAS: u64 = 0x11_0000;
/// All of RAM again, as one large page.
pub const LARGE: u64 = 0x20_0000;
/// Where the guest keeps addresses of its own code.
pub const JUMP_TABLE: u64 = DATA + 0x1f00;

/// Physical.
pub const DEVICE_GPA: u64 = 0x8000_0000;
const NOBODY_GPA: u64 = 0x9000_0000;

pub const KERNEL_CS: u16 = 0x08;
pub const KERNEL_DS: u16 = 0x10;
pub const USER_CS32: u16 = 0x1b;
pub const USER_DS: u16 = 0x23;
pub const USER_CS64: u16 = 0x2b;
const TR: u16 = 0x30;
pub const SELECTORS: [u16; 10] = [0, 1, 3, KERNEL_CS, KERNEL_DS, USER_CS32, USER_DS, USER_CS64, TR, 0x73];

const P: u64 = 1;
const W: u64 = 2;
const U: u64 = 4;
const A: u64 = 0x20;
const D: u64 = 0x40;
const PS: u64 = 0x80;
const G: u64 = 0x100;
const NX: u64 = 1 << 63;

/// What a case's memory and state are made for.
#[derive(Debug, Clone, Copy)]
pub struct Frame {
    pub cpl: u8,
    /// What is added to all addresses of the guest's own: zero, or one of the upper half.
    pub base: u64,
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

/// A device whose registers are a function of every access so far.
#[derive(Default)]
pub struct Probe(Mutex<u64>);

impl Probe {
    fn next(&self, word: u64) -> u64 {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *state = (*state ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29);
        *state
    }
    pub fn state(&self) -> u64 {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
    pub fn reset(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = 1;
    }
}

impl Device for Probe {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let v = self.next(offset << 8 | data.len() as u64).to_le_bytes();
        for (to, from) in data.iter_mut().zip(v) {
            *to = from;
        }
    }
    fn write(&self, offset: u64, data: &[u8]) {
        self.next(offset << 8 | 0x80 | data.len() as u64);
        for &b in data {
            self.next(b.into());
        }
    }
}

fn put(ram: &mut [u8], at: u64, v: u64) {
    ram[at as usize..at as usize + 8].copy_from_slice(&v.to_le_bytes());
}

/// Tables, routines and random data; no code yet.
pub fn memory(rng: &mut Rng, frame: Frame) -> Vec<u8> {
    let mut ram = vec![0; RAM];
    for chunk in ram[DATA as usize..].chunks_exact_mut(8) {
        let v = match rng.below(4) {
            0 => values::integer(rng),
            1 => values::float64(rng),
            2 => u64::from(values::float32(rng)) << 32 | u64::from(values::float32(rng)),
            _ => rng.bits(),
        };
        chunk.copy_from_slice(&v.to_le_bytes());
    }
    ram[CODE as usize..DATA as usize].fill(0xcc);
    let global = if rng.chance(50) { G } else { 0 };
    let table = P | W | U | A;
    put(&mut ram, PML4, PDPT | table);
    put(&mut ram, PML4 + 8 * 256, PDPT | table);
    put(&mut ram, PML4 + 8 * 511, PDPT_LAST | table);
    put(&mut ram, PDPT, PD | table);
    put(&mut ram, PDPT_LAST + 8 * 510, PD | table);
    put(&mut ram, PD, PT | table);
    put(&mut ram, PD + 8, P | W | U | PS | global | if rng.chance(50) { NX } else { 0 });
    for page in 1..0x10 {
        put(&mut ram, PT + 8 * page, page << 12 | P | W | global);
    }
    let code = P | U | global | if rng.chance(80) { W } else { 0 };
    for page in 0..CODE_LEN >> 12 {
        let gpa = physical(CODE + (page << 12));
        put(&mut ram, PT + 8 * ((CODE >> 12) + page), gpa | code);
        put(&mut ram, PT + 8 * ((ALIAS >> 12) + page), gpa | P | W | U | A | D);
    }
    let data = P | W | U | A | D | global | if rng.chance(70) { NX } else { 0 };
    for page in [DATA, DATA + 0x1000, STACK, STACK + 0x1000, LAST] {
        put(&mut ram, PT + 8 * (page >> 12), physical(page) | data);
    }
    put(&mut ram, PT + 8 * (READ_ONLY >> 12), READ_ONLY | P | U | A);
    put(&mut ram, PT + 8 * (SUPERVISOR >> 12), SUPERVISOR | P | W);
    put(&mut ram, PT + 8 * (FRESH >> 12), FRESH | P | W | U | NX);
    put(&mut ram, PT + 8 * (DEVICE >> 12), DEVICE_GPA | P | W | U);
    put(&mut ram, PT + 8 * (NOBODY >> 12), NOBODY_GPA | P | W | U);
    descriptors(&mut ram, rng);
    for vector in 0..32 {
        let routine = routine(vector);
        let at = (ROUTINES + 128 * u64::from(vector)) as usize;
        ram[at..at + routine.len()].copy_from_slice(&routine);
    }
    put(&mut ram, LOG + 0x10, 0x1f80);
    for n in 0..32 {
        put(&mut ram, RESUME + 8 * n, frame.base + CODE);
        put(&mut ram, STACKS + 8 * n, stack(rng, frame));
    }
    // inc qword [LOG + 8]; sysretq, and iretq.
    let count = [0x48, 0xff, 0x04, 0x25, (LOG + 8) as u8, (LOG >> 8) as u8, 0, 0];
    for (at, end) in [(SYSTEM_CALL, [0x48, 0x0f, 0x07]), (PLAIN_GATE, [0x90, 0x48, 0xcf])] {
        ram[at as usize..at as usize + 8].copy_from_slice(&count);
        ram[at as usize + 8..at as usize + 11].copy_from_slice(&end);
    }
    ram
}

/// Whether page tables differ in more than accessed and dirty bits.
pub fn changed_tables(before: &[u8], now: &[u8]) -> bool {
    let differ = |from: u64, to: u64| (from..to).any(|n| (before[n as usize] ^ now[n as usize]) & !(A | D) as u8 != 0);
    differ(PML4, GDT) || differ(PDPT_LAST, PDPT_LAST + 0x1000)
}

/// A good stack pointer.
pub fn stack(rng: &mut Rng, frame: Frame) -> u64 {
    frame.base + STACK + if rng.chance(90) { 0x800 + rng.below(0x100) * 8 } else { 0xff0 + rng.below(0x20) }
}

/// Addresses where exception routines take the guest on.
pub fn set_resume(ram: &mut [u8], rng: &mut Rng, starts: &[u64]) {
    for n in 0..32 {
        put(ram, RESUME + 8 * n, rng.pick(starts));
        put(ram, physical(JUMP_TABLE) + 8 * n, rng.pick(starts));
    }
}

fn descriptors(ram: &mut [u8], rng: &mut Rng) {
    let entries: [u64; 6] =
        [0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0x00cf_fb00_0000_ffff, 0x00cf_f300_0000_ffff, 0x00af_fb00_0000_ffff];
    for (n, entry) in entries.into_iter().enumerate() {
        put(ram, GDT + 8 * n as u64, entry);
    }
    put(ram, GDT + u64::from(TR), 0x67 | TSS << 16 | 0x8b << 40);
    put(ram, TSS + 4, KERNEL_STACK - 0x800);
    put(ram, TSS + 36, KERNEL_STACK);
    put(ram, TSS + 44, KERNEL_STACK - 0xc00);
    ram[TSS as usize + 102..TSS as usize + 104].copy_from_slice(&0x68u16.to_le_bytes());
    let ist = u64::from(rng.chance(70));
    for vector in 0..256 {
        let at = if vector < 32 { ROUTINES + 128 * vector } else { PLAIN_GATE };
        let ist = if vector == 8 { 2 } else { ist };
        let dpl = if vector == 3 || vector == 4 || vector >= 32 { 3 } else { 0 };
        let low = at & 0xffff | u64::from(KERNEL_CS) << 16 | ist << 32 | (0x8e | dpl << 5) << 40 | (at >> 16 & 0xffff) << 48;
        put(ram, IDT + 16 * vector, low);
        put(ram, IDT + 16 * vector + 8, at >> 32);
    }
}

/// Logs what happened, and goes on elsewhere (after traps: where the guest was).
fn routine(vector: u8) -> Vec<u8> {
    let absolute = |opcode: &[u8], sib: u8, at: u64| [opcode, &[sib], &(at as u32).to_le_bytes()].concat();
    let mut code = Vec::new();
    if !matches!(vector, 8 | 10..=14 | 17) {
        code.extend([0x6a, 0x00]); // push 0
    }
    code.extend([0x50, 0x51]); // push rax; push rcx
    code.extend(absolute(&[0x48, 0x8b, 0x04], 0x25, LOG)); // mov rax, [LOG]
    code.extend(absolute(&[0x48, 0xff, 0x04], 0x25, LOG)); // inc qword [LOG]
    code.extend([0x83, 0xe0, 0x1f]); // and eax, 31
    code.extend(absolute(&[0x48, 0x8b, 0x0c], 0xc5, RESUME)); // mov rcx, [rax * 8 + RESUME]
    if vector == 1 {
        code.extend([0x48, 0x8b, 0x4c, 0x24, 0x18]); // mov rcx, [rsp + 24]
    } else {
        code.extend([0x48, 0x87, 0x4c, 0x24, 0x18]); // xchg [rsp + 24], rcx
    }
    code.extend([0xc1, 0xe0, 0x05]); // shl eax, 5
    let entry = |modrm: &[u8], field: u64| [modrm, &((LOG + 0x800 + field) as u32).to_le_bytes()].concat();
    code.extend(entry(&[0x48, 0x89, 0x88], 0)); // mov [rax + …], rcx
    code.extend([0x48, 0x8b, 0x4c, 0x24, 0x10]); // mov rcx, [rsp + 16]
    code.extend(entry(&[0x48, 0x89, 0x88], 8));
    code.extend(entry(&[0xc6, 0x80], 24));
    code.push(vector);
    match vector {
        7 => code.extend([0x0f, 0x06]),                                                         // clts
        14 => code.extend([&[0x0f, 0x20, 0xd1][..], &entry(&[0x48, 0x89, 0x88], 16)].concat()), // mov rcx, cr2; mov [rax + …], rcx
        16 => code.extend([0xdb, 0xe2]),                                                        // fnclex
        17 => code.extend([0x81, 0x64, 0x24, 0x28, 0xff, 0xff, 0xfb, 0xff]),                    // and dword [rsp + 40], ~AC
        19 => code.extend(absolute(&[0x0f, 0xae, 0x14], 0x25, LOG + 0x10)),                     // ldmxcsr [LOG + 16]
        _ => {}
    }
    if vector != 1 {
        code.extend([0xc1, 0xe8, 0x02]); // shr eax, 2
        code.extend([&[0x48, 0x8b, 0x88][..], &(STACKS as u32).to_le_bytes()].concat()); // mov rcx, [rax + STACKS]
        code.extend([0x48, 0x89, 0x4c, 0x24, 0x30]); // mov [rsp + 48], rcx
    }
    code.extend([0x59, 0x58, 0x48, 0x83, 0xc4, 0x08, 0x48, 0xcf]); // pop rcx; pop rax; add rsp, 8; iretq
    debug_assert!(code.len() <= 128);
    code
}

/// Random registers; RIP is left to the caller.
pub fn registers(rng: &mut Rng, frame: Frame) -> Cpu {
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
    cpu.tr = Segment { base: TSS, limit: 0x67, selector: TR, attr: 0x8b };
    cpu.gdtr = Table { base: GDT, limit: 0x3f };
    cpu.idtr = Table { base: IDT, limit: 0xfff };
    cpu.cr0 = 0x8000_0031 | if rng.chance(60) { 1 << 16 } else { 0 } | if rng.chance(70) { 1 << 18 } else { 0 };
    cpu.cr0 |= if rng.chance(10) { 8 } else { 0 } | if rng.chance(2) { 4 } else { 0 } | if rng.chance(60) { 2 } else { 0 };
    cpu.cr3 = PML4;
    cpu.cr4 = 0x1_0020 | if rng.chance(97) { 0x200 } else { 0 } | if rng.chance(80) { 0x400 } else { 0 };
    cpu.cr4 |= if rng.chance(50) { 0x80 } else { 0 } | if rng.chance(20) { 8 } else { 0 } | if rng.chance(10) { 4 } else { 0 };
    cpu.efer = 0xd01;
    cpu.cpl = frame.cpl;
    cpu.code_size = CodeSize::Bits64;
    cpu.msr.star = u64::from(USER_CS32) << 48 | u64::from(KERNEL_CS) << 32;
    cpu.msr.lstar = SYSTEM_CALL;
    cpu.msr.fmask = 0x4_7700;
    cpu.msr.kernel_gs_base = frame.base + DATA;
    let mut flags = 2 | rng.bits() & 0x8d5;
    for (percent, bit) in [(10, 1 << 10), (3, 1 << 18), (3, 1 << 8), (2, 1 << 14), (50, 1 << 9), (2, 1 << 16)] {
        flags |= if rng.chance(percent) { bit } else { 0 };
    }
    if rng.chance(30) {
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
