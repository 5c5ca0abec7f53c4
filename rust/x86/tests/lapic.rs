//! Local APIC: registers in both modes, priorities, timers, messages between APICs.

mod common;

use common::{KHZ, Machine, machine};
use vcpu::IrqSink;
use x86::lapic::{APIC_BASE_BSP, APIC_BASE_EN, APIC_BASE_EXTD};
use x86::msr;
use x86::state::Activity;

const X2: u64 = 0xfee0_0000 | APIC_BASE_EN | APIC_BASE_EXTD;

fn rd(m: &mut Machine, n: usize, offset: u64) -> u32 {
    m.cores[n].lapic_read(offset, 4) as u32
}
fn wr(m: &mut Machine, n: usize, offset: u64, value: u32) {
    m.cores[n].lapic_write(offset, 4, value.into());
}
fn wrmsr(m: &mut Machine, n: usize, index: u32, value: u64) -> bool {
    let done = m.cores[n].write_msr(index, value).is_ok();
    m.cores[n].fault = None;
    done
}
fn x2apic(m: &mut Machine, n: usize) {
    let bsp = if n == 0 { APIC_BASE_BSP } else { 0 };
    assert!(wrmsr(m, n, msr::APIC_BASE, X2 | bsp));
    assert!(wrmsr(m, n, 0x80f, 0x1ff));
}
fn enabled(vcpus: usize) -> Machine {
    let mut m = machine(vcpus);
    for n in 0..vcpus {
        m.cores[n].cpu.activity = Activity::Running;
        wr(&mut m, n, 0xf0, 0x1ff);
    }
    m
}
/// Highest requested vector after the mail is in.
fn irr(m: &mut Machine, n: usize) -> Option<u8> {
    m.cores[n].take_mail();
    (0..=255u8).rev().find(|v| m.cores[n].lapic.irr[usize::from(v >> 5)] >> (v & 31) & 1 != 0)
}

#[test]
fn reset_values() {
    let mut m = machine(3);
    assert_eq!(rd(&mut m, 2, 0x20), 2 << 24);
    assert_eq!(rd(&mut m, 0, 0x30), 0x0005_0014);
    assert_eq!(rd(&mut m, 0, 0xe0), u32::MAX);
    assert_eq!(rd(&mut m, 0, 0xf0), 0xff);
    for lvt in [0x320, 0x330, 0x340, 0x350, 0x360, 0x370] {
        assert_eq!(rd(&mut m, 0, lvt), 0x1_0000);
    }
    assert_eq!(m.cores[0].lapic.base, 0xfee0_0900);
    assert_eq!(m.cores[1].lapic.base, 0xfee0_0800);
}

#[test]
fn unknown_registers_raise_an_error() {
    let mut m = enabled(1);
    assert_eq!(rd(&mut m, 0, 0x3c0), 0);
    assert_eq!(rd(&mut m, 0, 0x280), 0);
    wr(&mut m, 0, 0x280, 0);
    assert_eq!(rd(&mut m, 0, 0x280), 0x80);
    wr(&mut m, 0, 0x280, 0);
    assert_eq!(rd(&mut m, 0, 0x280), 0);
    // Odd widths and offsets never hurt.
    for offset in 0..0x1000 {
        for size in [1, 2, 4, 8] {
            m.cores[0].lapic_read(offset, size);
            if offset < 0x300 {
                m.cores[0].lapic_write(offset, size, u64::MAX);
            }
        }
    }
}

#[test]
fn software_disable_masks_lvt_and_refuses_fixed() {
    let mut m = enabled(1);
    wr(&mut m, 0, 0x350, 0x31);
    assert_eq!(rd(&mut m, 0, 0x350), 0x31);
    wr(&mut m, 0, 0xf0, 0xff);
    assert_eq!(rd(&mut m, 0, 0x350), 0x1_0031);
    wr(&mut m, 0, 0x350, 0x31);
    assert_eq!(rd(&mut m, 0, 0x350), 0x1_0031);
    m.shared.apics.msi(0xfee0_0000, 0x55);
    assert_eq!(irr(&mut m, 0), None);
}

#[test]
fn priorities() {
    let mut m = enabled(1);
    for v in [0x31, 0x45, 0x42] {
        m.shared.apics.msi(0xfee0_0000, v);
    }
    assert_eq!(irr(&mut m, 0), Some(0x45));
    let l = &mut m.cores[0].lapic;
    assert_eq!(l.acknowledge(), Some(0x45));
    assert_eq!(l.ppr(), 0x40);
    // Same class: waits.
    assert_eq!(l.deliverable(), None);
    wr(&mut m, 0, 0xb0, 0);
    assert_eq!(m.cores[0].lapic.acknowledge(), Some(0x42));
    wr(&mut m, 0, 0xb0, 0);
    wr(&mut m, 0, 0x80, 0x3f);
    assert_eq!(m.cores[0].lapic.deliverable(), None);
    assert_eq!(rd(&mut m, 0, 0xa0), 0x3f);
    m.cores[0].lapic.set_cr8(2);
    assert_eq!(rd(&mut m, 0, 0x80), 0x20);
    assert_eq!(m.cores[0].lapic.acknowledge(), Some(0x31));
}

#[test]
fn level_interrupts_tell_their_end() {
    let mut m = enabled(1);
    m.shared.apics.msi(0xfee0_0000, 0xc044);
    m.shared.apics.msi(0xfee0_0000, 0x4051);
    m.cores[0].take_mail();
    assert_eq!(m.cores[0].lapic.acknowledge(), Some(0x51));
    wr(&mut m, 0, 0xb0, 0);
    assert!(m.eois.0.lock().unwrap().is_empty());
    assert_eq!(m.cores[0].lapic.acknowledge(), Some(0x44));
    wr(&mut m, 0, 0xb0, 0);
    assert_eq!(*m.eois.0.lock().unwrap(), [0x44]);
    wr(&mut m, 0, 0xb0, 0);
    assert_eq!(m.eois.0.lock().unwrap().len(), 1);
}

#[test]
fn physical_logical_and_shorthand() {
    let mut m = enabled(4);
    let send = |m: &mut Machine, high: u32, low: u32| -> Vec<usize> {
        wr(m, 0, 0x310, high);
        wr(m, 0, 0x300, low);
        let got = (0..4).filter(|&n| irr(m, n).is_some()).collect();
        (0..4).for_each(|n| m.cores[n].lapic.irr = [0; 8]);
        got
    };
    assert_eq!(send(&mut m, 2 << 24, 0x40), [2]);
    assert_eq!(send(&mut m, 9 << 24, 0x40), [0usize; 0]);
    assert_eq!(send(&mut m, 0xff << 24, 0x40), [0, 1, 2, 3]);
    assert_eq!(send(&mut m, 0, 0x4_0040), [0]);
    assert_eq!(send(&mut m, 0, 0x8_0040), [0, 1, 2, 3]);
    assert_eq!(send(&mut m, 0, 0xc_0040), [1, 2, 3]);
    for n in 0..4 {
        wr(&mut m, n, 0xd0, 1 << (24 + n));
    }
    assert_eq!(send(&mut m, 0b1010 << 24, 0x840), [1, 3]);
    // Lowest priority: exactly one of them.
    assert_eq!(send(&mut m, 0b1110 << 24, 0x940).len(), 1);
    for n in 0..4 {
        wr(&mut m, n, 0xe0, 0x0fff_ffff);
        wr(&mut m, n, 0xd0, (0x10 << (n / 2) | 1 << (n & 1)) << 24);
    }
    assert_eq!(send(&mut m, 0x12 << 24, 0x840), [1]);
    assert_eq!(send(&mut m, 0x23 << 24, 0x840), [2, 3]);
    // A vector below 16 cannot be sent.
    assert_eq!(send(&mut m, 2 << 24, 0x0f), [0usize; 0]);
    wr(&mut m, 0, 0x280, 0);
    assert_eq!(rd(&mut m, 0, 0x280), 0x20);
}

#[test]
fn init_sipi_starts_an_ap() {
    let mut m = machine(2);
    assert_eq!(m.cores[1].cpu.activity, Activity::WaitSipi);
    m.cores[1].cpu.activity = Activity::Running;
    wr(&mut m, 0, 0x310, 1 << 24);
    // A SIPI without INIT is ignored.
    wr(&mut m, 0, 0x300, 0x4699);
    m.cores[1].take_mail();
    assert_eq!(m.cores[1].cpu.rip, 0xfff0);
    wr(&mut m, 0, 0x300, 0xc500);
    wr(&mut m, 0, 0x300, 0x8500);
    wr(&mut m, 0, 0x300, 0x4699);
    wr(&mut m, 0, 0x300, 0x4699);
    m.cores[1].take_mail();
    let c = &m.cores[1].cpu;
    assert_eq!((c.activity, c.rip, c.seg[1].base, c.seg[1].selector), (Activity::Running, 0, 0x99000, 0x9900));
    assert!(!c.protected());
    // INIT alone puts it back.
    wr(&mut m, 0, 0x300, 0x4500);
    m.cores[1].take_mail();
    assert_eq!(m.cores[1].cpu.activity, Activity::WaitSipi);
}

#[test]
fn nmis_are_remembered_two_deep() {
    let mut m = enabled(1);
    for _ in 0..5 {
        m.shared.apics.msi(0xfee0_0000, 0x400);
    }
    m.cores[0].take_mail();
    assert_eq!(m.cores[0].cpu.nmi_pending, 2);
}

#[test]
fn x2apic_registers_and_refusals() {
    let mut m = enabled(3);
    // Not in x2APIC mode: every MSR of it is #GP.
    assert!(m.cores[2].read_msr(0x802).is_none());
    assert!(!wrmsr(&mut m, 2, 0x80b, 0));
    x2apic(&mut m, 2);
    assert_eq!(m.cores[2].read_msr(0x802), Some(2));
    assert_eq!(m.cores[2].read_msr(0x80d), Some(4));
    assert_eq!(m.cores[2].lapic_page, u64::MAX);
    for write_only in [0x80b, 0x83f] {
        assert!(m.cores[2].read_msr(write_only).is_none());
    }
    for absent in [0x800, 0x809, 0x80c, 0x80e, 0x82f, 0x831, 0x840, 0x8ff] {
        assert!(m.cores[2].read_msr(absent).is_none(), "{absent:#x}");
        assert!(!wrmsr(&mut m, 2, absent, 0), "{absent:#x}");
    }
    for read_only in [0x802, 0x803, 0x80a, 0x80d, 0x810, 0x818, 0x820, 0x839] {
        assert!(!wrmsr(&mut m, 2, read_only, 0), "{read_only:#x}");
        assert!(m.cores[2].read_msr(read_only).is_some());
    }
    assert!(!wrmsr(&mut m, 2, 0x80b, 1));
    assert!(!wrmsr(&mut m, 2, 0x828, 1));
    assert!(!wrmsr(&mut m, 2, 0x808, 0x100));
    assert!(!wrmsr(&mut m, 2, 0x808, 1 << 32));
    assert!(wrmsr(&mut m, 2, 0x808, 0x20));
    // Self IPI and a wide destination.
    assert!(wrmsr(&mut m, 2, 0x83f, 0x61));
    assert_eq!(irr(&mut m, 2), Some(0x61));
    x2apic(&mut m, 0);
    assert!(wrmsr(&mut m, 0, 0x830, 2 << 32 | 0x70));
    assert_eq!(irr(&mut m, 2), Some(0x70));
    assert!(wrmsr(&mut m, 0, 0x830, u64::from(u32::MAX) << 32 | 0x71));
    assert_eq!((irr(&mut m, 0), irr(&mut m, 1), irr(&mut m, 2)), (Some(0x71), Some(0x71), Some(0x71)));
    // Logical: cluster 0, members 0 and 2.
    assert!(wrmsr(&mut m, 0, 0x830, 4 << 32 | 0x872));
    assert_eq!(irr(&mut m, 2), Some(0x72));
    assert_eq!(irr(&mut m, 0), Some(0x71));
    assert_eq!(m.cores[0].read_msr(0x830), Some(4 << 32 | 0x872));
}

#[test]
fn apic_base_transitions() {
    let mut m = enabled(1);
    let base = 0xfee0_0000 | APIC_BASE_BSP;
    // Reserved bits, and EXTD without EN.
    assert!(!wrmsr(&mut m, 0, msr::APIC_BASE, base | APIC_BASE_EN | 1));
    assert!(!wrmsr(&mut m, 0, msr::APIC_BASE, base | APIC_BASE_EN | 1 << 46));
    assert!(!wrmsr(&mut m, 0, msr::APIC_BASE, base | APIC_BASE_EXTD));
    x2apic(&mut m, 0);
    assert!(!wrmsr(&mut m, 0, msr::APIC_BASE, base | APIC_BASE_EN));
    assert!(wrmsr(&mut m, 0, msr::APIC_BASE, base));
    assert_eq!(m.cores[0].cpuid(1, 0)[3] >> 9 & 1, 0);
    assert!(!wrmsr(&mut m, 0, msr::APIC_BASE, X2 | APIC_BASE_BSP));
    m.shared.apics.msi(0xfee0_0000, 0x55);
    assert_eq!(irr(&mut m, 0), None);
    assert!(wrmsr(&mut m, 0, msr::APIC_BASE, 0xfed4_0000 | APIC_BASE_BSP | APIC_BASE_EN));
    assert_eq!(m.cores[0].lapic_page, 0xfed4_0000);
    assert_eq!(rd(&mut m, 0, 0xf0), 0xff);
}

#[test]
fn timer_counts_and_fires() {
    let mut m = enabled(1);
    let now = m.shared.clock.tsc();
    wr(&mut m, 0, 0x3e0, 0xb);
    wr(&mut m, 0, 0x320, 0x50);
    wr(&mut m, 0, 0x380, 1000);
    assert_eq!(rd(&mut m, 0, 0x390), 1000);
    // 1000 ns at 2 GHz.
    let l = &mut m.cores[0].lapic;
    assert_eq!(l.timer_left(now, 0), Some(2000));
    l.poll_timer(now + 1999, 0, KHZ);
    assert_eq!(l.deliverable(), None);
    l.poll_timer(now + 2000, 0, KHZ);
    assert_eq!(l.acknowledge(), Some(0x50));
    assert_eq!(l.timer_left(now + 2000, 0), None);
    l.eoi(&m.shared.apics.clone());
    // Periodic, divided by 16; late polls skip what was missed.
    wr(&mut m, 0, 0x3e0, 3);
    wr(&mut m, 0, 0x320, 0x2_0051);
    wr(&mut m, 0, 0x380, 100);
    let l = &mut m.cores[0].lapic;
    assert_eq!(l.timer_left(now, 0), Some(3200));
    l.poll_timer(now + 3200 * 5 + 7, 0, KHZ);
    assert_eq!(l.acknowledge(), Some(0x51));
    assert_eq!(l.timer_left(now + 3200 * 5 + 7, 0), Some(3193));
    wr(&mut m, 0, 0x380, 0);
    assert_eq!(m.cores[0].lapic.timer_left(now, 0), None);
}

#[test]
fn tsc_deadline() {
    let mut m = enabled(1);
    let now = m.shared.clock.tsc();
    // Ignored in any other mode.
    assert!(wrmsr(&mut m, 0, msr::TSC_DEADLINE, now + 5));
    assert_eq!(m.cores[0].read_msr(msr::TSC_DEADLINE), Some(0));
    wr(&mut m, 0, 0x320, 0x4_0052);
    assert!(wrmsr(&mut m, 0, msr::TSC_DEADLINE, now + 500));
    assert_eq!(m.cores[0].lapic.timer_left(now, 0), Some(500));
    assert_eq!(rd(&mut m, 0, 0x390), 0);
    m.cores[0].lapic.poll_timer(now + 500, 0, KHZ);
    assert_eq!(m.cores[0].lapic.acknowledge(), Some(0x52));
    assert_eq!(m.cores[0].read_msr(msr::TSC_DEADLINE), Some(0));
    m.cores[0].lapic.eoi(&m.shared.apics.clone());
    // In the past: at once. Far away: never, and no busy waiting.
    assert!(wrmsr(&mut m, 0, msr::TSC_DEADLINE, 1));
    assert_eq!(m.cores[0].lapic.acknowledge(), Some(0x52));
    assert!(wrmsr(&mut m, 0, msr::TSC_DEADLINE, u64::MAX));
    assert_eq!(m.cores[0].lapic.timer_left(now, 0), Some(u64::MAX - now));
    // TSC_ADJUST moves the guest's counter, not the deadline.
    assert!(wrmsr(&mut m, 0, msr::TSC_DEADLINE, now + 500));
    assert!(wrmsr(&mut m, 0, msr::TSC_ADJUST, 400));
    assert_eq!(m.cores[0].lapic.timer_left(now, 400), Some(100));
    // Leaving the mode disarms.
    wr(&mut m, 0, 0x320, 0x52);
    assert_eq!(m.cores[0].lapic.timer_left(now, 0), None);
}

/// A machine may be saved between the moment a timer is due and the vCPU's next turn.
#[test]
fn a_timer_that_is_due_when_it_is_saved_fires_in_the_next_life() {
    for lvt in [0x50, 0x2_0050] {
        let mut m = enabled(1);
        wr(&mut m, 0, 0x320, lvt);
        wr(&mut m, 0, 0x380, 1000);
        m.cores[0].lapic.timer_expiry = m.shared.clock.tsc();
        let state = m.cores[0].save();
        assert_eq!(state.lapic.timer_current, 1);
        let mut m = enabled(1);
        m.cores[0].restore(&state).unwrap();
        let later = m.shared.clock.tsc() + 1000;
        m.cores[0].lapic.poll_timer(later, 0, KHZ);
        assert_eq!(m.cores[0].lapic.acknowledge(), Some(0x50));
    }
}
