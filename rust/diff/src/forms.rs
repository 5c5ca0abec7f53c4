//! Which instructions there are: every iced `Code` of the `portable` profile (x86-64-v2) that ring 3 may try, and random
//! encodings of each: any operand form, any prefix that leaves it the same instruction.

use iced_x86::{
    Code, ConstantOffsets, CpuidFeature, Decoder, DecoderOptions, EncodingKind, Instruction, MandatoryPrefix, Mnemonic,
};
use iced_x86::{OpCodeOperandKind, OpCodeTableKind};

use crate::case::INT3;
use crate::rng::Rng;

/// What the profile has. BSF's TZCNT spelling and the like are tested elsewhere: the processor here has BMI1, the profile not.
fn in_profile(feature: CpuidFeature) -> bool {
    use CpuidFeature as F;
    matches!(
        feature,
        F::INTEL8086
            | F::INTEL186
            | F::INTEL286
            | F::INTEL386
            | F::INTEL486
            | F::X64
            | F::CMOV
            | F::CMPXCHG16B
            | F::CX8
            | F::FPU
            | F::FPU287
            | F::FPU387
            | F::FXSR
            | F::MMX
            | F::MULTIBYTENOP
            | F::PAUSE
            | F::POPCNT
            | F::PREFETCHW
            | F::SSE
            | F::SSE2
            | F::SSE3
            | F::SSE4_1
            | F::SSE4_2
            | F::SSSE3
            | F::CLFSH
            | F::FSGSBASE
            | F::MSR
            | F::SYSCALL
            | F::INTEL8086_ONLY
    )
}

/// Not comparable in ring 3 of a Linux process: system calls, time, what the host kernel emulates (UMIP) or keeps elsewhere
/// (descriptor tables), and what a hypervisor answers.
fn excluded(code: Code) -> bool {
    use Mnemonic as M;
    matches!(
        code.mnemonic(),
        M::Syscall
            | M::Sysenter
            | M::Rdtsc
            | M::Cpuid
            | M::Sgdt
            | M::Sidt
            | M::Sldt
            | M::Str
            | M::Smsw
            | M::Rdpmc
            | M::Rsm
            | M::Loadall
            | M::Umov
            | M::Ud0
            | M::Ud1
            | M::Sysexitq
            | M::Sysretq
            | M::Frstpm
            | M::Fstdw
            | M::Fstsg
    ) || matches!(
        code,
        // Linux on KVM reports another RIP for INT1; AMD reads 32 bits for the 16-bit MOVSXD and has no far
        // pointers with 64-bit offsets.
        Code::Int1
            | Code::Movsxd_r16_rm16
            | Code::Call_m1664
            | Code::Jmp_m1664
            | Code::Lss_r64_m1664
            | Code::Lfs_r64_m1664
            | Code::Lgs_r64_m1664
    )
}

/// All codes under test in `bits`-bit code, in iced's order.
pub fn all(bits: u32) -> Vec<Code> {
    Code::values()
        .filter(|&c| c.op_code().is_instruction() && c.op_code().is_available_in_mode(bits))
        .filter(|&c| {
            c.encoding() == EncodingKind::Legacy && !c.op_code().fwait() && c.op_code().decoder_option() == DecoderOptions::NONE
        })
        .filter(|&c| c.cpuid_features().iter().all(|&f| in_profile(f)) && !excluded(c))
        .collect()
}

/// One encoding: bytes, their decoding and where displacement and immediate are in them.
pub struct Form {
    pub bytes: Vec<u8>,
    pub insn: Instruction,
    pub offsets: ConstantOffsets,
}

pub fn decode(bytes: &[u8], bits: u32, ip: u64) -> Option<Form> {
    let mut decoder = Decoder::with_ip(bits, bytes, ip, DecoderOptions::AMD);
    let insn = decoder.decode();
    if insn.is_invalid() {
        return None;
    }
    let offsets = decoder.get_constant_offsets(&insn);
    Some(Form { bytes: bytes[..insn.len()].to_vec(), insn, offsets })
}

fn register_in_opcode(kind: OpCodeOperandKind) -> bool {
    use OpCodeOperandKind as K;
    matches!(kind, K::r8_opcode | K::r16_opcode | K::r32_opcode | K::r64_opcode | K::sti_opcode)
}

/// Encodings with a meaning that only AMD gives them, undocumented: F2 and F3 choose the condition of LOOPcc; PAUSE with REX.B is
/// an exchange with R8.
fn peculiar(form: &Form) -> bool {
    let prefixed = |range: std::ops::RangeInclusive<u8>| form.bytes[..form.bytes.len() - 1].iter().any(|b| range.contains(b));
    match form.insn.mnemonic() {
        Mnemonic::Loope | Mnemonic::Loopne => prefixed(0xf2..=0xf3),
        // A far CALL with REX.W reads a 32-bit offset and pushes 64 bits.
        Mnemonic::Call if form.insn.code() == Code::Call_m1632 => prefixed(0x48..=0x4f),
        Mnemonic::Pause => form.bytes[form.bytes.len() - 2] & 0xf1 == 0x41,
        // Stores through CS in 32-bit code: these two do not look at the segment's rights, which only ARPL has a case for.
        Mnemonic::Arpl | Mnemonic::Maskmovq | Mnemonic::Maskmovdqu => prefixed(0x2e..=0x2e),
        _ => false,
    }
}

/// A random encoding of `code` at `ip`, `None` when the tries were unlucky.
pub fn random(rng: &mut Rng, code: Code, bits: u32, ip: u64) -> Option<Form> {
    (0..60).find_map(|_| {
        let bytes = attempt(rng, code, bits);
        decode(&bytes, bits, ip).filter(|f| f.insn.code() == code && f.insn.len() <= 15 && !peculiar(f))
    })
}

/// Random prefixes before a random opcode: an instruction of `all`'s kind, or bytes that decode to nothing. `None` for everything
/// that this processor may take for an instruction which the profile lacks.
pub fn raw(rng: &mut Rng, bits: u32, ip: u64) -> Option<Result<Form, Vec<u8>>> {
    const PREFIXES: [u8; 11] = [0x66, 0x66, 0xf2, 0xf3, 0xf0, 0x67, 0x64, 0x65, 0x2e, 0x36, 0x3e];
    let mut bytes: Vec<u8> = (0..rng.below(4)).map(|_| rng.pick(&PREFIXES)).collect();
    if bits == 64 && rng.chance(40) {
        bytes.push(0x40 | rng.below(16) as u8);
        if rng.chance(10) {
            // A prefix after REX makes REX meaningless.
            bytes.push(rng.pick(&PREFIXES));
        }
    }
    match rng.below(10) {
        0..=2 => {}
        3..=6 => bytes.push(0x0f),
        7 | 8 => bytes.extend([0x0f, 0x38]),
        _ => bytes.extend([0x0f, 0x3a]),
    }
    bytes.extend((0..if rng.chance(80) { 7 } else { 2 }).map(|_| rng.bits() as u8));
    let system_call = |b: &[u8]| matches!(b, [0x0f, 0x05 | 0x34] | [0xcd, _]);
    if bytes.windows(2).any(system_call) {
        return None;
    }
    let mut padded = bytes.clone();
    padded.resize(24, INT3);
    let mut decoder = Decoder::with_ip(bits, &padded, ip, DecoderOptions::AMD | DecoderOptions::MPX | DecoderOptions::UMOV);
    let insn = decoder.decode();
    if insn.is_invalid() {
        // Families of encodings in which this processor knows more than the decoder or the profile.
        let opcode = bytes.iter().position(|b| !PREFIXES.contains(b) && (bits == 32 || b & 0xf0 != 0x40))?;
        let known = match bytes[opcode..] {
            [0xc4 | 0xc5 | 0x62 | 0x8f, ..] => true,
            [0x0f, op, ..] => {
                matches!(op, 0x0f | 0x01 | 0xae | 0xc7 | 0x24..=0x27 | 0x78 | 0x79 | 0xb9 | 0xff | 0x18..=0x1f | 0x0d | 0x00)
            }
            _ => false,
        };
        // At 15 bytes a LOCK that is not allowed and a length that is not are hard to tell apart: #UD here, #GP there.
        return (!known && insn.len() < 15).then_some(Err(bytes));
    }
    let code = insn.code();
    let profile = code.cpuid_features().iter().all(|&f| in_profile(f)) && code.encoding() == EncodingKind::Legacy;
    if !profile || excluded(code) || code.op_code().fwait() || code.op_code().decoder_option() != DecoderOptions::NONE {
        return None;
    }
    let form = decode(&padded, bits, ip)?;
    (form.insn.code() == code && !peculiar(&form)).then_some(Ok(form))
}

fn attempt(rng: &mut Rng, code: Code, bits: u32) -> Vec<u8> {
    let op = code.op_code();
    let kinds = op.op_kinds();
    let mut bytes = Vec::with_capacity(24);
    let mut rex_w = rng.chance(50);

    let mut needs_66 = false;
    match (op.operand_size(), bits) {
        (16, _) => (needs_66, rex_w) = (true, false),
        (32, _) => rex_w = false,
        (64, _) => rex_w = !op.default_op_size64() && !op.force_op_size64() || rng.chance(30),
        _ => {}
    }
    match op.mandatory_prefix() {
        MandatoryPrefix::P66 => needs_66 = true,
        MandatoryPrefix::PF3 => bytes.push(0xf3),
        MandatoryPrefix::PF2 => bytes.push(0xf2),
        _ => {
            if rng.chance(if op.can_use_rep_prefix() || op.can_use_repne_prefix() { 60 } else { 3 }) {
                bytes.push(rng.pick(&[0xf2, 0xf3]));
            }
        }
    }
    if needs_66 || rng.chance(2) {
        bytes.push(0x66);
    }
    if op.address_size() == 32 && bits == 64 || op.address_size() == 16 && bits == 32 || rng.chance(6) {
        bytes.push(0x67);
    }
    if rng.chance(12) {
        bytes.push(rng.pick(&[0x64, 0x65, 0x64, 0x65, 0x26, 0x2e, 0x36, 0x3e]));
    }
    if rng.chance(if op.can_use_lock_prefix() { 25 } else { 1 }) {
        bytes.push(0xf0);
    }
    for i in (1..bytes.len()).rev() {
        bytes.swap(i, rng.below(i as u64 + 1) as usize);
    }
    if bits == 64 && (rex_w || rng.chance(40)) {
        let low = if rng.chance(30) { 0 } else { rng.below(8) as u8 };
        bytes.push(0x40 | u8::from(rex_w) << 3 | low);
    }
    match op.table() {
        OpCodeTableKind::T0F => bytes.push(0x0f),
        OpCodeTableKind::T0F38 => bytes.extend([0x0f, 0x38]),
        OpCodeTableKind::T0F3A => bytes.extend([0x0f, 0x3a]),
        _ => {}
    }
    let value = op.op_code();
    if op.op_code_len() == 2 {
        bytes.push((value >> 8) as u8);
    }
    let plus = if kinds.iter().any(|&k| register_in_opcode(k)) { rng.below(8) as u8 } else { 0 };
    bytes.push(value as u8 + plus);

    // ModRM, whether there is one or not: what is too much is cut off.
    let mut modrm = rng.bits() as u8;
    if rng.chance(50) {
        modrm &= 0x3f;
    }
    if op.group_index() >= 0 {
        modrm = modrm & !0x38 | (op.group_index() as u8) << 3;
    }
    if op.rm_group_index() >= 0 {
        modrm = 0xc0 | modrm & !7 | op.rm_group_index() as u8;
    }
    bytes.push(modrm);
    let small = rng.chance(40);
    for i in 0..12 {
        bytes.push(if small && i > 0 { 0 } else { rng.bits() as u8 });
    }
    bytes
}
