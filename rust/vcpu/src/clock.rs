//! A machine's time. TSC, deadlines, PM timer, RTC and kvm-clock are functions of it; it stands still while paused.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

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
}

/// Host-driven clock: runs with the host's monotonic time between `resume` and `pause`.
pub struct Clock {
    tsc_khz: u64,
    running: AtomicBool,
    /// Guest TSC = host ticks + offset while running (only when the rates are equal, see `native`).
    offset: AtomicU64,
    native: bool,
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

fn scale(ns: u64, tsc_khz: u64) -> u64 {
    (u128::from(ns) * u128::from(tsc_khz) / 1_000_000) as u64
}

impl Clock {
    /// A clock that has never run. `host_khz` is the host's own TSC rate, 0 when it has none that can be used.
    pub fn new(tsc_khz: u64, host_khz: u64) -> Self {
        let wall = host_wall_ns();
        Self::from_state(ClockState { tsc_khz, tsc: 0, boot_ns: 0, wall_ns: wall, host_wall_ns: wall }, host_khz)
    }

    /// A stopped clock that goes on from `state`. For `clock=advance` call [`ClockState::advanced`] first.
    pub fn from_state(state: ClockState, host_khz: u64) -> Self {
        Self {
            tsc_khz: state.tsc_khz,
            running: AtomicBool::new(false),
            offset: AtomicU64::new(0),
            native: cfg!(target_arch = "x86_64") && host_khz == state.tsc_khz,
            epoch: Mutex::new(Epoch { started: Instant::now(), state }),
        }
    }

    fn epoch(&self) -> std::sync::MutexGuard<'_, Epoch> {
        self.epoch.lock().unwrap_or_else(|e| e.into_inner())
    }

    pub fn tsc_khz(&self) -> u64 {
        self.tsc_khz
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

    /// The guest's TSC now.
    pub fn tsc(&self) -> u64 {
        if self.native && self.running.load(Ordering::Acquire) {
            return host_ticks().wrapping_add(self.offset.load(Ordering::Relaxed));
        }
        self.state().tsc
    }

    /// Everything at this moment; the clock goes on.
    pub fn state(&self) -> ClockState {
        let epoch = self.epoch();
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
            host_wall_ns: host_wall_ns(),
        }
    }

    pub fn resume(&self) {
        let mut epoch = self.epoch();
        if self.running.load(Ordering::Acquire) {
            return;
        }
        epoch.started = Instant::now();
        self.offset.store(epoch.state.tsc.wrapping_sub(host_ticks()), Ordering::Relaxed);
        self.running.store(true, Ordering::Release);
    }

    pub fn pause(&self) {
        let now = self.state();
        let mut epoch = self.epoch();
        if self.running.swap(false, Ordering::AcqRel) {
            epoch.state = now;
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

impl ClockState {
    /// `clock=advance`: as if the machine had lived through the time since it stopped. A host clock that went back adds nothing.
    pub fn advanced(self) -> Self {
        let now = host_wall_ns();
        let ns = now.saturating_sub(self.host_wall_ns);
        Self {
            tsc_khz: self.tsc_khz,
            tsc: self.tsc.wrapping_add(scale(ns, self.tsc_khz)),
            boot_ns: self.boot_ns + ns,
            wall_ns: self.wall_ns + ns,
            host_wall_ns: now,
        }
    }
}
