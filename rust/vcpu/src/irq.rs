//! Interrupt plumbing shared by the engines.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

/// Where message-signalled interrupts go: an engine's LAPICs. `address` and `data` as a PCI device writes them
/// (Intel SDM vol. 3, 11.11): 0xFEExxxxx, destination in bits 19:12, vector in data bits 7:0.
/// May be called from any thread; it wakes the target vCPU.
pub trait IrqSink: Send + Sync {
    fn msi(&self, address: u64, data: u32);

    /// The I/O APIC's level-triggered pins have changed: the message of each, masked or not. For LAPICs that must know
    /// beforehand whose end of interrupt to report. Called with the I/O APIC locked.
    fn level_pins(&self, _messages: &[(u64, u32)]) {}
}

/// Told by a LAPIC of the end of a level-triggered interrupt (the IOAPIC listens).
pub trait EoiListener: Send + Sync {
    fn eoi(&self, vector: u8);
}

/// The wire from a pair of 8259s to the boot CPU's INTR pin (LINT0 of its local APIC), and the acknowledge cycle back.
pub struct IntrLine {
    level: AtomicBool,
    engine: Mutex<Option<IntrEnd>>,
}

/// The engine's end: told of every change of the level, from any thread.
pub type IntrEnd = Box<dyn Fn() + Send>;
/// The controller's end: an acknowledge cycle, which gives the vector.
pub type IntrAcknowledge = Box<dyn Fn() -> u8 + Send + Sync>;

impl Default for IntrLine {
    fn default() -> Self {
        Self { level: AtomicBool::new(false), engine: Mutex::new(None) }
    }
}

impl IntrLine {
    pub fn level(&self) -> bool {
        self.level.load(Ordering::Acquire)
    }

    pub fn set(&self, level: bool) {
        if self.level.swap(level, Ordering::AcqRel) != level {
            if let Some(end) = &*self.end() {
                end();
            }
        }
    }

    /// The engine that looks at the level from now on; it is told at once.
    pub fn connect(&self, end: IntrEnd) {
        end();
        *self.end() = Some(end);
    }

    fn end(&self) -> std::sync::MutexGuard<'_, Option<IntrEnd>> {
        self.engine.lock().unwrap_or_else(|e| e.into_inner())
    }
}

enum Stage {
    Waiting(Vec<(u64, u32)>),
    Connected(Arc<dyn IrqSink>),
}

/// The sink that devices are built with before there is an engine. Messages sent until then wait for it.
pub struct MsiRelay(Mutex<Stage>);

impl Default for MsiRelay {
    fn default() -> Self {
        Self(Mutex::new(Stage::Waiting(Vec::new())))
    }
}

impl MsiRelay {
    fn stage(&self) -> std::sync::MutexGuard<'_, Stage> {
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Passes on to `sink` from now on, beginning with what waits.
    pub fn connect(&self, sink: Arc<dyn IrqSink>) {
        let before = std::mem::replace(&mut *self.stage(), Stage::Connected(sink.clone()));
        if let Stage::Waiting(messages) = before {
            messages.into_iter().for_each(|(address, data)| sink.msi(address, data));
        }
    }

    /// Takes out the messages (address, data) that wait for an engine.
    pub fn take_waiting(&self) -> Vec<(u64, u32)> {
        match &mut *self.stage() {
            Stage::Waiting(messages) => std::mem::take(messages),
            Stage::Connected(_) => Vec::new(),
        }
    }
}

impl IrqSink for MsiRelay {
    fn msi(&self, address: u64, data: u32) {
        let sink = match &mut *self.stage() {
            Stage::Waiting(messages) => return messages.push((address, data)),
            Stage::Connected(sink) => sink.clone(),
        };
        sink.msi(address, data);
    }
}
