//! How other threads talk to a running engine: stop requests and device work.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Instant;

use crate::engine::Stop;

/// A piece of device work (a virtqueue pass, console input) to be done while no vCPU executes.
pub trait Work: Send + Sync {
    fn run(&self);
}

#[derive(Default)]
struct Inbox {
    stop: Option<Stop>,
    work: VecDeque<Arc<dyn Work>>,
    woken: bool,
}

/// One machine's inbox. Any thread may post; the engine polls [`Control::attention`] between slices.
#[derive(Default)]
pub struct Control {
    attention: AtomicBool,
    inbox: Mutex<Inbox>,
    wake: Condvar,
}

impl Control {
    fn inbox(&self) -> std::sync::MutexGuard<'_, Inbox> {
        self.inbox.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn signal(&self) {
        self.attention.store(true, Ordering::Release);
        self.wake.notify_all();
    }

    /// Asks the engine to return from `run` at the next instruction boundary. The first request wins until it is taken,
    /// except that a failure replaces anything.
    pub fn request_stop(&self, stop: Stop) {
        let mut inbox = self.inbox();
        if inbox.stop.is_none() || matches!(stop, Stop::Failed(_)) {
            inbox.stop = Some(stop);
        }
        self.signal();
    }

    /// Queues device work for the engine's own thread.
    pub fn post(&self, work: Arc<dyn Work>) {
        self.inbox().work.push_back(work);
        self.signal();
    }

    /// Ends a [`Control::wait`] early: an interrupt became pending.
    pub fn wake(&self) {
        self.inbox().woken = true;
        self.signal();
    }

    /// Whether anything waits. One relaxed load.
    pub fn attention(&self) -> bool {
        self.attention.load(Ordering::Relaxed)
    }

    /// Does the posted work on the calling thread and gives back a stop request, if any.
    pub fn service(&self) -> Option<Stop> {
        loop {
            let mut inbox = self.inbox();
            self.attention.store(false, Ordering::Release);
            inbox.woken = false;
            let Some(work) = inbox.work.pop_front() else { return inbox.stop.take() };
            drop(inbox);
            work.run();
        }
    }

    /// Sleeps until something is posted or `deadline` has passed (`None`: for ever).
    pub fn wait(&self, deadline: Option<Instant>) {
        let mut inbox = self.inbox();
        while inbox.stop.is_none() && inbox.work.is_empty() && !inbox.woken {
            match deadline {
                None => inbox = self.wake.wait(inbox).unwrap_or_else(|e| e.into_inner()),
                Some(at) => {
                    let left = at.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return;
                    }
                    inbox = self.wake.wait_timeout(inbox, left).unwrap_or_else(|e| e.into_inner()).0;
                }
            }
        }
    }
}
