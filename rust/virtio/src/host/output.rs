use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, Weak};
use std::time::{Duration, Instant};

use super::{Kind, poll, without_blocking};

/// What a blocked reader may leave unread before output is dropped.
pub const LIMIT: usize = 1 << 20;
/// Largest write after `poll` that no pipe blocks on (POSIX: PIPE_BUF is at least 512, 4096 on Linux).
const POLLED_WRITE: usize = 512;

struct Inner {
    target: Option<(OwnedFd, Kind)>,
    pending: VecDeque<u8>,
    paused: bool,
    flushing: bool,
    dropped: u64,
    written: u64,
    /// The last bytes of all output, for readers in this process; `end` counts from the start.
    capture: VecDeque<u8>,
    capture_limit: usize,
    end: u64,
}

/// Where a console's output goes: a descriptor, a buffer that this process can read, both or nothing.
///
/// Guarantees: `write` never blocks on a reader. Bytes are passed on at once when the reader takes them; else up to [`LIMIT`]
/// wait (they are part of the machine's state), and what comes beyond is dropped and counted. A broken reader (EPIPE) loses output, nothing else.
pub struct Output {
    inner: Mutex<Inner>,
    captured: Condvar,
}

impl Output {
    /// `target` is duplicated. `capture`: how many bytes to keep for [`Output::read`]. Paused at first.
    pub fn new(target: Option<BorrowedFd<'_>>, capture: usize) -> io::Result<Arc<Self>> {
        let target = target.map(|fd| without_blocking(fd, true)).transpose()?;
        let inner = Inner {
            target,
            pending: VecDeque::new(),
            paused: true,
            flushing: false,
            dropped: 0,
            written: 0,
            capture: VecDeque::new(),
            capture_limit: capture,
            end: 0,
        };
        Ok(Arc::new(Self { inner: Mutex::new(inner), captured: Condvar::new() }))
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Takes all of `data`.
    pub fn write(self: &Arc<Self>, data: &[u8]) {
        let mut inner = self.lock();
        if inner.capture_limit > 0 {
            inner.capture.extend(data);
            let excess = inner.capture.len().saturating_sub(inner.capture_limit);
            inner.capture.drain(..excess);
            inner.end += data.len() as u64;
            self.captured.notify_all();
        }
        if inner.target.is_none() {
            return;
        }
        let room = LIMIT.saturating_sub(inner.pending.len());
        let taken = data.len().min(room.max(if inner.pending.is_empty() { data.len() } else { 0 }));
        inner.pending.extend(&data[..taken]);
        inner.dropped += (data.len() - taken) as u64;
        inner.flush();
        self.flush_later(&mut inner);
    }

    /// Bytes that the guest has written and the host has not taken. Part of the machine's state.
    pub fn pending(&self) -> Vec<u8> {
        self.lock().pending.iter().copied().collect()
    }

    /// Puts back what [`Output::pending`] gave in another life; goes out before anything else.
    pub fn restore(&self, pending: &[u8]) {
        let mut inner = self.lock();
        if inner.target.is_some() {
            for &byte in pending.iter().rev() {
                inner.pending.push_front(byte);
            }
        }
    }

    /// Nothing reaches the host any more until [`Output::resume`].
    pub fn pause(&self) {
        let mut inner = self.lock();
        inner.flush();
        inner.paused = true;
    }

    pub fn resume(self: &Arc<Self>) {
        let mut inner = self.lock();
        inner.paused = false;
        inner.flush();
        self.flush_later(&mut inner);
    }

    /// Waits until the host has taken everything; gives up when it has taken nothing for `patience`, or when paused. For the end
    /// of a machine: what a slow reader has not read yet must not die with us.
    pub fn drain(&self, patience: Duration) {
        let mut inner = self.lock();
        let (mut taken, mut since) = (inner.written, Instant::now());
        while !inner.pending.is_empty() && !inner.paused && since.elapsed() < patience {
            let Some((fd, _)) = &inner.target else { return };
            let Ok(fd) = fd.try_clone() else { return };
            drop(inner);
            poll([(&fd, libc::POLLOUT)], patience.as_millis().min(100) as i32);
            inner = self.lock();
            inner.flush();
            if inner.written != taken {
                (taken, since) = (inner.written, Instant::now());
            }
        }
    }

    /// (bytes passed on, bytes lost because nobody took them)
    pub fn counters(&self) -> (u64, u64) {
        let inner = self.lock();
        (inner.written, inner.dropped)
    }

    /// Captured output from position `from` (bytes since the start) on, waiting until there is some or the deadline has passed.
    /// Gives the position after the bytes; it jumps where old output is no longer kept.
    pub fn read(&self, from: u64, deadline: Option<Instant>) -> (u64, Vec<u8>) {
        let mut inner = self.lock();
        while inner.end <= from {
            inner = match deadline {
                None => self.captured.wait(inner).unwrap_or_else(|e| e.into_inner()),
                Some(at) => {
                    let left = at.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return (from.min(inner.end), Vec::new());
                    }
                    self.captured.wait_timeout(inner, left).unwrap_or_else(|e| e.into_inner()).0
                }
            };
        }
        let start = inner.end - inner.capture.len() as u64;
        let skip = from.saturating_sub(start) as usize;
        (inner.end, inner.capture.iter().skip(skip).copied().collect())
    }

    /// A thread of its own waits for the reader, for as long as something is pending.
    fn flush_later(self: &Arc<Self>, inner: &mut Inner) {
        if inner.pending.is_empty() || inner.paused || inner.flushing {
            return;
        }
        let Some((fd, _)) = &inner.target else { return };
        let Ok(fd) = fd.try_clone() else { return };
        let output = Arc::downgrade(self);
        let started = std::thread::Builder::new().name("console-output".into()).spawn(move || wait_and_flush(&output, &fd));
        inner.flushing = started.is_ok();
    }
}

fn wait_and_flush(output: &Weak<Output>, fd: &OwnedFd) {
    loop {
        // A bounded wait only so that the thread ends when the machine is gone.
        let [ready] = poll([(fd, libc::POLLOUT)], 200);
        let Some(output) = output.upgrade() else { return };
        let mut inner = output.lock();
        if ready {
            inner.flush();
        }
        if inner.pending.is_empty() || inner.paused {
            inner.flushing = false;
            return;
        }
    }
}

impl Inner {
    /// Writes what can be written without waiting.
    fn flush(&mut self) {
        let Some((fd, kind)) = &self.target else { return };
        while !self.paused && !self.pending.is_empty() {
            let bytes = self.pending.as_slices().0;
            let result = match kind {
                Kind::Polled if !poll([(fd, libc::POLLOUT)], 0)[0] => return,
                Kind::Polled => write(fd, &bytes[..bytes.len().min(POLLED_WRITE)]),
                Kind::Socket => send(fd, bytes),
                Kind::Plain | Kind::NonBlocking => write(fd, bytes),
            };
            match result {
                Ok(n) => {
                    self.pending.drain(..n);
                    self.written += n as u64;
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => {
                    self.dropped += self.pending.len() as u64;
                    self.pending.clear();
                }
            }
        }
    }
}

fn count(n: isize) -> io::Result<usize> {
    usize::try_from(n).map_err(|_| io::Error::last_os_error())
}

fn write(fd: &OwnedFd, bytes: &[u8]) -> io::Result<usize> {
    // SAFETY: a live descriptor and a slice of that length.
    count(unsafe { libc::write(fd.as_raw_fd(), bytes.as_ptr().cast(), bytes.len()) })
}

fn send(fd: &OwnedFd, bytes: &[u8]) -> io::Result<usize> {
    // SAFETY: a live descriptor and a slice of that length.
    count(unsafe { libc::send(fd.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::Read;
    use std::os::fd::{AsFd, FromRawFd};

    fn pipe() -> (File, File) {
        let mut fds = [0; 2];
        // SAFETY: two descriptors are written into an array of two.
        assert_eq!(unsafe { libc::pipe2(fds.as_mut_ptr(), libc::O_CLOEXEC) }, 0);
        // SAFETY: fresh descriptors that nobody else owns.
        unsafe { (File::from_raw_fd(fds[0]), File::from_raw_fd(fds[1])) }
    }

    #[test]
    fn a_stuck_reader_blocks_nobody_and_gets_it_all_later() {
        let (mut reader, writer) = pipe();
        let output = Output::new(Some(writer.as_fd()), 0).unwrap();
        drop(writer);
        output.resume();
        let data: Vec<u8> = (0..300_000u32).map(|i| i as u8).collect();
        for part in data.chunks(1000) {
            output.write(part);
        }
        assert!(!output.pending().is_empty());
        let mut got = vec![0; data.len()];
        reader.read_exact(&mut got).unwrap();
        assert!(got == data);
        assert_eq!(output.counters().1, 0);
    }

    #[test]
    fn the_shared_description_keeps_blocking() {
        let (_reader, writer) = pipe();
        let _output = Output::new(Some(writer.as_fd()), 0).unwrap();
        // SAFETY: F_GETFL only reads a flag word.
        assert_eq!(unsafe { libc::fcntl(writer.as_raw_fd(), libc::F_GETFL) } & libc::O_NONBLOCK, 0);
    }

    #[test]
    fn beyond_the_limit_output_is_dropped_and_counted() {
        let (_reader, writer) = pipe();
        let output = Output::new(Some(writer.as_fd()), 0).unwrap();
        output.resume();
        for _ in 0..3 * LIMIT / 4096 {
            output.write(&[b'x'; 4096]);
        }
        assert!(output.counters().1 > 0);
        assert!(output.pending().len() <= LIMIT);
    }

    #[test]
    fn a_broken_pipe_is_survived() {
        let (reader, writer) = pipe();
        let output = Output::new(Some(writer.as_fd()), 0).unwrap();
        output.resume();
        drop(reader);
        output.write(b"nobody");
        assert_eq!((output.pending(), output.counters()), (Vec::new(), (0, 6)));
    }

    #[test]
    fn pending_output_moves_to_the_next_life() {
        let (mut reader, writer) = pipe();
        let output = Output::new(Some(writer.as_fd()), 0).unwrap();
        output.write(b"kept"); // paused: nothing goes out
        let state = output.pending();
        drop(output);
        let output = Output::new(Some(writer.as_fd()), 0).unwrap();
        output.restore(&state);
        output.resume();
        output.write(b" and more");
        let mut got = [0; 13];
        reader.read_exact(&mut got).unwrap();
        assert_eq!(&got, b"kept and more");
    }

    #[test]
    fn draining_waits_for_a_slow_reader_but_not_for_a_dead_one() {
        let (mut reader, writer) = pipe();
        let output = Output::new(Some(writer.as_fd()), 0).unwrap();
        drop(writer);
        output.resume();
        output.write(&[1; 500_000]);
        output.drain(Duration::from_millis(10));
        assert!(!output.pending().is_empty());
        let slow = std::thread::spawn(move || {
            let mut all = Vec::new();
            reader.read_to_end(&mut all).unwrap();
            all.len()
        });
        output.drain(Duration::from_secs(20));
        drop(output);
        assert_eq!(slow.join().unwrap(), 500_000);
    }

    #[test]
    fn capture_keeps_the_end() {
        let output = Output::new(None, 8).unwrap();
        output.write(b"0123456789");
        assert_eq!(output.read(0, None), (10, b"23456789".to_vec()));
        assert_eq!(output.read(7, None), (10, b"789".to_vec()));
        assert_eq!(output.read(10, Some(Instant::now() + Duration::from_millis(1))), (10, Vec::new()));
    }
}
