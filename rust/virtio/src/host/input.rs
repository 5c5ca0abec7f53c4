use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, Weak};
use std::thread::JoinHandle;

use super::{Kind, poll, without_blocking};

/// What is read ahead of the guest; more stays with the host until the guest takes it.
const AHEAD: usize = 4096;
/// Most that a program may queue at once through [`InputBuffer::push`].
pub const LIMIT: usize = 1 << 20;

/// Bytes for the guest, taken from the host and not yet by the guest: part of the machine's state.
#[derive(Default)]
pub struct InputBuffer {
    bytes: Mutex<VecDeque<u8>>,
    changed: Condvar,
}

impl InputBuffer {
    pub fn new(bytes: Vec<u8>) -> Self {
        Self { bytes: Mutex::new(bytes.into()), changed: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<u8>> {
        self.bytes.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Takes as much as there is room for; gives how much that was.
    pub fn push(&self, data: &[u8]) -> usize {
        let mut bytes = self.lock();
        let taken = data.len().min(LIMIT.saturating_sub(bytes.len()));
        bytes.extend(&data[..taken]);
        taken
    }

    /// Takes at most `limit` bytes out.
    pub fn take(&self, limit: usize) -> Vec<u8> {
        let mut bytes = self.lock();
        let n = limit.min(bytes.len());
        let taken = bytes.drain(..n).collect();
        self.changed.notify_all();
        taken
    }

    /// Puts bytes back that were taken and could not be given to the guest.
    pub fn untake(&self, data: &[u8]) {
        let mut bytes = self.lock();
        for &byte in data.iter().rev() {
            bytes.push_front(byte);
        }
    }

    pub fn snapshot(&self) -> Vec<u8> {
        self.lock().iter().copied().collect()
    }

    pub fn is_empty(&self) -> bool {
        self.lock().is_empty()
    }
}

/// A device that takes input.
pub trait InputSink: Send + Sync {
    fn buffer(&self) -> &InputBuffer;
    /// Something was put into the buffer. Called from any thread.
    fn kick(&self);
}

#[derive(Default)]
struct Gate {
    running: bool,
    closed: bool,
}

struct Shared {
    gate: Mutex<Gate>,
    opened: Condvar,
    wake: OwnedFd,
    sink: Weak<dyn InputSink>,
}

impl Shared {
    fn gate(&self) -> MutexGuard<'_, Gate> {
        self.gate.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn interrupt(&self) {
        let one = 1u64.to_ne_bytes();
        // SAFETY: eight bytes into an eventfd of ours.
        unsafe { libc::write(self.wake.as_raw_fd(), one.as_ptr().cast(), one.len()) };
        if let Some(sink) = self.sink.upgrade() {
            sink.buffer().changed.notify_all();
        }
    }
}

/// A thread that reads a descriptor for a device.
///
/// Guarantees: once `pause` has returned, not a byte is read until `resume`; every byte read before is in the device's
/// buffer. End of file ends the thread and nothing else. A terminal is left alone while this process is in its background.
pub struct Input {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Input {
    /// `fd` is duplicated. Paused at first.
    pub fn new(fd: BorrowedFd<'_>, sink: &Arc<dyn InputSink>) -> io::Result<Self> {
        let (fd, kind) = without_blocking(fd, false)?;
        // SAFETY: makes a new descriptor.
        let wake = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        if wake < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: fresh, and nobody else owns it.
        let wake = unsafe { OwnedFd::from_raw_fd(wake) };
        let shared = Arc::new(Shared { gate: Mutex::default(), opened: Condvar::new(), wake, sink: Arc::downgrade(sink) });
        let reader = Reader { fd, kind, shared: shared.clone() };
        let thread = std::thread::Builder::new().name("console-input".into()).spawn(move || reader.run())?;
        Ok(Self { shared, thread: Some(thread) })
    }

    pub fn pause(&self) {
        self.shared.gate().running = false;
        self.shared.interrupt();
    }

    pub fn resume(&self) {
        self.shared.gate().running = true;
        self.shared.opened.notify_all();
    }

    /// Ends the thread.
    pub fn close(&mut self) {
        self.shared.gate().closed = true;
        self.shared.opened.notify_all();
        self.shared.interrupt();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Drop for Input {
    fn drop(&mut self) {
        self.close();
    }
}

struct Reader {
    fd: OwnedFd,
    kind: Kind,
    shared: Arc<Shared>,
}

enum Step {
    Go,
    /// Nothing can be read now although `poll` may say so; look again a little later.
    Later,
    End,
}

impl Reader {
    fn run(&self) {
        block_terminal_stops();
        loop {
            {
                let mut gate = self.shared.gate();
                while !gate.running && !gate.closed {
                    gate = self.shared.opened.wait(gate).unwrap_or_else(|e| e.into_inner());
                }
                if gate.closed {
                    return;
                }
            }
            let Some(sink) = self.shared.sink.upgrade() else { return };
            if !self.wait_for_room(sink.buffer()) {
                continue;
            }
            if self.in_background() {
                poll([(&self.shared.wake, libc::POLLIN)], 300);
                self.drain_wake();
                continue;
            }
            let [_, woken] = poll([(&self.fd, libc::POLLIN), (&self.shared.wake, libc::POLLIN)], -1);
            if woken {
                self.drain_wake();
                continue;
            }
            match self.step(sink.as_ref()) {
                Step::Go => {}
                Step::Later => {
                    poll([(&self.shared.wake, libc::POLLIN)], 100);
                }
                Step::End => return,
            }
        }
    }

    /// False when the gate may have changed meanwhile.
    fn wait_for_room(&self, buffer: &InputBuffer) -> bool {
        let bytes = buffer.lock();
        if bytes.len() < AHEAD {
            return true;
        }
        // Bounded, because a pause may notify just before we wait.
        let wait = buffer.changed.wait_timeout(bytes, std::time::Duration::from_millis(200));
        drop(wait);
        false
    }

    /// Reads once, under the gate.
    fn step(&self, sink: &dyn InputSink) -> Step {
        let gate = self.shared.gate();
        if !gate.running || gate.closed {
            return Step::Go;
        }
        if !poll([(&self.fd, libc::POLLIN)], 0)[0] {
            return Step::Go;
        }
        let mut data = [0; AHEAD];
        let fd = self.fd.as_raw_fd();
        let n = match self.kind {
            // SAFETY: a live descriptor and a buffer of that length.
            Kind::Socket => unsafe { libc::recv(fd, data.as_mut_ptr().cast(), data.len(), libc::MSG_DONTWAIT) },
            // SAFETY: as above.
            _ => unsafe { libc::read(fd, data.as_mut_ptr().cast(), data.len()) },
        };
        match n {
            0 => Step::End,
            1.. => {
                sink.buffer().push(&data[..n as usize]);
                sink.kick();
                Step::Go
            }
            _ => match io::Error::last_os_error().raw_os_error() {
                Some(libc::EINTR) => Step::Go,
                // EIO: a terminal that is ours no more, or not at the moment.
                Some(libc::EAGAIN | libc::EIO) => Step::Later,
                _ => Step::End,
            },
        }
    }

    fn in_background(&self) -> bool {
        // SAFETY: these only look at process groups; what is not our controlling terminal has no foreground for us.
        unsafe {
            let foreground = libc::tcgetpgrp(self.fd.as_raw_fd());
            foreground > 0 && foreground != libc::getpgrp()
        }
    }

    fn drain_wake(&self) {
        let mut count = [0u8; 8];
        // SAFETY: eight bytes from a non-blocking eventfd of ours.
        unsafe { libc::read(self.shared.wake.as_raw_fd(), count.as_mut_ptr().cast(), count.len()) };
    }
}

/// A read in the background then gives EIO instead of stopping the process.
fn block_terminal_stops() {
    // SAFETY: a signal set of ours; only this thread's mask changes.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&mut set);
        libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::Write;
    use std::os::fd::AsFd;
    use std::sync::mpsc;
    use std::time::Duration;

    struct Sink {
        buffer: InputBuffer,
        kicks: Mutex<mpsc::Sender<()>>,
    }

    impl InputSink for Sink {
        fn buffer(&self) -> &InputBuffer {
            &self.buffer
        }

        fn kick(&self) {
            let _ = self.kicks.lock().unwrap().send(());
        }
    }

    fn pipe() -> (File, File) {
        let mut fds = [0; 2];
        // SAFETY: two descriptors are written into an array of two.
        assert_eq!(unsafe { libc::pipe2(fds.as_mut_ptr(), libc::O_CLOEXEC) }, 0);
        // SAFETY: fresh descriptors that nobody else owns.
        unsafe { (File::from_raw_fd(fds[0]), File::from_raw_fd(fds[1])) }
    }

    #[test]
    fn every_byte_is_in_the_buffer_or_with_the_host() {
        let (reader, mut writer) = pipe();
        let (kicks, kicked) = mpsc::channel();
        let sink = Arc::new(Sink { buffer: InputBuffer::default(), kicks: Mutex::new(kicks) });
        let dynamic: Arc<dyn InputSink> = sink.clone();
        let mut input = Input::new(reader.as_fd(), &dynamic).unwrap();
        input.resume();
        writer.write_all(b"taken").unwrap();
        let mut got = Vec::new();
        while got.len() < 5 {
            kicked.recv_timeout(Duration::from_secs(20)).unwrap();
            got.extend(sink.buffer.take(100));
        }
        assert_eq!(got, b"taken");
        input.pause();
        writer.write_all(b"left").unwrap();
        input.close();
        assert!(sink.buffer.is_empty());
        let mut rest = [0; 4];
        std::io::Read::read_exact(&mut &reader, &mut rest).unwrap();
        assert_eq!(&rest, b"left");
    }

    #[test]
    fn end_of_file_ends_only_the_thread() {
        let (reader, writer) = pipe();
        drop(writer);
        let (kicks, _kicked) = mpsc::channel();
        let dynamic: Arc<dyn InputSink> = Arc::new(Sink { buffer: InputBuffer::default(), kicks: Mutex::new(kicks) });
        let mut input = Input::new(reader.as_fd(), &dynamic).unwrap();
        input.resume();
        input.thread.take().unwrap().join().unwrap();
        input.pause();
        input.resume();
    }
}
