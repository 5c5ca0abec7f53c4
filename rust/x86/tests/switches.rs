//! What the CPU profile does not claim unless it is switched on, and what can be taken away.
#![allow(clippy::precedence)]

mod flat;

use flat::{CODE, DATA, Machine, P, PT, U, W};
use x86::state::{RAX, RCX, RDI, RDX, Segment, flags};

const ALL: &[&str] = &["+smap", "+umip", "+pku", "+pks", "+rdpid"];
const CR4_UMIP: u64 = 1 << 11;
const CR4_PKE: u64 = 1 << 22;
const CR4_PKS: u64 = 1 << 24;
const UD: u8 = 6;
const GP: u8 = 13;
const PF: u8 = 14;
const PKRS: u64 = 0x6e1;

fn vector(m: &mut Machine) -> Option<u8> {
    m.run().map(|c| c.vector)
}

/// mov cr4, rax; hlt
const SET_CR4: &[u8] = &[0x0f, 0x22, 0xe0, 0xf4];

#[test]
fn nothing_is_there_by_default() {
    for bit in [11, 21, 22, 24] {
        for (changes, want) in [(&[][..], Some(GP)), (ALL, None)] {
            let mut m = Machine::changed(SET_CR4, changes);
            *m.gpr(RAX) = 0xa0 | 1 << bit;
            assert_eq!(vector(&mut m), want, "CR4 bit {bit}");
        }
    }
    // STAC; CLAC; RDPID RAX
    for code in [&[0x0f, 0x01, 0xcb, 0xf4][..], &[0x0f, 0x01, 0xca, 0xf4], &[0xf3, 0x0f, 0xc7, 0xf8, 0xf4]] {
        assert_eq!(vector(&mut Machine::new(code)), Some(UD));
        assert_eq!(vector(&mut Machine::changed(code, ALL)), None);
    }
    // RDPKRU wants CR4.PKE; RDMSR of IA32_PKRS wants the switch.
    let rdpkru = &[0x0f, 0x01, 0xee, 0xf4];
    assert_eq!(vector(&mut Machine::changed(rdpkru, ALL)), Some(UD));
    for (changes, want) in [(&[][..], Some(GP)), (ALL, None)] {
        let mut m = Machine::changed(&[0x0f, 0x32, 0xf4], changes);
        *m.gpr(RCX) = PKRS;
        assert_eq!(vector(&mut m), want);
    }
}

#[test]
fn cpuid_shows_them() {
    let m = Machine::new(&[]);
    assert_eq!(m.core.cpuid(7, 0)[2], 0);
    let mut m = Machine::changed(&[], ALL);
    let [_, ebx, ecx, _] = m.core.cpuid(7, 0);
    assert_eq!((ebx >> 20 & 1, ecx), (1, 1 << 31 | 1 << 22 | 1 << 3 | 1 << 2));
    m.core.cpu.cr4 |= CR4_PKE;
    assert_eq!(m.core.cpuid(7, 0)[2] >> 4 & 1, 1, "OSPKE");
    assert_eq!(Machine::changed(&[], &["-x2apic"]).core.cpuid(1, 0)[2] >> 21 & 1, 0);
}

#[test]
fn x2apic_can_be_taken_away() {
    // WRMSR IA32_APIC_BASE
    for (changes, want) in [(&[][..], None), (&["-x2apic"][..], Some(GP))] {
        let mut m = Machine::changed(&[0x0f, 0x30, 0xf4], changes);
        *m.gpr(RCX) = 0x1b;
        *m.gpr(RAX) = 0xfee0_0d00;
        *m.gpr(RDX) = 0;
        assert_eq!(vector(&mut m), want);
    }
}

/// A load (or store) of DATA through a page with key 5; the error code of the fault, or `None`.
fn with_key(write: bool, user_page: bool, user: bool, rights: u32, protect: bool) -> Option<u32> {
    let code: &[u8] = if write { &[0x48, 0x89, 0x07, 0xf4] } else { &[0x48, 0x8b, 0x07, 0xf4] };
    let mut m = Machine::changed(code, ALL);
    m.entry(PT + 8 * (DATA >> 12), DATA | P | W | if user_page { U } else { 0 } | 5 << 59);
    *m.gpr(RDI) = DATA;
    let c = &mut m.core;
    c.cpu.cr4 |= CR4_PKE | CR4_PKS;
    (c.cpu.pkru, c.cpu.pkrs) = if user_page { (rights << 10, 0) } else { (0, rights << 10) };
    if !protect {
        c.cpu.cr0 &= !(1 << 16);
    }
    if user {
        c.cpu.cpl = 3;
    }
    c.flush_tlb_all();
    c.refresh();
    let caught = if user { user_fault(&mut m) } else { m.run().map(|c| (c.vector, c.error, c.cr2)) };
    caught.map(|(vector, error, cr2)| {
        assert_eq!((vector, cr2), (PF, DATA));
        error
    })
}

/// In ring 3 the access is tried without running code: there is no way back from there in this machine.
fn user_fault(m: &mut Machine) -> Option<(u8, u32, u64)> {
    let write = m.bytes(CODE, 2)[1] == 0x89;
    let done = if write { m.core.store64(DATA, 1) } else { m.core.load64(DATA).map(|_| ()) };
    done.err()?;
    match m.core.fault.take() {
        Some(x86::core::Pending::Exception(e)) => Some((e.vector, e.error?, e.cr2)),
        other => panic!("{other:?}"),
    }
}

#[test]
fn protection_keys() {
    const NO_ACCESS: u32 = 1;
    const NO_WRITE: u32 = 2;
    let (present, write_bit, user_bit, key) = (1, 2, 4, 32);
    assert_eq!(with_key(false, true, false, 0, true), None);
    assert_eq!(with_key(false, true, false, NO_ACCESS, true), Some(present | key));
    assert_eq!(with_key(true, true, false, NO_ACCESS, false), Some(present | write_bit | key));
    assert_eq!(with_key(false, true, false, NO_WRITE, true), None);
    assert_eq!(with_key(true, true, false, NO_WRITE, true), Some(present | write_bit | key));
    assert_eq!(with_key(true, true, false, NO_WRITE, false), None, "CR0.WP is off");
    assert_eq!(with_key(true, true, true, NO_WRITE, false), Some(present | write_bit | user_bit | key));
    assert_eq!(with_key(false, true, true, NO_ACCESS, true), Some(present | user_bit | key));
    assert_eq!(with_key(false, false, false, NO_ACCESS, true), Some(present | key), "a supervisor's page");
    assert_eq!(with_key(true, false, false, NO_WRITE, true), Some(present | write_bit | key));
    assert_eq!(with_key(true, false, true, 0, true), Some(present | write_bit | user_bit), "not for its key");
}

#[test]
fn a_change_of_rights_is_seen_at_once() {
    // mov rax, [rdi]; wrpkru with EAX = rsi; mov rax, [rdi]; hlt
    let code = &[0x48, 0x8b, 0x07, 0x89, 0xf0, 0x31, 0xc9, 0x31, 0xd2, 0x0f, 0x01, 0xef, 0x48, 0x8b, 0x07, 0xf4];
    let mut m = Machine::changed(code, ALL);
    m.core.cpu.cr4 |= CR4_PKE;
    *m.gpr(RDI) = DATA;
    m.entry(PT + 8 * (DATA >> 12), DATA | P | W | U | 1 << 59);
    *m.gpr(x86::state::RSI) = 1 << 2;
    let caught = m.run().expect("a fault");
    assert_eq!((caught.vector, caught.error, caught.rip), (PF, 33, CODE + 12));
    *m.gpr(RDX) = 1;
    m.write(CODE, &[0x0f, 0x01, 0xef, 0xf4]);
    m.restart(CODE);
    assert_eq!(vector(&mut m), Some(GP), "EDX must be zero");
}

#[test]
fn umip() {
    // SGDT, SIDT, SLDT, STR (to memory at RDI), SMSW EAX
    let codes: [&[u8]; 5] =
        [&[0x0f, 0x01, 0x07], &[0x0f, 0x01, 0x0f], &[0x0f, 0x00, 0x07], &[0x0f, 0x00, 0x0f], &[0x0f, 0x01, 0xe0]];
    for code in codes {
        for (cpl, prevent) in [(0, true), (3, false), (3, true)] {
            let mut m = Machine::changed(code, ALL);
            *m.gpr(RDI) = DATA;
            let c = &mut m.core;
            c.cpu.cr4 |= if prevent { CR4_UMIP } else { 0 };
            c.cpu.cpl = cpl;
            c.cpu.seg[x86::state::CS].attr |= u32::from(cpl) << 5;
            c.cpu.seg[x86::state::SS] =
                Segment { base: 0, limit: u32::MAX, selector: 16 | u16::from(cpl), attr: 0xc093 | u32::from(cpl) << 5 };
            c.flush_tlb_all();
            c.refresh();
            let before = c.cpu.icount;
            c.cpu.flags &= !flags::IF;
            let _ = m.core.run(&mut m.cache, 1);
            let executed = m.core.cpu.icount > before && m.core.cpu.rip == CODE + code.len() as u64;
            assert_eq!(executed, !(cpl == 3 && prevent), "{code:x?} at {cpl}");
        }
    }
}

#[test]
fn keys_are_saved_where_they_are() {
    let mut m = Machine::changed(&[0xf4], ALL);
    (m.core.cpu.pkru, m.core.cpu.pkrs) = (0x5555_5554, 0x11);
    let state = m.core.save();
    assert_eq!((state.pkru, state.msrs["0x6e1"]), (0x5555_5554, 0x11));
    let mut again = Machine::changed(&[], ALL);
    again.core.restore(&state).unwrap();
    assert_eq!(again.core.save(), state);
    let error = Machine::new(&[]).core.restore(&state).unwrap_err();
    assert!(error.message.contains("pkru"), "{}", error.message);
    let plain = Machine::new(&[]).core.save();
    assert!(!plain.msrs.contains_key("0x6e1"));
    let error = Machine::changed(&[], &["+pks"]).core.restore(&plain).unwrap_err();
    assert!(error.message.contains("0x6e1"), "{}", error.message);
}

#[test]
fn hypercalls() {
    // VMCALL, and VMMCALL
    for code in [[0x0f, 0x01, 0xc1, 0xf4], [0x0f, 0x01, 0xd9, 0xf4]] {
        // Number, first APIC id, ICR → answer
        for (number, first, icr, want) in [
            (10, 0, 0x40, 1i64),
            (10, 0xffff_ffff, 0, 0),
            (10, u64::MAX, 0x40, 0),
            (10, 0, 0x440, 1),
            (10, 0, 0x540, -22),
            (10, 0, 0x0c_0040, -22),
            (9, 0, 0, -1000),
        ] {
            let mut m = Machine::new(&code);
            m.core.lapic.svr = 0x1ff;
            m.core.lapic.publish(&m.core.shared.apics.clone());
            *m.gpr(RAX) = number;
            *m.gpr(x86::state::RBX) = u64::MAX;
            *m.gpr(RCX) = 0;
            *m.gpr(RDX) = first;
            *m.gpr(x86::state::RSI) = icr;
            m.core.cpu.nmi_masked = true;
            let _ = m.core.run(&mut m.cache, 1);
            assert_eq!(*m.gpr(RAX) as i64, want, "{number} {first:#x} {icr:#x}");
            let _ = m.core.poll_events();
            assert_eq!(m.core.lapic.irr[2] & 1, u32::from(want == 1 && icr == 0x40));
            assert_eq!(m.core.cpu.nmi_pending, u8::from(icr == 0x440));
        }
    }
}

#[test]
fn far_jumps_with_a_64_bit_offset() {
    // REX.W JMP FAR [RDI]; at the target: HLT
    for (changes, high) in [(&["+far64"][..], true), (&["+far64"][..], false), (&[][..], false)] {
        let mut m = Machine::changed(&[0x48, 0xff, 0x2f], changes);
        let wide = !changes.is_empty();
        *m.gpr(RDI) = DATA;
        let target = 0x0060_0000 | if high { 1 << 32 } else { 0 };
        let offset: u64 = if wide { target } else { 0x0060_0000 | 8 << 32 };
        m.write(DATA, &offset.to_le_bytes());
        m.write(DATA + 8, &8u16.to_le_bytes());
        m.write(0x0060_0000, &[0xf4]);
        // The second GiB-sized entry of the page directory pointers: 4 GiB up is the same memory.
        let page_directory = m.read(flat::PDPT);
        m.entry(flat::PDPT + 8 * 4, page_directory);
        assert_eq!(m.run(), None);
        assert_eq!(m.core.cpu.rip, target + 1);
    }
}

/// Where the operand is does not depend on where in its block the jump stands.
#[test]
fn far_jumps_through_a_pointer_beside_the_code() {
    // NOP; NOP; REX.W JMP FAR [RIP + 0]
    let mut m = Machine::changed(&[0x90, 0x90, 0x48, 0xff, 0x2d, 0, 0, 0, 0], &["+far64"]);
    m.write(flat::CODE + 9, &0x0060_0000u64.to_le_bytes());
    m.write(flat::CODE + 17, &8u16.to_le_bytes());
    m.write(0x0060_0000, &[0xf4]);
    assert_eq!(m.run(), None);
    assert_eq!(m.core.cpu.rip, 0x0060_0001);
}

#[test]
fn a_key_shows_beside_other_reasons() {
    let mut m = Machine::changed(&[0x48, 0x89, 0x07, 0xf4], ALL);
    m.entry(PT + 8 * (DATA >> 12), DATA | P | U | 5 << 59);
    *m.gpr(RDI) = DATA;
    m.core.cpu.cr4 |= CR4_PKE;
    m.core.cpu.pkru = 1 << 10;
    m.core.flush_tlb_all();
    let caught = m.run().expect("a fault");
    assert_eq!((caught.vector, caught.error), (PF, 1 | 2 | 32), "read-only as well");
}
