//! Random programs: runs of instructions joined by every kind of jump, whose operands mostly point at something.

use iced_x86::{
    Code, CpuidFeature, Encoder, FlowControl, Instruction, InstructionInfoFactory, Mnemonic, OpAccess, OpCodeOperandKind, OpKind,
    Register,
};

use super::world::{
    self, ALIAS, APIC, CODE, CODE_LEN, DATA, DEVICE, FRESH, Frame, HOLE, JUMP_TABLE, LARGE, LAST, NOBODY, READ_ONLY,
};
use super::world::{Focus, STACK, SUPERVISOR};
use crate::forms;
use crate::rng::Rng;

const GPR: [Register; 16] = [
    Register::RAX,
    Register::RCX,
    Register::RDX,
    Register::RBX,
    Register::RSP,
    Register::RBP,
    Register::RSI,
    Register::RDI,
    Register::R8,
    Register::R9,
    Register::R10,
    Register::R11,
    Register::R12,
    Register::R13,
    Register::R14,
    Register::R15,
];

/// Where an instruction's bytes name another one.
#[derive(Debug, Clone, Copy)]
pub(super) enum Fix {
    /// Distance of 1 or 4 bytes at the end, to any instruction.
    Relative(usize),
    /// Address of 8 bytes at the end, of any instruction.
    Absolute,
    /// Address without base, less `less`, of the instruction `items` further on; four bytes at `offset`.
    After { items: usize, offset: usize, less: u64 },
}

/// One instruction.
#[derive(Debug, Clone)]
pub struct Item {
    pub bytes: Vec<u8>,
    /// And which instruction, as a fraction of all.
    fix: Option<(Fix, u64)>,
    /// Bytes left free before it; none is executed.
    gap: u64,
    /// What kind of code it is.
    pub bits: u32,
    /// Address without base.
    pub at: u64,
}

impl Item {
    /// One that stays as and where it is.
    pub fn fixed(bytes: &[u8], at: u64) -> Self {
        Self { bytes: bytes.to_vec(), fix: None, gap: 0, bits: 64, at }
    }
}

/// Instructions by kind.
pub struct Pools {
    common: Vec<Code>,
    integer: Vec<Code>,
    string: Vec<Code>,
    sse: Vec<Code>,
    pub(super) x87: Vec<Code>,
    rest: Vec<Code>,
    /// For 16- and 32-bit code: what stays where it is.
    pub(super) legacy: Vec<Code>,
}

/// What compilers emit most.
fn common(code: Code) -> bool {
    use Mnemonic as M;
    matches!(
        code.mnemonic(),
        M::Mov
            | M::Movzx
            | M::Movsx
            | M::Movsxd
            | M::Lea
            | M::Add
            | M::Sub
            | M::And
            | M::Or
            | M::Xor
            | M::Cmp
            | M::Test
            | M::Inc
            | M::Dec
            | M::Shl
            | M::Shr
            | M::Sar
            | M::Push
            | M::Pop
            | M::Imul
            | M::Neg
            | M::Not
            | M::Adc
            | M::Sbb
            | M::Xchg
            | M::Cmove
            | M::Cmovb
            | M::Sete
            | M::Setl
    ) && !segmented(code)
}

fn segmented(code: Code) -> bool {
    let name = format!("{code:?}");
    ["_Sreg", "Sreg_", "_cr", "_dr", "_tr", "w_ES", "w_CS", "w_SS", "w_DS", "_FS", "_GS", "_DS", "_ES", "_SS"]
        .iter()
        .any(|part| name.contains(part))
}

fn is_string(code: Code) -> bool {
    use OpCodeOperandKind as K;
    code.op_code().op_kinds().iter().any(|k| matches!(k, K::seg_rSI | K::es_rDI | K::seg_rDI))
}

impl Pools {
    pub fn new() -> Self {
        let mut pools =
            Self { common: vec![], integer: vec![], string: vec![], sse: vec![], x87: vec![], rest: vec![], legacy: vec![] };
        pools.legacy = forms::all(32)
            .into_iter()
            .filter(|c| c.flow_control() == FlowControl::Next && !c.is_privileged() && !segmented(*c) && !is_string(*c))
            .collect();
        let system = Code::values().filter(|c| {
            use Mnemonic as M;
            let wanted = matches!(
                c.mnemonic(),
                M::Syscall
                    | M::Sysret
                    | M::Sysretq
                    | M::Cpuid
                    | M::Sgdt
                    | M::Sidt
                    | M::Sldt
                    | M::Str
                    | M::Smsw
                    | M::Swapgs
                    | M::Clts
                    | M::Invlpg
                    | M::Rdtsc
                    | M::Rdtscp
            );
            wanted && c.op_code().is_available_in_mode(64)
        });
        for code in forms::all(64).into_iter().chain(system) {
            let features = code.cpuid_features();
            let is = |wanted: &[CpuidFeature]| features.iter().any(|f| wanted.contains(f));
            use CpuidFeature as F;
            let plain = code.flow_control() == FlowControl::Next && !code.is_privileged() && !segmented(code);
            let pool = if is(&[F::SSE, F::SSE2, F::SSE3, F::SSSE3, F::SSE4_1, F::SSE4_2, F::FXSR]) {
                &mut pools.sse
            } else if is(&[F::FPU, F::FPU287, F::FPU387, F::MMX]) {
                &mut pools.x87
            } else if is_string(code) {
                &mut pools.string
            } else if plain && common(code) {
                &mut pools.common
            } else if plain {
                &mut pools.integer
            } else {
                &mut pools.rest
            };
            pool.push(code);
        }
        pools
    }
}

impl Default for Pools {
    fn default() -> Self {
        Self::new()
    }
}

/// An address with base for `size` bytes: mostly good.
pub fn target(rng: &mut Rng, frame: Frame, size: u64) -> u64 {
    let aligned = |rng: &mut Rng, base: u64| base + (rng.below(0xf00) & !15);
    let near = |rng: &mut Rng, edge: u64| edge - 1 - rng.below(size + 2);
    if frame.focus == Focus::Edges && rng.chance(60) {
        let edges = [
            DATA + 0x1000,
            DATA + 0x1000,
            READ_ONLY,
            SUPERVISOR,
            HOLE,
            FRESH,
            FRESH + 0x1000,
            STACK + 0x1000,
            LAST,
            CODE + 0x1000,
        ];
        return frame.base + near(rng, rng.clone().pick(&edges));
    }
    let address = match rng.below(100) {
        0..=41 => aligned(rng, DATA),
        42..=51 => aligned(rng, DATA + 0x1000),
        52..=61 => DATA + rng.below(0x1f00),
        62..=67 => near(rng, DATA + 0x1000),
        68..=70 => near(rng, READ_ONLY),
        71..=72 => aligned(rng, READ_ONLY),
        73 => near(rng, HOLE),
        74 => aligned(rng, HOLE),
        75 => aligned(rng, SUPERVISOR),
        76..=78 => aligned(rng, FRESH),
        79 => return rng.pick(&[0x8000_0000_0000, 0x7fff_ffff_ffff, 0xffff_7fff_ffff_ffff, u64::MAX, 0x1234_5678_9abc_def0]),
        80..=85 => CODE + rng.below(0x300),
        86 => near(rng, CODE + 0x1000),
        87..=88 => ALIAS + rng.below(0x300),
        89..=90 => DEVICE + rng.below(0x40),
        91 => near(rng, DEVICE),
        92 => near(rng, NOBODY),
        93 => near(rng, LAST),
        94 => LAST + rng.below(0xff0),
        95..=96 => LARGE + world::physical(DATA) + rng.below(0x800),
        97 => LARGE + CODE + rng.below(0x300),
        98 if rng.chance(30) => APIC + rng.pick(&[0x20, 0x80, 0xb0, 0xf0, 0x300, 0x310, 0x320]),
        _ => STACK + rng.below(0x2000),
    };
    address + frame.base
}

/// Makes programs for one case.
pub struct Author<'a> {
    pub(super) rng: &'a mut Rng,
    pub(super) pools: &'a Pools,
    pub(super) frame: Frame,
    /// Registers that hold addresses and are seldom written.
    pinned: Vec<usize>,
    items: Vec<Item>,
    gap: u64,
    /// What kind of code is being written.
    pub(super) bits: u32,
    factory: InstructionInfoFactory,
    /// Percentages of the pools: common, integer, SSE, x87, strings; the rest is the rest.
    weights: [u64; 5],
}

impl<'a> Author<'a> {
    pub fn new(rng: &'a mut Rng, pools: &'a Pools, frame: Frame) -> Self {
        let mut pinned = vec![4];
        while pinned.len() < 4 {
            let r = rng.below(16) as usize;
            if !pinned.contains(&r) && r != 1 {
                pinned.push(r);
            }
        }
        let weights = if frame.focus == Focus::Floats {
            rng.pick(&[[10, 5, 5, 78, 1], [15, 5, 38, 40, 1], [5, 5, 0, 90, 0]])
        } else {
            rng.pick(&[[55, 25, 10, 4, 4], [80, 15, 2, 0, 2], [35, 15, 45, 2, 1], [30, 15, 5, 45, 2], [40, 20, 5, 5, 20]])
        };
        Self { rng, pools, frame, pinned, items: Vec::new(), gap: 0, bits: 64, factory: InstructionInfoFactory::new(), weights }
    }

    /// The program, placed; and the values of the pinned registers.
    pub fn write(mut self, length: u64) -> (Vec<Item>, Vec<(usize, u64)>) {
        while (self.items.len() as u64) < length {
            let special = if self.frame.focus == Focus::None { 1 } else { 22 };
            match self.rng.below(100) {
                n if n < special => self.gadget(),
                n if n < 84 => self.work(),
                _ => self.flow(),
            }
        }
        self.emit(&[0xe9, 0, 0, 0, 0], Some(Fix::Relative(4)));
        let pinned = self.pinned.clone();
        let values = pinned.into_iter().filter(|&r| r != 4).map(|r| (r, self.target(16))).collect();
        self.place();
        (self.items, values)
    }

    pub(super) fn emit(&mut self, bytes: &[u8], fix: Option<Fix>) {
        let fix = fix.map(|f| (f, self.rng.bits()));
        let gap = std::mem::take(&mut self.gap);
        self.items.push(Item { bytes: bytes.to_vec(), fix, gap, bits: self.bits, at: 0 });
    }

    /// See [`target`].
    pub(super) fn target(&mut self, size: u64) -> u64 {
        target(self.rng, self.frame, size)
    }

    pub(super) fn set_register(&mut self, r: usize, v: u64) {
        let low = (r & 7) as u8;
        match u32::try_from(v) {
            Ok(v) => {
                let mut bytes = if r > 7 { vec![0x41] } else { vec![] };
                bytes.push(0xb8 | low);
                bytes.extend(v.to_le_bytes());
                self.emit(&bytes, None);
            }
            Err(_) => {
                let mut bytes = vec![0x48 | u8::from(r > 7), 0xb8 | low];
                bytes.extend(v.to_le_bytes());
                self.emit(&bytes, None);
            }
        }
    }

    /// An instruction that is not there to jump.
    pub(super) fn work(&mut self) {
        let n = self.rng.below(100);
        let w = self.weights;
        let pools = self.pools;
        let mut sum = 0;
        let pick = [&pools.common, &pools.integer, &pools.sse, &pools.x87, &pools.string]
            .into_iter()
            .zip(w)
            .find(|(_, w)| {
                sum += w;
                n < sum
            })
            .map_or(&pools.rest, |(pool, _)| pool);
        let code = self.rng.pick(pick);
        let Some(form) = forms::random(self.rng, code, 64, 0) else { return };
        let insn = form.insn;
        if insn.is_privileged() && self.frame.cpl == 0 && !self.harmless(&insn) && self.rng.chance(97) {
            return;
        }
        if self.spoils(&insn) {
            return;
        }
        if insn.is_string_instruction() || matches!(insn.mnemonic(), Mnemonic::Maskmovq | Mnemonic::Maskmovdqu) {
            return self.string(&insn, &form.bytes);
        }
        let memory = (0..insn.op_count()).any(|n| insn.op_kind(n) == OpKind::Memory);
        if memory && self.rng.chance(92) {
            if let Some(bytes) = self.aimed(insn) {
                return self.emit(&bytes, None);
            }
        }
        if matches!(insn.mnemonic(), Mnemonic::Div | Mnemonic::Idiv) && self.rng.chance(60) {
            self.set_register(2, 0);
        }
        self.emit(&form.bytes, None);
    }

    fn harmless(&self, insn: &Instruction) -> bool {
        use Mnemonic as M;
        matches!(insn.mnemonic(), M::Clts | M::Invlpg | M::Swapgs | M::Cli | M::Sti | M::Rdmsr)
            || insn.mnemonic() == M::Mov && (insn.op1_register().is_cr() || insn.op1_register().is_dr())
    }

    /// Whether it writes a register that should keep its address.
    fn spoils(&mut self, insn: &Instruction) -> bool {
        if insn.is_stack_instruction() {
            return false;
        }
        let writes = |a| !matches!(a, OpAccess::Read | OpAccess::CondRead | OpAccess::NoMemAccess | OpAccess::None);
        let pinned = &self.pinned;
        let hit = self
            .factory
            .info(insn)
            .used_registers()
            .iter()
            .any(|u| writes(u.access()) && pinned.iter().any(|&r| GPR[r] == u.register().full_register()));
        hit && self.rng.chance(93)
    }

    fn string(&mut self, insn: &Instruction, bytes: &[u8]) {
        let size = insn.memory_size().size() as u64;
        let size = size.max(1) * if self.rng.chance(50) { 8 } else { 1 };
        if self.rng.chance(85) {
            let v = self.target(size);
            self.set_register(7, v);
        }
        if self.rng.chance(70) {
            let v = self.target(size);
            self.set_register(6, v);
        }
        if self.rng.chance(85) {
            let v = if self.rng.chance(90) { self.rng.below(24) } else { self.rng.below(0x900) };
            self.set_register(1, v);
        }
        self.emit(bytes, None);
    }

    /// The same instruction with another address.
    fn aimed(&mut self, mut insn: Instruction) -> Option<Vec<u8>> {
        let size = insn.memory_size().size() as u64;
        insn.set_memory_index(Register::None);
        insn.set_memory_index_scale(1);
        let segment = insn.segment_prefix();
        if self.rng.chance(80) {
            insn.set_segment_prefix(Register::None);
        }
        let _ = segment;
        match self.rng.below(10) {
            0 | 1 => {
                insn.set_memory_base(Register::RIP);
                insn.set_memory_displacement64(self.near_target(size));
                insn.set_memory_displ_size(8);
            }
            2 if self.frame.base != 0xffff_8000_0000_0000 => {
                insn.set_memory_base(Register::None);
                insn.set_memory_displacement64(self.near_target(size));
                insn.set_memory_displ_size(8);
            }
            3 | 4 => {
                let r = self.rng.below(16) as usize;
                if r == 4 || self.pinned.contains(&r) {
                    return None;
                }
                let v = self.target(size);
                let (index, scale) = (self.rng.below(16) as usize, 1 << self.rng.below(4));
                if index != 4 && index != r && self.rng.chance(50) {
                    let count = self.rng.below(8);
                    self.set_register(index, count);
                    insn.set_memory_index(GPR[index]);
                    insn.set_memory_index_scale(scale);
                }
                self.set_register(r, v);
                insn.set_memory_base(GPR[r]);
                insn.set_memory_displacement64(0);
                insn.set_memory_displ_size(0);
            }
            _ => {
                let r = self.rng.pick(&self.pinned);
                let displacement =
                    if self.rng.chance(50) { self.rng.below(8) * 16 } else { self.rng.below(0x100).wrapping_sub(0x80) };
                insn.set_memory_base(GPR[r]);
                insn.set_memory_displacement64(displacement);
                insn.set_memory_displ_size(if self.rng.chance(70) { 1 } else { 8 });
            }
        }
        // RIP-relative operands are moved when the program is placed: the encoder needs the address then.
        let mut encoder = Encoder::new(64);
        encoder.encode(&insn, self.frame.base.wrapping_add(CODE)).ok()?;
        Some(encoder.take_buffer())
    }

    /// As `target`, within 2 GiB of the code.
    fn near_target(&mut self, size: u64) -> u64 {
        loop {
            let t = self.target(size);
            if t.wrapping_sub(self.frame.base) < 0x40_0000 {
                return t;
            }
        }
    }

    /// Instructions that lead elsewhere.
    fn flow(&mut self) {
        let near = Some(Fix::Relative(4));
        let short = Some(Fix::Relative(1));
        match self.rng.below(30) {
            0..=7 => {
                let condition = self.rng.below(16) as u8;
                self.emit(&[0x0f, 0x80 | condition, 0, 0, 0, 0], near);
            }
            8..=12 => {
                let condition = self.rng.below(16) as u8;
                self.emit(&[0x70 | condition, 0], short);
            }
            13 => self.emit(&[0xeb, 0], short),
            14 => {
                self.emit(&[0xe9, 0, 0, 0, 0], near);
                self.part();
            }
            15 | 16 => self.emit(&[0xe8, 0, 0, 0, 0], near),
            17 | 18 => {
                let op = 0xe0 | self.rng.below(4) as u8;
                if op == 0xe2 && self.rng.chance(70) {
                    let n = 1 + self.rng.below(30);
                    self.set_register(1, n);
                    self.work();
                }
                self.emit(&[op, 0], short);
            }
            19 | 20 => self.indirect(),
            21 => {
                // Through memory: jmp or call qword [disp32].
                let at = self.frame.base + JUMP_TABLE + 8 * self.rng.below(32);
                let modrm = if self.rng.chance(50) { 0x20 } else { 0x10 };
                if i64::from(at as i32) as u64 == at {
                    let d = (at as u32).to_le_bytes();
                    self.emit(&[0xff, modrm | 4, 0x25, d[0], d[1], d[2], d[3]], None);
                }
            }
            22 => self.emit(&[0xc3], None),
            23 => {
                // Push a good address, come back to it.
                self.indirect_value(0);
                self.emit(&[0x50], None);
                let bytes: &[u8] = if self.rng.chance(80) { &[0xc3] } else { &[0xc2, 8, 0] };
                self.emit(bytes, None);
                self.part();
            }
            24 => {
                let bit = self.rng.pick(&[0, 2, 6, 7, 10, 10, 11, 14, 18, 8, 9, 16]);
                self.emit(&[0x9c], None);
                self.emit(&[0x0f, 0xba, 0x3c, 0x24, bit], None); // btc dword [rsp], bit
                self.emit(&[0x9d], None);
            }
            25 => {
                let v = self.rng.bits() as u8;
                self.emit(&[0xcd, v], None);
            }
            26 => self.emit(&[0x0f, 0x05], None),
            27 => {
                let bytes: &[u8] = self.rng.pick(&[&[0xcc][..], &[0x0f, 0x0b], &[0xf1], &[0xf3, 0x90]]);
                self.emit(bytes, None);
            }
            28 => {
                // A counted loop over some work.
                let n = 2 + self.rng.below(40);
                self.set_register(1, n);
                let first = self.items.len();
                for _ in 0..1 + self.rng.below(6) {
                    self.work();
                }
                let size: usize = self.items[first..].iter().map(|i| i.bytes.len()).sum();
                if size < 100 {
                    self.emit(&[0xe2, (-(size as i64) - 2) as u8], None);
                }
            }
            _ => self.modify(),
        }
    }

    pub(super) fn part(&mut self) {
        self.gap = match self.rng.below(10) {
            0..=4 => 0,
            5..=7 => 1 + self.rng.below(64),
            // To the end of the page: see `place`.
            _ => u64::MAX - self.rng.below(24),
        };
    }

    fn indirect_value(&mut self, r: usize) {
        let bytes = [0x48 | u8::from(r > 7), 0xb8 | (r & 7) as u8, 0, 0, 0, 0, 0, 0, 0, 0];
        self.emit(&bytes, Some(Fix::Absolute));
    }

    fn indirect(&mut self) {
        let r = self.rng.below(16) as usize;
        if r == 4 {
            return;
        }
        self.indirect_value(r);
        let call = if self.rng.chance(50) { 0xd0 } else { 0xe0 };
        let mut bytes = if r > 7 { vec![0x41] } else { vec![] };
        bytes.extend([0xff, call | (r & 7) as u8]);
        self.emit(&bytes, None);
        if call == 0xe0 {
            self.part();
        }
    }

    /// Changes code: an immediate or an opcode of an instruction somewhere in the program.
    fn modify(&mut self) {
        let r = self.rng.pick(&[0usize, 2, 3, 8, 9]);
        self.indirect_value(r);
        let offset = self.rng.below(8) as u8;
        let value = if self.rng.chance(50) { self.rng.below(0x40) as u8 } else { self.rng.bits() as u8 };
        let rex = 0x40 | u8::from(r > 7);
        self.emit(&[rex, 0xc6, 0x40 | (r & 7) as u8, offset, value], None); // mov byte [r + offset], value
    }

    /// Gives everything its address, and jumps their distances.
    fn place(&mut self) {
        let mut cursor = CODE + if self.rng.chance(50) { self.rng.below(0x400) } else { 0 };
        let mut last = 0;
        for item in &mut self.items {
            if item.gap > u64::MAX / 2 {
                let end = (cursor | 0xfff) + 1;
                cursor = cursor.max(end - (u64::MAX - item.gap));
            } else {
                cursor += item.gap;
            }
            item.at = cursor;
            cursor += item.bytes.len() as u64;
            if cursor + 0x20 > CODE + CODE_LEN {
                break;
            }
            last += 1;
        }
        self.items.truncate(last);
        let places: Vec<u64> = self.items.iter().map(|i| i.at).collect();
        for (n, item) in self.items.iter_mut().enumerate() {
            let len = item.bytes.len();
            let next = item.at + len as u64;
            if let Some((fix, which)) = item.fix {
                let pick = |of: &[u64]| of[((u128::from(which) * of.len() as u128) >> 64) as usize];
                match fix {
                    Fix::Relative(1) => {
                        let (from, to) = (next - 128, next + 127);
                        let first = places.partition_point(|&p| p < from);
                        let last = places.partition_point(|&p| p <= to);
                        item.bytes[len - 1] = pick(&places[first..last]).wrapping_sub(next) as u8;
                    }
                    Fix::Relative(_) => {
                        item.bytes[len - 4..].copy_from_slice(&(pick(&places).wrapping_sub(next) as u32).to_le_bytes());
                    }
                    Fix::Absolute => {
                        item.bytes[len - 8..].copy_from_slice(&(pick(&places) + self.frame.base).to_le_bytes());
                    }
                    Fix::After { items, offset, less } => {
                        let to = places.get(n + items).unwrap_or(&places[0]) - less;
                        item.bytes[offset..offset + 4].copy_from_slice(&(to as u32).to_le_bytes());
                    }
                }
            } else if let Some(form) = forms::decode(&item.bytes, item.bits, self.frame.base.wrapping_add(item.at)) {
                if form.insn.is_ip_rel_memory_operand() && form.offsets.displacement_size() == 4 {
                    // It was encoded as if it stood at the start.
                    let at = form.offsets.displacement_offset();
                    let old = u32::from_le_bytes(item.bytes[at..at + 4].try_into().expect("4 bytes"));
                    let new = old.wrapping_sub((item.at - CODE) as u32);
                    item.bytes[at..at + 4].copy_from_slice(&new.to_le_bytes());
                }
            }
        }
    }
}
