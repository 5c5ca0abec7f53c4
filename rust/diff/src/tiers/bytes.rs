//! Anything at all at the decoder: it comes back, says the same twice, and what it says holds together: a block is the row of its
//! instructions, each the same as when it stands alone, and what another decoder finds there.

use iced_x86::{Code, Decoder, DecoderOptions, Instruction, OpKind};
use x86::decode::{self, Decoded, MAX_INSNS, MAX_LEN};
use x86::insn::{Insn, LINK};
use x86::state::{CodeSize, GPR_BLOCK};

use crate::forms;
use crate::rng::Rng;

const SIZES: [(CodeSize, u32); 3] = [(CodeSize::Bits16, 16), (CodeSize::Bits32, 32), (CodeSize::Bits64, 64)];

/// What instructions there are, for bytes that are some.
pub struct Bytes {
    narrow: Vec<Code>,
    wide: Vec<Code>,
}

impl Default for Bytes {
    fn default() -> Self {
        Self { narrow: forms::all(32), wide: forms::all(64) }
    }
}

impl Bytes {
    /// Decodes bytes of case `number` in all modes. Gives how many instructions there were, or what is wrong.
    pub fn check(&self, seed: u64, number: u64) -> Result<u64, String> {
        let mut rng = Rng::new(seed, number);
        let bytes = if rng.chance(50) { some(&mut rng) } else { self.instructions(&mut rng) };
        let mut count = 0;
        for (size, bits) in SIZES {
            count += in_mode(&mut rng, &bytes, size, bits)
                .map_err(|what| format!("seed {seed} case {number}, {size:?}: {what}: {bytes:02x?}"))?;
        }
        Ok(count)
    }

    /// Instructions, one after the other, now and then with a byte of them changed.
    fn instructions(&self, rng: &mut Rng) -> Vec<u8> {
        let bits = if rng.chance(60) { 64 } else { 32 };
        let mut bytes = Vec::new();
        let most = if rng.chance(80) { 12 } else { 90 };
        for _ in 0..1 + rng.below(most) {
            let code = rng.pick(if bits == 64 { &self.wide } else { &self.narrow });
            let Some(form) = forms::random(rng, code, bits, 0) else { continue };
            let from = bytes.len();
            bytes.extend(form.bytes);
            if rng.chance(10) {
                let at = from + rng.below((bytes.len() - from) as u64) as usize;
                bytes[at] = rng.bits() as u8;
            }
        }
        bytes.resize(bytes.len().max(1), 0x90);
        bytes
    }
}

fn in_mode(rng: &mut Rng, bytes: &[u8], size: CodeSize, bits: u32) -> Result<u64, String> {
    let (mut first, mut second, mut cut) = (Vec::new(), Vec::new(), Vec::new());
    let decoded = decode::block(bytes, size, &mut first);
    if decode::block(bytes, size, &mut second) != decoded || !same(&first, &second) {
        return Err("another answer the second time".into());
    }
    let Decoded::Block(len) = decoded else {
        return if bytes.len() >= MAX_LEN { Err("no instruction is that long".into()) } else { Ok(0) };
    };
    let mut at = 0;
    for insn in &first {
        if u32::from(insn.off) != at || insn.len == 0 || usize::from(insn.len) > MAX_LEN {
            return Err("instructions do not follow each other".into());
        }
        at += u32::from(insn.len);
    }
    if at != len || len as usize > bytes.len() || first.is_empty() || first.len() > MAX_INSNS {
        return Err("the block is not the sum of its instructions".into());
    }
    // With fewer bytes it is the same block as far as they reach. Fusing looks at the neighbour, so the last one may differ.
    let keep = 1 + rng.below(u64::from(len)) as usize;
    if let Decoded::Block(short) = decode::block(&bytes[..keep], size, &mut cut) {
        let n = cut.len();
        let alike = n <= first.len() && cut[..n - 1].iter().zip(&first).all(|(a, b)| same_one(a, b));
        if short as usize > keep || !alike {
            return Err(format!("the first {keep} bytes are another block"));
        }
    }
    for (n, insn) in first.iter().enumerate() {
        let off = usize::from(insn.off);
        let alone = &bytes[off..off + usize::from(insn.len)];
        let other = Decoder::new(bits, alone, DecoderOptions::AMD).decode();
        if !agrees(insn, &other, alone, bits) {
            return Err(format!("instruction {n} is {:?} for another decoder", other.code()));
        }
        let jump = first.get(n + 1).is_some_and(|next| next.prefix & LINK != 0);
        decode::block(alone, size, &mut second);
        if second.len() != 1 || !same_alone(insn, &second[0], &other, jump) {
            return Err(format!("instruction {n} ({:?}) alone is another one", other.code()));
        }
    }
    Ok(first.len() as u64)
}

/// Whether the other decoder finds the same instruction; two that it reads otherwise in 64-bit code are known.
fn agrees(insn: &Insn, other: &Instruction, bytes: &[u8], bits: u32) -> bool {
    if insn.code == other.code() as u16 && usize::from(insn.len) == other.len() {
        return true;
    }
    let exchange = other.code() == Code::Pause && bytes[bytes.len() - 2] & 0xf1 == 0x41;
    let far = matches!(other.code(), Code::Jmp_m1632 | Code::Call_m1632);
    bits == 64 && usize::from(insn.len) == other.len() && (exchange || far)
}

/// Whether an instruction of a block is what it is alone; `jump`: a conditional jump follows, which it may be fused with.
fn same_alone(insn: &Insn, alone: &Insn, other: &Instruction, jump: bool) -> bool {
    let off = u64::from(insn.off);
    let mut moved = *alone;
    moved.off = insn.off;
    // What is relative to the block's start.
    let near = if other.op_count() > 0 { other.op0_kind() } else { OpKind::Register };
    match near {
        OpKind::NearBranch16 => moved.imm = moved.imm.wrapping_add(off) & 0xffff,
        OpKind::NearBranch32 => moved.imm = moved.imm.wrapping_add(off) & 0xffff_ffff,
        OpKind::NearBranch64 => moved.imm = moved.imm.wrapping_add(off),
        _ => {}
    }
    if moved.base == GPR_BLOCK && moved.prefix & LINK == 0 {
        moved.disp = moved.disp.wrapping_add(off as i64);
        if other.memory_base() == iced_x86::Register::EIP {
            moved.disp &= 0xffff_ffff;
        }
    }
    same_one(insn, &moved) && (jump || std::ptr::fn_addr_eq(insn.f, moved.f))
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
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| same_one(a, b) && std::ptr::fn_addr_eq(a.f, b.f))
}

/// But for the function.
fn same_one(a: &Insn, b: &Insn) -> bool {
    let key = |i: &Insn| {
        let operands = (i.imm, i.disp, i.base, i.index, i.shift, i.seg, i.r);
        (operands, i.asize as u8, i.len, i.prefix, i.osize, i.off, i.code)
    };
    key(a) == key(b)
}
