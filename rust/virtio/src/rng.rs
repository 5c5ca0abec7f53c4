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

/// Bytes that follow from a seed: the same ones in every run.
pub struct SeededEntropy {
    seed: [u8; 32],
    block: u64,
    /// Of the current block, what has not been given yet.
    rest: Vec<u8>,
}

impl SeededEntropy {
    pub fn new(seed: u64) -> Self {
        let seed = memory::hash(&[&b"virtio-rng"[..], &seed.to_le_bytes()].concat());
        Self { seed, block: 0, rest: Vec::new() }
    }
}

impl Entropy for SeededEntropy {
    fn fill(&mut self, mut data: &mut [u8]) -> io::Result<()> {
        while !data.is_empty() {
            if self.rest.is_empty() {
                self.rest = memory::hash(&[&self.seed[..], &self.block.to_le_bytes()].concat()).to_vec();
                self.block += 1;
            }
            let n = data.len().min(self.rest.len());
            let (now, later) = data.split_at_mut(n);
            now.copy_from_slice(&self.rest[..n]);
            self.rest.drain(..n);
            data = later;
        }
        Ok(())
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_gives_one_stream_however_it_is_cut() {
        let (mut whole, mut cut, mut other) = ([0; 1000], [0; 1000], [0; 1000]);
        SeededEntropy::new(7).fill(&mut whole).unwrap();
        let mut source = SeededEntropy::new(7);
        for part in cut.chunks_mut(13) {
            source.fill(part).unwrap();
        }
        SeededEntropy::new(8).fill(&mut other).unwrap();
        assert_eq!(whole, cut);
        assert_ne!(whole, other);
    }
}
