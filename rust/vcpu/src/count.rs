//! Time as a count of instructions: what makes two runs of a machine the same.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::clock::{ClockState, scale};

/// What one instruction takes: a processor of 1000 MIPS, near enough to what engines reach that guests see familiar times.
pub const NS_PER_INSTRUCTION: u64 = 1;

/// The instructions that all vCPUs of a machine have retired, and the time that they have slept through.
///
/// Guarantees: time moves by these two and nothing else; it never goes back. Written by the engine's thread only.
#[derive(Debug)]
pub struct Count {
    base: ClockState,
    retired: AtomicU64,
    idle_ns: AtomicU64,
    limit: AtomicU64,
}

impl Count {
    pub(crate) fn new(base: ClockState) -> Self {
        Self { base, retired: AtomicU64::new(0), idle_ns: AtomicU64::new(0), limit: AtomicU64::new(u64::MAX) }
    }

    /// Instructions of all vCPUs since the clock was made.
    pub fn retired(&self) -> u64 {
        self.retired.load(Ordering::Relaxed)
    }

    /// The engine says how far it is: before a device or a clock is looked at, and after each turn.
    pub fn set_retired(&self, instructions: u64) {
        self.retired.store(instructions, Ordering::Relaxed);
    }

    /// The engine stops when so many are retired.
    pub fn limit(&self) -> u64 {
        self.limit.load(Ordering::Relaxed)
    }

    pub fn set_limit(&self, instructions: u64) {
        self.limit.store(instructions, Ordering::Relaxed);
    }

    /// Nanoseconds that no vCPU had anything to do, since the clock was made.
    pub fn idle_ns(&self) -> u64 {
        self.idle_ns.load(Ordering::Relaxed)
    }

    /// Nanoseconds until the TSC has moved on by `ticks`, rounded up.
    pub fn until(&self, ticks: u64) -> u64 {
        let now = self.ns();
        let tsc = u128::from(scale(now, self.base.tsc_khz)) + u128::from(ticks);
        let then = (tsc * 1_000_000).div_ceil(u128::from(self.base.tsc_khz.max(1))).min(u128::from(u64::MAX)) as u64;
        then.saturating_sub(now)
    }

    /// Nobody had anything to do for so many nanoseconds.
    pub fn sleep(&self, ns: u64) {
        self.idle_ns.fetch_add(ns, Ordering::Relaxed);
    }

    fn ns(&self) -> u64 {
        self.retired().saturating_mul(NS_PER_INSTRUCTION).saturating_add(self.idle_ns())
    }

    pub(crate) fn state(&self) -> ClockState {
        let ns = self.ns();
        let ticks = scale(ns, self.base.tsc_khz);
        ClockState {
            tsc_khz: self.base.tsc_khz,
            tsc: self.base.tsc.wrapping_add(ticks),
            // By way of the ticks, as in the host's time: a kvm-clock page extrapolates from them.
            boot_ns: self
                .base
                .boot_ns
                .saturating_add((u128::from(ticks) * 1_000_000 / u128::from(self.base.tsc_khz.max(1))) as u64),
            wall_ns: self.base.wall_ns.saturating_add(ns),
            host_wall_ns: self.base.host_wall_ns.saturating_add(ns),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Clock;

    fn saved(tsc_khz: u64) -> ClockState {
        ClockState { tsc_khz, tsc: 7_000, boot_ns: 3_500, wall_ns: 5_000_000_000, host_wall_ns: 6_000_000_000 }
    }

    #[test]
    fn only_instructions_move_it() {
        let clock = Clock::counted(saved(2_000_000));
        clock.resume();
        assert_eq!(clock.state(), saved(2_000_000));
        clock.count().unwrap().set_retired(1000);
        let now = clock.state();
        assert_eq!((now.tsc, now.boot_ns, now.wall_ns), (9_000, 4_500, 5_000_001_000));
        clock.pause();
        assert_eq!(clock.state(), now);
        assert_eq!(clock.tsc(), 9_000);
        // kvm-clock pages go on extrapolating from where they began.
        assert_eq!(clock.anchor(), saved(2_000_000));
        assert!(!clock.behind() && !clock.native() && clock.native_offset().is_none());
    }

    #[test]
    fn a_sleep_ends_at_its_deadline() {
        for khz in [1_000, 999_999, 2_394_464, 3_294_123, 100_000_000] {
            let clock = Clock::counted(saved(khz));
            let count = clock.count().unwrap();
            for (retired, ticks) in [(1, 1), (12_345, 77_777_777), (12_346, 1), (99_999_999, 3_333_333_333)] {
                count.set_retired(retired);
                let deadline = clock.tsc() + ticks;
                count.sleep(count.until(ticks));
                assert!(clock.tsc() >= deadline && clock.tsc() - deadline <= khz / 1_000_000 + 1, "{khz}");
            }
        }
    }
}
