//! Model-specific registers.

mod common;

use common::*;
use x86::msr;
use x86::state::{FS, GS};

fn wr(m: &mut Machine, index: u32, value: u64) -> bool {
    let done = m.cores[0].write_msr(index, value).is_ok();
    m.cores[0].fault = None;
    done
}

#[test]
fn unknown_ones_are_refused() {
    let mut m = machine(1);
    for index in [0, 0x34, 0xce, 0x140, 0x17b, 0x345, 0x400, 0xda0, 0xc000_0104, 0xc001_0020, 0xc001_0131, 0xc001_1020, u32::MAX]
    {
        assert!(m.cores[0].read_msr(index).is_none(), "{index:#x}");
        assert!(!wr(&mut m, index, 0), "{index:#x}");
    }
}

#[test]
fn every_saved_one_can_be_read() {
    let mut m = machine(1);
    for &index in msr::SAVED {
        assert!(m.cores[0].read_msr(index).is_some(), "{index:#x}");
    }
}

#[test]
fn no_value_hurts() {
    let mut m = machine(2);
    let values = [0, 1, 0xff, 1 << 11, 1 << 31, 1 << 32, 1 << 47, 1 << 63, u64::MAX, 0xdead_beef_cafe_f00d];
    let known = (0..0x900).chain(0x4b56_4d00..0x4b56_4d08).chain(0xc000_0080..0xc000_0110).chain(0xc001_0000..0xc001_2000);
    for index in known {
        for value in values {
            wr(&mut m, index, value);
            m.cores[0].read_msr(index);
        }
    }
}

#[test]
fn canonical_and_typed_values() {
    let mut m = machine(1);
    for index in [msr::LSTAR, msr::CSTAR, msr::KERNEL_GS_BASE, msr::FS_BASE, msr::GS_BASE, msr::SYSENTER_ESP, msr::SYSENTER_EIP] {
        assert!(!wr(&mut m, index, 1 << 47), "{index:#x}");
        assert!(wr(&mut m, index, 0xffff_8000_0000_0000), "{index:#x}");
        assert_eq!(m.cores[0].read_msr(index), Some(0xffff_8000_0000_0000));
    }
    assert_eq!(m.cores[0].cpu.seg_base[FS], 0xffff_8000_0000_0000);
    assert_eq!(m.cores[0].cpu.seg_base[GS], 0xffff_8000_0000_0000);
    assert!(!wr(&mut m, msr::PAT, 2));
    assert!(wr(&mut m, msr::PAT, 0x0407_0506_0007_0106));
    assert!(!wr(&mut m, msr::MTRR_DEF_TYPE, 1 << 9) && !wr(&mut m, msr::MTRR_DEF_TYPE, 2));
    assert!(wr(&mut m, msr::MTRR_DEF_TYPE, 0xc06));
    assert!(!wr(&mut m, 0x200, 1 << 46) && wr(&mut m, 0x201, ((1 << 46) - 0x1000) | 0x800));
    assert!(!wr(&mut m, 0x250, 0x0203) && wr(&mut m, 0x250, 0x0606_0606_0606_0606));
    assert!(!wr(&mut m, msr::MTRR_CAP, 0x508));
}

#[test]
fn efer_rules() {
    let mut m = machine(1);
    assert!(wr(&mut m, msr::EFER, 0x901));
    assert!(!wr(&mut m, msr::EFER, 1 << 12) && !wr(&mut m, msr::EFER, 1 << 1));
    // LMA follows paging, whatever is written.
    assert!(wr(&mut m, msr::EFER, 0xd01));
    assert_eq!(m.cores[0].read_msr(msr::EFER), Some(0x901));
    m.long_mode(0, 0);
    assert!(!wr(&mut m, msr::EFER, 0x801));
    assert!(wr(&mut m, msr::EFER, 0x901));
    assert_eq!(m.cores[0].read_msr(msr::EFER), Some(0xd01 | 0x100));
}

#[test]
fn tsc_and_adjust_move_together() {
    let mut m = machine(1);
    let clock = m.shared.clock.tsc();
    assert!(wr(&mut m, msr::TSC, 5_000_000));
    assert_eq!(m.cores[0].read_msr(msr::TSC), Some(5_000_000));
    assert_eq!(m.cores[0].read_msr(msr::TSC_ADJUST), Some(5_000_000 - clock));
    assert!(wr(&mut m, msr::TSC_ADJUST, 0));
    assert_eq!(m.cores[0].tsc(), clock);
}

#[test]
fn what_amd_guests_touch_unguarded() {
    let mut m = machine(1);
    for index in (0xc001_0000..0xc001_0008).chain([0xc001_0010, 0xc001_001f, 0xc001_0055, 0xc001_1029, 0x8b]) {
        assert!(m.cores[0].read_msr(index).is_some(), "{index:#x}");
        assert!(wr(&mut m, index, 0), "{index:#x}");
    }
    // Linux: "TSC doesn't count with P0 frequency!" unless bit 24 is set.
    assert_eq!(m.cores[0].read_msr(msr::HWCR), Some(1 << 24));
    assert!(wr(&mut m, msr::HWCR, 0x40));
    assert_eq!(m.cores[0].read_msr(msr::HWCR), Some(1 << 24 | 0x40));
    assert_eq!(m.cores[0].read_msr(0xc001_1029), Some(2));
}

#[test]
fn kvm_clock_pages() {
    let mut m = machine(1);
    assert!(wr(&mut m, msr::KVM_WALL_CLOCK, 0x6000));
    assert!(wr(&mut m, msr::KVM_SYSTEM_TIME, 0x6101));
    assert_eq!(m.read64(0x6100 + 8), m.shared.clock.tsc());
    assert_eq!(m.read64(0x6100 + 16), 1_000);
    assert_eq!(m.read64(0x6000) >> 32, 1_699_999_999);
    // Outside RAM.
    assert!(wr(&mut m, msr::KVM_SYSTEM_TIME, 0xffff_ffff_ffff_ffff));
    assert!(wr(&mut m, msr::KVM_WALL_CLOCK, u64::MAX));
}
