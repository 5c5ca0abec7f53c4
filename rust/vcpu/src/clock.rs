//! A machine's time. TSC, deadlines, PM timer, RTC and kvm-clock are functions of it; it stands still while paused.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::count::Count;

/// What is saved of a clock. Times in nanoseconds, frequency in kHz.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClockState {
    pub tsc_khz: u64,
    /// Guest TSC (before TSC_ADJUST and per-vCPU offsets) when the clock stopped.
    pub tsc: u64,
    /// Nanoseconds that the machine has lived (kvm-clock's system time).
    pub boot_ns: u64,
    /// The guest's wall clock when it stopped: nanoseconds since 1970.
    pub wall_ns: u64,
    /// The host's wall clock when it stopped.
    pub host_wall_ns: u64,
}

#[derive(Debug, Clone, Copy)]
struct Epoch {
    started: Instant,
    state: ClockState,
    /// Nanoseconds that passed while the machine did not exist and that it has not lived through yet.
    owed: u64,
}

/// The largest step in which a clock catches up. Two of them stay below what Linux's watchdogs take for a hang (soft lockups after
/// 20 s, RCU stalls after 21 s): that a step is announced as a pause does not reach every CPU before the first one's tick. A
/// jump of some 15 minutes would even overflow the 64 bits in which Linux multiplies a clock source's difference.
const STEP_MAX_NS: u64 = 8_000_000_000;
const STEP_MIN_NS: u64 = 50_000_000;
/// The part of what is owed that one step makes up. Scheduler clocks charge a step to whoever runs: many shrinking steps
/// hit the tasks in turn and even out.
const STEP_PART: u64 = 32;

/// Runs with the host's monotonic time between `resume` and `pause`, or with the instructions that an engine counts.
pub struct Clock {
    tsc_khz: u64,
    running: AtomicBool,
    /// Guest TSC = host ticks + offset while running (only when the rates are equal, see `native`).
    offset: AtomicU64,
    native: bool,
    /// Whether `owed` is not zero.
    behind: AtomicBool,
    /// Where time is a count of instructions.
    count: Option<Count>,
    epoch: Mutex<Epoch>,
}

fn host_wall_ns() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos() as u64)
}

#[cfg(target_arch = "x86_64")]
fn host_ticks() -> u64 {
    // SAFETY: RDTSC has no preconditions in user mode on any host that we run on.
    unsafe { core::arch::x86_64::_rdtsc() }
}
#[cfg(not(target_arch = "x86_64"))]
fn host_ticks() -> u64 {
    0
}

/// Ticks of a TSC of that rate in `ns` nanoseconds, rounded down.
pub(crate) fn scale(ns: u64, tsc_khz: u64) -> u64 {
    (u128::from(ns) * u128::from(tsc_khz) / 1_000_000) as u64
}

impl Clock {
    /// A clock that has never run. `host_khz` is the host's own TSC rate, 0 when it has none that can be used.
    pub fn new(tsc_khz: u64, host_khz: u64) -> Self {
        let wall = host_wall_ns();
        Self::from_state(ClockState { tsc_khz, tsc: 0, boot_ns: 0, wall_ns: wall, host_wall_ns: wall }, host_khz)
    }

    /// A stopped clock that goes on from `state` as if nothing had happened since.
    pub fn from_state(state: ClockState, host_khz: u64) -> Self {
        Self::owing(state, host_khz, 0)
    }

    /// `clock=advance`: goes on from `state`, and once it runs makes up for the time that has passed since, step by step: whoever
    /// runs the vCPUs calls [`Clock::catch_up`]. A host clock that went back adds nothing.
    pub fn advancing(state: ClockState, host_khz: u64) -> Self {
        Self::owing(state, host_khz, host_wall_ns().saturating_sub(state.host_wall_ns))
    }

    /// Goes on from `state` with the instructions that the engine counts: the host's time does not matter.
    pub fn counted(state: ClockState) -> Self {
        Self { count: Some(Count::new(state)), ..Self::owing(state, 0, 0) }
    }

    fn owing(state: ClockState, host_khz: u64, owed: u64) -> Self {
        Self {
            behind: AtomicBool::new(owed > 0),
            tsc_khz: state.tsc_khz,
            running: AtomicBool::new(false),
            offset: AtomicU64::new(0),
            native: cfg!(target_arch = "x86_64") && host_khz == state.tsc_khz,
            count: None,
            epoch: Mutex::new(Epoch { started: Instant::now(), state, owed }),
        }
    }

    fn epoch(&self) -> std::sync::MutexGuard<'_, Epoch> {
        self.epoch.lock().unwrap_or_else(|e| e.into_inner())
    }

    pub fn tsc_khz(&self) -> u64 {
        self.tsc_khz
    }

    /// The count of instructions that is this machine's time; `None` where the host's is.
    pub fn count(&self) -> Option<&Count> {
        self.count.as_ref()
    }

    /// Nanoseconds that `ticks` of the guest's TSC take, rounded down. `boot_ns` moves by this and nothing else, so that a
    /// kvm-clock page that the guest extrapolates by TSC never runs ahead of the next one.
    pub fn ns(&self, ticks: u64) -> u64 {
        (u128::from(ticks) * 1_000_000 / u128::from(self.tsc_khz.max(1))).min(u128::from(u64::MAX)) as u64
    }

    /// State at the last `resume` (or at the pause, while stopped): one point that all kvm-clock pages extrapolate from.
    pub fn anchor(&self) -> ClockState {
        self.epoch().state
    }

    /// What the guest's TSC is ahead of the host's own counter, while the clock runs; `None` where their rates differ.
    pub fn native_offset(&self) -> Option<u64> {
        (self.native && self.running.load(Ordering::Acquire)).then(|| self.offset.load(Ordering::Relaxed))
    }

    /// Whether the guest's TSC and the host's own counter have one rate.
    pub fn native(&self) -> bool {
        self.native
    }

    /// The guest's TSC now.
    pub fn tsc(&self) -> u64 {
        if self.native && self.running.load(Ordering::Acquire) {
            return host_ticks().wrapping_add(self.offset.load(Ordering::Relaxed));
        }
        self.state().tsc
    }

    /// Everything at this moment; the clock goes on. What it still owes shows as an earlier `host_wall_ns`, so that it is
    /// not forgotten when this is saved.
    pub fn state(&self) -> ClockState {
        self.now(&self.epoch())
    }

    fn now(&self, epoch: &Epoch) -> ClockState {
        if let Some(count) = &self.count {
            return count.state();
        }
        if !self.running.load(Ordering::Acquire) {
            return epoch.state;
        }
        let ns = epoch.started.elapsed().as_nanos() as u64;
        let tsc = if self.native {
            host_ticks().wrapping_add(self.offset.load(Ordering::Relaxed))
        } else {
            epoch.state.tsc.wrapping_add(scale(ns, self.tsc_khz))
        };
        ClockState {
            tsc_khz: self.tsc_khz,
            tsc,
            boot_ns: epoch.state.boot_ns.saturating_add(self.ns(tsc.wrapping_sub(epoch.state.tsc))),
            wall_ns: epoch.state.wall_ns.saturating_add(ns),
            host_wall_ns: host_wall_ns().saturating_sub(epoch.owed),
        }
    }

    fn start(&self, epoch: &mut Epoch) {
        epoch.started = Instant::now();
        self.offset.store(epoch.state.tsc.wrapping_sub(host_ticks()), Ordering::Relaxed);
    }

    pub fn resume(&self) {
        let mut epoch = self.epoch();
        if self.running.load(Ordering::Acquire) {
            return;
        }
        self.start(&mut epoch);
        self.running.store(true, Ordering::Release);
    }

    pub fn pause(&self) {
        let mut epoch = self.epoch();
        let now = self.now(&epoch);
        // A counted clock has one anchor for all its life: how often it was stopped must not show.
        if self.running.swap(false, Ordering::AcqRel) && self.count.is_none() {
            epoch.state = now;
        }
    }

    /// Whether there is time to catch up with. One relaxed load.
    pub fn behind(&self) -> bool {
        self.behind.load(Ordering::Relaxed)
    }

    /// Moves a running clock one step on towards where it would be had the machine never stood still. To be called while no vCPU
    /// executes; afterwards the guests' clock pages must be written anew, as after a pause.
    pub fn catch_up(&self) {
        self.catch_up_by(|owed| (owed / STEP_PART).clamp(STEP_MIN_NS, STEP_MAX_NS).min(owed));
    }

    /// Likewise, all of it in one step: for vCPUs that cannot be stopped in between at little cost.
    pub fn catch_up_at_once(&self) {
        self.catch_up_by(|owed| owed);
    }

    fn catch_up_by(&self, step: impl FnOnce(u64) -> u64) {
        self.step(&mut self.epoch(), step);
    }

    fn step(&self, epoch: &mut Epoch, step: impl FnOnce(u64) -> u64) {
        if epoch.owed == 0 || !self.running.load(Ordering::Acquire) {
            return;
        }
        let mut now = self.now(epoch);
        let step = step(epoch.owed);
        epoch.owed -= step;
        let ticks = scale(step, self.tsc_khz);
        now.tsc = now.tsc.wrapping_add(ticks);
        now.boot_ns = now.boot_ns.saturating_add(self.ns(ticks));
        now.wall_ns = now.wall_ns.saturating_add(step);
        now.host_wall_ns = now.host_wall_ns.saturating_add(step);
        epoch.state = now;
        self.start(epoch);
        self.behind.store(epoch.owed > 0, Ordering::Relaxed);
    }

    /// How many ticks the host's own counter is ahead of what a guest whose TSC is `adjust` ahead of this clock has seen, while the
    /// clock runs at the host's rate.
    pub fn host_ahead(&self, adjust: u64) -> i64 {
        adjust.wrapping_add(self.offset.load(Ordering::Relaxed)).wrapping_neg() as i64
    }

    /// For an engine whose guests read the host's own counter, whatever they are given: from now on the guest's TSC, which is
    /// `adjust` ahead of this clock, is the host's. Takes in what the clock owes, all of it in one step; besides that time does
    /// not move. Gives what every deadline moves by. The clock runs, at the host's rate.
    pub fn follow_host(&self, adjust: u64) -> u64 {
        let mut epoch = self.epoch();
        self.step(&mut epoch, |owed| owed);
        let now = self.now(&epoch);
        let shift = self.host_ahead(adjust) as u64;
        epoch.state = ClockState { tsc: now.tsc.wrapping_add(shift), ..now };
        epoch.started = Instant::now();
        self.offset.store(adjust.wrapping_neg(), Ordering::Relaxed);
        shift
    }

    /// While stopped: the guest has already seen `boot_ns`, so its time may not go back behind it.
    pub fn not_before(&self, boot_ns: u64) {
        let mut epoch = self.epoch();
        if !self.running.load(Ordering::Acquire) {
            epoch.state.boot_ns = epoch.state.boot_ns.max(boot_ns);
        }
    }

    /// How long until the guest's TSC reaches `deadline`; zero when it has.
    pub fn until(&self, deadline: u64) -> Duration {
        let left = deadline.wrapping_sub(self.tsc()) as i64;
        if left <= 0 {
            return Duration::ZERO;
        }
        Duration::from_nanos((left as u128 * 1_000_000 / u128::from(self.tsc_khz.max(1))).min(u128::from(u64::MAX)) as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: u64 = 3_600_000_000_000;

    fn saved(ago: u64) -> ClockState {
        let host = host_wall_ns() - ago;
        ClockState { tsc_khz: 2_000_000, tsc: 7_000, boot_ns: 3_500, wall_ns: host, host_wall_ns: host }
    }

    #[test]
    fn a_frozen_clock_owes_nothing() {
        let clock = Clock::from_state(saved(HOUR), 0);
        clock.resume();
        assert!(!clock.behind());
        assert!(clock.state().tsc < 2_000_000_000);
    }

    #[test]
    fn an_advancing_clock_catches_up_in_steps_that_a_guest_can_take() {
        let clock = Clock::advancing(saved(100 * HOUR), 0);
        assert_eq!(clock.state().tsc, 7_000);
        clock.resume();
        let (mut steps, mut before) = (0, clock.state());
        while clock.behind() {
            clock.catch_up();
            let now = clock.state();
            let moved = now.boot_ns - before.boot_ns;
            assert!(moved < STEP_MAX_NS + 1_000_000_000, "{moved} ns at once");
            assert_eq!(clock.ns(now.tsc - clock.anchor().tsc), now.boot_ns - clock.anchor().boot_ns);
            (steps, before) = (steps + 1, now);
        }
        assert!((45_000..46_000).contains(&steps), "{steps} steps");
        let now = clock.state();
        assert!((100 * HOUR..101 * HOUR).contains(&(now.boot_ns)));
        assert!(now.wall_ns.abs_diff(host_wall_ns()) < 1_000_000_000);
        clock.catch_up();
        assert!(clock.state().boot_ns < 101 * HOUR);
    }

    #[test]
    fn what_is_owed_is_not_forgotten_when_the_clock_is_saved_meanwhile() {
        let clock = Clock::advancing(saved(100 * HOUR), 0);
        clock.resume();
        for _ in 0..2000 {
            clock.catch_up();
        }
        clock.pause();
        let half = clock.state();
        assert!(half.boot_ns > HOUR && half.boot_ns < 50 * HOUR);
        let again = Clock::advancing(half, 0);
        again.resume();
        while again.behind() {
            again.catch_up();
        }
        assert!(again.state().wall_ns.abs_diff(host_wall_ns()) < 1_000_000_000);
        // Saved before it ever ran: the same.
        assert_eq!(Clock::advancing(half, 0).state(), half);
    }

    #[test]
    fn a_clock_that_follows_the_host_keeps_its_time_and_says_how_far_deadlines_move() {
        let state = ClockState { tsc_khz: 2_000_000, ..saved(HOUR) };
        for owed in [false, true] {
            let make = if owed { Clock::advancing } else { Clock::from_state };
            let clock = make(state, 2_000_000);
            clock.resume();
            let before = clock.state();
            assert!(clock.host_ahead(5) > 0);
            let shift = clock.follow_host(5);
            let now = clock.state();
            assert!(host_ticks().abs_diff(clock.tsc() + 5) < 1_000_000_000);
            assert_eq!(clock.native_offset(), Some(0u64.wrapping_sub(5)));
            let moved = now.boot_ns - before.boot_ns;
            assert!(if owed { moved >= HOUR } else { moved < HOUR / 100 }, "{moved}");
            // Something due in `moved` nanoseconds is due when the guest's time has moved as much.
            let due = (before.tsc + scale(moved, 2_000_000)).wrapping_add(shift);
            assert!(now.tsc.abs_diff(due) < 2_000_000, "{} {due}", now.tsc);
            assert!(!clock.behind());
            assert_eq!((clock.host_ahead(5), clock.follow_host(5)), (0, 0));
            clock.pause();
            assert!(clock.state().tsc >= now.tsc);
        }
    }

    #[test]
    fn a_clock_knows_that_the_host_is_behind() {
        let clock = Clock::from_state(ClockState { tsc: host_ticks() + (1 << 60), ..saved(0) }, 2_000_000);
        clock.resume();
        assert!((-1 << 60..-1 << 59).contains(&clock.host_ahead(0)));
        // A TSC_ADJUST that makes up for it.
        assert!(clock.host_ahead((1u64 << 60).wrapping_neg()) >= 0);
    }

    #[test]
    fn a_host_clock_that_went_back_adds_nothing() {
        let mut state = saved(0);
        state.host_wall_ns += HOUR;
        assert!(!Clock::advancing(state, 0).behind());
    }
}
