//! Anything at all at the decoder: it comes back, says the same twice, and what it says holds together.

use x86::decode::{self, Decoded, MAX_INSNS, MAX_LEN};
use x86::insn::Insn;
use x86::state::CodeSize;

use crate::rng::Rng;

const SIZES: [CodeSize; 3] = [CodeSize::Bits16, CodeSize::Bits32, CodeSize::Bits64];

/// Decodes bytes of case `number` in all modes. Gives how many instructions there were, or what is wrong.
pub fn check(seed: u64, number: u64) -> Result<u64, String> {
    let mut rng = Rng::new(seed, number);
    let bytes = some(&mut rng);
    let mut count = 0;
    let (mut first, mut second, mut cut) = (Vec::new(), Vec::new(), Vec::new());
    for size in SIZES {
        let wrong = |what: &str| Err(format!("seed {seed} case {number}, {size:?}: {what}: {bytes:02x?}"));
        let decoded = decode::block(&bytes, size, &mut first);
        if decode::block(&bytes, size, &mut second) != decoded || !same(&first, &second) {
            return wrong("another answer the second time");
        }
        let Decoded::Block(len) = decoded else {
            if bytes.len() >= MAX_LEN {
                return wrong("no instruction is that long");
            }
            continue;
        };
        count += first.len() as u64;
        let mut at = 0;
        for insn in &first {
            if u32::from(insn.off) != at || insn.len == 0 || usize::from(insn.len) > MAX_LEN {
                return wrong("instructions do not follow each other");
            }
            at += u32::from(insn.len);
        }
        if at != len || len as usize > bytes.len() || first.is_empty() || first.len() > MAX_INSNS {
            return wrong("the block is not the sum of its instructions");
        }
        // With fewer bytes it is the same block as far as they reach. Fusing looks at the neighbour, so the last one may differ.
        let keep = 1 + rng.below(u64::from(len)) as usize;
        if let Decoded::Block(short) = decode::block(&bytes[..keep], size, &mut cut) {
            let n = cut.len();
            let alike = n <= first.len() && cut[..n - 1].iter().zip(&first).all(|(a, b)| same_one(a, b));
            if short as usize > keep || !alike {
                return wrong(&format!("the first {keep} bytes are another block"));
            }
        }
    }
    Ok(count)
}

fn some(rng: &mut Rng) -> Vec<u8> {
    const FREQUENT: [u8; 24] = [
        0x66, 0x67, 0xf2, 0xf3, 0xf0, 0x2e, 0x36, 0x64, 0x65, 0x48, 0x4f, 0x41, 0x0f, 0x0f, 0x38, 0x3a, 0xc4, 0xc5, 0x62, 0x8f,
        0xff, 0x90, 0x00, 0xae,
    ];
    let most = if rng.chance(70) { 40 } else { 960 };
    let len = 1 + rng.below(most);
    let bias = rng.below(80);
    (0..len).map(|_| if rng.chance(bias) { rng.pick(&FREQUENT) } else { rng.bits() as u8 }).collect()
}

fn same(a: &[Insn], b: &[Insn]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| same_one(a, b))
}

/// Handlers are left out: the address of a function is nobody's promise.
fn same_one(a: &Insn, b: &Insn) -> bool {
    let key = |i: &Insn| {
        let operands = (i.imm, i.disp, i.base, i.index, i.shift, i.seg, i.r);
        (operands, i.asize as u8, i.len, i.prefix, i.osize, i.off, i.code)
    };
    key(a) == key(b)
}
