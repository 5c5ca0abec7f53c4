//! All vCPUs of a machine on KVM, one host thread each while they run.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::time::Duration;

use kvm_bindings::{kvm_clock_data, kvm_run};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use memory::GuestMemory;
use vcpu::cpuid::Machine;
use vcpu::msr;
use vcpu::profile;
use vcpu::state::{MpState, VcpuState};
use vcpu::{Bus, Clock, Control, Engine, EngineConfig, EngineError, EoiListener, IrqSink, Stop};

use crate::convert::{self, msr_name};
use crate::exits::{Outside, serve};
use crate::failed;
use crate::sink::Sink;
use crate::tsc::{self, TscControl};
use crate::vm;

struct Vcpu {
    fd: VcpuFd,
    number: usize,
    phys_bits: u8,
    /// The vCPU's state whenever it does not run. What KVM holds meanwhile does not count: its timers go on, and it is
    /// loaded anew before the vCPU runs.
    saved: VcpuState,
}

impl Vcpu {
    fn msr(&self, index: u32) -> u64 {
        self.saved.msrs.get(&msr_name(index)).copied().unwrap_or(0)
    }

    fn load(&mut self, offset: u64) -> Result<(), EngineError> {
        tsc::set_offset(&self.fd, offset.wrapping_add(self.msr(msr::TSC_ADJUST)))?;
        convert::load(&self.fd, &self.saved, self.phys_bits)
    }

    fn capture(&mut self, tsc: u64) -> Result<(), EngineError> {
        let mut state = convert::capture(&self.fd, tsc)
            .map_err(|e| EngineError::new(e.code, format!("vCPU {}: {}", self.number, e.message)))?;
        // KVM was not given this one (see `convert::load`); what the guest has written since is newer.
        let wall = self.msr(msr::KVM_WALL_CLOCK);
        if let Some(value) = state.msrs.get_mut(&msr_name(msr::KVM_WALL_CLOCK)).filter(|v| **v == 0) {
            *value = wall;
        }
        self.saved = state;
        Ok(())
    }
}

/// Guarantees: outside [`Engine::run`] no vCPU thread exists, every vCPU stands at an instruction boundary with its last I/O
/// finished, and state can be read any number of times without change; only one device works at a time.
pub struct KvmEngine {
    // The vCPUs before the virtual machine, that before the memory that it maps: fields are dropped in order.
    vcpus: Vec<Vcpu>,
    sink: Arc<Sink>,
    vm: Arc<VmFd>,
    _kvm: Kvm,
    memory: Arc<GuestMemory>,
    bus: Arc<Bus>,
    clock: Arc<Clock>,
    control: Arc<Control>,
    eoi: Option<Arc<dyn EoiListener>>,
    tsc: TscControl,
    /// Whether the vCPUs' states come from elsewhere: these guests have not seen this engine's TSC yet.
    foreign: bool,
    /// Why the machine cannot run: a vCPU whose state is lost.
    broken: Option<EngineError>,
}

impl KvmEngine {
    /// vCPU 0 starts at the reset vector, the others wait for SIPI, until [`Engine::set_state`] says otherwise. Reads and
    /// verifies all memory of a machine that was restored.
    pub fn new(config: EngineConfig) -> Result<Self, EngineError> {
        let EngineConfig { memory, bus, clock, control, vcpus: count, phys_bits, eoi } = config;
        if count == 0 || count > 254 {
            return Err(EngineError::new("host", format!("{count} vCPUs: the KVM engine runs 1 to 254")));
        }
        if !clock.native() {
            let khz = clock.tsc_khz();
            return Err(EngineError::new(
                "host",
                format!(
                    "the guest's TSC runs at {khz} kHz, this host's at another rate: use --engine software, which can scale it"
                ),
            ));
        }
        kick_signal()?;
        let (kvm, vm) = vm::create(&memory)?;
        let mut vcpus = Vec::with_capacity(count);
        let mut tsc = TscControl::Offset;
        for number in 0..count {
            let machine =
                Machine { apic_id: number as u32, vcpus: count as u32, phys_bits, tsc_khz: clock.tsc_khz(), apic_enabled: true };
            let fd = vm::create_vcpu(&vm, &machine)?;
            if number == 0 {
                tsc = tsc::control(&fd)?;
            }
            let saved = reset_state(convert::capture(&fd, clock.tsc())?, number);
            vcpus.push(Vcpu { fd, number, phys_bits, saved });
        }
        let sink = Arc::new(Sink::new(Arc::downgrade(&vm)));
        Ok(Self { vcpus, sink, vm, _kvm: kvm, memory, bus, clock, control, eoi, tsc, foreign: true, broken: None })
    }

    /// Takes what was sent to standing vCPUs into their state.
    fn take_messages(&mut self) -> Result<(), EngineError> {
        if !self.sink.has_waiting() {
            return Ok(());
        }
        for vcpu in &self.vcpus {
            // Without its timers: these would run out meanwhile.
            let mut quiet = vcpu.saved.clone();
            (quiet.lapic.timer_initial, quiet.lapic.timer_current) = (0, 0);
            quiet.msrs.insert(msr_name(msr::TSC_DEADLINE), 0);
            convert::load(&vcpu.fd, &quiet, vcpu.phys_bits)?;
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
                let what = format!("vCPU {} has another TSC_ADJUST than vCPU 0", vcpu.number);
                return Err(failed("this host's KVM shows all vCPUs one TSC", what + " (use --engine software)"));
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

    fn turns(&mut self) -> Stop {
        let shared = Shared {
            outside: Outside { bus: &self.bus, memory: &self.memory, eoi: self.eoi.as_deref() },
            control: &self.control,
            devices: Mutex::new(()),
            stopping: AtomicBool::new(false),
            stop: Mutex::new(None),
            running: Mutex::new((0..self.vcpus.len()).map(|_| None).collect()),
        };
        std::thread::scope(|scope| {
            for vcpu in &mut self.vcpus {
                let shared = &shared;
                let name = format!("vcpu{}", vcpu.number);
                let made = std::thread::Builder::new().name(name).spawn_scoped(scope, move || {
                    let _gone = Gone(shared);
                    shared.vcpu(vcpu);
                });
                if let Err(e) = made {
                    shared.finish(Stop::Failed(EngineError::new("host", format!("no thread for a vCPU: {e}"))));
                    break;
                }
            }
            while !shared.stopping.load(Ordering::Acquire) {
                shared.control.wait(None);
                shared.service();
            }
            shared.kick_all();
        });
        let stop = shared.stop.into_inner().unwrap_or_else(|e| e.into_inner());
        stop.unwrap_or_else(|| Stop::Failed(EngineError::new("host", "a vCPU thread ended without saying why")))
    }
}

/// A vCPU thread that has ended, even by a panic: then the machine stops instead of waiting for it.
struct Gone<'a, 'b>(&'a Shared<'b>);

impl Drop for Gone<'_, '_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.finish(Stop::Failed(EngineError::new("host", "a vCPU thread broke")));
        }
    }
}

/// A running vCPU thread, for kicking it.
struct Running {
    thread: libc::pthread_t,
    area: *mut kvm_run,
}

// SAFETY: the pointer is used only for the one byte `immediate_exit`, which is made for other threads, while the entry is
// in the table, and the vCPU outlives that.
unsafe impl Send for Running {}

/// What the vCPU threads of one `run` share.
struct Shared<'a> {
    outside: Outside<'a>,
    control: &'a Control,
    /// Held while a device works: devices are never entered by two threads at once, as on the software engine.
    devices: Mutex<()>,
    stopping: AtomicBool,
    stop: Mutex<Option<Stop>>,
    running: Mutex<Vec<Option<Running>>>,
}

impl Shared<'_> {
    fn devices(&self) -> MutexGuard<'_, ()> {
        self.devices.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn running(&self) -> MutexGuard<'_, Vec<Option<Running>>> {
        self.running.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Ends this `run`; the first reason wins, but a failure replaces any other.
    fn finish(&self, stop: Stop) {
        let mut slot = self.stop.lock().unwrap_or_else(|e| e.into_inner());
        if slot.is_none() || matches!(stop, Stop::Failed(_)) {
            *slot = Some(stop);
        }
        drop(slot);
        self.stopping.store(true, Ordering::Release);
        self.control.wake();
    }

    /// Posted work and stop requests, by whichever thread comes first.
    fn service(&self) {
        let _one = self.devices();
        self.service_locked();
    }

    fn service_locked(&self) {
        if let Some(stop) = self.control.service() {
            self.finish(stop);
        } else if self.stopping.load(Ordering::Acquire) {
            // `service` may have swallowed the wake-up of the one that asked for the stop.
            self.control.wake();
        }
    }

    fn kick_all(&self) {
        for running in self.running().iter().flatten() {
            // SAFETY: see `Running`; the kernel reads the byte whenever it likes.
            unsafe { (&raw mut (*running.area).immediate_exit).write_volatile(1) };
            // SAFETY: the thread is alive: it takes itself out of the table before it ends, under the table's lock.
            unsafe { libc::pthread_kill(running.thread, signal()) };
        }
    }

    fn vcpu(&self, vcpu: &mut Vcpu) {
        unblock_signal();
        vcpu.fd.set_kvm_immediate_exit(0);
        let area = std::ptr::from_mut(vcpu.fd.get_kvm_run());
        // SAFETY: always succeeds.
        let thread = unsafe { libc::pthread_self() };
        self.running()[vcpu.number] = Some(Running { thread, area });
        while !self.stopping.load(Ordering::Acquire) {
            if let Err(stop) = self.step(vcpu) {
                self.finish(stop);
            }
        }
        self.running()[vcpu.number] = None;
        self.settle(vcpu);
    }

    fn step(&self, vcpu: &mut Vcpu) -> Result<(), Stop> {
        if let Err(e) = vcpu.fd.run() {
            return match e.errno() {
                libc::EINTR | libc::EAGAIN => Ok(()),
                _ => Err(Stop::Failed(failed(&format!("vCPU {} cannot run", vcpu.number), e))),
            };
        }
        let _one = self.devices();
        let served = serve(&mut vcpu.fd, vcpu.number, &self.outside);
        // A device may have asked for a stop: the guest must not see the next instruction then.
        if self.control.attention() {
            self.service_locked();
        }
        served
    }

    /// Finishes an unfinished I/O instruction, so that the state is one between two instructions.
    fn settle(&self, vcpu: &mut Vcpu) {
        vcpu.fd.set_kvm_immediate_exit(1);
        // An access of many parts takes one entry for each; a page of them is the most that an instruction has.
        for _ in 0..4096 {
            if vcpu.fd.run().is_err() {
                break;
            }
            let _one = self.devices();
            if let Err(stop) = serve(&mut vcpu.fd, vcpu.number, &self.outside) {
                self.finish(stop);
                break;
            }
        }
        vcpu.fd.set_kvm_immediate_exit(0);
    }
}

/// The signal that ends a KVM_RUN; nothing else uses it, and it does nothing.
fn signal() -> libc::c_int {
    libc::SIGRTMIN() + 4
}

extern "C" fn nothing(_: libc::c_int) {}

fn kick_signal() -> Result<(), EngineError> {
    static INSTALLED: OnceLock<i32> = OnceLock::new();
    let error = *INSTALLED.get_or_init(|| {
        // SAFETY: an all-zero sigaction is valid, and the handler touches nothing. Without SA_RESTART: KVM_RUN is to end.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = nothing as extern "C" fn(libc::c_int) as usize;
            if libc::sigaction(signal(), &raw const action, std::ptr::null_mut()) == 0 {
                0
            } else {
                std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EINVAL)
            }
        }
    });
    if error == 0 { Ok(()) } else { Err(failed("no signal handler", std::io::Error::from_raw_os_error(error))) }
}

fn unblock_signal() {
    // SAFETY: a signal set of our own; the mask is this thread's.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, signal());
        libc::pthread_sigmask(libc::SIG_UNBLOCK, &raw const set, std::ptr::null_mut());
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
            Ok(()) => self.turns(),
            Err(error) => {
                self.sink.hold();
                self.clock.pause();
                return Stop::Failed(error);
            }
        };
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
        convert::load(&vcpu.fd, state, vcpu.phys_bits)
            .map_err(|e| EngineError::new(e.code, format!("vCPU {}: {}", vcpu.number, e.message)))?;
        vcpu.saved = state.clone();
        self.foreign = true;
        Ok(())
    }

    fn irq_sink(&self) -> Arc<dyn IrqSink> {
        self.sink.clone()
    }
}
