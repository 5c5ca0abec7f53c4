//! The block loop: exact stops, self-modifying code, REP, single stepping.
#![allow(clippy::precedence)]

mod flat;

use flat::{A, CODE, D, DATA, Machine, P, PT, STACK, U, W};
use x86::state::{RAX, RBX, RCX, RDI, RDX, RSI, flags};

/// `mov ecx, 1000; l: add rax, rcx; xor rbx, rax; dec ecx; jnz l; hlt`
const LOOP: &[u8] = &[0xb9, 0xe8, 3, 0, 0, 0x48, 1, 0xc8, 0x48, 0x31, 0xc3, 0xff, 0xc9, 0x75, 0xf6, 0xf4];

#[test]
fn a_loop_counts_every_instruction() {
    let mut m = Machine::new(LOOP);
    assert_eq!(m.run(), None);
    assert_eq!(*m.gpr(RAX), 500_500);
    assert_eq!(m.core.cpu.icount, 1 + 4 * 1000 + 1);
}

#[test]
fn any_slicing_gives_the_same_state() {
    let mut whole = Machine::new(LOOP);
    whole.steps(3001);
    for slice in [1, 2, 3, 5, 7, 64, 1000] {
        let mut m = Machine::new(LOOP);
        let mut left = 3001;
        while left > 0 {
            let n = slice.min(left);
            m.steps(n);
            left -= n;
        }
        assert_eq!(m.core.cpu.gpr[..16], whole.core.cpu.gpr[..16], "slices of {slice}");
        assert_eq!(m.core.cpu.rip, whole.core.cpu.rip);
        assert_eq!(m.core.cpu.rflags(), whole.core.cpu.rflags());
    }
}

/// `mov rcx, n; rep movsb; hlt`
fn copy(n: u32) -> Vec<u8> {
    let mut code = vec![0xb9];
    code.extend(n.to_le_bytes());
    code.extend([0xf3, 0xa4, 0xf4]);
    code
}

#[test]
fn a_copy_stops_at_any_iteration() {
    let source: Vec<u8> = (0..10_000u32).map(|n| (n * 7) as u8).collect();
    for stop in [1, 2, 100, 4095, 4096, 4097, 9999, 10_000, 10_001] {
        let mut m = Machine::new(&copy(10_000));
        m.write(DATA + 5, &source);
        *m.gpr(RSI) = DATA + 5;
        *m.gpr(RDI) = DATA + 0x8003;
        m.steps(stop);
        let done = (stop - 1).min(10_000);
        assert_eq!((*m.gpr(RCX), *m.gpr(RSI), *m.gpr(RDI)), (10_000 - done, DATA + 5 + done, DATA + 0x8003 + done));
        assert_eq!(m.bytes(DATA + 0x8003, done as usize), source[..done as usize]);
        assert_eq!(m.bytes(DATA + 0x8003 + done, 3), [0, 0, 0], "nothing beyond");
        assert_eq!(m.run(), None);
        assert_eq!(m.bytes(DATA + 0x8003, 10_000), source);
    }
}

#[test]
fn an_overlapping_copy_repeats_its_beginning() {
    for (distance, width) in [(1u64, 1u8), (3, 1), (4, 4), (8, 8), (2, 4), (5, 8)] {
        let code: &[u8] = match width {
            1 => &[0xf3, 0xa4, 0xf4],
            4 => &[0xf3, 0xa5, 0xf4],
            _ => &[0xf3, 0x48, 0xa5, 0xf4],
        };
        let mut m = Machine::new(code);
        let mut want: Vec<u8> = (1..=100).collect();
        m.write(DATA, &want);
        let n = 40 / u64::from(width);
        for k in 0..n as usize {
            let at = k * usize::from(width);
            let element = want[at..at + usize::from(width)].to_vec();
            let to = at + distance as usize;
            want[to..to + usize::from(width)].copy_from_slice(&element);
        }
        (*m.gpr(RSI), *m.gpr(RDI), *m.gpr(RCX)) = (DATA, DATA + distance, n);
        assert_eq!(m.run(), None);
        assert_eq!(m.bytes(DATA, 100), want, "distance {distance}, width {width}");
    }
}

#[test]
fn a_copy_downwards() {
    // std; rep movsq; hlt
    let mut m = Machine::new(&[0xfd, 0xf3, 0x48, 0xa5, 0xf4]);
    let source: Vec<u8> = (0..80).collect();
    m.write(DATA, &source);
    (*m.gpr(RSI), *m.gpr(RDI), *m.gpr(RCX)) = (DATA + 72, DATA + 0x1048, 10);
    assert_eq!(m.run(), None);
    assert_eq!(m.bytes(DATA + 0x1000, 80), source);
    assert_eq!(*m.gpr(RSI), DATA - 8);
}

#[test]
fn a_fault_inside_a_copy_is_precise() {
    let mut m = Machine::new(&copy(8192));
    m.entry(PT + 8 * (DATA / 4096 + 9), 0);
    (*m.gpr(RSI), *m.gpr(RDI)) = (DATA, DATA + 0x8000);
    let caught = m.run().unwrap();
    assert_eq!((caught.vector, caught.error, caught.cr2, caught.rip), (14, 2, DATA + 0x9000, CODE + 5));
    assert_eq!((*m.gpr(RCX), *m.gpr(RSI), *m.gpr(RDI)), (4096, DATA + 0x1000, DATA + 0x9000));
}

#[test]
fn compare_and_scan_stop_where_they_should() {
    // repe cmpsb; hlt
    let mut m = Machine::new(&[0xf3, 0xa6, 0xf4]);
    m.write(DATA, b"equal up to here!");
    m.write(DATA + 0x100, b"equal up to herE!");
    (*m.gpr(RSI), *m.gpr(RDI), *m.gpr(RCX)) = (DATA, DATA + 0x100, 17);
    assert_eq!(m.run(), None);
    assert_eq!(*m.gpr(RCX), 1);
    assert!(!m.core.cpu.zf() && !m.core.cpu.cf());
    // repne scasb; hlt
    let mut m = Machine::new(&[0xf2, 0xae, 0xf4]);
    m.write(DATA, b"look for the x");
    (*m.gpr(RAX), *m.gpr(RDI), *m.gpr(RCX)) = (u64::from(b'x'), DATA, u64::MAX);
    assert_eq!(m.run(), None);
    assert_eq!(*m.gpr(RDI), DATA + 14);
}

#[test]
fn a_store_into_the_running_block_is_seen_by_the_next_instruction() {
    // mov byte [rip+1], 0xc3-like patch of the immediate: mov byte [rip + 1], 7; mov al, 1; hlt
    let mut m = Machine::new(&[0xc6, 5, 1, 0, 0, 0, 7, 0xb0, 1, 0xf4]);
    assert_eq!(m.run(), None);
    assert_eq!(*m.gpr(RAX), 7);
}

/// `mov eax, 1; ret` at CODE + 0x1000 called twice from CODE with `patch` in between.
fn patched_function(patch: &[u8]) -> Machine {
    let mut code = vec![0xe8];
    code.extend((0x1000u32 - 5).to_le_bytes());
    code.extend([0x89, 0xc3]); // mov ebx, eax
    code.extend(patch);
    let at = code.len() as u32;
    code.push(0xe8);
    code.extend((0x1000 - at - 5).to_le_bytes());
    code.push(0xf4);
    let m = Machine::new(&code);
    m.write(CODE + 0x1000, &[0xb8, 1, 0, 0, 0, 0xc3]);
    m
}

#[test]
fn code_patched_through_another_address_is_decoded_again() {
    // mov byte [rdi], 9, with RDI mapped to the same physical page elsewhere
    let mut m = patched_function(&[0xc6, 7, 9]);
    m.entry(PT + 8 * 0x60, (CODE + 0x1000) | P | W | U);
    *m.gpr(RDI) = 0x6_0001;
    assert_eq!(m.run(), None);
    assert_eq!((*m.gpr(RBX), *m.gpr(RAX)), (1, 9));
}

#[test]
fn a_write_tag_from_before_the_page_held_code_is_taken_away() {
    // The alias is written first, so that its TLB entry is writable, then the function runs, then the alias is written again.
    let mut code = vec![0xc6, 7, 5]; // mov byte [rdi], 5
    code.push(0xe8);
    code.extend((0x1000u32 - 8).to_le_bytes());
    code.extend([0x89, 0xc3, 0xc6, 7, 9]);
    let at = code.len() as u32;
    code.push(0xe8);
    code.extend((0x1000 - at - 5).to_le_bytes());
    code.push(0xf4);
    let mut m = Machine::new(&code);
    m.write(CODE + 0x1000, &[0xb8, 1, 0, 0, 0, 0xc3]);
    m.entry(PT + 8 * 0x60, (CODE + 0x1000) | P | W | U);
    *m.gpr(RDI) = 0x6_0001;
    assert_eq!(m.run(), None);
    assert_eq!((*m.gpr(RBX), *m.gpr(RAX)), (5, 9));
}

#[test]
fn a_string_store_into_code_is_seen() {
    // mov ecx, 4; rep stosb into the immediate
    let mut m = patched_function(&[0xb9, 4, 0, 0, 0, 0xb0, 2, 0xf3, 0xaa]);
    *m.gpr(RDI) = CODE + 0x1001;
    assert_eq!(m.run(), None);
    assert_eq!((*m.gpr(RBX), *m.gpr(RAX)), (1, 0x0202_0202));
}

#[test]
fn a_string_store_that_changes_itself_is_refetched_whatever_the_turns() {
    // nop four times; rep stosd to 3 bytes before it: its first iteration makes NOP; STOSD of it, which makes NOPs of what follows.
    let code = [0x90, 0x90, 0x90, 0x90, 0xf3, 0xab, 0x90, 0x90, 0x90, 0x90, 0x90, 0xf4];
    for turn in 1..6 {
        let mut m = Machine::new(&code);
        (*m.gpr(RAX), *m.gpr(RDI), *m.gpr(RCX)) = (0x9090_9090, CODE + 1, 100);
        let mut left: u64 = 10;
        while left > 0 {
            m.steps(turn.min(left));
            left -= turn.min(left);
        }
        assert_eq!((*m.gpr(RCX), *m.gpr(RDI), m.core.cpu.rip), (99, CODE + 9, CODE + 9), "turns of {turn}");
    }
}

#[test]
fn a_misaligned_string_store_leaves_the_page_clean_whatever_the_turns() {
    for turn in [1, 100] {
        // rep stosw to an odd address, in ring 3 with alignment checks.
        let mut m = Machine::new(&[0x66, 0xf3, 0xab]);
        let cpu = &mut m.core.cpu;
        (cpu.cpl, cpu.cr0) = (3, cpu.cr0 | 1 << 18);
        cpu.set_rflags(2 | 1 << 18);
        m.core.refresh();
        (*m.gpr(RDI), *m.gpr(RCX)) = (DATA + 1, 5);
        let _ = m.core.run(&mut m.cache, turn);
        assert_eq!(m.read(PT + 8 * (DATA >> 12)) & (A | D), 0, "turns of {turn}");
    }
}

#[test]
fn a_branch_follows_its_changed_target() {
    // l: cmp ecx, 3; jne f; mov byte [rdi], 5; f: mov al, 1; add ebx, eax; dec ecx; jnz l; hlt. RDI: the immediate of MOV AL.
    let mut m = Machine::new(&[0x83, 0xf9, 3, 0x75, 3, 0xc6, 7, 5, 0xb0, 1, 0x01, 0xc3, 0xff, 0xc9, 0x75, 0xf0, 0xf4]);
    (*m.gpr(RCX), *m.gpr(RDI)) = (6, CODE + 9);
    assert_eq!(m.run(), None);
    assert_eq!(*m.gpr(RBX), 3 + 3 * 5);
    // From outside, with all links made.
    m.write(CODE + 9, &[2]);
    (*m.gpr(RCX), *m.gpr(RBX)) = (2, 0);
    m.restart(CODE);
    assert_eq!(m.run(), None);
    assert_eq!(*m.gpr(RBX), 4);
}

#[test]
fn a_branch_to_an_instruction_across_a_page_end() {
    // At CODE + 0xff0: l: dec ecx; jnz t; hlt … t (0xffd): add eax, imm32 across the page end; jmp l
    let mut m = Machine::new(&[0xe9, 0xeb, 0x0f, 0, 0]);
    m.write(CODE + 0xff0, &[0xff, 0xc9, 0x75, 9, 0xf4]);
    m.write(CODE + 0xffd, &[0x05, 1, 0, 0, 0, 0xeb, 0xec]);
    *m.gpr(RCX) = 5;
    assert_eq!(m.run(), None);
    assert_eq!(*m.gpr(RAX), 4);
    // The second page changes place between two runs.
    m.write(CODE + 0x5000, &[0, 0, 0xeb, 0xec]);
    m.write(CODE + 0x5000, &[2]);
    m.entry(PT + 8 * ((CODE + 0x1000) >> 12), (CODE + 0x5000) | P | W | U);
    m.core.flush_page(CODE + 0x1000);
    (*m.gpr(RCX), *m.gpr(RAX)) = (2, 0);
    m.restart(CODE);
    assert_eq!(m.run(), None);
    assert_eq!(*m.gpr(RAX), 0x0002_0001);
}

#[test]
fn clearing_a_page_of_code_is_one_piece_of_work() {
    // rep stosq over the page of a function that has run, then it is called again: add [rax], al all over.
    let mut m = patched_function(&[0xb9, 0, 2, 0, 0, 0x31, 0xc0, 0xf3, 0x48, 0xab]);
    *m.gpr(RDI) = CODE + 0x1000;
    m.steps(4 + 2 + 512);
    assert_eq!((*m.gpr(RCX), *m.gpr(RDI)), (0, CODE + 0x2000));
    assert!(m.bytes(CODE + 0x1000, 4096).iter().all(|&b| b == 0));
    *m.gpr(RAX) = DATA;
    m.write(DATA, &[1]);
    m.steps(2);
    assert_eq!(m.read(DATA), 1 + (DATA & 0xff));
    assert_eq!(m.core.cpu.rip, CODE + 0x1002);
}

#[test]
fn a_device_write_to_code_is_seen() {
    let mut m = patched_function(&[]);
    m.steps(4);
    assert_eq!(*m.gpr(RAX), 1);
    m.write(CODE + 0x1001, &[0x44]);
    assert_eq!(m.run(), None);
    assert_eq!((*m.gpr(RBX), *m.gpr(RAX)), (1, 0x44));
}

#[test]
fn an_instruction_across_a_page_end_follows_both_pages() {
    let mut m = Machine::new(&[0xe9, 0xf8, 0x0f, 0, 0]); // jmp CODE + 0xffd
    // mov eax, imm32 with its last two bytes on the next page; jmp back to itself would loop, so hlt
    m.write(CODE + 0xffd, &[0xb8, 0x11, 0x22, 0x33, 0x44, 0xf4]);
    assert_eq!(m.run(), None);
    assert_eq!(*m.gpr(RAX), 0x4433_2211);
    // A write to the second part alone
    m.write(CODE + 0x1000, &[0x55]);
    m.restart(CODE);
    assert_eq!(m.run(), None);
    assert_eq!(*m.gpr(RAX), 0x4455_2211);
    // The next page is now another one
    m.write(CODE + 0x5000, &[0x66, 0x77, 0xf4]);
    m.entry(PT + 8 * ((CODE + 0x1000) >> 12), (CODE + 0x5000) | P | W | U);
    m.core.flush_page(CODE + 0x1000);
    m.restart(CODE);
    assert_eq!(m.run(), None);
    assert_eq!(*m.gpr(RAX), 0x7766_2211);
    // And now it is not there
    m.entry(PT + 8 * ((CODE + 0x1000) >> 12), 0);
    m.core.flush_page(CODE + 0x1000);
    m.restart(CODE);
    let caught = m.run().unwrap();
    assert_eq!((caught.vector, caught.cr2, caught.rip), (14, CODE + 0x1000, CODE + 0xffd));
}

#[test]
fn a_remapped_code_page_is_fetched_anew() {
    let mut m = patched_function(&[]);
    m.steps(4);
    m.write(CODE + 0x3000, &[0xb8, 0x77, 0, 0, 0, 0xc3]);
    m.entry(PT + 8 * ((CODE + 0x1000) >> 12), (CODE + 0x3000) | P | W | U);
    m.core.flush_page(CODE + 0x1000);
    assert_eq!(m.run(), None);
    assert_eq!(*m.gpr(RAX), 0x77);
}

#[test]
fn single_stepping_traps_after_every_instruction() {
    // pushfq; or qword [rsp], 0x100; popfq; nop; inc eax; hlt
    let mut m = Machine::new(&[0x9c, 0x48, 0x81, 0x0c, 0x24, 0, 1, 0, 0, 0x9d, 0x90, 0xff, 0xc0, 0xf4]);
    let caught = m.run().unwrap();
    assert_eq!((caught.vector, caught.rip), (1, CODE + 11), "after the instruction that follows POPF");
    assert_eq!(m.core.cpu.dr[6] & 1 << 14, 1 << 14);
    assert_eq!(m.core.cpu.flags & flags::TF, 0, "the handler runs without it");
}

#[test]
fn stepping_over_changed_code_traps_once_for_each_instruction() {
    // The routine of #DB counts in R8 and returns; the code changes its own next instruction each time round.
    // l: mov byte [rip+1], cl; mov al, 0; dec ecx; jnz l; hlt
    let mut m = Machine::new(&[0x88, 0x0d, 1, 0, 0, 0, 0xb0, 0, 0xff, 0xc9, 0x75, 0xf4, 0xf4]);
    m.write(0x8010, &[0x49, 0xff, 0xc0, 0x48, 0xcf]); // inc r8; iretq
    *m.gpr(RCX) = 3;
    m.core.cpu.set_rflags(2 | flags::TF);
    m.steps(3 * 12);
    assert_eq!((*m.gpr(8), *m.gpr(RAX), m.core.cpu.rip), (12, 1, CODE + 12), "4 instructions, 3 times");
}

#[test]
fn what_no_processor_of_the_profile_has_is_an_invalid_opcode() {
    for code in [&[0x0f, 0x0b][..], &[0xc5, 0xfc, 0x77], &[0xf0, 0x90], &[0x0f, 0x38, 0xf0, 0x00]] {
        let caught = Machine::new(code).run().unwrap();
        assert_eq!((caught.vector, caught.rip), (6, CODE), "{code:x?}");
    }
}

#[test]
fn a_fault_changes_nothing() {
    // push [rdi]; with a stack page that is not there
    let mut m = Machine::new(&[0xff, 0x37]);
    m.core.cpu.gpr[x86::state::RSP] = 0x10;
    m.core.cpu.idtr.limit = 0;
    m.entry(PT, 0);
    m.core.cpu.gpr[RDI] = DATA;
    match m.core.run(&mut m.cache, 10) {
        x86::run::RunExit::TripleFault => {}
        other => panic!("{other:?}"),
    }
    assert_eq!((m.core.cpu.rip, *m.gpr(x86::state::RSP), m.core.cpu.icount), (CODE, 0x10, 0));
    let _ = STACK;
}

#[test]
fn a_code_breakpoint_hits_before_its_instruction_and_once_with_rf() {
    // inc eax; inc eax; inc eax; hlt, with a breakpoint on the second
    let mut m = Machine::new(&[0xff, 0xc0, 0xff, 0xc0, 0xff, 0xc0, 0xf4]);
    m.core.cpu.dr[0] = CODE + 2;
    m.core.cpu.dr[7] = 0x402;
    m.core.refresh_breakpoints();
    let caught = m.run().unwrap();
    assert_eq!((caught.vector, caught.rip, *m.gpr(RAX)), (1, CODE + 2, 1));
    assert_eq!(m.core.cpu.dr[6] & 15, 1);
    m.restart(CODE + 2);
    m.core.cpu.flags |= flags::RF;
    assert_eq!(m.run(), None);
    assert_eq!(*m.gpr(RAX), 3);
    assert_eq!(m.core.cpu.flags & flags::RF, 0, "RF is good for one instruction");
}

#[test]
fn data_breakpoints_hit_after_their_instruction() {
    // mov al, [rdi]; mov [rdi], al; nop; hlt
    let code = &[0x8a, 7, 0x88, 7, 0x90, 0xf4];
    // (R/W, length code, address of the breakpoint, RIP after the hit)
    for (rw, len, at, rip) in [
        (1, 0, DATA + 5, Some(CODE + 4)),
        (3, 0, DATA + 5, Some(CODE + 2)),
        (1, 3, DATA + 4, Some(CODE + 4)),
        (1, 0, DATA + 6, None),
        (1, 2, DATA, Some(CODE + 4)),
    ] {
        let mut m = Machine::new(code);
        *m.gpr(RDI) = DATA + 5;
        m.core.cpu.dr[3] = at;
        m.core.cpu.dr[7] = 0x480 | rw << 28 | len << 30;
        m.core.refresh_breakpoints();
        let caught = m.run();
        assert_eq!(caught.map(|c| c.rip), rip, "R/W {rw} length {len} at {at:#x}");
        if let Some(c) = caught {
            assert_eq!((c.vector, m.core.cpu.dr[6] & 15), (1, 8));
        }
    }
}

#[test]
fn a_data_breakpoint_stops_a_copy_after_the_iteration() {
    let mut m = Machine::new(&copy(100));
    (*m.gpr(RSI), *m.gpr(RDI)) = (DATA, DATA + 0x2000);
    m.core.cpu.dr[0] = DATA + 0x2010;
    m.core.cpu.dr[7] = 0x1_0402;
    m.core.refresh_breakpoints();
    let caught = m.run().unwrap();
    assert_eq!((caught.vector, caught.rip, *m.gpr(RCX)), (1, CODE + 5, 100 - 17));
}

#[test]
fn an_instruction_of_more_than_15_bytes_is_a_protection_fault() {
    let mut code = vec![0x66; 14];
    code.extend([0x90, 0xf4]);
    assert_eq!(Machine::new(&code).run(), None, "15 bytes are fine");
    code.insert(0, 0x66);
    let caught = Machine::new(&code).run().unwrap();
    assert_eq!((caught.vector, caught.rip), (13, CODE));
}

#[test]
fn comparisons_with_their_jump_do_what_the_two_do_apart() {
    // Every width and operand kind of CMP and TEST that is fused, each with every condition.
    let forms: [(&str, &[u8]); 14] = [
        ("cmp eax, ebx", &[0x39, 0xd8]),
        ("cmp rax, rbx", &[0x48, 0x39, 0xd8]),
        ("cmp al, bl", &[0x38, 0xd8]),
        ("cmp ax, bx", &[0x66, 0x39, 0xd8]),
        ("cmp eax, imm8", &[0x83, 0xf8, 0x80]),
        ("cmp rax, imm32", &[0x48, 0x3d, 0xff, 0xff, 0xff, 0x7f]),
        ("cmp rax, [rdi]", &[0x48, 0x3b, 0x07]),
        ("cmp [rdi], ebx", &[0x39, 0x1f]),
        ("cmp byte [rdi], imm8", &[0x80, 0x3f, 0x7f]),
        ("cmp dword [rdi+rcx], imm8", &[0x83, 0x3c, 0x0f, 0xff]),
        ("test eax, ebx", &[0x85, 0xd8]),
        ("test al, imm8", &[0xa8, 0x81]),
        ("test byte [rdi], imm8", &[0xf6, 0x07, 0x80]),
        ("test rax, rax", &[0x48, 0x85, 0xc0]),
    ];
    let values = [0, 1, 0x7f, 0x80, 0xff, 0x7fff_ffff, 0x8000_0000, u64::MAX >> 1, 1 << 63, u64::MAX, u64::MAX - 127];
    for (name, form) in forms {
        for cc in 0..16u8 {
            let mut code = form.to_vec();
            code.extend([0x70 | cc, 2, 0xff, 0xc2, 0xf4]); // jcc +2; inc edx; hlt
            let (mut whole, mut steps) = (Machine::new(&code), Machine::new(&code));
            for (a, b) in values.iter().flat_map(|&a| values.iter().map(move |&b| (a, b))) {
                for (m, single) in [(&mut whole, false), (&mut steps, true)] {
                    m.restart(CODE);
                    (*m.gpr(RAX), *m.gpr(RBX), *m.gpr(2), *m.gpr(RCX), *m.gpr(RDI)) = (a, b, 0, 0, DATA);
                    m.core.cpu.set_rflags(0x8d7);
                    m.write(DATA, &b.to_le_bytes());
                    if single {
                        m.steps(1);
                        m.steps(1);
                    }
                    assert_eq!(m.run(), None);
                }
                let (w, s) = (&whole.core.cpu, &steps.core.cpu);
                assert_eq!((w.gpr[2], w.rflags(), w.icount), (s.gpr[2], s.rflags(), s.icount), "{name} {a:#x} {b:#x} cc {cc}");
            }
        }
    }
}

#[test]
fn a_fault_in_a_fused_comparison_is_at_the_comparison() {
    let mut m = Machine::new(&[0x83, 0x3f, 0, 0x75, 0xfb, 0xf4]); // cmp dword [rdi], 0; jne; hlt
    *m.gpr(RDI) = DATA;
    m.entry(PT + 8 * (DATA >> 12), 0);
    let caught = m.run().unwrap();
    assert_eq!((caught.vector, caught.rip), (14, CODE));
}

#[test]
fn second_bytes_of_registers() {
    // mov eax, 0x12345678; mov ecx, 0xff01; add ah, ch; setc dl; xchg bh, ah; movzx esi, bh; not bh; movsx edi, bh
    let mut code = vec![0xb8, 0x78, 0x56, 0x34, 0x12, 0xb9, 1, 0xff, 0, 0, 0, 0xec, 0x0f, 0x92, 0xc2, 0x86, 0xfc];
    code.extend([0x0f, 0xb6, 0xf7, 0xf6, 0xd7, 0x0f, 0xbe, 0xff]);
    // mov dh, 0x81; shl dh, cl; adc al, dh; test ah, ah; setz ch; hlt
    code.extend([0xb6, 0x81, 0xd2, 0xe6, 0x10, 0xf0, 0x84, 0xe4, 0x0f, 0x94, 0xc5, 0xf4]);
    for make in [Machine::new, Machine::translating] {
        let mut m = make(&code);
        *m.gpr(RDX) = 0;
        assert_eq!(m.run(), None);
        let found = [RAX, RCX, RDX, RBX, RSI, RDI].map(|r| *m.gpr(r));
        assert_eq!(found, [0x1234_007b, 0x0101, 0x0201, 0xaa00, 0x55, 0xffff_ffaa]);
    }
}
