//! From bytes to [`Insn`]: iced-x86 decodes, this module flattens its operands and asks the families for a handler.

use iced_x86::{
    Code, Decoder, DecoderError, DecoderOptions, FlowControl, Instruction, InstructionInfoFactory, InstructionInfoOptions,
    Mnemonic, OpAccess, OpKind, Register,
};

use crate::core::{Core, GP, UD};
use crate::exec;
use crate::insn::{AddrSize, Fault, Flow, HIGH8, Handler, Insn, LINK, LOCK, REP, REPNE, STACK};
use crate::state::{CodeSize, FS, GPR_BLOCK, GPR_ZERO, GS, SEG_FLAT, SS};

/// Instructions of a block at most.
pub const MAX_INSNS: usize = 64;
/// Bytes of an instruction at most.
pub const MAX_LEN: usize = 15;

/// What became of some bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decoded {
    /// This many bytes are a block.
    Block(u32),
    /// The first instruction needs bytes after the given ones.
    Short,
}

fn bits(size: CodeSize) -> u32 {
    match size {
        CodeSize::Bits16 => 16,
        CodeSize::Bits32 => 32,
        CodeSize::Bits64 => 64,
    }
}

/// Decodes a block from `bytes`, which end where its page does, into `out`.
pub fn block(bytes: &[u8], size: CodeSize, out: &mut Vec<Insn>) -> Decoded {
    out.clear();
    // AMD as the vendor says: in 64-bit code too 66 makes a near branch 16 bits wide.
    let mut decoder = Decoder::new(bits(size), bytes, DecoderOptions::AMD);
    let (mut instr, mut previous) = (Instruction::default(), Instruction::default());
    while out.len() < MAX_INSNS && decoder.can_decode() {
        let off = decoder.position();
        decoder.decode_out(&mut instr);
        if decoder.last_error() == DecoderError::NoMoreBytes {
            if out.is_empty() {
                return Decoded::Short;
            }
            return Decoded::Block(off as u32);
        }
        if instr.code() == Code::Pause && size == CodeSize::Bits64 {
            exchange_not_pause(&mut instr, &bytes[off..decoder.position()]);
        }
        if size == CodeSize::Bits64 && matches!(instr.code(), Code::Jmp_m1632 | Code::Call_m1632) {
            far_pointer(&mut instr, &bytes[off..], off);
        }
        if let (CodeSize::Bits64, Some(last)) = (size, out.last_mut()) {
            if let Some(both) = exec::integer::pair(&previous, &instr) {
                last.f = both;
            }
        }
        out.push(insn(&instr, size, off as u16));
        previous = instr;
        // x87 instructions record their opcode bytes; no other part of them needs `imm`.
        if let (Some(fop), Some(last)) = (exec::fpu::opcode(&bytes[off..], size), out.last_mut()) {
            last.imm = fop.into();
        }
        if ends_block(&instr) {
            break;
        }
    }
    Decoded::Block(decoder.position() as u32)
}

/// `F3 REX.B 90` is XCHG r8, rAX on silicon; the decoder calls everything with F3 a PAUSE.
fn exchange_not_pause(instr: &mut Instruction, bytes: &[u8]) {
    let tail = bytes.len().saturating_sub(2);
    if bytes[tail] & 0xf1 == 0x41 {
        let len = instr.len();
        *instr = Decoder::new(64, &bytes[tail..], DecoderOptions::AMD).decode();
        instr.set_len(len);
    }
}

/// REX.W asks for a far pointer with a 64-bit offset. The profile's vendor ignores it; the handlers know whether this machine does.
fn far_pointer(instr: &mut Instruction, bytes: &[u8], off: usize) {
    // The operand may be relative to RIP.
    let other = Decoder::with_ip(64, bytes, off as u64, DecoderOptions::NONE).decode();
    if matches!(other.code(), Code::Jmp_m1664 | Code::Call_m1664) {
        *instr = other;
    }
}

fn ends_block(instr: &Instruction) -> bool {
    use Mnemonic as M;
    if instr.is_invalid() || instr.flow_control() != FlowControl::Next {
        return true;
    }
    match instr.mnemonic() {
        // After STI and POPF a block seldom ends; when it must, their functions say so.
        M::Hlt | M::Wrmsr | M::Lmsw | M::Clts | M::Invlpg | M::Wbinvd | M::Invd => true,
        M::Lldt | M::Ltr | M::Lgdt | M::Lidt | M::Lss | M::Xsetbv | M::In | M::Out | M::Pause | M::Mwait | M::Invpcid => true,
        M::Mov | M::Pop if instr.op0_kind() == OpKind::Register => {
            let r = instr.op0_register();
            r.is_cr() || r.is_dr() || r == Register::SS
        }
        _ => false,
    }
}

/// Flattens one instruction that starts `off` bytes into its block (and was decoded with the block's start as address 0).
fn insn(instr: &Instruction, size: CodeSize, off: u16) -> Insn {
    let mut i = Insn {
        f: handler(instr),
        imm: 0,
        disp: 0,
        base: GPR_ZERO,
        index: GPR_ZERO,
        shift: 0,
        seg: SEG_FLAT as u8,
        asize: match size {
            CodeSize::Bits16 => AddrSize::A16,
            CodeSize::Bits32 => AddrSize::A32,
            CodeSize::Bits64 => AddrSize::A64,
        },
        r: [0; 3],
        len: instr.len() as u8,
        prefix: 0,
        osize: 0,
        off,
        code: instr.code() as u16,
        heat: 0,
    };
    if instr.has_rep_prefix() {
        i.prefix |= REP;
    }
    if instr.has_repne_prefix() {
        i.prefix |= REPNE;
    }
    if instr.has_lock_prefix() {
        i.prefix |= LOCK;
    }
    let mut near = 0;
    for n in 0..instr.op_count() {
        match instr.op_kind(n) {
            OpKind::Register => {
                let r = instr.op_register(n);
                if n < 3 {
                    i.r[n as usize] = number(r);
                }
                if i.osize == 0 && r.is_gpr() {
                    i.osize = r.size() as u8;
                }
            }
            OpKind::NearBranch16 => near = instr.near_branch16().into(),
            OpKind::NearBranch32 => near = instr.near_branch32().into(),
            OpKind::NearBranch64 => near = instr.near_branch64(),
            OpKind::FarBranch16 => i.imm = u64::from(instr.far_branch_selector()) << 32 | u64::from(instr.far_branch16()),
            OpKind::FarBranch32 => i.imm = u64::from(instr.far_branch_selector()) << 32 | u64::from(instr.far_branch32()),
            OpKind::Immediate8_2nd => i.imm |= u64::from(instr.immediate8_2nd()) << 16,
            OpKind::Memory => {
                memory(instr, size, &mut i);
                if size != CodeSize::Bits64 {
                    i.shift |= access(instr, n);
                }
            }
            OpKind::MemorySegSI | OpKind::MemorySegDI | OpKind::MemoryESDI => implicit(instr, size, AddrSize::A16, &mut i),
            OpKind::MemorySegESI | OpKind::MemorySegEDI | OpKind::MemoryESEDI => implicit(instr, size, AddrSize::A32, &mut i),
            OpKind::MemorySegRSI | OpKind::MemorySegRDI | OpKind::MemoryESRDI => implicit(instr, size, AddrSize::A64, &mut i),
            _ => i.imm = instr.immediate(n),
        }
    }
    if near != 0
        || instr.op_count() > 0 && matches!(instr.op0_kind(), OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64)
    {
        i.imm = near;
        if instr.op0_kind() == OpKind::NearBranch64 {
            i.prefix |= LINK;
            (i.base, i.index) = (0, 0);
        }
    }
    if matches!(instr.mnemonic(), Mnemonic::Loop | Mnemonic::Loope | Mnemonic::Loopne)
        || matches!(instr.mnemonic(), Mnemonic::Jcxz | Mnemonic::Jecxz | Mnemonic::Jrcxz)
    {
        i.osize = exec::integer::count_size(instr);
    } else if i.osize == 0 {
        i.osize = instr.memory_size().size() as u8;
    }
    i
}

/// Operand number of a register, as [`Insn::r`] has it.
fn number(r: Register) -> u8 {
    if r.is_gpr8() {
        let n = (r as u32 - Register::AL as u32) as u8;
        return match n {
            0..=3 => n,
            4..=7 => HIGH8 | (n - 4),
            _ => n - 4,
        };
    }
    r.number() as u8
}

fn segment(instr: &Instruction, size: CodeSize, i: &mut Insn) {
    let seg = instr.memory_segment().number();
    // 64-bit code ignores overrides other than FS and GS, so only the base register tells a stack reference.
    let stack = if size == CodeSize::Bits64 {
        seg != FS && seg != GS && matches!(instr.memory_base().full_register(), Register::RSP | Register::RBP)
    } else {
        seg == SS
    };
    if stack {
        i.prefix |= STACK;
    }
    i.seg = if size == CodeSize::Bits64 && seg != FS && seg != GS { SEG_FLAT } else { seg } as u8;
}

/// String instructions and XLAT's kin: addresses are in fixed registers; only width and source segment matter.
fn implicit(instr: &Instruction, size: CodeSize, asize: AddrSize, i: &mut Insn) {
    i.asize = asize;
    if !matches!(instr.memory_segment(), Register::None) {
        segment(instr, size, i);
    }
}

fn memory(instr: &Instruction, size: CodeSize, i: &mut Insn) {
    let (base, index) = (instr.memory_base(), instr.memory_index());
    segment(instr, size, i);
    i.disp = instr.memory_displacement64() as i64;
    i.shift = instr.memory_index_scale().trailing_zeros() as u8;
    let wide = |r: Register| r.is_gpr64() || r == Register::RIP;
    let mid = |r: Register| r.is_gpr32() || r == Register::EIP;
    i.asize = if wide(base) || wide(index) {
        AddrSize::A64
    } else if mid(base) || mid(index) {
        AddrSize::A32
    } else if base.is_gpr16() || index.is_gpr16() {
        AddrSize::A16
    } else {
        match instr.memory_displ_size() {
            2 => AddrSize::A16,
            4 => AddrSize::A32,
            8 => AddrSize::A64,
            _ => i.asize,
        }
    };
    let base_number = match base {
        Register::RIP | Register::EIP => GPR_BLOCK,
        Register::None => GPR_ZERO,
        r => r.number() as u8,
    };
    i.base = base_number;
    i.index = if index.is_gpr() { index.number() as u8 } else { GPR_ZERO };
}

/// What an access is, as [`Insn::shift`] has it.
fn access(instr: &Instruction, operand: u32) -> u8 {
    let mut factory = InstructionInfoFactory::new();
    let info = factory.info_options(instr, InstructionInfoOptions::NO_REGISTER_USAGE);
    let write =
        matches!(info.op_access(operand), OpAccess::Write | OpAccess::CondWrite | OpAccess::ReadWrite | OpAccess::ReadCondWrite);
    let bytes = instr.memory_size().size() as u32;
    let len = if bytes == 0 { 0 } else { bytes.ilog2() as u8 + 1 };
    len << 4 | u8::from(write) << 3
}

fn handler(instr: &Instruction) -> Handler {
    if instr.is_invalid() {
        return if instr.len() >= MAX_LEN { too_long } else { invalid };
    }
    exec::integer::select(instr)
        .or_else(|| exec::system::select(instr))
        .or_else(|| exec::fpu::select(instr))
        .or_else(|| exec::sse::select(instr))
        .or_else(|| exec::mmx::select(instr))
        .unwrap_or(if exec::claimed(instr) { missing } else { invalid })
}

/// #UD.
pub fn invalid(core: &mut Core, _: &Insn) -> Result<Flow, Fault> {
    Err(core.raise(UD, None))
}

/// More than 15 bytes, which only prefixes can make.
pub fn too_long(core: &mut Core, _: &Insn) -> Result<Flow, Fault> {
    Err(core.raise(GP, Some(0)))
}

/// The CPU that the guest was shown has this instruction and we do not: the machine must stop rather than go wrong.
pub fn missing(core: &mut Core, i: &Insn) -> Result<Flow, Fault> {
    let code = Code::try_from(usize::from(i.code)).unwrap_or(Code::INVALID);
    Err(core.unsupported(format!(
        "the software engine lacks the instruction {code:?} (at {:#x})",
        core.cpu.gpr[usize::from(GPR_BLOCK)].wrapping_add(i.off.into())
    )))
}
