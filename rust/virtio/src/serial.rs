//! A 16550A UART (National Semiconductor PC16550D data sheet; register names as there).

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, Weak};

use serde::{Deserialize, Serialize};
use vcpu::{Control, Device, Work};

use crate::StateError;
use crate::hex;
use crate::host::{InputBuffer, InputSink, Output};
use crate::irq::IrqLine;

const DATA: u64 = 0;
const IER: u64 = 1;
const IIR: u64 = 2; // FCR when written
const LCR: u64 = 3;
const MCR: u64 = 4;
const LSR: u64 = 5;
const MSR: u64 = 6;
const SCR: u64 = 7;

const IER_RDA: u8 = 1;
const IER_THRE: u8 = 2;
const IER_LINE: u8 = 4;
const IER_MODEM: u8 = 8;

const IIR_NONE: u8 = 1;
const IIR_MODEM: u8 = 0;
const IIR_THRE: u8 = 2;
const IIR_RDA: u8 = 4;
const IIR_LINE: u8 = 6;
const IIR_TIMEOUT: u8 = 0xc;
const IIR_FIFO: u8 = 0xc0;

const FCR_ENABLE: u8 = 1;
const FCR_CLEAR_RX: u8 = 2;
const FCR_KEPT: u8 = 0xc9; // enable, DMA mode, trigger level

const LCR_DLAB: u8 = 0x80;
const MCR_LOOP: u8 = 0x10;
const LSR_READY: u8 = 1;
const LSR_OVERRUN: u8 = 2;
const LSR_BREAK: u8 = 0x10;
/// THRE and TEMT: what is sent is gone at once.
const LSR_EMPTY: u8 = 0x60;
/// CTS, DSR and DCD: somebody is always at the other end.
const MSR_CONNECTED: u8 = 0xb0;

const FIFO: usize = 16;

/// Registers and bytes on their way, named as Cloud Hypervisor does where it has them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SerialState {
    pub interrupt_enable: u8,
    pub fifo_control: u8,
    pub line_control: u8,
    /// Error bits only: the others follow from the rest.
    pub line_status: u8,
    pub modem_control: u8,
    /// Change bits in the lower half.
    pub modem_status: u8,
    pub scratch: u8,
    pub baud_divisor: u16,
    /// The transmitter became empty and the guest has not been told yet.
    pub thre_pending: bool,
    /// What the guest reads next.
    #[serde(with = "hex")]
    pub receive_fifo: Vec<u8>,
    /// Taken from the host and waiting behind the FIFO.
    #[serde(with = "hex")]
    pub in_buffer: Vec<u8>,
    /// Taken from the guest, not yet by the host.
    #[serde(with = "hex")]
    pub out_buffer: Vec<u8>,
}

impl Default for SerialState {
    /// After reset.
    fn default() -> Self {
        Self {
            interrupt_enable: 0,
            fifo_control: 0,
            line_control: 0,
            line_status: 0,
            modem_control: 0,
            modem_status: MSR_CONNECTED,
            scratch: 0,
            baud_divisor: 12, // 9600
            thre_pending: false,
            receive_fifo: Vec::new(),
            in_buffer: Vec::new(),
            out_buffer: Vec::new(),
        }
    }
}

impl SerialState {
    fn check(&self) -> Result<(), StateError> {
        let bits = [
            ("interrupt_enable", self.interrupt_enable, 0x0f),
            ("fifo_control", self.fifo_control, FCR_KEPT),
            ("line_status", self.line_status, LSR_OVERRUN | LSR_BREAK),
            ("modem_control", self.modem_control, 0x1f),
        ];
        for (field, value, known) in bits {
            if value & !known != 0 {
                return Err(StateError::new(field, format!("unknown bits {:#x}", value & !known)));
            }
        }
        if self.receive_fifo.len() > FIFO {
            return Err(StateError::new("receive_fifo", format!("{} bytes where it holds {FIFO}", self.receive_fifo.len())));
        }
        Ok(())
    }
}

struct Inner {
    /// `in_buffer`, `out_buffer` and `receive_fifo` of it are empty: the live ones are beside it.
    r: SerialState,
    fifo: VecDeque<u8>,
    irq: Box<dyn IrqLine>,
    irq_high: bool,
}

/// One port on eight I/O addresses.
///
/// Guarantees: any access returns; output never blocks (see [`Output`]); input waits until the guest reads it.
pub struct Serial {
    inner: Mutex<Inner>,
    input: InputBuffer,
    output: Arc<Output>,
    control: Arc<Control>,
    this: Weak<Serial>,
}

impl Serial {
    pub fn from_state(
        state: SerialState,
        output: Arc<Output>,
        irq: Box<dyn IrqLine>,
        control: Arc<Control>,
    ) -> Result<Arc<Self>, StateError> {
        state.check()?;
        let mut r = state;
        output.restore(&std::mem::take(&mut r.out_buffer));
        let input = InputBuffer::new(std::mem::take(&mut r.in_buffer));
        let fifo = std::mem::take(&mut r.receive_fifo).into();
        let inner = Mutex::new(Inner { r, fifo, irq, irq_high: false });
        let serial = Arc::new_cyclic(|this| Self { inner, input, output, control, this: this.clone() });
        serial.lock().update_irq();
        Ok(serial)
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Complete, and without side effects.
    pub fn state(&self) -> SerialState {
        let inner = self.lock();
        SerialState {
            receive_fifo: inner.fifo.iter().copied().collect(),
            in_buffer: self.input.snapshot(),
            out_buffer: self.output.pending(),
            ..inner.r.clone()
        }
    }

    /// The machine was reset; what the host has sent stays.
    pub fn reset(&self) {
        let mut inner = self.lock();
        inner.r = SerialState::default();
        inner.fifo.clear();
        inner.update_irq();
    }

    pub fn output(&self) -> &Arc<Output> {
        &self.output
    }

    /// Moves input into the FIFO and interrupts.
    fn refill(&self) {
        let mut inner = self.lock();
        inner.refill(&self.input);
        inner.update_irq();
    }

    fn read_register(&self, inner: &mut Inner, register: u64) -> u8 {
        let [low, high] = inner.r.baud_divisor.to_le_bytes();
        let latch = inner.r.line_control & LCR_DLAB != 0;
        match register {
            DATA if latch => low,
            IER if latch => high,
            DATA => {
                let byte = inner.fifo.pop_front().unwrap_or(0);
                inner.refill(&self.input);
                byte
            }
            IER => inner.r.interrupt_enable,
            IIR => {
                let cause = inner.cause();
                if cause == IIR_THRE {
                    inner.r.thre_pending = false;
                }
                cause | if inner.r.fifo_control & FCR_ENABLE != 0 { IIR_FIFO } else { 0 }
            }
            LCR => inner.r.line_control,
            MCR => inner.r.modem_control,
            LSR => {
                let ready = if inner.fifo.is_empty() { 0 } else { LSR_READY };
                ready | LSR_EMPTY | std::mem::take(&mut inner.r.line_status)
            }
            MSR => {
                let status = inner.r.modem_status;
                inner.r.modem_status &= 0xf0;
                status
            }
            SCR => inner.r.scratch,
            _ => 0xff,
        }
    }

    fn write_register(&self, inner: &mut Inner, register: u64, value: u8) {
        let latch = inner.r.line_control & LCR_DLAB != 0;
        match register {
            DATA if latch => inner.r.baud_divisor = inner.r.baud_divisor & 0xff00 | u16::from(value),
            IER if latch => inner.r.baud_divisor = inner.r.baud_divisor & 0xff | u16::from(value) << 8,
            DATA => {
                if inner.r.modem_control & MCR_LOOP == 0 {
                    self.output.write(&[value]);
                } else if inner.fifo.len() < inner.depth() {
                    inner.fifo.push_back(value);
                } else {
                    inner.r.line_status |= LSR_OVERRUN;
                }
                inner.r.thre_pending = true;
            }
            IER => {
                // Enabling the interrupt while the transmitter is empty raises it.
                let enabled = value & !inner.r.interrupt_enable;
                inner.r.thre_pending |= enabled & IER_THRE != 0;
                inner.r.interrupt_enable = value & 0x0f;
            }
            IIR => {
                let toggled = (inner.r.fifo_control ^ value) & FCR_ENABLE != 0;
                if toggled || value & FCR_CLEAR_RX != 0 && value & FCR_ENABLE != 0 {
                    inner.fifo.clear();
                }
                inner.r.fifo_control = if value & FCR_ENABLE != 0 { value & FCR_KEPT } else { 0 };
                inner.refill(&self.input);
            }
            LCR => inner.r.line_control = value,
            MCR => {
                inner.r.modem_control = value & 0x1f;
                inner.update_modem_status();
                inner.refill(&self.input);
            }
            SCR => inner.r.scratch = value,
            _ => {} // LSR and MSR: factory test only
        }
    }
}

impl Inner {
    fn depth(&self) -> usize {
        if self.r.fifo_control & FCR_ENABLE != 0 { FIFO } else { 1 }
    }

    /// The line is not connected to the receiver in loop-back mode.
    fn refill(&mut self, input: &InputBuffer) {
        if self.r.modem_control & MCR_LOOP == 0 {
            let room = self.depth().saturating_sub(self.fifo.len());
            self.fifo.extend(input.take(room));
        }
    }

    fn trigger(&self) -> usize {
        match self.r.fifo_control & FCR_ENABLE {
            0 => 1,
            _ => [1, 4, 8, 14][usize::from(self.r.fifo_control >> 6)],
        }
    }

    /// The pending interrupt of highest priority, as the IIR names it.
    fn cause(&self) -> u8 {
        let enabled = self.r.interrupt_enable;
        if enabled & IER_LINE != 0 && self.r.line_status != 0 {
            IIR_LINE
        } else if enabled & IER_RDA != 0 && !self.fifo.is_empty() {
            // Below the trigger level the time-out of four characters has passed by the time anybody looks.
            if self.fifo.len() >= self.trigger() { IIR_RDA } else { IIR_TIMEOUT }
        } else if enabled & IER_THRE != 0 && self.r.thre_pending {
            IIR_THRE
        } else if enabled & IER_MODEM != 0 && self.r.modem_status & 0x0f != 0 {
            IIR_MODEM
        } else {
            IIR_NONE
        }
    }

    /// In loop-back mode DTR, RTS, OUT1 and OUT2 come back as DSR, CTS, RI and DCD.
    fn update_modem_status(&mut self) {
        let c = self.r.modem_control;
        let lines = match c & MCR_LOOP {
            0 => MSR_CONNECTED,
            _ => (c & 2) << 3 | (c & 1) << 5 | (c & 4) << 4 | (c & 8) << 4,
        };
        let old = self.r.modem_status;
        let changed = (old ^ lines) >> 4;
        // CTS, DSR and DCD tell of any change, RI only of its end.
        let ring_ended = changed & 4 & (old >> 4);
        self.r.modem_status = lines | old & 0x0f | changed & 0b1011 | ring_ended;
    }

    fn update_irq(&mut self) {
        let high = self.cause() != IIR_NONE;
        if high != self.irq_high {
            self.irq_high = high;
            self.irq.set_level(high);
        }
    }
}

impl Device for Serial {
    /// A wider access is that many accesses to neighbouring ports.
    fn read(&self, offset: u64, data: &mut [u8]) {
        let mut inner = self.lock();
        for (register, byte) in (offset..).zip(data.iter_mut()) {
            *byte = self.read_register(&mut inner, register);
        }
        inner.update_irq();
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut inner = self.lock();
        for (register, &byte) in (offset..).zip(data) {
            self.write_register(&mut inner, register, byte);
            inner.update_irq();
        }
    }
}

struct Refill(Weak<Serial>);

impl Work for Refill {
    fn run(&self) {
        if let Some(serial) = self.0.upgrade() {
            serial.refill();
        }
    }
}

impl InputSink for Serial {
    fn buffer(&self) -> &InputBuffer {
        &self.input
    }

    fn kick(&self) {
        self.control.post(Arc::new(Refill(self.this.clone())));
    }
}

impl Serial {
    /// Once before a machine runs again: input that came while it stood.
    pub fn resume(&self) {
        self.refill();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Rig {
        serial: Arc<Serial>,
        irq: Arc<Mutex<Vec<bool>>>,
        control: Arc<Control>,
    }

    fn rig(state: SerialState) -> Rig {
        let irq = Arc::new(Mutex::new(Vec::new()));
        let log = irq.clone();
        let control = Arc::new(Control::default());
        let output = Output::new(None, 4096).unwrap();
        let line = Box::new(move |high: bool| log.lock().unwrap().push(high));
        let serial = Serial::from_state(state, output, line, control.clone()).unwrap();
        Rig { serial, irq, control }
    }

    impl Rig {
        fn inb(&self, register: u64) -> u8 {
            let mut data = [0];
            self.serial.read(register, &mut data);
            data[0]
        }

        fn outb(&self, register: u64, value: u8) {
            self.serial.write(register, &[value]);
        }

        fn send(&self, data: &[u8]) {
            self.serial.buffer().push(data);
            self.serial.kick();
            assert!(self.control.service().is_none());
        }

        fn irq_high(&self) -> bool {
            self.irq.lock().unwrap().last() == Some(&true)
        }
    }

    /// The steps of Linux's `autoconfig` and `autoconfig_16550a` (drivers/tty/serial/8250/8250_port.c).
    #[test]
    fn linux_finds_a_16550a() {
        let rig = rig(SerialState::default());
        rig.outb(IER, 0);
        assert_eq!(rig.inb(IER), 0);
        rig.outb(IER, 0xff);
        assert_eq!(rig.inb(IER), 0x0f);
        rig.outb(IER, 0);
        rig.outb(MCR, MCR_LOOP | 0x0a);
        assert_eq!(rig.inb(MSR) & 0xf0, 0x90);
        rig.outb(MCR, 0);
        rig.outb(LCR, 0xbf);
        rig.outb(IIR, 0);
        rig.outb(LCR, 0);
        rig.outb(IIR, FCR_ENABLE);
        assert_eq!(rig.inb(IIR) >> 6, 3);
        rig.outb(LCR, 0x80);
        assert_ne!(rig.inb(IIR), 0); // not a 16650
        rig.outb(IIR, 0x21);
        assert_eq!(rig.inb(IIR) >> 5, 6); // not a 16750
        rig.outb(LCR, 0);
        rig.outb(IER, 0x40);
        assert_eq!(rig.inb(IER) & 0x40, 0); // not an XScale
    }

    /// `serial8250_do_startup` looks for UARTs that do not raise THRE when it is enabled again.
    #[test]
    fn thre_is_raised_on_enable_and_on_write_and_cleared_by_iir() {
        let rig = rig(SerialState::default());
        for _ in 0..2 {
            rig.outb(IER, IER_THRE);
            assert!(rig.irq_high());
            assert_eq!(rig.inb(IIR), IIR_THRE);
            assert!(!rig.irq_high());
            assert_eq!(rig.inb(IIR), IIR_NONE);
            rig.outb(IER, 0);
        }
        rig.outb(IER, IER_THRE);
        rig.inb(IIR);
        rig.outb(DATA, b'x');
        assert!(rig.irq_high());
        assert_eq!(rig.serial.output().read(0, None).1, b"x");
        // Saved in between, the interrupt is still there.
        let rig = self::rig(rig.serial.state());
        assert!(rig.irq_high());
        assert_eq!(rig.inb(IIR), IIR_THRE);
    }

    #[test]
    fn input_waits_behind_the_fifo_and_survives_a_save() {
        let rig = rig(SerialState::default());
        rig.outb(IIR, 0xc1); // trigger at 14
        rig.outb(IER, IER_RDA);
        rig.send(b"0123456789abcdefghijklmn");
        assert!(rig.irq_high());
        assert_eq!(rig.inb(IIR), IIR_FIFO | IIR_RDA);
        assert_eq!(rig.inb(DATA), b'0');
        let state = rig.serial.state();
        assert_eq!(state.receive_fifo, b"123456789abcdefg");
        let rig = self::rig(state);
        let mut got = Vec::new();
        while rig.inb(LSR) & LSR_READY != 0 {
            got.push(rig.inb(DATA));
        }
        assert_eq!(got, b"123456789abcdefghijklmn");
        assert!(!rig.irq_high());
        rig.send(b"z");
        assert_eq!(rig.inb(IIR), IIR_FIFO | IIR_TIMEOUT);
    }

    #[test]
    fn loop_back_overruns_and_tells_so() {
        let rig = rig(SerialState::default());
        rig.outb(MCR, MCR_LOOP);
        rig.outb(IIR, FCR_ENABLE);
        rig.outb(IER, IER_LINE);
        rig.send(b"held");
        for byte in 0..=FIFO as u8 {
            rig.outb(DATA, byte);
        }
        assert_eq!(rig.inb(IIR), IIR_FIFO | IIR_LINE);
        assert_eq!(rig.inb(LSR), LSR_EMPTY | LSR_READY | LSR_OVERRUN);
        assert_eq!(rig.inb(LSR), LSR_EMPTY | LSR_READY);
        assert_eq!(rig.inb(DATA), 0);
        rig.outb(IIR, FCR_ENABLE | FCR_CLEAR_RX);
        rig.outb(MCR, 0);
        assert_eq!(rig.inb(DATA), b'h');
    }

    #[test]
    fn any_access_returns_and_state_stays_valid() {
        let rig = rig(SerialState::default());
        let mut seed = 1u64;
        for _ in 0..100_000 {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let (register, width) = ((seed >> 33) % 9, 1usize << ((seed >> 40) % 4));
            let bytes = seed.to_le_bytes();
            if seed >> 63 == 0 {
                rig.serial.write(register, &bytes[..width]);
            } else {
                rig.serial.read(register, &mut [0; 8][..width]);
            }
        }
        rig.serial.state().check().unwrap();
    }
}
