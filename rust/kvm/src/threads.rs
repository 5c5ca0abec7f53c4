//! The vCPU threads of one `run`: starting, kicking, and bringing them to rest between two instructions.

use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock};
use std::thread::{Scope, ScopedJoinHandle};
use std::time::Duration;

use kvm_bindings::{KVM_MP_STATE_HALTED, KVM_MP_STATE_RUNNABLE, kvm_mp_state, kvm_run};
use kvm_ioctls::VcpuFd;
use vcpu::{Control, Doorbell, EngineError, Stop};

use crate::cpu::Vcpu;
use crate::doorbells::Doorbells;
use crate::exits::{Outside, serve};
use crate::failed;

/// What the vCPUs of a machine may do.
#[derive(Default)]
pub(crate) struct Gate {
    /// They may execute the guest; else they do not come to it any more.
    pub open: AtomicBool,
    /// Memory is damaged: what they may still ask for does not count.
    pub lost: AtomicBool,
}

/// Runs the vCPUs until something asks for a stop. They stand between two instructions then.
pub(crate) fn run(vcpus: &mut [Vcpu], outside: Outside<'_>, control: &Control, doorbells: &Doorbells, gate: &Gate) -> Stop {
    let shared = Shared {
        outside,
        control,
        doorbells,
        devices: Mutex::new(()),
        stopping: AtomicBool::new(false),
        gate,
        stop: Mutex::new(None),
        running: Mutex::new((0..vcpus.len()).map(|_| None).collect()),
    };
    // A stop that has been asked for already is obeyed before the first instruction.
    shared.service();
    if let Err(e) = shared.follow_bus() {
        return Stop::Failed(e);
    }
    gate.open.store(true, Ordering::Release);
    std::thread::scope(|scope| {
        let bells = start(scope, &shared, "doorbells".into(), || while doorbells.wait(|bell| shared.ring(bell)) {});
        let threads: Vec<_> =
            vcpus.iter_mut().map(|vcpu| start(scope, &shared, format!("vcpu{}", vcpu.number), || shared.vcpu(vcpu))).collect();
        while !shared.stopping.load(Ordering::Acquire) {
            shared.control.wait(None);
            shared.service();
        }
        shared.kick_all();
        gate.open.store(false, Ordering::Release);
        // A thread that broke has said so itself.
        threads.into_iter().flatten().for_each(|vcpu| drop(vcpu.join()));
        doorbells.quit();
        bells.into_iter().for_each(|thread| drop(thread.join()));
        // What the guest signalled at last is done still: its interrupts are in the state.
        doorbells.rest(|bell| shared.ring(bell));
    });
    let stop = shared.stop.into_inner().unwrap_or_else(|e| e.into_inner());
    stop.unwrap_or_else(|| Stop::Failed(EngineError::new("host", "a vCPU thread ended without saying why")))
}

/// A thread of this run; one that the host does not give ends the run.
fn start<'scope>(
    scope: &'scope Scope<'scope, '_>,
    shared: &'scope Shared<'scope>,
    name: String,
    body: impl FnOnce() + Send + 'scope,
) -> Option<ScopedJoinHandle<'scope, ()>> {
    let made = std::thread::Builder::new().name(name).spawn_scoped(scope, move || {
        let _gone = Gone(shared);
        body();
    });
    let refused = |e| shared.finish(Stop::Failed(EngineError::new("host", format!("no thread for a machine: {e}"))));
    made.map_err(refused).ok()
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

/// How long the kernel may take to notice that a timer has run out: many times what it does.
const TIMER_LATENCY: Duration = Duration::from_micros(100);

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
    doorbells: &'a Doorbells,
    /// Held while a device works: devices are never entered by two threads at once, as on the software engine.
    devices: Mutex<()>,
    stopping: AtomicBool,
    gate: &'a Gate,
    stop: Mutex<Option<Stop>>,
    running: Mutex<Vec<Option<Running>>>,
}

impl Shared<'_> {
    fn devices(&self) -> MutexGuard<'_, ()> {
        self.devices.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn lost(&self) -> bool {
        self.gate.lost.load(Ordering::Acquire)
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

    /// Passes a doorbell on to its device.
    fn ring(&self, bell: &Doorbell) {
        let _one = self.devices();
        if self.lost() {
            return;
        }
        bell.device.write(bell.offset, &[0; 2]);
        if self.control.attention() {
            self.service_locked();
        }
    }

    /// Lets the kernel note doorbells where they are now. Not while somebody else changes the bus.
    fn follow_bus(&self) -> Result<(), EngineError> {
        self.doorbells.follow(self.outside.bus, |bell| bell.device.write(bell.offset, &[0; 2]))
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
        mask_signal(libc::SIG_UNBLOCK);
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
        if let Err(stop) = self.settle(vcpu) {
            self.finish(stop);
        }
    }

    fn step(&self, vcpu: &mut Vcpu) -> Result<(), Stop> {
        if let Err(e) = vcpu.fd.run() {
            return match e.errno() {
                libc::EINTR | libc::EAGAIN => Ok(()),
                _ => Err(Stop::Failed(failed(&format!("vCPU {} cannot run", vcpu.number), e))),
            };
        }
        let _one = self.devices();
        if self.lost() {
            return Ok(());
        }
        let mut served = serve(&mut vcpu.fd, vcpu.number, &self.outside);
        if served.is_ok() {
            served = self.follow_bus().map_err(Stop::Failed);
        }
        // A device may have asked for a stop: the guest must not see the next instruction then.
        if self.control.attention() {
            self.service_locked();
        }
        served
    }

    /// Brings the vCPU to rest: its last I/O instruction finished, and its timer's interrupt, if it has run out, requested.
    fn settle(&self, vcpu: &mut Vcpu) -> Result<(), Stop> {
        if self.lost() {
            return Ok(());
        }
        self.finish_io(vcpu)?;
        if !vcpu.timer.stopped(&vcpu.fd).map_err(Stop::Failed)? {
            return Ok(());
        }
        // The count is at its end; the kernel may come to notice only now. Twice: the first time takes the kernel's timer along to
        // this processor.
        let was = activity(&vcpu.fd)?;
        self.request_timer(vcpu)?;
        std::thread::sleep(TIMER_LATENCY);
        self.request_timer(vcpu)?;
        // A halted vCPU is woken by the request. It has not executed anything, and will be woken again.
        let now = activity(&vcpu.fd)?;
        if (was.0, now.0) == (KVM_MP_STATE_HALTED, KVM_MP_STATE_RUNNABLE) && was.1 == now.1 {
            let halted = kvm_mp_state { mp_state: KVM_MP_STATE_HALTED };
            vcpu.fd.set_mp_state(halted).map_err(|e| Stop::Failed(failed("KVM_SET_MP_STATE", e)))?;
        }
        Ok(())
    }

    /// KVM makes a request of a timer that has run out only on its way into the guest. A pending signal takes it as far as that.
    fn request_timer(&self, vcpu: &mut Vcpu) -> Result<(), Stop> {
        set_signal_mask(&vcpu.fd, true).map_err(Stop::Failed)?;
        mask_signal(libc::SIG_BLOCK);
        // SAFETY: this thread is alive.
        unsafe { libc::pthread_kill(libc::pthread_self(), signal()) };
        let came = vcpu.fd.run().is_ok();
        mask_signal(libc::SIG_UNBLOCK);
        set_signal_mask(&vcpu.fd, false).map_err(Stop::Failed)?;
        if came {
            {
                let _one = self.devices();
                serve(&mut vcpu.fd, vcpu.number, &self.outside)?;
            }
            self.finish_io(vcpu)?;
        }
        Ok(())
    }

    /// Finishes an unfinished I/O instruction, so that the state is one between two instructions.
    fn finish_io(&self, vcpu: &mut Vcpu) -> Result<(), Stop> {
        vcpu.fd.set_kvm_immediate_exit(1);
        let mut served = Ok(());
        // An access of many parts takes one entry for each; a page of them is the most that an instruction has.
        for _ in 0..4096 {
            if served.is_err() || vcpu.fd.run().is_err() {
                break;
            }
            let _one = self.devices();
            served = serve(&mut vcpu.fd, vcpu.number, &self.outside);
        }
        vcpu.fd.set_kvm_immediate_exit(0);
        served
    }
}

/// A vCPU's activity state, and where it is.
fn activity(fd: &VcpuFd) -> Result<(u32, u64), Stop> {
    let lost = |what| move |e| Stop::Failed(failed(what, e));
    let state = fd.get_mp_state().map_err(lost("KVM_GET_MP_STATE"))?.mp_state;
    let at = fd.get_regs().map_err(lost("KVM_GET_REGS"))?.rip;
    Ok((state, at))
}

/// The signal that ends a KVM_RUN; nothing else uses it, and it does nothing.
fn signal() -> libc::c_int {
    libc::SIGRTMIN() + 4
}

extern "C" fn nothing(_: libc::c_int) {}

pub(crate) fn kick_signal() -> Result<(), EngineError> {
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

/// Blocks or unblocks the signal for this thread.
fn mask_signal(how: libc::c_int) {
    // SAFETY: a signal set of our own; the mask is this thread's.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, signal());
        libc::pthread_sigmask(how, &raw const set, std::ptr::null_mut());
    }
}

/// `struct kvm_signal_mask` with the 64 bits that the kernel takes.
#[repr(C, packed)]
struct SignalMask {
    len: u32,
    blocked: u64,
}

/// `_IOW(KVMIO, 0x8b, struct kvm_signal_mask)`.
const KVM_SET_SIGNAL_MASK: libc::c_ulong = 0x4004_ae8b;

/// Whether the vCPU blocks no signal while it is in the kernel, or those that its thread does.
fn set_signal_mask(fd: &VcpuFd, none: bool) -> Result<(), EngineError> {
    let mask = SignalMask { len: 8, blocked: 0 };
    let argument = if none { &raw const mask } else { std::ptr::null() };
    // SAFETY: the kernel reads the structure, or nothing.
    if unsafe { libc::ioctl(fd.as_raw_fd(), KVM_SET_SIGNAL_MASK as _, argument) } == 0 {
        return Ok(());
    }
    Err(failed("KVM_SET_SIGNAL_MASK", std::io::Error::last_os_error()))
}
