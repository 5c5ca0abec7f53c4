//! Model-specific registers. An unknown one is #GP.

use crate::core::{Core, GP, Pending};
use crate::insn::Fault;
use crate::lapic::Outside;
use crate::profile;
use crate::state::{FS, GS, Msrs};

pub use vcpu::msr::*;

/// HWCR: TscFreqSel reads as set (the TSC counts at a constant rate), and cannot be cleared.
pub const HWCR_FIXED: u64 = 1 << 24;
/// HWCR bits that guests write and that mean nothing here: TLB cache disable, SMM lock and others; McStatusWrEn.
pub const HWCR_WRITABLE: u64 = 1 << 3 | 1 << 6 | 1 << 8 | 1 << 18 | HWCR_FIXED;

/// The values of a vCPU that firmware has set up: MTRRs on, all memory write-back.
pub fn power_on() -> Msrs {
    Msrs { pat: 0x0007_0406_0007_0406, misc_enable: 1, mtrr_def_type: 0x806, ..Msrs::default() }
}

/// The MSRs that are plain storage.
pub fn plain(m: &mut Msrs, index: u32) -> Option<&mut u64> {
    Some(match index {
        STAR => &mut m.star,
        LSTAR => &mut m.lstar,
        CSTAR => &mut m.cstar,
        FMASK => &mut m.fmask,
        KERNEL_GS_BASE => &mut m.kernel_gs_base,
        SYSENTER_CS => &mut m.sysenter_cs,
        SYSENTER_ESP => &mut m.sysenter_esp,
        SYSENTER_EIP => &mut m.sysenter_eip,
        PAT => &mut m.pat,
        TSC_AUX => &mut m.tsc_aux,
        MISC_ENABLE => &mut m.misc_enable,
        MTRR_DEF_TYPE => &mut m.mtrr_def_type,
        MTRR_PHYS..0x210 => &mut m.mtrr_phys[(index - MTRR_PHYS) as usize],
        _ => {
            let at = MTRR_FIXED.iter().position(|&i| i == index)?;
            &mut m.mtrr_fixed[at]
        }
    })
}

impl Core {
    /// What a LAPIC needs of its surroundings.
    pub(crate) fn with_lapic<R>(&mut self, f: impl FnOnce(&mut crate::lapic::Lapic, &Outside) -> R) -> R {
        let out = Outside { apics: &self.shared.apics, clock: &self.shared.clock, tsc_adjust: self.tsc_adjust };
        f(&mut self.lapic, &out)
    }

    /// The guest's time stamp counter.
    pub fn tsc(&self) -> u64 {
        self.shared.clock.tsc().wrapping_add(self.tsc_adjust)
    }

    /// RDMSR. `None`: no such register.
    pub fn read_msr(&mut self, index: u32) -> Option<u64> {
        if let Some(value) = plain(&mut self.cpu.msr, index) {
            return Some(*value);
        }
        Some(match index {
            TSC => self.tsc(),
            TSC_ADJUST => self.tsc_adjust,
            TSC_DEADLINE => self.lapic.tsc_deadline,
            APIC_BASE => self.lapic.base,
            EFER => self.cpu.efer,
            PKRS if self.shared.switches.pks => u64::from(self.cpu.pkrs),
            FS_BASE => self.cpu.seg[FS].base,
            GS_BASE => self.cpu.seg[GS].base,
            0x800..0x900 => {
                let shared = self.shared.clone();
                return self.lapic.msr_read(index, &shared.clock).ok();
            }
            KVM_SYSTEM_TIME | KVM_SYSTEM_TIME_OLD => self.kvmclock.system_time,
            KVM_WALL_CLOCK | KVM_WALL_CLOCK_OLD => self.kvmclock.wall_clock,
            // Eight variable ranges, fixed ranges, write-combining.
            MTRR_CAP => 0x508,
            MICROCODE => profile::MICROCODE,
            // Machine checks are not claimed; KVM's guests may look all the same: no banks.
            MCG_CAP | MCG_STATUS => 0,
            // No last branch records, no branch single step.
            DEBUGCTL => 0,
            HWCR => self.hwcr | HWCR_FIXED,
            // MtrrFixDramEn and the like: nothing is hidden.
            SYSCFG => 0,
            // LFENCE serialises.
            DE_CFG => 2,
            // NB_CFG, interrupt pending, patch loader, performance counters: present and idle.
            0xc001_001f | 0xc001_0055 | 0xc001_0000..=0xc001_0007 => 0,
            _ => return None,
        })
    }

    /// WRMSR. Faults before any effect.
    pub fn write_msr(&mut self, index: u32, value: u64) -> Result<(), Fault> {
        if !storable(index, value, self.shared.phys_bits) {
            return Err(self.raise(GP, Some(0)));
        }
        if let Some(slot) = plain(&mut self.cpu.msr, index) {
            *slot = value;
            return Ok(());
        }
        let refused = match index {
            TSC => {
                // A write to the TSC shows in TSC_ADJUST as well (SDM vol. 3, 18.17.3).
                self.set_tsc_adjust(value.wrapping_sub(self.shared.clock.tsc()))?;
                false
            }
            TSC_ADJUST => {
                self.set_tsc_adjust(value)?;
                false
            }
            TSC_DEADLINE => {
                self.with_lapic(|lapic, out| lapic.set_tsc_deadline(value, out));
                false
            }
            APIC_BASE => {
                let shared = self.shared.clone();
                let absent = value & crate::lapic::APIC_BASE_EXTD != 0 && !shared.switches.x2apic;
                let refused = absent || self.lapic.set_base(value, shared.phys_bits, &shared.apics).is_err();
                if !refused {
                    self.lapic_moved();
                }
                refused
            }
            EFER => return self.write_efer(value),
            PKRS if self.shared.switches.pks => {
                self.cpu.pkrs = value as u32;
                self.flush_tlb_all();
                false
            }
            FS_BASE | GS_BASE => {
                let seg = if index == FS_BASE { FS } else { GS };
                self.cpu.seg[seg].base = value;
                self.cpu.seg_base[seg] = value;
                false
            }
            0x800..0x900 => self.with_lapic(|lapic, out| lapic.msr_write(index, value, out)).is_err(),
            KVM_SYSTEM_TIME | KVM_SYSTEM_TIME_OLD => {
                self.kvmclock.system_time = value;
                self.publish_kvmclock(false)?;
                false
            }
            KVM_WALL_CLOCK | KVM_WALL_CLOCK_OLD => {
                self.kvmclock.wall_clock = value;
                let done = self.kvmclock.publish_wall(&self.shared.memory, &self.shared.clock);
                self.memory_done(done)?;
                false
            }
            HWCR => {
                let refused = value & !HWCR_WRITABLE != 0;
                if !refused {
                    self.hwcr = value & !HWCR_FIXED;
                }
                refused
            }
            // A microcode load, performance counters (none runs), configuration that is fixed here: taken and forgotten.
            MICROCODE | 0x79 | SYSCFG | 0xc001_001f | 0xc001_0055 | DE_CFG => false,
            0xc001_0000..=0xc001_0007 | DEBUGCTL => false,
            MCG_STATUS => value != 0,
            _ => true,
        };
        if refused { Err(self.raise(GP, Some(0))) } else { Ok(()) }
    }

    fn set_tsc_adjust(&mut self, value: u64) -> Result<(), Fault> {
        self.tsc_adjust = value;
        self.publish_kvmclock(false)?;
        self.with_lapic(|lapic, out| lapic.poll_timer(out.clock.tsc(), out.tsc_adjust, out.clock.tsc_khz()));
        Ok(())
    }

    /// Rewrites the vCPU's kvm-clock page, if there is one. `stopped`: tell the guest that it stood still.
    pub fn publish_kvmclock(&mut self, stopped: bool) -> Result<(), Fault> {
        let done = self.kvmclock.publish(&self.shared.memory, &self.shared.clock, self.tsc_adjust, stopped);
        self.memory_done(done)
    }

    fn memory_done(&mut self, done: Result<(), memory::MemoryError>) -> Result<(), Fault> {
        done.map_err(|error| {
            self.fault = Some(Pending::Memory(error));
            Fault
        })
    }

    /// The LAPIC's page or mode changed.
    pub fn lapic_moved(&mut self) {
        self.lapic_page = self.lapic.mmio_page().unwrap_or(u64::MAX);
        self.flush_tlb_all();
    }

    fn write_efer(&mut self, value: u64) -> Result<(), Fault> {
        const LME: u64 = 1 << 8;
        const LMA: u64 = 1 << 10;
        if value & !profile::EFER_ALLOWED != 0 || self.cpu.paging() && (value ^ self.cpu.efer) & LME != 0 {
            return Err(self.raise(GP, Some(0)));
        }
        let old = self.cpu.efer;
        self.cpu.efer = value & !LMA | old & LMA;
        if old != self.cpu.efer {
            self.flush_tlb_all();
        }
        Ok(())
    }

    /// CPUID as this vCPU shows it.
    pub fn cpuid(&self, leaf: u32, subleaf: u32) -> [u32; 4] {
        crate::cpuid::Machine {
            apic_id: self.vcpu as u32,
            vcpus: self.shared.apics.count() as u32,
            phys_bits: self.shared.phys_bits,
            tsc_khz: self.shared.clock.tsc_khz(),
            apic_enabled: self.lapic.enabled(),
            switches: self.shared.switches,
            keys_enabled: self.cpu.cr4 >> 22 & 1 != 0,
        }
        .cpuid(leaf, subleaf)
    }
}
