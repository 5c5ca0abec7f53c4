//! Makes a case of an instruction: where it stands, what its operands point at, what is in registers and memory.

use iced_x86::{Code, FlowControl, Instruction, InstructionInfoFactory, MemorySize, Mnemonic, OpAccess, OpKind, Register};

use crate::case::{CODE, CODE_LEN, Case, DATA, DATA_END, DATA_LEN, READ_ONLY, State, USER_CS32, USER_CS64, USER_DS, fx};
use crate::forms::{self, Form};
use crate::rng::Rng;
use crate::values::{self, Style};

const CF_TO_OF: u64 = 0x8d5;
const TF: u64 = 1 << 8;
const IF: u64 = 1 << 9;
const DF: u64 = 1 << 10;
const AC: u64 = 1 << 18;

/// Bytes of code that may be jumped to: INT3 all over.
fn landing(rng: &mut Rng) -> u64 {
    CODE + 0x1800 + rng.below(0x700)
}

/// What a prelude is made of: instructions that write, read and keep flags in all the ways there are.
const PRELUDE: [Code; 48] = [
    Code::Add_r32_rm32,
    Code::Add_r64_rm64,
    Code::Add_rm8_r8,
    Code::Add_rm16_imm8,
    Code::Sub_r32_rm32,
    Code::Sub_rm64_imm8,
    Code::Sub_rm8_imm8,
    Code::Adc_r64_rm64,
    Code::Adc_rm32_imm8,
    Code::Sbb_r32_rm32,
    Code::Sbb_r64_rm64,
    Code::Cmp_r32_rm32,
    Code::Cmp_rm8_imm8,
    Code::Cmp_rm64_r64,
    Code::Test_rm32_r32,
    Code::Test_rm8_imm8,
    Code::And_r64_rm64,
    Code::Or_rm16_imm16,
    Code::Xor_r32_rm32,
    Code::Inc_rm32,
    Code::Inc_rm64,
    Code::Dec_rm8,
    Code::Dec_rm64,
    Code::Neg_rm32,
    Code::Not_rm64,
    Code::Shl_rm32_imm8,
    Code::Shr_rm64_imm8,
    Code::Sar_rm16_1,
    Code::Shl_rm64_CL,
    Code::Rol_rm32_imm8,
    Code::Ror_rm64_1,
    Code::Rcl_rm32_1,
    Code::Rcr_rm64_imm8,
    Code::Bt_rm64_imm8,
    Code::Btc_rm32_r32,
    Code::Imul_r32_rm32,
    Code::Imul_r64_rm64_imm8,
    Code::Mul_rm32,
    Code::Bsf_r64_rm64,
    Code::Setb_rm8,
    Code::Sete_rm8,
    Code::Cmovl_r64_rm64,
    Code::Cmc,
    Code::Stc,
    Code::Sahf,
    Code::Popcnt_r32_rm32,
    Code::Xadd_rm32_r32,
    Code::Mov_r32_imm32,
];

/// Null ones, the user's, the kernel's, ones without a descriptor.
const SELECTORS: [u16; 24] = [
    0, 1, 2, 3, USER_DS, USER_DS, USER_DS, USER_DS, USER_CS32, USER_CS32, USER_CS32, USER_CS64, USER_CS64, USER_CS64, 0x20, 0x28,
    0x2a, 0x22, 0x30, 0x08, 0x10, 0x1b, 0x27, 0x203,
];

/// Makes case `number` of run `seed` out of `codes`, or when that is empty of random bytes ([`forms::raw`]). `None` when no encoding was found.
/// Up to `prelude` instructions on registers come before the one in question: flags and registers that it uses are then fresh.
pub fn case(seed: u64, number: u64, codes: &[Code], bits: u32, prelude: u64) -> Option<Case> {
    let mut rng = Rng::new(seed, number);
    let rng = &mut rng;
    let code = if codes.is_empty() { Code::INVALID } else { rng.pick(codes) };
    let ip = match rng.below(20) {
        0 => CODE + 0x1000 - rng.below(16),
        1 => CODE + CODE_LEN as u64 - 1 - rng.below(15),
        _ => CODE + 0x100 + rng.below(0x200),
    };
    let form = if codes.is_empty() {
        match forms::raw(rng, bits, ip)? {
            Ok(form) => form,
            Err(bytes) => {
                // Not at the end of the code: how much of it the processor wants to see before #UD is its own matter.
                let ip = CODE + 0x200;
                let gpr = std::array::from_fn(|n| DATA + 0x100 * n as u64);
                let state = State { gpr, rip: ip, rflags: 2 | IF, ..State::default() };
                return Some(Case { number, code, bytes, prelude: 0, bits, state, data: Box::new([0; DATA_LEN]) });
            }
        }
    } else {
        forms::random(rng, code, bits, ip)?
    };
    let code = form.insn.code();
    let mut build = Build { rng, bits, form, state: State::default(), data: Box::new([0; DATA_LEN]), style: Style::Integer };
    build.fill();
    build.operands()?;
    if bits == 32 {
        build.state.gpr.iter_mut().for_each(|g| *g &= 0xffff_ffff);
    }
    let before = if prelude > 0 { build.prelude(prelude) } else { Vec::new() };
    let Build { form, state, data, .. } = build;
    let start = ip - before.len() as u64;
    let bytes = [&before[..], &form.bytes].concat();
    Some(Case { number, code, bytes, prelude: before.len(), bits, state: State { rip: start, ..state }, data })
}

struct Build<'a> {
    rng: &'a mut Rng,
    bits: u32,
    form: Form,
    state: State,
    data: Box<[u8; DATA_LEN]>,
    style: Style,
}

impl Build<'_> {
    fn insn(&self) -> Instruction {
        self.form.insn
    }

    fn gpr(&mut self, r: Register) -> &mut u64 {
        &mut self.state.gpr[r.full_register().number()]
    }

    /// Everything random, of a kind that suits the instruction.
    fn fill(&mut self) {
        self.style = style(self.rng, &self.form.insn);
        let rng = &mut *self.rng;
        for g in &mut self.state.gpr {
            *g = values::integer(rng);
        }
        self.state.gpr[4] = DATA + 0x800 + rng.below(0x80) * 8;
        self.state.rflags = 2 | IF | rng.bits() & CF_TO_OF;
        if rng.chance(15) {
            self.state.rflags |= DF;
        }
        if rng.chance(3) {
            self.state.rflags |= AC;
        }
        if rng.chance(1) {
            self.state.rflags |= TF;
        }
        if matches!(self.form.insn.mnemonic(), Mnemonic::Iret | Mnemonic::Iretd | Mnemonic::Iretq) {
            // IRET that clears TF still traps on the processor, not here.
            self.state.rflags &= !TF;
        }
        if self.bits == 64 {
            self.state.fs_base = rng.pick(&[0, 0x1000, 0x1234_5678, 0x7000_1234_5670]);
            self.state.gs_base = rng.pick(&[0, 0x3000, 0x6000_0000_0000, 0x1_0000_0001]);
        } else {
            for g in &mut self.state.gpr {
                *g &= 0xffff_ffff;
            }
        }
        for chunk in self.data.chunks_exact_mut(8) {
            chunk.copy_from_slice(&rng.bits().to_le_bytes());
        }
        self.fill_sse();
        self.fill_x87();
        if self.bits == 32 {
            for n in 8..16 {
                self.state.gpr[n] = 0;
            }
        }
    }

    fn fill_sse(&mut self) {
        let rng = &mut *self.rng;
        for n in 0..16 {
            let low = values::lane(rng, self.style);
            let high = values::lane(rng, self.style);
            self.state.set_xmm(n, u128::from(high) << 64 | u128::from(low));
        }
        if rng.chance(20) {
            // Equal operands: comparisons, differences of zero.
            let v = self.state.xmm(rng.below(16) as usize);
            self.state.set_xmm(rng.below(16) as usize, v);
        }
        let mut mxcsr = 0x1f80;
        if rng.chance(50) {
            mxcsr |= (rng.bits() as u32 & 3) << 13;
        }
        if rng.chance(25) {
            mxcsr |= rng.bits() as u32 & 0x8040;
        }
        if rng.chance(15) {
            mxcsr &= !0x1f80 | rng.bits() as u32;
        }
        if rng.chance(20) {
            mxcsr |= rng.bits() as u32 & 0x3f;
        }
        self.state.set_mxcsr(mxcsr);
    }

    fn fill_x87(&mut self) {
        let rng = &mut *self.rng;
        for n in 0..8 {
            let (mantissa, sign_exp) = if self.style == Style::Float80 || rng.chance(50) {
                values::float80(rng)
            } else {
                (values::lane(rng, self.style), 0xffff)
            };
            self.state.set_st(n, mantissa, sign_exp);
        }
        let mut fcw = 0x37f;
        if rng.chance(50) {
            fcw = fcw & !0xf00 | rng.bits() as u16 & 0xf00;
        }
        if rng.chance(10) {
            fcw &= !0x3f | rng.bits() as u16;
        }
        let mut fsw = rng.bits() as u16 & 0x7f00;
        if rng.chance(30) {
            fsw |= rng.bits() as u16 & 0x7f;
        }
        if rng.chance(90) {
            // No exception pending.
            fsw &= !0x3f | fcw;
        }
        if fsw & !fcw & 0x3f != 0 {
            fsw |= 0x8080;
        }
        self.state.set_u16(fx::FCW, fcw);
        self.state.set_u16(fx::FSW, fsw);
        self.state.fx[fx::FTW] = if rng.chance(70) { 0xff } else { rng.bits() as u8 };
    }

    /// A linear address for `size` bytes of data: mostly good, sometimes across pages, read-only, absent or not canonical.
    fn target(&mut self, size: u64) -> u64 {
        let rng = &mut *self.rng;
        let size = size.max(1);
        let near = |rng: &mut Rng, edge: u64| edge - 1 - rng.below(size + 2).min(edge);
        match rng.below(40) {
            0 | 1 => near(rng, DATA + 0x1000),
            2 => near(rng, READ_ONLY),
            3 => READ_ONLY + rng.below(0x800),
            4 => near(rng, DATA_END),
            5 => near(rng, DATA),
            6 => DATA_END + 0x1000 + rng.below(0x1000),
            7 if self.bits == 64 => {
                rng.pick(&[0x8000_0000_0000, 0x7fff_ffff_ffff, 0xffff_7fff_ffff_ffff, u64::MAX, 0x1234_5678_9abc_def0])
            }
            8..=16 => DATA + 0x100 + rng.below(0xc00),
            _ => DATA + 0x100 + (rng.below(0xc00) & !15),
        }
    }

    /// Registers, displacements and memory so that the operands are at targets of our choice.
    fn operands(&mut self) -> Option<()> {
        let insn = self.insn();
        self.counts(&insn);
        self.branches(&insn)?;
        let mut factory = InstructionInfoFactory::new();
        if insn.is_stack_instruction() {
            let t = self.target(8);
            self.state.gpr[4] = if self.rng.chance(70) { t & !7 } else { t };
            if matches!(insn.mnemonic(), Mnemonic::Leave | Mnemonic::Enter) {
                self.state.gpr[5] = self.target(8);
            }
        }
        for op in 0..insn.op_count() {
            let size = insn.memory_size().size() as u64;
            match insn.op_kind(op) {
                OpKind::Memory => self.memory(size)?,
                OpKind::MemorySegSI | OpKind::MemorySegESI | OpKind::MemorySegRSI => self.pointer(6, size, insn.segment_prefix()),
                OpKind::MemoryESDI | OpKind::MemoryESEDI | OpKind::MemoryESRDI => self.pointer(7, size, Register::None),
                OpKind::MemorySegDI | OpKind::MemorySegEDI | OpKind::MemorySegRDI => self.pointer(7, size, insn.segment_prefix()),
                _ => {}
            }
        }
        if matches!(insn.mnemonic(), Mnemonic::Xlatb) {
            self.pointer(3, 256, insn.segment_prefix());
            self.state.gpr[3] = self.state.gpr[3].wrapping_sub(self.state.gpr[0] & 0xff);
        }
        let far = matches!(insn.mnemonic(), Mnemonic::Jmp | Mnemonic::Call) && insn.op0_kind() == OpKind::Memory;
        if far && self.state.gpr[4] >> 32 != 0 {
            // 32-bit code pushes with the narrower stack as soon as a far call has reached it; here only after that.
            return None;
        }
        self.selectors();
        // Good contents wherever the instruction reads.
        let insn = self.insn();
        let framed = matches!(insn.mnemonic(), Mnemonic::Retf | Mnemonic::Iret | Mnemonic::Iretd | Mnemonic::Iretq)
            || insn.mnemonic() == Mnemonic::Pop && insn.op0_register().is_segment_register();
        for used in factory.info(&insn).used_memory() {
            if framed {
                break;
            }
            if matches!(used.access(), OpAccess::Write | OpAccess::NoMemAccess | OpAccess::None) {
                continue;
            }
            let Some(at) = used.virtual_address(0, |r, _, _| Some(self.value(r))) else { continue };
            self.contents(&insn, at, used.memory_size().size());
        }
        Some(())
    }

    /// Selectors and far pointers in registers, immediates and on the stack; numbers of software interrupts.
    fn selectors(&mut self) {
        let insn = self.insn();
        if takes_selector(&insn) {
            for op in 0..insn.op_count() {
                if insn.op_kind(op) == OpKind::Register && insn.op_register(op).is_gpr() {
                    let garbage = self.rng.bits() << 16;
                    *self.gpr(insn.op_register(op)) = garbage | u64::from(self.rng.pick(&SELECTORS));
                }
            }
        }
        let frame = match insn.mnemonic() {
            Mnemonic::Pop if insn.op0_register().is_segment_register() => vec![u64::from(self.rng.pick(&SELECTORS))],
            Mnemonic::Retf | Mnemonic::Iret | Mnemonic::Iretd | Mnemonic::Iretq => {
                let code =
                    u64::from(self.rng.pick(&[USER_CS64, USER_CS64, USER_CS32, USER_CS32, self.rng.clone().pick(&SELECTORS)]));
                let stack = u64::from(self.rng.pick(&[USER_DS, USER_DS, USER_DS, self.rng.clone().pick(&SELECTORS)]));
                let flags = 2 | self.rng.bits() & (CF_TO_OF | IF | DF | if self.rng.chance(5) { 0x25_7100 } else { 0 });
                vec![landing(self.rng), code, flags, DATA + 0x900, stack]
            }
            Mnemonic::Int => {
                let vector = self.rng.bits() as u8;
                // Not Linux's 32-bit system calls.
                self.form.bytes[self.form.offsets.immediate_offset()] = if vector == 0x80 { 3 } else { vector };
                let _ = self.redecode();
                return;
            }
            _ => return,
        };
        let width = match insn.code().op_code().operand_size() {
            16 => 2,
            64 => 8,
            32 => 4,
            _ if self.bits == 64 && insn.mnemonic() == Mnemonic::Pop => 8,
            _ => insn.stack_pointer_increment().unsigned_abs() as usize,
        };
        let mut at = self.state.gpr[4].wrapping_sub(DATA);
        for v in frame {
            for b in &v.to_le_bytes()[..width.clamp(2, 8)] {
                if at < DATA_LEN as u64 {
                    self.data[at as usize] = *b;
                }
                at = at.wrapping_add(1);
            }
        }
    }

    fn value(&self, r: Register) -> u64 {
        match r {
            Register::FS => self.state.fs_base,
            Register::GS => self.state.gs_base,
            Register::ES | Register::CS | Register::SS | Register::DS => 0,
            _ if r.is_gpr64() => self.state.gpr[r.number()],
            _ if r.is_gpr32() => self.state.gpr[r.number()] & 0xffff_ffff,
            _ if r.is_gpr16() => self.state.gpr[r.number()] & 0xffff,
            Register::AL => self.state.gpr[0] & 0xff,
            _ => 0,
        }
    }

    /// Fills what is read at `at`, as far as it is data of ours.
    fn contents(&mut self, insn: &Instruction, at: u64, size: usize) {
        let mut bytes = Vec::with_capacity(size + 16);
        while bytes.len() < size.max(8) {
            if self.style == Style::Float80 && size == 10 {
                let (m, e) = values::float80(self.rng);
                bytes.extend(m.to_le_bytes());
                bytes.extend(e.to_le_bytes());
            } else {
                bytes.extend(values::lane(self.rng, self.style).to_le_bytes());
            }
        }
        if matches!(insn.flow_control(), FlowControl::IndirectBranch | FlowControl::IndirectCall | FlowControl::Return)
            && self.rng.chance(80)
        {
            bytes[..8].copy_from_slice(&landing(self.rng).to_le_bytes());
        }
        let far = matches!(
            insn.code(),
            Code::Jmp_m1616 | Code::Jmp_m1632 | Code::Jmp_m1664 | Code::Call_m1616 | Code::Call_m1632 | Code::Call_m1664
        );
        if far || matches!(insn.mnemonic(), Mnemonic::Lss | Mnemonic::Lfs | Mnemonic::Lgs | Mnemonic::Lds | Mnemonic::Les) {
            if far {
                bytes[..8].copy_from_slice(&landing(self.rng).to_le_bytes());
            }
            let selector = self.rng.pick(&SELECTORS);
            bytes[size - 2..size].copy_from_slice(&selector.to_le_bytes());
        }
        if size == 2 && takes_selector(insn) {
            bytes[..2].copy_from_slice(&self.rng.pick(&SELECTORS).to_le_bytes());
        }
        match insn.mnemonic() {
            Mnemonic::Fxrstor | Mnemonic::Fxrstor64 => {
                bytes[24..28].copy_from_slice(&0x1f80u32.to_le_bytes());
                if self.rng.chance(5) {
                    bytes[27] = 1;
                }
            }
            Mnemonic::Ldmxcsr if self.rng.chance(90) => bytes[2..4].fill(0),
            Mnemonic::Popf | Mnemonic::Popfd | Mnemonic::Popfq if self.rng.chance(90) => bytes[1] &= !1,
            Mnemonic::Cmpxchg8b | Mnemonic::Cmpxchg16b if self.rng.chance(50) => {
                let half = size / 2;
                let (a, d) = (self.state.gpr[0].to_le_bytes(), self.state.gpr[2].to_le_bytes());
                bytes[..half].copy_from_slice(&a[..half]);
                bytes[half..size].copy_from_slice(&d[..half]);
            }
            Mnemonic::Cmpxchg if self.rng.chance(50) => bytes[..8].copy_from_slice(&self.state.gpr[0].to_le_bytes()),
            _ => {}
        }
        for (i, b) in bytes[..size].iter().enumerate() {
            let offset = at.wrapping_add(i as u64).wrapping_sub(DATA);
            if offset < DATA_LEN as u64 {
                self.data[offset as usize] = *b;
            }
        }
    }

    /// Implicit counts: shift counts, REP counts, bit offsets.
    fn counts(&mut self, insn: &Instruction) {
        if insn.has_rep_prefix() || insn.has_repne_prefix() || insn.is_string_instruction() {
            let high = if self.bits == 64 && insn.op_kind(0) == OpKind::MemoryESEDI { self.rng.bits() << 32 } else { 0 };
            self.state.gpr[1] = match self.rng.below(10) {
                0 => 0,
                1 => self.rng.below(0x400),
                _ => self.rng.below(20),
            } | high;
        } else if self.rng.chance(50) {
            self.state.gpr[1] = self.state.gpr[1] & !0xff | self.rng.below(70);
        }
        if matches!(insn.mnemonic(), Mnemonic::Div | Mnemonic::Idiv) && self.rng.chance(70) {
            self.state.gpr[2] = if self.rng.chance(50) { self.rng.below(20) } else { ((self.state.gpr[0] as i64) >> 63) as u64 };
            if insn.op0_kind() == OpKind::Register && insn.op0_register().size() == 1 {
                self.state.gpr[0] &= 0xfff;
            } else if self.rng.chance(30) {
                self.state.gpr[2] = ((self.state.gpr[0] as u32 as i32) >> 31) as u64;
            }
        }
        let bits = matches!(insn.mnemonic(), Mnemonic::Bt | Mnemonic::Bts | Mnemonic::Btr | Mnemonic::Btc);
        if bits && insn.op0_kind() == OpKind::Memory && insn.op1_kind() == OpKind::Register && self.rng.chance(90) {
            let offset = self.rng.below(0x800).wrapping_sub(0x400);
            *self.gpr(insn.op1_register()) = offset;
        }
    }

    /// Near branch targets: INT3s of ours, or nowhere; never into the instruction itself.
    fn branches(&mut self, insn: &Instruction) -> Option<()> {
        let offsets = self.form.offsets;
        if insn.is_jcc_short_or_near()
            || insn.is_jmp_short_or_near()
            || insn.is_call_near()
            || insn.is_loop()
            || insn.is_loopcc()
            || insn.is_jcx_short()
        {
            let at = offsets.immediate_offset();
            if offsets.immediate_size() == 4 && self.rng.chance(80) {
                let relative = landing(self.rng).wrapping_sub(insn.next_ip()) as u32;
                self.form.bytes[at..at + 4].copy_from_slice(&relative.to_le_bytes());
                self.redecode()?;
            }
            let target = self.insn().near_branch_target();
            // Nor into a prelude: its middle may be an instruction that the profile does not have.
            if target >= insn.ip() - 0x60 && target < insn.next_ip() {
                return None;
            }
        } else if matches!(insn.flow_control(), FlowControl::IndirectBranch | FlowControl::IndirectCall)
            && insn.op0_kind() == OpKind::Register
        {
            let target = if self.rng.chance(80) { landing(self.rng) } else { values::integer(self.rng) };
            *self.gpr(insn.op0_register()) = target;
        }
        Some(())
    }

    /// Instructions on registers alone that leave alone what addresses the main instruction's memory.
    fn prelude(&mut self, most: u64) -> Vec<u8> {
        let mut factory = InstructionInfoFactory::new();
        let mut keep = vec![Register::RSP];
        for used in factory.info(&self.form.insn).used_memory() {
            keep.extend([used.base().full_register(), used.index().full_register()]);
        }
        keep.extend([Register::RSI, Register::RDI, Register::RBP]);
        let mut bytes = Vec::new();
        for _ in 0..self.rng.below(most + 1) {
            let code = self.rng.pick(&PRELUDE);
            let Some(form) = forms::random(self.rng, code, self.bits, CODE) else { continue };
            let info = factory.info(&form.insn);
            let writes = |a| !matches!(a, OpAccess::Read | OpAccess::CondRead | OpAccess::NoMemAccess | OpAccess::None);
            let harmful =
                info.used_registers().iter().any(|u| writes(u.access()) && keep.contains(&u.register().full_register()));
            if info.used_memory().is_empty() && !harmful && !form.insn.has_lock_prefix() {
                bytes.extend(form.bytes);
            }
        }
        bytes
    }

    fn redecode(&mut self) -> Option<()> {
        let code = self.form.insn.code();
        self.form = forms::decode(&self.form.bytes, self.bits, self.form.insn.ip())?;
        (self.form.insn.code() == code).then_some(())
    }

    /// Segment base for reaching `target` through `segment`, given what address size can express.
    fn base_for(&mut self, segment: Register, target: u64, narrow: bool) -> u64 {
        let base = match segment {
            Register::FS => &mut self.state.fs_base,
            Register::GS => &mut self.state.gs_base,
            _ => return 0,
        };
        if narrow && self.bits == 64 {
            *base = self.rng.pick(&[0, 0x1000, 0x1234_5678]).min(target & 0xffff_ffff);
        }
        *base
    }

    fn pointer(&mut self, gpr: usize, size: u64, segment: Register) {
        let factor = if self.rng.chance(50) { 1 } else { 8 };
        let target = self.target(size.max(1) * factor);
        let insn = self.insn();
        let narrow = (0..insn.op_count())
            .any(|i| matches!(insn.op_kind(i), OpKind::MemorySegESI | OpKind::MemoryESEDI | OpKind::MemorySegEDI));
        let base = self.base_for(segment, target, narrow);
        let mut v = target.wrapping_sub(base);
        if narrow && self.bits == 64 {
            v = v & 0xffff_ffff | self.rng.bits() << 32;
        }
        self.state.gpr[gpr] = v;
    }

    fn memory(&mut self, size: u64) -> Option<()> {
        let insn = self.insn();
        let target = self.target(size.max(1));
        let narrow = [insn.memory_base(), insn.memory_index()].iter().any(|r| r.is_gpr32() || r.is_gpr16())
            || insn.memory_base() == Register::EIP
            || insn.memory_base() == Register::None;
        let base = self.base_for(insn.memory_segment(), target, narrow);
        let want = target.wrapping_sub(base);
        let (b, x, scale) = (insn.memory_base(), insn.memory_index(), u64::from(insn.memory_index_scale()));
        if insn.is_ip_rel_memory_operand() {
            return self.displace(want.wrapping_sub(insn.next_ip()));
        }
        if b == Register::None && x == Register::None {
            return self.displace(want);
        }
        let disp = insn.memory_displacement64();
        let mask = if narrow && self.bits == 64 { 0xffff_ffff } else { u64::MAX };
        let garbage = if mask == u64::MAX { 0 } else { self.rng.bits() << 32 };
        let mask = if self.bits == 32 { 0xffff_ffff } else { mask };
        let keep = |v: u64| v & mask | garbage;
        if x == Register::None {
            *self.gpr(b) = keep(want.wrapping_sub(disp));
        } else if b == Register::None {
            *self.gpr(x) = keep((want.wrapping_sub(disp) & mask) / scale);
        } else if b.full_register() == x.full_register() {
            *self.gpr(b) = keep((want.wrapping_sub(disp) & mask) / (scale + 1));
        } else {
            if self.rng.chance(50) {
                *self.gpr(x) = self.rng.below(64);
            }
            let part = (*self.gpr(x)).wrapping_mul(scale);
            *self.gpr(b) = keep(want.wrapping_sub(disp).wrapping_sub(part));
        }
        Some(())
    }

    /// Writes the displacement, as far as it has room.
    fn displace(&mut self, to: u64) -> Option<()> {
        let (at, size) = (self.form.offsets.displacement_offset(), self.form.offsets.displacement_size());
        self.form.bytes[at..at + size].copy_from_slice(&to.to_le_bytes()[..size]);
        self.redecode()
    }
}

fn takes_selector(insn: &Instruction) -> bool {
    use Mnemonic as M;
    matches!(insn.mnemonic(), M::Lar | M::Lsl | M::Verr | M::Verw)
        || insn.mnemonic() == M::Mov && insn.op0_kind() == OpKind::Register && insn.op0_register().is_segment_register()
}

fn style(rng: &mut Rng, insn: &Instruction) -> Style {
    use MemorySize as M;
    let element = insn.op_code().memory_size().element_type();
    let name = format!("{:?}", insn.mnemonic());
    match element {
        M::Float32 => Style::Float32,
        M::Float64 => Style::Float64,
        M::Float80 | M::FpuEnv14 | M::FpuEnv28 | M::FpuState94 | M::FpuState108 | M::Fxsave_512Byte | M::Fxsave64_512Byte => {
            Style::Float80
        }
        M::Bcd => Style::Bcd,
        _ if name.starts_with("Pcmp") && name.contains("str") => Style::Text,
        _ if name.starts_with('F') => Style::Float80,
        _ if name.starts_with("Cvt") || name.contains("ss") && rng.chance(30) => Style::Float32,
        _ if rng.chance(10) => rng.pick(&[Style::Float32, Style::Float64]),
        _ => Style::Integer,
    }
}
