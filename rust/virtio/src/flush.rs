//! Flushes on a thread of their own: a disk may take seconds for one, and all vCPUs share the thread that devices work on.

use std::fs::File;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;

/// Called after each flush, on the flushing thread.
pub type Notify = Box<dyn Fn() + Send>;

#[derive(Default)]
struct Done {
    outstanding: usize,
    /// (ticket, whether it worked)
    finished: Vec<(u64, bool)>,
}

#[derive(Default)]
struct Shared {
    done: Mutex<Done>,
    changed: Condvar,
}

impl Shared {
    fn done(&self) -> MutexGuard<'_, Done> {
        self.done.lock().unwrap_or_else(|e| e.into_inner())
    }
}

/// Lets others wait without holding the device.
#[derive(Clone)]
pub struct Flushes(Arc<Shared>);

impl Flushes {
    /// Returns when no flush is going on.
    pub fn wait(&self) {
        let mut done = self.0.done();
        while done.outstanding > 0 {
            done = self.0.changed.wait(done).unwrap_or_else(|e| e.into_inner());
        }
    }
}

/// The thread. Dropping it waits for the flush that is going on: only then is the file, and the lock on it, let go.
pub struct Flusher {
    shared: Arc<Shared>,
    jobs: Option<Sender<u64>>,
    thread: Option<JoinHandle<()>>,
    next: u64,
}

impl Flusher {
    pub fn new(file: File, notify: Notify) -> std::io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let (jobs, inbox) = channel::<u64>();
        let there = shared.clone();
        let thread = std::thread::Builder::new().name("disk-flush".into()).spawn(move || {
            for ticket in inbox {
                let worked = file.sync_data().is_ok();
                let mut done = there.done();
                done.outstanding -= 1;
                done.finished.push((ticket, worked));
                there.changed.notify_all();
                drop(done);
                notify();
            }
        })?;
        Ok(Self { shared, jobs: Some(jobs), thread: Some(thread), next: 0 })
    }

    /// Starts a flush of all that was written before; gives its ticket.
    pub fn start(&mut self) -> u64 {
        self.next += 1;
        self.shared.done().outstanding += 1;
        if self.jobs.as_ref().is_none_or(|jobs| jobs.send(self.next).is_err()) {
            // The thread is gone, which takes a panic there: tell of a failure rather than never.
            let mut done = self.shared.done();
            done.outstanding -= 1;
            done.finished.push((self.next, false));
        }
        self.next
    }

    /// Takes out what has ended: tickets, and whether it worked.
    pub fn finished(&self) -> Vec<(u64, bool)> {
        std::mem::take(&mut self.shared.done().finished)
    }

    pub fn flushes(&self) -> Flushes {
        Flushes(self.shared.clone())
    }
}

impl Drop for Flusher {
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
