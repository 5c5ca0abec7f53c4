//! virtio-console (virtio 1.2, section 5.3): one port, hvc0.

use std::sync::{Arc, Weak};

use serde::{Deserialize, Serialize};
use vcpu::{Control, Work};

use crate::chain::{self, Chain};
use crate::hex;
use crate::host::{InputBuffer, InputSink, Output};
use crate::transport::{Queues, Transport, VirtioDevice};
use crate::{Fault, StateError};

pub const DEVICE_TYPE: u16 = 3;

const F_SIZE: u64 = 1;
const RX: usize = 0;
const TX: usize = 1;
/// Bytes moved at a time.
const PIECE: usize = 4096;
/// Most bytes that one chain may hold. Drivers send pages; without a bound a chain that names all of RAM a thousand times
/// over would keep the machine from being paused for an hour.
const MOST: u64 = 1 << 20;

/// The device's own part of the state.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConsoleState {
    /// Whether the driver was offered a size: that of a terminal. 0 × 0 is unknown.
    pub sized: bool,
    pub cols: u16,
    pub rows: u16,
    /// Taken from the host, not yet by the guest.
    #[serde(with = "hex")]
    pub in_buffer: Vec<u8>,
    /// Taken from the guest, not yet by the host.
    #[serde(with = "hex")]
    pub out_buffer: Vec<u8>,
}

pub struct Console {
    input: Arc<InputBuffer>,
    output: Arc<Output>,
    sized: bool,
    config: [u8; 12],
    sizes: [u16; 2],
    chain: Chain,
}

impl Console {
    pub fn from_state(output: Arc<Output>, queue_size: u16, state: &ConsoleState) -> Result<Self, StateError> {
        if !state.sized && (state.cols != 0 || state.rows != 0) {
            return Err(StateError::new("cols", "a size where none is offered"));
        }
        output.restore(&state.out_buffer);
        let mut console = Self {
            input: Arc::new(InputBuffer::new(state.in_buffer.clone())),
            output,
            sized: state.sized,
            config: [0; 12],
            sizes: [queue_size; 2],
            chain: Chain::default(),
        };
        console.set_size(state.cols, state.rows);
        Ok(console)
    }

    pub fn state(&self) -> ConsoleState {
        let [c0, c1, r0, r1, ..] = self.config;
        ConsoleState {
            sized: self.sized,
            cols: u16::from_le_bytes([c0, c1]),
            rows: u16::from_le_bytes([r0, r1]),
            in_buffer: self.input.snapshot(),
            out_buffer: self.output.pending(),
        }
    }

    /// True when the driver is to be told.
    fn set_size(&mut self, cols: u16, rows: u16) -> bool {
        let before = self.config;
        self.config[..2].copy_from_slice(&cols.to_le_bytes());
        self.config[2..4].copy_from_slice(&rows.to_le_bytes());
        self.config[4] = 1; // max_nr_ports
        before != self.config
    }

    fn receive(&mut self, queues: &mut Queues<'_>, chain: &mut Chain) -> Result<(), Fault> {
        while !self.input.is_empty() && queues.pop(RX, chain)? {
            let room = chain::total(&chain.writable);
            if room == 0 {
                return Err(Fault::driver("a receive buffer without room"));
            }
            let data = self.input.take(room.min(PIECE as u64) as usize);
            if let Err(e) = chain::write(queues.memory, &chain.writable, 0, &data) {
                self.input.untake(&data);
                return Err(e);
            }
            queues.push(RX, chain.head, data.len() as u32)?;
        }
        Ok(())
    }

    fn transmit(&mut self, queues: &mut Queues<'_>, chain: &mut Chain) -> Result<(), Fault> {
        let mut data = [0; PIECE];
        while queues.pop(TX, chain)? {
            if !chain.writable.is_empty() {
                return Err(Fault::driver("a writable buffer in the transmit queue"));
            }
            let total = chain::total(&chain.readable);
            if total > MOST {
                return Err(Fault::driver(format!("a chain of {total} bytes to transmit")));
            }
            let mut done = 0;
            loop {
                let n = chain::read(queues.memory, &chain.readable, done, &mut data)?;
                if n == 0 {
                    break;
                }
                self.output.write(&data[..n]);
                done += n as u64;
            }
            queues.push(TX, chain.head, 0)?;
        }
        Ok(())
    }
}

impl VirtioDevice for Console {
    fn features(&self) -> u64 {
        if self.sized { F_SIZE } else { 0 }
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.sizes
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn process(&mut self, queue: usize, queues: &mut Queues<'_>) -> Result<(), Fault> {
        let mut chain = std::mem::take(&mut self.chain);
        let result = match queue {
            RX => self.receive(queues, &mut chain),
            TX => self.transmit(queues, &mut chain),
            _ => Ok(()),
        };
        self.chain = chain;
        result
    }
}

/// A console's function together with the way in for its input.
pub struct ConsolePort {
    pub transport: Arc<Transport<Console>>,
    pub output: Arc<Output>,
    input: Arc<InputBuffer>,
    control: Arc<Control>,
}

struct Receive(Weak<Transport<Console>>);

impl Work for Receive {
    fn run(&self) {
        if let Some(transport) = self.0.upgrade() {
            transport.process(RX);
        }
    }
}

impl ConsolePort {
    pub fn new(transport: Arc<Transport<Console>>, control: Arc<Control>) -> Self {
        let (input, output) = transport.device(|c| (c.input.clone(), c.output.clone()));
        Self { transport, output, input, control }
    }

    /// The terminal's size has changed.
    pub fn resize(&self, cols: u16, rows: u16) {
        if self.transport.device(|c| c.sized && c.set_size(cols, rows)) {
            self.transport.config_changed();
        }
    }
}

impl InputSink for ConsolePort {
    fn buffer(&self) -> &InputBuffer {
        &self.input
    }

    fn kick(&self) {
        self.control.post(Arc::new(Receive(Arc::downgrade(&self.transport))));
    }
}
