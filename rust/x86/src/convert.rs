//! The one place where the live form of a vCPU and [`VcpuState`] meet. What is read back is untrusted: every field is checked
//! and refused by name.

use vcpu::EngineError;
use vcpu::state::{self as saved, MpState, VcpuState};

use crate::core::{Core, Exception};
use crate::events::Reinject;
use crate::lapic::{APIC_BASE_EN, APIC_BASE_EXTD, LVT_WRITABLE, Lapic};
use crate::msr;
use crate::profile::{self, Switches};
use crate::segments::canonical;
use crate::state::{Activity, CS, Cpu, DS, ES, F80, FS, GS, SS, Segment, Table, flags};

/// `field: why`, without the vCPU's number.
type Checked<T> = Result<T, String>;

fn refuse<T>(field: &str, why: impl std::fmt::Display) -> Checked<T> {
    Err(format!("{field}: {why}"))
}

fn reserved(field: &str, value: u64, allowed: u64) -> Checked<()> {
    if value & !allowed != 0 {
        refuse(field, format!("{value:#x} has reserved bits {:#x} set", value & !allowed))
    } else {
        Ok(())
    }
}

// ---- segments ----

fn save_segment(s: &Segment) -> saved::Segment {
    let bit = |n: u32| (s.attr >> n & 1) as u8;
    saved::Segment {
        base: s.base,
        limit: s.limit,
        selector: s.selector,
        type_: s.type_(),
        s: bit(4),
        dpl: s.dpl(),
        present: bit(7),
        avl: bit(12),
        l: bit(13),
        db: bit(14),
        g: bit(15),
        unusable: bit(16),
    }
}

fn load_segment(name: &str, s: &saved::Segment) -> Checked<Segment> {
    let parts = [
        ("type_", s.type_, 15, 0),
        ("s", s.s, 1, 4),
        ("dpl", s.dpl, 3, 5),
        ("present", s.present, 1, 7),
        ("avl", s.avl, 1, 12),
        ("l", s.l, 1, 13),
        ("db", s.db, 1, 14),
        ("g", s.g, 1, 15),
        ("unusable", s.unusable, 1, 16),
    ];
    let mut attr = 0;
    for (part, value, max, shift) in parts {
        if value > max {
            return refuse(&format!("sregs.{name}.{part}"), format!("{value} is above {max}"));
        }
        attr |= u32::from(value) << shift;
    }
    if s.unusable == 0 {
        let fits = if s.g != 0 { s.limit & 0xfff == 0xfff } else { s.limit <= 0xf_ffff };
        if !fits {
            return refuse(&format!("sregs.{name}.limit"), format!("{:#x} cannot be with granularity {}", s.limit, s.g));
        }
    }
    Ok(Segment { base: s.base, limit: s.limit, selector: s.selector, attr })
}

fn load_table(name: &str, t: &saved::Table) -> Checked<Table> {
    if !canonical(t.base) {
        return refuse(&format!("sregs.{name}.base"), format!("{:#x} is not canonical", t.base));
    }
    Ok(Table { base: t.base, limit: t.limit })
}

// ---- hexadecimal registers ----

fn hex(field: &str, text: &str, digits: usize) -> Checked<u128> {
    if text.len() != digits || !text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b)) {
        return refuse(field, format!("expected {digits} lower-case hexadecimal digits"));
    }
    u128::from_str_radix(text, 16).or_else(|e| refuse(field, e))
}

// ---- MSRs ----

fn msr_name(index: u32) -> String {
    format!("{index:#x}")
}

/// What MSRs carry besides `Cpu::msr`.
struct Restored {
    cpu: Cpu,
    lapic: Lapic,
    tsc_adjust: u64,
    hwcr: u64,
    kvmclock: crate::kvmclock::KvmClock,
    reinject: Option<Reinject>,
}

impl Core {
    /// Everything that this vCPU can observe later. What was posted to it is taken over first, as it would be at its next
    /// instruction boundary.
    pub fn save(&mut self) -> VcpuState {
        // What looks at the state does not change what comes next: the turn of a vCPU that has mail is a short one.
        self.mail_read |= self.shared.apics.mailbox(self.vcpu).posted();
        self.take_mail();
        let c = &self.cpu;
        let g = &c.gpr;
        let regs = saved::Regs {
            rax: g[0],
            rcx: g[1],
            rdx: g[2],
            rbx: g[3],
            rsp: g[4],
            rbp: g[5],
            rsi: g[6],
            rdi: g[7],
            r8: g[8],
            r9: g[9],
            r10: g[10],
            r11: g[11],
            r12: g[12],
            r13: g[13],
            r14: g[14],
            r15: g[15],
            rip: c.rip,
            rflags: c.rflags(),
        };
        let table = |t: &Table| saved::Table { base: t.base, limit: t.limit };
        let sregs = saved::Sregs {
            cs: save_segment(&c.seg[CS]),
            ds: save_segment(&c.seg[DS]),
            es: save_segment(&c.seg[ES]),
            fs: save_segment(&c.seg[FS]),
            gs: save_segment(&c.seg[GS]),
            ss: save_segment(&c.seg[SS]),
            tr: save_segment(&c.tr),
            ldt: save_segment(&c.ldtr),
            gdt: table(&c.gdtr),
            idt: table(&c.idtr),
            cr0: c.cr0,
            cr2: c.cr2,
            cr3: c.cr3,
            cr4: c.cr4,
            cr8: self.lapic.cr8(),
            efer: c.efer,
            apic_base: self.lapic.base,
        };
        let top = usize::from(c.fpu.fsw >> 11 & 7);
        let fpu = saved::Fpu {
            fpr: std::array::from_fn(|i| {
                let r = c.fpu.st[(top + i) & 7];
                format!("{:04x}{:016x}", r.sign_exp, r.mantissa)
            }),
            fcw: c.fpu.fcw,
            fsw: c.fpu.fsw,
            ftwx: c.fpu.ftw,
            last_opcode: c.fpu.fop,
            last_ip: c.fpu.fip,
            last_dp: c.fpu.fdp,
            xmm: std::array::from_fn(|i| format!("{:032x}", c.xmm[i])),
            mxcsr: c.mxcsr,
        };
        let mut events = saved::Events {
            interrupt_shadow: c.shadow,
            nmi_pending: c.nmi_pending,
            nmi_masked: c.nmi_masked,
            ..saved::Events::default()
        };
        match self.reinject {
            Some(Reinject::Exception(e)) => {
                events.exception_injected = true;
                events.exception_nr = e.vector;
                events.exception_error_code = e.error;
            }
            Some(Reinject::Interrupt(vector)) => {
                events.interrupt_injected = true;
                events.interrupt_nr = vector;
            }
            Some(Reinject::Nmi) => events.nmi_injected = true,
            None => {}
        }
        let mp_state = match c.activity {
            Activity::Running => MpState::Runnable,
            Activity::Halted => MpState::Halted,
            Activity::WaitInit => MpState::Uninitialized,
            Activity::WaitSipi => MpState::InitReceived,
        };
        let d = &c.dr;
        let debug_regs = saved::DebugRegs { db: [d[0], d[1], d[2], d[3]], dr6: d[6], dr7: d[7] };
        let lapic = self.save_lapic();
        let pkru = c.pkru;
        let msrs = self.saved_msrs().filter_map(|i| Some((msr_name(i), self.read_msr(i)?)));
        let msrs = msrs.collect();
        VcpuState { regs, sregs, fpu, debug_regs, lapic, events, mp_state, xcr0: 1, pkru, msrs }
    }

    /// The MSRs of this machine's state.
    fn saved_msrs(&self) -> impl Iterator<Item = u32> + use<> {
        msr::SAVED.iter().copied().chain(self.shared.switches.pks.then_some(msr::PKRS))
    }

    fn save_lapic(&self) -> saved::Lapic {
        let l = &self.lapic;
        let id = if l.x2apic() { l.vcpu } else { l.id };
        saved::Lapic {
            id,
            tpr: l.tpr,
            ldr: l.ldr,
            dfr: l.dfr,
            svr: l.svr,
            esr: l.esr,
            esr_pending: l.esr_pending,
            icr: l.icr,
            isr: l.isr,
            tmr: l.tmr,
            irr: l.irr,
            lvt_cmci: 1 << 16,
            lvt_timer: l.lvt[0],
            lvt_thermal: l.lvt[1],
            lvt_perf: l.lvt[2],
            lvt_lint0: l.lvt[3],
            lvt_lint1: l.lvt[4],
            lvt_error: l.lvt[5],
            timer_initial: l.timer_initial,
            timer_current: l.timer_current(&self.shared.clock),
            timer_divide: l.timer_divide,
        }
    }

    /// Validates `state` and takes it over; on error nothing has changed.
    pub fn restore(&mut self, state: &VcpuState) -> Result<(), EngineError> {
        let restored = self.check(state).map_err(|why| EngineError::new("state", format!("vCPU {}: {why}", self.vcpu)))?;
        // What was posted to the old state is void.
        let _ = self.shared.apics.mailbox(self.vcpu).take();
        let icount = self.cpu.icount;
        self.cpu = Cpu { icount, ..restored.cpu };
        self.lapic = restored.lapic;
        self.tsc_adjust = restored.tsc_adjust;
        self.hwcr = restored.hwcr;
        self.kvmclock = restored.kvmclock;
        self.reinject = restored.reinject;
        self.fault = None;
        self.lapic.set_intr(self.shared.apics.intr());
        self.lapic.publish(&self.shared.apics);
        self.lapic_moved();
        self.refresh();
        self.breakpoints = crate::debug::Breakpoints::default();
        self.refresh_breakpoints();
        Ok(())
    }

    fn check(&self, s: &VcpuState) -> Checked<Restored> {
        let mut cpu = Cpu::default();
        check_control(s, self.shared.phys_bits, self.shared.switches, &mut cpu)?;
        if s.pkru != 0 && !self.shared.switches.pku {
            return refuse("pkru", format!("{:#x}: this machine has no protection keys", s.pkru));
        }
        cpu.pkru = s.pkru;
        check_segments(s, &mut cpu)?;
        check_regs(s, &mut cpu)?;
        check_fpu(s, &mut cpu)?;
        let d = &s.debug_regs;
        if d.dr6 & !0xe00f != 0xffff_0ff0 {
            return refuse("debug_regs.dr6", format!("{:#x} has wrong fixed bits", d.dr6));
        }
        if d.dr7 & !0xffff_23ff != 0x400 {
            return refuse("debug_regs.dr7", format!("{:#x} has wrong fixed bits", d.dr7));
        }
        cpu.dr = [d.db[0], d.db[1], d.db[2], d.db[3], 0, 0, d.dr6, d.dr7];
        if s.xcr0 != 1 {
            return refuse("xcr0", format!("{:#x}: the CPU profile has no XSAVE, so only 0x1 is possible", s.xcr0));
        }
        let mut restored = Restored {
            cpu,
            lapic: Lapic::new(self.vcpu as u32),
            tsc_adjust: 0,
            hwcr: 0,
            kvmclock: crate::kvmclock::KvmClock::default(),
            reinject: None,
        };
        self.check_msrs(s, &mut restored)?;
        self.check_lapic(s, &mut restored.lapic)?;
        check_events(s, &mut restored)?;
        Ok(restored)
    }

    fn check_msrs(&self, s: &VcpuState, r: &mut Restored) -> Checked<()> {
        for name in s.msrs.keys() {
            if !self.saved_msrs().any(|i| msr_name(i) == *name) {
                return refuse(&format!("msrs.{name}"), "not an MSR of this CPU profile");
            }
        }
        for index in self.saved_msrs() {
            let name = msr_name(index);
            let field = format!("msrs.{name}");
            let Some(&value) = s.msrs.get(&name) else { return refuse(&field, "is missing") };
            if !msr::storable(index, value, self.shared.phys_bits) {
                return refuse(&field, format!("{value:#x} is not a value that this register takes"));
            }
            match index {
                msr::APIC_BASE if value != s.sregs.apic_base => {
                    return refuse(&field, format!("{value:#x} differs from sregs.apic_base {:#x}", s.sregs.apic_base));
                }
                msr::APIC_BASE => {}
                msr::TSC_ADJUST => r.tsc_adjust = value,
                msr::TSC => {
                    // The clock may have moved on since the state was saved, but it cannot have gone back.
                    let ahead = value.wrapping_sub(r.tsc_adjust).wrapping_sub(self.shared.clock.tsc()) as i64;
                    if ahead > 0 {
                        return refuse(&field, format!("{value:#x} lies {ahead} ticks after the machine's clock"));
                    }
                }
                msr::PKRS => r.cpu.pkrs = value as u32,
                msr::TSC_DEADLINE => r.lapic.tsc_deadline = value,
                msr::KVM_SYSTEM_TIME => r.kvmclock.system_time = value,
                msr::KVM_WALL_CLOCK => r.kvmclock.wall_clock = value,
                msr::HWCR => {
                    reserved(&field, value, msr::HWCR_WRITABLE)?;
                    r.hwcr = value & !msr::HWCR_FIXED;
                }
                _ => match msr::plain(&mut r.cpu.msr, index) {
                    Some(slot) => *slot = value,
                    None => return refuse(&field, "cannot be restored"),
                },
            }
        }
        Ok(())
    }

    fn check_lapic(&self, s: &VcpuState, l: &mut Lapic) -> Checked<()> {
        let base = s.sregs.apic_base;
        reserved("sregs.apic_base", base, !(!0u64 << self.shared.phys_bits | 0xff | 1 << 9))?;
        if base & (APIC_BASE_EN | APIC_BASE_EXTD) == APIC_BASE_EXTD {
            return refuse("sregs.apic_base", format!("{base:#x} is in x2APIC mode without being enabled"));
        }
        if base & APIC_BASE_EXTD != 0 && !self.shared.switches.x2apic {
            return refuse("sregs.apic_base", format!("{base:#x}: this machine has no x2APIC mode"));
        }
        l.base = base;
        let v = &s.lapic;
        if l.x2apic() {
            if v.id != l.vcpu {
                return refuse("lapic.id", format!("{} in x2APIC mode, expected {}", v.id, l.vcpu));
            }
            let ldr = l.vcpu >> 4 << 16 | 1 << (l.vcpu & 15);
            if v.ldr != ldr {
                return refuse("lapic.ldr", format!("{:#x} in x2APIC mode, expected {ldr:#x}", v.ldr));
            }
        } else {
            reserved("lapic.id", v.id.into(), 0xff)?;
            reserved("lapic.ldr", v.ldr.into(), 0xff00_0000)?;
            l.id = v.id;
        }
        l.ldr = v.ldr;
        reserved("lapic.tpr", v.tpr.into(), 0xff)?;
        if s.sregs.cr8 != u64::from(v.tpr >> 4) {
            return refuse("sregs.cr8", format!("{:#x} differs from lapic.tpr {:#x}", s.sregs.cr8, v.tpr));
        }
        reserved("lapic.svr", v.svr.into(), 0x1ff)?;
        if v.dfr & 0x0fff_ffff != 0x0fff_ffff {
            return refuse("lapic.dfr", format!("{:#x}: the low 28 bits are ones", v.dfr));
        }
        reserved("lapic.esr", v.esr.into(), 0xff)?;
        reserved("lapic.esr_pending", v.esr_pending.into(), 0xff)?;
        let high = if l.x2apic() { 0xffff_ffff_0000_0000 } else { 0xff00_0000_0000_0000 };
        reserved("lapic.icr", v.icr, high | 0x000c_cfff)?;
        for (name, words) in [("isr", &v.isr), ("irr", &v.irr)] {
            if words[0] & 0xffff != 0 {
                return refuse(&format!("lapic.{name}"), "vectors below 16 cannot be");
            }
        }
        if v.lvt_cmci != 1 << 16 {
            return refuse("lapic.lvt_cmci", format!("{:#x}: this LAPIC has no such entry, so it is 0x10000", v.lvt_cmci));
        }
        let lvt = [
            ("timer", v.lvt_timer),
            ("thermal", v.lvt_thermal),
            ("perf", v.lvt_perf),
            ("lint0", v.lvt_lint0),
            ("lint1", v.lvt_lint1),
            ("error", v.lvt_error),
        ];
        for (n, (name, value)) in lvt.into_iter().enumerate() {
            reserved(&format!("lapic.lvt_{name}"), value.into(), LVT_WRITABLE[n].into())?;
            l.lvt[n] = value;
        }
        reserved("lapic.timer_divide", v.timer_divide.into(), 0xb)?;
        if v.timer_current > v.timer_initial {
            return refuse("lapic.timer_current", format!("{} is above timer_initial {}", v.timer_current, v.timer_initial));
        }
        let deadline_mode = v.lvt_timer >> 17 & 3 == 2;
        if l.tsc_deadline != 0 && !deadline_mode {
            return refuse("msrs.0x6e0", "a deadline is set, but lapic.lvt_timer is not in TSC-deadline mode");
        }
        if v.timer_current != 0 && deadline_mode {
            return refuse("lapic.timer_current", "counts in TSC-deadline mode");
        }
        (l.tpr, l.dfr, l.svr, l.esr, l.esr_pending, l.icr) = (v.tpr, v.dfr, v.svr, v.esr, v.esr_pending, v.icr);
        (l.isr, l.tmr, l.irr) = (v.isr, v.tmr, v.irr);
        (l.timer_initial, l.timer_divide) = (v.timer_initial, v.timer_divide);
        l.set_timer_current(v.timer_current, &self.shared.clock);
        l.update();
        Ok(())
    }
}

const CR0_DEFINED: u64 = 0xe005_003f;

fn check_control(s: &VcpuState, phys_bits: u8, switches: Switches, cpu: &mut Cpu) -> Checked<()> {
    let r = &s.sregs;
    reserved("sregs.cr0", r.cr0, CR0_DEFINED)?;
    let bit = |v: u64, n: u32| v >> n & 1 != 0;
    if bit(r.cr0, 31) && !bit(r.cr0, 0) {
        return refuse("sregs.cr0", format!("{:#x} has paging without protection", r.cr0));
    }
    if bit(r.cr0, 29) && !bit(r.cr0, 30) {
        return refuse("sregs.cr0", format!("{:#x} has NW without CD", r.cr0));
    }
    if !bit(r.cr0, 4) {
        return refuse("sregs.cr0", format!("{:#x} lacks ET, which is always one", r.cr0));
    }
    reserved("sregs.cr4", r.cr4, switches.cr4_allowed())?;
    reserved("sregs.efer", r.efer, profile::EFER_ALLOWED)?;
    let (lme, lma) = (bit(r.efer, 8), bit(r.efer, 10));
    if lma != (lme && bit(r.cr0, 31)) {
        return refuse("sregs.efer", format!("{:#x}: LMA must be LME and paging", r.efer));
    }
    if lma && !bit(r.cr4, 5) {
        return refuse("sregs.cr4", format!("{:#x}: long mode without PAE", r.cr4));
    }
    let cr3_bits = if lma { !(!0u64 << phys_bits) } else { u64::from(u32::MAX) };
    // Bits that legacy modes ignore may hold what was loaded in long mode.
    reserved("sregs.cr3", r.cr3, cr3_bits | !(!0u64 << phys_bits))?;
    reserved("sregs.cr8", r.cr8, 15)?;
    (cpu.cr0, cpu.cr2, cpu.cr3, cpu.cr4, cpu.efer) = (r.cr0, r.cr2, r.cr3, r.cr4, r.efer);
    Ok(())
}

fn check_segments(s: &VcpuState, cpu: &mut Cpu) -> Checked<()> {
    let r = &s.sregs;
    let v8086 = s.regs.rflags & flags::VM != 0;
    if v8086 && (!cpu.protected() || cpu.long_mode()) {
        return refuse("regs.rflags", "VM is set outside legacy protected mode");
    }
    for (index, name, segment) in
        [(CS, "cs", &r.cs), (DS, "ds", &r.ds), (ES, "es", &r.es), (FS, "fs", &r.fs), (GS, "gs", &r.gs), (SS, "ss", &r.ss)]
    {
        let value = load_segment(name, segment)?;
        let field = format!("sregs.{name}.base");
        if index == FS || index == GS {
            if !canonical(value.base) {
                return refuse(&field, format!("{:#x} is not canonical", value.base));
            }
        } else if value.base >> 32 != 0 {
            return refuse(&field, format!("{:#x} does not fit 32 bits", value.base));
        }
        cpu.seg[index] = value;
        cpu.seg_base[index] = value.base;
    }
    for (name, segment, slot) in [("tr", &r.tr, &mut cpu.tr), ("ldt", &r.ldt, &mut cpu.ldtr)] {
        let value = load_segment(name, segment)?;
        if !canonical(value.base) {
            return refuse(&format!("sregs.{name}.base"), format!("{:#x} is not canonical", value.base));
        }
        *slot = value;
    }
    cpu.gdtr = load_table("gdt", &r.gdt)?;
    cpu.idtr = load_table("idt", &r.idt)?;

    let cs = cpu.seg[CS];
    cpu.cpl = if v8086 {
        3
    } else if cpu.protected() {
        cpu.seg[SS].dpl()
    } else {
        0
    };
    if cpu.protected() && !v8086 {
        let code = cs.attr & (Segment::UNUSABLE | Segment::S | Segment::P | 8) == Segment::S | Segment::P | 8;
        if !code {
            return refuse("sregs.cs", format!("attributes {:#x} are not a present code segment's", cs.attr));
        }
        // Legacy mode ignores L.
        if cpu.long_mode() && cs.attr & (Segment::L | Segment::DB) == Segment::L | Segment::DB {
            return refuse("sregs.cs.l", "a code segment cannot be 64-bit and 32-bit at once");
        }
        let conforming = cs.attr & 4 != 0;
        if !conforming && cs.dpl() != cpu.cpl || conforming && cs.dpl() > cpu.cpl {
            return refuse("sregs.cs.dpl", format!("{} contradicts sregs.ss.dpl {} (the privilege level)", cs.dpl(), cpu.cpl));
        }
    }
    cpu.code_size = cpu.code_size_of(&cs);
    Ok(())
}

fn check_regs(s: &VcpuState, cpu: &mut Cpu) -> Checked<()> {
    let r = &s.regs;
    reserved("regs.rflags", r.rflags, 0x003f_7fd7)?;
    if r.rflags & flags::FIXED == 0 {
        return refuse("regs.rflags", format!("{:#x}: bit 1 is always one", r.rflags));
    }
    if cpu.code_size != crate::state::CodeSize::Bits64 && r.rip >> 32 != 0 {
        return refuse("regs.rip", format!("{:#x} outside 64-bit code", r.rip));
    }
    let gpr = [r.rax, r.rcx, r.rdx, r.rbx, r.rsp, r.rbp, r.rsi, r.rdi, r.r8, r.r9, r.r10, r.r11, r.r12, r.r13, r.r14, r.r15];
    cpu.gpr[..16].copy_from_slice(&gpr);
    cpu.rip = r.rip;
    cpu.set_rflags(r.rflags);
    cpu.activity = match s.mp_state {
        MpState::Runnable | MpState::SipiReceived => Activity::Running,
        MpState::Halted => Activity::Halted,
        MpState::Uninitialized => Activity::WaitInit,
        MpState::InitReceived => Activity::WaitSipi,
    };
    Ok(())
}

fn check_fpu(s: &VcpuState, cpu: &mut Cpu) -> Checked<()> {
    let f = &s.fpu;
    let top = usize::from(f.fsw >> 11 & 7);
    for (i, text) in f.fpr.iter().enumerate() {
        let value = hex(&format!("fpu.fpr[{i}]"), text, 20)?;
        cpu.fpu.st[(top + i) & 7] = F80 { mantissa: value as u64, sign_exp: (value >> 64) as u16 };
    }
    for (i, text) in f.xmm.iter().enumerate() {
        cpu.xmm[i] = hex(&format!("fpu.xmm[{i}]"), text, 32)?;
    }
    reserved("fpu.fcw", f.fcw.into(), 0x1f7f)?;
    reserved("fpu.last_opcode", f.last_opcode.into(), 0x7ff)?;
    reserved("fpu.mxcsr", f.mxcsr.into(), 0xffff)?;
    (cpu.fpu.fcw, cpu.fpu.fsw, cpu.fpu.ftw) = (f.fcw, f.fsw, f.ftwx);
    (cpu.fpu.fop, cpu.fpu.fip, cpu.fpu.fdp, cpu.mxcsr) = (f.last_opcode, f.last_ip, f.last_dp, f.mxcsr);
    Ok(())
}

fn check_events(s: &VcpuState, r: &mut Restored) -> Checked<()> {
    let e = &s.events;
    reserved("events.interrupt_shadow", e.interrupt_shadow.into(), 3)?;
    if e.nmi_pending > 2 {
        return refuse("events.nmi_pending", format!("{} is more than a CPU remembers", e.nmi_pending));
    }
    if e.triple_fault_pending {
        return refuse("events.triple_fault_pending", "the guest was about to be reset; there is nothing to go on with");
    }
    r.cpu.shadow = e.interrupt_shadow;
    r.cpu.nmi_pending = e.nmi_pending;
    r.cpu.nmi_masked = e.nmi_masked;
    let exception = e.exception_injected || e.exception_pending;
    if usize::from(exception) + usize::from(e.interrupt_injected) + usize::from(e.nmi_injected) > 1 {
        return refuse("events", "more than one event is being delivered");
    }
    if exception {
        let has_error = matches!(e.exception_nr, 8 | 10..=14 | 17);
        if e.exception_nr > 31 || e.exception_nr == 2 || has_error != e.exception_error_code.is_some() {
            return refuse("events.exception_nr", format!("{} with this error code is no exception", e.exception_nr));
        }
        let exception = Exception { vector: e.exception_nr, error: e.exception_error_code, cr2: r.cpu.cr2 };
        r.reinject = Some(Reinject::Exception(exception));
    } else if e.interrupt_injected {
        if e.interrupt_soft {
            return refuse("events.interrupt_soft", "a software interrupt half delivered cannot be taken over");
        }
        r.reinject = Some(Reinject::Interrupt(e.interrupt_nr));
    } else if e.nmi_injected {
        r.cpu.nmi_masked = true;
        r.reinject = Some(Reinject::Nmi);
    }
    if s.mp_state == MpState::SipiReceived {
        if e.sipi_vector > 0xff {
            return refuse("events.sipi_vector", format!("{:#x} is above 0xff", e.sipi_vector));
        }
        let vector = e.sipi_vector;
        r.cpu.seg[CS] = Segment { base: u64::from(vector) << 12, limit: 0xffff, selector: (vector << 8) as u16, attr: 0x9b };
        r.cpu.seg_base[CS] = r.cpu.seg[CS].base;
        r.cpu.rip = 0;
    }
    Ok(())
}
