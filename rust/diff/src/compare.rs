//! Where the two outcomes differ, leaving out what is undefined by the manuals or belongs to a host.

use iced_x86::{Code, Instruction, Mnemonic, OpKind, RflagsBits};

use crate::case::{Case, DATA, DATA_LEN, Outcome, fx};
use crate::forms;

const CF: u64 = 1 << 0;
const PF: u64 = 1 << 2;
const AF: u64 = 1 << 4;
const ZF: u64 = 1 << 6;
const SF: u64 = 1 << 7;
const OF: u64 = 1 << 11;
const AC: u64 = 1 << 18;

/// From here on Linux says "present" whatever the page tables say.
const TASK_SIZE: u64 = 0x7fff_ffff_f000;

const DB: u8 = 1;
const BP: u8 = 3;
const XM: u8 = 19;
const PROTECTION: u8 = 13;
const PAGE_FAULT: u8 = 14;

/// MXCSR.MM.
const MISALIGNED: u32 = 1 << 17;

/// How strict to be.
#[derive(Debug, Clone, Copy, Default)]
pub struct Rules {
    /// Compare undefined flags too: what this very processor does.
    pub strict: bool,
    /// Take #GP for #SS: which of them an address that is not canonical gives is the block loop's doing, not a handler's.
    pub stack_faults_alike: bool,
}

fn rflags(bits: u32) -> u64 {
    [
        (RflagsBits::CF, CF),
        (RflagsBits::PF, PF),
        (RflagsBits::AF, AF),
        (RflagsBits::ZF, ZF),
        (RflagsBits::SF, SF),
        (RflagsBits::OF, OF),
    ]
    .iter()
    .filter(|(b, _)| bits & b != 0)
    .fold(0, |all, (_, f)| all | f)
}

/// Flags that the manuals leave undefined after this execution (Intel SDM vol. 2, AMD APM vol. 3): iced's table per instruction,
/// made exact for shifts, whose counts it does not know.
pub fn undefined_flags(case: &Case, insn: &Instruction) -> u64 {
    use Mnemonic as M;
    let all = rflags(insn.rflags_undefined());
    let width = match insn.op0_kind() {
        OpKind::Register => insn.op0_register().size() as u32 * 8,
        _ => insn.memory_size().size() as u32 * 8,
    };
    let count = || {
        let last = insn.op_count() - 1;
        let raw = match insn.op_kind(last) {
            OpKind::Register => case.state.gpr[1] as u32,
            _ => insn.immediate(last) as u32,
        };
        raw & if width == 64 { 63 } else { 31 }
    };
    match insn.mnemonic() {
        M::Shl | M::Sal | M::Shr | M::Sar | M::Shld | M::Shrd => {
            let count = count();
            let double = matches!(insn.mnemonic(), M::Shld | M::Shrd);
            match count {
                0 => 0,
                1 => AF,
                c if double && c > width => CF | PF | AF | ZF | SF | OF,
                c if c >= width && insn.mnemonic() != M::Sar => AF | OF | CF,
                _ => AF | OF,
            }
        }
        M::Rol | M::Ror | M::Rcl | M::Rcr => match count() {
            0 | 1 => 0,
            _ => OF,
        },
        _ => all,
    }
}

/// SHLD and SHRD of 16 bits by more than 16 give no defined result.
fn undefined_result(case: &Case, insn: &Instruction) -> bool {
    let count = match insn.op_kind(insn.op_count().saturating_sub(1)) {
        OpKind::Register => case.state.gpr[1] as u8,
        _ => insn.immediate8(),
    } & 31;
    matches!(insn.code(), Code::Shld_rm16_r16_imm8 | Code::Shld_rm16_r16_CL | Code::Shrd_rm16_r16_imm8 | Code::Shrd_rm16_r16_CL)
        && count > 16
}

/// Bytes of memory whose contents are a host's matter: x87 pointers and what FXSAVE reserves.
fn ignored_memory(insn: &Instruction) -> &'static [(usize, usize)] {
    use Code as C;
    match insn.code() {
        C::Fnstenv_m14byte | C::Fnsave_m94byte => &[(6, 14)],
        C::Fnstenv_m28byte | C::Fnsave_m108byte => &[(2, 4), (6, 8), (10, 28)],
        C::Fxsave_m512byte | C::Fxsave64_m512byte => &[(6, 24), (28, 32), (416, 512)],
        _ => &[],
    }
}

fn f32s(v: u128) -> [f32; 4] {
    std::array::from_fn(|i| f32::from_bits((v >> (32 * i)) as u32))
}

/// RCPPS and kin: relative error at most 1.5 × 2^-12 against the exact value, so twice that between two processors.
fn close(a: f32, b: f32) -> bool {
    a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan() || ((a - b) / b).abs() <= 1.5 / 2048.0
}

/// Distance in units of the last place of two 80-bit values of the same sign; large when they are not comparable.
fn ulps(a: (u64, u16), b: (u64, u16)) -> u128 {
    if a.1 >> 15 != b.1 >> 15 {
        return if a.0 | b.0 == 0 { 0 } else { u128::MAX };
    }
    let place = |v: (u64, u16)| u128::from(v.1 & 0x7fff) << 63 | u128::from(v.0 & (u64::MAX >> 1));
    place(a).abs_diff(place(b))
}

/// One line for every difference; empty when equal.
pub fn differences(case: &Case, native: &Outcome, ours: &Outcome, rules: Rules) -> Vec<String> {
    let mut out = Vec::new();
    let Some(form) = forms::decode(&case.bytes[case.prelude..], case.bits, case.state.rip + case.prelude as u64) else {
        // Nothing that the decoder knows: #UD on both sides.
        let same = native.vector == ours.vector && same_registers(native, ours);
        return if same {
            Vec::new()
        } else {
            vec![format!("vector {} ours {} of undecodable bytes", native.vector, ours.vector)]
        };
    };
    let insn = form.insn;
    // Gone through, or gone through and met a page that cannot be fetched.
    let completed = matches!(native.vector, BP | DB) || native.state.rip != case.state.rip + case.prelude as u64;
    if native.vector == PAGE_FAULT && matches!(insn.mnemonic(), Mnemonic::Popa | Mnemonic::Popad) {
        // AMD's POPA has loaded some registers by then. Nobody can want that.
        return out;
    }
    if (native.vector == PAGE_FAULT || case.state.rflags & AC != 0)
        && matches!(insn.mnemonic(), Mnemonic::Maskmovq | Mnemonic::Maskmovdqu)
    {
        // Whether bytes that the mask leaves out can fault, and how aligned it must be, is the processor's choice.
        return out;
    }

    // AMD's MXCSR bit 17 makes misaligned SSE operands legal where CPUID says so (MisAlignSse, APM vol. 1, 4.2.2), which the profile
    // does not: to the engine it is a reserved bit.
    let loads_mxcsr = matches!(insn.mnemonic(), Mnemonic::Ldmxcsr | Mnemonic::Fxrstor | Mnemonic::Fxrstor64);
    if loads_mxcsr && completed && native.state.mxcsr() & MISALIGNED != 0 && ours.vector == PROTECTION {
        return out;
    }

    let is_fault = |v: u8| matches!(v, 12..=14 | 17);
    if is_fault(native.vector) && is_fault(ours.vector) && same_registers(native, ours) {
        // CMPS with two bad addresses (this processor looks at them in another order with REP than without), FXSAVE and FXRSTOR
        // with an address that is neither aligned nor canonical, BT with a base that is not canonical, far calls and returns whose
        // stack is bad in more than one way: either fault will do.
        use Mnemonic as M;
        if matches!(
            insn.mnemonic(),
            M::Call
                | M::Iret
                | M::Iretd
                | M::Iretq
                | M::Retf
                | M::Cmpsb
                | M::Cmpsw
                | M::Cmpsd
                | M::Cmpsq
                | M::Fxsave
                | M::Fxsave64
                | M::Fxrstor
                | M::Fxrstor64
                | M::Fnsave
                | M::Fnstenv
                | M::Frstor
                | M::Fldenv
                | M::Bt
                | M::Bts
                | M::Btr
                | M::Btc
        ) {
            return out;
        }
    }
    if completed && native.vector == ours.vector && undefined_result(case, &insn) {
        return out;
    }
    if native.vector != ours.vector && !(rules.stack_faults_alike && native.vector == 12 && ours.vector == 13) {
        out.push(format!("vector {} ours {}", native.vector, ours.vector));
    }
    let has_error = matches!(native.vector, 8 | 10..=14 | 17);
    if native.vector == ours.vector && has_error {
        let mut mask = u32::MAX;
        if native.vector == PAGE_FAULT && native.cr2 >= TASK_SIZE {
            mask = !1;
        }
        if (native.error ^ ours.error) & mask != 0 {
            out.push(format!("error code {:#x} ours {:#x}", native.error, ours.error));
        }
    }
    // Where in a long operand the fault is met, and what has been written by then, is the processor's choice.
    let long = insn.memory_size().size() > 16;
    let page = if long { !0xfff } else { u64::MAX };
    if native.vector == PAGE_FAULT && ours.vector == PAGE_FAULT && (native.cr2 ^ ours.cr2) & page != 0 {
        out.push(format!("cr2 {:#x} ours {:#x}", native.cr2, ours.cr2));
    }

    let (n, o) = (&native.state, &ours.state);
    const NAMES: [&str; 16] =
        ["rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"];
    for (i, name) in NAMES.iter().enumerate() {
        if n.gpr[i] != o.gpr[i] {
            out.push(format!("{name} {:#x} ours {:#x}", n.gpr[i], o.gpr[i]));
        }
    }
    if n.rip != o.rip {
        out.push(format!("rip {:#x} ours {:#x}", n.rip, o.rip));
    }
    let mut mask = u64::MAX;
    if matches!(insn.mnemonic(), Mnemonic::Fcomi | Mnemonic::Fcomip | Mnemonic::Fucomi | Mnemonic::Fucomip)
        && o.u16(fx::FSW) & 0x80 != 0
    {
        // Unmasked invalid operand: Intel's manual leaves the flags alone, this AMD processor sets them.
        mask &= !(CF | PF | AF | ZF | SF | OF);
    }
    if completed && !rules.strict {
        mask &= !undefined_flags(case, &insn);
    }
    if (n.rflags ^ o.rflags) & mask != 0 {
        out.push(format!(
            "rflags {:#x} ours {:#x}, differing {}",
            n.rflags & mask,
            o.rflags & mask,
            flag_names((n.rflags ^ o.rflags) & mask)
        ));
    }
    for (i, name) in ["es", "cs", "ss", "ds", "fs", "gs"].iter().enumerate() {
        // The way to Linux's signal handler clears the RPL of null selectors.
        let seen = |s: u16| if s < 4 { 0 } else { s };
        if seen(n.selectors[i]) != seen(o.selectors[i]) {
            out.push(format!("{name} {:#x} ours {:#x}", n.selectors[i], o.selectors[i]));
        }
    }
    if n.fs_base != o.fs_base {
        out.push(format!("fs base {:#x} ours {:#x}", n.fs_base, o.fs_base));
    }
    if n.gs_base != o.gs_base {
        out.push(format!("gs base {:#x} ours {:#x}", n.gs_base, o.gs_base));
    }
    floats(&insn, case, native, ours, &mut out);

    let skip: Vec<usize> = if insn.op_count() > 0 && insn.op0_kind() == OpKind::Memory {
        let at = insn.virtual_address(0, 0, |r, _, _| {
            Some(match r {
                iced_x86::Register::FS => case.state.fs_base,
                iced_x86::Register::GS => case.state.gs_base,
                r if r.is_gpr() => {
                    case.state.gpr[r.full_register().number()] & if r.size() == 4 { 0xffff_ffff } else { u64::MAX }
                }
                _ => 0,
            })
        });
        let base = at.unwrap_or(0).wrapping_sub(DATA) as usize;
        ignored_memory(&insn).iter().flat_map(|&(a, b)| (a..b).map(move |i| base.wrapping_add(i))).collect()
    } else {
        Vec::new()
    };
    if (completed || !long) && native.data != ours.data {
        let differing: Vec<usize> = (0..DATA_LEN).filter(|i| native.data[*i] != ours.data[*i] && !skip.contains(i)).collect();
        for i in differing.iter().take(8) {
            out.push(format!(
                "memory {:#x}: {:02x} ours {:02x} was {:02x}",
                DATA + *i as u64,
                native.data[*i],
                ours.data[*i],
                case.data[*i]
            ));
        }
        if differing.len() > 8 {
            out.push(format!("memory: {} bytes in all", differing.len()));
        }
    }
    out
}

fn same_registers(a: &Outcome, b: &Outcome) -> bool {
    a.state.gpr == b.state.gpr && a.state.rip == b.state.rip && a.data == b.data
}

fn floats(insn: &Instruction, case: &Case, native: &Outcome, ours: &Outcome, out: &mut Vec<String>) {
    use Mnemonic as M;
    let (n, o) = (&native.state, &ours.state);
    let approximate = matches!(insn.mnemonic(), M::Rcpps | M::Rcpss | M::Rsqrtps | M::Rsqrtss);
    for i in 0..if case.bits == 64 { 16 } else { 8 } {
        let (a, b) = (n.xmm(i), o.xmm(i));
        if a != b && !(approximate && f32s(a).iter().zip(f32s(b)).all(|(a, b)| close(*a, b))) {
            out.push(format!("xmm{i} {a:032x} ours {b:032x}"));
        }
    }
    if n.mxcsr() != o.mxcsr() {
        out.push(format!("mxcsr {:#x} ours {:#x}", n.mxcsr(), o.mxcsr()));
    }
    if native.vector == XM && matches!(insn.mnemonic(), M::Cvtpd2pi | M::Cvtps2pi | M::Cvttpd2pi | M::Cvttps2pi) {
        return; // Whether the exception comes before or after the switch to MMX is the processor's choice.
    }
    for (name, at) in [("fcw", fx::FCW), ("fsw", fx::FSW)] {
        if n.u16(at) != o.u16(at) {
            out.push(format!("{name} {:#x} ours {:#x}", n.u16(at), o.u16(at)));
        }
    }
    if n.fx[fx::FTW] != o.fx[fx::FTW] {
        out.push(format!("ftw {:#x} ours {:#x}", n.fx[fx::FTW], o.fx[fx::FTW]));
    }
    // Intel and AMD promise less than one unit in the last place; two correct ones may differ by that on either side.
    let transcendental =
        matches!(insn.mnemonic(), M::Fsin | M::Fcos | M::Fsincos | M::Fptan | M::Fpatan | M::F2xm1 | M::Fyl2x | M::Fyl2xp1);
    for i in 0..8 {
        let (a, b) = (n.st(i), o.st(i));
        if a != b && !(transcendental && ulps(a, b) <= 2) {
            out.push(format!("st({i}) {:04x}:{:016x} ours {:04x}:{:016x}", a.1, a.0, b.1, b.0));
        }
    }
}

fn flag_names(bits: u64) -> String {
    [
        (CF, "CF"),
        (PF, "PF"),
        (AF, "AF"),
        (ZF, "ZF"),
        (SF, "SF"),
        (1 << 8, "TF"),
        (1 << 9, "IF"),
        (1 << 10, "DF"),
        (OF, "OF"),
        (1 << 18, "AC"),
    ]
    .iter()
    .filter(|(b, _)| bits & b != 0)
    .map(|(_, n)| *n)
    .collect::<Vec<_>>()
    .join(" ")
}
