//! What makes translated code leave its blocks (other address spaces, other privilege, interrupts that wait): both tiers come to the same
//! states at the same instructions, wherever a turn ends.
#![allow(clippy::precedence)]

mod flat;

use flat::{CODE, Machine, P, PT, STACK, U, W};
use x86::run::RunExit;
use x86::state::{RAX, RBX, RCX, RDI, RDX, RSI, flags};

/// Where the second address space has its tables, and the pages that the tests put code into.
const SPACE: u64 = 0x5_0000;
const FUNCTION: u64 = 0x4_0000;
const ENTRY: u64 = 0x4_3000;

/// Runs the machine that `make` gives on both tiers, in turns of many lengths, until it halts; `check` sees where that led.
fn both(make: impl Fn() -> Machine, check: impl Fn(&mut Machine)) {
    for turns in [&[1][..], &[2], &[3, 5], &[7, 1, 64], &[1000, 13], &[100_000]] {
        let (mut plain, mut fast) = (Box::new(make()), Box::new(make()));
        plain.cache = x86::cache::Cache::new();
        fast.cache.translate_after(0).expect("this host does not let us translate");
        for n in 0.. {
            let budget = turns[n % turns.len()];
            let exits = [&mut *plain, &mut *fast].map(|m| {
                assert!(m.core.shared.control.service().is_none());
                m.core.run(&mut m.cache, budget)
            });
            let states = [&plain, &fast].map(|m| {
                let c = &m.core.cpu;
                (c.gpr[..16].to_vec(), c.rip, c.rflags(), c.cpl, c.shadow, c.cr3, c.icount)
            });
            assert_eq!(states[0], states[1], "turns {turns:?}, number {n}: {exits:?}");
            assert_eq!(format!("{:?}", exits[0]), format!("{:?}", exits[1]));
            if matches!(exits[0], RunExit::Halted) {
                break;
            }
            assert!(n < 100_000, "no end at {:#x}", plain.core.cpu.rip);
        }
        check(&mut plain);
        assert!(fast.cache.translations() > 0);
    }
}

/// A second address space where [`FUNCTION`] is `page` (0: nothing).
fn second_space(m: &Machine, page: u64) {
    let (pdpt, pd, pt) = (SPACE + 0x1000, SPACE + 0x2000, SPACE + 0x3000);
    m.entry(SPACE, pdpt | P | W | U);
    m.entry(pdpt, pd | P | W | U);
    m.entry(pd, pt | P | W | U);
    for n in 0..512 {
        m.entry(pt + 8 * n, n << 12 | P | W | U);
    }
    m.entry(pt + (FUNCTION >> 12) * 8, if page == 0 { 0 } else { page | P | W | U });
}

/// `l: mov cr3, rsi; call rdx; mov cr3, rdi; call rdx; dec ecx; jnz l; hlt`
const SWITCHING: &[u8] = &[0x0f, 0x22, 0xde, 0xff, 0xd2, 0x0f, 0x22, 0xdf, 0xff, 0xd2, 0xff, 0xc9, 0x75, 0xf2, 0xf4];

fn switching(second: u64) -> Machine {
    let mut m = Machine::new(SWITCHING);
    m.entry(PT + (FUNCTION >> 12) * 8, 0x4_1000 | P | W | U);
    second_space(&m, second);
    // add rax, 1; ret — add rax, 1000; ret
    m.write(0x4_1000, &[0x48, 0x83, 0xc0, 1, 0xc3]);
    m.write(0x4_2000, &[0x48, 0x05, 0xe8, 3, 0, 0, 0xc3]);
    (*m.gpr(RSI), *m.gpr(RDI), *m.gpr(RDX), *m.gpr(RCX)) = (flat::PML4, SPACE, FUNCTION, 50);
    m
}

#[test]
fn each_address_space_has_its_own_code() {
    both(|| switching(0x4_2000), |m| assert_eq!(*m.gpr(RAX), 50 * 1001));
}

#[test]
fn a_page_that_the_next_address_space_lacks_faults_there() {
    both(
        || switching(0),
        |m| {
            assert_eq!((m.core.cpu.cr2, *m.gpr(RAX), *m.gpr(RCX)), (FUNCTION, 1, 50));
        },
    );
}

#[test]
fn code_that_changed_in_another_address_space_is_not_run_any_more() {
    // l: mov cr3, rsi; call rdx; mov cr3, rdi; inc byte [0x41003]; call rdx; dec ecx; jnz l; hlt
    let code =
        [0x0f, 0x22, 0xde, 0xff, 0xd2, 0x0f, 0x22, 0xdf, 0xfe, 4, 0x25, 3, 0x10, 4, 0, 0xff, 0xd2, 0xff, 0xc9, 0x75, 0xeb, 0xf4];
    let make = || {
        let m = switching(0x4_2000);
        m.write(CODE, &code);
        m
    };
    both(make, |m| assert_eq!(*m.gpr(RAX), 50 * 1000 + (1..=50).sum::<u64>()));
}

/// SYSRET to user code, which comes back by SYSCALL, 60 times.
fn calling() -> Machine {
    // mov r11, 0x202; mov rcx, FUNCTION; sysretq
    let mut m = Machine::new(&[0x49, 0xc7, 0xc3, 2, 2, 0, 0, 0x48, 0xc7, 0xc1, 0, 0, 4, 0, 0x48, 0x0f, 0x07]);
    // l: inc rax; cmp al, 9; syscall; jmp l
    m.write(FUNCTION, &[0x48, 0xff, 0xc0, 0x3c, 9, 0x0f, 5, 0xeb, 0xf7]);
    // swapgs; dec ebx; jz halt; swapgs; sysretq; halt: hlt
    m.write(ENTRY, &[0x0f, 1, 0xf8, 0xff, 0xcb, 0x74, 6, 0x0f, 1, 0xf8, 0x48, 0x0f, 0x07, 0xf4]);
    m.core.cpu.msr.star = 8 << 32 | 0x10 << 48;
    m.core.cpu.msr.lstar = ENTRY;
    m.core.cpu.msr.fmask = 0x200;
    m.core.cpu.msr.kernel_gs_base = 0x1234_5000;
    *m.gpr(RBX) = 60;
    m
}

#[test]
fn system_calls_go_in_and_out() {
    both(calling, |m| {
        assert_eq!((*m.gpr(RAX), m.core.cpu.cpl), (60, 0));
        assert_eq!(m.core.cpu.seg_base[x86::state::GS], 0x1234_5000);
    });
}

#[test]
fn user_code_cannot_be_entered_where_only_the_kernel_may() {
    let make = || {
        let mut m = calling();
        // The user's page belongs to the kernel from the 30th call on: and byte [PT + 8 * page], ~4; mov rdi, cr3; mov cr3, rdi
        let entry = PT + (FUNCTION >> 12) * 8;
        let mut code = vec![0xff, 0xcb, 0x83, 0xfb, 30, 0x75, 14, 0x80, 0x24, 0x25];
        code.extend((entry as u32).to_le_bytes());
        code.extend([0xfb, 0x0f, 0x20, 0xdf, 0x0f, 0x22, 0xdf, 0x48, 0x0f, 0x07]);
        m.write(ENTRY, &code);
        // A task state segment for the way into the routine of #PF.
        m.write(0x4_5004, &flat::STACK.to_le_bytes());
        m.core.cpu.tr.base = 0x4_5000;
        m.core.cpu.tr.limit = 0x67;
        m
    };
    both(make, |m| assert_eq!((*m.gpr(RBX), m.core.cpu.cr2), (30, FUNCTION + 7)));
}

/// The guest sends itself interrupts with IF off and turns it on, by STI, by POPF and by IRET.
fn interrupted() -> Machine {
    // mov ecx, 0x83f; mov eax, 0x40; xor edx, edx; wrmsr: an interrupt to itself
    let send: &[u8] = &[0xb9, 0x3f, 8, 0, 0, 0xb8, 0x40, 0, 0, 0, 0x31, 0xd2, 0x0f, 0x30];
    let mut code = Vec::new();
    // x2APIC on, LAPIC on by software.
    code.extend([0xb9, 0x1b, 0, 0, 0, 0xb8, 0, 0xd, 0xe0, 0xfe, 0x31, 0xd2, 0x0f, 0x30]);
    code.extend([0xb9, 0xf, 8, 0, 0, 0xb8, 0xff, 1, 0, 0, 0x0f, 0x30]);
    let start = code.len();
    // cli; <send>; inc r8; sti; inc r9; inc r10; sti
    code.push(0xfa);
    code.extend(send);
    code.extend([0x49, 0xff, 0xc0, 0xfb, 0x49, 0xff, 0xc1, 0x49, 0xff, 0xc2, 0xfb]);
    // pushfq; cli; <send>; popfq; inc r12
    code.extend([0x9c, 0xfa]);
    code.extend(send);
    code.extend([0x9d, 0x49, 0xff, 0xc4]);
    // cli; sti; cli; sti; sti; pushfq; popfq; add r9, 0; clc; sti; cmc; adc r12, 0
    code.extend([0xfa, 0xfb, 0xfa, 0xfb, 0xfb, 0x9c, 0x9d, 0x49, 0x83, 0xc1, 0, 0xf8, 0xfb, 0xf5, 0x49, 0x83, 0xd4, 0]);
    // dec ebx; jnz start; hlt
    code.extend([0xff, 0xcb, 0x0f, 0x85]);
    code.extend((start as i32 - (code.len() as i32 + 4)).to_le_bytes());
    code.push(0xf4);
    let mut m = Machine::new(&code);
    // mov r13, r9; sub r13, r10; add r14, r13; inc r15; mov ecx, 0x80b; xor eax, eax; xor edx, edx; wrmsr; iretq
    let routine = [
        0x4d, 0x89, 0xcd, 0x4d, 0x29, 0xd5, 0x4d, 1, 0xee, 0x49, 0xff, 0xc7, 0xb9, 0xb, 8, 0, 0, 0x31, 0xc0, 0x31, 0xd2, 0x0f,
        0x30, 0x48, 0xcf,
    ];
    m.write(ENTRY, &routine);
    let gate = 0x6000 + 16 * 0x40;
    m.write(gate, &(ENTRY & 0xffff | 8 << 16 | 0x8e00 << 32 | ENTRY >> 16 << 48).to_le_bytes());
    m.core.cpu.idtr.limit = 0xfff;
    *m.gpr(RBX) = 40;
    m
}

#[test]
fn interrupts_come_at_the_same_instruction() {
    both(interrupted, |m| {
        let [r9, r10, r14, r15] = [9, 10, 14, 15].map(|n| m.core.cpu.gpr[n]);
        // Two a round; the one after STI comes when exactly one more instruction is done.
        assert_eq!((r9, r10, r15, r14), (40, 40, 80, 40));
    });
}

#[test]
fn flags_go_to_the_stack_and_come_back() {
    // l: add eax, edx; pushfq; pop rsi; xor rdi, rsi; rol rdi, 7
    let mut code = vec![1, 0xd0, 0x9c, 0x5e, 0x48, 0x31, 0xf7, 0x48, 0xc1, 0xc7, 7];
    // push r8; and qword [rsp], all but TF; popfq; pushfq; pop rsi; xor rdi, rsi; rol r8, 5; add r8, 51
    code.extend([0x41, 0x50, 0x48, 0x81, 0x24, 0x24, 0xd5, 0x7e, 0x24, 0, 0x9d, 0x9c, 0x5e, 0x48, 0x31, 0xf7]);
    code.extend([0x49, 0xc1, 0xc0, 5, 0x49, 0x83, 0xc0, 51]);
    // clc; std; adc r9, 0; cmp r9, rdi; cld; adc r9, 1; dec ecx; jnz l; hlt
    code.extend([0xf8, 0xfd, 0x49, 0x83, 0xd1, 0, 0x49, 0x39, 0xf9, 0xfc, 0x49, 0x83, 0xd1, 1, 0xff, 0xc9, 0x75]);
    code.push((-(code.len() as i8 + 1)) as u8);
    code.push(0xf4);
    let make = || {
        let mut m = Machine::new(&code);
        (*m.gpr(RAX), *m.gpr(RDX), *m.gpr(RCX)) = (0x1234_5678, 0x9e37_79b1, 300);
        m.core.cpu.gpr[8] = 0xfedc_ba98_7654_3210;
        m
    };
    both(make, |m| assert_eq!(*m.gpr(RCX), 0));
}

#[test]
fn a_trap_flag_from_the_stack_traps() {
    // l: dec ecx; pushfq; cmp ecx, 3; jne on; or byte [rsp + 1], 1; on: popfq; jmp l
    let code = [0xff, 0xc9, 0x9c, 0x83, 0xf9, 3, 0x75, 5, 0x80, 0x4c, 0x24, 1, 1, 0x9d, 0xeb, 0xf0];
    let make = || {
        let mut m = Machine::new(&code);
        *m.gpr(RCX) = 40;
        m
    };
    // #DB after the jump that follows POPF.
    both(make, |m| assert_eq!((*m.gpr(RCX), m.read(m.core.cpu.gpr[4]), m.core.cpu.rip & 0xff0), (3, CODE, 0x010)));
}

#[test]
fn sixteen_bytes_are_compared_and_exchanged() {
    // l: cmpxchg16b [rdi]; setz r9b; adc r10, r9; add rbx, 3; dec r8; jnz l; hlt
    let code = [
        0x48, 0x0f, 0xc7, 0x0f, 0x41, 0x0f, 0x94, 0xc1, 0x4d, 0x11, 0xca, 0x48, 0x83, 0xc3, 3, 0x49, 0xff, 0xc8, 0x75, 0xec, 0xf4,
    ];
    let make = |at: u64| {
        let mut m = Machine::new(&code);
        (*m.gpr(RDI), *m.gpr(RBX), *m.gpr(RCX)) = (at, 7, u64::MAX);
        m.core.cpu.gpr[8] = 50;
        m.write(flat::DATA, &[0x11; 32]);
        m
    };
    both(|| make(flat::DATA), |m| assert_eq!((m.core.cpu.gpr[10], m.core.cpu.gpr[8]), (25, 0)));
    // #GP where it is not aligned.
    both(|| make(flat::DATA + 8), |m| assert_eq!((m.core.cpu.gpr[8], m.core.cpu.rip & 0xff0), (50, 0x0d0)));
}

/// POPF that clears TF while it is stepped: a block of one instruction is translated even then.
#[test]
fn popf_ends_single_stepping() {
    let mut m = Machine::translating(&[]);
    let (at, stack) = (CODE + 0xfff, STACK - 8);
    m.write(at, &[0x9d, 0x90, 0xf4]);
    m.write(stack, &2u64.to_le_bytes());
    for flags in [2, 2 | flags::TF] {
        // The first time is for the TLB.
        m.steps(u64::from(flags != 2));
        m.core.cpu.gpr[x86::state::RSP] = stack;
        m.core.cpu.rip = at;
        m.core.cpu.set_rflags(flags);
    }
    let caught = m.run().expect("the trap after POPF");
    assert_eq!((caught.vector, caught.rip), (1, at + 1));
    let frame = m.core.cpu.gpr[x86::state::RSP];
    assert_eq!(m.read(frame + 16) & flags::TF, 0, "what was popped is without it");
}
