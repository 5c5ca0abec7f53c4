//! A thin emitter of x86-64: the few shapes that the templates' fixed parts consist of. Guest instructions themselves are
//! re-encoded by iced-x86.

/// Host register numbers.
pub const RAX: u8 = 0;
pub const RBP: u8 = 5;
pub const RDI: u8 = 7;
pub const R11: u8 = 11;

/// `[base + (index << shift) + disp]`; without a base the displacement is absolute.
#[derive(Debug, Clone, Copy)]
pub struct Mem {
    pub base: Option<u8>,
    pub index: Option<(u8, u8)>,
    pub disp: i32,
}

impl Mem {
    pub fn at(base: u8, disp: i32) -> Self {
        Self { base: Some(base), index: None, disp }
    }
    pub fn indexed(base: u8, index: u8, disp: i32) -> Self {
        Self { base: Some(base), index: Some((index, 0)), disp }
    }
}

/// Code under construction that will stand at `base`.
pub struct Asm {
    pub buf: Vec<u8>,
    base: u64,
}

impl Asm {
    pub fn new(base: u64) -> Self {
        Self { buf: Vec::with_capacity(2048), base }
    }

    pub fn here(&self) -> usize {
        self.buf.len()
    }

    pub fn bytes(&mut self, bytes: &[u8]) {
        self.buf.extend_from_slice(bytes);
    }

    pub fn imm32(&mut self, v: u32) {
        self.bytes(&v.to_le_bytes());
    }

    fn rex(&mut self, wide: bool, reg: u8, index: u8, base: u8) {
        let rex = 0x40 | u8::from(wide) << 3 | reg >> 3 << 2 | index >> 3 << 1 | base >> 3;
        if rex != 0x40 {
            self.buf.push(rex);
        }
    }

    /// `opcode reg, rm` with two registers.
    pub fn rr(&mut self, wide: bool, opcode: &[u8], reg: u8, rm: u8) {
        self.rex(wide, reg, 0, rm);
        self.bytes(opcode);
        self.buf.push(0xc0 | (reg & 7) << 3 | rm & 7);
    }

    /// `opcode reg, m`.
    pub fn rm(&mut self, wide: bool, opcode: &[u8], reg: u8, m: Mem) {
        self.rex(wide, reg, m.index.map_or(0, |i| i.0), m.base.unwrap_or(0));
        self.bytes(opcode);
        self.modrm(reg, m);
    }

    /// The bytes after an opcode: ModRM, SIB, displacement.
    pub fn modrm(&mut self, reg: u8, m: Mem) {
        let reg = (reg & 7) << 3;
        let Some(base) = m.base else {
            let sib = m.index.map_or(0x25, |(i, s)| s << 6 | (i & 7) << 3 | 5);
            self.bytes(&[reg | 4, sib]);
            return self.imm32(m.disp as u32);
        };
        let short = i8::try_from(m.disp).is_ok();
        let mode = if m.disp == 0 && base & 7 != 5 {
            0
        } else if short {
            0x40
        } else {
            0x80
        };
        match m.index {
            Some((index, shift)) => self.bytes(&[mode | reg | 4, shift << 6 | (index & 7) << 3 | base & 7]),
            None if base & 7 == 4 => self.bytes(&[mode | reg | 4, 0x24]),
            None => self.buf.push(mode | reg | base & 7),
        }
        match mode {
            0 => {}
            0x40 => self.buf.push(m.disp as u8),
            _ => self.imm32(m.disp as u32),
        }
    }

    pub fn mov(&mut self, to: u8, from: u8) {
        self.rr(true, &[0x8b], to, from);
    }
    pub fn load(&mut self, to: u8, m: Mem) {
        self.rm(true, &[0x8b], to, m);
    }
    pub fn store(&mut self, m: Mem, from: u8) {
        self.rm(true, &[0x89], from, m);
    }
    pub fn lea(&mut self, to: u8, m: Mem) {
        self.rm(true, &[0x8d], to, m);
    }
    /// `mov eax, imm32`.
    pub fn mov_eax(&mut self, v: u32) {
        self.buf.push(0xb8);
        self.imm32(v);
    }

    fn rel32(&mut self, target: u64) {
        let next = self.base + self.here() as u64 + 4;
        self.imm32(target.wrapping_sub(next) as u32);
    }
    /// To an address outside.
    pub fn jmp(&mut self, target: u64) {
        self.buf.push(0xe9);
        self.rel32(target);
    }
    pub fn call(&mut self, target: u64) {
        self.buf.push(0xe8);
        self.rel32(target);
    }
    /// To a place inside that is not known yet; gives where the distance stands, for [`Asm::land`].
    pub fn jmp_forward(&mut self) -> usize {
        self.buf.push(0xe9);
        self.imm32(0);
        self.here() - 4
    }
    pub fn jcc_forward(&mut self, condition: u8) -> usize {
        self.bytes(&[0x0f, 0x80 | condition]);
        self.imm32(0);
        self.here() - 4
    }
    /// Makes the jump whose distance stands at `at` lead here.
    pub fn land(&mut self, at: usize) {
        let to = self.here();
        self.aim(at, to);
    }
    pub fn aim(&mut self, at: usize, to: usize) {
        let distance = (to as i64 - (at as i64 + 4)) as i32;
        self.buf[at..at + 4].copy_from_slice(&distance.to_le_bytes());
    }
    pub fn jmp_back(&mut self, to: usize) {
        let at = self.jmp_forward();
        self.aim(at, to);
    }
}
