//! x87, MMX and SSE: every instruction of the profile has a handler; what ring 3 of a host cannot try (availability, pending
//! exceptions, state images). Results of single instructions are compared with silicon by the differential runner.

use std::sync::Arc;

use iced_x86::{Code, CpuidFeature as F, EncodingKind, Instruction, OpKind};
use memory::{GuestMemory, RegionLayout};
use vcpu::{Bus, Clock, Control};

use super::{fpu, mmx, sse};
use crate::core::{Core, Exception, GP, MF, NM, Pending, Shared, UD, XM};
use crate::decode::{self, Decoded};
use crate::state::{CodeSize, F80, GPR_BLOCK, RAX, RBX, RCX};

/// One vCPU without paging, 64-bit code, everything enabled; RBX points at 4 KiB of scratch memory.
struct Rig {
    core: Core,
}

const SCRATCH: u64 = 0x4000;
const RIP: u64 = 0x1234_5678_9a00;

impl Rig {
    fn new() -> Self {
        let memory = Arc::new(GuestMemory::new(&[RegionLayout { gpa: 0, size: 0x10000 }]).unwrap());
        let clock = Arc::new(Clock::new(1_000_000, 0));
        let shared = Shared::new(memory, Arc::new(Bus::default()), clock, Arc::new(Control::default()), 1, 40, None);
        let mut core = Core::new(Arc::new(shared), 0);
        let cpu = &mut core.cpu;
        cpu.cr0 = 0x33;
        cpu.cr4 = sse::CR4_OSFXSR | sse::CR4_OSXMMEXCPT;
        cpu.efer = 0x500;
        cpu.code_size = CodeSize::Bits64;
        cpu.seg_base = [0; 8];
        cpu.mxcsr = 0x1f80;
        cpu.fpu = Default::default();
        cpu.gpr[RBX] = SCRATCH;
        cpu.gpr[GPR_BLOCK as usize] = RIP;
        core.refresh();
        Self { core }
    }

    /// Runs one instruction; the vector and error code of its exception.
    fn run(&mut self, bytes: &[u8]) -> Result<(), (u8, Option<u32>)> {
        let mut out = Vec::new();
        assert_ne!(decode::block(bytes, self.core.cpu.code_size, &mut out), Decoded::Short);
        assert_eq!(usize::from(out[0].len), bytes.len(), "{bytes:x?}");
        match (out[0].f)(&mut self.core, &out[0]) {
            Ok(_) => Ok(()),
            Err(_) => match self.core.fault.take() {
                Some(Pending::Exception(Exception { vector, error, .. })) => Err((vector, error)),
                other => panic!("{other:?}"),
            },
        }
    }

    fn put(&mut self, at: u64, data: &[u8]) {
        self.core.store_bytes(SCRATCH + at, data).unwrap();
    }

    fn get<const N: usize>(&mut self, at: u64) -> [u8; N] {
        let mut b = [0; N];
        self.core.load_bytes(SCRATCH + at, &mut b).unwrap();
        b
    }
}

const MOVAPS_LOAD: &[u8] = &[0x0f, 0x28, 0x03]; // movaps xmm0,[rbx]
const MOVUPS_LOAD: &[u8] = &[0x0f, 0x10, 0x03];
const XORPS: &[u8] = &[0x0f, 0x57, 0xc0];
const PXOR_MM: &[u8] = &[0x0f, 0xef, 0xc0];
const EMMS: &[u8] = &[0x0f, 0x77];
const MOVNTI: &[u8] = &[0x0f, 0xc3, 0x03];
const FLD1: &[u8] = &[0xd9, 0xe8];
const FLDZ: &[u8] = &[0xd9, 0xee];
const WAIT: &[u8] = &[0x9b];
const FXSAVE64: &[u8] = &[0x48, 0x0f, 0xae, 0x03];
const FXRSTOR64: &[u8] = &[0x48, 0x0f, 0xae, 0x0b];
const FXSAVE: &[u8] = &[0x0f, 0xae, 0x03];
const FXRSTOR: &[u8] = &[0x0f, 0xae, 0x0b];
const LDMXCSR: &[u8] = &[0x0f, 0xae, 0x13];
const STMXCSR: &[u8] = &[0x0f, 0xae, 0x1b];
const FNSTENV: &[u8] = &[0xd9, 0x33];
const FLDENV: &[u8] = &[0xd9, 0x23];
const FNSAVE: &[u8] = &[0xdd, 0x33];
const FRSTOR: &[u8] = &[0xdd, 0x23];
const FLDCW: &[u8] = &[0xd9, 0x2b];
const FNSTSW_AX: &[u8] = &[0xdf, 0xe0];
const FNCLEX: &[u8] = &[0xdb, 0xe2];
const FDIVP: &[u8] = &[0xde, 0xf9];

#[test]
fn availability() {
    let sse = [MOVUPS_LOAD, XORPS, LDMXCSR];
    let mmx = [PXOR_MM, EMMS];
    let mut rig = Rig::new();
    rig.put(0, &0x1f80u32.to_le_bytes());
    for i in sse.iter().chain(&mmx) {
        assert_eq!(rig.run(i), Ok(()), "{i:x?}");
    }
    let clean = rig.core.cpu.clone();
    for (cr0, cr4, sse_is, mmx_is, x87_is, fx_is) in [
        (0x33 | sse::CR0_EM, 0x600, Err(UD), Err(UD), Err(NM), Err(UD)),
        (0x33 | sse::CR0_TS, 0x600, Err(NM), Err(NM), Err(NM), Err(NM)),
        (0x33 | sse::CR0_TS | sse::CR0_EM, 0x600, Err(UD), Err(UD), Err(NM), Err(UD)),
        (0x33, 0x400, Err(UD), Ok(()), Ok(()), Ok(())),
        (0x33 | sse::CR0_TS, 0, Err(UD), Err(NM), Err(NM), Err(NM)),
    ] {
        rig.core.cpu = clean.clone();
        (rig.core.cpu.cr0, rig.core.cpu.cr4) = (cr0, cr4);
        let vector = |r: Result<(), (u8, Option<u32>)>| r.map_err(|e| e.0);
        for i in sse {
            assert_eq!(vector(rig.run(i)), sse_is, "{i:x?} cr0 {cr0:x} cr4 {cr4:x}");
        }
        for i in mmx {
            assert_eq!(vector(rig.run(i)), mmx_is, "{i:x?} cr0 {cr0:x} cr4 {cr4:x}");
        }
        assert_eq!(vector(rig.run(FLD1)), x87_is, "cr0 {cr0:x}");
        assert_eq!(vector(rig.run(FNSTSW_AX)), x87_is, "cr0 {cr0:x}");
        assert_eq!(vector(rig.run(FXSAVE)), fx_is, "cr0 {cr0:x}");
        assert_eq!(rig.run(MOVNTI), Ok(()), "MOVNTI is available always");
    }
    // WAIT asks MP, not EM.
    rig.core.cpu = clean;
    for (cr0, is) in [(0x31 | sse::CR0_TS, Ok(())), (0x33 | sse::CR0_TS, Err((NM, None))), (0x33 | sse::CR0_EM, Ok(()))] {
        rig.core.cpu.cr0 = cr0;
        assert_eq!(rig.run(WAIT), is);
    }
}

#[test]
fn alignment() {
    let mut rig = Rig::new();
    rig.core.cpu.gpr[RBX] = SCRATCH + 8;
    assert_eq!(rig.run(MOVAPS_LOAD), Err((GP, Some(0))));
    assert_eq!(rig.run(&[0x66, 0x0f, 0xef, 0x03]), Err((GP, Some(0))), "pxor xmm0,[rbx]");
    assert_eq!(rig.run(&[0x0f, 0x2b, 0x03]), Err((GP, Some(0))), "movntps");
    assert_eq!(rig.run(FXSAVE), Err((GP, Some(0))));
    assert_eq!(rig.run(MOVUPS_LOAD), Ok(()));
    assert_eq!(rig.run(&[0x66, 0x0f, 0x3a, 0x63, 0x03, 0]), Ok(()), "pcmpistri takes any address");
    assert_eq!(rig.run(&[0xf2, 0x0f, 0x58, 0x03]), Ok(()), "addsd");
}

#[test]
fn mxcsr_and_unmasked_exceptions() {
    let mut rig = Rig::new();
    rig.put(0, &0x0001_1f80u32.to_le_bytes());
    assert_eq!(rig.run(LDMXCSR), Err((GP, Some(0))));
    rig.put(0, &0xffffu32.to_le_bytes());
    assert_eq!(rig.run(LDMXCSR), Ok(()));
    rig.core.cpu.mxcsr = 0x1d80; // division by zero not masked
    assert_eq!(rig.run(STMXCSR), Ok(()));
    assert_eq!(rig.get::<4>(0), 0x1d80u32.to_le_bytes());

    rig.core.cpu.xmm[1] = 0x3f80_0000;
    let divss = [0xf3, 0x0f, 0x5e, 0xca]; // divss xmm1,xmm2 (0)
    assert_eq!(rig.run(&divss), Err((XM, None)));
    assert_eq!((rig.core.cpu.xmm[1], rig.core.cpu.mxcsr), (0x3f80_0000, 0x1d84));
    rig.core.cpu.cr4 &= !sse::CR4_OSXMMEXCPT;
    assert_eq!(rig.run(&divss), Err((UD, None)));
    rig.core.cpu.mxcsr = 0x1f80;
    assert_eq!(rig.run(&divss), Ok(()));
    assert_eq!((rig.core.cpu.xmm[1], rig.core.cpu.mxcsr), (0x7f80_0000, 0x1f84));
}

/// 1/0 with division by zero unmasked: pending, reported by the next waiting instruction, pointers kept.
#[test]
fn pending_x87_exception() {
    let mut rig = Rig::new();
    rig.put(0, &0x37bu16.to_le_bytes());
    for i in [FLDCW, FLD1, FLDZ] {
        assert_eq!(rig.run(i), Ok(()));
    }
    rig.core.cpu.gpr[GPR_BLOCK as usize] = RIP + 0x40;
    assert_eq!(rig.run(FDIVP), Ok(()), "does not fault itself");
    rig.core.cpu.gpr[GPR_BLOCK as usize] = RIP + 0x80;
    let f = rig.core.cpu.fpu;
    assert_eq!(f.fsw & 0x80bf, 0x8084);
    assert_eq!((f.fip, f.fop), (RIP + 0x40, 0x6f9));
    assert_eq!(fpu::phys(&f, 0), 6, "nothing popped");
    for i in [FLD1, WAIT, PXOR_MM, FLDCW, FLDENV, FRSTOR] {
        assert_eq!(rig.run(i), Err((MF, None)), "{i:x?}");
    }
    assert_eq!(rig.core.cpu.fpu, f);
    assert_eq!(rig.run(FNSTSW_AX), Ok(()));
    assert_eq!(rig.core.cpu.gpr[RAX] & 0xffff, f.fsw.into());

    // FXSAVE and FXRSTOR do not wait, and give and take the pointers.
    assert_eq!(rig.run(FXSAVE64), Ok(()));
    assert_eq!(rig.get::<2>(6), 0x6f9u16.to_le_bytes());
    assert_eq!(rig.get::<8>(8), (RIP + 0x40).to_le_bytes());
    assert_eq!(rig.run(FNCLEX), Ok(()));
    assert_eq!(rig.run(FLD1), Ok(()));
    assert_eq!(rig.core.cpu.fpu.fip, RIP + 0x80);
    assert_eq!(rig.run(FXRSTOR64), Ok(()));
    assert_eq!(rig.core.cpu.fpu, f);

    // Without a pending exception AMD stores zeros, but the pointers are still there (FNSTENV shows them).
    assert_eq!(rig.run(FNCLEX), Ok(()));
    assert_eq!(rig.run(FXSAVE64), Ok(()));
    assert_eq!(rig.get::<18>(6), [0; 18]);
    assert_eq!(rig.core.cpu.fpu.fip, RIP + 0x40);
}

#[test]
fn data_pointer() {
    let mut rig = Rig::new();
    rig.put(0x10, &2.5f64.to_le_bytes());
    assert_eq!(rig.run(&[0xdd, 0x43, 0x10]), Ok(()), "fld qword [rbx+10h]");
    let f = rig.core.cpu.fpu;
    assert_eq!((f.fdp, f.fop, f.fip), (SCRATCH + 0x10, 0x543, RIP));
    assert_eq!(rig.run(&[0x64, 0x40, 0xd9, 0xc0]), Ok(()), "fs rex fld st(0)");
    assert_eq!((rig.core.cpu.fpu.fdp, rig.core.cpu.fpu.fop), (SCRATCH + 0x10, 0x1c0));
}

/// FNSTENV's four layouts and back.
#[test]
fn environments() {
    let mut rig = Rig::new();
    for i in [FLD1, FLDZ] {
        assert_eq!(rig.run(i), Ok(()));
    }
    let f = &mut rig.core.cpu.fpu;
    (f.fip, f.fdp, f.fop, f.fsw) = (0x0012_3456, 0x000f_edcb, 0x5a5, f.fsw | 0x4000);
    f.st[0] = F80 { mantissa: 1 << 63, sign_exp: 0x7fff };
    f.ftw |= 1;
    let saved = *f;
    let (cw, sw, tw) = (saved.fcw.to_le_bytes(), saved.fsw.to_le_bytes(), 0x1ffe_u16.to_le_bytes());
    rig.core.cpu.code_size = CodeSize::Bits32;
    let words = |w: &[[u8; 2]]| w.concat();
    let h = |v: u16| v.to_le_bytes();
    let wide = |low: &[u8]| [low, &[0xff, 0xff]].concat();
    for (cr0, prefix, want) in [
        (
            0x33,
            false,
            [wide(&cw), wide(&sw), wide(&tw), words(&[h(0x3456), h(0x12), h(0), h(0x5a5), h(0xedcb), h(0xf), h(0), h(0xffff)])]
                .concat(),
        ),
        (0x33, true, words(&[cw, sw, tw, h(0x3456), h(0), h(0xedcb), h(0)])),
        (
            0x32,
            false,
            [
                wide(&cw),
                wide(&sw),
                wide(&tw),
                words(&[h(0x3456), h(0xffff), h(0x25a5), h(1), h(0xedcb), h(0xffff), h(0xf000), h(0)]),
            ]
            .concat(),
        ),
        (0x32, true, words(&[cw, sw, tw, h(0x3456), h(0x25a5), h(0xedcb), h(0xf000)])),
    ] {
        rig.core.cpu.cr0 = cr0;
        rig.core.cpu.fpu = saved;
        rig.put(0, &[0xee; 128]);
        let op = |i: &[u8]| if prefix { [&[0x66], i].concat() } else { i.to_vec() };
        assert_eq!(rig.run(&op(FNSTENV)), Ok(()));
        let got = rig.get::<32>(0);
        assert_eq!(got[..want.len()], want, "cr0 {cr0:x} 16-bit {prefix}");
        assert!(got[want.len()..].iter().all(|&b| b == 0xee));
        assert_eq!(rig.core.cpu.fpu.fcw, saved.fcw | 0x3f);
        rig.core.cpu.fpu = Default::default();
        assert_eq!(rig.run(&op(FLDENV)), Ok(()));
        let f = rig.core.cpu.fpu;
        assert_eq!((f.fcw, f.fsw, f.ftw), (saved.fcw, saved.fsw, saved.ftw));
        let (ip, dp) = match (cr0, prefix) {
            (0x33, true) => (0x3456, 0xedcb),
            (0x32, true) => (0x2_3456, 0xf_edcb),
            _ => (0x12_3456, 0xf_edcb),
        };
        assert_eq!((f.fip, f.fdp), (ip, dp));
        assert_eq!(f.fop, if cr0 == 0x33 && prefix { 0 } else { 0x5a5 });
    }
}

#[test]
fn whole_states() {
    let mut rig = Rig::new();
    let fill = |rig: &mut Rig| {
        for n in 0..8u16 {
            let r = F80 { mantissa: 0x8000_0000_0000_0000 | u64::from(n) << 8, sign_exp: 0x3f00 + n };
            rig.core.cpu.fpu.st[n as usize] = r;
        }
        (rig.core.cpu.fpu.ftw, rig.core.cpu.fpu.fsw, rig.core.cpu.fpu.fcw) = (0b0110_1101, 0x2921, 0xf7f & 0x1f7f);
        for n in 0..16 {
            rig.core.cpu.xmm[n] = (n as u128 + 1) * 0x0101_0101_0101_0101_0101_0101_0101_0101;
        }
        rig.core.cpu.mxcsr = 0x9fa5;
    };
    fill(&mut rig);
    let before = rig.core.cpu.clone();
    rig.put(0, &[0xee; 512]);
    assert_eq!(rig.run(FXSAVE64), Ok(()));
    assert!(rig.get::<96>(416).iter().all(|&b| b == 0xee), "the end belongs to software");
    assert_eq!(rig.get::<4>(28), 0xffffu32.to_le_bytes());
    rig.core.cpu.fpu = Default::default();
    rig.core.cpu.xmm = [7; 16];
    rig.core.cpu.mxcsr = 0x1f80;
    assert_eq!(rig.run(FXRSTOR64), Ok(()));
    assert_eq!((rig.core.cpu.fpu, rig.core.cpu.xmm, rig.core.cpu.mxcsr), (before.fpu, before.xmm, before.mxcsr));

    // Outside 64-bit code there are eight XMM registers; without OSFXSR there is none and no MXCSR.
    rig.core.cpu.code_size = CodeSize::Bits32;
    rig.core.cpu.xmm = [7; 16];
    assert_eq!(rig.run(FXRSTOR), Ok(()));
    assert_eq!(rig.core.cpu.xmm[..8], before.xmm[..8]);
    assert_eq!(rig.core.cpu.xmm[8..], [7; 8]);
    rig.put(0, &[0xee; 512]);
    assert_eq!(rig.run(FXSAVE), Ok(()));
    assert!(rig.get::<224>(288).iter().all(|&b| b == 0xee));
    rig.core.cpu.cr4 = 0;
    rig.core.cpu.xmm = [7; 16];
    rig.core.cpu.mxcsr = 0x1f80;
    assert_eq!(rig.run(FXRSTOR), Ok(()));
    assert_eq!((rig.core.cpu.xmm, rig.core.cpu.mxcsr), ([7; 16], 0x1f80));
    assert_eq!(rig.core.cpu.fpu, before.fpu);
    rig.core.cpu.cr4 = sse::CR4_OSFXSR;

    // Reserved MXCSR bits change nothing.
    rig.put(24, &0x1_0000u32.to_le_bytes());
    assert_eq!(rig.run(FXRSTOR), Err((GP, Some(0))));
    assert_eq!(rig.core.cpu.fpu, before.fpu);

    // FNSAVE initialises, FRSTOR brings back.
    assert_eq!(rig.run(FNSAVE), Ok(()));
    assert_eq!((rig.core.cpu.fpu.ftw, rig.core.cpu.fpu.fcw, rig.core.cpu.fpu.fsw), (0, 0x37f, 0));
    assert_eq!(rig.run(FRSTOR), Ok(()));
    assert_eq!(rig.core.cpu.fpu, before.fpu);
}

#[test]
fn mmx_lives_in_x87_registers() {
    let mut rig = Rig::new();
    for i in [FLD1, FLD1, FLDZ] {
        assert_eq!(rig.run(i), Ok(()));
    }
    rig.core.cpu.gpr[RCX] = 0x1122_3344_5566_7788;
    assert_eq!(rig.run(&[0x48, 0x0f, 0x6e, 0xd9]), Ok(()), "movq mm3,rcx");
    let f = rig.core.cpu.fpu;
    assert_eq!((f.fsw & fpu::TOP, f.ftw), (0, 0xff));
    assert_eq!(f.st[3], F80 { mantissa: 0x1122_3344_5566_7788, sign_exp: 0xffff });
    assert_eq!(f.st[7].sign_exp, 0x3fff, "a register not written keeps its exponent");
    assert_eq!(rig.run(&[0x0f, 0x67, 0xdb]), Ok(()), "packuswb mm3,mm3");
    assert_eq!(rig.core.cpu.fpu.st[3].mantissa, 0xffff_ffff_ffff_ffff);
    assert_eq!(rig.run(EMMS), Ok(()));
    assert_eq!(rig.core.cpu.fpu.ftw, 0);
    assert_eq!(rig.run(FLD1), Ok(()));
}

#[test]
fn string_compares() {
    let text = |s: &[u8]| {
        let mut b = [0; 16];
        b[..s.len()].copy_from_slice(s);
        u128::from_le_bytes(b)
    };
    let mut rig = Rig::new();
    for (a, b, imm, index, cf, zf) in [
        (text(b"lo"), text(b"hello, world"), 0x0c, 3, true, true), // where the needle starts
        (text(b"aeiou"), text(b"xyzebc"), 0x00, 3, true, true),    // first of a set
        (text(b"az"), text(b"UPPERlower"), 0x04, 5, true, true),   // first in a range
        (text(b"same text"), text(b"same test"), 0x18, 7, true, true), // first difference
        (text(b"q"), text(b"no such one here"), 0x00, 16, false, false),
        (text(b"e"), text(b"no such one here"), 0x40, 15, true, false), // last of a set
    ] {
        rig.core.cpu.xmm[0] = a;
        rig.core.cpu.xmm[1] = b;
        assert_eq!(rig.run(&[0x66, 0x0f, 0x3a, 0x63, 0xc1, imm]), Ok(()));
        assert_eq!(rig.core.cpu.gpr[RCX], index, "imm {imm:x}");
        assert_eq!((rig.core.cpu.cf(), rig.core.cpu.zf()), (cf, zf), "imm {imm:x}");
    }
}

/// Instructions that other families serve, or that the decoder never returns (wait and no-wait form as one).
fn elsewhere(c: Code) -> bool {
    let name = format!("{c:?}");
    ["Crc32_", "Prefetch"].iter().any(|p| name.starts_with(p))
        || matches!(
            c,
            Code::Fstcw_m2byte
                | Code::Fstenv_m14byte
                | Code::Fstenv_m28byte
                | Code::Fsave_m94byte
                | Code::Fsave_m108byte
                | Code::Fstsw_m2byte
                | Code::Fstsw_AX
                | Code::Finit
                | Code::Fclex
                | Code::Feni
                | Code::Fdisi
                | Code::Fsetpm
        )
}

#[test]
fn all_have_handlers() {
    let ours = [F::FPU, F::FPU287, F::FPU387, F::MMX, F::SSE, F::SSE2, F::SSE3, F::SSSE3, F::SSE4_1, F::SSE4_2, F::FXSR];
    let mut seen = 0;
    for code in Code::values() {
        let features = code.cpuid_features();
        if code.encoding() != EncodingKind::Legacy || !features.iter().any(|f| ours.contains(f)) || elsewhere(code) {
            continue;
        }
        for memory in [None, Some(0), Some(1)] {
            let mut i = Instruction::default();
            i.set_code(code);
            if let Some(n) = memory.filter(|&n| n < i.op_count()) {
                i.set_op_kind(n, OpKind::Memory);
            }
            // Some have no register or no memory form; at least one must be there.
            seen += usize::from(memory.is_none());
            let found = fpu::select(&i).or_else(|| sse::select(&i)).or_else(|| mmx::select(&i)).is_some();
            let name = format!("{code:?}");
            let only_memory = name.contains("_m") && !name.contains("mmm") && !name.contains("_rm") && !name.contains("m8_");
            let right = match memory {
                None => !only_memory,
                Some(0) => name.split('_').nth(1).is_some_and(|o| o.contains('m') && o != "xmm" && o != "mm"),
                Some(_) => name.split('_').nth(2).is_some_and(|o| o.contains('m') && o != "xmm" && o != "mm"),
            };
            assert!(found || !right, "{code:?} with memory operand {memory:?}");
        }
    }
    assert!(seen > 500, "{seen}");
}
