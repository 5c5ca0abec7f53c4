//! The guest's TSC: an offset from the host's, where this host's KVM can do that.

use std::os::fd::AsRawFd;

use kvm_bindings::{KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, Msrs, kvm_device_attr, kvm_msr_entry};
use kvm_ioctls::VcpuFd;
use vcpu::{EngineError, msr};

use crate::failed;

/// What a guest of this host's KVM reads as its TSC.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TscControl {
    /// The host's counter and an offset, as we set it.
    Offset,
    /// The host's counter as it is: offsets are accepted and come to nothing.
    Host,
}

/// `_IOW(KVMIO, 0xe1, struct kvm_device_attr)` and `0xe2`: the bindings have them for other architectures only.
const KVM_SET_DEVICE_ATTR: libc::c_ulong = 0x4018_aee1;
const KVM_GET_DEVICE_ATTR: libc::c_ulong = 0x4018_aee2;

fn offset_attr(fd: &VcpuFd, request: libc::c_ulong, offset: *mut u64) -> Result<(), std::io::Error> {
    let attr = kvm_device_attr { flags: 0, group: KVM_VCPU_TSC_CTRL, attr: KVM_VCPU_TSC_OFFSET.into(), addr: offset as u64 };
    // SAFETY: the kernel reads `attr`, and reads or writes the 8 bytes that it points to, which are the caller's.
    if unsafe { libc::ioctl(fd.as_raw_fd(), request as _, &raw const attr) } == 0 {
        return Ok(());
    }
    Err(std::io::Error::last_os_error())
}

/// Guest TSC = host TSC + `offset`. By offset and not by value: values written one after the other drift apart.
pub(crate) fn set_offset(fd: &VcpuFd, offset: u64) -> Result<(), EngineError> {
    let mut offset = offset;
    offset_attr(fd, KVM_SET_DEVICE_ATTR, &raw mut offset)
        .map_err(|e| failed("cannot set a guest's TSC offset (Linux 5.16 can; use --engine software)", e))
}

/// The vCPU's TSC as KVM reports it.
fn reported(fd: &VcpuFd) -> Option<u64> {
    let mut msrs = Msrs::from_entries(&[kvm_msr_entry { index: msr::TSC, ..Default::default() }]).ok()?;
    (fd.get_msrs(&mut msrs) == Ok(1)).then(|| msrs.as_slice()[0].data)
}

pub(crate) fn host_ticks() -> u64 {
    // SAFETY: RDTSC has no preconditions in user mode on any host that we run on.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// Tries an offset on a vCPU that has not run: what is accepted must also be what reads back, and what the TSC shows.
pub(crate) fn control(fd: &VcpuFd) -> Result<TscControl, EngineError> {
    const TRIED: u64 = 1 << 52;
    set_offset(fd, TRIED)?;
    let mut back = 0;
    let read = offset_attr(fd, KVM_GET_DEVICE_ATTR, &raw mut back);
    let shown = reported(fd).map(|tsc| tsc.wrapping_sub(host_ticks()));
    set_offset(fd, 0)?;
    // A generous second or two between the two readings.
    let moved = shown.is_some_and(|shown| shown.abs_diff(TRIED) < 1 << 33);
    Ok(if read.is_ok() && back == TRIED && moved { TscControl::Offset } else { TscControl::Host })
}

/// What a guest's deadline is once its TSC and everything that is compared with it have moved by `shift`. Zero means that
/// none is armed, so one that is stays above it.
pub(crate) fn moved_deadline(deadline: u64, shift: u64) -> u64 {
    if deadline == 0 {
        return 0;
    }
    i128::from(deadline).saturating_add(i128::from(shift as i64)).clamp(1, i128::from(u64::MAX)) as u64
}

/// How long a machine is made to wait for a host's counter that is behind the guest's.
pub(crate) const PATIENCE: std::time::Duration = std::time::Duration::from_secs(1);

/// Why vCPUs cannot be shown TSCs of their own.
pub(crate) fn apart(vcpu: usize) -> EngineError {
    let what = format!("vCPU {vcpu} has another TSC_ADJUST than vCPU 0");
    failed("this host's KVM shows all vCPUs one TSC", what + " (use --engine software)")
}

/// Why a guest's TSC cannot be shown by a KVM that shows the host's.
pub(crate) fn behind(ticks: u64, khz: u64) -> EngineError {
    let seconds = ticks as f64 / (khz.max(1) as f64 * 1000.0);
    let why = format!("this host's KVM shows its own TSC, which is {seconds:.1} s behind the one that the guest has seen");
    EngineError::new("host", format!("KVM: {why}: it would go backwards (use --engine software)"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deadlines_move_with_the_counter() {
        assert_eq!(moved_deadline(0, 5), 0);
        assert_eq!(moved_deadline(7, 5), 12);
        assert_eq!(moved_deadline(7, 5u64.wrapping_neg()), 2);
        assert_eq!(moved_deadline(7, 9u64.wrapping_neg()), 1);
        assert_eq!(moved_deadline(u64::MAX, 1), u64::MAX);
    }
}
