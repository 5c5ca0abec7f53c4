//! Address translation: rights, page sizes, accessed and dirty bits, what the TLB may keep.
#![allow(clippy::precedence)]

mod flat;

use flat::{A, CODE, DATA, G, Machine, NX, P, PD, PDPT, PML4, PS, PT, U, W};
use x86::state::{CodeSize, RAX, RDI, RDX};

const READ: &[u8] = &[0x48, 0x8b, 0x07, 0xf4]; // mov rax, [rdi]; hlt
const WRITE: &[u8] = &[0x48, 0x89, 0x07, 0xf4]; // mov [rdi], rax; hlt

fn slot(linear: u64) -> u64 {
    PT + 8 * (linear >> 12)
}

fn fault(m: &mut Machine) -> (u8, u32, u64) {
    let c = m.run().expect("a fault");
    assert_eq!(c.rip, CODE);
    (c.vector, c.error, c.cr2)
}

#[test]
fn absent_pages() {
    for (code, error) in [(READ, 0), (WRITE, 2)] {
        let mut m = Machine::new(code);
        *m.gpr(RDI) = DATA + 8;
        m.entry(slot(DATA), 0);
        assert_eq!(fault(&mut m), (14, error, DATA + 8));
    }
}

#[test]
fn accessed_and_dirty_bits() {
    let mut m = Machine::new(READ);
    *m.gpr(RDI) = DATA;
    assert_eq!(m.run(), None);
    assert_eq!(m.read(slot(DATA)) & 0x60, 0x20, "a read sets A only");
    for at in [PML4, PDPT, PD] {
        assert_eq!(m.read(at) & 0x60, A, "no D in upper levels");
    }
    m.write(CODE, WRITE);
    m.restart(CODE);
    assert_eq!(m.run(), None);
    assert_eq!(m.read(slot(DATA)) & 0x60, 0x60, "a write after a read sets D");
}

#[test]
fn a_fault_sets_no_dirty_bit() {
    let mut m = Machine::new(WRITE);
    *m.gpr(RDI) = DATA;
    m.entry(slot(DATA), DATA | P);
    assert_eq!(fault(&mut m), (14, 3, DATA));
    assert_eq!(m.read(slot(DATA)) & 0x40, 0);
}

#[test]
fn write_protection_of_the_supervisor() {
    let mut m = Machine::new(WRITE);
    *m.gpr(RDI) = DATA;
    m.entry(slot(DATA), DATA | P | U);
    assert_eq!(fault(&mut m), (14, 3, DATA));
    let mut m = Machine::new(WRITE);
    *m.gpr(RDI) = DATA;
    m.entry(slot(DATA), DATA | P | U);
    m.core.cpu.cr0 &= !(1 << 16);
    assert_eq!(m.run(), None, "without CR0.WP");
}

#[test]
fn no_execute() {
    let mut m = Machine::new(&[0xff, 0xe7]); // jmp rdi
    *m.gpr(RDI) = DATA;
    m.write(DATA, &[0xf4]);
    m.entry(slot(DATA), DATA | P | W | NX);
    let c = m.run().unwrap();
    assert_eq!((c.vector, c.error, c.cr2, c.rip), (14, 0x11, DATA, DATA));
    let mut m = Machine::new(READ);
    *m.gpr(RDI) = DATA;
    m.entry(slot(DATA), DATA | P | W | NX);
    m.core.cpu.efer &= !(1 << 11);
    assert_eq!(fault(&mut m), (14, 9, DATA), "NX is reserved without EFER.NXE");
}

#[test]
fn reserved_bits() {
    let mut m = Machine::new(READ);
    *m.gpr(RDI) = DATA;
    m.entry(slot(DATA), DATA | P | 1 << 45);
    assert_eq!(fault(&mut m), (14, 9, DATA), "beyond the physical address width");
    let mut m = Machine::new(READ);
    *m.gpr(RDI) = 0x20_0000;
    m.entry(PD + 8, 0x20_2000 | P | PS);
    assert_eq!(fault(&mut m), (14, 9, 0x20_0000), "address bits inside a large page");
}

#[test]
fn large_pages() {
    let mut m = Machine::new(READ);
    m.write(0x65_4321, &0x1122_3344_5566_7788u64.to_le_bytes());
    *m.gpr(RDI) = 0x65_4321;
    assert_eq!(m.run(), None);
    assert_eq!(*m.gpr(RAX), 0x1122_3344_5566_7788);
    // 1 GiB
    let mut m = Machine::new(READ);
    m.entry(PDPT + 8, P | W | PS);
    m.write(0x65_4321, &[9]);
    *m.gpr(RDI) = 0x4065_4321;
    assert_eq!(m.run(), None);
    assert_eq!(*m.gpr(RAX), 9);
}

#[test]
fn noncanonical_addresses() {
    let mut m = Machine::new(READ);
    *m.gpr(RDI) = 0x8000_0000_0000_0000;
    assert_eq!(fault(&mut m), (13, 0, 0));
    let mut m = Machine::new(&[0x48, 0x8b, 0x45, 0]); // mov rax, [rbp]
    *m.gpr(x86::state::RBP) = 0x8000_0000_0000;
    assert_eq!(fault(&mut m), (12, 0, 0), "stack references give #SS");
    let mut m = Machine::new(&[0xff, 0xe7]);
    *m.gpr(RDI) = 0x8000_0000_0000;
    assert_eq!(fault(&mut m), (13, 0, 0), "a jump faults at the jump");
}

#[test]
fn a_store_across_pages_is_all_or_nothing() {
    let mut m = Machine::new(WRITE);
    *m.gpr(RDI) = DATA + 0xffc;
    *m.gpr(RAX) = u64::MAX;
    m.entry(slot(DATA + 0x1000), 0);
    assert_eq!(fault(&mut m), (14, 2, DATA + 0x1000));
    assert_eq!(m.read(DATA + 0xff8), 0);
    m.entry(slot(DATA + 0x1000), DATA + 0x4000 | P | W);
    m.core.cpu.gpr[x86::state::RSP] = flat::STACK;
    m.restart(CODE);
    assert_eq!(m.run(), None);
    assert_eq!((m.read(DATA + 0xff8), m.read(DATA + 0x4000)), (0xffff_ffff_0000_0000, 0xffff_ffff));
}

/// INVLPG of any address in a large page is one of the whole page (SDM vol. 3, 4.10.4.1).
#[test]
fn invalidating_a_large_page() {
    // mov rax, [rdi]; mov rbx, [rsi]; invlpg [rdi]; mov rdx, [rsi]; hlt
    const PROGRAM: &[u8] = &[0x48, 0x8b, 0x07, 0x48, 0x8b, 0x1e, 0x0f, 1, 0x3f, 0x48, 0x8b, 0x16, 0xf4];
    for (entry, address) in [(PD + 8, 0x20_0000), (PDPT + 8, 0x4000_0000)] {
        for bits in [0, G] {
            let mut m = Machine::new(PROGRAM);
            m.entry(entry, if entry == PDPT + 8 { 0 } else { 0x20_0000 } | P | W | PS | bits);
            let second = if entry == PDPT + 8 { 0x40_0000 } else { 0x1000 };
            let before = if entry == PDPT + 8 { second } else { 0x20_0000 + second };
            m.write(before, &[1]);
            m.write(0x60_1000, &[2]);
            *m.gpr(RDI) = address;
            *m.gpr(x86::state::RSI) = address + second;
            m.steps(2);
            assert_eq!(*m.gpr(x86::state::RBX), 1);
            if entry == PDPT + 8 {
                m.entry(entry, 0);
                let fault = m.run().expect("nothing is mapped any more");
                assert_eq!((fault.vector, fault.cr2), (14, address + second));
            } else {
                m.entry(entry, 0x60_0000 | P | W | PS | bits);
                assert_eq!(m.run(), None);
                assert_eq!(*m.gpr(RDX), 2);
            }
        }
    }
}

/// The same for code: what was executed somewhere in the page is looked up again.
#[test]
fn invalidating_a_large_page_of_code() {
    // call rsi; invlpg [rdi]; call rsi; hlt
    let mut m = Machine::new(&[0xff, 0xd6, 0x0f, 1, 0x3f, 0xff, 0xd6, 0xf4]);
    m.entry(PD + 8, 0x20_0000 | P | W | PS);
    m.write(0x20_1000, &[0xb8, 1, 0, 0, 0, 0xc3]); // mov eax, 1; ret
    m.write(0x60_1000, &[0xb8, 2, 0, 0, 0, 0xc3]);
    *m.gpr(RDI) = 0x20_0000;
    *m.gpr(x86::state::RSI) = 0x20_1000;
    m.steps(3);
    assert_eq!(*m.gpr(RAX), 1);
    m.entry(PD + 8, 0x60_0000 | P | W | PS);
    assert_eq!(m.run(), None);
    assert_eq!(*m.gpr(RAX), 2);
}

#[test]
fn stale_until_invalidated() {
    // mov rax, [rdi]; mov rbx, [rdi]; invlpg [rdi]; mov rdx, [rdi]; hlt
    let mut m = Machine::new(&[0x48, 0x8b, 0x07, 0x48, 0x8b, 0x1f, 0x0f, 1, 0x3f, 0x48, 0x8b, 0x17, 0xf4]);
    *m.gpr(RDI) = DATA;
    m.write(DATA, &[1]);
    m.write(DATA + 0x4000, &[2]);
    m.steps(1);
    m.entry(slot(DATA), DATA + 0x4000 | P | W);
    assert_eq!(m.run(), None);
    assert_eq!(m.core.cpu.gpr[2], 2);
}

#[test]
fn cr3_keeps_global_pages_only() {
    let mut m = Machine::new(READ);
    m.core.cpu.cr4 |= 1 << 7;
    m.core.flush_tlb_all();
    m.write(DATA, &[1]);
    m.write(DATA + 0x4000, &[2]);
    for (global, want) in [(G, 1), (0, 2)] {
        m.entry(slot(DATA), DATA | P | W | global);
        m.core.flush_tlb_all();
        *m.gpr(RDI) = DATA;
        m.restart(CODE);
        assert_eq!(m.run(), None);
        m.entry(slot(DATA), DATA + 0x4000 | P | W | global);
        m.core.flush_tlb();
        m.restart(CODE);
        assert_eq!(m.run(), None);
        assert_eq!(*m.gpr(RAX), want, "global {global:#x}");
    }
}

#[test]
fn user_rights_and_smep() {
    let mut m = Machine::new(READ);
    *m.gpr(RDI) = DATA;
    m.entry(slot(DATA), DATA | P | W);
    // Rights are asked with CPL 3; the fault's frame needs a TSS that is not here, so the access is probed alone.
    m.core.cpu.cpl = 3;
    m.core.refresh();
    assert!(m.core.load8(DATA).is_err());
    match m.core.fault.take() {
        Some(x86::core::Pending::Exception(e)) => assert_eq!((e.vector, e.error, e.cr2), (14, Some(5), DATA)),
        other => panic!("{other:?}"),
    }
    assert!(m.core.load8(DATA + 0x1000).is_ok());
    assert!(m.core.read_system::<u8>(DATA).is_ok(), "system accesses have supervisor rights");
    m.core.cpu.cpl = 0;
    m.core.cpu.cr4 |= 1 << 20;
    m.entry(slot(0x8000), 0x8000 | P | W);
    m.core.refresh();
    m.core.flush_tlb_all();
    let c = m.run().unwrap();
    assert_eq!((c.vector, c.error & 0x11), (14, 0x11), "SMEP: supervisor code on a user page");
}

#[test]
fn smap() {
    let mut m = Machine::new(READ);
    m.core.cpu.cr4 |= 1 << 21;
    assert!(m.core.load8(DATA).is_err());
    m.core.cpu.flags |= x86::state::flags::AC;
    assert!(m.core.load8(DATA).is_ok());
    m.core.cpu.flags &= !x86::state::flags::AC;
    assert!(m.core.load8(DATA).is_err(), "nothing was kept");
}

/// 32-bit code without long mode.
fn protected(m: &mut Machine) {
    m.core.cpu.efer = 0;
    m.core.cpu.code_size = CodeSize::Bits32;
    m.core.cpu.seg[x86::state::CS].attr = 0xc09b;
    m.core.flush_tlb_all();
    m.core.refresh();
}

#[test]
fn two_levels_of_32_bits() {
    let mut m = Machine::new(&[0x8b, 7, 0x89, 0x47, 4, 0xf4]); // mov eax, [edi]; mov [edi+4], eax; hlt
    protected(&mut m);
    let (dir, table) = (0x10_0000u64, 0x10_1000u64);
    m.core.cpu.cr3 = dir;
    m.core.cpu.cr4 = 0x10;
    for n in 0..1024u64 {
        m.write(table + 4 * n, &((n << 12 | P | W) as u32).to_le_bytes());
    }
    m.write(dir, &((table | P | W) as u32).to_le_bytes());
    m.write(dir + 4 * 768, &((P | W | PS) as u32).to_le_bytes());
    m.write(DATA, &[0x42]);
    *m.gpr(RDI) = 0xc000_0000 + DATA;
    assert_eq!(m.run(), None);
    assert_eq!(m.read(DATA), 0x42_0000_0042);
    assert_eq!(m.read(dir + 4 * 768) & 0x60, 0x60);
}

#[test]
fn three_levels_of_pae() {
    let mut m = Machine::new(&[0x8b, 7, 0xf4]);
    protected(&mut m);
    let pdpt = 0x10_0020u64;
    m.core.cpu.cr3 = pdpt;
    m.core.cpu.cr4 = 0x20;
    m.entry(pdpt, 0x10_1000 | P);
    m.entry(pdpt + 24, 0x10_1000 | P);
    m.entry(0x10_1000, P | W | PS);
    m.write(DATA, &[0x42]);
    *m.gpr(RDI) = 0xc000_0000 + DATA;
    assert_eq!(m.run(), None);
    assert_eq!(*m.gpr(RAX), 0x42);
}

#[test]
fn no_paging() {
    let mut m = Machine::new(&[0x8b, 7, 0xf4]);
    protected(&mut m);
    m.core.cpu.cr0 &= !(1 << 31);
    m.core.flush_tlb_all();
    m.write(0xe0_0000, &[0x42]);
    *m.gpr(RDI) = 0xe0_0000;
    assert_eq!(m.run(), None);
    assert_eq!(*m.gpr(RAX), 0x42);
}

/// What an access of `len` bytes at `offset` of DS runs into.
fn through_ds(m: &mut Machine, offset: u64, len: u64, write: bool) -> Option<u8> {
    let at = m.core.segmented(x86::state::DS, offset, len, write);
    let result = if write { m.core.store8(at, 0) } else { m.core.load8(at).map(|_| ()) };
    match (result, m.core.fault.take()) {
        (Ok(()), _) => None,
        (Err(_), Some(x86::core::Pending::Exception(e))) => Some(e.vector),
        (_, other) => panic!("{other:?}"),
    }
}

#[test]
fn segments_outside_64_bit_code() {
    let mut m = Machine::new(&[]);
    protected(&mut m);
    m.core.cpu.cr0 &= !(1 << 31);
    m.core.flush_tlb_all();
    let ds = x86::state::DS;
    m.core.cpu.seg[ds].limit = 0xfff;
    assert_eq!(through_ds(&mut m, 0xfff, 1, false), None);
    assert_eq!(through_ds(&mut m, 0xfff, 2, false), Some(13));
    assert_eq!(through_ds(&mut m, 0x1000, 1, true), Some(13));
    // Expand-down: only above the limit.
    m.core.cpu.seg[ds].attr = 0xc097;
    assert_eq!(through_ds(&mut m, 0xfff, 1, false), Some(13));
    assert_eq!(through_ds(&mut m, 0x1000, 1, true), None);
    // Read-only data, execute-only code, and no segment at all.
    m.core.cpu.seg[ds].limit = u32::MAX;
    for (attr, read, write) in [(0xc091, None, Some(13)), (0xc099, Some(13), Some(13)), (0x1_0000, Some(13), Some(13))] {
        m.core.cpu.seg[ds].attr = attr;
        assert_eq!((through_ds(&mut m, 0, 1, false), through_ds(&mut m, 0, 1, true)), (read, write), "{attr:#x}");
    }
}
