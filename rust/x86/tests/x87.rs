//! x87 on translated code: the guest's registers go into the host's and come back, and nobody sees it.

mod flat;

use flat::{CODE, Caught, DATA, Machine, PT};
use x86::state::{Fpu, RAX, RBX, RCX, RDI, RDX};

/// `fld tbyte [rbx]; fld qword [rbx+16]; fmul st, st1; faddp; fstp tbyte [rbx]; fnstsw ax; add rdx, rax; dec ecx; jnz; hlt`
const LOOP: &[u8] =
    &[0xdb, 0x2b, 0xdd, 0x43, 16, 0xd8, 0xc9, 0xde, 0xc1, 0xdb, 0x3b, 0xdf, 0xe0, 0x48, 1, 0xc2, 0xff, 0xc9, 0x75, 0xec, 0xf4];

/// One machine without translations (unless the suite runs with them) and one for each way in which x87 registers get loaded: at
/// once, and after some instructions.
fn machines(code: &[u8]) -> Vec<Machine> {
    let one = |threshold| {
        let mut m = Machine::new(code);
        if let Some(threshold) = threshold {
            m.cache.translate_after(threshold).expect("this host does not let us translate");
        }
        m.core.cpu.fpu = Fpu::default();
        m.write(DATA, &[0, 0, 0, 0, 0, 0, 0, 0x80, 0xff, 0x3f]);
        m.write(DATA + 16, &1.000_001_f64.to_le_bytes());
        for (r, v) in [(RAX, 0), (RBX, DATA), (RCX, 300), (RDX, 0), (RDI, DATA + 64)] {
            *m.gpr(r) = v;
        }
        m
    };
    [None, Some(0), Some(1)].into_iter().map(one).collect()
}

type Seen = ([u64; 16], u64, u64, Fpu, [u64; 16]);

fn seen(m: &Machine) -> Seen {
    let cpu = &m.core.cpu;
    let mut gpr = [0; 16];
    gpr.copy_from_slice(&cpu.gpr[..16]);
    (gpr, cpu.rip, cpu.rflags(), cpu.fpu, std::array::from_fn(|n| m.read(DATA + 8 * n as u64)))
}

/// Runs all to their end: the same exception, the same state.
fn same_end(machines: &mut [Machine]) -> (Option<Caught>, Fpu) {
    let ends: Vec<_> = machines.iter_mut().map(|m| (m.run(), seen(m))).collect();
    assert_eq!(ends[1], ends[0], "loaded at once");
    assert_eq!(ends[2], ends[0], "loaded after some instructions");
    (ends[0].0, ends[0].1.3)
}

#[test]
fn every_stop_shows_the_same_registers_and_pointers() {
    let mut machines = machines(LOOP);
    for turn in 0..800 {
        machines.iter_mut().for_each(|m| m.steps(1 + turn % 5));
        let all: Vec<_> = machines.iter().map(seen).collect();
        assert_eq!(all[1], all[0], "turn {turn}");
        assert_eq!(all[2], all[0], "turn {turn}");
        let pointers = all[0].3;
        assert!(turn < 8 || pointers.fip >= CODE && pointers.fdp >= DATA && pointers.fop != 0, "{pointers:x?}");
    }
}

#[test]
fn a_loop_is_left_with_its_result() {
    let mut machines = machines(LOOP);
    let (caught, fpu) = same_end(&mut machines);
    assert_eq!(caught, None);
    assert_eq!((fpu.ftw, fpu.fop), (0, 0x33b), "FSTP tbyte [rbx] was the last");
    assert!(machines[1].cache.translations() > 0 && machines[2].cache.translations() > 0);
}

/// `fld1` five times and `fstp st0` five times, so that the registers are loaded in any case; then `rest`.
fn warmed_up(rest: &[u8]) -> Vec<u8> {
    let mut code = [[0xd9, 0xe8].repeat(5), [0xdd, 0xd8].repeat(5)].concat();
    // jmp $+2: what follows is a block of its own.
    code.extend([0xeb, 0]);
    code.extend(rest);
    code
}

#[test]
fn an_operand_that_is_not_there_is_a_page_fault_between_two_instructions() {
    // l: fld1; fmul qword [rbx]; fstp qword [rbx]; add rbx, 0x1000; jmp l
    let mut machines = machines(&warmed_up(&[0xd9, 0xe8, 0xdc, 0x0b, 0xdd, 0x1b, 0x48, 0x81, 0xc3, 0, 0x10, 0, 0, 0xeb, 0xf1]));
    for m in &machines {
        m.entry(PT + 8 * ((DATA >> 12) + 5), 0);
    }
    let (caught, fpu) = same_end(&mut machines);
    let caught = caught.expect("a page fault");
    assert_eq!((caught.vector, caught.cr2), (14, DATA + 0x5000));
    assert_eq!((fpu.fip, fpu.ftw.count_ones()), (caught.rip - 2, 1), "FLD1 was done");
}

#[test]
fn a_control_word_that_unmasks_division_by_zero_is_obeyed() {
    // fldcw [rdi]; fld1; fldz; fdivp; fwait; hlt
    let code = warmed_up(&[0xd9, 0x2f, 0xd9, 0xe8, 0xd9, 0xee, 0xde, 0xf9, 0x9b, 0xf4]);
    let mut machines = machines(&code);
    for m in &machines {
        m.write(DATA + 64, &0x37b_u16.to_le_bytes());
    }
    let (caught, fpu) = same_end(&mut machines);
    let caught = caught.expect("#MF");
    assert_eq!((caught.vector, caught.rip), (16, CODE + code.len() as u64 - 2));
    assert_eq!((fpu.fcw, fpu.fsw & 0x80bf), (0x37b, 0x8084));
}

#[test]
fn a_control_word_that_rounds_down_is_obeyed() {
    // fldcw [rdi]; fld1; fild word [rdi+2]; fdivp; fstp qword [rbx]; hlt
    let code = warmed_up(&[0xd9, 0x2f, 0xd9, 0xe8, 0xdf, 0x47, 2, 0xde, 0xf9, 0xdd, 0x1b, 0xf4]);
    let mut machines = machines(&code);
    for m in &machines {
        m.write(DATA + 64, &[0x7f, 0x07, 3, 0]);
    }
    assert_eq!(same_end(&mut machines).0, None);
    assert_eq!(machines[0].read(DATA), (2.0_f64 / 3.0 / 2.0).to_bits(), "below 1/3 already");
    assert_eq!(f64::from_bits(machines[0].read(DATA)) * 3.0, 1.0);
}

#[test]
fn task_switched_is_seen_at_the_next_instruction() {
    // mov rax, cr0; or al, 8; mov cr0, rax; fld1; hlt
    let code = warmed_up(&[0x0f, 0x20, 0xc0, 0x0c, 8, 0x0f, 0x22, 0xc0, 0xd9, 0xe8, 0xf4]);
    let mut machines = machines(&code);
    let (caught, fpu) = same_end(&mut machines);
    let caught = caught.expect("#NM");
    assert_eq!((caught.vector, caught.rip), (7, CODE + code.len() as u64 - 3));
    assert_eq!(fpu.fop, 0x5d8, "FSTP ST0 was the last");
}

#[test]
fn too_many_values_overflow_as_ever() {
    // nine times fld1; hlt
    let mut code = [0xd9, 0xe8].repeat(9);
    code.push(0xf4);
    let mut machines = machines(&code);
    let (caught, fpu) = same_end(&mut machines);
    assert_eq!((caught, fpu.ftw, fpu.fsw), (None, 0xff, 0x3a41));
}
