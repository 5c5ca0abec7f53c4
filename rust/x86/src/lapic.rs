//! The local APIC (SDM vol. 3, chapter 11) in xAPIC (MMIO) and x2APIC (MSR) mode. Times are guest TSC ticks.

use vcpu::Clock;

use crate::apics::{Apics, Destination, FIXED, INIT, LOWEST, Message, NMI, SIPI};
use crate::core::Core;

pub const APIC_BASE_BSP: u64 = 1 << 8;
pub const APIC_BASE_EXTD: u64 = 1 << 10;
pub const APIC_BASE_EN: u64 = 1 << 11;
pub const APIC_DEFAULT_BASE: u64 = 0xfee0_0000;

/// Version 0x14, six LVT entries.
const VERSION: u32 = 0x14 | 5 << 16;
const SVR_ENABLED: u32 = 1 << 8;
const LVT_MASKED: u32 = 1 << 16;

/// What [`Lapic::acknowledge`] gives for an interrupt whose vector the 8259s know. No LAPIC vector is below 16.
pub const EXTINT: u8 = 0;
const MODE_EXTINT: u32 = 7;

pub const LVT_TIMER: usize = 0;
pub const LVT_THERMAL: usize = 1;
pub const LVT_PERF: usize = 2;
pub const LVT_LINT0: usize = 3;
pub const LVT_LINT1: usize = 4;
pub const LVT_ERROR: usize = 5;
/// Writable bits of the entries above.
pub const LVT_WRITABLE: [u32; 6] = [0x7_00ff, 0x1_07ff, 0x1_07ff, 0x1_a7ff, 0x1_a7ff, 0x1_00ff];

const ESR_SEND_ILLEGAL: u32 = 1 << 5;
const ESR_RECEIVE_ILLEGAL: u32 = 1 << 6;
const ESR_ILLEGAL_REGISTER: u32 = 1 << 7;

/// Registers by their xAPIC offset / 16 (x2APIC: MSR − 0x800).
mod reg {
    pub const ID: u32 = 0x02;
    pub const VERSION: u32 = 0x03;
    pub const TPR: u32 = 0x08;
    pub const APR: u32 = 0x09;
    pub const PPR: u32 = 0x0a;
    pub const EOI: u32 = 0x0b;
    pub const RRD: u32 = 0x0c;
    pub const LDR: u32 = 0x0d;
    pub const DFR: u32 = 0x0e;
    pub const SVR: u32 = 0x0f;
    pub const ISR: u32 = 0x10;
    pub const TMR: u32 = 0x18;
    pub const IRR: u32 = 0x20;
    pub const ESR: u32 = 0x28;
    pub const ICR: u32 = 0x30;
    pub const ICR2: u32 = 0x31;
    pub const LVT: u32 = 0x32;
    pub const TIMER_INITIAL: u32 = 0x38;
    pub const TIMER_CURRENT: u32 = 0x39;
    pub const TIMER_DIVIDE: u32 = 0x3e;
    pub const SELF_IPI: u32 = 0x3f;
}

/// The access is #GP (x2APIC) or an error in ESR (xAPIC).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Refused;

/// What lies around a LAPIC while it works.
pub struct Outside<'a> {
    pub apics: &'a Apics,
    pub clock: &'a Clock,
    /// IA32_TSC_ADJUST: guest TSC = clock + this.
    pub tsc_adjust: u64,
}

impl Outside<'_> {
    pub fn tsc(&self) -> u64 {
        self.clock.tsc().wrapping_add(self.tsc_adjust)
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lapic {
    /// Index of the vCPU = its initial APIC id.
    pub vcpu: u32,
    /// IA32_APIC_BASE.
    pub base: u64,
    /// xAPIC id, 8 bits (the x2APIC id is `vcpu`).
    pub id: u32,
    pub tpr: u32,
    pub ldr: u32,
    pub dfr: u32,
    pub svr: u32,
    pub esr: u32,
    pub esr_pending: u32,
    pub icr: u64,
    pub isr: [u32; 8],
    pub tmr: [u32; 8],
    pub irr: [u32; 8],
    pub lvt: [u32; 6],
    pub timer_initial: u32,
    pub timer_divide: u32,
    /// Oneshot and periodic: the clock's TSC (without adjustment) at which the running count reaches zero; 0 = not running.
    pub timer_expiry: u64,
    /// IA32_TSC_DEADLINE in guest TSC; 0 = disarmed.
    pub tsc_deadline: u64,
    /// The 8259s ask for an interrupt (LINT0, or INTR while the LAPIC is disabled). Not saved: it is their output.
    intr: bool,
    /// Highest requested vector that the priority lets through, [`EXTINT`] for the 8259s'. Derived.
    deliverable: Option<u8>,
    /// There is a deliverable one; translated code looks at this.
    pub(crate) waits: bool,
}

fn highest(words: &[u32; 8]) -> Option<u8> {
    (0..8).rev().find(|&i| words[i] != 0).map(|i| (i as u32 * 32 + 31 - words[i].leading_zeros()) as u8)
}

fn set(words: &mut [u32; 8], vector: u8) {
    words[usize::from(vector >> 5)] |= 1 << (vector & 31);
}
fn clear(words: &mut [u32; 8], vector: u8) {
    words[usize::from(vector >> 5)] &= !(1 << (vector & 31));
}
fn test(words: &[u32; 8], vector: u8) -> bool {
    words[usize::from(vector >> 5)] >> (vector & 31) & 1 != 0
}

/// Timer ticks are nanoseconds (1 GHz, as KVM's), then divided.
fn ticks_to_tsc(ticks: u64, khz: u64) -> u64 {
    (u128::from(ticks) * u128::from(khz) / 1_000_000).min(u128::from(u64::MAX >> 1)) as u64
}

impl Lapic {
    /// After power-on, hardware-enabled in xAPIC mode.
    pub fn new(vcpu: u32) -> Self {
        let bsp = if vcpu == 0 { APIC_BASE_BSP } else { 0 };
        let mut lapic = Self {
            vcpu,
            base: APIC_DEFAULT_BASE | APIC_BASE_EN | bsp,
            id: vcpu & 0xff,
            tpr: 0,
            ldr: 0,
            dfr: 0,
            svr: 0,
            esr: 0,
            esr_pending: 0,
            icr: 0,
            isr: [0; 8],
            tmr: [0; 8],
            irr: [0; 8],
            lvt: [0; 6],
            timer_initial: 0,
            timer_divide: 0,
            timer_expiry: 0,
            tsc_deadline: 0,
            intr: false,
            deliverable: None,
            waits: false,
        };
        lapic.clear_registers();
        lapic
    }

    fn clear_registers(&mut self) {
        self.id = self.vcpu & 0xff;
        self.tpr = 0;
        self.dfr = u32::MAX;
        self.ldr = if self.x2apic() { self.x2apic_ldr() } else { 0 };
        self.svr = 0xff;
        self.esr = 0;
        self.esr_pending = 0;
        self.icr = 0;
        self.isr = [0; 8];
        self.tmr = [0; 8];
        self.irr = [0; 8];
        self.lvt = [LVT_MASKED; 6];
        self.timer_initial = 0;
        self.timer_divide = 0;
        self.timer_expiry = 0;
        self.tsc_deadline = 0;
        self.update();
    }

    /// INIT: everything but the id and IA32_APIC_BASE.
    pub fn init(&mut self, apics: &Apics) {
        let id = self.id;
        self.clear_registers();
        self.id = id;
        self.publish(apics);
    }

    pub fn enabled(&self) -> bool {
        self.base & APIC_BASE_EN != 0
    }
    pub fn x2apic(&self) -> bool {
        self.base & (APIC_BASE_EN | APIC_BASE_EXTD) == APIC_BASE_EN | APIC_BASE_EXTD
    }
    fn software_enabled(&self) -> bool {
        self.svr & SVR_ENABLED != 0
    }
    fn x2apic_ldr(&self) -> u32 {
        self.vcpu >> 4 << 16 | 1 << (self.vcpu & 15)
    }
    /// The page that answers in xAPIC mode.
    pub fn mmio_page(&self) -> Option<u64> {
        (self.enabled() && !self.x2apic()).then_some(self.base & !0xfff)
    }

    /// Tells the other APICs who we are. To be called after restoring, too.
    pub fn publish(&self, apics: &Apics) {
        let id = if self.x2apic() { self.vcpu } else { self.id };
        apics.mailbox(self.vcpu as usize).publish(
            id,
            self.enabled(),
            self.x2apic(),
            self.enabled() && self.software_enabled(),
            self.ldr,
            self.dfr,
        );
    }

    /// WRMSR IA32_APIC_BASE.
    pub fn set_base(&mut self, value: u64, phys_bits: u8, apics: &Apics) -> Result<(), Refused> {
        let reserved = !0u64 << phys_bits | 0xff | 1 << 9;
        if value & reserved != 0 {
            return Err(Refused);
        }
        let mode = |v: u64| v >> 10 & 3;
        // 0 disabled, 2 xAPIC, 3 x2APIC, 1 invalid (SDM vol. 3, figure 11-27).
        if matches!((mode(self.base), mode(value)), (_, 1) | (3, 2) | (0, 3)) {
            return Err(Refused);
        }
        let before = mode(self.base);
        self.base = value;
        match (before, mode(value)) {
            (2, 3) => {
                self.ldr = self.x2apic_ldr();
                self.dfr = u32::MAX;
                self.icr &= 0xffff_ffff;
            }
            (a, 0) if a != 0 => self.clear_registers(),
            (0, 2) => self.clear_registers(),
            _ => {}
        }
        self.update();
        self.publish(apics);
        Ok(())
    }

    /// Recomputes what may be delivered. After every change of IRR, ISR, TPR, LINT0, and of the mode.
    pub fn update(&mut self) {
        self.deliverable = if self.intr && self.takes_extint() {
            Some(EXTINT)
        } else {
            highest(&self.irr).filter(|&v| u32::from(v) >> 4 > self.ppr() >> 4)
        };
        self.waits = self.deliverable.is_some();
    }

    /// Whether LINT0 passes on what the 8259s ask for, whatever the priorities (SDM vol. 3, 11.5.1). A disabled LAPIC's pin is the
    /// processor's INTR.
    fn takes_extint(&self) -> bool {
        let lint0 = self.lvt[LVT_LINT0];
        !self.enabled() || lint0 & LVT_MASKED == 0 && lint0 >> 8 & 7 == MODE_EXTINT
    }

    /// The 8259s' output.
    pub fn set_intr(&mut self, level: bool) {
        self.intr = level;
        self.update();
    }

    /// The vector that would interrupt now.
    #[inline]
    pub fn deliverable(&self) -> Option<u8> {
        self.deliverable
    }

    pub fn ppr(&self) -> u32 {
        let serving = u32::from(highest(&self.isr).unwrap_or(0));
        if self.tpr >> 4 >= serving >> 4 { self.tpr } else { serving & 0xf0 }
    }

    /// A fixed interrupt arrives.
    pub fn accept(&mut self, vector: u8, level: bool) {
        if vector < 16 || !self.enabled() || !self.software_enabled() {
            return;
        }
        set(&mut self.irr, vector);
        if level {
            set(&mut self.tmr, vector)
        } else {
            clear(&mut self.tmr, vector)
        }
        self.update();
    }

    /// The mailbox's vectors, all at once.
    pub fn accept_all(&mut self, irr: &[u32; 8], level: &[u32; 8]) {
        if !self.enabled() || !self.software_enabled() {
            return;
        }
        for i in 0..8 {
            self.irr[i] |= irr[i];
            self.tmr[i] = self.tmr[i] & !irr[i] | level[i] & irr[i];
        }
        self.update();
    }

    /// Moves the deliverable vector from requested to in service.
    pub fn acknowledge(&mut self) -> Option<u8> {
        let vector = self.deliverable?;
        if vector == EXTINT {
            return Some(vector);
        }
        clear(&mut self.irr, vector);
        set(&mut self.isr, vector);
        self.update();
        Some(vector)
    }

    pub fn eoi(&mut self, apics: &Apics) {
        let Some(vector) = highest(&self.isr) else { return };
        clear(&mut self.isr, vector);
        self.update();
        if test(&self.tmr, vector) {
            apics.eoi(vector);
        }
    }

    /// CR8 is TPR's upper half.
    pub fn set_cr8(&mut self, value: u64) {
        self.tpr = (value as u32 & 15) << 4;
        self.update();
    }
    pub fn cr8(&self) -> u64 {
        u64::from(self.tpr >> 4)
    }

    fn error(&mut self, bit: u32) {
        self.esr_pending |= bit;
        self.fire_lvt(LVT_ERROR);
    }

    /// A local source raises its LVT entry. NMI mode has to be handled by the caller: `true` asks for one.
    pub fn fire_lvt(&mut self, entry: usize) -> bool {
        let lvt = self.lvt[entry];
        if lvt & LVT_MASKED != 0 || !self.enabled() {
            return false;
        }
        let vector = lvt as u8;
        let mode = if entry == LVT_TIMER || entry == LVT_ERROR { FIXED } else { (lvt >> 8 & 7) as u8 };
        match mode {
            FIXED if vector < 16 => {
                // The error LVT itself must not recurse.
                self.esr_pending |= ESR_RECEIVE_ILLEGAL;
                false
            }
            FIXED => {
                self.accept(vector, false);
                false
            }
            NMI => true,
            _ => false,
        }
    }

    // ---- timer ----

    fn timer_mode(&self) -> u32 {
        self.lvt[LVT_TIMER] >> 17 & 3
    }
    fn divisor(&self) -> u64 {
        let d = self.timer_divide & 3 | self.timer_divide >> 1 & 4;
        1 << ((d + 1) & 7)
    }
    fn period(&self, khz: u64) -> u64 {
        ticks_to_tsc(u64::from(self.timer_initial) * self.divisor(), khz).max(1)
    }

    /// Ticks until the timer fires, 0 when it is due. `now` is the clock's TSC without adjustment.
    pub fn timer_left(&self, now: u64, tsc_adjust: u64) -> Option<u64> {
        if self.timer_mode() == 2 {
            // Unsigned comparison with the *guest's* counter, as the hardware does.
            (self.tsc_deadline != 0).then(|| self.tsc_deadline.saturating_sub(now.wrapping_add(tsc_adjust)))
        } else {
            (self.timer_expiry != 0).then(|| self.timer_expiry.saturating_sub(now))
        }
    }

    /// Whether the timer runs. Cheap: asked before each turn.
    #[inline]
    pub fn timer_armed(&self) -> bool {
        self.tsc_deadline != 0 || self.timer_expiry != 0
    }

    /// Whether an expiry would interrupt at all; a masked timer need not wake a sleeping machine.
    pub fn timer_wakes(&self) -> bool {
        self.lvt[LVT_TIMER] & LVT_MASKED == 0 && self.software_enabled()
    }

    /// Fires the timer when its time has come. `now` is the clock's TSC without adjustment.
    pub fn poll_timer(&mut self, now: u64, tsc_adjust: u64, khz: u64) {
        if self.timer_left(now, tsc_adjust) != Some(0) {
            return;
        }
        if self.timer_mode() == 2 {
            self.tsc_deadline = 0;
            self.fire_lvt(LVT_TIMER);
            return;
        }
        let due = self.timer_expiry;
        if self.timer_mode() == 1 && self.timer_initial != 0 {
            let period = self.period(khz);
            self.timer_expiry = due.saturating_add(((now - due) / period + 1).saturating_mul(period));
        } else {
            self.timer_expiry = 0;
        }
        self.fire_lvt(LVT_TIMER);
    }

    /// An expiry since the last poll happens before a register of the counting timer is looked at or changed.
    fn catch_up(&mut self, clock: &Clock) {
        if self.timer_expiry != 0 && self.timer_mode() != 2 {
            self.poll_timer(clock.tsc(), 0, clock.tsc_khz());
        }
    }

    fn start_timer(&mut self, out: &Outside) {
        self.timer_expiry = 0;
        if self.timer_initial != 0 && self.timer_mode() != 2 {
            self.timer_expiry = out.clock.tsc().saturating_add(self.period(out.clock.tsc_khz())).max(1);
        }
    }

    /// What is left of the count now. Never 0 while the timer runs: one that is due but has not fired yet (a machine that stands)
    /// must fire in its next life.
    pub fn timer_current(&self, clock: &Clock) -> u32 {
        if self.timer_expiry == 0 || self.timer_mode() == 2 {
            return 0;
        }
        let left = self.timer_expiry.saturating_sub(clock.tsc());
        let ns = clock.ns(left);
        (ns / self.divisor()).max(1).min(u64::from(self.timer_initial)) as u32
    }

    /// The inverse, for restoring.
    pub fn set_timer_current(&mut self, current: u32, clock: &Clock) {
        self.timer_expiry = if current == 0 || self.timer_mode() == 2 {
            0
        } else {
            // Rounded up: `timer_current` right afterwards gives the same count.
            let ns = u128::from(current) * u128::from(self.divisor());
            let ticks = (ns * u128::from(clock.tsc_khz())).div_ceil(1_000_000);
            clock.tsc().saturating_add(ticks as u64).max(1)
        };
    }

    /// WRMSR IA32_TSC_DEADLINE. In any other timer mode the write is ignored.
    pub fn set_tsc_deadline(&mut self, value: u64, out: &Outside) {
        if self.timer_mode() == 2 && self.enabled() {
            self.tsc_deadline = value;
            self.poll_timer(out.clock.tsc(), out.tsc_adjust, out.clock.tsc_khz());
        }
    }

    fn write_lvt(&mut self, entry: usize, value: u32, out: &Outside) {
        self.catch_up(out.clock);
        let mut value = value & LVT_WRITABLE[entry];
        if !self.software_enabled() {
            value |= LVT_MASKED;
        }
        let mode = self.timer_mode();
        self.lvt[entry] = value;
        self.update();
        if entry == LVT_TIMER && mode != self.timer_mode() {
            // A change from or to TSC-deadline disarms; one-shot and periodic keep the running count.
            if mode == 2 || self.timer_mode() == 2 {
                self.tsc_deadline = 0;
                self.timer_expiry = 0;
                self.timer_initial = if self.timer_mode() == 2 { 0 } else { self.timer_initial };
            }
        }
    }

    // ---- registers ----

    fn send_icr(&mut self, out: &Outside) {
        let low = self.icr as u32;
        let mode = (low >> 8 & 7) as u8;
        let m = Message { vector: low as u8, mode, level: low >> 15 & 1 != 0 };
        if mode == INIT && m.level && low >> 14 & 1 == 0 {
            // INIT level de-assert only synchronised arbitration ids of the past.
            return;
        }
        if matches!(mode, FIXED | LOWEST) && m.vector < 16 {
            self.error(ESR_SEND_ILLEGAL);
            return;
        }
        let own = self.vcpu as usize;
        match low >> 18 & 3 {
            1 if matches!(mode, INIT | SIPI) => {}
            1 => out.apics.send_self(own, m),
            2 => out.apics.send_all(m, None),
            3 => out.apics.send_all(m, Some(own)),
            _ => {
                let wide = self.x2apic();
                let id = if wide { (self.icr >> 32) as u32 } else { (self.icr >> 56) as u32 };
                out.apics.send(Destination { id, logical: low >> 11 & 1 != 0, wide }, m);
            }
        }
    }

    fn read_register(&mut self, register: u32, clock: &Clock) -> Result<u32, Refused> {
        Ok(match register {
            reg::ID if self.x2apic() => self.vcpu,
            reg::ID => self.id << 24,
            reg::VERSION => VERSION,
            reg::TPR => self.tpr,
            reg::APR | reg::RRD if !self.x2apic() => 0,
            reg::EOI if !self.x2apic() => 0,
            reg::PPR => self.ppr(),
            reg::LDR => self.ldr,
            reg::DFR if !self.x2apic() => self.dfr,
            reg::SVR => self.svr,
            reg::ISR..reg::TMR => self.isr[(register - reg::ISR) as usize],
            reg::TMR..reg::IRR => self.tmr[(register - reg::TMR) as usize],
            reg::IRR..reg::ESR => self.irr[(register - reg::IRR) as usize],
            reg::ESR => self.esr,
            reg::ICR => self.icr as u32,
            reg::ICR2 if !self.x2apic() => (self.icr >> 32) as u32,
            0x32..=0x37 => self.lvt[(register - reg::LVT) as usize],
            reg::TIMER_INITIAL => self.timer_initial,
            reg::TIMER_CURRENT => {
                self.catch_up(clock);
                self.timer_current(clock)
            }
            reg::TIMER_DIVIDE => self.timer_divide,
            _ => return Err(Refused),
        })
    }

    fn write_register(&mut self, register: u32, value: u32, out: &Outside) -> Result<(), Refused> {
        let x2 = self.x2apic();
        match register {
            reg::ID if !x2 => {
                self.id = value >> 24;
                self.publish(out.apics);
            }
            reg::TPR => {
                if x2 && value > 0xff {
                    return Err(Refused);
                }
                self.tpr = value & 0xff;
                self.update();
            }
            reg::EOI => {
                if x2 && value != 0 {
                    return Err(Refused);
                }
                self.eoi(out.apics);
            }
            reg::LDR if !x2 => {
                self.ldr = value & 0xff00_0000;
                self.publish(out.apics);
            }
            reg::DFR if !x2 => {
                self.dfr = value | 0x0fff_ffff;
                self.publish(out.apics);
            }
            reg::SVR => {
                if x2 && value & !0x1ff != 0 {
                    return Err(Refused);
                }
                self.svr = value & 0x1ff;
                if !self.software_enabled() {
                    for lvt in &mut self.lvt {
                        *lvt |= LVT_MASKED;
                    }
                    self.update();
                }
                self.publish(out.apics);
            }
            reg::ESR => {
                if x2 && value != 0 {
                    return Err(Refused);
                }
                self.esr = std::mem::take(&mut self.esr_pending);
            }
            reg::ICR => {
                // Bit 12 (delivery status) reads as idle: a message has arrived when the write is done.
                self.icr = self.icr & !0xffff_ffff | u64::from(value & 0x000c_cfff);
                self.send_icr(out);
            }
            reg::ICR2 if !x2 => self.icr = self.icr & 0xffff_ffff | u64::from(value & 0xff00_0000) << 32,
            0x32..=0x37 => {
                let entry = (register - reg::LVT) as usize;
                if x2 && value & !(LVT_WRITABLE[entry] | 1 << 12 | 1 << 14) != 0 {
                    return Err(Refused);
                }
                self.write_lvt(entry, value, out);
            }
            reg::TIMER_INITIAL => {
                if self.timer_mode() != 2 {
                    self.timer_initial = value;
                    self.start_timer(out);
                }
            }
            reg::TIMER_DIVIDE => {
                if x2 && value & !0xb != 0 {
                    return Err(Refused);
                }
                let current = self.timer_current(out.clock);
                self.timer_divide = value & 0xb;
                self.set_timer_current(current, out.clock);
            }
            reg::SELF_IPI if x2 => {
                if value > 0xff {
                    return Err(Refused);
                }
                if value < 16 {
                    self.error(ESR_SEND_ILLEGAL);
                } else {
                    out.apics.send_self(self.vcpu as usize, Message { vector: value as u8, mode: FIXED, level: false });
                }
            }
            // Read-only registers ignore writes by MMIO and are #GP by MSR.
            reg::VERSION | reg::PPR | reg::APR | reg::RRD | reg::TIMER_CURRENT | reg::ISR..reg::ESR if !x2 => {}
            _ => return Err(Refused),
        }
        Ok(())
    }

    /// xAPIC MMIO. Registers are 32 bits at 16-byte steps; narrower reads inside a register work, others give zero.
    pub fn mmio_read(&mut self, offset: u64, data: &mut [u8], clock: &Clock) {
        data.fill(0);
        let (register, at) = ((offset >> 4) as u32, (offset & 15) as usize);
        if at + data.len() > 4 {
            // Wide reads see the low register only; it is what the one wide reader in the wild (memcpy dumps) expects.
            if at >= 4 {
                return;
            }
        }
        match self.read_register(register, clock) {
            Ok(value) => {
                for (to, from) in data.iter_mut().zip(&value.to_le_bytes()[at..]) {
                    *to = *from;
                }
            }
            Err(Refused) => self.error(ESR_ILLEGAL_REGISTER),
        }
    }

    /// xAPIC MMIO. Only aligned 32-bit writes count; of wider ones the low half.
    pub fn mmio_write(&mut self, offset: u64, data: &[u8], out: &Outside) {
        let Some(bytes) = data.first_chunk::<4>() else { return };
        if offset & 15 != 0 {
            return;
        }
        if self.write_register((offset >> 4) as u32, u32::from_le_bytes(*bytes), out).is_err() {
            self.error(ESR_ILLEGAL_REGISTER);
        }
    }

    /// RDMSR 0x800–0x8ff.
    pub fn msr_read(&mut self, msr: u32, clock: &Clock) -> Result<u64, Refused> {
        if !self.x2apic() {
            return Err(Refused);
        }
        match msr - 0x800 {
            reg::ICR => Ok(self.icr),
            // Write-only, and what x2APIC mode lacks.
            reg::EOI | reg::SELF_IPI | reg::ICR2 | reg::DFR | reg::APR | reg::RRD => Err(Refused),
            register => self.read_register(register, clock).map(u64::from),
        }
    }

    /// WRMSR 0x800–0x8ff.
    pub fn msr_write(&mut self, msr: u32, value: u64, out: &Outside) -> Result<(), Refused> {
        if !self.x2apic() {
            return Err(Refused);
        }
        match msr - 0x800 {
            reg::ICR => {
                if value & 0xfff3_2000 != 0 {
                    return Err(Refused);
                }
                self.icr = value & 0xffff_ffff_000c_cfff;
                self.send_icr(out);
                Ok(())
            }
            reg::ICR2 | reg::DFR => Err(Refused),
            _ if value >> 32 != 0 => Err(Refused),
            register => self.write_register(register, value as u32, out),
        }
    }
}

impl Core {
    /// Reads `size` bytes at `offset` of the xAPIC page.
    pub fn lapic_read(&mut self, offset: u64, size: u8) -> u64 {
        let mut data = [0; 8];
        let size = usize::from(size).min(8);
        self.with_lapic(|lapic, out| lapic.mmio_read(offset, &mut data[..size], out.clock));
        u64::from_le_bytes(data)
    }

    /// Writes `size` bytes at `offset` of the xAPIC page.
    pub fn lapic_write(&mut self, offset: u64, size: u8, value: u64) {
        let data = value.to_le_bytes();
        let size = usize::from(size).min(8);
        self.with_lapic(|lapic, out| lapic.mmio_write(offset, &data[..size], out));
        self.leave();
    }
}
