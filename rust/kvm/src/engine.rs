//! All vCPUs of a machine on KVM, one host thread each while they run.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use kvm_bindings::kvm_clock_data;
use kvm_ioctls::{Kvm, VmFd};
use memory::{GuestMemory, MemoryError, OnDamage};
use vcpu::cpuid::Machine;
use vcpu::msr;
use vcpu::profile::{self, Switches};
use vcpu::state::{MpState, VcpuState};
use vcpu::{Bus, Clock, Control, Engine, EngineConfig, EngineError, EoiListener, IrqSink, Stop};

use crate::convert::{self, msr_name};
use crate::cpu::Vcpu;
use crate::doorbells::Doorbells;
use crate::exits::Outside;
use crate::fpu::XsaveArea;
use crate::host::Host;
use crate::lapic::Timer;
use crate::sink::Sink;
use crate::threads::{self, Gate};
use crate::tsc::{self, TscControl};
use crate::{failed, vm};

/// The code of an error that says that memory is not what was saved.
const DAMAGED: &str = "damaged";

/// Guarantees: outside [`Engine::run`] no vCPU thread exists, every vCPU stands at an instruction boundary with its last I/O
/// finished, and state can be read any number of times without change; only one device works at a time.
pub struct KvmEngine {
    // The vCPUs before the virtual machine, that before the memory that it maps: fields are dropped in order.
    vcpus: Vec<Vcpu>,
    sink: Arc<Sink>,
    doorbells: Doorbells,
    vm: Arc<VmFd>,
    _kvm: Kvm,
    memory: Arc<GuestMemory>,
    bus: Arc<Bus>,
    clock: Arc<Clock>,
    control: Arc<Control>,
    eoi: Option<Arc<dyn EoiListener>>,
    tsc: TscControl,
    gate: Arc<Gate>,
    /// Whether the vCPUs' states come from elsewhere: these guests have not seen this engine's TSC yet.
    foreign: bool,
    /// Why the machine cannot run: a vCPU whose state is lost.
    broken: Option<EngineError>,
}

/// Stops the machine for damaged memory.
struct Damage {
    control: Arc<Control>,
    gate: Arc<Gate>,
}

impl OnDamage for Damage {
    fn damaged(&self, error: MemoryError) {
        let code = if matches!(error, MemoryError::Damaged { .. }) { DAMAGED } else { "host" };
        self.gate.lost.store(true, Ordering::Release);
        self.control.request_stop(Stop::Failed(EngineError::new(code, error.to_string())));
    }

    fn stopped(&self) -> bool {
        !self.gate.open.load(Ordering::Acquire)
    }
}

impl KvmEngine {
    /// vCPU 0 starts at the reset vector, the others wait for SIPI, until [`Engine::set_state`] says otherwise. Memory of
    /// a machine that was restored is verified when it is touched, or now where the kernel does not tell us of that.
    pub fn new(config: EngineConfig) -> Result<Self, EngineError> {
        let EngineConfig { memory, bus, clock, control, vcpus: count, phys_bits, eoi, switches } = config;
        if switches != Switches::default() {
            return Err(EngineError::new("host", "changes of the CPU profile: only the software engine can make them"));
        }
        let host = Host::open()?;
        host.check(&clock, count, phys_bits)?;
        threads::kick_signal()?;
        let gate = Arc::new(Gate::default());
        if memory.serve_faults(Box::new(Damage { control: control.clone(), gate: gate.clone() })).is_err() {
            // Who wants to know why asked beforehand ([`GuestMemory::faults_unavailable`]).
            for region in memory.regions() {
                let layout = region.layout();
                memory.host_range(layout.gpa, layout.size).map_err(|e| EngineError::new(DAMAGED, e.to_string()))?;
            }
        }
        let vm = vm::create(&host.kvm, &memory)?;
        let untrue = host.untrue();
        let mut vcpus = Vec::with_capacity(count);
        let mut tsc = TscControl::Offset;
        let xsave = XsaveArea::of(&vm);
        for number in 0..count {
            let (apic_id, tsc_khz) = (number as u32, clock.tsc_khz());
            let machine =
                Machine { apic_id, vcpus: count as u32, phys_bits, tsc_khz, apic_enabled: true, switches, keys_enabled: false };
            let fd = vm::create_vcpu(&vm, &machine, &untrue)?;
            if number == 0 {
                tsc = tsc::control(&fd)?;
            }
            let timer = Timer::default();
            let saved = reset_state(convert::capture(&fd, xsave, timer, clock.tsc())?, number);
            vcpus.push(Vcpu { fd, number, phys_bits, xsave, timer, saved });
        }
        let sink = Arc::new(Sink::new(Arc::downgrade(&vm)));
        let doorbells = Doorbells::new(vm.clone())?;
        Ok(Self {
            vcpus,
            sink,
            doorbells,
            vm,
            _kvm: host.kvm,
            memory,
            bus,
            clock,
            control,
            eoi,
            tsc,
            gate,
            foreign: true,
            broken: None,
        })
    }

    /// Takes what was sent to standing vCPUs into their state.
    fn take_messages(&mut self) -> Result<(), EngineError> {
        if !self.sink.has_waiting() {
            return Ok(());
        }
        for vcpu in &mut self.vcpus {
            // Without its timers: these would run out meanwhile.
            let mut quiet = vcpu.saved.clone();
            (quiet.lapic.timer_initial, quiet.lapic.timer_current) = (0, 0);
            quiet.msrs.insert(msr_name(msr::TSC_DEADLINE), 0);
            vcpu.try_state(&quiet)?;
        }
        self.sink.deliver(false);
        let tsc = self.clock.tsc();
        for vcpu in &mut self.vcpus {
            // Only what interrupts are about is new.
            let old = vcpu.saved.clone();
            vcpu.capture(tsc)?;
            let new = std::mem::replace(&mut vcpu.saved, old);
            vcpu.saved.lapic.irr = new.lapic.irr;
            vcpu.saved.lapic.tmr = new.lapic.tmr;
            vcpu.saved.events.nmi_pending = new.events.nmi_pending;
        }
        Ok(())
    }

    /// Where KVM shows guests the host's own counter: takes it as the machine's, and moves what the guest compares with it.
    fn follow_host(&mut self) -> Result<(), EngineError> {
        let adjust = self.vcpus[0].msr(msr::TSC_ADJUST);
        // A guest that has only seen the host's counter is not told another one, whatever it has written meanwhile.
        if self.foreign {
            if let Some(vcpu) = self.vcpus.iter().find(|v| v.msr(msr::TSC_ADJUST) != adjust) {
                return Err(tsc::apart(vcpu.number));
            }
            let behind = self.clock.host_ahead(adjust).min(0).unsigned_abs();
            if behind > 0 {
                let wait = Duration::from_nanos(self.clock.ns(behind)) + Duration::from_nanos(1);
                if wait > tsc::PATIENCE {
                    return Err(tsc::behind(behind, self.clock.tsc_khz()));
                }
                self.clock.pause();
                std::thread::sleep(wait);
                self.clock.resume();
            }
        }
        let shift = self.clock.follow_host(adjust);
        for vcpu in &mut self.vcpus {
            let deadline = vcpu.saved.msrs.entry(msr_name(msr::TSC_DEADLINE)).or_default();
            *deadline = tsc::moved_deadline(*deadline, shift);
        }
        self.foreign = false;
        Ok(())
    }

    fn begin(&mut self) -> Result<(), EngineError> {
        if let Some(broken) = &self.broken {
            return Err(broken.clone());
        }
        if self.gate.lost.load(Ordering::Acquire) {
            let lost = match self.control.service() {
                Some(Stop::Failed(error)) => error,
                _ => EngineError::new(DAMAGED, "memory of the snapshot is damaged"),
            };
            self.broken = Some(lost.clone());
            return Err(lost);
        }
        if self.tsc == TscControl::Host {
            self.follow_host()?;
        } else if self.clock.behind() {
            self.clock.catch_up_at_once();
        }
        let offset = self
            .clock
            .native_offset()
            .ok_or_else(|| EngineError::new("host", "the machine's clock does not run at the host's rate"))?;
        for vcpu in &mut self.vcpus {
            vcpu.load(offset)
                .map_err(|e| EngineError::new(e.code, format!("vCPU {} cannot be set: {}", vcpu.number, e.message)))?;
        }
        let clock = kvm_clock_data { clock: self.clock.state().boot_ns, ..Default::default() };
        self.vm.set_clock(&clock).map_err(|e| failed("KVM_SET_CLOCK", e))?;
        for vcpu in &self.vcpus {
            if vcpu.msr(msr::KVM_SYSTEM_TIME) & 1 != 0 {
                // Tells the guest's watchdog that it was stopped.
                vcpu.fd.kvmclock_ctrl().map_err(|e| failed("KVM_KVMCLOCK_CTRL", e))?;
            }
        }
        self.sink.deliver(true);
        Ok(())
    }

    fn end(&mut self) -> Result<(), EngineError> {
        self.sink.hold();
        let clock = self.vm.get_clock().map_err(|e| failed("KVM_GET_CLOCK", e));
        self.clock.pause();
        self.clock.not_before(clock?.clock);
        let tsc = self.clock.tsc();
        self.vcpus.iter_mut().try_for_each(|vcpu| vcpu.capture(tsc))
    }
}

/// A fresh vCPU as the software engine makes it: as firmware leaves it where the two differ.
fn reset_state(mut state: VcpuState, number: usize) -> VcpuState {
    let mut set = |index, value| state.msrs.insert(msr_name(index), value);
    set(msr::PAT, 0x0007_0406_0007_0406);
    set(msr::MISC_ENABLE, 1);
    set(msr::MTRR_DEF_TYPE, 0x806);
    let lapic = &mut state.lapic;
    lapic.lvt_timer = 1 << 16;
    lapic.lvt_thermal = 1 << 16;
    lapic.lvt_perf = 1 << 16;
    lapic.lvt_lint0 = 1 << 16;
    lapic.lvt_lint1 = 1 << 16;
    lapic.lvt_error = 1 << 16;
    // KVM starts as after FNINIT; power-on differs.
    (state.fpu.fcw, state.fpu.ftwx) = (0x40, 0xff);
    state.regs.rdx = profile::SIGNATURE.into();
    state.mp_state = if number == 0 { MpState::Runnable } else { MpState::InitReceived };
    state
}

impl Engine for KvmEngine {
    fn name(&self) -> &'static str {
        "kvm"
    }

    fn vcpus(&self) -> usize {
        self.vcpus.len()
    }

    fn run(&mut self) -> Stop {
        self.clock.resume();
        let stop = match self.begin() {
            Ok(()) => {
                let outside = Outside { bus: &self.bus, memory: &self.memory, eoi: self.eoi.as_deref() };
                threads::run(&mut self.vcpus, outside, &self.control, &self.doorbells, &self.gate)
            }
            Err(error) => {
                self.sink.hold();
                self.clock.pause();
                return Stop::Failed(error);
            }
        };
        if let Stop::Failed(error) = &stop
            && self.gate.lost.load(Ordering::Acquire)
        {
            // The guest may have been given something else than what was saved: nothing of it counts any more.
            self.sink.hold();
            self.clock.pause();
            self.broken = Some(error.clone());
            return stop;
        }
        match self.end() {
            Ok(()) => stop,
            Err(error) => {
                self.broken = Some(error.clone());
                if matches!(stop, Stop::Paused) { Stop::Failed(error) } else { stop }
            }
        }
    }

    fn state(&mut self, vcpu: usize) -> Result<VcpuState, EngineError> {
        if let Some(broken) = &self.broken {
            return Err(broken.clone());
        }
        self.take_messages()?;
        let tsc = self.clock.tsc();
        match self.vcpus.get_mut(vcpu) {
            Some(vcpu) => {
                let adjust = vcpu.msr(msr::TSC_ADJUST);
                vcpu.saved.msrs.insert(msr_name(msr::TSC), tsc.wrapping_add(adjust));
                Ok(vcpu.saved.clone())
            }
            None => Err(EngineError::new("state", format!("vCPU {vcpu}: there are {}", self.vcpus.len()))),
        }
    }

    fn set_state(&mut self, vcpu: usize, state: &VcpuState) -> Result<(), EngineError> {
        let count = self.vcpus.len();
        let Some(vcpu) = self.vcpus.get_mut(vcpu) else {
            return Err(EngineError::new("state", format!("vCPU {vcpu}: there are {count}")));
        };
        // Tried at once, so that what KVM refuses is refused here. It is loaded again before the vCPU runs.
        vcpu.try_state(state)?;
        vcpu.saved = state.clone();
        self.foreign = true;
        Ok(())
    }

    fn irq_sink(&self) -> Arc<dyn IrqSink> {
        self.sink.clone()
    }
}
