//! Chunks for those who do not ask: a processor that runs the guest itself touches memory, and the kernel asks us (`userfaultfd`,
//! Documentation/admin-guide/mm/userfaultfd.rst).

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::thread::JoinHandle;

use crate::region::HostRange;
use crate::source::Loader;
use crate::{GuestMemory, MemoryError, PAGE_SIZE};

const UFFD_API: u64 = 0xaa;
const USERFAULTFD_IOC_NEW: libc::c_ulong = 0xaa00;
const UFFDIO_API: libc::c_ulong = 0xc018_aa3f;
const UFFDIO_REGISTER: libc::c_ulong = 0xc020_aa00;
const UFFDIO_WAKE: libc::c_ulong = 0x8010_aa02;
const UFFDIO_COPY: libc::c_ulong = 0xc028_aa03;
const UFFDIO_ZEROPAGE: libc::c_ulong = 0xc020_aa04;
const MODE_MISSING: u64 = 1;
const EVENT_PAGEFAULT: u8 = 0x12;

/// How often it is looked whether those who wait for a damaged page may be let go.
const LOOK_MS: i32 = 5;

/// `struct uffdio_copy`: addresses, bytes, mode, and what was done.
#[repr(C)]
struct Copy {
    to: u64,
    from: u64,
    len: u64,
    mode: u64,
    done: i64,
}

/// `struct uffd_msg` of a page fault.
#[repr(C)]
#[derive(Clone, Copy)]
struct Message {
    event: u8,
    reserved: [u8; 7],
    flags: u64,
    address: u64,
    thread: u64,
}

/// A userfaultfd with the ranges that were registered with it.
pub(crate) struct Uffd {
    fd: OwnedFd,
}

fn owned(fd: libc::c_long) -> io::Result<OwnedFd> {
    match RawFd::try_from(fd) {
        // SAFETY: the kernel has just made it for us.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(io::Error::last_os_error()),
    }
}

impl Uffd {
    /// One that also serves the kernel's own accesses (KVM's, and system calls'): needs privilege, `/dev/userfaultfd`, or the
    /// system setting `vm.unprivileged_userfaultfd`.
    pub fn new() -> io::Result<Self> {
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
        // SAFETY: a system call without pointers.
        let fd = owned(unsafe { libc::syscall(libc::SYS_userfaultfd, flags) }).or_else(|refused| {
            let device = std::fs::File::open("/dev/userfaultfd").map_err(|_| refused)?;
            // SAFETY: as above.
            owned(unsafe { libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW as _, flags) }.into())
        })?;
        let uffd = Self { fd };
        let mut api = [UFFD_API, 0, 0];
        uffd.call(UFFDIO_API, &mut api)?;
        Ok(uffd)
    }

    fn call<T>(&self, request: libc::c_ulong, argument: &mut T) -> io::Result<()> {
        // SAFETY: each request is made with the structure that it takes.
        if unsafe { libc::ioctl(self.fd.as_raw_fd(), request as _, std::ptr::from_mut(argument)) } == 0 {
            return Ok(());
        }
        Err(io::Error::last_os_error())
    }

    fn register(&self, host: HostRange) -> io::Result<()> {
        self.call(UFFDIO_REGISTER, &mut [host.address() as u64, host.size(), MODE_MISSING, 0])
    }

    /// Puts `bytes` (whole pages) where nothing is yet, and lets go on who waits for them. What is already there is overwritten.
    pub fn copy(&self, host: HostRange, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let mut done = 0;
        while done < bytes.len() {
            let rest = &bytes[done..];
            let to = host.at(offset + done as u64).as_ptr() as u64;
            let mut copy = Copy { to, from: rest.as_ptr() as u64, len: rest.len() as u64, mode: 0, done: 0 };
            match self.call(UFFDIO_COPY, &mut copy) {
                Ok(()) => return Ok(()),
                Err(e) => match e.raw_os_error() {
                    // A part; or the address space was changing.
                    Some(libc::EAGAIN) => done += usize::try_from(copy.done).unwrap_or(0),
                    Some(libc::EEXIST) => {
                        let page = &rest[..PAGE_SIZE as usize];
                        host.copy_in(offset + done as u64, page);
                        self.wake(to)?;
                        done += page.len();
                    }
                    _ => return Err(e),
                },
            }
        }
        Ok(())
    }

    fn zero(&self, address: u64) -> io::Result<()> {
        loop {
            match self.call(UFFDIO_ZEROPAGE, &mut [address, PAGE_SIZE, 0, 0]) {
                Err(e) if e.raw_os_error() == Some(libc::EAGAIN) => {}
                Err(e) if e.raw_os_error() == Some(libc::EEXIST) => return self.wake(address),
                done => return done,
            }
        }
    }

    fn wake(&self, address: u64) -> io::Result<()> {
        self.call(UFFDIO_WAKE, &mut [address, PAGE_SIZE])
    }
}

/// What becomes of those who wait for memory that is damaged.
pub trait OnDamage: Send {
    /// Called with each page that cannot be given: the machine must stop, and whoever executes the guest be kept from going on.
    fn damaged(&self, error: MemoryError);
    /// Whether nobody executes the guest any more, so that those who still wait in the kernel may have zeros: some kernels do
    /// not let a signal end such a wait.
    fn stopped(&self) -> bool;
}

/// The thread that answers.
pub(crate) struct Faults {
    quit: OwnedFd,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Faults {
    fn drop(&mut self) {
        let one = 1u64;
        // SAFETY: eight bytes of a number of ours.
        unsafe { libc::write(self.quit.as_raw_fd(), (&raw const one).cast(), 8) };
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// What the thread works on.
struct Server {
    uffd: Arc<Uffd>,
    quit: RawFd,
    parts: Vec<(HostRange, Arc<Loader>)>,
    owner: Box<dyn OnDamage>,
    /// Pages (addresses) that somebody waits for in vain.
    damaged: Vec<u64>,
}

impl Server {
    fn run(mut self) {
        loop {
            let mut fds = [
                libc::pollfd { fd: self.uffd.fd.as_raw_fd(), events: libc::POLLIN, revents: 0 },
                libc::pollfd { fd: self.quit, events: libc::POLLIN, revents: 0 },
            ];
            let timeout = if self.damaged.is_empty() { -1 } else { LOOK_MS };
            // SAFETY: two entries, as said.
            unsafe { libc::poll(fds.as_mut_ptr(), 2, timeout) };
            if fds[1].revents != 0 {
                return;
            }
            // Before the answers: one who was stopped while it waited comes here again and again.
            if !self.damaged.is_empty() && self.owner.stopped() {
                for address in std::mem::take(&mut self.damaged) {
                    let _ = self.uffd.zero(address);
                }
            }
            if fds[0].revents & libc::POLLIN != 0 {
                self.answer();
            }
        }
    }

    fn answer(&mut self) {
        let mut messages = [Message { event: 0, reserved: [0; 7], flags: 0, address: 0, thread: 0 }; 16];
        // SAFETY: the kernel writes whole messages into the array, at most as many as there is room for.
        let read =
            unsafe { libc::read(self.uffd.fd.as_raw_fd(), messages.as_mut_ptr().cast(), std::mem::size_of_val(&messages)) };
        let count = usize::try_from(read).unwrap_or(0) / std::mem::size_of::<Message>();
        for message in messages[..count].iter().filter(|m| m.event == EVENT_PAGEFAULT) {
            let address = message.address & !(PAGE_SIZE - 1);
            if self.damaged.contains(&address) {
                continue;
            }
            if let Err(error) = self.give(address) {
                self.damaged.push(address);
                self.owner.damaged(error);
            }
        }
    }

    fn give(&self, address: u64) -> Result<(), MemoryError> {
        let within = |host: &HostRange| address.checked_sub(host.address() as u64).filter(|offset| *offset < host.size());
        let Some((offset, host, loader)) =
            self.parts.iter().find_map(|(host, loader)| within(host).map(|offset| (offset, *host, loader)))
        else {
            return Ok(());
        };
        loader.ensure(offset, host)?;
        // Pages of zeros inside a chunk are not installed with it. This also lets go on who waits for one that was.
        self.uffd.zero(address).map_err(|e| MemoryError::host("cannot give the guest a page", e))
    }
}

impl GuestMemory {
    /// Why memory of a restored machine cannot be given to those who do not ask first; `None` where it can.
    pub fn faults_unavailable() -> Option<String> {
        Uffd::new().err().map(|e| format!("userfaultfd: {e}"))
    }

    /// From now on whoever touches memory that is still only in the snapshot waits until it is there, verified. False, and
    /// nothing has changed, when nothing is left in it. Called once, before anybody else uses the memory.
    ///
    pub fn serve_faults(&self, owner: Box<dyn OnDamage>) -> Result<bool, MemoryError> {
        let failed = |what: &str| {
            let what = format!("memory on demand: {what}");
            move |e| MemoryError::host(what, e)
        };
        let parts: Vec<_> = self.regions().iter().filter_map(|r| r.shared_loader().map(|loader| (r.host(), loader))).collect();
        if parts.is_empty() {
            return Ok(false);
        }
        let uffd = Arc::new(Uffd::new().map_err(failed("userfaultfd"))?);
        // SAFETY: a system call without pointers.
        let quit = owned(unsafe { libc::eventfd(0, libc::EFD_CLOEXEC) }.into()).map_err(failed("eventfd"))?;
        for (host, _) in &parts {
            uffd.register(*host).map_err(failed("UFFDIO_REGISTER"))?;
        }
        let (loaders, installing): (Vec<_>, _) = (parts.iter().map(|p| p.1.clone()).collect(), uffd.clone());
        let server = Server { uffd, quit: quit.as_raw_fd(), parts, owner, damaged: Vec::new() };
        let thread =
            std::thread::Builder::new().name("faults".into()).spawn(move || server.run()).map_err(failed("no thread"))?;
        // Last: until here an error closes the descriptor, and with it all is as before.
        loaders.iter().for_each(|loader| loader.install_by(installing.clone()));
        self.keep_faults(Faults { quit, thread: Some(thread) });
        Ok(true)
    }
}
