//! kvm-clock: guest pages from which a guest computes its time by TSC (Linux `Documentation/virt/kvm/x86/msr.rst`).

use memory::{GuestMemory, MemoryError};
use vcpu::Clock;

const ENABLED: u64 = 1;
const FLAG_TSC_STABLE: u8 = 1;
const FLAG_GUEST_STOPPED: u8 = 2;

/// One vCPU's side of kvm-clock.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct KvmClock {
    /// MSR 0x4b564d01 (0x12): bit 0 enables, the rest is the page's address.
    pub system_time: u64,
    /// MSR 0x4b564d00 (0x11), as last written.
    pub wall_clock: u64,
}

/// `pvclock_vcpu_time_info.tsc_to_system_mul` and `tsc_shift`: nanoseconds = (ticks << shift) * mul >> 32, rounded
/// down so that a guest never computes more than the clock says.
pub fn scale(tsc_khz: u64) -> (u32, i8) {
    let hz = tsc_khz.max(1) * 1000;
    let (mut scaled, mut shift) = (hz, 0i8);
    // Bring the rate into 1 GHz < rate <= 2 GHz so that `mul` keeps 31 or 32 significant bits.
    while scaled > 2_000_000_000 {
        scaled >>= 1;
        shift -= 1;
    }
    while scaled <= 1_000_000_000 {
        scaled <<= 1;
        shift += 1;
    }
    // mul = 10^9 * 2^32 / (hz * 2^shift), exact in 128 bits.
    let numerator = 1_000_000_000u128 << 32;
    let mul = if shift >= 0 { numerator / (u128::from(hz) << shift) } else { (numerator << -shift) / u128::from(hz) };
    (mul.min(u128::from(u32::MAX)) as u32, shift)
}

impl KvmClock {
    pub fn enabled(&self) -> bool {
        self.system_time & ENABLED != 0
    }

    /// Writes the time page: version odd, fields, even. A page outside RAM is ignored, as KVM does; damaged memory is not.
    pub fn publish(&self, memory: &GuestMemory, clock: &Clock, tsc_adjust: u64, stopped: bool) -> Result<(), MemoryError> {
        if !self.enabled() {
            return Ok(());
        }
        let at = self.system_time & !1;
        let mut version = [0; 4];
        match memory.read(at, &mut version) {
            Err(MemoryError::NotRam { .. }) => return Ok(()),
            other => other?,
        }
        let mut old_flags = [0; 1];
        match memory.read(at + 29, &mut old_flags) {
            Err(MemoryError::NotRam { .. }) => return Ok(()),
            other => other?,
        }
        let odd = u32::from_le_bytes(version) | 1;
        // All vCPUs' pages lie on one line: TSC_STABLE promises that they agree to the nanosecond.
        let state = clock.anchor();
        let (mul, shift) = scale(clock.tsc_khz());
        let flags = FLAG_TSC_STABLE | old_flags[0] & FLAG_GUEST_STOPPED | if stopped { FLAG_GUEST_STOPPED } else { 0 };
        let mut fields = [0u8; 28];
        fields[4..12].copy_from_slice(&state.tsc.wrapping_add(tsc_adjust).to_le_bytes());
        fields[12..20].copy_from_slice(&state.boot_ns.to_le_bytes());
        fields[20..24].copy_from_slice(&mul.to_le_bytes());
        fields[24] = shift as u8;
        fields[25] = flags;
        memory.write(at, &odd.to_le_bytes())?;
        memory.write(at + 4, &fields)?;
        memory.write(at, &odd.wrapping_add(1).to_le_bytes())
    }

    /// WRMSR wall clock: the wall time at which the machine's boot time was zero.
    pub fn publish_wall(&self, memory: &GuestMemory, clock: &Clock) -> Result<(), MemoryError> {
        let at = self.wall_clock;
        let mut version = [0; 4];
        match memory.read(at, &mut version) {
            Err(MemoryError::NotRam { .. }) => return Ok(()),
            other => other?,
        }
        let odd = u32::from_le_bytes(version) | 1;
        let state = clock.anchor();
        let ns = state.wall_ns.saturating_sub(state.boot_ns);
        let mut fields = [0u8; 8];
        fields[..4].copy_from_slice(&((ns / 1_000_000_000) as u32).to_le_bytes());
        fields[4..].copy_from_slice(&((ns % 1_000_000_000) as u32).to_le_bytes());
        let written = memory
            .write(at, &odd.to_le_bytes())
            .and_then(|()| memory.write(at + 4, &fields))
            .and_then(|()| memory.write(at, &odd.wrapping_add(1).to_le_bytes()));
        match written {
            Err(MemoryError::NotRam { .. }) => Ok(()),
            other => other,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use memory::RegionLayout;
    use vcpu::ClockState;

    fn guest_ns(page: &[u8], tsc: u64) -> u64 {
        let word = |at: usize| u64::from_le_bytes(page[at..at + 8].try_into().unwrap());
        let mul = u32::from_le_bytes(page[24..28].try_into().unwrap());
        let shift = page[28] as i8;
        let delta = tsc - word(8);
        let delta = if shift < 0 { delta >> -shift } else { delta << shift };
        word(16) + (u128::from(delta) * u128::from(mul) >> 32) as u64
    }

    #[test]
    fn scale_is_exact_enough_and_never_fast() {
        for khz in [1, 1_000, 999_999, 1_000_000, 1_000_001, 2_000_000, 2_394_464, 3_294_123, 5_000_000] {
            let (mul, shift) = scale(khz);
            let ticks = khz * 1000 * 10;
            let shifted = if shift < 0 { u128::from(ticks) >> -shift } else { u128::from(ticks) << shift };
            let ns = shifted * u128::from(mul) >> 32;
            assert!(ns <= 10_000_000_000 && ns > 10_000_000_000 - 20, "{khz}: {ns}");
        }
    }

    #[test]
    fn page_agrees_with_the_clock_and_never_goes_back() {
        let memory = GuestMemory::new(&[RegionLayout { gpa: 0, size: 0x10000 }]).unwrap();
        let state = ClockState { tsc_khz: 3_294_123, tsc: 1 << 40, boot_ns: 77_000, wall_ns: 5_000_000_000, host_wall_ns: 0 };
        let kvm = KvmClock { system_time: 0x1001, wall_clock: 0x2000 };
        let clock = Clock::from_state(state, 0);
        kvm.publish(&memory, &clock, 5, true).unwrap();
        let mut page = [0; 32];
        memory.read(0x1000, &mut page).unwrap();
        assert_eq!(page[0], 2);
        assert_eq!(page[29], FLAG_TSC_STABLE | FLAG_GUEST_STOPPED);
        assert_eq!(guest_ns(&page, (1 << 40) + 5), 77_000);
        let later = 12_345_678_901u64;
        let next = ClockState { tsc: state.tsc + later, boot_ns: state.boot_ns + clock.ns(later), ..state };
        assert!(guest_ns(&page, state.tsc + 5 + later) <= next.boot_ns);
        kvm.publish_wall(&memory, &clock).unwrap();
        let mut wall = [0; 12];
        memory.read(0x2000, &mut wall).unwrap();
        assert_eq!(u32::from_le_bytes(wall[4..8].try_into().unwrap()), 4);
        // Outside RAM: nothing happens.
        let away = KvmClock { system_time: 0x20_0001, ..KvmClock::default() };
        away.publish(&memory, &clock, 0, false).unwrap();
    }
}
