//! Writes of the guest that only signal (virtio's queue notifications): noted by the kernel without stopping the vCPU
//! (`KVM_IOEVENTFD`), and passed on to the device by a thread of their own.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use vcpu::{Bus, Doorbell, EngineError};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::failed;

/// What an epoll event of the thread's own end is called; bells count from 1.
const QUIT: u64 = 0;

struct Bell {
    noted: EventFd,
    doorbell: Doorbell,
}

impl Bell {
    /// Whether it was rung since the last look.
    fn rung(&self) -> bool {
        self.noted.read().is_ok()
    }
}

#[derive(Default)]
struct Bells {
    next: u64,
    by_key: BTreeMap<u64, Bell>,
}

/// The doorbells of one machine, as its bus has them.
///
/// Guarantees: a ring is passed on by whoever takes it (`wait`, `rest`, `follow`) exactly once; none is lost when a device moves.
pub(crate) struct Doorbells {
    vm: Arc<VmFd>,
    epoll: OwnedFd,
    quit: EventFd,
    generation: AtomicU64,
    bells: Mutex<Bells>,
}

fn event(what: &str) -> Result<EventFd, EngineError> {
    EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(|e| failed(what, e))
}

impl Doorbells {
    pub fn new(vm: Arc<VmFd>) -> Result<Self, EngineError> {
        // SAFETY: a system call without pointers.
        let epoll = unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) };
        if epoll < 0 {
            return Err(failed("epoll", io::Error::last_os_error()));
        }
        // SAFETY: the descriptor was just made, and is nobody else's.
        let epoll = unsafe { OwnedFd::from_raw_fd(epoll) };
        let made = Self {
            vm,
            epoll,
            quit: event("an eventfd")?,
            generation: AtomicU64::new(u64::MAX),
            bells: Mutex::new(Bells { next: QUIT + 1, by_key: BTreeMap::new() }),
        };
        made.listen(&made.quit, QUIT)?;
        Ok(made)
    }

    fn bells(&self) -> MutexGuard<'_, Bells> {
        self.bells.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn listen(&self, fd: &EventFd, key: u64) -> Result<(), EngineError> {
        let mut event = libc::epoll_event { events: libc::EPOLLIN as u32, u64: key };
        // SAFETY: both descriptors are open, and the kernel copies the event. Closing the eventfd takes it out again.
        let done = unsafe { libc::epoll_ctl(self.epoll.as_raw_fd(), libc::EPOLL_CTL_ADD, fd.as_raw_fd(), &raw mut event) };
        if done == 0 { Ok(()) } else { Err(failed("epoll", io::Error::last_os_error())) }
    }

    /// Takes over what has changed on the bus; one atomic load when nothing has. `ring` is called for bells that were rung where
    /// they no longer are. Whoever calls this keeps others from changing the bus.
    pub fn follow(&self, bus: &Bus, mut ring: impl FnMut(&Doorbell)) -> Result<(), EngineError> {
        let generation = bus.generation();
        if self.generation.load(Ordering::Acquire) == generation {
            return Ok(());
        }
        let mut wanted = bus.doorbells();
        let mut bells = self.bells();
        let same = |a: &Doorbell, b: &Doorbell| a.address == b.address && Arc::ptr_eq(&a.device, &b.device);
        let gone: Vec<u64> = bells
            .by_key
            .iter()
            .filter(|(_, bell)| !wanted.iter().any(|w| same(w, &bell.doorbell)))
            .map(|(&key, _)| key)
            .collect();
        for bell in gone.iter().filter_map(|key| bells.by_key.remove(key)) {
            let at = IoEventAddress::Mmio(bell.doorbell.address);
            self.vm.unregister_ioevent(&bell.noted, &at, NoDatamatch).map_err(|e| failed("KVM_IOEVENTFD", e))?;
            if bell.rung() {
                ring(&bell.doorbell);
            }
        }
        wanted.retain(|w| !bells.by_key.values().any(|bell| same(w, &bell.doorbell)));
        for doorbell in wanted {
            let noted = event("an eventfd")?;
            let at = IoEventAddress::Mmio(doorbell.address);
            self.vm.register_ioevent(&noted, &at, NoDatamatch).map_err(|e| failed("KVM_IOEVENTFD", e))?;
            let key = bells.next;
            bells.next += 1;
            self.listen(&noted, key)?;
            bells.by_key.insert(key, Bell { noted, doorbell });
        }
        self.generation.store(generation, Ordering::Release);
        Ok(())
    }

    /// Sleeps until bells are rung, and calls `ring` for each; false once [`Doorbells::quit`] was called.
    pub fn wait(&self, mut ring: impl FnMut(&Doorbell)) -> bool {
        let mut events = [libc::epoll_event { events: 0, u64: 0 }; 16];
        // SAFETY: the kernel writes at most as many events as there is room for.
        let count = unsafe { libc::epoll_wait(self.epoll.as_raw_fd(), events.as_mut_ptr(), events.len() as i32, -1) };
        for event in &events[..usize::try_from(count).unwrap_or(0)] {
            let key = event.u64;
            if key == QUIT {
                return false;
            }
            // Taken under the lock, passed on outside of it: the device's work may be long.
            let taken = self.bells().by_key.get(&key).filter(|bell| bell.rung()).map(|bell| bell.doorbell.clone());
            if let Some(doorbell) = taken {
                ring(&doorbell);
            }
        }
        true
    }

    /// Ends the wait of the thread that is in [`Doorbells::wait`], or comes there next.
    pub fn quit(&self) {
        // Cannot fail: the counter is far from full.
        let _ = self.quit.write(1);
    }

    /// Once nobody waits and no vCPU runs: passes on what is left.
    pub fn rest(&self, mut ring: impl FnMut(&Doorbell)) {
        let _ = self.quit.read();
        let bells = self.bells();
        bells.by_key.values().filter(|bell| bell.rung()).for_each(|bell| ring(&bell.doorbell));
    }
}
