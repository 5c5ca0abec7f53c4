//! Level-triggered interrupt lines: INTx and the serial port's IRQ.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};

/// One input pin of an interrupt controller. May be called from any thread.
pub trait IrqLine: Send + Sync {
    fn set_level(&self, high: bool);
}

impl<F: Fn(bool) + Send + Sync> IrqLine for F {
    fn set_level(&self, high: bool) {
        self(high);
    }
}

#[derive(Default)]
struct Sources {
    next: u64,
    high: BTreeSet<u64>,
}

/// A pin that several devices pull: high while any of them is.
pub struct SharedLine {
    pin: Box<dyn IrqLine>,
    sources: Mutex<Sources>,
}

impl SharedLine {
    pub fn new(pin: Box<dyn IrqLine>) -> Arc<Self> {
        Arc::new(Self { pin, sources: Mutex::default() })
    }

    /// One device's end of the line, low at first. Dropping it lets go of the line.
    pub fn source(self: &Arc<Self>) -> LineSource {
        let mut sources = self.sources.lock().unwrap_or_else(|e| e.into_inner());
        sources.next += 1;
        LineSource { line: self.clone(), id: sources.next }
    }

    fn set(&self, id: u64, high: bool) {
        let mut sources = self.sources.lock().unwrap_or_else(|e| e.into_inner());
        let before = !sources.high.is_empty();
        if high {
            sources.high.insert(id);
        } else {
            sources.high.remove(&id);
        }
        let after = !sources.high.is_empty();
        // The pin is moved under the lock: two sources must not overtake each other.
        if before != after {
            self.pin.set_level(after);
        }
    }
}

pub struct LineSource {
    line: Arc<SharedLine>,
    id: u64,
}

impl IrqLine for LineSource {
    fn set_level(&self, high: bool) {
        self.line.set(self.id, high);
    }
}

impl Drop for LineSource {
    fn drop(&mut self) {
        self.line.set(self.id, false);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shared_line_is_high_while_any_source_is() {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let log = seen.clone();
        let line = SharedLine::new(Box::new(move |high| log.lock().unwrap().push(high)));
        let (a, b) = (line.source(), line.source());
        a.set_level(true);
        b.set_level(true);
        a.set_level(false);
        a.set_level(false);
        drop(b);
        assert_eq!(*seen.lock().unwrap(), [true, false]);
    }
}
