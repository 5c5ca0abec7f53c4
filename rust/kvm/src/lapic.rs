//! The LAPIC: KVM's register page, and the timer that goes on counting in the kernel while the vCPU stands.

use kvm_bindings::kvm_lapic_state;
use kvm_ioctls::VcpuFd;
use vcpu::state::Lapic;

use crate::convert::{Checked, refuse, set};
use crate::failed;

const DELIVERY_STATUS: u32 = 1 << 12;

fn apic_get(page: &kvm_lapic_state, at: usize) -> u32 {
    u32::from_le_bytes(std::array::from_fn(|i| page.regs[at + i] as u8))
}

fn apic_put(page: &mut kvm_lapic_state, at: usize, value: u32) {
    for (at, byte) in (at..).zip(value.to_le_bytes()) {
        page.regs[at] = byte as _;
    }
}

pub(crate) fn deadline_mode(lvt_timer: u32) -> bool {
    lvt_timer >> 17 & 3 == 2
}

fn one_shot(lvt_timer: u32) -> bool {
    lvt_timer >> 17 & 3 == 0
}

const MASKED: u32 = 1 << 16;
const ENABLED: u32 = 1 << 8;

/// What KVM's register page does not say of a timer that counts down (one-shot or periodic).
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Timer {
    /// Initial count of a one-shot timer that had run out before the vCPU was loaded. KVM is told of none: it would take a
    /// current count of zero for one that runs out now.
    spent: u32,
    /// What was left when the vCPU stopped. A timer that runs out between then and the capture is not in the page: KVM makes
    /// an interrupt of it when the vCPU runs next.
    left: u32,
}

impl Timer {
    /// To be called when the vCPU has just stopped. Gives whether the timer may have run out before that, unnoticed: a periodic
    /// one does not show it.
    pub fn stopped(&mut self, fd: &VcpuFd) -> Checked<bool> {
        let page = get(fd)?;
        let lvt_timer = apic_get(&page, 0x320);
        let counts = !deadline_mode(lvt_timer) && apic_get(&page, 0x380) != 0;
        self.left = if counts { apic_get(&page, 0x390) } else { 0 };
        Ok(counts && (self.left == 0 || !one_shot(lvt_timer)))
    }

    /// Whether it has run out since, the page being one of later.
    fn ran_out(self, page: &kvm_lapic_state) -> bool {
        let now = apic_get(page, 0x390);
        let counts = !deadline_mode(apic_get(page, 0x320)) && apic_get(page, 0x380) != 0;
        counts && (now > self.left || now == 0 && self.left > 0)
    }
}

fn get(fd: &VcpuFd) -> Checked<kvm_lapic_state> {
    fd.get_lapic().map_err(|e| failed("KVM_GET_LAPIC", e))
}

/// `deadline`: reads the TSC deadline. The two agree: one that passes in between is either still armed or already an interrupt.
pub(crate) fn capture(fd: &VcpuFd, x2apic: bool, timer: Timer, deadline: impl Fn() -> Checked<u64>) -> Checked<(Lapic, u64)> {
    let mut armed = deadline()?;
    loop {
        let page = get(fd)?;
        let now = deadline()?;
        if now == armed {
            return Ok((save(&page, x2apic, timer), armed));
        }
        armed = now;
    }
}

pub(crate) fn restore(fd: &VcpuFd, lapic: &Lapic, x2apic: bool) -> Checked<Timer> {
    let mut page = get(fd)?;
    let timer = load(&mut page, lapic, x2apic)?;
    set("lapic", fd.set_lapic(&page))?;
    Ok(timer)
}

fn save(page: &kvm_lapic_state, x2apic: bool, timer: Timer) -> Lapic {
    let mut lapic = registers(page, x2apic);
    if timer.ran_out(page) && lapic.lvt_timer & MASKED == 0 && lapic.svr & ENABLED != 0 {
        let (word, bit) = (lapic.lvt_timer as usize >> 5 & 7, 1 << (lapic.lvt_timer & 31));
        lapic.irr[word] |= bit;
        lapic.tmr[word] &= !bit;
    }
    if one_shot(lapic.lvt_timer) && lapic.timer_initial == 0 {
        lapic.timer_initial = timer.spent;
    }
    lapic
}

fn registers(page: &kvm_lapic_state, x2apic: bool) -> Lapic {
    let r = |at| apic_get(page, at);
    let words = |at: usize| std::array::from_fn(|i| r(at + 16 * i));
    let lvt = |at| r(at) & !DELIVERY_STATUS;
    let timer_initial = r(0x380);
    Lapic {
        id: if x2apic { r(0x20) } else { r(0x20) >> 24 },
        tpr: r(0x80),
        ldr: r(0xd0),
        dfr: r(0xe0) | 0x0fff_ffff,
        svr: r(0xf0),
        esr: r(0x280),
        esr_pending: 0,
        icr: u64::from(r(0x300) & !DELIVERY_STATUS) | u64::from(r(0x310)) << 32,
        isr: words(0x100),
        tmr: words(0x180),
        irr: words(0x200),
        // KVM has the entry only where machine checks are configured.
        lvt_cmci: 1 << 16,
        lvt_timer: lvt(0x320),
        lvt_thermal: lvt(0x330),
        lvt_perf: lvt(0x340),
        lvt_lint0: lvt(0x350),
        lvt_lint1: lvt(0x360),
        lvt_error: lvt(0x370),
        timer_initial,
        timer_current: if deadline_mode(r(0x320)) { 0 } else { r(0x390).min(timer_initial) },
        timer_divide: r(0x3e0) & 0xb,
    }
}

fn load(page: &mut kvm_lapic_state, l: &Lapic, x2apic: bool) -> Checked<Timer> {
    if !x2apic && l.id > 0xff {
        return refuse("lapic.id", format!("{:#x} does not fit 8 bits", l.id));
    }
    for (name, words) in [("isr", &l.isr), ("irr", &l.irr)] {
        if words[0] & 0xffff != 0 {
            return refuse(&format!("lapic.{name}"), "vectors below 16 cannot be");
        }
    }
    let spent = if one_shot(l.lvt_timer) && l.timer_current == 0 { l.timer_initial } else { 0 };
    let mut put = |at, value| apic_put(page, at, value);
    put(0x20, if x2apic { l.id } else { l.id << 24 });
    for (at, value) in [
        (0x80, l.tpr),
        (0xd0, l.ldr),
        (0xe0, l.dfr),
        (0xf0, l.svr),
        (0x280, l.esr),
        (0x300, l.icr as u32),
        (0x310, (l.icr >> 32) as u32),
        (0x320, l.lvt_timer),
        (0x330, l.lvt_thermal),
        (0x340, l.lvt_perf),
        (0x350, l.lvt_lint0),
        (0x360, l.lvt_lint1),
        (0x370, l.lvt_error),
        (0x380, l.timer_initial - spent),
        (0x390, l.timer_current),
        (0x3e0, l.timer_divide),
    ] {
        put(at, value);
    }
    for (at, words) in [(0x100, &l.isr), (0x180, &l.tmr), (0x200, &l.irr)] {
        for (i, &word) in words.iter().enumerate() {
            put(at + 16 * i, word);
        }
    }
    Ok(Timer { spent, left: 0 })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(lvt_timer: u32, initial: u32, current: u32) -> kvm_lapic_state {
        let mut page = kvm_lapic_state::default();
        for (at, value) in [(0xf0, 0x1ff), (0x320, lvt_timer), (0x380, initial), (0x390, current)] {
            apic_put(&mut page, at, value);
        }
        page
    }

    #[test]
    fn a_timer_that_runs_out_during_the_capture_is_an_interrupt() {
        let (one_shot, periodic) = (0x51, 0x2_0051);
        let fires = |lvt, left, current| save(&page(lvt, 1000, current), false, Timer { spent: 0, left }).irr[2] != 0;
        assert!(fires(one_shot, 5, 0));
        assert!(!fires(one_shot, 5, 3));
        assert!(!fires(one_shot, 0, 0), "it ran out before");
        assert!(fires(periodic, 5, 990));
        assert!(!fires(periodic, 990, 5));
        assert!(!fires(one_shot | MASKED, 5, 0));
        assert!(!fires(0x4_0051, 5, 0), "a deadline has no count");
    }

    #[test]
    fn a_one_shot_timer_that_has_run_out_does_not_run_out_again() {
        let saved = registers(&page(0x51, 1000, 0), false);
        let mut loaded = kvm_lapic_state::default();
        let timer = load(&mut loaded, &saved, false).unwrap();
        assert_eq!(apic_get(&loaded, 0x380), 0);
        assert_eq!(save(&loaded, false, timer), saved);
        // The guest has started it again.
        assert_eq!(save(&page(0x51, 700, 600), false, timer).timer_initial, 700);
        // A running one, and a periodic one, are KVM's business.
        for saved in [registers(&page(0x51, 1000, 1), false), registers(&page(0x2_0051, 1000, 0), false)] {
            load(&mut loaded, &saved, false).unwrap();
            assert_eq!(apic_get(&loaded, 0x380), 1000);
        }
    }
}
