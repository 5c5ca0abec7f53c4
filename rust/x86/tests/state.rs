//! Saving and restoring a vCPU: nothing is lost, nothing wrong is taken over.

mod common;

use common::*;
use vcpu::{IrqSink, VcpuState};
use x86::core::Core;
use x86::state::{Activity, F80, FS, GS, flags};

/// xorshift64*: the same cases on each run.
struct Random(u64);
impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
    fn canonical(&mut self) -> u64 {
        ((self.next() << 16) as i64 >> 16) as u64
    }
}

/// Puts a vCPU into a random state that a guest could have brought it to.
fn scramble(core: &mut Core, r: &mut Random) {
    let c = &mut core.cpu;
    for n in 0..16 {
        c.gpr[n] = r.next();
        c.xmm[n] = u128::from(r.next()) << 64 | u128::from(r.next());
    }
    for n in 0..8 {
        c.fpu.st[n] = F80 { mantissa: r.next(), sign_exp: r.next() as u16 };
    }
    c.rip = r.canonical();
    c.set_rflags(r.next() & 0x0025_7fd7 & !flags::VM | flags::FIXED);
    c.cr2 = r.next();
    c.mxcsr = r.next() as u32 & 0xffff;
    (c.fpu.fcw, c.fpu.fsw, c.fpu.ftw) = (r.next() as u16 & 0x1f7f, r.next() as u16, r.next() as u8);
    (c.fpu.fop, c.fpu.fip, c.fpu.fdp) = (r.next() as u16 & 0x7ff, r.next(), r.next());
    for n in 0..4 {
        c.dr[n] = r.next();
    }
    c.dr[6] = r.next() & 0xe00f | 0xffff_0ff0;
    c.dr[7] = r.next() & 0xffff_23ff | 0x400;
    c.shadow = r.next() as u8 & 3;
    c.nmi_pending = (r.next() % 3) as u8;
    c.nmi_masked = r.next() & 1 != 0;
    c.activity = if r.next() & 3 == 0 { Activity::Halted } else { Activity::Running };
    for seg in [FS, GS] {
        c.seg[seg].base = r.canonical();
    }
    let m = &mut c.msr;
    (m.star, m.lstar, m.cstar, m.fmask) = (r.next(), r.canonical(), r.canonical(), r.next() >> 32);
    (m.kernel_gs_base, m.sysenter_esp, m.sysenter_eip) = (r.canonical(), r.canonical(), r.canonical());
    (m.sysenter_cs, m.tsc_aux, m.misc_enable) = (r.next(), r.next() >> 32, r.next());
    core.tsc_adjust = r.next();
    core.hwcr = r.next() & 0x40;
    core.kvmclock.system_time = r.next();
    core.kvmclock.wall_clock = r.next();
    if r.next() & 1 == 0 {
        let bsp = core.lapic.base & 0x100;
        core.write_msr(x86::msr::APIC_BASE, 0xfee0_0c00 | bsp).unwrap();
    }
    let l = &mut core.lapic;
    l.svr = 0xff | (r.next() as u32 & 0x100);
    for words in [&mut l.isr, &mut l.tmr, &mut l.irr] {
        words.iter_mut().for_each(|w| *w = r.next() as u32);
        words[0] &= !0xffff;
    }
    l.tpr = r.next() as u32 & 0xff;
    l.esr = r.next() as u32 & 0xff;
    l.icr = r.next() & if l.x2apic() { 0xffff_ffff_000c_cfff } else { 0xff00_0000_000c_cfff };
    l.timer_divide = r.next() as u32 & 0xb;
    l.lvt[0] = r.next() as u32 & 0x1_00ff | ((r.next() % 3) as u32) << 17;
    if l.lvt[0] >> 17 & 3 == 2 {
        l.tsc_deadline = r.next();
    } else {
        l.timer_initial = r.next() as u32;
        let current = (r.next() % (u64::from(l.timer_initial) + 1)) as u32;
        l.set_timer_current(current, &core.shared.clock);
    }
    l.update();
    core.refresh();
}

fn states(count: u64) -> Vec<(u64, VcpuState)> {
    (0..count)
        .map(|seed| {
            let mut r = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) + 1);
            let mut m = machine(2);
            match r.next() % 5 {
                0 => {}
                1 => m.protected(1, 0),
                2 => m.protected(1, 3),
                3 => m.long_mode(1, 0),
                _ => m.long_mode(1, 3),
            }
            let wide = m.cores[1].cpu.long_mode();
            scramble(&mut m.cores[1], &mut r);
            if !wide {
                m.cores[1].cpu.rip &= 0xffff_ffff;
            }
            (seed, m.cores[1].save())
        })
        .collect()
}

#[test]
fn random_states_survive() {
    for (seed, state) in states(500) {
        let mut other = machine(2);
        // The target has been used before.
        other.long_mode(1, 3);
        scramble(&mut other.cores[1], &mut Random(seed + 77));
        if let Err(e) = other.cores[1].restore(&state) {
            panic!("seed {seed}: {e}");
        }
        assert_eq!(other.cores[1].save(), state, "seed {seed}");
    }
}

#[test]
fn posted_events_are_saved() {
    let mut m = machine(2);
    m.long_mode(1, 0);
    m.cores[1].lapic_write(0xf0, 4, 0x1ff);
    m.shared.apics.msi(0xfee0_1000, 0x66);
    m.shared.apics.msi(0xfee0_1000, 0x400);
    let state = m.cores[1].save();
    assert_eq!((state.lapic.irr[3], state.events.nmi_pending), (1 << 6, 1));
}

fn apic_base(s: &mut VcpuState, value: u64) {
    s.sregs.apic_base = value;
    s.msrs.insert("0x1b".into(), value);
}

fn refused(state: &VcpuState, change: impl FnOnce(&mut VcpuState)) -> String {
    let mut changed = state.clone();
    change(&mut changed);
    let mut m = machine(2);
    let before = m.cores[1].save();
    let error = m.cores[1].restore(&changed).expect_err("must be refused");
    assert_eq!(error.code, "state");
    assert_eq!(m.cores[1].save(), before, "a refused state changes nothing");
    error.message
}

#[test]
fn wrong_fields_are_refused_by_name() {
    type Change = Box<dyn FnOnce(&mut VcpuState)>;
    let mut m = machine(2);
    m.long_mode(1, 3);
    let good = m.cores[1].save();
    let cases: Vec<(&str, Change)> = vec![
        ("sregs.cr0", Box::new(|s| s.sregs.cr0 |= 1 << 40)),
        ("sregs.cr0", Box::new(|s| s.sregs.cr0 &= !1)),
        ("sregs.cr0", Box::new(|s| s.sregs.cr0 |= 1 << 29)),
        ("sregs.cr3", Box::new(|s| s.sregs.cr3 |= 1 << 50)),
        ("sregs.cr4", Box::new(|s| s.sregs.cr4 |= 1 << 17)),
        ("sregs.cr4", Box::new(|s| s.sregs.cr4 &= !0x20)),
        ("sregs.efer", Box::new(|s| s.sregs.efer |= 1 << 12)),
        ("sregs.efer", Box::new(|s| s.sregs.efer &= !0x400)),
        ("sregs.cr8", Box::new(|s| s.sregs.cr8 = 3)),
        ("sregs.apic_base", Box::new(|s| apic_base(s, 0xfee0_0801))),
        ("sregs.apic_base", Box::new(|s| apic_base(s, 0xfee0_0400))),
        ("sregs.fs.base", Box::new(|s| s.sregs.fs.base = 1 << 47)),
        ("sregs.ss.base", Box::new(|s| s.sregs.ss.base = 1 << 32)),
        ("sregs.gdt.base", Box::new(|s| s.sregs.gdt.base = 1 << 60)),
        ("sregs.cs.dpl", Box::new(|s| s.sregs.cs.dpl = 0)),
        ("sregs.cs", Box::new(|s| s.sregs.cs.type_ = 3)),
        ("sregs.cs.l", Box::new(|s| s.sregs.cs.db = 1)),
        ("sregs.ds.type_", Box::new(|s| s.sregs.ds.type_ = 16)),
        ("sregs.ds.limit", Box::new(|s| s.sregs.ds.limit = 0x12_3456)),
        ("sregs.tr.base", Box::new(|s| s.sregs.tr.base = 1 << 50)),
        ("regs.rflags", Box::new(|s| s.regs.rflags = 0)),
        ("regs.rflags", Box::new(|s| s.regs.rflags |= 1 << 30)),
        ("regs.rflags", Box::new(|s| s.regs.rflags |= flags::VM)),
        ("fpu.fpr[3]", Box::new(|s| s.fpu.fpr[3] = "12".into())),
        ("fpu.xmm[15]", Box::new(|s| s.fpu.xmm[15] = "g".repeat(32))),
        ("fpu.mxcsr", Box::new(|s| s.fpu.mxcsr = 1 << 16)),
        ("debug_regs.dr7", Box::new(|s| s.debug_regs.dr7 = 0)),
        ("xcr0", Box::new(|s| s.xcr0 = 7)),
        ("lapic.id", Box::new(|s| s.lapic.id = 256)),
        ("lapic.dfr", Box::new(|s| s.lapic.dfr = 0)),
        ("lapic.irr", Box::new(|s| s.lapic.irr[0] = 1)),
        ("lapic.lvt_timer", Box::new(|s| s.lapic.lvt_timer = 1 << 20)),
        ("lapic.timer_current", Box::new(|s| s.lapic.timer_current = 1)),
        ("msrs.0x6e0", Box::new(|s| *s.msrs.get_mut("0x6e0").unwrap() = 1)),
        ("msrs.0x277", Box::new(|s| *s.msrs.get_mut("0x277").unwrap() = 2)),
        ("msrs.0xc0000082", Box::new(|s| *s.msrs.get_mut("0xc0000082").unwrap() = 1 << 47)),
        ("msrs.0x10", Box::new(|s| *s.msrs.get_mut("0x10").unwrap() += 1)),
        ("msrs.0x1b", Box::new(|s| *s.msrs.get_mut("0x1b").unwrap() = 0)),
        (
            "msrs.0xda0",
            Box::new(|s| {
                s.msrs.insert("0xda0".into(), 0);
            }),
        ),
        (
            "msrs.0x3b",
            Box::new(|s| {
                s.msrs.remove("0x3b");
            }),
        ),
        ("events.nmi_pending", Box::new(|s| s.events.nmi_pending = 3)),
        ("events.interrupt_shadow", Box::new(|s| s.events.interrupt_shadow = 4)),
        (
            "events.exception_nr",
            Box::new(|s| {
                s.events.exception_injected = true;
                s.events.exception_nr = 13;
            }),
        ),
        (
            "events",
            Box::new(|s| {
                s.events.interrupt_injected = true;
                s.events.nmi_injected = true;
            }),
        ),
    ];
    for (field, change) in cases {
        let message = refused(&good, change);
        assert!(message.starts_with(&format!("vCPU 1: {field}")), "{field}: {message}");
    }
}

#[test]
fn an_event_half_delivered_elsewhere_is_delivered_first() {
    let mut m = machine(2);
    m.long_mode(1, 3);
    m.gate64(0x61, CODE64, 0x7000, 0x8e, 0);
    let mut state = m.cores[1].save();
    state.events.interrupt_injected = true;
    state.events.interrupt_nr = 0x61;
    m.cores[1].restore(&state).unwrap();
    assert_eq!(m.cores[1].save(), state);
    m.cores[1].poll_events().unwrap();
    assert_eq!((m.cores[1].cpu.rip, m.cores[1].cpu.cpl), (0x7000, 0));
    assert!(!m.cores[1].save().events.interrupt_injected);
}
