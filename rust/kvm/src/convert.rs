//! Where KVM's structures and [`VcpuState`] meet. The order of the calls matters, in both directions: the comments say why.

use std::collections::BTreeMap;

use kvm_bindings::{
    KVM_VCPUEVENT_VALID_NMI_PENDING, KVM_VCPUEVENT_VALID_SHADOW, KVM_VCPUEVENT_VALID_SIPI_VECTOR, Msrs, kvm_debugregs,
    kvm_dtable, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs, kvm_vcpu_events,
};
use kvm_ioctls::VcpuFd;
use vcpu::EngineError;
use vcpu::state::{DebugRegs, Events, Lapic, MpState, Regs, Segment, Sregs, Table, VcpuState};
use vcpu::{msr, profile};

use crate::failed;
use crate::fpu::XsaveArea;
use crate::lapic::{self, Timer, deadline_mode};

pub(crate) type Checked<T> = Result<T, EngineError>;

pub(crate) fn refuse<T>(field: &str, why: impl std::fmt::Display) -> Checked<T> {
    Err(EngineError::new("state", format!("{field}: {why}")))
}

pub(crate) fn set(what: &str, done: Result<(), kvm_ioctls::Error>) -> Checked<()> {
    done.map_err(|e| EngineError::new("state", format!("{what}: KVM refuses the values: {e}")))
}

pub(crate) fn msr_name(index: u32) -> String {
    format!("{index:#x}")
}

// KVM's names are ours: one list serves both directions.

/// A `$made` with these fields of `$from`; `$more`: what only it has.
macro_rules! same {
    ($made:ident, $from:ident, [$($field:ident)*] $(, $more:ident: $value:expr)*) => {
        $made { $($field: $from.$field,)* $($more: $value,)* }
    };
}

macro_rules! regs {
    ($made:ident, $from:ident) => {
        same!($made, $from, [rax rbx rcx rdx rsi rdi rsp rbp r8 r9 r10 r11 r12 r13 r14 r15 rip rflags])
    };
}

macro_rules! segment {
    ($made:ident, $from:ident $(, $more:ident: $value:expr)*) => {
        same!($made, $from, [base limit selector type_ present dpl db s l g avl unusable] $(, $more: $value)*)
    };
}

// ---- segments ----

fn save_segment(s: &kvm_segment) -> Segment {
    segment!(Segment, s)
}

fn load_segment(name: &str, s: &Segment) -> Checked<kvm_segment> {
    let parts = [("present", s.present), ("db", s.db), ("s", s.s), ("l", s.l), ("g", s.g), ("avl", s.avl)];
    for (part, value) in parts.into_iter().chain([("unusable", s.unusable)]) {
        if value > 1 {
            return refuse(&format!("sregs.{name}.{part}"), format!("{value} is above 1"));
        }
    }
    if s.type_ > 15 || s.dpl > 3 {
        return refuse(&format!("sregs.{name}"), format!("type {} with privilege level {}", s.type_, s.dpl));
    }
    Ok(segment!(kvm_segment, s, padding: 0))
}

fn load_table(t: &Table) -> kvm_dtable {
    kvm_dtable { base: t.base, limit: t.limit, padding: [0; 3] }
}

const X2APIC: u64 = 1 << 10;

// ---- MSRs ----

fn get_msrs(fd: &VcpuFd) -> Checked<Vec<(u32, u64)>> {
    let entries: Vec<_> = msr::SAVED.iter().map(|&index| kvm_msr_entry { index, ..Default::default() }).collect();
    let mut msrs = Msrs::from_entries(&entries).map_err(|e| failed("MSRs", format!("{e:?}")))?;
    let count = fd.get_msrs(&mut msrs).map_err(|e| failed("KVM_GET_MSRS", e))?;
    if let Some(&index) = msr::SAVED.get(count) {
        return Err(failed("KVM_GET_MSRS", format!("MSR {index:#x} cannot be read")));
    }
    Ok(msrs.as_slice().iter().map(|e| (e.index, e.data)).collect())
}

fn get_msr(fd: &VcpuFd, index: u32) -> Checked<u64> {
    let mut msrs =
        Msrs::from_entries(&[kvm_msr_entry { index, ..Default::default() }]).map_err(|e| failed("MSRs", format!("{e:?}")))?;
    match fd.get_msrs(&mut msrs) {
        Ok(1) => Ok(msrs.as_slice()[0].data),
        _ => Err(failed("KVM_GET_MSRS", format!("MSR {index:#x} cannot be read"))),
    }
}

fn set_msr(fd: &VcpuFd, index: u32, data: u64) -> bool {
    let entry = kvm_msr_entry { index, data, ..Default::default() };
    Msrs::from_entries(&[entry]).is_ok_and(|msrs| fd.set_msrs(&msrs) == Ok(1))
}

/// `tsc`: before TSC_ADJUST.
fn save_msrs(read: Vec<(u32, u64)>, tsc: u64, deadline: u64) -> BTreeMap<String, u64> {
    let adjust = read.iter().find(|m| m.0 == msr::TSC_ADJUST).map_or(0, |m| m.1);
    let saved = read.into_iter().map(|(index, value)| {
        let value = match index {
            msr::TSC => tsc.wrapping_add(adjust),
            msr::TSC_DEADLINE => deadline,
            // It reads as set on both engines; older kernels do not keep it.
            msr::HWCR => value | 1 << 24,
            _ => value,
        };
        (msr_name(index), value)
    });
    saved.collect()
}

fn load_msrs(fd: &VcpuFd, state: &VcpuState, phys_bits: u8) -> Checked<()> {
    let msr_of = |index: u32| match state.msrs.get(&msr_name(index)) {
        Some(&value) => Ok(value),
        None => refuse(&format!("msrs.{index:#x}"), "is missing"),
    };
    for &index in msr::SAVED {
        let value = msr_of(index)?;
        if !msr::storable(index, value, phys_bits) {
            return refuse(&format!("msrs.{index:#x}"), format!("{value:#x} is not a value that this register takes"));
        }
        let done = match index {
            msr::APIC_BASE if value != state.sregs.apic_base => {
                let other = state.sregs.apic_base;
                return refuse("msrs.0x1b", format!("{value:#x} differs from sregs.apic_base {other:#x}"));
            }
            // Done with the special registers; by the TSC offset; after all others; and not at all: writing the last would
            // write the guest's memory, so the engine remembers it.
            msr::APIC_BASE | msr::TSC | msr::TSC_DEADLINE | msr::KVM_WALL_CLOCK => true,
            // TscFreqSel: new kernels know it, older ones refuse it.
            msr::HWCR => set_msr(fd, index, value) || set_msr(fd, index, value & !(1 << 24)),
            _ => set_msr(fd, index, value),
        };
        if !done {
            return refuse(&format!("msrs.{index:#x}"), format!("KVM refuses the value {value:#x}"));
        }
    }
    let deadline = msr_of(msr::TSC_DEADLINE)?;
    if !set_msr(fd, msr::TSC_DEADLINE, deadline) {
        return refuse("msrs.0x6e0", format!("KVM refuses the value {deadline:#x}"));
    }
    Ok(())
}

// ---- events ----

fn save_events(e: &kvm_vcpu_events, mp_state: MpState) -> Events {
    Events {
        exception_injected: e.exception.injected != 0,
        exception_pending: false,
        exception_nr: if e.exception.injected != 0 { e.exception.nr } else { 0 },
        exception_error_code: (e.exception.injected != 0 && e.exception.has_error_code != 0).then_some(e.exception.error_code),
        interrupt_injected: e.interrupt.injected != 0,
        interrupt_nr: if e.interrupt.injected != 0 { e.interrupt.nr } else { 0 },
        interrupt_soft: e.interrupt.injected != 0 && e.interrupt.soft != 0,
        interrupt_shadow: e.interrupt.shadow & 3,
        nmi_injected: e.nmi.injected != 0,
        nmi_pending: e.nmi.pending.min(2),
        nmi_masked: e.nmi.masked != 0,
        sipi_vector: if mp_state == MpState::SipiReceived { e.sipi_vector } else { 0 },
        triple_fault_pending: false,
    }
}

fn load_events(e: &Events) -> Checked<kvm_vcpu_events> {
    if e.triple_fault_pending {
        return refuse("events.triple_fault_pending", "the guest was about to be reset; there is nothing to go on with");
    }
    if e.interrupt_soft {
        return refuse("events.interrupt_soft", "a software interrupt half delivered cannot be taken over");
    }
    let exception = e.exception_injected || e.exception_pending;
    if usize::from(exception) + usize::from(e.interrupt_injected) + usize::from(e.nmi_injected) > 1 {
        return refuse("events", "more than one event is being delivered");
    }
    let mut k = kvm_vcpu_events {
        flags: KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SIPI_VECTOR | KVM_VCPUEVENT_VALID_SHADOW,
        sipi_vector: e.sipi_vector,
        ..Default::default()
    };
    k.exception.injected = exception.into();
    k.exception.nr = e.exception_nr;
    k.exception.has_error_code = e.exception_error_code.is_some().into();
    k.exception.error_code = e.exception_error_code.unwrap_or(0);
    k.interrupt.injected = e.interrupt_injected.into();
    k.interrupt.nr = e.interrupt_nr;
    k.interrupt.shadow = e.interrupt_shadow;
    k.nmi.injected = e.nmi_injected.into();
    k.nmi.pending = e.nmi_pending;
    k.nmi.masked = e.nmi_masked.into();
    Ok(k)
}

/// An interrupt that KVM has taken out of the LAPIC but not delivered becomes a request again: nothing has happened yet.
fn take_back(mut lapic: Lapic, events: &mut kvm_vcpu_events) -> Lapic {
    let (word, bit) = (usize::from(events.interrupt.nr) >> 5, 1 << (events.interrupt.nr & 31));
    if events.interrupt.injected != 0 && events.interrupt.soft == 0 && lapic.isr[word] & bit != 0 {
        lapic.isr[word] &= !bit;
        lapic.irr[word] |= bit;
        events.interrupt.injected = 0;
    }
    lapic
}

const MP_STATES: [MpState; 5] =
    [MpState::Runnable, MpState::Uninitialized, MpState::InitReceived, MpState::Halted, MpState::SipiReceived];

// ---- all of it ----

/// Reads a vCPU that stands. `tsc`: the machine's clock, before TSC_ADJUST.
pub(crate) fn capture(fd: &VcpuFd, xsave: XsaveArea, timer: Timer, tsc: u64) -> Checked<VcpuState> {
    // First, because it may change the LAPIC; the events last, because everything else may add to them.
    let mp = fd.get_mp_state().map_err(|e| failed("KVM_GET_MP_STATE", e))?.mp_state;
    let Some(&mp_state) = MP_STATES.get(mp as usize) else {
        return Err(failed("KVM_GET_MP_STATE", format!("state {mp} is not known")));
    };
    let r = fd.get_regs().map_err(|e| failed("KVM_GET_REGS", e))?;
    let s = fd.get_sregs().map_err(|e| failed("KVM_GET_SREGS", e))?;
    let fpu = xsave.get(fd)?;
    let d = fd.get_debug_regs().map_err(|e| failed("KVM_GET_DEBUGREGS", e))?;
    let read = get_msrs(fd)?;
    // After the MSRs: the deadline that counts is the one that is read with it.
    let (lapic, armed) = lapic::capture(fd, s.apic_base & X2APIC != 0, timer, || get_msr(fd, msr::TSC_DEADLINE))?;
    let mut events = fd.get_vcpu_events().map_err(|e| failed("KVM_GET_VCPU_EVENTS", e))?;
    let lapic = take_back(lapic, &mut events);
    if events.smi.smm != 0 || events.smi.pending != 0 {
        return refuse("events.smi", "the vCPU is in system management mode, which machines do not have");
    }
    let deadline = if deadline_mode(lapic.lvt_timer) { armed } else { 0 };
    let table = |t: &kvm_dtable| Table { base: t.base, limit: t.limit };
    Ok(VcpuState {
        pkru: 0,
        regs: regs!(Regs, r),
        sregs: Sregs {
            cs: save_segment(&s.cs),
            ds: save_segment(&s.ds),
            es: save_segment(&s.es),
            fs: save_segment(&s.fs),
            gs: save_segment(&s.gs),
            ss: save_segment(&s.ss),
            tr: save_segment(&s.tr),
            ldt: save_segment(&s.ldt),
            gdt: table(&s.gdt),
            idt: table(&s.idt),
            cr0: s.cr0,
            cr2: s.cr2,
            cr3: s.cr3,
            cr4: s.cr4,
            cr8: u64::from(lapic.tpr >> 4 & 15),
            efer: s.efer,
            apic_base: s.apic_base,
        },
        fpu,
        debug_regs: DebugRegs { db: d.db, dr6: d.dr6, dr7: d.dr7 },
        lapic,
        events: save_events(&events, mp_state),
        mp_state,
        xcr0: 1,
        msrs: save_msrs(read, tsc, deadline),
    })
}

/// That the state uses no feature that the CPU profile lacks (nested virtualization and Hyper-V's are among these).
pub(crate) fn check_features(state: &VcpuState) -> Checked<()> {
    if state.xcr0 != 1 {
        return refuse("xcr0", format!("{:#x}: the CPU profile has no XSAVE, so only 0x1 is possible", state.xcr0));
    }
    if state.pkru != 0 {
        return refuse("pkru", format!("{:#x}: the CPU profile has no protection keys", state.pkru));
    }
    for (name, value, allowed) in
        [("cr4", state.sregs.cr4, profile::Switches::default().cr4_allowed()), ("efer", state.sregs.efer, profile::EFER_ALLOWED)]
    {
        if value & !allowed != 0 {
            return refuse(
                &format!("sregs.{name}"),
                format!("bits {:#x} switch on features that this CPU profile does not have", value & !allowed),
            );
        }
    }
    Ok(())
}

/// Gives a vCPU that stands this state. Its CPUID and TSC offset are set. KVM judges most values itself; on error the vCPU's
/// state is a mixture.
pub(crate) fn load(fd: &VcpuFd, xsave: XsaveArea, state: &VcpuState, phys_bits: u8) -> Checked<Timer> {
    let (r, s, d) = (&state.regs, &state.sregs, &state.debug_regs);
    check_features(state)?;
    for name in state.msrs.keys() {
        if !msr::SAVED.iter().any(|&i| msr_name(i) == *name) {
            return refuse(&format!("msrs.{name}"), "not an MSR of this CPU profile");
        }
    }
    let sregs = kvm_sregs {
        cs: load_segment("cs", &s.cs)?,
        ds: load_segment("ds", &s.ds)?,
        es: load_segment("es", &s.es)?,
        fs: load_segment("fs", &s.fs)?,
        gs: load_segment("gs", &s.gs)?,
        ss: load_segment("ss", &s.ss)?,
        tr: load_segment("tr", &s.tr)?,
        ldt: load_segment("ldt", &s.ldt)?,
        gdt: load_table(&s.gdt),
        idt: load_table(&s.idt),
        cr0: s.cr0,
        cr2: s.cr2,
        cr3: s.cr3,
        cr4: s.cr4,
        cr8: s.cr8,
        efer: s.efer,
        apic_base: s.apic_base,
        interrupt_bitmap: [0; 4],
    };
    let events = load_events(&state.events)?;
    let x2apic = s.apic_base & X2APIC != 0;

    let mp = MP_STATES.iter().position(|m| *m == state.mp_state).unwrap_or(0);
    set("mp_state", fd.set_mp_state(kvm_mp_state { mp_state: mp as u32 }))?;
    // Before the events: this clears pending exceptions.
    let regs = regs!(kvm_regs, r);
    set("regs", fd.set_regs(&regs))?;
    // Before the LAPIC: it carries the APIC base.
    set("sregs", fd.set_sregs(&sregs))?;
    xsave.set(fd, &state.fpu)?;
    set("debug_regs", fd.set_debug_regs(&kvm_debugregs { db: d.db, dr6: d.dr6, dr7: d.dr7, ..Default::default() }))?;
    // Before the MSRs: a TSC deadline is dropped, with success reported, while the timer is in another mode.
    let timer = lapic::restore(fd, &state.lapic, x2apic)?;
    load_msrs(fd, state, phys_bits)?;
    set("events", fd.set_vcpu_events(&events))?;
    Ok(timer)
}
