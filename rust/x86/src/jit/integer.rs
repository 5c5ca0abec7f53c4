//! General-purpose instructions: the guest's own instruction, its registers renamed and its memory operand replaced by host memory.

use iced_x86::{Code, Instruction, Mnemonic as N, OpKind, Register};

use super::asm::{Mem, R11, RAX};
use super::block::{Flags, Result, Translator, Unsupported, Writes};
use super::frame;
use super::operand::{self, Access, guest, sized};

/// What a translation has to know of an instruction.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    pub writes: Writes,
    pub reads: bool,
    /// Whether operands 0 and 1 are written (as registers).
    pub results: [bool; 2],
}

const fn shape_of(writes: Writes, reads: bool, first: bool, second: bool) -> Option<Shape> {
    Some(Shape { writes, reads, results: [first, second] })
}

/// `None`: no template.
pub fn shape(ins: &Instruction) -> Option<Shape> {
    use Writes::{All, None as Nothing, Some as Part};
    let mnemonic = ins.mnemonic();
    // MOV has forms with segment, control and debug registers.
    if (0..ins.op_count()).any(|n| ins.op_kind(n) == OpKind::Register && !ins.op_register(n).is_gpr()) {
        return None;
    }
    match mnemonic {
        N::Mov | N::Movzx | N::Movsx | N::Movsxd | N::Lea | N::Not | N::Movnti => shape_of(Nothing, false, true, false),
        N::Bswap if ins.op0_register().size() >= 4 => shape_of(Nothing, false, true, false),
        N::Cbw | N::Cwde | N::Cdqe | N::Cwd | N::Cdq | N::Cqo => shape_of(Nothing, false, true, false),
        N::Add | N::Sub | N::And | N::Or | N::Xor | N::Neg => shape_of(All, false, true, false),
        N::Adc | N::Sbb => shape_of(All, true, true, false),
        N::Cmp | N::Test => shape_of(All, false, false, false),
        N::Inc | N::Dec | N::Imul => shape_of(Part, false, true, false),
        N::Mul | N::Div | N::Idiv => shape_of(Part, false, true, false),
        N::Shl | N::Sal | N::Shr | N::Sar => shift(ins),
        N::Rol | N::Ror => shape_of(Part, false, true, false),
        N::Rcl | N::Rcr => shape_of(Part, true, true, false),
        N::Shld | N::Shrd if ins.op1_register().size() >= 4 => shift(ins),
        N::Bt | N::Bts | N::Btr | N::Btc => bits(ins),
        N::Bsf | N::Bsr => shape_of(Part, false, true, false),
        N::Popcnt => shape_of(All, false, true, false),
        N::Xchg => shape_of(Nothing, false, true, true),
        N::Xadd => shape_of(All, false, true, true),
        N::Cmpxchg => shape_of(All, false, true, false),
        N::Clc | N::Stc | N::Cmc => shape_of(Part, mnemonic == N::Cmc, false, false),
        _ if operand::is_nop(mnemonic) => shape_of(Nothing, false, false, false),
        _ => match ins.condition_code() {
            iced_x86::ConditionCode::None => None,
            _ if is_cmov(ins) || is_setcc(ins) => shape_of(Nothing, true, true, false),
            _ => None,
        },
    }
}

fn is_cmov(ins: &Instruction) -> bool {
    ins.op_count() == 2 && ins.rflags_read() != 0
}
fn is_setcc(ins: &Instruction) -> bool {
    ins.op_count() == 1 && !matches!(ins.op0_kind(), OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64)
}

/// Bytes of operand 0.
fn width(ins: &Instruction) -> usize {
    if ins.op0_kind() == OpKind::Register { ins.op0_register().size() } else { ins.memory_size().size() }
}

/// Shifts by a constant other than 0 write all flags; by CL perhaps none.
fn shift(ins: &Instruction) -> Option<Shape> {
    let last = ins.op_count() - 1;
    if ins.op_kind(last) == OpKind::Register {
        return shape_of(Writes::Some, false, true, false);
    }
    if ins.immediate(last) & if width(ins) == 8 { 63 } else { 31 } == 0 {
        return None;
    }
    shape_of(Writes::All, false, true, false)
}

/// A bit number in a register reaches beyond a memory operand.
fn bits(ins: &Instruction) -> Option<Shape> {
    if ins.op0_kind() == OpKind::Memory && ins.op1_kind() == OpKind::Register {
        return None;
    }
    shape_of(Writes::Some, false, ins.mnemonic() != N::Bt, false)
}

/// Emits the instruction. On an error what was emitted is to be dropped.
pub fn template(t: &mut Translator<'_>, ins: &Instruction) -> Result {
    let Some(shape) = shape(ins) else {
        return match ins.mnemonic() {
            N::Push | N::Pop | N::Leave => super::transfer::stack(t, ins),
            N::Cli | N::Sti | N::Cld | N::Std | N::Pushfq | N::Popfq | N::Swapgs | N::Cmpxchg16b => {
                super::system::template(t, ins)
            }
            _ => super::vector::template(t, ins).or_else(|Unsupported| super::x87::template(t, ins)),
        };
    };
    // Where the host's undefined flags are other ones, the interpreter's are made by its own function.
    if !t.unit.same_flags && t.needed_after() && differs(ins) {
        return Err(Unsupported);
    }
    if operand::is_nop(ins.mnemonic()) {
        return Ok(());
    }
    let access = operand::memory(ins);
    match ins.mnemonic() {
        N::Lea => return lea(t, ins),
        N::Cbw | N::Cwde | N::Cdqe | N::Cwd | N::Cdq | N::Cqo => return extend(t, ins),
        N::Mul | N::Div | N::Idiv => return super::muldiv::template(t, ins, access),
        N::Imul if ins.op_count() == 1 => return super::muldiv::template(t, ins, access),
        N::Cmpxchg => return compare_exchange(t, ins, access, shape),
        _ => {}
    }
    rename(t, ins, access, shape)
}

/// Instructions with flags that the manuals leave undefined; of AND, OR, XOR and TEST all makers clear AF.
fn differs(ins: &Instruction) -> bool {
    ins.rflags_undefined() != 0 && !matches!(ins.mnemonic(), N::And | N::Or | N::Xor | N::Test)
}

/// RAX and R11 = where the operand is; `combined`: R11 alone, so that RAX is free.
pub fn place(t: &mut Translator<'_>, ins: &Instruction, access: Access, combined: bool) -> Result<Mem> {
    t.spoil_flags();
    t.address(ins, true)?;
    t.translate(access.size, access.write);
    if combined {
        t.asm.lea(R11, Mem::indexed(R11, RAX, 0));
        return Ok(Mem::at(R11, 0));
    }
    Ok(Mem::indexed(R11, RAX, 0))
}

/// Replaces the memory operand.
pub fn redirect(ins: &mut Instruction, m: Mem) {
    ins.set_segment_prefix(Register::None);
    ins.set_memory_base(m.base.map_or(Register::None, |n| Register::RAX + u32::from(n)));
    ins.set_memory_index(m.index.map_or(Register::None, |(n, _)| Register::RAX + u32::from(n)));
    ins.set_memory_index_scale(1);
    ins.set_memory_displacement64(m.disp as i64 as u64);
    ins.set_memory_displ_size(if m.disp == 0 { 0 } else { 8 });
}

/// Re-encodes for the host.
pub fn encode(t: &mut Translator<'_>, ins: &mut Instruction) -> Result {
    // All vCPUs take turns on one thread: no other access can come between.
    ins.set_has_lock_prefix(false);
    ins.set_has_xacquire_prefix(false);
    ins.set_has_xrelease_prefix(false);
    t.encoder.set_buffer(std::mem::take(&mut t.asm.buf));
    let done = t.encoder.encode(ins, 0);
    t.asm.buf = t.encoder.take_buffer();
    done.map(|_| ()).map_err(|_| Unsupported)
}

fn lea(t: &mut Translator<'_>, ins: &Instruction) -> Result {
    let to = guest(ins.op0_register())?;
    t.address(ins, false)?;
    match ins.op0_register().size() {
        8 => t.put(to, RAX),
        // A 32-bit move clears the upper half.
        4 => {
            if let Some(host) = frame::MAP[to] {
                t.asm.rr(false, &[0x8b], host, RAX);
            } else {
                t.asm.rr(false, &[0x8b], RAX, RAX);
                t.put(to, RAX);
            }
        }
        _ => return Err(Unsupported),
    }
    Ok(())
}

/// The accumulator's extensions.
fn extend(t: &mut Translator<'_>, ins: &Instruction) -> Result {
    let (a, d) = (8, 2);
    match ins.mnemonic() {
        // movsxd r8, r8d
        N::Cdqe => t.asm.rr(true, &[0x63], a, a),
        // movsx r8d, r8w
        N::Cwde => t.asm.rr(false, &[0x0f, 0xbf], a, a),
        N::Cqo => {
            t.asm.mov(RAX, a);
            t.asm.bytes(&[0x48, 0x99]);
        }
        N::Cdq => {
            t.asm.mov(RAX, a);
            t.asm.bytes(&[0x99]);
        }
        _ => return Err(Unsupported),
    }
    debug_assert_eq!(frame::MAP[2], Some(d), "CQO and CDQ write the host's RDX");
    Ok(())
}

/// General form: rename, re-encode.
fn rename(t: &mut Translator<'_>, ins: &Instruction, access: Option<Access>, shape: Shape) -> Result {
    if (0..ins.op_count()).any(|n| is_high(ins.op_register(n))) {
        return high_bytes(t, ins, access, shape);
    }
    let mut host = *ins;
    explicit(&mut host);
    let wants_flags = shape.reads || shape.writes == Writes::Some && t.needed_after();
    let in_memory = (0..ins.op_count()).filter(|&n| is_slot(ins, n)).count();
    if let Some(access) = access {
        let m = place(t, ins, access, wants_flags || in_memory > 0)?;
        redirect(&mut host, m);
    }
    if wants_flags {
        t.host_flags();
    }
    let mut free: &[u8] = if access.is_some() { &[RAX] } else { &[R11, RAX] };
    let mut stores: [Option<(usize, u8)>; 2] = [None, None];
    let mut loaded: Option<(usize, u8)> = None;
    for n in 0..ins.op_count() {
        if ins.op_kind(n) != OpKind::Register {
            continue;
        }
        let register = host.op_register(n);
        let number = guest(register)?;
        let to = match (frame::MAP[number], loaded) {
            (Some(to), _) => to,
            (None, Some((already, to))) if already == number => to,
            (None, _) => {
                let (&to, rest) = free.split_first().ok_or(Unsupported)?;
                free = rest;
                if !overwritten(ins, n, register) {
                    t.asm.load(to, frame::word(number));
                }
                loaded = Some((number, to));
                to
            }
        };
        if n < 2 && shape.results[n as usize] && frame::MAP[number].is_none() {
            stores[n as usize] = Some((number, to));
        }
        host.set_op_register(n, sized(to, register));
    }
    encode(t, &mut host)?;
    for (number, from) in stores.into_iter().flatten() {
        t.asm.store(frame::word(number), from);
    }
    match shape.writes {
        Writes::None => {}
        _ => t.flags = Flags::Host,
    }
    Ok(())
}

fn is_high(register: Register) -> bool {
    matches!(register, Register::AH | Register::CH | Register::DH | Register::BH)
}

/// AH is worked on in the host's AH; the others are where they are in the guest, and are out of reach for instructions with a REX prefix.
fn high_bytes(t: &mut Translator<'_>, ins: &Instruction, access: Option<Access>, shape: Shape) -> Result {
    const A: u8 = 8;
    debug_assert_eq!([frame::MAP[0], frame::MAP[1], frame::MAP[2], frame::MAP[3]], [Some(A), Some(1), Some(2), Some(3)]);
    if access.is_some() {
        return Err(Unsupported);
    }
    let widens = matches!(ins.mnemonic(), N::Movzx | N::Movsx) && ins.op0_register().size() == 4;
    if shape.reads || shape.writes == Writes::Some && t.needed_after() {
        t.host_flags();
    }
    let mut host = *ins;
    let mut changed = false;
    for n in 0..ins.op_count() {
        if ins.op_kind(n) != OpKind::Register {
            continue;
        }
        let register = ins.op_register(n);
        if widens && n == 0 {
            host.set_op_register(0, Register::EAX);
        } else if register == Register::AH || register == Register::AL {
            t.asm.mov(RAX, A);
            changed |= n < 2 && shape.results[n as usize];
        } else if !is_high(register) {
            let to = frame::MAP[guest(register)?].filter(|&to| to < 4).ok_or(Unsupported)?;
            host.set_op_register(n, sized(to, register));
        }
    }
    encode(t, &mut host)?;
    if widens {
        let to = guest(ins.op0_register())?;
        match frame::MAP[to] {
            Some(to) => t.asm.rr(false, &[0x8b], to, RAX),
            None => t.put(to, RAX),
        }
    } else if changed {
        t.asm.mov(A, RAX);
    }
    if shape.writes != Writes::None {
        t.flags = Flags::Host;
    }
    Ok(())
}

fn is_slot(ins: &Instruction, n: u32) -> bool {
    ins.op_kind(n) == OpKind::Register && guest(ins.op_register(n)).is_ok_and(|n| frame::MAP[n].is_none())
}

/// Whether the old value of register operand `n` does not matter.
fn overwritten(ins: &Instruction, n: u32, register: Register) -> bool {
    n == 0 && register.size() >= 4 && matches!(ins.mnemonic(), N::Mov | N::Movzx | N::Movsx | N::Movsxd) && {
        // MOV r8, r8 and its like read it.
        !(1..ins.op_count())
            .any(|m| ins.op_kind(m) == OpKind::Register && ins.op_register(m).full_register() == register.full_register())
    }
}

/// `CMPXCHG m, r`: the accumulator is where the host's instruction wants it.
fn compare_exchange(t: &mut Translator<'_>, ins: &Instruction, access: Option<Access>, shape: Shape) -> Result {
    let access = access.ok_or(Unsupported)?;
    let register = ins.op1_register();
    let from = frame::MAP[guest(register)?].ok_or(Unsupported)?;
    let m = place(t, ins, access, true)?;
    let mut host = *ins;
    redirect(&mut host, m);
    host.set_op1_register(sized(from, register));
    t.asm.mov(RAX, 8);
    encode(t, &mut host)?;
    t.asm.mov(8, RAX);
    debug_assert!(shape.writes == Writes::All);
    t.flags = Flags::Host;
    Ok(())
}

/// Forms with an implied accumulator become the general ones: the guest's accumulator is another register of the host.
#[rustfmt::skip]
fn explicit(ins: &mut Instruction) {
    macro_rules! general {
        ($($short:ident => $long:ident),* $(,)?) => {
            match ins.code() {
                $(Code::$short => ins.set_code(Code::$long),)*
                _ => {}
            }
        };
    }
    general!(
        Add_AL_imm8 => Add_rm8_imm8, Add_AX_imm16 => Add_rm16_imm16, Add_EAX_imm32 => Add_rm32_imm32, Add_RAX_imm32 => Add_rm64_imm32,
        Or_AL_imm8 => Or_rm8_imm8, Or_AX_imm16 => Or_rm16_imm16, Or_EAX_imm32 => Or_rm32_imm32, Or_RAX_imm32 => Or_rm64_imm32,
        Adc_AL_imm8 => Adc_rm8_imm8, Adc_AX_imm16 => Adc_rm16_imm16, Adc_EAX_imm32 => Adc_rm32_imm32, Adc_RAX_imm32 => Adc_rm64_imm32,
        Sbb_AL_imm8 => Sbb_rm8_imm8, Sbb_AX_imm16 => Sbb_rm16_imm16, Sbb_EAX_imm32 => Sbb_rm32_imm32, Sbb_RAX_imm32 => Sbb_rm64_imm32,
        And_AL_imm8 => And_rm8_imm8, And_AX_imm16 => And_rm16_imm16, And_EAX_imm32 => And_rm32_imm32, And_RAX_imm32 => And_rm64_imm32,
        Sub_AL_imm8 => Sub_rm8_imm8, Sub_AX_imm16 => Sub_rm16_imm16, Sub_EAX_imm32 => Sub_rm32_imm32, Sub_RAX_imm32 => Sub_rm64_imm32,
        Xor_AL_imm8 => Xor_rm8_imm8, Xor_AX_imm16 => Xor_rm16_imm16, Xor_EAX_imm32 => Xor_rm32_imm32, Xor_RAX_imm32 => Xor_rm64_imm32,
        Cmp_AL_imm8 => Cmp_rm8_imm8, Cmp_AX_imm16 => Cmp_rm16_imm16, Cmp_EAX_imm32 => Cmp_rm32_imm32, Cmp_RAX_imm32 => Cmp_rm64_imm32,
        Test_AL_imm8 => Test_rm8_imm8, Test_AX_imm16 => Test_rm16_imm16, Test_EAX_imm32 => Test_rm32_imm32, Test_RAX_imm32 => Test_rm64_imm32,
        // The hint is not worth its different ordering.
        Movnti_m32_r32 => Mov_rm32_r32, Movnti_m64_r64 => Mov_rm64_r64,
        Xchg_r16_AX => Xchg_rm16_r16, Xchg_r32_EAX => Xchg_rm32_r32, Xchg_r64_RAX => Xchg_rm64_r64,
    );
}
