//! The I/O APIC (Intel 82093AA data sheet): 24 pins that become messages to the LAPICs. Both engines use this one.

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, Weak};

use serde::{Deserialize, Serialize};

use crate::bus::Device;
use crate::irq::{EoiListener, IrqSink};

pub const PINS: usize = 24;
/// Where Linux and every firmware expect the first I/O APIC.
pub const IOAPIC_BASE: u64 = 0xfec0_0000;
pub const IOAPIC_SIZE: u64 = 0x1000;
/// Version 0x11 (no EOI register), last pin in bits 16–23.
const VERSION: u32 = 0x11 | (PINS as u32 - 1) << 16;

const MASKED: u64 = 1 << 16;
const LEVEL: u64 = 1 << 15;
const REMOTE_IRR: u64 = 1 << 14;
const DELIVERY_STATUS: u64 = 1 << 12;
const LOGICAL: u64 = 1 << 11;
/// Vector, delivery mode, destination mode, polarity, trigger, mask; destination in bits 56–63.
const WRITABLE: u64 = 0xff00_0000_0001_afff;

/// What is saved. `redirection[pin]` as the guest reads the two words, `lines` one bit a pin.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct IoapicState {
    /// The identification register's bits 24–27.
    pub id: u8,
    /// IOREGSEL.
    pub select: u8,
    pub redirection: Vec<u64>,
    /// Input levels that the devices hold.
    pub lines: u32,
}

impl Default for IoapicState {
    fn default() -> Self {
        Self { id: 0, select: 0, redirection: vec![MASKED; PINS], lines: 0 }
    }
}

/// Why a saved I/O APIC cannot be taken over.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("ioapic.{field}: {why}")]
pub struct IoapicStateError {
    pub field: &'static str,
    pub why: String,
}

/// Guarantees: any access of any width returns; a line may be set from any thread; a level that is still held
/// when its interrupt ends (EOI) is sent again.
pub struct Ioapic {
    state: Mutex<IoapicState>,
    /// Weak, because the LAPICs hold us as their [`EoiListener`].
    sink: OnceLock<Weak<dyn IrqSink>>,
}

impl Default for Ioapic {
    fn default() -> Self {
        Self { state: Mutex::new(IoapicState::default()), sink: OnceLock::new() }
    }
}

/// The message (address, data) that a redirection entry stands for.
fn message(entry: u64) -> (u64, u32) {
    let mode = entry >> 8 & 7;
    // Redirection hint (bit 3) goes with lowest priority, destination mode is bit 2.
    let address = 0xfee0_0000 | (entry >> 56) << 12 | u64::from(mode == 1) << 3 | (entry & LOGICAL) >> 9;
    let level = entry & LEVEL != 0;
    (address, (entry & 0x7ff) as u32 | u32::from(level) << 15 | 1 << 14)
}

impl Ioapic {
    pub fn from_state(state: IoapicState) -> Result<Self, IoapicStateError> {
        let refuse = |field, why: String| Err(IoapicStateError { field, why });
        if state.redirection.len() != PINS {
            return refuse("redirection", format!("{} pins, expected {PINS}", state.redirection.len()));
        }
        if let Some(pin) = state.redirection.iter().position(|r| r & !(WRITABLE | REMOTE_IRR) != 0) {
            return refuse("redirection", format!("pin {pin}: reserved bits set in {:#x}", state.redirection[pin]));
        }
        if let Some(pin) = state.redirection.iter().position(|r| r & (REMOTE_IRR | LEVEL) == REMOTE_IRR) {
            return refuse("redirection", format!("pin {pin}: remote IRR without level trigger"));
        }
        if state.id > 15 {
            return refuse("id", format!("{} does not fit four bits", state.id));
        }
        if state.lines >> PINS != 0 {
            return refuse("lines", format!("{:#x} names pins beyond {}", state.lines, PINS - 1));
        }
        Ok(Self { state: Mutex::new(state), sink: OnceLock::new() })
    }

    pub fn state(&self) -> IoapicState {
        self.lock().clone()
    }

    /// Binds the LAPICs. Called once, before the first vCPU runs; a second call is ignored.
    pub fn connect(&self, sink: Weak<dyn IrqSink>) {
        let s = self.lock();
        let _ = self.sink.set(sink);
        self.announce(&s);
    }

    fn lock(&self) -> MutexGuard<'_, IoapicState> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Sets the input of `pin` (which must be below 24, else nothing happens).
    pub fn set_line(&self, pin: u32, level: bool) {
        if pin as usize >= PINS {
            return;
        }
        let mut s = self.lock();
        let was = s.lines >> pin & 1 != 0;
        if level {
            s.lines |= 1 << pin;
        } else {
            s.lines &= !(1 << pin);
        }
        if !level {
            return;
        }
        let entry = s.redirection[pin as usize];
        if entry & LEVEL != 0 {
            self.service_level(&mut s, pin as usize);
        } else if !was && entry & MASKED == 0 {
            // An edge on a masked pin is lost, as in the data sheet.
            self.send(entry);
        }
    }

    /// One rising edge and back: what an edge-triggered device does.
    pub fn pulse(&self, pin: u32) {
        self.set_line(pin, true);
        self.set_line(pin, false);
    }

    fn service_level(&self, s: &mut IoapicState, pin: usize) {
        let entry = s.redirection[pin];
        if s.lines >> pin & 1 != 0 && entry & (MASKED | REMOTE_IRR) == 0 && entry & LEVEL != 0 {
            s.redirection[pin] |= REMOTE_IRR;
            self.send(entry);
        }
    }

    fn sink(&self) -> Option<Arc<dyn IrqSink>> {
        self.sink.get().and_then(Weak::upgrade)
    }

    fn send(&self, entry: u64) {
        if let Some(sink) = self.sink() {
            let (address, data) = message(entry);
            sink.msi(address, data);
        }
    }

    /// Tells the LAPICs of the level-triggered pins.
    fn announce(&self, s: &IoapicState) {
        if let Some(sink) = self.sink() {
            let level = s.redirection.iter().filter(|&&entry| entry & LEVEL != 0);
            sink.level_pins(&level.map(|&entry| message(entry)).collect::<Vec<_>>());
        }
    }

    fn read_register(&self, s: &IoapicState) -> u32 {
        match s.select {
            0 | 2 => u32::from(s.id) << 24,
            1 => VERSION,
            n @ 0x10..0x40 => {
                let entry = s.redirection[usize::from(n - 0x10) / 2];
                if n & 1 == 0 { entry as u32 } else { (entry >> 32) as u32 }
            }
            _ => 0,
        }
    }

    fn write_register(&self, s: &mut IoapicState, value: u32) {
        match s.select {
            0 => s.id = (value >> 24 & 15) as u8,
            n @ 0x10..0x40 => {
                let pin = usize::from(n - 0x10) / 2;
                let old = s.redirection[pin];
                let new =
                    if n & 1 == 0 { old & !0xffff_ffff | u64::from(value) } else { old & 0xffff_ffff | u64::from(value) << 32 };
                let mut entry = new & WRITABLE | old & REMOTE_IRR;
                if entry & LEVEL == 0 {
                    // Linux clears a stuck remote IRR of version 0x11 by switching to edge and back.
                    entry &= !REMOTE_IRR;
                }
                let entry = entry & !DELIVERY_STATUS;
                s.redirection[pin] = entry;
                if (entry | old) & LEVEL != 0 && (entry ^ old) & !(MASKED | REMOTE_IRR) != 0 {
                    self.announce(s);
                }
                self.service_level(s, pin);
            }
            _ => {}
        }
    }
}

impl Device for Ioapic {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let s = self.lock();
        let value = match offset & !3 {
            0 => u32::from(s.select),
            0x10 => self.read_register(&s),
            _ => 0,
        };
        data.fill(0);
        let bytes = value.to_le_bytes();
        let from = (offset & 3) as usize;
        for (to, from) in data.iter_mut().zip(&bytes[from..]) {
            *to = *from;
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let Some(&first) = data.first() else { return };
        let mut s = self.lock();
        match offset {
            0 => s.select = first,
            0x10 if data.len() >= 4 => {
                let value = u32::from_le_bytes([data[0], data[1], data[2], data[3]]);
                self.write_register(&mut s, value);
            }
            _ => {}
        }
    }
}

impl EoiListener for Ioapic {
    fn eoi(&self, vector: u8) {
        let mut s = self.lock();
        for pin in 0..PINS {
            let entry = s.redirection[pin];
            if entry as u8 == vector && entry & (LEVEL | REMOTE_IRR) == LEVEL | REMOTE_IRR {
                s.redirection[pin] &= !REMOTE_IRR;
                self.service_level(&mut s, pin);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Sink(Mutex<Vec<(u64, u32)>>);
    impl IrqSink for Sink {
        fn msi(&self, address: u64, data: u32) {
            self.0.lock().unwrap().push((address, data));
        }
    }
    impl Sink {
        fn take(&self) -> Vec<(u64, u32)> {
            std::mem::take(&mut self.0.lock().unwrap())
        }
    }

    fn write(io: &Ioapic, register: u8, value: u32) {
        io.write(0, &[register]);
        io.write(0x10, &value.to_le_bytes());
    }
    fn read(io: &Ioapic, register: u8) -> u32 {
        io.write(0, &[register]);
        let mut b = [0; 4];
        io.read(0x10, &mut b);
        u32::from_le_bytes(b)
    }
    fn made() -> (Arc<Sink>, Ioapic) {
        let sink = Arc::new(Sink::default());
        let io = Ioapic::default();
        let weak: Weak<dyn IrqSink> = Arc::downgrade(&(sink.clone() as Arc<dyn IrqSink>));
        io.connect(weak);
        (sink, io)
    }

    #[test]
    fn registers() {
        let (_, io) = made();
        assert_eq!(read(&io, 1), 0x0017_0011);
        write(&io, 1, 0xffff_ffff);
        assert_eq!(read(&io, 1), 0x0017_0011);
        write(&io, 0, 0xffff_ffff);
        assert_eq!((read(&io, 0), read(&io, 2)), (0x0f00_0000, 0x0f00_0000));
        write(&io, 0x10, 0xffff_ffff);
        assert_eq!(read(&io, 0x10), 0x0001_afff);
        write(&io, 0x11, 0xffff_ffff);
        assert_eq!(read(&io, 0x11), 0xff00_0000);
    }

    #[test]
    fn edge_sends_once_and_masked_edge_is_lost() {
        let (sink, io) = made();
        io.set_line(4, true);
        io.set_line(4, false);
        write(&io, 0x10 + 9, 0x0200_0000);
        write(&io, 0x10 + 8, 0x31);
        assert!(sink.take().is_empty());
        io.set_line(4, true);
        io.set_line(4, true);
        assert_eq!(sink.take(), [(0xfee0_2000, 0x4031)]);
    }

    #[test]
    fn level_waits_for_eoi_and_repeats_while_held() {
        let (sink, io) = made();
        write(&io, 0x10 + 20, 0x8000 | 0x44);
        io.set_line(10, true);
        io.set_line(10, true);
        assert_eq!(sink.take(), [(0xfee0_0000, 0xc044)]);
        assert_eq!(read(&io, 0x10 + 20) >> 14 & 1, 1);
        io.eoi(0x44);
        assert_eq!(sink.take().len(), 1);
        io.set_line(10, false);
        io.eoi(0x44);
        assert!(sink.take().is_empty());
        assert_eq!(read(&io, 0x10 + 20) >> 14 & 1, 0);
        write(&io, 0x10 + 20, 0x1_8044);
        io.set_line(10, true);
        assert!(sink.take().is_empty());
        write(&io, 0x10 + 20, 0x8044);
        assert_eq!(sink.take().len(), 1);
    }

    #[test]
    fn logical_lowest_priority_address() {
        let (sink, io) = made();
        write(&io, 0x11, 0x0300_0000);
        write(&io, 0x10, 0x0900 | 0x50);
        io.pulse(0);
        assert_eq!(sink.take(), [(0xfee0_300c, 0x4150)]);
    }

    #[test]
    fn state_is_validated() {
        let good = IoapicState::default();
        assert!(Ioapic::from_state(good.clone()).is_ok());
        let field = |s| Ioapic::from_state(s).err().map(|e| e.field);
        assert_eq!(field(IoapicState { redirection: vec![0; 3], ..good.clone() }), Some("redirection"));
        assert_eq!(field(IoapicState { redirection: vec![1 << 20; PINS], ..good.clone() }), Some("redirection"));
        assert_eq!(field(IoapicState { redirection: vec![REMOTE_IRR; PINS], ..good.clone() }), Some("redirection"));
        assert_eq!(field(IoapicState { id: 16, ..good.clone() }), Some("id"));
        assert_eq!(field(IoapicState { lines: 1 << 24, ..good }), Some("lines"));
    }
}
