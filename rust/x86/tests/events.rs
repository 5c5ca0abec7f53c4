//! Delivery of exceptions and interrupts, segment loads.

mod common;

use common::*;
use std::sync::Arc;

use vcpu::IrqSink;
use x86::core::{DB, DE, GP, NP, PF, Pending, SS as STACK, TS, UD};
use x86::state::{Activity, CS, DS, FS, SS, Segment, flags};

const INT64: u8 = 0x8e;
const TRAP64: u8 = 0x8f;

#[test]
fn same_privilege_frame_with_error_code() {
    let mut m = machine(1);
    m.long_mode(0, 0);
    m.gate64(GP, CODE64, 0xffff_8000_1234_5678, INT64, 0);
    let c = &mut m.cores[0];
    c.cpu.gpr[4] = STACK1 - 3;
    c.cpu.set_rflags(flags::IF | flags::CF | flags::TF);
    c.deliver(exception(GP, Some(0x18))).unwrap();
    let sp = ((STACK1 - 3) & !15) - 48;
    assert_eq!((c.cpu.rip, c.cpu.gpr[4]), (0xffff_8000_1234_5678, sp));
    assert_eq!(c.cpu.rflags(), flags::CF | flags::FIXED);
    let frame: Vec<u64> = (0..6).map(|n| m.read64(sp + 8 * n)).collect();
    assert_eq!(
        frame,
        [0x18, 0x5000, u64::from(CODE64), flags::IF | flags::CF | flags::TF | flags::RF | 2, STACK1 - 3, u64::from(DATA0)]
    );
}

#[test]
fn user_to_kernel_switches_stack() {
    let mut m = machine(1);
    m.long_mode(0, 3);
    m.gate64(DE, CODE64, 0x7000, TRAP64, 0);
    m.gate64(UD, CODE64, 0x7100, INT64, 1);
    let c = &mut m.cores[0];
    c.cpu.set_rflags(flags::IF);
    c.deliver(exception(DE, None)).unwrap();
    assert_eq!((c.cpu.cpl, c.cpu.gpr[4], c.cpu.seg[CS].selector), (0, STACK0 - 40, CODE64));
    // SS is null with the new level as RPL; a trap gate leaves IF.
    assert_eq!((c.cpu.seg[SS].selector, c.cpu.seg[SS].dpl()), (0, 0));
    assert!(c.cpu.flags & flags::IF != 0);
    m.long_mode(0, 3);
    m.cores[0].deliver(exception(UD, None)).unwrap();
    assert_eq!(m.cores[0].cpu.gpr[4], IST1 - 40);
}

#[test]
fn page_fault_sets_cr2_and_double_fault_follows() {
    let mut m = machine(1);
    m.long_mode(0, 0);
    m.gate64(PF, CODE64, 0x7000, INT64, 0);
    m.gate64(8, CODE64, 0x7800, INT64, 1);
    let c = &mut m.cores[0];
    let fault = x86::core::Exception { vector: PF, error: Some(2), cr2: 0xdead_b000 };
    c.deliver(fault).unwrap();
    assert_eq!((c.cpu.cr2, c.cpu.rip), (0xdead_b000, 0x7000));
    // The stack itself faults: #DF on its IST stack, error code 0.
    c.cpu.gpr[4] = 0x8000_0000;
    c.deliver(fault).unwrap();
    assert_eq!((c.cpu.rip, c.cpu.gpr[4]), (0x7800, IST1 - 48));
    assert_eq!(m.read64(IST1 - 48), 0);
}

#[test]
fn triple_fault() {
    let mut m = machine(1);
    m.long_mode(0, 0);
    let c = &mut m.cores[0];
    assert!(c.deliver(exception(GP, Some(0))).is_err());
    assert!(matches!(c.fault, Some(Pending::TripleFault)));
}

#[test]
fn gate_faults_name_the_vector() {
    let mut m = machine(1);
    m.long_mode(0, 3);
    // DPL 0 gates are closed to INT n, and EXT is 0.
    m.gate64(0x80, CODE64, 0x7000, INT64, 0);
    let r = m.cores[0].soft_interrupt(0x80);
    assert_eq!(fault(&mut m.cores[0], r), (GP, Some(0x80 << 3 | 2)));
    m.gate64(0x80, CODE64, 0x7000, 0x6e, 0);
    let r = m.cores[0].soft_interrupt(0x80);
    assert_eq!(fault(&mut m.cores[0], r), (NP, Some(0x80 << 3 | 2)));
    m.gate64(0x80, 0, 0x7000, 0xee, 0);
    let r = m.cores[0].soft_interrupt(0x80);
    assert_eq!(fault(&mut m.cores[0], r), (GP, Some(0)));
    m.gate64(0x80, CODE32, 0x7000, 0xee, 0);
    let r = m.cores[0].soft_interrupt(0x80);
    assert_eq!(fault(&mut m.cores[0], r), (GP, Some(u32::from(CODE32))));
    m.gate64(0x80, ABSENT, 0x7000, 0xee, 0);
    let r = m.cores[0].soft_interrupt(0x80);
    assert_eq!(fault(&mut m.cores[0], r).0, GP);
    m.gate64(0x80, CODE64, 0x7000, 0xee, 0);
    m.cores[0].cpu.tr.limit = 3;
    let r = m.cores[0].soft_interrupt(0x80);
    assert_eq!(fault(&mut m.cores[0], r), (TS, Some(u32::from(TASK))));
    m.cores[0].cpu.tr.limit = 0x67;
    m.write64(TSS + 4, 1 << 60);
    let r = m.cores[0].soft_interrupt(0x80);
    assert_eq!(fault(&mut m.cores[0], r), (STACK, Some(0)));
    m.write64(TSS + 4, STACK0);
    m.cores[0].soft_interrupt(0x80).unwrap();
}

#[test]
fn legacy_frames() {
    let mut m = machine(1);
    m.protected(0, 3);
    m.gate32(GP, CODE32, 0x7000, 0x8e);
    let c = &mut m.cores[0];
    c.deliver(exception(GP, Some(4))).unwrap();
    assert_eq!((c.cpu.cpl, c.cpu.gpr[4], c.cpu.rip, c.cpu.seg[SS].selector), (0, STACK0 - 24, 0x7000, DATA0));
    let mut bytes = [0; 24];
    m.shared.memory.read(STACK0 - 24, &mut bytes).unwrap();
    let words: Vec<u32> = bytes.chunks(4).map(|c| u32::from_le_bytes(c.try_into().unwrap())).collect();
    assert_eq!(words[..3], [4, 0x5000, u32::from(USER_CODE32)]);
    assert_eq!(words[4..], [STACK1 as u32, u32::from(USER_DATA)]);
}

#[test]
fn real_mode_vector_table() {
    let mut m = machine(1);
    m.write(0x20 * 4, &[0x34, 0x12, 0x00, 0x10]);
    let c = &mut m.cores[0];
    c.set_segment(CS, Segment { base: 0x20000, limit: 0xffff, selector: 0x2000, attr: 0x9b });
    c.set_segment(SS, Segment { base: 0x30000, limit: 0xffff, selector: 0x3000, attr: 0x93 });
    (c.cpu.rip, c.cpu.gpr[4]) = (0x77, 2);
    c.cpu.set_rflags(flags::IF);
    c.soft_interrupt(0x20).unwrap();
    assert_eq!((c.cpu.rip, c.cpu.seg[CS].base, c.cpu.gpr[4] & 0xffff), (0x1234, 0x10000, 0xfffc));
    assert_eq!(c.cpu.flags & flags::IF, 0);
    let mut b = [0; 2];
    m.shared.memory.read(0x3fffc, &mut b).unwrap();
    assert_eq!(u16::from_le_bytes(b), 0x77);
}

#[test]
fn interrupts_wait_for_if_shadow_and_priority() {
    let mut m = machine(1);
    m.long_mode(0, 0);
    m.gate64(0x55, CODE64, 0x7000, INT64, 0);
    m.gate64(2, CODE64, 0x7200, INT64, 0);
    m.cores[0].lapic_write(0xf0, 4, 0x1ff);
    m.shared.apics.msi(0xfee0_0000, 0x55);
    let c = &mut m.cores[0];
    assert!(c.event_pending());
    c.poll_events().unwrap();
    assert_eq!(c.cpu.rip, 0x5000);
    c.cpu.flags |= flags::IF;
    c.cpu.shadow = 2;
    c.poll_events().unwrap();
    assert_eq!(c.cpu.rip, 0x5000);
    c.cpu.shadow = 0;
    c.cpu.activity = Activity::Halted;
    m.shared.apics.msi(0xfee0_0000, 0x400);
    let c = &mut m.cores[0];
    // The NMI first, then (its handler runs with interrupts off) the interrupt.
    c.poll_events().unwrap();
    assert_eq!((c.cpu.rip, c.cpu.activity, c.cpu.nmi_masked), (0x7200, Activity::Running, true));
    c.poll_events().unwrap();
    assert_eq!(c.cpu.rip, 0x7200);
    c.cpu.flags |= flags::IF;
    c.poll_events().unwrap();
    assert_eq!(c.cpu.rip, 0x7000);
    assert!(!c.event_pending());
}

#[test]
fn an_interrupt_that_cannot_be_delivered_becomes_an_exception() {
    let mut m = machine(1);
    m.long_mode(0, 0);
    m.gate64(GP, CODE64, 0x7000, INT64, 0);
    m.gate64(NP, CODE64, 0x7300, INT64, 0);
    m.cores[0].lapic_write(0xf0, 4, 0x1ff);
    m.cores[0].cpu.flags |= flags::IF;
    m.shared.apics.msi(0xfee0_0000, 0x56);
    m.cores[0].poll_events().unwrap();
    let c = &m.cores[0].cpu;
    assert_eq!(c.rip, 0x7000);
    assert_eq!(m.read64(c.gpr[4]), 0x56 << 3 | 3);
}

#[test]
fn icebp_ignores_gate_privilege() {
    let mut m = machine(1);
    m.long_mode(0, 3);
    m.gate64(DB, CODE64, 0x7000, INT64, 0);
    m.cores[0].icebp().unwrap();
    assert_eq!(m.cores[0].cpu.rip, 0x7000);
}

#[test]
fn segment_checks() {
    let mut m = machine(1);
    m.long_mode(0, 0);
    let load = |m: &mut Machine, seg: usize, selector: u16| {
        let r = m.cores[0].load_segment(seg, selector);
        if r.is_ok() { None } else { Some(fault(&mut m.cores[0], r)) }
    };
    assert_eq!(load(&mut m, DS, DATA0), None);
    assert_eq!(load(&mut m, DS, USER_DATA), None);
    assert_eq!(load(&mut m, DS, CODE64), None);
    assert_eq!(load(&mut m, DS, EXECUTE_ONLY), Some((GP, Some(u32::from(EXECUTE_ONLY)))));
    assert_eq!(load(&mut m, DS, DATA0 | 3), Some((GP, Some(u32::from(DATA0)))));
    assert_eq!(load(&mut m, DS, ABSENT), Some((NP, Some(u32::from(ABSENT)))));
    assert_eq!(load(&mut m, DS, GDT_LEN), Some((GP, Some(u32::from(GDT_LEN)))));
    assert_eq!(load(&mut m, DS, 0x14), Some((GP, Some(0x14))));
    assert_eq!(load(&mut m, DS, TASK), Some((GP, Some(u32::from(TASK)))));
    assert_eq!(load(&mut m, SS, ABSENT), Some((STACK, Some(u32::from(ABSENT)))));
    assert_eq!(load(&mut m, SS, DATA0 | 1), Some((GP, Some(u32::from(DATA0)))));
    assert_eq!(load(&mut m, SS, READ_ONLY), Some((GP, Some(u32::from(READ_ONLY)))));
    assert_eq!(load(&mut m, SS, USER_DATA), Some((GP, Some(0x20))));
    // Null: allowed for SS in 64-bit code below CPL 3 only, with RPL = CPL.
    assert_eq!(load(&mut m, SS, 0), None);
    assert_eq!(load(&mut m, SS, 3), Some((GP, Some(0))));
    m.cores[0].cpu.seg[FS].base = 77;
    assert_eq!(load(&mut m, FS, 0), None);
    assert_eq!((m.cores[0].cpu.seg[FS].base, m.cores[0].cpu.seg_base[FS]), (0, 0));
    m.long_mode(0, 3);
    assert_eq!(load(&mut m, SS, 3), Some((GP, Some(0))));
    assert_eq!(load(&mut m, DS, DATA0), Some((GP, Some(u32::from(DATA0)))));
    assert_eq!(load(&mut m, DS, CONFORMING), None);
}

#[test]
fn accessed_and_busy_bits() {
    let mut m = machine(1);
    m.long_mode(0, 0);
    m.write64(GDT + u64::from(DATA0), 0x00cf_9200_0000_ffff);
    m.cores[0].load_segment(DS, DATA0).unwrap();
    assert_eq!(m.read64(GDT + u64::from(DATA0)), 0x00cf_9300_0000_ffff);
    m.cores[0].load_tr(TASK).unwrap();
    assert_eq!(m.read64(GDT + u64::from(TASK)) >> 40 & 0xff, 0x8b);
    let r = m.cores[0].load_tr(TASK);
    assert_eq!(fault(&mut m.cores[0], r), (GP, Some(u32::from(TASK))));
    // A non-canonical base.
    m.write64(GDT + u64::from(TASK), 0x0000_8900_3000_0067);
    m.write64(GDT + u64::from(TASK) + 8, 0x8000);
    let r = m.cores[0].load_tr(TASK);
    assert_eq!(fault(&mut m.cores[0], r), (GP, Some(u32::from(TASK))));
    m.cores[0].load_ldtr(0).unwrap();
    let r = m.cores[0].load_segment(DS, 0x0c);
    assert_eq!(fault(&mut m.cores[0], r), (GP, Some(0x0c)));
}

#[test]
fn io_bitmap() {
    let mut m = machine(1);
    m.long_mode(0, 3);
    m.write64(TSS + 0x60, 0x68 << 48);
    m.write64(TSS + 0x68, !0 ^ 1 << 9);
    m.cores[0].cpu.tr.limit = 0x6b;
    let ask = |m: &mut Machine, port, width| m.cores[0].io_bitmap_allows(port, width).unwrap();
    assert!(ask(&mut m, 9, 1));
    assert!(!ask(&mut m, 8, 1) && !ask(&mut m, 9, 2) && !ask(&mut m, 0x20, 1) && !ask(&mut m, 0xffff, 4));
}

/// A vCPU with `code` at 0x5000, #DB and #GP handlers that halt.
fn debugged(code: &[u8], dr: [u64; 4], dr7: u64) -> (Machine, x86::cache::Cache) {
    let mut m = machine(1);
    m.long_mode(0, 0);
    m.write(0x5000, code);
    m.write(0x7000, &[0xf4]);
    m.gate64(DB, CODE64, 0x7000, INT64, 0);
    let c = &mut m.cores[0];
    c.cpu.dr[..4].copy_from_slice(&dr);
    c.cpu.dr[7] = dr7 | 0x400;
    c.refresh_breakpoints();
    (m, x86::cache::Cache::new())
}

/// Runs until the handler halts; the frame's RIP and RFLAGS, and DR6's cause bits.
fn until_halt(m: &mut Machine, cache: &mut x86::cache::Cache) -> (u64, u64, u64) {
    let exit = m.cores[0].run(cache, 1000);
    assert!(matches!(exit, x86::run::RunExit::Halted), "{exit:?}");
    let sp = m.cores[0].cpu.gpr[4];
    (m.read64(sp), m.read64(sp + 16), m.cores[0].cpu.dr[6] & 0xe00f)
}

#[test]
fn instruction_breakpoints() {
    let (mut m, mut cache) = debugged(&[0x90, 0x90, 0x90, 0xf4], [0x5002, 0, 0, 0], 1);
    let (rip, rflags, causes) = until_halt(&mut m, &mut cache);
    assert_eq!((rip, rflags & flags::RF, causes), (0x5002, flags::RF, 1));
    // With RF the instruction is executed.
    let c = &mut m.cores[0];
    (c.cpu.rip, c.cpu.activity) = (0x5002, Activity::Running);
    c.cpu.flags |= flags::RF;
    assert!(matches!(c.run(&mut cache, 10), x86::run::RunExit::Halted));
    assert_eq!((c.cpu.rip, c.cpu.flags & flags::RF), (0x5004, 0));
}

#[test]
fn data_breakpoints_trap_after_the_access() {
    // mov [0x9100], eax; mov eax, [0x9104]; nop; hlt
    let code = [0x89, 0x04, 0x25, 0x00, 0x91, 0, 0, 0x8b, 0x04, 0x25, 0x04, 0x91, 0, 0, 0x90, 0xf4];
    // DR1: writes of 4 bytes at 0x9100.
    let (mut m, mut cache) = debugged(&code, [0, 0x9100, 0, 0], 1 << 2 | 0xd << 20);
    assert_eq!(until_halt(&mut m, &mut cache), (0x5007, 2, 2));
    // DR2: any access of one byte in the middle of the load.
    let (mut m, mut cache) = debugged(&code, [0, 0, 0x9106, 0], 2 << 4 | 0x3 << 24);
    assert_eq!(until_halt(&mut m, &mut cache).0, 0x500e);
    // Neither: the program ends.
    let (mut m, mut cache) = debugged(&code, [0x9200, 0x9108, 0, 0], 5 | 0xf << 16 | 0xd << 20);
    assert!(matches!(m.cores[0].run(&mut cache, 1000), x86::run::RunExit::Halted));
    assert_eq!(m.cores[0].cpu.rip, 0x5010);
}

const OTHER_TASK: u16 = 0x40;
const OTHER_TSS: u64 = 0xb000;

/// A second task: 32-bit code at CPL 0.
fn two_tasks() -> Machine {
    let mut m = machine(1);
    m.protected(0, 0);
    m.write64(GDT + u64::from(TASK), 0x0000_8b00_3000_0067);
    m.write64(GDT + u64::from(OTHER_TASK), 0x0000_8900_b000_0067);
    let mut tss = [0u32; 26];
    (tss[8], tss[9], tss[10], tss[14]) = (0x7700, 0x202, 0x1234, 0x8800);
    for (slot, selector) in [(18, DATA0), (19, CODE32), (20, DATA0), (21, USER_DATA), (22, 0), (23, DATA0)] {
        tss[slot] = selector.into();
    }
    m.write(OTHER_TSS, &tss.iter().flat_map(|w| w.to_le_bytes()).collect::<Vec<_>>());
    m
}

#[test]
fn a_call_switches_tasks_and_iret_comes_back() {
    use x86::task::Way;
    let mut m = two_tasks();
    let c = &mut m.cores[0];
    (c.cpu.rip, c.cpu.gpr[0]) = (0x5010, 77);
    c.switch_task(OTHER_TASK, Way::Call, Some(9), 0).unwrap();
    assert_eq!((c.cpu.rip, c.cpu.gpr[0], c.cpu.gpr[4]), (0x7700, 0x1234, 0x87fc));
    assert_eq!((c.cpu.tr.selector, c.cpu.seg[DS].selector, c.cpu.cr0 & 8), (OTHER_TASK, USER_DATA, 8));
    assert!(c.cpu.flags & flags::NT != 0);
    assert_eq!(m.read64(OTHER_TSS) as u16, TASK);
    assert_eq!(m.read64(GDT + u64::from(OTHER_TASK)) >> 40 & 0xff, 0x8b);
    assert_eq!(m.read64(TSS + 0x20) as u32, 0x5010);
    let c = &mut m.cores[0];
    c.switch_task(TASK, Way::Return, None, 0).unwrap();
    assert_eq!((c.cpu.rip, c.cpu.gpr[0], c.cpu.flags & flags::NT), (0x5010, 77, 0));
    assert_eq!(m.read64(GDT + u64::from(OTHER_TASK)) >> 40 & 0xff, 0x89);
}

#[test]
fn task_switch_faults() {
    use x86::task::Way;
    let mut m = two_tasks();
    let r = m.cores[0].switch_task(TASK, Way::Jump, None, 0);
    assert_eq!(fault(&mut m.cores[0], r), (GP, Some(u32::from(TASK))));
    let r = m.cores[0].switch_task(OTHER_TASK, Way::Return, None, 0);
    assert_eq!(fault(&mut m.cores[0], r), (TS, Some(u32::from(OTHER_TASK))));
    m.write64(GDT + u64::from(OTHER_TASK), 0x0000_8900_b000_0066);
    let r = m.cores[0].switch_task(OTHER_TASK, Way::Jump, None, 0);
    assert_eq!(fault(&mut m.cores[0], r), (TS, Some(u32::from(OTHER_TASK))));
    assert_eq!(m.cores[0].cpu.tr.selector, TASK);
    // A bad selector in the new TSS faults in the new task.
    let mut m = two_tasks();
    m.gate32(TS, CODE32, 0x7900, 0x8e);
    m.write(OTHER_TSS + 0x54, &0x1000u32.to_le_bytes());
    m.cores[0].switch_task(OTHER_TASK, Way::Jump, None, 0).unwrap();
    assert_eq!((m.cores[0].cpu.rip, m.cores[0].cpu.tr.selector), (0x7900, OTHER_TASK));
}

/// The frame of a fault lies on a watched address: #DB comes before the handler's first instruction, and not again for its own frame.
#[test]
fn a_frame_on_a_watched_address_traps_at_once() {
    // ud2
    let (mut m, mut cache) = debugged(&[0x0f, 0x0b], [STACK1 - 8, 0, 0, 0], 1 | 0x9 << 16);
    m.write(0x7100, &[0xf4]);
    m.gate64(UD, CODE64, 0x7100, INT64, 0);
    let (rip, _, causes) = until_halt(&mut m, &mut cache);
    assert_eq!((rip, causes), (0x7100, 1));
    assert_eq!(m.cores[0].breakpoints.hit, 0);
}

/// The 8259s' interrupt goes through LINT0 in ExtINT mode, or straight in while the LAPIC is disabled; never to another vCPU.
#[test]
fn an_8259_reaches_the_boot_cpu() {
    use std::sync::atomic::{AtomicU8, Ordering};
    use vcpu::irq::IntrLine;
    use x86::lapic::{APIC_DEFAULT_BASE, LVT_LINT0};

    let mut m = machine(2);
    m.long_mode(0, 0);
    m.gate64(0x31, CODE64, 0x7000, INT64, 0);
    let (line, asked) = (Arc::new(IntrLine::default()), Arc::new(AtomicU8::new(0)));
    let (pic, count) = (line.clone(), asked.clone());
    let acknowledge = move || {
        count.fetch_add(1, Ordering::Relaxed);
        pic.set(false);
        0x31
    };
    assert!(m.shared.apics.connect_pic(line.clone(), Box::new(acknowledge)));
    line.set(true);
    m.cores[0].cpu.set_rflags(flags::IF);
    m.cores[0].poll_events().unwrap();
    assert_eq!(asked.load(Ordering::Relaxed), 0, "LINT0 is masked");
    m.cores[0].lapic.lvt[LVT_LINT0] = 0x700;
    m.cores[0].lapic.update();
    m.cores[0].cpu.flags &= !flags::IF;
    m.cores[0].poll_events().unwrap();
    assert_eq!(asked.load(Ordering::Relaxed), 0, "interrupts are off");
    m.cores[0].cpu.activity = Activity::Halted;
    m.cores[0].cpu.set_rflags(flags::IF);
    m.cores[0].poll_events().unwrap();
    assert_eq!((asked.load(Ordering::Relaxed), m.cores[0].cpu.rip), (1, 0x7000));
    assert_eq!(m.cores[0].lapic.isr, [0; 8], "the LAPIC has nothing to end");
    m.cores[0].cpu.set_rflags(flags::IF);
    m.cores[0].poll_events().unwrap();
    assert_eq!(asked.load(Ordering::Relaxed), 1, "once");
    assert!(!m.cores[0].event_pending());
    // Disabled: its pin is INTR.
    m.cores[0].lapic.set_base(APIC_DEFAULT_BASE, 46, &m.shared.apics.clone()).unwrap();
    m.cores[0].cpu.set_rflags(flags::IF);
    line.set(true);
    m.cores[0].poll_events().unwrap();
    assert_eq!(asked.load(Ordering::Relaxed), 2);
    assert!(!m.shared.apics.mailbox(1).posted());
}
