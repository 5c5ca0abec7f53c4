//! Short sequences for what single random instructions hardly ever do together: see [`Focus`].

use iced_x86::OpKind;

use super::program::{Author, Fix};
use super::routines::{FIRST_INTERRUPT, GATE_CHANGE, GATE_EXCURSION, GATE_HALT, GATE_SWITCH, GATE_TASK_SWITCHED, GATE_TOGGLE_IF};
use super::tables::ROOTS;
use super::world::{APIC, CODE, CONTROLS, DATA, DEVICE, ENVIRONMENTS, FP_IMAGES, FRESH, FX_IMAGES, Focus, Frame};
use super::world::{HOLE, KERNEL_CS, MXCSRS, NOBODY, READ_ONLY, SUPERVISOR, USER_CS64};
use crate::forms;

/// Registers that gadgets use for addresses; ModRM with any of them needs neither SIB nor displacement.
const PLAIN: [usize; 6] = [0, 1, 2, 3, 6, 7];

impl Author<'_> {
    pub(super) fn gadget(&mut self) {
        match self.frame.focus {
            Focus::Paging => self.paging(),
            Focus::Interrupts => self.interrupts(),
            Focus::Floats => self.floats(),
            Focus::Strings => self.strings(),
            Focus::Modes => self.modes(),
            Focus::Edges => self.work(),
            Focus::None => match self.rng.below(5) {
                0 => self.paging(),
                1 => self.interrupts(),
                2 => self.floats(),
                3 => self.strings(),
                _ => self.modes(),
            },
        }
    }

    fn gate(&mut self, vector: u8) {
        self.emit(&[0xcd, vector], None);
    }

    /// An instruction with a memory operand at `at` (without base).
    fn on(&mut self, opcode: &[u8], group: u8, at: u64) {
        let r = self.rng.pick(&PLAIN);
        self.set_register(r, self.frame.base + at);
        let bytes = [opcode, &[group << 3 | r as u8]].concat();
        self.emit(&bytes, None);
    }

    fn paging(&mut self) {
        match self.rng.below(10) {
            0..=4 => {
                self.gate(GATE_CHANGE);
                self.indirect_on();
            }
            5 => {
                self.gate(GATE_SWITCH);
                self.indirect_on();
            }
            6 if self.frame.cpl == 0 => {
                // mov cr3, rax
                let root = self.rng.pick(&ROOTS);
                self.set_register(0, root);
                self.emit(&[0x0f, 0x22, 0xd8], None);
            }
            7 if self.frame.cpl == 0 => {
                // mov rax, cr4; xor eax, PGE; mov cr4, rax
                for bytes in [&[0x0f, 0x20, 0xe0][..], &[0x35, 0x80, 0, 0, 0], &[0x0f, 0x22, 0xe0]] {
                    self.emit(bytes, None);
                }
            }
            8 if self.frame.cpl == 0 => {
                // invlpg [rax]
                let at = self.target(1);
                self.set_register(0, at);
                self.emit(&[0x0f, 0x01, 0x38], None);
            }
            9 => self.gate(GATE_EXCURSION),
            _ => {
                // What was there before and after: the same access around a change.
                let r = self.rng.pick(&PLAIN);
                let at = self.target(8);
                self.set_register(r, at);
                self.emit(&[0x8b, r as u8], None);
                self.gate(GATE_CHANGE);
                let store = if self.rng.chance(50) { 0x89 } else { 0x8b };
                self.emit(&[store, r as u8], None);
            }
        }
    }

    /// Perhaps an indirect jump to the next instruction: call +0; pop rax; add rax, 7; jmp rax.
    fn indirect_on(&mut self) {
        if self.rng.chance(60) {
            self.emit(&[0xe8, 0, 0, 0, 0, 0x58, 0x48, 0x83, 0xc0, 7, 0xff, 0xe0], None);
        }
    }

    fn interrupts(&mut self) {
        match self.rng.below(14) {
            0 => self.emit(&[0xfa], None),     // cli
            1 | 2 => self.emit(&[0xfb], None), // sti
            3 => self.gate(GATE_TOGGLE_IF),
            4 => {
                // mov ax, ss; mov ss, ax
                self.emit(&[0x8c, 0xd0], None);
                self.emit(&[0x8e, 0xd0], None);
            }
            5 => {
                self.emit(&[0xfb], None);
                self.emit(&[0xf4], None); // hlt
            }
            6 => self.gate(GATE_HALT),
            7 | 8 => {
                // To itself: mov dword [ICR], vector | self
                let vector = FIRST_INTERRUPT as u32 + self.rng.below(0xc0) as u32;
                self.set_register(3, APIC + 0x300);
                let bytes = [&[0xc7, 0x03][..], &(vector | 0x4_0000).to_le_bytes()].concat();
                self.emit(&bytes, None);
            }
            9 => {
                // pushfq; btc qword [rsp], 9; popfq
                self.emit(&[0x9c], None);
                self.emit(&[0x48, 0x0f, 0xba, 0x3c, 0x24, 9], None);
                self.emit(&[0x9d], None);
            }
            10 if self.frame.cpl == 0 => {
                // mov cr8, rax
                let priority = self.rng.below(9);
                self.set_register(0, priority);
                self.emit(&[0x44, 0x0f, 0x22, 0xc0], None);
            }
            11 => {
                // sti; cli: never a moment for an interrupt.
                self.emit(&[0xfb], None);
                self.emit(&[0xfa], None);
            }
            _ => {
                // The device interrupts now and then.
                let offset = 8 * self.rng.below(8);
                let opcode = self.rng.pick(&[0x8b, 0x89, 0x01]);
                self.on(&[opcode], 0, DEVICE + offset);
            }
        }
    }

    fn floats(&mut self) {
        let n = self.rng.below(24);
        match n {
            0 | 1 => {
                let at = CONTROLS + 2 * self.rng.below(16);
                self.on(&[0xd9], 5, at); // fldcw
            }
            2 => {
                let at = FX_IMAGES + 512 * self.rng.below(2);
                let opcode: &[u8] = if self.rng.chance(50) { &[0x0f, 0xae] } else { &[0x48, 0x0f, 0xae] };
                self.on(opcode, 1, at); // fxrstor
            }
            3 => self.on(&[0x0f, 0xae], 0, DATA + 0x400), // fxsave
            4 => self.emit(&[0xdb, 0xe3], None),          // fninit
            5 => self.emit(&[0x0f, 0x77], None),          // emms
            6 => self.emit(&[0xdb, 0xe2], None),          // fnclex
            7 | 8 => {
                let at = MXCSRS + 4 * self.rng.below(8);
                self.on(&[0x0f, 0xae], 2, at); // ldmxcsr
            }
            9 => {
                let at = FP_IMAGES + 128 * self.rng.below(2);
                self.on(&[0xdd], 4, at); // frstor
            }
            10 => {
                let at = ENVIRONMENTS + 32 * self.rng.below(4);
                self.on(&[0xd9], 4, at); // fldenv
            }
            11 => self.on(&[0xd9], 6, DATA + 0x600), // fnstenv
            12 => self.on(&[0xdd], 6, DATA + 0x600), // fnsave
            13 => self.emit(&[0xdf, 0xe0], None),    // fnstsw ax
            14 => self.on(&[0xdd], 7, DATA + 0x680), // fnstsw
            15 => self.on(&[0xd9], 7, DATA + 0x690), // fnstcw
            16 => self.emit(&[0x9b], None),          // fwait
            17 => self.gate(GATE_TASK_SWITCHED),
            18 if self.frame.cpl == 0 => self.emit(&[0x0f, 0x06], None), // clts
            19 | 20 => {
                // Past one end of the stack or the other: fld1, fldz, fldpi; fstp st(0), fcomp, fincstp, ffree.
                let up: [[u8; 2]; 3] = [[0xd9, 0xe8], [0xd9, 0xee], [0xd9, 0xeb]];
                let down: [[u8; 2]; 5] = [[0xdd, 0xd8], [0xd8, 0xd9], [0xde, 0xd9], [0xd9, 0xf7], [0xdd, 0xc3]];
                let pushing = self.rng.chance(50);
                for _ in 0..1 + self.rng.below(9) {
                    let bytes = if pushing { self.rng.pick(&up) } else { self.rng.pick(&down) };
                    self.emit(&bytes, None);
                }
            }
            _ => self.float_loop(),
        }
    }

    /// A counted loop of loads, arithmetic and stores, at places that may miss or fault between them.
    fn float_loop(&mut self) {
        let at = self.target(10);
        self.set_register(6, at);
        let count = 2 + self.rng.below(30);
        self.set_register(1, count);
        let mut size = 0;
        for _ in 0..2 + self.rng.below(10) {
            let displacement = self.rng.bits() as u8 & 0x78;
            let memory = |op: u8, group: u8| vec![op, 0x46 | group << 3, displacement];
            let i = self.rng.bits() as u8;
            let bytes = match self.rng.below(14) {
                0 => memory(0xdd, 0), // fld qword
                1 => memory(0xd9, 0), // fld dword
                2 => memory(0xdb, 5), // fld tbyte
                3 => memory(0xdd, 3), // fstp qword
                4 => memory(0xd9, 2), // fst dword
                5 => memory(0xdb, 7), // fstp tbyte
                6 => memory(self.rng.pick(&[0xd8, 0xdc, 0xda, 0xde]), i & 7),
                7 => memory(0xdf, 5), // fild qword
                8 => memory(0xdf, 7), // fistp qword
                9 => vec![0xd8, 0xc0 | i & 0x3f],
                10 => vec![0xde, 0xc0 | i & 0x37 | i & 8],
                11 => vec![0xd9, 0xc0 | i & 0xf], // fld st(i), fxch
                12 => vec![0xd9, self.rng.pick(&[0xe0, 0xe1, 0xe4, 0xe5, 0xfa, 0xfc, 0xf0, 0xfd])],
                _ => vec![self.rng.pick(&[0xda, 0xdb]), 0xc0 | i & 0x1f], // fcmov
            };
            size += bytes.len();
            self.emit(&bytes, None);
        }
        self.emit(&[0x48, 0x83, 0xc6, 8], None); // add rsi, 8
        self.emit(&[0xe2, (-(size as i64) - 6) as u8], None); // loop
    }

    /// A string instruction whose elements end in front of, on or behind an edge.
    fn strings(&mut self) {
        let edges =
            [HOLE, READ_ONLY, SUPERVISOR, FRESH, DEVICE, NOBODY, DATA + 0x1000, CODE + 0x1000, CODE + 0x40, FRESH + 0x1000];
        let size = 1 << self.rng.below(4);
        let backwards = self.rng.chance(20);
        self.emit(&[if backwards { 0xfd } else { 0xfc }], None);
        let before = self.rng.below(20);
        let place = |author: &mut Self| {
            let edge = author.rng.pick(&edges);
            let slip = if author.rng.chance(25) { author.rng.below(size) } else { 0 };
            let distance = before * size + slip;
            author.frame.base + if backwards { edge + distance } else { edge - distance }
        };
        let (to, from) = (place(self), if self.rng.chance(30) { place(self) } else { self.target(8) });
        self.set_register(7, to);
        self.set_register(6, from);
        let count = if self.rng.chance(90) { self.rng.below(40) } else { self.rng.below(0x400) };
        self.set_register(1, count);
        let mut bytes = vec![if self.rng.chance(80) { 0xf3 } else { 0xf2 }];
        match size {
            2 => bytes.insert(0, 0x66),
            8 => bytes.push(0x48),
            _ => {}
        }
        let opcode: u8 = self.rng.pick(&[0xa4, 0xa4, 0xaa, 0xaa, 0xac, 0xa6, 0xae]);
        bytes.push(opcode | u8::from(size > 1));
        self.emit(&bytes, None);
        if self.rng.chance(50) {
            // And what is left of it.
            self.emit(&bytes, None);
        }
        self.emit(&[0xfc], None);
    }

    /// The other ring, and code of 16 and 32 bits.
    fn modes(&mut self) {
        match self.rng.below(10) {
            0 => self.emit(&[0x0f, 0x05], None),                              // syscall
            1 if self.frame.cpl == 0 => self.emit(&[0x0f, 0x01, 0xf8], None), // swapgs
            2 => self.interrupt_return(),
            3 => self.gate(GATE_EXCURSION),
            4 => {
                // rdgsbase, wrgsbase rax
                let bytes = self.rng.pick(&[[0xf3, 0x48, 0x0f, 0xae, 0xc8], [0xf3, 0x48, 0x0f, 0xae, 0xd8]]);
                self.emit(&bytes, None);
            }
            5 => {
                // mov rax, gs:[…]
                let offset = 8 * self.rng.below(64) as u32;
                let bytes = [&[0x65, 0x48, 0x8b, 0x04, 0x25][..], &offset.to_le_bytes()].concat();
                self.emit(&bytes, None);
            }
            _ => self.compatibility(),
        }
    }

    /// IRETQ to the next instruction, in this ring or (from ring 0) in ring 3.
    fn interrupt_return(&mut self) {
        let cpl = if self.frame.cpl == 0 && self.rng.chance(50) { 3 } else { self.frame.cpl };
        let (cs, ss) = Frame::selectors(cpl, 64);
        self.emit(&[0x48, 0x89, 0xe0], None); // mov rax, rsp
        self.emit(&[0x6a, ss as u8], None);
        self.emit(&[0x50], None); // push rax
        self.emit(&[0x9c], None); // pushfq
        self.emit(&[0x6a, cs as u8], None);
        // The address has no base: another alias of the same code.
        self.emit(&[0x68, 0, 0, 0, 0], Some(Fix::After { items: 2, offset: 1, less: 0 }));
        self.emit(&[0x48, 0xcf], None);
    }

    /// Through a far return into code of 16 or 32 bits, and back by a far jump.
    fn compatibility(&mut self) {
        let bits = if self.rng.chance(75) { 32 } else { 16 };
        let cpl = self.frame.cpl;
        let cs = Frame::selectors(cpl, bits).0;
        let less = if bits == 16 { CODE } else { 0 };
        self.emit(&[0x6a, cs as u8], None);
        self.emit(&[0x68, 0, 0, 0, 0], Some(Fix::After { items: 2, offset: 1, less }));
        self.emit(&[0x48, 0xcb], None); // retfq
        self.bits = bits;
        for _ in 0..self.rng.below(8) {
            self.legacy(bits);
        }
        let back = if cpl == 3 { USER_CS64 } else { KERNEL_CS }.to_le_bytes();
        if bits == 16 {
            self.emit(&[0x66, 0xea, 0, 0, 0, 0, back[0], back[1]], Some(Fix::After { items: 1, offset: 2, less: 0 }));
        } else {
            self.emit(&[0xea, 0, 0, 0, 0, back[0], back[1]], Some(Fix::After { items: 1, offset: 1, less: 0 }));
        }
        self.bits = 64;
    }

    /// An instruction of 16- or 32-bit code.
    fn legacy(&mut self, bits: u32) {
        let code = self.rng.pick(&self.pools.legacy);
        let Some(form) = forms::random(self.rng, code, bits, 0) else { return };
        let memory = (0..form.insn.op_count()).any(|n| form.insn.op_kind(n) == OpKind::Memory);
        // Sixteen bits reach the kernel's own pages and nothing else.
        if memory && (bits == 16 || self.rng.chance(50)) || form.insn.is_stack_instruction() && self.rng.chance(70) {
            return;
        }
        if memory || self.rng.chance(10) {
            let r = self.rng.pick(&PLAIN);
            let at = self.target(8).wrapping_sub(self.frame.base) as u32;
            let bytes = [&[0xb8 | r as u8][..], &at.to_le_bytes()].concat();
            if bits == 32 {
                self.emit(&bytes, None);
            }
        }
        self.emit(&form.bytes, None);
    }
}
