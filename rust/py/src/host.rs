//! What Python cannot ask the host's CPU.

use pyo3::prelude::*;

/// The rate of the host's time stamp counter in kHz: from CPUID where it says (leaf 15h, KVM's 40000010h), else measured
/// against the monotonic clock for about 30 ms. 0 where there is none that can be used.
#[pyfunction]
pub fn host_tsc_khz(py: Python<'_>) -> u64 {
    py.detach(|| told().unwrap_or_else(measured))
}

#[cfg(target_arch = "x86_64")]
fn told() -> Option<u64> {
    use std::arch::x86_64::{__cpuid, __cpuid_count};
    let (highest, hypervisor) = (__cpuid(0).eax, __cpuid(1).ecx >> 31 != 0);
    if highest >= 0x15 {
        let leaf = __cpuid_count(0x15, 0);
        if leaf.eax != 0 && leaf.ebx != 0 && leaf.ecx != 0 {
            return Some(u64::from(leaf.ecx) * u64::from(leaf.ebx) / u64::from(leaf.eax) / 1000);
        }
    }
    if hypervisor && __cpuid(0x4000_0000).eax >= 0x4000_0010 {
        let khz = u64::from(__cpuid(0x4000_0010).eax);
        // Virtual machine monitors that have no such leaf echo another one.
        return (100_000..10_000_000).contains(&khz).then_some(khz);
    }
    None
}

#[cfg(target_arch = "x86_64")]
fn measured() -> u64 {
    use std::time::{Duration, Instant};
    // SAFETY: RDTSC has no preconditions in user mode on any host that we run on.
    let ticks = || unsafe { std::arch::x86_64::_rdtsc() };
    // The reading that was interrupted least: the one with the shortest bracket of several.
    let pair = || {
        (0..16)
            .map(|_| {
                let before = ticks();
                let at = Instant::now();
                let after = ticks();
                (after.wrapping_sub(before), before.wrapping_add(after.wrapping_sub(before) / 2), at)
            })
            .min_by_key(|r| r.0)
            .map(|(_, ticks, at)| (ticks, at))
    };
    let Some((first, started)) = pair() else { return 0 };
    while started.elapsed() < Duration::from_millis(30) {
        std::hint::spin_loop();
    }
    let Some((last, ended)) = pair() else { return 0 };
    let ns = ended.duration_since(started).as_nanos().max(1);
    let khz = u128::from(last.wrapping_sub(first)) * 1_000_000 / ns;
    u64::try_from(khz).ok().filter(|khz| (100_000..10_000_000).contains(khz)).unwrap_or(0)
}

#[cfg(not(target_arch = "x86_64"))]
fn told() -> Option<u64> {
    Some(0)
}

#[cfg(not(target_arch = "x86_64"))]
fn measured() -> u64 {
    0
}
