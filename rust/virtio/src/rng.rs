//! virtio-rng (virtio 1.2, section 5.4).

use std::fs::File;
use std::io::{self, Read};

use crate::Fault;
use crate::chain::{self, Chain};
use crate::transport::{Queues, VirtioDevice};

pub const DEVICE_TYPE: u16 = 4;

/// Bytes given to one request at most: a chain may name gigabytes.
const MOST: u64 = 64 << 10;

/// Where randomness comes from.
pub trait Entropy: Send {
    fn fill(&mut self, data: &mut [u8]) -> io::Result<()>;
}

/// A file, usually /dev/urandom.
pub struct FileEntropy(pub File);

impl Entropy for FileEntropy {
    fn fill(&mut self, data: &mut [u8]) -> io::Result<()> {
        self.0.read_exact(data)
    }
}

pub struct Rng {
    entropy: Box<dyn Entropy>,
    sizes: [u16; 1],
    chain: Chain,
}

impl Rng {
    pub fn new(entropy: Box<dyn Entropy>, queue_size: u16) -> Self {
        Self { entropy, sizes: [queue_size], chain: Chain::default() }
    }

    fn fill(&mut self, queues: &Queues<'_>, chain: &Chain) -> Result<u32, Fault> {
        let wanted = chain::total(&chain.writable).min(MOST);
        let mut done = 0;
        let mut data = [0; 4096];
        while done < wanted {
            let n = (wanted - done).min(data.len() as u64) as usize;
            let source = |e| Fault::driver(format!("the source of randomness failed: {e}"));
            self.entropy.fill(&mut data[..n]).map_err(source)?;
            chain::write(queues.memory, &chain.writable, done, &data[..n])?;
            done += n as u64;
        }
        Ok(done as u32)
    }
}

impl VirtioDevice for Rng {
    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.sizes
    }

    fn config(&self) -> &[u8] {
        &[]
    }

    fn process(&mut self, queue: usize, queues: &mut Queues<'_>) -> Result<(), Fault> {
        let mut chain = std::mem::take(&mut self.chain);
        let mut pass = || -> Result<(), Fault> {
            while queues.pop(queue, &mut chain)? {
                let n = self.fill(queues, &chain)?;
                queues.push(queue, chain.head, n)?;
            }
            Ok(())
        };
        let result = pass();
        self.chain = chain;
        result
    }
}
