//! What a vCPU is about to execute, for people.

use iced_x86::{Decoder, DecoderOptions, FastFormatter, FlowControl};
use memory::PAGE_SIZE;

use crate::core::Core;
use crate::decode::{MAX_INSNS, MAX_LEN};
use crate::state::CodeSize;

/// One instruction: its address (RIP), its bytes, its text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line {
    pub rip: u64,
    pub bytes: Vec<u8>,
    pub text: String,
}

impl Core {
    /// The instructions from RIP to the next branch or the end of the page, without any effect; empty where no code is mapped.
    pub fn listing(&mut self) -> Vec<Line> {
        let bits = match self.cpu.code_size {
            CodeSize::Bits16 => 16,
            CodeSize::Bits32 => 32,
            CodeSize::Bits64 => 64,
        };
        let rip = self.cpu.rip;
        let linear = self.linear(self.fetch_base, rip);
        let bytes = self.code_bytes(linear);
        let first_page = (PAGE_SIZE - (linear & (PAGE_SIZE - 1))) as usize;
        let mut decoder = Decoder::with_ip(bits, &bytes, rip, DecoderOptions::AMD);
        let mut formatter = FastFormatter::new();
        let mut lines = Vec::new();
        while decoder.can_decode() && lines.len() < MAX_INSNS && decoder.position() < first_page {
            let at = decoder.position();
            let instruction = decoder.decode();
            let mut text = String::new();
            formatter.format(&instruction, &mut text);
            lines.push(Line { rip: instruction.ip(), bytes: bytes[at..decoder.position()].to_vec(), text });
            if instruction.is_invalid() || instruction.flow_control() != FlowControl::Next {
                break;
            }
        }
        lines
    }

    /// Bytes from `linear` on: those of its page that a block may hold, and as many of the next one as an instruction may reach into.
    fn code_bytes(&mut self, linear: u64) -> Vec<u8> {
        let mut bytes = Vec::new();
        let first = (PAGE_SIZE - (linear & (PAGE_SIZE - 1))).min((MAX_INSNS * MAX_LEN) as u64);
        for (at, len) in [(linear, first), (linear.wrapping_add(first), MAX_LEN as u64 - 1)] {
            let kept = self.noncanonical;
            let phys = self.peek(at);
            self.noncanonical = kept;
            let Some(phys) = phys else { break };
            let mut part = vec![0; len as usize];
            if self.shared.memory.read(phys, &mut part).is_err() {
                break;
            }
            bytes.extend(part);
        }
        bytes
    }
}
