//! The guest's kernel: what exceptions, interrupts, system calls and the gates for programs do.

use super::tables::ROOTS;
use super::world::{APIC, KERNEL_CS, KERNEL_CS32, KERNEL_DS, get, put};

const EXCEPTIONS: u64 = 0x7000;
/// What the exception routines count, log and go on with.
const LOG: u64 = 0x9000;
const SYSTEM_CALLS_DONE: u64 = LOG + 8;
pub const MXCSR: u64 = LOG + 0x10;
const INTERRUPTS_DONE: u64 = LOG + 0x18;
/// Written where there is nothing to write.
pub const SCRATCH: u64 = LOG + 0x20;
const NEXT_CHANGE: u64 = LOG + 0x28;
const EXCURSIONS: u64 = LOG + 0x30;
const SAVED_STACK: u64 = LOG + 0x38;
/// 32 times each: selectors of code and stack, address, stack pointer.
pub const SEGMENTS: u64 = LOG + 0x80;
pub const RESUME: u64 = LOG + 0x100;
pub const STACKS: u64 = LOG + 0x200;
const ENTRIES: u64 = LOG + 0x800;
pub const CHANGES: u64 = LOG + 0xc00;

const CALLS: u64 = 0xa000;
const PLAIN: u64 = 0xa080;
const INTERRUPT: u64 = 0xa0a0;
const TAIL: u64 = 0xa0c0;
const CHANGE: u64 = 0xa100;
pub const FLUSH_PAGE: u64 = 0xa180;
pub const FLUSH_CR3: u64 = 0xa1c0;
pub const FLUSH_ALL: u64 = 0xa1e0;
const SWITCH: u64 = 0xa220;
const TASK_SWITCHED: u64 = 0xa240;
const TOGGLE_IF: u64 = 0xa260;
const HALT: u64 = 0xa280;
const EXCURSION: u64 = 0xa2a0;
/// Where a machine that starts in real mode begins.
pub const BOOT: u64 = 0xa300;
const END: u64 = 0xa400;

/// Gates for programs: vectors.
pub const GATE_CHANGE: u8 = 0x30;
pub const GATE_SWITCH: u8 = 0x31;
pub const GATE_TASK_SWITCHED: u8 = 0x32;
pub const GATE_TOGGLE_IF: u8 = 0x33;
pub const GATE_HALT: u8 = 0x34;
pub const GATE_EXCURSION: u8 = 0x35;
/// From here on gates are interrupts'.
pub const FIRST_INTERRUPT: u8 = 0x40;

const POP_RETURN: [u8; 5] = [0x5a, 0x59, 0x58, 0x48, 0xcf]; // pop rdx; pop rcx; pop rax; iretq

/// What a case's kernel has counted: exceptions, system calls and plain gates, interrupts, changes of page tables, excursions.
pub fn tally(ram: &[u8]) -> [u64; 5] {
    [LOG, SYSTEM_CALLS_DONE, INTERRUPTS_DONE, NEXT_CHANGE, EXCURSIONS].map(|at| get(ram, at) & 0xffff_ffff)
}

/// Where the gate of a vector leads.
pub fn entry(vector: u8, changes: bool) -> u64 {
    match vector {
        0..32 => EXCEPTIONS + 128 * u64::from(vector),
        GATE_CHANGE if changes => CHANGE,
        GATE_SWITCH => SWITCH,
        GATE_TASK_SWITCHED => TASK_SWITCHED,
        GATE_TOGGLE_IF => TOGGLE_IF,
        GATE_HALT => HALT,
        GATE_EXCURSION => EXCURSION,
        FIRST_INTERRUPT.. => INTERRUPT,
        _ => PLAIN,
    }
}

/// The ways to serve a system call.
pub fn system_call(n: u64) -> u64 {
    CALLS + 0x20 * (n & 3)
}

/// An instruction on [disp32].
fn absolute(opcode: &[u8], at: u64) -> Vec<u8> {
    [opcode, &[0x25], &(at as u32).to_le_bytes()].concat()
}

/// An instruction with a 32-bit number at its end.
fn with(opcode: &[u8], number: u64) -> Vec<u8> {
    [opcode, &(number as u32).to_le_bytes()].concat()
}

/// Everything.
pub fn install(ram: &mut [u8], stack: u64) {
    let mut lay = |at: u64, end: u64, parts: &[&[u8]]| {
        let code = parts.concat();
        debug_assert!(at + code.len() as u64 <= end, "the routine at {at:#x} is too long");
        ram[at as usize..at as usize + code.len()].copy_from_slice(&code);
    };
    for vector in 0..32 {
        let at = entry(vector, true);
        lay(at, at + 128, &[&exception(vector, at)]);
    }
    lay(TAIL, CHANGE, &[&tail()]);
    let count = absolute(&[0x48, 0xff, 0x04], SYSTEM_CALLS_DONE); // inc qword [...]
    lay(CALLS, CALLS + 0x20, &[&count, &[0x48, 0x0f, 0x07]]); // sysretq
    // swapgs; inc qword gs:[0x40]; swapgs; sysretq
    let gs = absolute(&[0x65, 0x48, 0xff, 0x04], 0x40);
    lay(CALLS + 0x20, CALLS + 0x40, &[&[0x0f, 0x01, 0xf8], &gs, &[0x0f, 0x01, 0xf8, 0x48, 0x0f, 0x07]]);
    lay(CALLS + 0x40, CALLS + 0x60, &[&count, &[0x0f, 0x07]]); // sysretl
    // mov [...], rsp; mov esp, stack; push r11; popfq; mov rsp, [...]; sysretq
    let (save, load) = (absolute(&[0x48, 0x89, 0x24], SAVED_STACK), absolute(&[0x48, 0x8b, 0x24], SAVED_STACK));
    lay(CALLS + 0x60, PLAIN, &[&save, &with(&[0xbc], stack), &[0x41, 0x53, 0x9d], &load, &[0x48, 0x0f, 0x07]]);
    lay(PLAIN, INTERRUPT, &[&count, &[0x48, 0xcf]]);
    let eoi = [absolute(&[0xc7, 0x04], APIC + 0xb0), vec![0; 4]].concat(); // mov dword [...], 0
    lay(INTERRUPT, TAIL, &[&eoi, &absolute(&[0x48, 0xff, 0x04], INTERRUPTS_DONE), &[0x48, 0xcf]]);
    lay(CHANGE, FLUSH_PAGE, &[&change()]);
    // mov rcx, [rax + …]; invlpg [rcx]
    let invalidate = |n| [with(&[0x48, 0x8b, 0x88], CHANGES + n), vec![0x0f, 0x01, 0x39]].concat();
    lay(FLUSH_PAGE, FLUSH_CR3, &[&invalidate(32), &invalidate(40), &invalidate(48), &POP_RETURN]);
    lay(FLUSH_CR3, FLUSH_ALL, &[&[0x0f, 0x20, 0xd9, 0x0f, 0x22, 0xd9], &POP_RETURN]);
    let toggle = [with(&[0x81, 0xf1], 0x80), vec![0x0f, 0x22, 0xe1]].concat(); // xor ecx, PGE; mov cr4, rcx
    lay(FLUSH_ALL, SWITCH, &[&[0x0f, 0x20, 0xe1], &toggle, &toggle, &POP_RETURN]);
    // push rcx; mov rcx, cr3; xor ecx, …; mov cr3, rcx; pop rcx; iretq
    let other = with(&[0x51, 0x0f, 0x20, 0xd9, 0x81, 0xf1], ROOTS[0] ^ ROOTS[1]);
    lay(SWITCH, TASK_SWITCHED, &[&other, &[0x0f, 0x22, 0xd9, 0x59, 0x48, 0xcf]]);
    // push rcx; mov rcx, cr0; xor ecx, TS; mov cr0, rcx; pop rcx; iretq
    lay(TASK_SWITCHED, TOGGLE_IF, &[&[0x51, 0x0f, 0x20, 0xc1, 0x83, 0xf1, 8, 0x0f, 0x22, 0xc1, 0x59, 0x48, 0xcf]]);
    lay(TOGGLE_IF, HALT, &[&[0x48, 0x0f, 0xba, 0x7c, 0x24, 16, 9, 0x48, 0xcf]]); // btc qword [rsp + 16], 9; iretq
    lay(HALT, EXCURSION, &[&[0xfb, 0xf4, 0x48, 0xcf]]); // sti; hlt; iretq
    lay(EXCURSION, BOOT, &[&excursion()]);
}

/// Logs what happened, and goes on elsewhere (after traps and NMIs: where the guest was).
fn exception(vector: u8, start: u64) -> Vec<u8> {
    let back = matches!(vector, 1 | 2);
    let mut code = Vec::new();
    if !matches!(vector, 8 | 10..=14 | 17) {
        code.extend([0x6a, 0x00]); // push 0
    }
    code.extend([0x50, 0x51]); // push rax; push rcx
    code.extend(absolute(&[0x48, 0x8b, 0x04], LOG)); // mov rax, [LOG]
    code.extend(absolute(&[0x48, 0xff, 0x04], LOG)); // inc qword [LOG]
    code.extend([0x83, 0xe0, 0x1f]); // and eax, 31
    code.extend(with(&[0x48, 0x8b, 0x0c, 0xc5], RESUME)); // mov rcx, [rax * 8 + RESUME]
    if back {
        code.extend([0x48, 0x8b, 0x4c, 0x24, 0x18]); // mov rcx, [rsp + 24]
    } else {
        code.extend([0x48, 0x87, 0x4c, 0x24, 0x18]); // xchg [rsp + 24], rcx
    }
    code.extend([0xc1, 0xe0, 0x05]); // shl eax, 5
    let entry = |modrm: &[u8], field: u64| with(modrm, ENTRIES + field);
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
        19 => code.extend(absolute(&[0x0f, 0xae, 0x14], MXCSR)),                                // ldmxcsr [MXCSR]
        _ => {}
    }
    if back {
        code.extend([0x59, 0x58, 0x48, 0x83, 0xc4, 0x08, 0x48, 0xcf]); // pop rcx; pop rax; add rsp, 8; iretq
    } else {
        let next = start + code.len() as u64 + 5;
        code.extend(with(&[0xe9], TAIL.wrapping_sub(next))); // jmp TAIL
    }
    code
}

/// The end of a routine that goes on elsewhere: stack and segments there; rax = 32 times which.
fn tail() -> Vec<u8> {
    [
        &[0xc1, 0xe8, 0x02][..],                           // shr eax, 2
        &with(&[0x48, 0x8b, 0x88], STACKS),                // mov rcx, [rax + STACKS]
        &[0x48, 0x89, 0x4c, 0x24, 0x30],                   // mov [rsp + 48], rcx
        &[0xd1, 0xe8],                                     // shr eax, 1
        &with(&[0x0f, 0xb7, 0x88], SEGMENTS),              // movzx ecx, word [rax + SEGMENTS]
        &[0x48, 0x89, 0x4c, 0x24, 0x20],                   // mov [rsp + 32], rcx
        &with(&[0x0f, 0xb7, 0x88], SEGMENTS + 2),          // movzx ecx, word [rax + SEGMENTS + 2]
        &[0x48, 0x89, 0x4c, 0x24, 0x38],                   // mov [rsp + 56], rcx
        &[0x59, 0x58, 0x48, 0x83, 0xc4, 0x08, 0x48, 0xcf], // pop rcx; pop rax; add rsp, 8; iretq
    ]
    .concat()
}

/// The next of the case's changes of page tables.
fn change() -> Vec<u8> {
    let store = |n: u64| {
        let (at, value) = (with(&[0x48, 0x8b, 0x88], CHANGES + n), with(&[0x48, 0x8b, 0x90], CHANGES + n + 8));
        [at, value, vec![0x48, 0x89, 0x11]].concat() // mov rcx, [rax + …]; mov rdx, [rax + …]; mov [rcx], rdx
    };
    [
        &[0x50, 0x51, 0x52][..],               // push rax; push rcx; push rdx
        &absolute(&[0x8b, 0x04], NEXT_CHANGE), // mov eax, [...]
        &absolute(&[0xff, 0x04], NEXT_CHANGE), // inc dword [...]
        &[0x83, 0xe0, 0x0f, 0xc1, 0xe0, 0x06], // and eax, 15; shl eax, 6
        &store(0),
        &store(16),
        &with(&[0xff, 0xa0], CHANGES + 56), // jmp [rax + …]
    ]
    .concat()
}

/// Out of long mode and back.
fn excursion() -> Vec<u8> {
    let mut code = [&[0x50, 0x51][..], &with(&[0x68], KERNEL_CS32.into())].concat(); // push rax; push rcx; push cs
    let inside = EXCURSION + code.len() as u64 + 7;
    code.extend(with(&[0x68], inside));
    code.extend([0x48, 0xcb]); // retfq
    code.extend([0x0f, 0x20, 0xc0, 0x25, 0xff, 0xff, 0xff, 0x7f, 0x0f, 0x22, 0xc0]); // CR0.PG off
    code.extend(with(&[0xff, 0x05], EXCURSIONS)); // inc dword [...]
    code.extend([0x0d, 0, 0, 0, 0x80, 0x0f, 0x22, 0xc0]); // CR0.PG on
    let out = EXCURSION + code.len() as u64 + 7;
    code.extend(with(&[0xea], out)); // jmp far
    code.extend(KERNEL_CS.to_le_bytes());
    code.extend([0x59, 0x58, 0x48, 0xcf]); // pop rcx; pop rax; iretq
    code
}

/// What a machine that starts in real mode has to load.
pub struct Start {
    pub cr0: u64,
    pub cr4: u64,
    pub rflags: u64,
    pub cs: u16,
    pub ss: u16,
    pub rip: u64,
    pub rsp: u64,
}

/// From real mode to the program.
pub fn install_boot(ram: &mut [u8], start: &Start) {
    let load = |n: u64| with(&[0x66, 0xb8], n); // mov eax, imm32
    let mut code = [
        &load(start.cr4)[..],
        &[0x0f, 0x22, 0xe0],
        &load(ROOTS[0]),
        &[0x0f, 0x22, 0xd8],
        &with(&[0x66, 0xb9], 0xc000_0080), // mov ecx, EFER
        &load(0x901),                      // NXE, LME, SCE
        &[0x66, 0x31, 0xd2, 0x0f, 0x30],   // xor edx, edx; wrmsr
        &load(start.cr0),
        &[0x0f, 0x22, 0xc0],
    ]
    .concat();
    let next = BOOT + code.len() as u64 + 8;
    code.extend(with(&[0x66, 0xea], next)); // jmp far
    code.extend(KERNEL_CS.to_le_bytes());
    let constant = |n: u64| [&[0x48, 0xb8][..], &n.to_le_bytes(), &[0x50]].concat(); // mov rax, imm64; push rax
    code.extend(with(&[0xb8], KERNEL_DS.into())); // mov eax, imm32
    code.extend([0x8e, 0xd0]); // mov ss, eax
    code.extend([&[0x48, 0xbc][..], &start.rsp.to_le_bytes()].concat()); // mov rsp, imm64
    for word in [start.ss.into(), start.rsp, start.rflags, start.cs.into(), start.rip] {
        code.extend(constant(word));
    }
    code.extend([0x48, 0xcf]);
    debug_assert!(BOOT + code.len() as u64 <= END);
    ram[BOOT as usize..BOOT as usize + code.len()].copy_from_slice(&code);
}

/// What exception routine number `n` (of 32) goes on with.
pub fn set_resume(ram: &mut [u8], n: u64, rip: u64, stack: u64, (cs, ss): (u16, u16)) {
    put(ram, RESUME + 8 * n, rip);
    put(ram, STACKS + 8 * n, stack);
    let at = (SEGMENTS + 4 * n) as usize;
    ram[at..at + 2].copy_from_slice(&cs.to_le_bytes());
    ram[at + 2..at + 4].copy_from_slice(&ss.to_le_bytes());
}
